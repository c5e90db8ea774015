"""tools/report.py: its numbers against ones computed here, and its pictures."""

import math
import re

import numpy as np
import pytest
from matplotlib import image
from matplotlib.axes import Axes

from tests.helpers import log, run_module, succeeded
from tests.report_runs import LOSSES, E, claim, log_lines, made, make, rows_in, three_seeds, write
from tools import figures, report
from tools.run_logs import LoggedRun, read_runs


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
    fifty = dict.fromkeys(range(50), 1.0) | {0: 2.0}
    half = report.compare(fifty, dict.fromkeys(fifty, 0.0))[1]
    assert half == pytest.approx(1.96 * math.sqrt((0.98**2 + 49 * 0.02**2) / 49) / math.sqrt(50))


def test_main_table_and_pictures(tmp_path):
    make(tmp_path, three_seeds(), match=" matched by hand")
    done = run_module("tools.report", tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert succeeded(done).endswith(f"\n\nwrote {tmp_path / 'report.md'}\n") and not done.stderr
    assert page.startswith("# A sweep\n") and "python -m tools.sweep config/sweeps/a.py" in page
    assert "## Notes" not in page and "6 of 6 runs are finished" in page and "torch 2.13.0" in page
    assert f"python -m tools.report {tmp_path}" in page and "- moe: moe matched by hand" in page
    rows = rows_in(page)
    dense, moe = rows["dense"][0], rows["moe"][0]
    # by hand: differences -0.10, -0.07, -0.09; mean -0.0867, standard deviation 0.0153;
    # Student's t with 2 degrees of freedom is 4.303
    half = 4.303 * math.sqrt((0.01333**2 + 0.01667**2 + 0.00333**2) / 2) / math.sqrt(3)
    assert f"{half:.4f}" == "0.0379"
    assert moe[:7] == ["3", "2.00M", "1.00M", "6.00", "0.04M", "2.46e+11", "10"]
    assert moe[7:] == ["1.9667 (0.0351)", f"-0.0867 ± {half:.4f} (n = 3)"]
    assert len(rows["dense"]) == 1 and dense[-2:] == ["2.0533 (0.0503)", "baseline"]
    assert rows["moe"][1] == ["0.750", "1.000", "1.000", "0.500", "0.125"]  # balance
    for name in re.findall(r"\n!\[.+\]\((.+)\)\n\n\w", page):
        picture = (tmp_path / name).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000, name
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"differences.png", "loss.png", "balance.png", "load-moe.png"}


def test_differences_are_paired_by_seed_and_drawn_from_the_table(tmp_path, monkeypatch, capsys):
    groups = {
        "dense": {1: {"loss": 2.0}, 2: {"loss": 3.0}, 3: {"loss": 9000.0}},
        "moe, 1|2": {2: {"loss": 2.5}, 1: {"loss": 1.4}},
        "one": {3: {"loss": 8.0}},
        "other": {7: {"loss": 1.0}},
    }
    make(tmp_path, groups)
    _, rows, _ = made(monkeypatch, capsys, tmp_path, draw=False)
    half = 12.706 * 0.0707107 / math.sqrt(2)
    assert rows["moe, 1\\|2"][0][-1] == f"-0.5500 ± {half:.4f} (n = 2)"
    assert rows["one"][0][-1] == "-8,992.0000 (n = 1)"
    assert rows["other"][0][-1] == "no seed in common"
    found = {"moe, 1|2": [-0.55, round(half, 4)], "one": [-8992.0, None]}
    drawn = {}
    monkeypatch.setattr(report.figures, "draw_differences", lambda *args: drawn.update(a=args))
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "report.md")])
    report.main()  # what `python -m tools.report report.md` does
    assert drawn["a"] == (tmp_path / "differences.png", found, "dense")


def test_findings(tmp_path, monkeypatch, capsys):
    near = zip((1, 2, 3), LOSSES["moe"], (0.01, -0.02, 0.005), strict=True)
    groups = three_seeds() | {
        "near": {seed: {"loss": loss + d} for seed, loss, d in near},
        "late": {1: None, 2: None},
        "going": {1: {"loss": 1.0, "ended": False, "max_iters": 40}},
        "single": {1: {"loss": 1.0}},
        "uneven": {s: {"loss": 2, "vio": 0.9 + s / 100} for s in (1, 2, 3)},
    }
    findings = {  # by the verdict that comes out
        "holds": claim("a", ["moe", "dense"]),
        "opposite": claim("b", ["moe", "dense"], expect="higher"),
        "within the noise": claim("c", ["near", "moe"]),
        "not run yet": claim("d", ["late", "dense"]),
        "not run yet.": claim("e", ["dense", "going"]),
        "undecided with one seed": claim("f", ["single", "dense"]),
        "holds.": claim("g", ["moe", "moe"], ["first_layer_vio", "other_layers_vio"]),
        "holds..": claim("h", ["moe", "uneven"], "max_vio"),
        "not logged": claim("i", ["moe", "dense"], "entropy"),
        "unreadable": claim("j", ["moe", "dense"], "perplexity"),
        "unreadable.": claim("k", ["moe", "sparse"]),
        "unreadable..": claim("l", ["moe", "dense"], expect="less"),
        "unreadable...": {"claim": "m"},
    }
    make(tmp_path, groups, findings.values())
    page, rows, errors = made(monkeypatch, capsys, tmp_path, draw=False)
    for verdict, finding in findings.items():
        assert rows[finding["claim"]][0][-1] == f"**{verdict.rstrip('.')}**", finding
    summary = "3 of 13 hold, 1 opposite, 1 within the noise, 2 not run yet, "
    summary += "1 undecided with one seed, 1 not logged, 4 unreadable."
    assert f"\n{summary}\n" in page
    ours = ["A paper: so much", "moe against dense", "val_loss", "1.9667", "2.0533"]
    assert rows["a"][0][:-1] == [*ours, "-0.0867 ± 0.0379 (n = 3)"]
    assert rows["g"][0][2:4] == ["first_layer_vio against other_layers_vio", "0.500"]
    assert rows["g"][0][4:6] == ["1.000", "-0.500 ± 0.000 (n = 3)"]
    notes = page.partition("## Notes")[2]
    for words in ("'j': expected two runs, known metrics", ": 'sparse'", "late,seed=1: not begun"):
        assert words in errors and words in notes, words


def test_metrics(tmp_path):
    lines = log_lines(vio=0.5)
    for line in lines:  # the last fifth are steps 17 to 20
        if "max_vio" in line and line["step"] > 16:
            line |= {"max_vio_mean": 0.25, "dead_experts": line["step"] - 17}
            line |= {"logit_norm": [2.0, 4.0]}
    write(tmp_path / "a", lines)
    write(tmp_path / "b", log_lines(use_moe=False))
    runs = read_runs(tmp_path)
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
    assert {name: runs["a"].metric(name) for name in expected} == pytest.approx(expected)
    dense = [name for name in expected if runs["b"].metric(name) is not None]
    assert dense == ["val_loss", "seconds", "tokens_per_s"]


def test_seeds_that_end_at_different_steps(tmp_path):
    """Seed 2 has its last evaluation at step 20, too."""
    timed = {"max_iters": 10**6, "max_seconds": 10.0, "use_moe": False}
    for seed, steps in ((1, 20), (2, 22), (3, 25)):
        write(tmp_path / f"dense,seed={seed}", log_lines(seed, steps=steps, **timed))
    runs = [*read_runs(tmp_path).values()]
    xs, losses = figures.curve(runs)
    assert losses.shape == (3, 4)
    assert list(losses[:, -1]) == [run.last_eval["val_loss"] for run in runs]
    assert xs["tokens"][-1] == pytest.approx(2048 * 65 / 3)
    assert xs["seconds"][0] == 2.5 and xs["FLOPs"][0] == 5 * 2048 * 6e6


def test_panels(tmp_path, monkeypatch, capsys):
    """Of more runs than can be told apart, loss.png shows those that are asked for."""
    for i in range(6):
        write(tmp_path / f"a|{i} {'long' * i}", log_lines(loss=1 + i / 10, interval=20))
    one = {"expert_load": [[1.0]] * 13, "router_entropy": [0.0] * 13, "max_vio_mean": 0.0}
    dead = {"expert_load": [[0.0] * (E - 1) + [1.0]] * 2}
    for name, experts, routing in (("one expert, 13 layers", 1, one), ("dead", E, dead)):
        lines = log_lines(num_experts=experts)
        for line in lines:
            line |= routing if "expert_load" in line else {}
        write(tmp_path / name, lines)
    panels = "--panels=tokens: dead as MoE | one expert, 13 layers; seconds: dead as MoE"
    page, rows, errors = made(monkeypatch, capsys, tmp_path, panels)
    assert not errors and len(list(tmp_path.glob("load-*.png"))) == 8 and r"a\|0" in rows
    assert "load-one-expert-13" in page and (tmp_path / "loss.png").exists()
    assert "(balance.png)" not in page and "(differences.png)" not in page
    # an expert without a token is blue, and not a hole
    picture = image.imread(tmp_path / "load-dead.png")
    pixel = picture[picture.shape[0] // 3, picture.shape[1] // 4] > 0.5
    assert tuple(pixel) == (False, False, True, True)
    curves = {"dead": [1], "b": [2]}
    found = report.read_panels("tokens: dead as MoE | b; FLOPs: dead", curves)
    assert found == {"tokens": {"MoE": [1], "b": [2]}, "FLOPs": {"dead": [1]}}
    for text in ("steps: dead", "tokens: c"):
        with pytest.raises(report.InputError, match=f"panels has '{text}', expected one of tokens"):
            report.read_panels(text, curves)


def test_layers_count_from_0(tmp_path, monkeypatch):
    write(tmp_path, log_lines())
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **options: titles.append(text))
    figures.draw_load(tmp_path / "a.png", LoggedRun(tmp_path / "log.jsonl"))
    assert titles == ["MoE layer 0", "MoE layer 1"]


def test_trained_runs(tmp_path, dense_run, moe_run, monkeypatch, capsys):
    """Logs of train.py in which few lines have the loads, and the first one has none."""
    for name, run in (("dense", dense_run), ("moe", moe_run)):
        lines = log(run)
        for line in lines:
            if line.get("step", 0) % 3:
                for key in ("expert_load", "router_entropy"):
                    line.pop(key, None)
        write(tmp_path / name, lines)
    page, rows, errors = made(monkeypatch, capsys, tmp_path)
    assert not errors and "2 of 2 runs are finished" in page
    dense, moe = (
        [line["val_loss"] for line in log(run) if "val_loss" in line][-1]
        for run in (dense_run, moe_run)
    )
    assert rows["dense"][0][-2:] == [f"{dense:.4f}", "baseline"]
    assert rows["moe"][0][-2:] == [f"{moe:.4f}", f"{moe - dense:+.4f} (n = 1)"]
    for name in ("differences", "loss", "balance", "load-moe"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000, name
