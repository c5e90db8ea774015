"""What ends a run early: signals and max_seconds. The run saves and says how to resume."""

import fcntl
import math
import os
import pty
import random
import signal
import termios
import time

import pytest

from nanomoe import checkpoint
from nanomoe.load import load
from tests.helpers import (
    MOE,
    altered_train,
    assert_same_run,
    full,
    log,
    read_until,
    start_train,
    succeeded,
    train,
)

# A function of train.py says when it begins, and takes two seconds longer.
SLOW = """
import time
function = train.{name}
def slow(*args):
    print("{name} begins", flush=True)
    time.sleep(2)
    return function(*args)
train.{name} = slow
"""


@pytest.fixture
def running(play, tmp_path):
    """A function that starts a run without an end, and returns its process after step 5."""

    def start(**options):
        process = start_train(out_dir=tmp_path, dataset=play, max_iters=10**6, **options)
        read_until(process, "step 5/")
        return process

    return start


@pytest.mark.parametrize("processes", [1, full(2)])
def test_max_seconds(play, tmp_path, processes):
    """The run ends when its time is up, whatever max_iters is.

    By then the learning rate has fallen to min_lr. Resuming adds nothing."""
    run = {"dataset": play, "out_dir": tmp_path, "max_seconds": 1, "max_iters": 10**6}
    run |= {"warmup_iters": 0, "learning_rate": 1e-3, "min_lr": 1e-5, "eval_interval": 10**6}
    assert "saved" in succeeded(train(**run, ranks=processes))
    entries = log(tmp_path)
    steps = [e for e in entries if "loss" in e]
    last = steps[-1]["step"]
    assert 1 <= steps[-1]["seconds"] < 20 and steps[-2]["seconds"] < 1 and len(steps) > 20
    lrs = [e["lr"] for e in steps]
    assert lrs == sorted(lrs, reverse=True) and lrs[0] == 1e-3 and lrs[-1] < 5e-5
    assert [e["step"] for e in entries if "val_loss" in e] == [last] == [load(tmp_path).step]
    # a step takes the rate of the time at which the one before ended
    before, middle = steps[len(steps) // 2 - 1 :][:2]
    cosine = 0.5 * (1 + math.cos(math.pi * before["seconds"]))
    assert middle["lr"] == pytest.approx(1e-5 + (1e-3 - 1e-5) * cosine, rel=1e-4)
    out = succeeded(train(**run, init_from="resume"))
    assert "| loss" not in out and load(tmp_path).step == last


STOPPED_BY = (signal.SIGHUP, signal.SIGINT, full(signal.SIGUSR1), signal.SIGTERM)


@pytest.mark.parametrize("number", STOPPED_BY)
def test_signals_save_and_stop(number, running, tmp_path):
    process = running()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in rest, rest
    assert f"stopped by {number.name}; resume with --init_from=auto" in rest
    step = load(tmp_path).step
    assert 5 <= step < 1000 and log(tmp_path)[-1]["step"] == step


@pytest.fixture
def in_a_slow_step(play, tmp_path):
    """A process that has begun a step of two seconds."""
    script = altered_train(tmp_path / "slow.py", SLOW.format(name="train_step"))
    process = start_train(out_dir=tmp_path / "run", dataset=play, max_iters=1000, script=script)
    read_until(process, "train_step begins")
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


@pytest.mark.parametrize("number", [signal.SIGINT, full(signal.SIGHUP)])
def test_a_signal_that_ends_tee_too(number, running, tmp_path):
    """As Ctrl-C does in `python train.py | tee log`: the code is still that of a stopped run."""
    process = running()
    process.stdout.close()
    process.send_signal(number)
    assert process.wait(timeout=60) == 128 + number and checkpoint.list_steps(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, full(signal.SIGKILL)])
def test_a_signal_in_an_evaluation_costs_no_step(number, play, tmp_path):
    """The step is saved before it is evaluated; the resumed run makes up for the evaluation."""
    script = altered_train(tmp_path / "slow.py", SLOW.format(name="evaluate"))
    run = {"dataset": play, "eval_interval": 5, "decay_lr": False, "max_iters": 12}
    process = start_train(**run, out_dir=tmp_path / "run", script=script)
    read_until(process, "evaluate begins")
    process.send_signal(number)
    out = process.communicate(timeout=60)[0]
    assert load(tmp_path / "run").step == 5 and "step 6/" not in out
    assert process.returncode == (143 if number == signal.SIGTERM else -9), out
    succeeded(train(**run, out_dir=tmp_path / "run", init_from="auto"))
    succeeded(train(**run, out_dir=tmp_path / "undisturbed"))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


@pytest.mark.parametrize("immune", [False, True])
def test_a_terminal_that_closes(immune, play, tmp_path):
    """As when ssh drops: SIGHUP, and nothing can be printed any more. The run is saved, or goes on
    if SIGHUP is ignored, as under nohup."""
    terminal, of_run = pty.openpty()

    def own_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_IGN if immune else signal.SIG_DFL)
        os.setsid()
        fcntl.ioctl(of_run, termios.TIOCSCTTY, 0)
        for descriptor in (0, 1, 2):
            os.dup2(of_run, descriptor)

    process = start_train(out_dir=tmp_path, dataset=play, max_iters=10**6, preexec=own_terminal)
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


@pytest.mark.parametrize("kill", [os.kill, full(os.killpg)], ids=["torchrun", "all"])
def test_a_signal_to_torchrun_or_to_all_stops_both_ranks(kill, running, tmp_path):
    """torchrun passes a signal on to its processes, at different moments.

    A cluster sends it to all, so each process gets it twice."""
    process = running(processes=2, preexec=os.setsid)
    kill(process.pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM" in rest and load(tmp_path).step >= 5, rest


@pytest.mark.full
def test_a_signal_ends_an_evaluation(play, tmp_path):
    """There is nothing to save, so it ends at once, without a word."""
    run = {"dataset": play, "out_dir": tmp_path, "eval_only": True, "eval_iters": 10**6}
    run |= {"batch_size": 1, "n_layer": 12, "n_embd": 512}
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start_train(**run)
        read_until(process, "estimated memory")
        time.sleep(1)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert process.returncode in (130, -signal.SIGTERM), out
        assert "Traceback" not in out and "loss" not in out, out
