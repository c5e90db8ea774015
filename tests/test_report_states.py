"""tools/report.py: every state that a folder of runs can be in, and bad input."""

import json
import math

import numpy as np
import pytest

from tests.helpers import one_line, run_module
from tests.report_runs import log_lines, made, make, write
from tools import report
from tools.run_logs import LoggedRun, read_runs


def test_runs_under_way(tmp_path, monkeypatch, capsys):
    going = {"ended": False, "max_iters": 40}
    groups = {
        "dense": {
            1: {"loss": 2.0, "use_moe": False, "max_iters": 40},
            2: going | {"loss": 5.0, "use_moe": False},
        },
        "moe": {1: going | {"loss": 1.9}, 2: going | {"loss": 1.8, "steps": 12}, 3: None},
    }
    make(tmp_path, groups)
    half = '{"step": 21, "seconds": 10.5, "lo'
    write(tmp_path / "moe,seed=1", log_lines(1, **going, loss=1.9), tail=half)
    page, rows, errors = made(monkeypatch, capsys, tmp_path, f"--out={tmp_path / 'elsewhere'}")
    # the run under way is not in the mean
    assert rows["dense"][0][0] == "1" and rows["dense"][0][-2] == "2.0000"
    assert rows["moe"][0][0] == "1" and rows["moe"][0][-2:] == ["1.9000, step 20/40", ""]
    assert "1 of 5 runs are finished, 3 under way, 1 not begun\n" in page
    assert sorted(errors.splitlines()) == [  # half a line at the end is no problem
        "dense,seed=2: under way, step 20/40",
        "moe,seed=1: under way, step 20/40",
        "moe,seed=2: under way, step 12/40",
        "moe,seed=3: not begun",
    ]
    assert (tmp_path / "elsewhere" / "load-moe.png").exists() and not list(tmp_path.glob("*.png"))


def test_what_counts_as_finished(tmp_path):
    timed = {"max_iters": 10**6, "ended": False}
    for name, state, lines in (
        ("end", "finished", log_lines(max_iters=10**6)),
        ("not ended", "under way", log_lines(ended=False)),
        ("time", "finished", log_lines(max_iters=10**6, max_seconds=10.0)),
        ("short", "under way", log_lines(**timed, max_seconds=11.0)),
        ("longer", "under way", log_lines() + log_lines(max_iters=40, steps=0, ended=False)),
    ):
        write(tmp_path / name, lines)
        assert LoggedRun(tmp_path / name / "log.jsonl").state == state, name
    assert LoggedRun(tmp_path / "short" / "log.jsonl").progress == "10/11 s"


def test_the_dtype_that_auto_chose_is_compared(tmp_path):
    for name, dtype in (("a", "float32"), ("b", "bfloat16"), ("c", "bfloat16")):
        lines = log_lines(dtype="auto")
        lines[0] |= {"dtype": dtype}
        write(tmp_path / name, lines)
    runs = read_runs(tmp_path)
    assert report.Row("dense", ["a", "b"], runs).differ == ["dtype"]
    assert report.Row("dense", ["b", "c"], runs).differ == []


def test_without_sweep_json(tmp_path, monkeypatch, capsys):
    for name, use_moe, seed in (
        ("16-experts,seed=1", True, 1),
        ("2-experts,seed=1", True, 1),
        ("2-experts,seed=2", True, 2),
        ("seed=1,plain", False, 1),
        ("earlier-1", True, 1),
    ):
        write(tmp_path / name, log_lines(seed, use_moe=use_moe))
    page, rows, errors = made(monkeypatch, capsys, tmp_path, draw=False)
    assert list(rows)[2:5] == ["16-experts", "2-experts", "plain"]
    assert not errors and "## Findings" not in page and "4 of 4 runs" in page
    assert rows["2-experts"][0][0] == "2" and rows["plain"][0][-1] == "baseline"
    write(tmp_path / "wide", log_lines(use_moe=False))
    rows = made(monkeypatch, capsys, tmp_path, draw=False)[1]
    assert rows["2-experts"][0][-1] == ""  # two dense groups: none to compare with
    rows = made(monkeypatch, capsys, tmp_path / "2-experts,seed=1", draw=False)[1]  # a run itself
    assert rows["2-experts"][0][0] == "1"


def test_problems_are_named(tmp_path, monkeypatch, capsys):
    other = {"use_moe": False, "learning_rate": 0.5, "init_from": "auto"}
    groups = {
        "dense": {1: {"use_moe": False}, 2: other},
        "moe": {1: {"loss": 1.0}, 2: {"loss": 1.2}, 3: {"loss": 1.4}, 4: {"loss": 1.6}},
        "none": {1: {"steps": 3}},
        "twice": {},
    }
    make(tmp_path, groups)
    lines = [json.dumps(line) for line in log_lines(1, loss=1.0)]
    lines[9:9] = ['{"step": 9, "se', "[1, 2]", '{"steps": 1}', lines[8][:40] + "}"]
    (tmp_path / "moe,seed=1" / "log.jsonl").write_text("\n".join(lines) + "\n")
    write(tmp_path / "moe,seed=2", log_lines(2, loss=math.nan))
    write(tmp_path / "moe,seed=3", log_lines(3)[1:])
    write(tmp_path / "moe,seed=4", [])
    write(tmp_path / "stray", log_lines())
    page, rows, errors = made(monkeypatch, capsys, tmp_path, draw=False)
    expected = [
        "dense: its runs differ not only in their seeds: learning_rate",
        "moe,seed=1: 4 unreadable lines left out, the first is line 10",
        "moe,seed=2: diverged, step 20/20",
        "moe,seed=3: without a start line, step 20/?",
        "moe,seed=4: without a start line, no step",
        "none,seed=1: without an evaluation, step 3/20",
        "stray: left out, it is not in sweep.json",
    ]
    assert sorted(errors.splitlines()) == sorted(expected)
    assert all(f"- {line}" in page for line in expected)
    assert rows["moe"][0][0] == "1" and rows["moe"][0][-2] == "1.0000"
    assert rows["none"][0] == ["0", *[""] * 8]
    assert (
        "3 of 7 runs are finished, 1 diverged, 2 without a start line, 1 without an evaluation"
        in page
    )


def test_all_runs_diverged_or_once_evaluated(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a", log_lines(loss=math.inf))
    page, rows, _ = made(monkeypatch, capsys, tmp_path)
    assert rows["a"][0][0] == "0" and ".png" not in page
    write(tmp_path / "b,seed=1", log_lines(interval=20))
    lines = [line for line in log_lines(interval=20) if "loss" not in line]
    write(tmp_path / "c", lines)  # no training lines
    lines = log_lines()
    for line in lines:
        if line.get("step") == 5 and "val_loss" in line:
            line["val_loss"] = math.nan  # and has recovered
    write(tmp_path / "d", lines)
    rows = made(monkeypatch, capsys, tmp_path)[1]
    assert [rows[name][0][-2] for name in "bcd"] == ["1.5000"] * 3
    assert (tmp_path / "loss.png").exists()


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "empty" / "earlier-1").mkdir(parents=True)
    write(tmp_path / "empty" / "earlier-1", log_lines())
    write(tmp_path / "a", log_lines())
    for text in ("{", "[1]", "{}", '{"runs": {"a": {}}}', '{"runs": {"a": {"folders": "a"}}}'):
        (tmp_path / "sweep.json").write_text(text)
        with pytest.raises(report.InputError, match=r"as tools\.sweep writes it"):
            report.read_sweep(tmp_path / "sweep.json", {})
    one_line(run_module("tools.report", tmp_path), 2, "as tools.sweep writes it")
    (tmp_path / "sweep.json").unlink()
    for args, words in (
        ([tmp_path / "nothing"], "is not a folder"),
        ([tmp_path / "empty"], "holds no run (no log.jsonl)"),
        ([], "expected a folder of runs"),
        ([tmp_path, "--ot=x"], "--ot=x"),
    ):
        one_line(run_module("tools.report", *args), 2, words)
    assert "report.md and its figures" in run_module("tools.report", "--help").stdout
    one_line(run_module("tools.report", tmp_path, out=tmp_path / "a" / "log.jsonl"), 1)  # a file


def test_long_logs(tmp_path, monkeypatch, capsys):
    """Of 5,000 training lines at most 500 are read, and the table is that of 50 lines; the newest
    ones are there for tools.watch."""
    long = log_lines(steps=5000, max_iters=5000, interval=1000)
    write(tmp_path / "long" / "run", long)
    run = LoggedRun(tmp_path / "long" / "run" / "log.jsonl")
    steps = [line["step"] for line in run.lines]
    assert 400 < len(steps) <= 500 and steps[0] < 12 and steps[-1] > 4988
    assert max(np.diff(steps)) <= 22 and len(run.evals) == 5
    assert [line["step"] for line in run.newest] == [*range(4993, 5001)]
    short = [line for line in long if "tokens_per_s" not in line or line["step"] % 100 == 0]
    write(tmp_path / "short" / "run", short)
    rows = {}
    for name in ("long", "short"):
        _, rows[name], errors = made(monkeypatch, capsys, tmp_path / name, draw=False)
        assert not errors
    assert rows["long"] == rows["short"]
    torn = [json.dumps(line) for line in long]
    torn[7] = torn[7][:60]  # of step 7, which is none of the 500
    (tmp_path / "long" / "run" / "log.jsonl").write_text("\n".join(torn) + "\n")
    errors = made(monkeypatch, capsys, tmp_path / "long", draw=False)[2]
    assert errors == "run: 1 unreadable lines left out, the first is line 8\n"
