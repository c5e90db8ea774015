"""tools/bench.py, shrunk to seconds: every suite runs, and its figures agree with each other."""

import json

import pytest

from moe_model import MoEGPTConfig
from tests.helpers import one_line, run_module, succeeded
from tools.bench import layer_cost

TINY = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=16",
    "--batch_size=2",
    "--device=cpu",
    "--steps=4",
]


def bench(tmp_path, *args):
    return run_module("tools.bench", f"--json={tmp_path / 'bench.json'}", *args)


def table(tmp_path, *args):
    done = bench(tmp_path, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((tmp_path / "bench.json").read_text())


def test_suites(tmp_path):
    for suite, rows in (("gpt2", 26), ("cpu", 26)):
        out, found = table(tmp_path, f"--suite={suite}", *TINY, "--vocab_size=64")
        assert (
            len(found["rows"]) == rows
            and found["torch"] in out
            and f"--suite={suite}" in found["command"]
        )
        names = [row["name"] for row in found["rows"]]
        assert (
            all(name in out for name in names)
            and names[0].startswith("dense")
            and len(set(names)) == rows
        )
        for row in found["rows"]:
            assert (
                row["ms"] > 0
                and row["mfu"] is None
                and row["memory_gb"] is None
                and row["steps"] == 4
            )
            assert abs(row["tokens_per_s"] - 32 / row["ms"] * 1e3) < 1e-6 * row["tokens_per_s"]
            assert (
                row["time"] > 0
                and row["flops"] == row["flops_per_token"] / found["rows"][0]["flops_per_token"]
            )
        assert found["rows"][0]["time"] == 1
        dense, equal = (
            next(row for row in found["rows"] if row["name"].startswith(name))
            for name in ("dense", "8 experts top-2")
        )
        assert equal["params"] > equal["active_params"] > dense["active_params"]
        assert equal["flops_per_token"] - dense["flops_per_token"] == 6 * 8 * 32  # the router


@pytest.mark.full
def test_configs_flags_and_profile(tmp_path):
    configs = ["config/train_plays_char.py", "config/train_plays_char_moe.py"]
    trace = tmp_path / "trace.json"
    out, found = table(
        tmp_path,
        *configs,
        *TINY,
        "--vocab_size=64",
        f"--profile={trace}",
        "--rows=plays",
        f"--picture={tmp_path / 'bench.png'}",
        "--compile=True",
    )
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG") and found["rows"][1][
        "compile_s"
    ] > 0
    assert [row["name"] for row in found["rows"]] == ["train_plays_char", "train_plays_char_moe"]
    assert "aten::" in out and json.loads(trace.read_text())["traceEvents"]


def test_bad_input_is_one_line(tmp_path):
    for args, words in (
        (["--suite=cpu", "--rows=nothing"], "no row has 'nothing'"),
        ([], "nothing to measure"),
        (["--suite=cpu", "--steps=1"], "steps is 1"),
        (["--suite=cpu", "--n_lyer=1"], "n_layer"),
    ):
        done = bench(tmp_path, *args)
        assert (
            done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr
        ), done.stderr


def test_the_cost_of_a_layer():
    """By hand, for 12,288 tokens, 4 experts of width 3072 and a model of 768: products 2 * 3 of
    768 x 3072 twice per assignment; bytes of 8 N D + 5 N H elements for top-1 and 12 N D + 10 N H
    for top-2; 24 bytes for each of the 4 * 2 * 768 * 3072 weights."""
    N, D, H = 12288, 768, 3072
    weights = 24 * 4 * 2 * D * H
    for top_k, elements in ((1, 8 * N * D + 5 * N * H), (2, 12 * N * D + 10 * N * H)):
        config = MoEGPTConfig(n_embd=D, num_experts=4, top_k=top_k)
        flops, layer_bytes = layer_cost(config, N, 2)
        assert flops == top_k * 12 * N * D * H and layer_bytes == 2 * elements + weights


def test_a_layer_and_its_floor(tmp_path):
    run = {"steps": 2, "json": tmp_path / "layer.json", "layer": True, "device": "cpu"}
    out = succeeded(run_module("tools.bench", "config/train_plays_char_moe.py", **run))
    (row,) = json.loads((tmp_path / "layer.json").read_text())["rows"]
    assert row["floor_ms"] == pytest.approx(row["products_ms"] + row["traffic_ms"])
    assert row["of_floor"] == pytest.approx(row["ms"] / row["floor_ms"]) and row["tokens"] == 2048
    assert "train_plays_char_moe" in out and f"{row['ms']:.3f}" in out
    dense = run_module("tools.bench", "config/train_plays_char.py", **run)
    one_line(dense, 2, "train_plays_char has no experts")
    picture = run_module("tools.bench", suite="cpu", picture="a.png", **run)
    one_line(picture, 2, "makes no picture")
