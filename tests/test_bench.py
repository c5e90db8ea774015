"""tools/bench.py, shrunk to seconds: its figures agree with each other, and a GPU day's targets."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch

import train
from moe_model import MoEGPTConfig
from tests.helpers import full, one_line, run_module, succeeded
from tools import bench

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 2}
TINY |= {"device": "cpu", "steps": 4, "vocab_size": 64}


def table(tmp_path, *args, **settings):
    path = tmp_path / "bench.json"
    out = succeeded(run_module("tools.bench", *args, json=path, **settings))
    return out, json.loads(path.read_text())


def test_the_rows_of_the_suites():
    """The dense model and twelve relatives of it, at two sizes or in two precisions."""
    for models in bench.SUITES.values():
        rows = bench.suite_rows(models)
        assert len(rows) == 26 and next(iter(rows)).startswith("dense, ")
        for end in models:
            moe = rows[f"64 experts top-8, equal FLOPs, loop, {end}"]
            chosen = {key: moe[key] for key in ("num_experts", "top_k", "expert_dim")}
            assert chosen == {"num_experts": 64, "top_k": 8, "expert_dim": -1}
            assert rows[f"16 experts top-2, grouped, {end}"]["expert_dim"] == 0


@pytest.mark.parametrize(
    "micro_steps, more", [(1, {}), full(2, {"gradient_accumulation_steps": 2})]
)
def test_a_suite(micro_steps, more, tmp_path):
    run = TINY | {"rows": "dense,8 experts top-2"} | more
    out, found = table(tmp_path, suite="cpu", **run)
    names = [row["name"] for row in found["rows"]]
    assert len(names) == 6 and all(name in out for name in names)
    assert found["torch"] in out and "--suite=cpu" in found["command"]
    dense, equal, *_ = found["rows"]
    for row in found["rows"]:
        assert row["ms"] > 0 and row["time"] > 0 and row["steps"] == 4
        assert row["mfu"] is row["memory_gb"] is row["compile_s"] is None
        assert row["tokens_per_s"] == pytest.approx(micro_steps * 32 / row["ms"] * 1e3)
        assert row["flops"] == row["flops_per_token"] / dense["flops_per_token"]
    assert dense["time"] == 1 and names[0] == "dense, bfloat16"
    assert equal["params"] > equal["active_params"] > dense["active_params"]
    assert equal["flops_per_token"] - dense["flops_per_token"] == 6 * 8 * 32  # the router


def test_rows_that_take_turns():
    """Each steps with its own settings; `time` is per token, and relative to the first row."""
    with mock.patch.dict(vars(train)):
        sizes = vars(train) | TINY | {"gradient_accumulation_steps": 1, "compile": False}
        half, whole = (
            bench.Row(name, sizes | {"batch_size": size, "dtype": name}, torch.device("cpu"))
            for name, size in (("bfloat16", 1), ("float32", 2))
        )
        for row in (half, whole, half):
            row.step()
            assert (train.dtype, train.batch_size) == (row.name, row.tokens_per_step // 16)
    assert len(half.seconds) == half.run.step == 2 and half.run.sequences == 2
    half.seconds, whole.seconds = [1.0] * 5, [3.0] * 5
    assert whole.result(half)["time"] == 1.5 and half.result(half)["time"] == 1.0


@pytest.mark.full
def test_configs_and_profile(tmp_path):
    configs = [f"config/train_plays_char{end}.py" for end in ("", "_moe")]
    run = TINY | {"profile": tmp_path / "trace.json", "rows": "plays", "compile": True}
    out, found = table(tmp_path, *configs, **run)
    assert [row["name"] for row in found["rows"]] == ["train_plays_char", "train_plays_char_moe"]
    assert found["rows"][1]["compile_s"] > 0 and "aten::" in out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"suite": "cpu", "rows": "nothing"}, "no row has 'nothing'"),
        ({}, "nothing to measure"),
        ({"suite": "tpu"}, "expected one of gpt2, cpu"),
        ({"suite": "cpu", "steps": 1}, "steps is 1"),
        ({"suite": "cpu", "n_lyer": 1}, "n_layer"),
        ({"suite": "cpu", "layer": True, "profile": "a.json"}, "makes no profile"),
        ({"suite": "cpu", "layer": True, "device": "cpu"}, "dense, bfloat16 has no experts"),
    ],
)
def test_bad_input_is_one_line(settings, words, tmp_path):
    one_line(run_module("tools.bench", json=tmp_path / "bench.json", **settings), 2, words)


def test_the_cost_of_a_layer():
    """By hand, for 12,288 tokens, 4 experts of width 3072 and a model of 768: products 2 * 3 of
    768 x 3072 twice per assignment; bytes of 8 N D + 5 N H elements for top-1 and 12 N D + 10 N H
    for top-2; 24 bytes for each of the 4 * 2 * 768 * 3072 weights."""
    N, D, H = 12288, 768, 3072
    weights = 24 * 4 * 2 * D * H
    for top_k, elements in ((1, 8 * N * D + 5 * N * H), (2, 12 * N * D + 10 * N * H)):
        config = MoEGPTConfig(n_embd=D, num_experts=4, top_k=top_k)
        flops, layer_bytes = bench.layer_cost(config, N, 2)
        assert flops == top_k * 12 * N * D * H and layer_bytes == 2 * elements + weights
        assert bench.layer_cost(config, N, 4)[1] == 4 * elements + weights // 2  # no cast


def test_a_layer_and_its_floor(tmp_path):
    config = "config/train_plays_char_moe.py"
    out, found = table(tmp_path, config, steps=2, layer=True, device="cpu")
    (row,) = found["rows"]
    assert row["floor_ms"] == pytest.approx(row["products_ms"] + row["traffic_ms"])
    assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"]) and row["tokens"] == 2048
    assert "train_plays_char_moe" in out and f"{row['ms']:.3f}" in out


def write_day(folder):
    """Files as tools/gpu_day.sh leaves them; the loop with 64 experts did not fit."""
    equal, end = "8 experts top-2, equal FLOPs, grouped", "12 x 1024"
    rows = [
        {"name": f"dense, {end}", "ms": 100.0, "memory_gb": 10.0, "params": 1e8, "mfu": 0.45},
        {"name": f"{equal}, {end}", "ms": 115.0, "memory_gb": 12.0, "params": 2e8, "mfu": 0.41},
        {"name": f"16 experts top-2, loop, {end}", "ms": 300.0},
        {"name": f"16 experts top-2, grouped, {end}", "ms": 100.0},
        {"name": f"64 experts top-8, equal FLOPs, grouped, {end}", "ms": 900.0},
    ]
    (folder / "bench.json").write_text(json.dumps({"rows": rows}))
    layer = {"name": "train_gpt2_moe", "of_floor": 1.3}
    (folder / "layer.json").write_text(json.dumps({"rows": [layer]}))
    for name, pairs, end in (
        ("enwik8-adamw", [(30.0, 2.0), (60.0, 1.5), (120.0, 1.2)], {"end": "now"}),
        ("enwik8_moe-adamw", [(30.0, 1.4), (70.0, 1.0), (120.0, 0.9)], {"end": "now"}),
        ("enwik8-muon", [(120.0, 1.2)], {"end": "now"}),
        ("enwik8_moe-muon", [(9.0, 1.1)], {"step": 9}),  # it was cut
    ):
        (folder / "enwik8" / name).mkdir(parents=True)
        evals = enumerate(pairs, 1)
        entries = [{"step": i, "seconds": s, "val_loss": loss} for i, (s, loss) in evals]
        entries = [{"start": "now", "settings": {}}, *entries, end]
        lines = [json.dumps(entry) + "\n" for entry in entries]
        (folder / "enwik8" / name / "log.jsonl").write_text("".join(lines))


def test_the_targets_of_a_day(tmp_path):
    """By hand: 115 / 100 ms; 12 GB of 10 + 16 * 0.1; 300 / 100 ms; at 50 s, half way from 1.4 to
    1.0, the MoE has the loss 1.2 that the dense model has after 120 s."""
    write_day(tmp_path)
    found = list(bench.targets_of(tmp_path))
    measured = [value for _, _, value in found if not math.isnan(value)]
    assert measured == pytest.approx([1.15, 0.41, 12 / 11.6, 3.0, 1.3, 50 / 120])
    missing = [what for what, _, value in found if math.isnan(value)]
    assert len(found) == 13 and "64 experts" in missing[0] and "muon" in missing[-1]
    out = succeeded(run_module("tools.bench", targets=tmp_path))
    assert len(out.splitlines()) == 13 and out.count("not measured") == 7
    assert "<= 1.15   1.15\n" in out and "<= 0.7   0.42\n" in out
    assert all(math.isnan(value) for _, _, value in bench.targets_of(Path("nowhere")))


def test_seconds_to_a_loss():
    evals = [10.0, 20.0, 30.0, 40.0, 50.0], [1.5, 1.6, 1.1, 1.3, 1.0]
    assert bench.seconds_to(2.0, *evals) == 10.0  # at the first evaluation already
    assert bench.seconds_to(1.3, *evals) == pytest.approx(25.0)  # of 1.5 to 1.1: it came up to 1.6
    assert bench.seconds_to(1.05, *evals) == pytest.approx(45.0)
    assert bench.seconds_to(0.9, *evals) == math.inf
