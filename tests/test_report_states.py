"""tools/report.py: every state that a folder of runs can be in, and bad input."""

import json
import math

import numpy as np
import pytest
from matplotlib import image

from tests.report_runs import LAYERS, E, call, log_lines, made, make, write
from tools import report, run_logs


def test_runs_under_way(tmp_path):
    going = {"ended": False, "max_iters": 40}
    make(
        tmp_path,
        {
            "dense": {
                1: {"loss": 2.0, "use_moe": False, "max_iters": 40},
                2: going | {"loss": 5.0, "use_moe": False},
            },
            "moe": {1: going | {"loss": 1.9}, 2: going | {"loss": 1.8, "steps": 12}, 3: None},
        },
    )
    write(
        tmp_path / "moe,seed=1",
        log_lines(1, **going, loss=1.9),
        tail='{"step": 21, "seconds": 10.5, "lo',
    )
    page, rows, errors = made(tmp_path, f"--out={tmp_path / 'elsewhere'}")
    assert (
        rows["dense"][0][0] == "1" and rows["dense"][0][-2] == "2.0000"
    )  # the run under way is not in the mean
    assert rows["moe"][0][0] == "1" and rows["moe"][0][-2:] == ["1.9000, step 20/40", ""]
    assert (
        "1 of 5 runs are finished; under way: dense,seed=2 (step 20/40), "
        "moe,seed=1 (step 20/40), moe,seed=2 (step 12/40); not begun: moe,seed=3\n"
    ) in page
    assert errors == "moe,seed=3: not begun\n"  # half a line at the end is no problem
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
        assert run_logs.read_log(tmp_path / name / "log.jsonl")["state"] == state, name
    assert run_logs.read_log(tmp_path / "short" / "log.jsonl")["progress"] == "10/11 s"


@pytest.mark.parametrize(
    "found, told", [(("float32", "bfloat16"), True), (("bfloat16", "bfloat16"), False)]
)
def test_the_dtype_that_auto_chose_is_compared(tmp_path, found, told):
    runs, problems = {}, []
    for seed, dtype in enumerate(found):
        lines = log_lines(seed, dtype="auto")
        lines[0] |= {"dtype": dtype}
        write(tmp_path / str(seed), lines)
        runs[str(seed)] = run_logs.read_log(tmp_path / str(seed) / "log.jsonl")
    report.make_group("dense", list(runs), runs, problems)
    expected = ["dense: its runs differ not only in their seeds: dtype"] if told else []
    assert problems == expected


def test_without_sweep_json(tmp_path):
    for name, use_moe, seed in (
        ("16-experts,seed=1", True, 1),
        ("2-experts,seed=1", True, 1),
        ("2-experts,seed=2", True, 2),
        ("seed=1,plain", False, 1),
        ("earlier-1", True, 1),
    ):
        write(tmp_path / name, log_lines(seed, use_moe=use_moe))
    page, rows, errors = made(tmp_path)
    assert (
        list(rows)[2:5] == ["16-experts", "2-experts", "plain"]
        and not errors
        and "## Findings" not in page
    )
    assert (
        rows["2-experts"][0][0] == "2"
        and rows["plain"][0][-1] == "baseline"
        and "4 of 4 runs" in page
    )
    write(tmp_path / "wide", log_lines(use_moe=False))
    assert made(tmp_path)[1]["2-experts"][0][-1] == ""  # two dense groups: none to compare with
    rows = made(tmp_path / "2-experts,seed=1")[1]  # a run itself
    assert rows["2-experts"][0][0] == "1"


def test_problems_are_named(tmp_path):
    make(
        tmp_path,
        {
            "dense": {
                1: {"use_moe": False},
                2: {"use_moe": False, "learning_rate": 0.5, "init_from": "auto"},
            },
            "moe": {1: {"loss": 1.0}, 2: {"loss": 1.2}, 3: {"loss": 1.4}, 4: {"loss": 1.6}},
            "none": {1: {"steps": 3}},
            "twice": {},
        },
    )
    moe, lines = tmp_path / "moe,seed=1", log_lines(1, loss=1.0)
    (moe / "log.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines[:9]) + '{"step": 9, "se\n[1, 2]\n'
        '{"step": "x", "seconds": 1, "val_loss": 3}\n'
        + json.dumps(lines[8])[:50]
        + "}\n"
        + "".join(json.dumps(line) + "\n" for line in lines[9:])
    )
    write(tmp_path / "moe,seed=2", log_lines(2, loss=math.nan))
    write(tmp_path / "moe,seed=3", log_lines(3)[1:])
    write(tmp_path / "moe,seed=4", [])
    write(tmp_path / "stray", log_lines())
    page, rows, errors = made(tmp_path)
    expected = [
        "dense: its runs differ not only in their seeds: learning_rate",
        "moe,seed=1: 4 unreadable lines left out, the first is line 10",
        "moe,seed=2: left out: diverged, the loss is not finite at step 20",
        "moe,seed=3: left out: no start line in its log",
        "moe,seed=4: left out: no start line in its log",
        "none,seed=1: left out: no evaluation yet",
        "stray: left out, it is not in sweep.json",
    ]
    assert sorted(errors.splitlines()) == sorted(expected)
    assert all(f"- {line}" in page for line in expected)
    assert (
        rows["moe"][0][0] == "1"
        and rows["moe"][0][-2] == "1.0000"
        and rows["none"][0] == ["0", *[""] * 8]
    )
    assert "; diverged: moe,seed=2; " in page and "unreadable: moe,seed=3, moe,seed=4" in page


def test_all_runs_diverged_or_once_evaluated(tmp_path):
    write(tmp_path / "a", log_lines(loss=math.inf))
    page, rows, _ = made(tmp_path)
    assert rows["a"][0][0] == "0" and ".png" not in page
    lines = log_lines(interval=20)
    write(tmp_path / "b,seed=1", lines)
    write(tmp_path / "c", [line for line in lines if "loss" not in line])  # no training lines
    write(
        tmp_path / "d",
        [
            {**line, "val_loss": math.nan} if line.get("step") == 5 and "val_loss" in line else line
            for line in log_lines()
        ],
    )  # has recovered
    rows = made(tmp_path)[1]
    assert [rows[name][0][-2] for name in "bcd"] == ["1.5000"] * 3 and (
        tmp_path / "loss.png"
    ).exists()


def test_bad_input_is_one_line(tmp_path):
    (tmp_path / "empty" / "earlier-1").mkdir(parents=True)
    write(tmp_path / "empty" / "earlier-1", log_lines())
    write(tmp_path / "broken" / "a", log_lines())
    for text in ("{", "[1]", "{}", '{"runs": {"a": {}}}', '{"runs": {"a": {"folders": "a"}}}'):
        (tmp_path / "broken" / "sweep.json").write_text(text)
        done = call(tmp_path / "broken")
        assert (
            done.returncode == 2
            and len(done.stderr.splitlines()) == 1
            and "as tools.sweep writes it" in done.stderr
        ), text
    for args, words in (
        ([tmp_path / "nothing"], "is not a folder"),
        ([tmp_path / "empty"], "holds no run (no log.jsonl)"),
        ([], "expected a folder of runs"),
        ([tmp_path, "--ot=x"], "--ot=x"),
    ):
        done = call(*args)
        assert (
            done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr
        ), done.stderr
    assert "report.md and its figures" in call("--help").stdout
    write(tmp_path / "a", log_lines())
    done = call(tmp_path, f"--out={tmp_path / 'a' / 'log.jsonl'}")  # a file
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_long_logs(tmp_path):
    """Of 5,000 training lines at most 500 are read, and the table is that of 50 lines."""
    long = log_lines(steps=5000, max_iters=5000, interval=1000)
    write(tmp_path / "long" / "run", long)
    run = run_logs.read_log(tmp_path / "long" / "run" / "log.jsonl")
    steps = [line["step"] for line in run["lines"]]
    assert (
        400 < len(steps) <= 500
        and steps[0] < 12
        and steps[-1] > 4988
        and max(np.diff(steps)) <= 22
        and len(run["evals"]) == 5
    )
    write(
        tmp_path / "short" / "run",
        [line for line in long if "tokens_per_s" not in line or line["step"] % 100 == 0],
    )
    (_, long_rows, long_errors), (_, short_rows, _) = (
        made(tmp_path / name) for name in ("long", "short")
    )
    assert long_rows == short_rows and not long_errors
    torn = [json.dumps(line) for line in long]
    torn[7] = torn[7][:60]  # of step 7, which is none of the 500
    (tmp_path / "long" / "run" / "log.jsonl").write_text("\n".join(torn) + "\n")
    assert made(tmp_path / "long")[2] == "run: 1 unreadable lines left out, the first is line 8\n"


def test_many_groups_and_odd_shapes(tmp_path):
    for i in range(9):
        write(tmp_path / f"a|{i} {'long' * i}", log_lines(loss=1 + i / 10))
    one = log_lines(num_experts=1)
    for line in one:
        if "expert_load" in line:
            line |= {
                "expert_load": [[1.0]] * 13,
                "router_entropy": [0.0] * 13,
                "max_vio": 0.0,
                "max_vio_mean": 0.0,
            }
    write(tmp_path / "one expert, 13 layers", one)
    dead = log_lines()
    for line in dead:
        if "expert_load" in line:
            line |= {"expert_load": [[0.0] * (E - 1) + [1.0]] * LAYERS}
    write(tmp_path / "dead", dead)
    page, rows, errors = made(tmp_path)
    picture = image.imread(
        tmp_path / "load-dead.png"
    )  # an expert without a token is blue, and not a hole
    assert tuple(picture[picture.shape[0] // 3, picture.shape[1] // 4] > 0.5) == (
        False,
        False,
        True,
        True,
    )
    assert (
        not errors
        and len(list(tmp_path.glob("load-*.png"))) == 11
        and r"a\|0" in rows
        and "load-one-expert-13" in page
    )
