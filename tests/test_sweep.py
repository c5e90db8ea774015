"""tools/sweep.py as a user runs it: real runs, real kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

from nanomoe import checkpoint
from tests.helpers import ROOT, assert_same_run, children, log, until
from tests.sweeps import RUNS, ended, folders, small_sweep, start_sweep, starts, sweep, write
from tools.sweep_plan import read_sweep


@pytest.fixture
def file(tmp_path, play):
    return small_sweep(tmp_path, play)


def test_every_run_is_run_once(tmp_path, play):
    """First beside some that cannot be run, which are told."""
    runs = RUNS | {"dense": {"use_moe": False, "seeds": [1]}}
    wrong = {"4-experts": {"seeds": [1]}, "typo": {"num_expert": 4}, "away": {"dataset": "nowhere"}}
    done = sweep(small_sweep(tmp_path, play, runs=runs | wrong, grid={"top_k": []}))
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(told) == 4, done.stderr
    for words in ("no dataset 'nowhere'", "the grid is empty", "'num_expert'", "'4-experts'"):
        assert sum(words in line for line in told) == 1, told
    file = small_sweep(tmp_path, play, runs=runs)
    assert "3 of 3 runs are done" in done.stdout
    assert "3.0/3 runs" in done.stderr and "0 failed" in done.stderr
    names = ["4-experts,seed=1", "4-experts,seed=2", "dense,seed=1"]
    assert [folder.name for folder in folders(file)] == names
    for folder in folders(file):
        start, *_, end = log(folder)
        assert "end" in end and end["steps"] == 20
        settings = start["settings"]
        assert settings["seed"] == int(folder.name[-1]) and settings["n_embd"] == 32
        assert settings["use_moe"] == folder.name.startswith("4")
    index = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert index["title"] == "A question?" and index["baseline"] == "dense"
    assert index["command"].startswith(f"python -m tools.sweep {file}")
    assert index["runs"]["4 experts"]["folders"] == names[:2]
    assert "active_flops of 'dense'" in index["runs"]["4 experts"]["match"]

    before = {folder: (folder / "log.jsonl").read_bytes() for folder in folders(file)}
    # an interrupted run: without its end and its last checkpoint
    cut = folders(file)[0]
    kept = [e for e in log(cut) if "end" not in e and e.get("step", 0) <= 12]
    (cut / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    for path in checkpoint.list_steps(cut)[2:]:
        path.rename(path.with_name("away-" + path.name))
    (printed,) = sweep(file, "--print").stdout.splitlines()
    assert str(cut) in printed and printed.startswith("python train.py config/train_gpt2.py ")
    assert sweep(file).returncode == 0
    assert starts(cut) == [0, 10]
    assert [e for e in log(cut) if "loss" in e][-1]["step"] == 20
    for folder in folders(file)[1:]:
        assert (folder / "log.jsonl").read_bytes() == before[folder]

    # with other settings, what is there is left alone, and no part of a report
    (cut / "log.jsonl").unlink()
    done = sweep(file, "--print", max_iters=30)
    assert done.returncode == 2 and "holds a run with other settings" in done.stderr
    index = json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"]
    assert index["dense"]["folders"] == [] and index["4 experts"]["folders"] == names[:1]


@pytest.mark.full
def test_a_killed_sweep_repeats_no_finished_run(file, tmp_path):
    length = {"max_iters": 200, "eval_interval": 50}  # long enough to be killed on the way
    assert sweep(file, **length).returncode == 0
    (tmp_path / "out").rename(tmp_path / "undisturbed")
    finished = {}

    def check_finished():
        for folder, first_steps in finished.items():
            assert starts(folder) == first_steps

    def killable(enough):
        """Whether that many runs are done, and one is running."""
        done = sum(map(ended, folders(file)))
        return done >= enough and any(starts(f) and not ended(f) for f in folders(file))

    for enough in (0, 1, 2):
        process = start_sweep(file, **length)
        until(lambda enough=enough: killable(enough), 240)
        time.sleep(0.5 * random.Random(enough).random())
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.wait()
        check_finished()
        finished = {folder: starts(folder) for folder in folders(file) if ended(folder)}
    assert finished and sweep(file, **length).returncode == 0
    check_finished()
    interrupted = [f for f in folders(file) if (f / "earlier-1").exists() or len(starts(f)) > 1]
    assert interrupted
    for folder in folders(file):
        assert_same_run(folder, tmp_path / "undisturbed" / folder.name)


@pytest.mark.full
def test_a_run_that_outlives_its_sweep_is_not_started_twice(file):
    length, first = {"max_iters": 600, "eval_interval": 600}, file.parent / "out" / "dense,seed=1"
    process = start_sweep(file, "--jobs=1", **length)
    until(lambda: starts(first), 240)
    (run,) = children(process.pid)
    os.kill(run, signal.SIGSTOP)  # it must still exist when the next sweep comes to it
    process.kill()
    process.wait()
    second = start_sweep(file, "--jobs=1", **length)
    until(lambda: sum(map(ended, folders(file))) == 3 and not children(second.pid), 240)
    time.sleep(2)  # it could start another run now
    assert starts(first) == [0] and not ended(first) and not children(second.pid)
    os.kill(run, signal.SIGCONT)
    second.communicate(timeout=120)
    assert second.returncode == 0
    assert [starts(folder) for folder in folders(file)] == [[0]] * 4
    assert all(map(ended, folders(file)))


@pytest.mark.full
def test_two_at_once_share_the_runs(file):
    for process in [start_sweep(file, "--jobs=1"), start_sweep(file, "--jobs=1")]:
        assert "4 of 4 runs are done" in process.communicate()[0]
    assert [starts(folder) for folder in folders(file)] == [[0]] * 4
    assert all(map(ended, folders(file)))


@pytest.mark.full
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_sweep_saves_its_runs(file, number, code):
    process = start_sweep(file, max_iters=10**6, eval_interval=10**6, log_interval=10)
    both = [file.parent / "out" / f"dense,seed={n}" for n in (1, 2)]
    until(lambda: all(starts(folder) and len(log(folder)) > 3 for folder in both), 240)
    runs = children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == code and len(runs) == 2
    assert all(not os.path.exists(f"/proc/{run}/exe") for run in runs)
    for folder in both:
        assert checkpoint.step_of(checkpoint.latest_good(folder)) >= 20


@pytest.mark.full
def test_a_failed_run_is_tried_once_more_and_each_gpu_has_its_runs(file, tmp_path):
    config, seen = tmp_path / "config.py", tmp_path / "seen"
    config.write_text(  # fails when the run 'good' reads it for the first time
        f"import os, pathlib, sys\n_seen = pathlib.Path({str(seen)!r})\n"
        "for _run in [arg[10:] for arg in sys.argv if arg.startswith('--out_dir=')]:\n"
        "    with _seen.open('a') as _file:\n"
        "        print(pathlib.Path(_run).name, os.environ['CUDA_VISIBLE_DEVICES'], file=_file)\n"
        "    if _run.endswith('good,seed=1') and _seen.read_text().count('good') == 1:\n"
        "        raise OSError('a passing trouble')\n"
    )
    base = read_sweep(file, "laptop")["base"] | {"config": str(config)}
    runs = {"good": {}, "diverges": {"learning_rate": 1e30, "max_iters": 40}, "other": {}}
    write(file, base=base, seeds=[1], runs=runs)
    done = sweep(file, "--gpus=3,5", "--jobs=1")
    assert done.returncode == 1 and "2 of 3 runs are done" in done.stdout
    assert "good,seed=1: exit code 2: error: " in done.stderr
    assert "a passing trouble; trying again" in done.stderr
    assert "diverges,seed=1: exit code 1" in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if "failed twice" in line]
    words = "error: diverges,seed=1 failed twice, exit code 1: error: 11 steps in a row"
    assert told.startswith(words)
    assert all(ended(file.parent / "out" / f"{name},seed=1") for name in ("good", "other"))
    starts_on = [line.split() for line in seen.read_text().splitlines()]
    tries = Counter(name for name, _ in starts_on)
    assert tries == {"good,seed=1": 2, "diverges,seed=1": 2, "other,seed=1": 1}
    assert {gpu for _, gpu in starts_on} == {"3", "5"}


@pytest.mark.full
def test_printed_commands_are_the_runs(file):
    out = file.parent / "a folder's out"
    shell = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = sweep(file, "--print", f"--out={out}")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4
    two = "".join(done.stdout.splitlines(keepends=True)[:2])
    command = ["xargs", "-0", "-P", "2", "-I{}", "sh", "-c", "{}"]
    options = {"cwd": ROOT, "text": True, "env": shell, "capture_output": True}
    xargs = subprocess.run(command, input=two.replace("\n", "\0"), **options)
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
    names = [name for group in index["runs"].values() for name in group["folders"]]
    assert [starts(out / name) for name in names] == [[0]] * 4
