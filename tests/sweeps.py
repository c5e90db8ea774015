"""A small sweep, how the tests run it, and how they read what it leaves."""

import signal
import subprocess
import sys

from tests.helpers import ROOT, SMALL, flags, log, run_module
from tools.sweep_plan import Plan, read_sweep

RUNS = {"dense": {"use_moe": False}, "4 experts": {"use_moe": True, "num_experts": 4, "top_k": 1}}
BASE = {"config": "config/train_gpt2.py", **SMALL, "eval_interval": 5, "max_iters": 20}


def write(path, **values):
    lines = [f"{key} = {value!r}\n" for key, value in values.items()]
    path.write_text('"""A question?"""\n' + "".join(lines))
    return path


def small_sweep(tmp_path, play, **changes):
    """A sweep of 2 models x 2 seeds that take seconds."""
    base = BASE | {"dataset": str(play), "keep_last": 0}
    values = {"base": base, "runs": RUNS, "seeds": [1, 2], "baseline": "dense"}
    return write(tmp_path / "small.py", **values | {"match": "active_flops"} | changes)


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
    if not (folder / "log.jsonl").exists():
        return []
    return [entry["first_step"] for entry in log(folder) if "start" in entry]


def folders(file):
    return sorted(path for path in (file.parent / "out").glob("*") if path.is_dir())


def ended(folder):
    return (folder / "log.jsonl").exists() and b'"end"' in (folder / "log.jsonl").read_bytes()


def plan(path, *args, size="laptop", vocab_size=76):
    return Plan(read_sweep(path, size), list(args), path.parent / "out", lambda data: vocab_size)
