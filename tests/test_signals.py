"""What ends a run early: signals and max_seconds. The run saves and says how to resume."""

import fcntl
import math
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time

import pytest

from nanomoe import checkpoint
from nanomoe.load import load
from tests.helpers import (
    MOE,
    ROOT,
    SMALL,
    TORCHRUN,
    altered_train,
    assert_same_run,
    flags,
    full,
    log,
    read_until,
    start_train,
    succeeded,
    train,
)


@pytest.mark.parametrize("processes", [1, full(2)])
def test_max_seconds(play, tmp_path, processes):
    """The run ends when its time is up, whatever max_iters is.

    By then the learning rate has fallen to min_lr. Resuming adds nothing.
    """
    run = {
        "dataset": play,
        "out_dir": tmp_path,
        "max_seconds": 1,
        "max_iters": 10**6,
        "warmup_iters": 0,
        "min_lr": 1e-5,
        "learning_rate": 1e-3,
        "eval_interval": 10**6,
    }
    out = succeeded(train(**run, ranks=processes))
    entries = log(tmp_path)[1:]
    steps = [e for e in entries if "loss" in e]
    assert 1 <= steps[-1]["seconds"] < 20 and steps[-2]["seconds"] < 1 and len(steps) > 20
    lrs = [e["lr"] for e in steps]
    assert lrs == sorted(lrs, reverse=True) and lrs[0] == 1e-3 and lrs[-1] < 5e-5
    assert (
        [e["step"] for e in entries if "val_loss" in e]
        == [steps[-1]["step"]]
        == [load(tmp_path).step]
    )
    middle = steps[
        len(steps) // 2
    ]  # a step takes the rate of the time at which the one before ended
    before = steps[len(steps) // 2 - 1]["seconds"]
    assert middle["lr"] == pytest.approx(
        1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * before)), rel=1e-4
    )
    assert "saved" in out
    out = succeeded(train(**run, init_from="resume"))
    assert "| loss" not in out and load(tmp_path).step == steps[-1]["step"]


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGHUP, 129),
        (signal.SIGINT, 130),
        full(signal.SIGUSR1, 138),
        (signal.SIGTERM, 143),
    ],
)
def test_signals_save_and_stop(number, code, play, tmp_path):
    process = start_train(out_dir=tmp_path, dataset=play, max_iters=100_000)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 5/" in line:
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert (
        f"stopped by {number.name}; resume with --init_from=auto" in rest
        and "Traceback" not in rest
    )
    step = load(tmp_path).step
    assert 5 <= step < 1000 and log(tmp_path)[-1]["step"] == step
    out = succeeded(train(out_dir=tmp_path, dataset=play, max_iters=step + 2, init_from="resume"))
    assert f"after step {step}" in out and f"step {step + 2}/{step + 2} | validation loss" in out


SLOW_STEP = """
import time
step = train.train_step
def slow(*args):
    print("a slow step begins", flush=True)
    time.sleep(2)
    return step(*args)
train.train_step = slow
"""


@pytest.fixture
def in_a_slow_step(play, tmp_path):
    """A process that has begun a step of two seconds."""
    script = altered_train(tmp_path / "slow.py", SLOW_STEP)
    process = start_train(out_dir=tmp_path / "run", dataset=play, max_iters=1000, script=script)
    read_until(process, "a slow step begins")
    return process


def test_the_first_ctrl_c_says_at_once_what_a_second_one_does(in_a_slow_step):
    """While the step still lasts."""
    process = in_a_slow_step
    process.send_signal(signal.SIGINT)
    first = next(line for line in process.stdout if line.strip())
    assert (
        first == "SIGINT: saving after this step; a second Ctrl-C ends at once and saves nothing\n"
    )
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in out and "saved" not in out, out


@pytest.mark.parametrize("number", [signal.SIGTERM, full(signal.SIGUSR1)])
def test_the_first_ctrl_c_after_another_signal(number, in_a_slow_step, tmp_path):
    """It is no second Ctrl-C: the run saves."""
    process = in_a_slow_step
    process.send_signal(number)
    read_until(process, f"{number.name}: saving after this step")
    process.send_signal(signal.SIGINT)
    out = process.communicate(timeout=60)[0]
    assert "SIGINT: saving after this step; a second Ctrl-C" in out and "saved " in out
    assert process.returncode == 128 + number and checkpoint.list_steps(tmp_path / "run")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), full(signal.SIGHUP, 129)])
def test_a_signal_that_ends_tee_too(number, code, play, tmp_path):
    """As Ctrl-C does in `python train.py | tee log`: the code is still that of a stopped run."""
    process = start_train(out_dir=tmp_path, dataset=play, max_iters=10**6)
    read_until(process, "step 5/")
    process.stdout.close()
    process.send_signal(number)
    assert process.wait(timeout=60) == code and checkpoint.list_steps(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, full(signal.SIGKILL)])
def test_a_signal_in_an_evaluation_costs_no_step(number, play, tmp_path):
    """The step is saved before it is evaluated; the resumed run makes up for the evaluation."""
    change = """
import time
evaluate = train.evaluate
def slow(*args):
    print("evaluating", flush=True)
    time.sleep(3)
    return evaluate(*args)
train.evaluate = slow
"""
    script = altered_train(tmp_path / "slow.py", change)
    run = {"dataset": play, "eval_interval": 5, "decay_lr": False, "max_iters": 12}
    process = start_train(**run, out_dir=tmp_path / "run", script=script)
    read_until(process, "evaluating")
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert load(tmp_path / "run").step == 5 and "step 6/" not in out
    assert process.returncode == (143 if number == signal.SIGTERM else -9), out
    succeeded(train(**run, out_dir=tmp_path / "run", init_from="auto"))
    succeeded(train(**run, out_dir=tmp_path / "undisturbed"))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_sighup_is_ignored_under_nohup(play, tmp_path):
    process = start_train(
        out_dir=tmp_path,
        dataset=play,
        max_iters=10**6,
        preexec=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    read_until(process, "step 5/")
    process.send_signal(signal.SIGHUP)
    read_until(process, "step 20/")
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM" in out, out


@pytest.mark.parametrize("immune", [False, True])
def test_a_terminal_that_closes(immune, play, tmp_path):
    """As when ssh drops: SIGHUP, and nothing can be printed any more. The run is saved, or goes on
    if SIGHUP is ignored."""
    terminal, of_run = pty.openpty()

    def own_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if immune else signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(of_run, termios.TIOCSCTTY, 0)

    command = [sys.executable, str(ROOT / "train.py")]
    command += flags(**SMALL | {"out_dir": tmp_path, "dataset": play, "max_iters": 10**6})
    process = subprocess.Popen(
        command, stdin=of_run, stdout=of_run, stderr=of_run, cwd=ROOT, preexec_fn=own_terminal
    )
    os.close(of_run)
    seen = b""
    while b"step 5/" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    if immune:
        while log(tmp_path)[-1].get("step", 0) < 30:
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
    assert process.wait(timeout=60) == (143 if immune else 129)
    step = load(tmp_path).step
    assert step >= 5 and log(tmp_path)[-1]["step"] == step


@pytest.mark.full
@pytest.mark.repeat(3)
def test_sigterm_at_a_random_moment(seed, play, tmp_path):
    stop_at_a_random_moment(signal.SIGTERM, seed, play, tmp_path)


@pytest.mark.full
@pytest.mark.repeat(2)
def test_sighup_at_a_random_moment(seed, play, tmp_path):
    stop_at_a_random_moment(signal.SIGHUP, seed, play, tmp_path)


def stop_at_a_random_moment(number, seed, play, tmp_path):
    """It saves after the step in which the signal arrives, or after the next one."""
    run = {"dataset": play, "out_dir": tmp_path, "max_iters": 10**6, "eval_interval": 10**6}
    process = start_train(batch_size=64, **run, **MOE)
    read_until(process, "step 1/")
    time.sleep(random.Random(seed).uniform(0, 2))
    process.send_signal(signal.SIGSTOP)  # else it could go on between this look and the signal
    step = log(tmp_path)[-1]["step"] + 1
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and f"stopped by {number.name}" in out, out
    saved = load(tmp_path).step
    assert saved == log(tmp_path)[-1]["step"], out
    assert saved in (step, step + 1), f"in step {step}: {out}"


@pytest.mark.parametrize("to", ["torchrun", full("all")])
def test_a_signal_to_torchrun_or_to_all_stops_both_ranks(to, play, tmp_path):
    """torchrun passes a signal on to its processes, at different moments.

    A cluster sends it to all, so each process gets it twice.
    """
    command = [
        *TORCHRUN,
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
        *flags(**SMALL | {"out_dir": tmp_path, "dataset": play, "max_iters": 100_000}),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    for line in process.stdout:
        if "step 5/" in line:
            (os.killpg if to == "all" else os.kill)(process.pid, signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM" in rest, rest
    assert load(tmp_path).step >= 5


@pytest.mark.full
def test_a_signal_ends_an_evaluation(play, tmp_path):
    """There is nothing to save, so it ends at once, without a word."""
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start_train(
            out_dir=tmp_path,
            dataset=play,
            eval_only=True,
            eval_iters=10**6,
            batch_size=1,
            n_layer=12,
            n_embd=512,
        )
        for line in process.stdout:
            if "estimated memory" in line:
                break
        time.sleep(1)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert (
            process.returncode in (130, -signal.SIGTERM)
            and "Traceback" not in out
            and "loss" not in out
        ), out
