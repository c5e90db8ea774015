"""A small sweep, how the tests run it, and how they read what it leaves."""

import signal
import subprocess
import sys
import time

import torch
from safetensors.torch import load_file

from nanomoe import checkpoint
from tests.helpers import ROOT, SMALL, flags, log, run_module
from tools.sweep_plan import Plan, read_sweep

RUNS = {"dense": {"use_moe": False}, "4 experts": {"use_moe": True, "num_experts": 4, "top_k": 1}}


def write(path, **values):
    path.write_text(
        '"""A question?"""\n' + "".join(f"{key} = {value!r}\n" for key, value in values.items())
    )
    return path


def small_sweep(tmp_path, play):
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


def sweep(file, *args, **settings):
    out = f"--out={file.parent / 'out'}"
    return run_module("tools.sweep", file, out, "--jobs=2", *args, **settings)


def start_sweep(file, *args, **settings):
    out = f"--out={file.parent / 'out'}"
    command = [sys.executable, "-m", "tools.sweep", str(file), out, "--jobs=2"]
    # CI's shell may run in the background, and then ignores SIGINT for its children
    return subprocess.Popen(
        [*command, *args, *flags(**settings)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def starts(folder):
    """The first step of each start in a run's log."""
    return [entry["first_step"] for entry in log(folder) if "start" in entry]


def folders(file):
    return sorted(path for path in (file.parent / "out").iterdir() if path.is_dir())


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def ended(folder):
    return (folder / "log.jsonl").exists() and b'"end"' in (folder / "log.jsonl").read_bytes()


def plan(path, *args, size="laptop", vocab_size=76):
    return Plan(
        read_sweep(path, size), list(args), path.parent / "out", lambda settings: vocab_size
    )


def the_same(a, b):
    """Whether two runs have the same last weights, steps and losses, to the bit."""
    weights = [load_file(checkpoint.latest_good(folder) / "model.safetensors") for folder in (a, b)]
    losses = [
        [(e["step"], e.get("loss"), e.get("val_loss")) for e in log(folder) if "step" in e]
        for folder in (a, b)
    ]
    return losses[0] == losses[1] and all(
        torch.equal(weights[0][name], weights[1][name]) for name in weights[0]
    )
