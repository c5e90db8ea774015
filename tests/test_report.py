"""tools/report.py: its numbers against ones computed here."""

import json
import math
import re

import numpy as np
import pytest

from tests.helpers import train
from tests.report_runs import LOSSES, claim, log_lines, made, make, three_seeds, write
from tools import figures, report, run_logs


def test_quantiles():
    """T against the density of Student's t, integrated here."""
    x = np.linspace(0, 15, 300_001)
    for df, quantile in enumerate(report.T[:-1], 1):
        density = (
            np.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2))
            / math.sqrt(df * math.pi)
            * (1 + x**2 / df) ** (-(df + 1) / 2)
        )
        total = np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(x))
        assert abs(np.interp(0.475, total, x[1:]) - quantile) < 6e-4, df
    assert report.T[-1] == 1.96 and len(report.T) == 31
    assert report.compare(dict.fromkeys(range(50), 1.0) | {0: 2.0}, dict.fromkeys(range(50), 0.0))[
        1
    ] == pytest.approx(1.96 * math.sqrt((0.98**2 + 49 * 0.02**2) / 49) / math.sqrt(50))


def test_main_table(tmp_path):
    make(tmp_path, three_seeds(), match=" matched by hand")
    page, rows, errors = made(tmp_path)
    assert not errors and "## Notes" not in page and "6 of 6 runs are finished" in page
    assert (
        page.startswith("# A sweep\n")
        and "python -m tools.sweep config/sweeps/a.py" in page
        and "torch 2.13.0" in page
    )
    assert f"python -m tools.report {tmp_path}" in page and "- moe: moe matched by hand" in page
    dense, moe = rows["dense"][0], rows["moe"][0]
    # by hand: differences -0.10, -0.07, -0.09; mean -0.0867, standard deviation 0.0153;
    # Student's t with 2 degrees of freedom is 4.303
    half = 4.303 * math.sqrt((0.01333**2 + 0.01667**2 + 0.00333**2) / 2) / math.sqrt(3)
    assert moe == [
        "3",
        "2.00M",
        "1.00M",
        "6.00",
        "0.04M",
        "2.46e+11",
        "10",
        "1.9667 (0.0351)",
        f"-0.0867 ± {half:.4f} (n = 3)",
    ]
    assert f"{half:.4f}" == "0.0379" and dense[-2:] == ["2.0533 (0.0503)", "baseline"]
    assert rows["moe"][1] == ["0.750", "1.000", "1.000", "0.500", "0.125"]  # balance
    assert len(rows["dense"]) == 1
    for name in re.findall(r"\n!\[.+\]\((.+)\)\n\n\w", page):
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000, name
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "loss.png",
        "params.png",
        "balance.png",
        "load-moe.png",
    }


def test_differences_are_paired_by_seed(tmp_path):
    make(
        tmp_path,
        {
            "dense": {1: {"loss": 2.0}, 2: {"loss": 3.0}, 3: {"loss": 9.0}},
            "moe": {2: {"loss": 2.5}, 1: {"loss": 1.4}},
            "one": {3: {"loss": 8.0}},
            "other": {7: {"loss": 1.0}},
        },
    )
    rows = made(tmp_path)[1]
    assert rows["moe"][0][-1] == f"-0.5500 ± {12.706 * 0.0707107 / math.sqrt(2):.4f} (n = 2)"
    assert rows["one"][0][-1] == "-1.0000 (n = 1)" and rows["other"][0][-1] == "no seed in common"


def test_findings(tmp_path):
    groups = three_seeds() | {
        "near": {
            seed: {"loss": loss + d}
            for seed, loss, d in zip((1, 2, 3), LOSSES["moe"], (0.01, -0.02, 0.005), strict=True)
        },
        "late": {1: None, 2: None},
        "going": {1: {"loss": 1.0, "ended": False, "max_iters": 40}},
        "single": {1: {"loss": 1.0}},
        "uneven": {s: {"loss": 2, "vio": 0.9 + s / 100} for s in (1, 2, 3)},
    }
    make(
        tmp_path,
        groups,
        [
            claim("a holds", ["moe", "dense"]),
            claim("b opposite", ["moe", "dense"], expect="higher"),
            claim("c noise", ["near", "moe"]),
            claim("d late", ["late", "dense"]),
            claim("e going", ["dense", "going"]),
            claim("f one seed", ["single", "dense"]),
            claim("g layers", ["moe", "moe"], ["first_layer_vio", "other_layers_vio"]),
            claim("h vio", ["moe", "uneven"], "max_vio"),
            claim("i dense", ["moe", "dense"], "entropy"),
            claim("j metric", ["moe", "dense"], "perplexity"),
            claim("k run", ["moe", "sparse"]),
            claim("l expect", ["moe", "dense"], expect="less"),
            {"claim": "m empty"},
        ],
    )
    page, rows, errors = made(tmp_path)
    verdicts = {
        name[0]: cells[0][-1].strip("*") for name, cells in rows.items() if re.match("[a-m] ", name)
    }
    assert verdicts == {
        "a": "holds",
        "b": "opposite",
        "c": "not seen: within the noise",
        "d": "not run yet",
        "e": "not run yet",
        "f": "undecided: one seed",
        "g": "holds",
        "h": "holds",
        "i": "not logged",
        "j": "unreadable: unknown metric 'perplexity'",
        "k": "unreadable: unknown run 'sparse'",
        "l": "unreadable: expect is 'less', expected 'lower' or 'higher'",
        "m": "unreadable: expected two runs",
    }
    assert (
        "\n3 of 13 hold, 1 opposite, 1 not seen, 2 not run yet, 1 undecided, 1 not logged, "
        "4 unreadable.\n" in page
    )
    assert rows["a holds"][0][:-1] == [
        "A paper: so much",
        "moe against dense",
        "val_loss",
        "1.9667",
        "2.0533",
        "-0.0867 ± 0.0379 (n = 3)",
    ]
    assert rows["g layers"][0][2:6] == [
        "first_layer_vio against other_layers_vio",
        "0.500",
        "1.000",
        "-0.500 ± 0.000 (n = 3)",
    ]
    for words in (
        "'j metric': unknown metric 'perplexity'",
        "'k run': unknown run 'sparse'",
        "late,seed=1: not begun",
    ):
        assert words in errors and words in page.partition("## Notes")[2]


def test_metrics(tmp_path):
    lines = log_lines(vio=0.5)
    for line in lines:  # the last fifth are steps 17 to 20
        if "max_vio" in line and line["step"] > 16:
            line |= {
                "max_vio_mean": 0.25,
                "dead_experts": line["step"] - 17,
                "logit_norm": [2.0, 4.0],
            }
    write(tmp_path / "a", lines)
    found = {
        name: metric(run_logs.read_log(tmp_path / "a" / "log.jsonl"))
        for name, metric in run_logs.METRICS.items()
    }
    expected = {
        "val_loss": 1.5,
        "seconds": 10,
        "tokens_per_s": 1000,
        "max_vio": 0.25,
        "max_vio_worst": 1,
        "first_layer_vio": 0.5,
        "other_layers_vio": 1,
        "dead_experts": 1.5,
        "logit_norm": 3,
        "z_loss": 4,
        "dropped": 0.125,
        "entropy": 0.5,
    }
    assert found == pytest.approx(expected)
    write(tmp_path / "b", log_lines(use_moe=False))
    found = {
        name: metric(run_logs.read_log(tmp_path / "b" / "log.jsonl"))
        for name, metric in run_logs.METRICS.items()
    }
    assert [name for name, value in found.items() if value is not None] == [
        "val_loss",
        "seconds",
        "tokens_per_s",
    ]


def test_seeds_that_end_at_different_steps(tmp_path):
    for seed, steps in (
        (1, 20),
        (2, 22),
        (3, 25),
    ):  # seed 2 has its last evaluation at step 20, too
        write(
            tmp_path / f"dense,seed={seed}",
            log_lines(seed, steps=steps, max_iters=10**6, max_seconds=10.0, use_moe=False),
        )
    runs = run_logs.read_runs(tmp_path)
    xs, losses = figures.curve(list(runs.values()))
    assert losses.shape == (3, 4) and list(losses[:, -1]) == [
        run_logs.last_eval(run)["val_loss"] for run in runs.values()
    ]
    assert (
        xs["tokens"][-1] == pytest.approx(2048 * 65 / 3)
        and xs["seconds"][0] == 2.5
        and xs["FLOPs"][0] == 5 * 2048 * 6e6
    )
    made(tmp_path)


def test_a_run_whose_first_line_has_no_loads(tmp_path):
    """As of one that was resumed into another folder, between two lines that have them."""
    lines = log_lines()
    for line in lines[1:8]:
        for key in ("expert_load", "router_entropy"):
            line.pop(key, None)
    write(tmp_path / "moe,seed=1", lines)
    page, rows, errors = made(tmp_path)
    assert not errors and "## Balance" in page and len(rows["moe"]) == 2
    assert (tmp_path / "load-moe.png").exists()


def test_trained_runs(tmp_path, play):
    for seed in (1, 2):
        for name, more in (("dense", {}), ("moe", {"use_moe": True, "top_k": 2})):
            done = train(
                dataset=play,
                seed=seed,
                max_iters=4,
                eval_interval=2,
                load_interval=3,  # the second step's line has no entropy
                out_dir=tmp_path / f"{name},seed={seed}",
                sample_tokens=0,
                **more,
            )
            assert done.returncode == 0, done.stderr
    page, rows, errors = made(tmp_path)
    assert not errors and "4 of 4 runs are finished" in page and rows["dense"][0][-1] == "baseline"
    losses = {}
    for name in ("dense", "moe"):
        logs = [
            (tmp_path / f"{name},seed={seed}" / "log.jsonl").read_text().splitlines()
            for seed in (1, 2)
        ]
        losses[name] = [
            [e["val_loss"] for e in map(json.loads, log) if "val_loss" in e][-1] for log in logs
        ]
        assert (
            rows[name][0][-2] == f"{np.mean(losses[name]):.4f} ({np.std(losses[name], ddof=1):.4f})"
        )
    differences = np.subtract(losses["moe"], losses["dense"])
    half = 12.706 * differences.std(ddof=1) / math.sqrt(2)
    assert rows["moe"][0][-1] == f"{differences.mean():+.4f} ± {half:.4f} (n = 2)"
    assert all(
        (tmp_path / f"{name}.png").stat().st_size > 5000
        for name in ("loss", "params", "balance", "load-moe")
    )
