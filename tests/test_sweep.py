"""tools/sweep.py as a user runs it: real runs, real kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from nanomoe import checkpoint
from tests.helpers import ROOT, full, log
from tests.sweeps import (
    RUNS,
    ended,
    folders,
    small_sweep,
    start_sweep,
    starts,
    sweep,
    the_same,
    until,
    write,
)
from tools.sweep_plan import read_sweep


@pytest.fixture
def file(tmp_path, play):
    return small_sweep(tmp_path, play)


def test_every_run_is_run_once(file):
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
        and printed[0].startswith("python train.py config/train_gpt2.py ")
    )
    assert sweep(file).returncode == 0
    assert (
        starts(cut) == [0, 10]
        and [e for e in log(cut) if "step" in e and "val_loss" not in e][-1]["step"] == 20
    )
    assert all(
        (folder / "log.jsonl").read_bytes() == before[folder] for folder in folders(file)[1:]
    )


@pytest.mark.full
def test_a_killed_sweep_repeats_no_finished_run(file, tmp_path):
    length = {"max_iters": 200, "eval_interval": 50}  # long enough to be killed on the way
    assert sweep(file, **length).returncode == 0
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    finished = {}
    for enough in (0, 1, 2):  # wait until that many runs are done, and one is running
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


@pytest.mark.full
def test_a_run_that_outlives_its_sweep_is_not_started_twice(file):
    length, first = {"max_iters": 600, "eval_interval": 600}, file.parent / "out" / "dense,seed=1"
    process = start_sweep(file, "--jobs=1", **length)
    until(lambda: (first / "log.jsonl").exists() and starts(first))
    (run,) = children(process.pid)
    os.kill(run, signal.SIGSTOP)  # it must still exist when the next sweep comes to it
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
    time.sleep(2)  # it could start another run now
    assert starts(first) == [0] and not ended(first) and not children(second.pid)
    os.kill(run, signal.SIGCONT)
    second.communicate(timeout=120)
    assert second.returncode == 0
    assert [starts(folder) for folder in folders(file)] == [[0]] * 4 and all(
        map(ended, folders(file))
    )


@pytest.mark.full
def test_two_at_once_share_the_runs(file):
    first, second = start_sweep(file, "--jobs=1"), start_sweep(file, "--jobs=1")
    assert (
        "4 of 4 runs are done" in first.communicate()[0]
        and "4 of 4 runs are done" in second.communicate()[0]
    )
    assert [starts(folder) for folder in folders(file)] == [[0]] * 4 and all(
        map(ended, folders(file))
    )


@pytest.mark.parametrize("number, code", [full(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_sweep_saves_its_runs(file, number, code):
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
        assert (
            checkpoint.step_of(checkpoint.latest_good(file.parent / "out" / f"dense,seed={n}"))
            >= 20
        )


@pytest.mark.full
def test_a_failed_run_is_tried_once_more_and_reported(file, tmp_path):
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
        runs={"good": {}, "diverges": {"learning_rate": 1e30, "max_iters": 40}, "other": {}},
    )
    done = sweep(file)
    assert done.returncode == 1 and "2 of 3 runs are done" in done.stdout
    assert (
        "good,seed=1: exit code 2: error: " in done.stderr
        and "a passing trouble; trying again" in done.stderr
    )
    assert "diverges,seed=1: exit code 1" in done.stderr
    told = [line for line in done.stderr.splitlines() if "failed twice" in line]
    assert len(told) == 1 and told[0].startswith(
        "error: diverges,seed=1 failed twice, exit code 1: error: 11 steps in a row"
    )
    assert ended(file.parent / "out" / "good,seed=1") and ended(
        file.parent / "out" / "other,seed=1"
    )


@pytest.mark.full
def test_printed_commands_are_the_runs(file):
    out, shell = (
        file.parent / "a folder's out",
        os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    done = sweep(file, "--print", f"--out={out}")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4
    two = "".join(done.stdout.splitlines(keepends=True)[:2])
    xargs = subprocess.run(
        ["xargs", "-0", "-P", "2", "-I{}", "sh", "-c", "{}"],
        cwd=ROOT,
        input=two.replace("\n", "\0"),
        text=True,
        env=shell,
        capture_output=True,
    )
    assert xargs.returncode == 0, xargs.stderr
    left = sweep(file, "--print", f"--out={out}").stdout.splitlines()
    assert len(left) == 2 and not set(left) & set(two.splitlines())
    (out / "4-experts,seed=1").mkdir()
    # while another process holds the run, its line does nothing
    with FileLock(out / "4-experts,seed=1" / "run.lock"):
        assert subprocess.run(["sh", "-c", left[0]], cwd=ROOT, env=shell).returncode == 2
        assert not (out / "4-experts,seed=1" / "log.jsonl").exists()
    assert sweep(file, f"--out={out}").returncode == 0
    index = json.loads((out / "sweep.json").read_text())
    assert all(
        starts(out / name) == [0] for group in index["runs"].values() for name in group["folders"]
    )


@pytest.mark.full
def test_each_gpu_gets_its_runs(file, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(
        "import os, sys\nfor _arg in sys.argv:\n    if _arg.startswith('--out_dir='):\n"
        f"        _seen = open({str(tmp_path / 'seen')!r}, 'a')\n"
        "        _seen.write(os.environ['CUDA_VISIBLE_DEVICES'] + '\\n')\n"
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
