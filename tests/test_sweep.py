"""tools/sweep.py as a user runs it: real runs, real kills. What a sweep file asks for is checked in this process."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configurator import InputError
from moe_model import build_config, build_model
from nanomoe import checkpoint
from tests.conftest import MACBETH, ROOT, SMALL, flags
from tools.run_logs import share_done
from tools.sweep_plan import Plan, read_sweep

SWEEPS = sorted((ROOT / "config" / "sweeps").glob("*.py"))
RUNS = {"dense": {"use_moe": False}, "4 experts": {"use_moe": True, "num_experts": 4, "top_k": 1}}


def write(path, **values):
    path.write_text(
        '"""A question?"""\n' + "".join(f"{key} = {value!r}\n" for key, value in values.items())
    )
    return path


@pytest.fixture
def file(tmp_path, play):
    """A sweep of 2 models x 2 seeds that take seconds."""
    base = {
        "config": "config/train_gpt2.py",
        "dataset": str(play),
        **SMALL,
        "eval_interval": 5,
        "max_iters": 20,
        "keep_last": 0,
    }
    return write(
        tmp_path / "small.py",
        base=base,
        runs=RUNS,
        seeds=[1, 2],
        baseline="dense",
        match="active_flops",
    )


def command(file, *args, **settings):
    return [
        sys.executable,
        "-m",
        "tools.sweep",
        str(file),
        f"--out={file.parent / 'out'}",
        "--jobs=2",
        *args,
        *flags(**settings),
    ]


def sweep(file, *args, timeout=240, **settings):
    return subprocess.run(
        command(file, *args, **settings), cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def start_sweep(file, *args, **settings):
    # a shell in the background, as of CI, leaves SIGINT ignored
    return subprocess.Popen(
        command(file, *args, **settings),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def starts(folder):
    """The first step of each start that a run's log tells of."""
    return [entry["first_step"] for entry in log(folder) if "start" in entry]


def folders(file):
    return sorted(path for path in (file.parent / "out").iterdir() if path.is_dir())


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ended(folder):
    return (folder / "log.jsonl").exists() and b'"end"' in (folder / "log.jsonl").read_bytes()


def plan(path, *args, size="laptop", vocab_size=76):
    return Plan(
        read_sweep(path, size), list(args), path.parent / "out", lambda settings: vocab_size
    )


def the_same(a, b):
    """Whether two runs' last weights, steps and losses are equal to the bit."""
    weights = [load_file(checkpoint.locate(folder) / "model.safetensors") for folder in (a, b)]
    losses = [
        [(e["step"], e.get("loss"), e.get("val_loss")) for e in log(folder) if "step" in e]
        for folder in (a, b)
    ]
    return losses[0] == losses[1] and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )


def test_runs_all_once_and_never_again(file):
    done = sweep(file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "4 of 4 runs are done" in done.stdout
        and "4.0/4 runs" in done.stderr
        and "0 failed" in done.stderr
    )
    assert [folder.name for folder in folders(file)] == [
        "4-experts,seed=1",
        "4-experts,seed=2",
        "dense,seed=1",
        "dense,seed=2",
    ]
    for folder in folders(file):
        start, *_, end = log(folder)
        assert (
            end["steps"] == 20
            and "end" in end
            and start["settings"]["seed"] == int(folder.name[-1])
        )
        assert (
            start["settings"]["use_moe"] == folder.name.startswith("4")
            and start["settings"]["n_embd"] == 32
        )
    index = json.loads((file.parent / "out" / "sweep.json").read_text())
    assert index["title"] == "A question?" and index["baseline"] == "dense"
    assert index["command"].startswith(f"python -m tools.sweep {file}")
    assert index["runs"]["4 experts"]["folders"] == ["4-experts,seed=1", "4-experts,seed=2"]
    assert "active_flops of 'dense'" in index["runs"]["4 experts"]["match"]
    before = {folder: (folder / "log.jsonl").read_bytes() for folder in folders(file)}
    # an interrupted run: without its end and its last checkpoint
    cut = folders(file)[0]
    (cut / "log.jsonl").write_text(
        "".join(json.dumps(e) + "\n" for e in log(cut) if "end" not in e and e.get("step", 0) <= 12)
    )
    for path in checkpoint.list_steps(cut)[2:]:
        path.rename(path.with_name("away-" + path.name))
    assert "done" in sweep(file, "--dry_run").stdout
    printed = sweep(file, "--print").stdout.splitlines()
    assert (
        len(printed) == 1
        and str(cut) in printed[0]
        and " python train.py config/train_gpt2.py " in printed[0]
    )
    assert sweep(file).returncode == 0
    assert (
        starts(cut) == [0, 10]
        and [e for e in log(cut) if "step" in e and "val_loss" not in e][-1]["step"] == 20
    )
    assert all(
        (folder / "log.jsonl").read_bytes() == before[folder] for folder in folders(file)[1:]
    )


def test_killed_at_any_moment_it_repeats_nothing_that_was_finished(file, tmp_path):
    length = {"max_iters": 200, "eval_interval": 50}  # long enough to be met on the way
    assert sweep(file, **length).returncode == 0
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    finished = {}
    for enough in (0, 1, 2):  # a moment when so many runs are finished and another one is under way
        process = start_sweep(file, **length)
        until(
            lambda enough=enough: (
                (file.parent / "out").exists()
                and sum(map(ended, folders(file))) >= enough
                and any(
                    (folder / "log.jsonl").exists() and not ended(folder)
                    for folder in folders(file)
                )
            ),
            240,
        )
        time.sleep(0.5 * random.Random(enough).random())
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        for folder in folders(file):
            assert folder not in finished or starts(folder) == finished[folder]
        finished = {folder: starts(folder) for folder in folders(file) if ended(folder)}
    assert finished and sweep(file, **length).returncode == 0
    assert any(
        (folder / "earlier-1").exists() or len(starts(folder)) > 1 for folder in folders(file)
    )  # some were interrupted
    for folder in folders(file):
        assert folder not in finished or starts(folder) == finished[folder]
        assert the_same(folder, tmp_path / "undisturbed" / folder.name)


def children(pid):
    return [
        int(child)
        for child in subprocess.run(
            ["pgrep", "-P", str(pid)], capture_output=True, text=True
        ).stdout.split()
    ]


def test_runs_that_outlive_a_killed_sweep_are_not_begun_beside_themselves(file):
    length, first = {"max_iters": 600, "eval_interval": 600}, file.parent / "out" / "dense,seed=1"
    process = start_sweep(file, "--jobs=1", **length)
    until(lambda: (first / "log.jsonl").exists())
    (run,) = children(process.pid)
    os.kill(run, signal.SIGSTOP)  # it shall still be there when the next sweep comes to it
    process.kill()
    process.wait()
    second = start_sweep(file, "--jobs=1", **length)
    until(
        lambda: (
            len(folders(file)) == 4
            and all(map(ended, set(folders(file)) - {first}))
            and not children(second.pid)
        ),
        240,
    )
    time.sleep(2)  # now that it has a lane to spare
    assert starts(first) == [0] and not ended(first) and not children(second.pid)
    os.kill(run, signal.SIGCONT)
    second.communicate(timeout=120)
    assert second.returncode == 0
    assert [starts(folder) for folder in folders(file)] == [[0]] * 4 and all(
        map(ended, folders(file))
    )


def test_two_at_once_share_the_runs(file):
    first, second = start_sweep(file, "--jobs=1"), start_sweep(file, "--jobs=1")
    assert (
        "4 of 4 runs are done" in first.communicate()[0]
        and "4 of 4 runs are done" in second.communicate()[0]
    )
    assert [starts(folder) for folder in folders(file)] == [[0]] * 4 and all(
        map(ended, folders(file))
    )


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_saves_what_runs(file, number, code):
    process = start_sweep(file, max_iters=10**6, eval_interval=10**6, log_interval=10)
    until(
        lambda: all(
            (file.parent / "out" / f"dense,seed={n}" / "log.jsonl").exists()
            and len(log(file.parent / "out" / f"dense,seed={n}")) > 3
            for n in (1, 2)
        )
    )
    runs = children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == code and len(runs) == 2
    assert all(not os.path.exists(f"/proc/{run}") for run in runs)
    for n in (1, 2):
        assert checkpoint.step_of(checkpoint.locate(file.parent / "out" / f"dense,seed={n}")) >= 20


def test_a_failed_run_is_tried_once_more_and_told(file, tmp_path):
    config = tmp_path / "config.py"  # fails when the run 'good' reads it for the first time
    config.write_text(
        f"import pathlib, sys\n_tried = pathlib.Path({str(tmp_path / 'tried')!r})\n"
        "if any(arg.endswith('out/good,seed=1') for arg in sys.argv) and not _tried.exists():\n"
        "    _tried.touch()\n    raise OSError('a passing trouble')\n"
    )
    write(
        file,
        base=read_sweep(file, "laptop")["base"] | {"config": str(config)},
        seeds=[1],
        runs={"good": {}, "diverges": {"learning_rate": 1e30, "max_bad_steps": 2}, "other": {}},
    )
    done = sweep(file)
    assert done.returncode == 1 and "2 of 3 runs are done" in done.stdout
    assert (
        "good,seed=1: exit code 2, error: " in done.stderr
        and "a passing trouble; trying once more" in done.stderr
    )
    assert "diverges,seed=1: exit code 1" in done.stderr
    told = [line for line in done.stderr.splitlines() if "failed twice" in line]
    assert len(told) == 1 and told[0].startswith(
        "error: diverges,seed=1 failed twice, exit code 1: error: 3 steps in a row"
    )
    assert ended(file.parent / "out" / "good,seed=1") and ended(
        file.parent / "out" / "other,seed=1"
    )


def test_printed_commands_are_the_runs(file):
    out, shell = (
        file.parent / "a folder's out",
        os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    done = sweep(file, "--print", f"--out={out}")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4
    two = "".join(done.stdout.splitlines(keepends=True)[:2])
    xargs = subprocess.run(
        ["xargs", "-d", "\\n", "-P", "2", "-I{}", "sh", "-c", "{}"],
        cwd=ROOT,
        input=two,
        text=True,
        env=shell,
        capture_output=True,
    )
    assert xargs.returncode == 0, xargs.stderr
    left = sweep(file, "--print", f"--out={out}").stdout.splitlines()
    assert len(left) == 2 and not set(left) & set(two.splitlines())
    with open(
        out / "4-experts,seed=1" / "lock", "a"
    ) as held:  # as long as another process is at it, a line does nothing
        fcntl.flock(held, fcntl.LOCK_EX)
        assert subprocess.run(["sh", "-c", left[0]], cwd=ROOT, env=shell).returncode == 1
        assert not (out / "4-experts,seed=1" / "log.jsonl").exists()
    assert sweep(file, f"--out={out}").returncode == 0
    index = json.loads((out / "sweep.json").read_text())
    assert all(
        starts(out / name) == [0] for group in index["runs"].values() for name in group["folders"]
    )


def test_gpus_are_used_side_by_side(file, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "import os, sys\nfor _arg in sys.argv:\n    if _arg.startswith('--out_dir='):\n"
        f"        open({str(tmp_path / 'seen')!r}, 'a').write(os.environ['CUDA_VISIBLE_DEVICES'] + '\\n')\n"
    )
    write(
        file,
        base=read_sweep(file, "laptop")["base"] | {"config": str(config)},
        runs=RUNS,
        seeds=[1, 2],
    )
    assert sweep(file, "--gpus=3,5", "--jobs=1").returncode == 0
    seen = (tmp_path / "seen").read_text().split()
    assert len(seen) == 4 and set(seen) == {"3", "5"}


def test_dry_run(file):
    done = sweep(file, "--dry_run")
    assert done.returncode == 0 and not (file.parent / "out").exists(), done.stderr
    header, dense, moe, last = done.stdout.splitlines()
    groups = plan(file, vocab_size=len(set(MACBETH))).groups
    for group, line in zip(groups, (dense, moe), strict=True):
        model = build_model(
            build_config(group.settings | {"vocab_size": group.sizes["vocab_size"]})
        )
        assert (
            group.sizes["params"] == model.num_params()
            and group.sizes["active"] == model.num_active_params()
        )
        assert group.sizes["flops"] == model.flops_per_token()
        assert (
            f"{model.num_params() / 1e6:.2f}M" in line
            and f"{group.sizes['flops'] / 1e6:.2f}" in line
        )
    assert header.split() == [
        "seeds",
        "done",
        "params",
        "active",
        "MFLOPs/token",
        "tokens",
        "GB",
        "min/run",
        "matched",
    ]
    assert moe.endswith(f"active_flops of 'dense' {groups[1].match.split()[3]} with expert_dim=128")
    assert last.startswith("4 runs, ") and "minutes to go" in last


@pytest.mark.parametrize(
    "quantity, count",
    [
        ("active_flops", "flops_per_token"),
        ("active_params", "num_active_params"),
        ("total_params", "num_params"),
    ],
)
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_matched(file, quantity, count, mlp):
    """Whatever is matched, the next widths to both sides are no nearer; dense to MoE and MoE to dense."""
    runs = {
        "dense": {"use_moe": False},
        "moe": {"use_moe": True, "num_experts": 8, "top_k": 2, "num_shared_experts": 1},
        "wide": {"use_moe": False, "match_to": "big"},
        "big": {"use_moe": True, "num_experts": 8, "match": ""},
    }
    base = read_sweep(file, "laptop")["base"] | {"mlp": mlp, "n_embd": 64, "bias": True}
    write(file, base=base, runs=runs, baseline="dense", match=quantity)
    groups = {group.name: group for group in plan(file).groups}

    def value(name, **changed):
        return getattr(
            build_model(build_config(groups[name].settings | {"vocab_size": 76} | changed)), count
        )()

    assert groups["dense"].match == groups["big"].match == ""
    for name, key, target in (
        ("moe", "expert_dim", value("dense")),
        ("wide", "mlp_dim", value("big")),
    ):
        width = groups[name].settings[key]
        unit = 8 if width < 1024 else 64
        assert width % unit == 0 and groups[name].flags[key] == width
        off = {
            w: abs(value(name, **{key: w}) - target)
            for w in (width - unit, width, width + unit)
            if w > 0
        }
        assert min(off, key=off.get) == width
        assert f"{value(name) / target - 1:+.2%} with {key}={width}" in groups[name].match


def test_large_widths_are_multiples_of_64(file):
    write(
        file,
        base=read_sweep(file, "laptop")["base"] | {"n_embd": 512},
        baseline="dense",
        match="active_flops",
        runs={"dense": {"use_moe": False}, "moe": {"use_moe": True, "num_experts": 16, "top_k": 1}},
    )
    assert plan(file).groups[1].settings["expert_dim"] == 2048


def test_an_end_before_the_last_start_is_none(tmp_path):
    settings = {"max_iters": 40, "max_seconds": 0.0}
    lines = [{"start": 1, "settings": {}}, {"step": 20, "seconds": 9.0}, {"end": 1, "steps": 20}]
    for more, share in (
        ([], 1),
        ([{"start": 2}], 0.5),
        ([{"start": 2}, {"step": 30, "seconds": 12.0}], 0.75),
    ):
        (tmp_path / "log.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines + more) + '5\n{"step": 3'
        )
        assert share_done(tmp_path, settings) == share
        assert share_done(tmp_path, settings | {"max_seconds": 18.0}) == (
            share if not more else 0.5 if len(more) == 1 else pytest.approx(2 / 3)
        )
    assert share_done(tmp_path / "nowhere", settings) == 0


def test_grid_sizes_and_flags(file):
    file.write_text(
        '"""Q"""\nbase = {"laptop": {"config": "config/train_plays_char_moe.py", "max_iters": 7},\n'
        '        "gpt2": {"config": "config/train_gpt2_moe.py"}}\n'
        'grid = {"num_experts": [2, 4], "top_k": [1, 2]}\nruns = {size: {"top_k": 1}}\n'
    )
    small, large = plan(file, "--n_layer=3"), plan(file, size="gpt2")
    names = [f"num_experts={e},top_k={k}" for e in (2, 4) for k in (1, 2)]
    assert [g.name for g in small.groups] == ["laptop", *names] and [
        g.name for g in large.groups
    ] == ["gpt2", *names]
    assert small.groups[2].settings["top_k"] == 2 and small.groups[2].settings["num_experts"] == 2
    assert all(
        g.settings["n_layer"] == 3 and g.settings["max_iters"] == 7 and g.flags["n_layer"] == 3
        for g in small.groups
    )
    assert all(
        g.settings["n_layer"] == 12 and g.config == "config/train_gpt2_moe.py" for g in large.groups
    )
    assert [run.folder.name for run in small.runs][
        1
    ] == "num_experts=2,top_k=1,seed=1337" and not small.problems


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"runs": RUNS | {"typo": {"num_expert": 4}}},
            ["run 'typo' is left out", "'num_expert'", "'num_experts'"],
        ),
        (
            {"runs": RUNS | {"type": {"num_experts": "four"}}},
            ["run 'type' is left out", "'four', expected int"],
        ),
        (
            {"runs": RUNS | {"wrong": {"use_moe": True, "top_k": 9}}},
            ["run 'wrong' is left out", "top_k (9)"],
        ),
        (
            {"runs": RUNS | {"4-experts": {"use_moe": False}}},
            ["'4-experts' with seed 1 is left out", "that of run '4 experts'"],
        ),
        (
            {"seeds": [1, 1]},
            ["'dense' with seed 1 is left out", "'4 experts' with seed 1 is left out"],
        ),
        ({"grid": {"top_k": []}}, ["the grid is empty: top_k has no values"]),
        (
            {"grid": {"top_k": [1, 1]}, "match": "", "runs": RUNS | {"top_k=1": {"num_expert": 1}}},
            [
                "run 'top_k=1' of the grid is left out",
                "run 'top_k=1' of the grid is left out",
                "run 'top_k=1' is left out",
            ],
        ),
        (
            {"runs": RUNS | {"none": {"batch_size": 0}}},
            ["run 'none' is left out", "batch_size is 0"],
        ),
        (
            {"runs": RUNS | {"list": {"match": ["a"], "match_to": ["b"]}}},
            ["run 'list' is left out", "['a'] of '['b']'"],
        ),
        ({"grid": {"tpo_k": [1]}}, ["run 'tpo_k=1' is left out", "'top_k'"]),
        (
            {"runs": RUNS | {"own": {"expert_dim": 8, "use_moe": True}}},
            ["run 'own' is left out", "expert_dim", "solve"],
        ),
        ({"runs": RUNS | {"own": {"seed": 8}}}, ["run 'own' is left out", "seed"]),
        (
            {"runs": RUNS | {"a": {"match_to": "b"}, "b": {"match_to": "a"}}},
            ["run 'a' is left out", "run 'b' is left out"],
        ),
        (
            {"runs": RUNS | {"a": {"match": "flops"}}},
            ["run 'a' is left out", "flops of 'dense'", "active_flops"],
        ),
    ],
)
def test_what_is_wrong_is_left_out(file, changes, words):
    write(
        file,
        **{
            "base": read_sweep(file, "laptop")["base"],
            "runs": RUNS,
            "seeds": [1],
            "baseline": "dense",
            "match": "active_flops",
        }
        | changes,
    )
    found = plan(file)
    assert len(found.problems) == len([w for w in words if "is left out" in w or "empty" in w]), (
        found.problems
    )
    assert all(word in "\n".join(found.problems) for word in words), found.problems
    assert [run.folder.name for run in found.runs] == ["dense,seed=1", "4-experts,seed=1"]


def test_the_rest_runs(file):
    base = read_sweep(file, "laptop")["base"] | {"max_iters": 1}
    wrong = {
        "typo": {"num_expert": 4},
        "4-experts": {"use_moe": False},
        "away": {"dataset": "nowhere"},
    }
    write(file, base=base, runs=RUNS | wrong, grid={"top_k": []}, seeds=[1], baseline="dense")
    done = sweep(file)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(told) == 4 and "2 of 2 runs are done" in done.stdout, (
        done.stderr
    )
    assert any("no dataset 'nowhere'" in line for line in told) and any(
        "the grid is empty" in line for line in told
    )
    assert [folder.name for folder in folders(file) if ended(folder)] == [
        "4-experts,seed=1",
        "dense,seed=1",
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("", ["base is {}"]),
        ("base = {'config': 'nowhere.py'}\n", ["nowhere.py: no such config file"]),
        ("base = {'laptop': {'max_iters': 1}}\n", ["base is {'max_iters': 1}"]),
        (
            "base = {'gpt2': {'config': 'config/train_gpt2.py'}}\n",
            ["one for each size, like {'laptop'"],
        ),
        ("base = {'config': 'config/train_gpt2.py', 'max_itres': 1}\n", ["max_itres", "max_iters"]),
        ("grids = {}\n", ["unknown key 'grids'", "'grid'"]),
        ("runs = ['dense']\n", ["'runs' is ['dense'], expected dict"]),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': 1}\n",
            ["runs has 'dense': 1"],
        ),
        ("base = {'config': 'config/train_gpt2.py'}\nruns = {1: {}}\n", ["runs has 1: {}"]),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': {1: 2}}\n",
            ["runs has 'dense': {1: 2}"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': {}}\nseeds = [-1]\n",
            ["seeds is [-1]"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': {}}\nfindings = ['text']\n",
            ["findings is ['text']"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py', 'seed': 2}\nruns = {'dense': {}}\n",
            ["seed: the sweep itself sets that"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py', 'init_from': 'x'}\nruns = {'dense': {}}\n",
            ["init_from: the sweep itself"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': {}}\nbaseline = 'dens'\n",
            ["baseline is 'dens'"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = {'dense': {}}\nseeds = []\n",
            ["seeds is []"],
        ),
        (
            "base = {'config': 'config/train_gpt2.py'}\nruns = 1 / 0\n",
            ["line 2: ZeroDivisionError"],
        ),
    ],
)
def test_bad_files(tmp_path, text, words):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        plan(path)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_bad_calls_are_one_line(file):
    (file.parent / "bad.py").write_text("base = {'config': 'config/train_gpt2.py'}\n")
    for done, words in (
        (
            sweep(file.parent / "bad.py"),
            f"{file.parent / 'bad.py'}: there is no run that can be run",
        ),
        (sweep(file, "--jobs=0"), "--jobs is 0, expected at least 1"),
        (sweep(file, "--gpus=0,"), "--gpus is '0,', expected numbers, like 0,1"),
        (
            sweep(file, "config/train_gpt2.py"),
            "'config/train_gpt2.py': one sweep file, and then flags",
        ),
    ):
        assert (
            done.returncode == 2
            and done.stderr.startswith(f"error: {words}")
            and done.stderr.count("\n") == 1
        ), done.stderr


def test_a_folder_that_holds_another_run_is_left_alone(file):
    assert sweep(file, max_iters=2).returncode == 0
    before = [(folder / "log.jsonl").read_bytes() for folder in folders(file)]
    (file.parent / "out" / "4-experts,seed=1" / "log.jsonl").unlink()
    done = sweep(file, "--print", max_iters=3)  # what is left out is no part of a report, either
    index = json.loads((file.parent / "out" / "sweep.json").read_text())["runs"]
    assert (
        done.returncode == 2
        and index["dense"]["folders"] == []
        and index["4 experts"]["folders"] == ["4-experts,seed=1"]
    )
    (file.parent / "out" / "4-experts,seed=1" / "log.jsonl").write_bytes(before[0])
    done = sweep(file, max_iters=3)
    assert (
        sweep(file, max_iters=2, dtype="bfloat16").stderr.count("dtype=float32 instead of bfloat16")
        == 4
    )
    assert (
        done.returncode == 2
        and "max_iters=2 instead of 3" in done.stderr
        and "no run that can be run" in done.stderr
    )
    assert [(folder / "log.jsonl").read_bytes() for folder in folders(file)] == before
    with pytest.raises(InputError, match="the sweep itself sets"):
        plan(file, "--seed=3")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
@pytest.mark.parametrize("size", ["laptop", "gpt2"])
def test_every_sweep_can_be_run(path, size):
    """In both sizes; with a baseline, and what is matched nearly equal."""
    found, sweep = plan(path, size=size), read_sweep(path, size)
    assert (
        path.read_text().startswith('"""')
        and not found.problems
        and len(found.runs) >= 6
        and len(sweep["seeds"]) == 3
    )
    assert sweep["baseline"] and found.groups[0].name == sweep["baseline"]
    for group in found.groups:
        assert not group.match or abs(float(group.match.partition("' ")[2].split("%")[0])) < 4, (
            group.match
        )
    names = {group.name for group in found.groups}
    for finding in sweep["findings"]:
        assert set(finding) == {"claim", "source", "theirs", "runs", "metric", "expect"}
        assert set(finding["runs"]) <= names and finding["expect"] in ("lower", "higher")
