"""tools/report.py: its numbers against ones computed here, every state that a folder of runs can be in, bad input."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import image

from tests.conftest import ROOT, train
from tools import logs, pictures, report

E, LAYERS = 4, 2


def log_lines(
    seed=1,
    loss=1.5,
    steps=20,
    use_moe=True,
    vio=0.5,
    max_iters=20,
    ended=True,
    interval=5,
    rate=1000.0,
    **settings,
):
    """A log as train.py writes it. The first layer's MaxVio is `vio`, the second's is 2 * vio; the loss ends at `loss`."""
    settings = {
        "seed": seed,
        "max_iters": max_iters,
        "max_seconds": 0.0,
        "use_moe": use_moe,
        "num_experts": E,
        "init_from": "scratch",
        "out_dir": f"out/{seed}",
        "learning_rate": 1e-3,
    } | settings
    lines = [
        {
            "start": "2026-11-24 18:00:00",
            "first_step": 0,
            "launchers": [],
            "torch": "2.13.0",
            "params": 2_000_000,
            "active_params": 1_000_000,
            "flops_per_token": 6_000_000,
            "tokens_per_step": 2048,
            "settings": settings,
        }
    ]
    for step in range(1, steps + 1):
        entry = {"step": step, "seconds": step * 0.5, "lr": 1e-3, "loss": loss + 0.1 + 1 / step}
        if use_moe:
            loads = [
                [(1 + v) / E] + [(1 - (1 + v) / E) / (E - 1)] * (E - 1) for v in (vio, 2 * vio)
            ]
            entry |= {
                "balance_loss": 1.0,
                "z_loss": 4.0,
                "max_vio": 2 * vio,
                "max_vio_mean": 1.5 * vio,
                "dead_experts": 1,
                "collapsed_layers": [],
                "router_entropy": [math.log(E) / 2] * LAYERS,
                "first_gate": [0.5] * LAYERS,
                "logit_norm": [1.0, 3.0],
                "dropped": [0.0, 0.25],
                "expert_load": loads,
            }
        lines.append(entry | {"ms": 500.0, "tokens_per_s": rate, "mfu": None})
        if step % interval == 0:
            lines.append(
                {
                    "step": step,
                    "seconds": step * 0.5,
                    "val_loss": loss + (steps - step) / 10,
                    "val_bits_per_byte": 2,
                }
            )
    return lines + [{"end": "2026-11-24 19:00:00", "steps": steps}] * ended


def write(folder, lines, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def make(tmp_path, groups, findings=(), match=""):
    """Runs and their sweep.json: {name: {seed: settings of log_lines, or None for a run that has not begun}}."""
    for name, seeds in groups.items():
        for seed, settings in seeds.items():
            if settings is not None:
                write(tmp_path / f"{name},seed={seed}", log_lines(seed, **settings))
    (tmp_path / "sweep.json").write_text(
        json.dumps(
            {
                "title": "A sweep",
                "command": "python -m tools.sweep config/sweeps/a.py",
                "baseline": "dense",
                "runs": {
                    name: {
                        "folders": [f"{name},seed={seed}" for seed in seeds],
                        "match": match and name + match,
                    }
                    for name, seeds in groups.items()
                },
                "findings": list(findings),
            }
        )
    )


def call(*args):
    return subprocess.run(
        [sys.executable, "-m", "tools.report", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def made(*args):
    """The report, its main table and the other output, {first cell: cells} of all its tables."""
    done = call(*args)
    assert done.returncode == 0, done.stderr
    path = ROOT / done.stdout.splitlines()[-1].removeprefix("wrote ")
    page = path.read_text()
    assert "\n".join(done.stdout.splitlines()[:-2]) in page
    rows = {}
    for line in page.splitlines():
        if line.startswith("|"):
            first, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            rows.setdefault(first, []).append(cells)
    return page, rows, done.stderr


def claim(text, runs, metric="val_loss", expect="lower"):
    return {
        "claim": text,
        "source": "A paper",
        "theirs": "so much",
        "runs": runs,
        "metric": metric,
        "expect": expect,
    }


LOSSES = {"dense": (2.10, 2.00, 2.06), "moe": (2.00, 1.93, 1.97)}


def three_seeds():
    return {
        name: {
            seed: {"loss": loss, "use_moe": name == "moe"}
            for seed, loss in zip((1, 2, 3), losses, strict=True)
        }
        for name, losses in LOSSES.items()
    }


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
    # by hand: differences -0.10, -0.07, -0.09; mean -0.0867, standard deviation 0.0153, t of 2 degrees of freedom 4.303
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
        "\n3 of 13 hold, 1 opposite, 1 not seen, 2 not run yet, 1 undecided, 1 not logged, 4 unreadable.\n"
        in page
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
        name: metric(logs.read_log(tmp_path / "a" / "log.jsonl"))
        for name, metric in logs.METRICS.items()
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
        name: metric(logs.read_log(tmp_path / "b" / "log.jsonl"))
        for name, metric in logs.METRICS.items()
    }
    assert [name for name, value in found.items() if value is not None] == [
        "val_loss",
        "seconds",
        "tokens_per_s",
    ]


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
        "1 of 5 runs are finished; under way: dense,seed=2 (step 20/40), moe,seed=1 (step 20/40), moe,seed=2 (step 12/40); "
        "not begun: moe,seed=3\n"
    ) in page
    assert errors == "moe,seed=3: not begun\n"  # half a line at the end is no problem
    assert (tmp_path / "elsewhere" / "load-moe.png").exists() and not list(tmp_path.glob("*.png"))


def test_what_counts_as_finished(tmp_path):
    timed = {"max_iters": 10**6, "ended": False}
    for name, state, lines in (
        ("end", "finished", log_lines(max_iters=10**6)),
        ("old", "finished", log_lines(ended=False)),
        ("time", "finished", log_lines(**timed, max_seconds=10.0)),
        ("short", "under way", log_lines(**timed, max_seconds=11.0)),
        ("longer", "under way", log_lines() + log_lines(max_iters=40, steps=0, ended=False)),
    ):
        write(tmp_path / name, lines)
        assert logs.read_log(tmp_path / name / "log.jsonl")["state"] == state, name
    assert logs.read_log(tmp_path / "short" / "log.jsonl")["progress"] == "10/11 s"


@pytest.mark.parametrize(
    "found, told",
    [
        (("float32", "bfloat16"), True),
        (("bfloat16", "bfloat16"), False),
        (("bfloat16", None), False),
    ],
)
def test_what_auto_came_to_is_compared(tmp_path, found, told):
    runs, problems = {}, []
    for seed, dtype in enumerate(found):
        lines = log_lines(seed, dtype="auto")
        lines[0] |= {"dtype": dtype} if dtype else {}  # logs of older versions do not tell
        write(tmp_path / str(seed), lines)
        runs[str(seed)] = logs.read_log(tmp_path / str(seed) / "log.jsonl")
    report.make_group("dense", list(runs), runs, problems)
    assert (
        problems
        == [
            "dense: its runs differ in more than their seeds, in the precision that dtype 'auto' came to"
        ]
        * told
    )


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
    runs = logs.read_runs(tmp_path)
    (tokens, flops, seconds), losses = pictures.curve(list(runs.values()))
    assert losses.shape == (3, 4) and list(losses[:, -1]) == [
        logs.last_of(run)["val_loss"] for run in runs.values()
    ]
    assert (
        tokens[-1] == pytest.approx(2048 * 65 / 3)
        and seconds[0] == 2.5
        and flops[0] == 5 * 2048 * 6e6
    )
    made(tmp_path)


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
        list(rows)[2:5] == ["plain", "2-experts", "16-experts"]
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
        "dense: its runs differ in more than their seeds, in learning_rate",
        "moe,seed=1: left out 4 lines that train.py does not write, the first is line 10",
        "moe,seed=2: diverged, its loss is not finite at step 20: left out of all means",
        "moe,seed=3: a log without a start line: left out",
        "moe,seed=4: an empty log: left out",
        "none,seed=1: without an evaluation: left out",
        "stray: not in sweep.json, left out",
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
            and "as tools/sweep writes it" in done.stderr
        ), text
    for args, words in (
        ([tmp_path / "nothing"], "is no folder"),
        ([tmp_path / "empty"], "holds no log.jsonl"),
        ([], "required: folder"),
        ([tmp_path, "--ot=x"], "--ot=x"),
    ):
        done = call(*args)
        assert (
            done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr
        ), done.stderr
    assert "report.md and its PNGs" in call("--help").stdout
    write(tmp_path / "a", log_lines())
    done = call(tmp_path, f"--out={tmp_path / 'a' / 'log.jsonl'}")  # a file
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


def test_long_logs(tmp_path):
    """Of 5,000 training lines 500 are read, with the last one, and the table is that of 50 lines with the same ends."""
    long = log_lines(steps=5000, max_iters=5000, interval=1000)
    write(tmp_path / "long" / "run", long)
    run = logs.read_log(tmp_path / "long" / "run" / "log.jsonl")
    steps = [line["step"] for line in run["lines"]]
    assert (
        len(steps) == 500
        and steps[0] == 1
        and steps[-1] == 5000
        and max(np.diff(steps)) <= 11
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
    assert (
        made(tmp_path / "long")[2]
        == "run: left out 1 line that train.py does not write, the first is line 8\n"
    )


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


def test_trained_runs(tmp_path, play):
    for seed in (1, 2):
        for name, more in (("dense", {}), ("moe", {"use_moe": True, "top_k": 2})):
            done = train(
                dataset=play,
                seed=seed,
                max_iters=4,
                eval_interval=2,
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
