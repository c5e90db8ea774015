"""
Run a set of experiments: every run that a sweep file describes, with each of its seeds.

$ python -m tools.sweep config/sweeps/expert_count.py --dry_run
$ python -m tools.sweep config/sweeps/expert_count.py
$ python -m tools.sweep config/sweeps/expert_count.py --size=gpt2 --gpus=0,1,2,3
$ python -m tools.sweep config/sweeps/expert_count.py --print > runs.txt
$ python -m tools.report out/sweeps/expert_count

Stop or kill a sweep at any time; the same command continues it. Finished runs are skipped,
interrupted ones resume from their last checkpoint, a failed one is tried once more. Two sweeps of
the same file share the runs. Settings of train.py can be given as flags and hold for all runs.
tools/README.md describes the sweep file.

Exit codes: 0 all runs are done; 1 a run failed; 2 something in the file cannot be run (everything
else was); 129, 130 or 143 stopped by SIGHUP, Ctrl-C or SIGTERM, after the runs have saved a
checkpoint.
"""

import ast
import collections
import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import train
from configurator import InputError, configure, short_path, split_argv
from nanomoe import checkpoint
from nanomoe.dataset import pad_vocab_size
from nanomoe.device import choose_device, choose_dtype, limit_threads
from nanomoe.errors import run_main
from nanomoe.log import last_start
from nanomoe.run_dir import is_locked, try_lock
from nanomoe.settings import PER_LAUNCH
from nanomoe.tokenizer import GPT2_VOCAB, load_meta
from tools.sweep_plan import Plan, print_table, read_sweep

# -----------------------------------------------------------------------------
# settings
file = ""  # the sweep file; can be given without --file=
dry_run = False  # only print a table of the runs: sizes, memory, and what is done
print_ = False  # only print the commands of the runs that are not done, one per line
size = "laptop"  # which base of the sweep file
out = ""  # the runs' folder; default: out/sweeps/ and the file's name (and -SIZE if not laptop)
gpus = ""  # numbers of the GPUs to use, like 0,1; default: all
jobs = 0  # runs at a time, on each GPU (0 = 1) or on the CPU (0 = one per core or OMP_NUM_THREADS)
# -----------------------------------------------------------------------------


def check_folder(run):
    """Raises InputError if a run's folder holds a run with other settings."""
    start = last_start(run.folder)
    # the log's dtype is what 'auto' came to
    found = start.get("settings", {}) | {"dtype": start.get("dtype")}
    wanted = run.group.settings | {"seed": run.seed}
    may_differ = PER_LAUNCH | {"wandb_log", "wandb_project", "wandb_run_name"}
    if wanted["dtype"] != "auto":
        may_differ -= {"dtype"}
    differ = [
        f"{key}={found[key]} instead of {wanted[key]}"
        for key in sorted((found.keys() & wanted.keys()) - may_differ)
        if found[key] != wanted[key]
    ]
    if start and differ:
        raise InputError(
            f"{run.folder} holds a run with other settings: {', '.join(differ)}; "
            "move it away or choose another --out"
        )


def lane(environment, waiting, running, failed):
    """Run what is waiting, one run at a time, on one GPU or on some of the CPU's threads. Yields
    whenever there is something to wait for."""
    while waiting:
        run = waiting.popleft()
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            # the first is another sweep's, the second that of a run which outlived its sweep
            lock = try_lock(run.folder / "sweep.lock")
            if not lock or is_locked(run.folder):
                lock = None  # which releases it
                waiting.append(run)  # look again later
                yield
                continue
            check_folder(run)
            if run.share_done() == 1:
                continue
            problem = yield from train_run(run, environment, running)
            if problem:
                tqdm.write(f"{run.folder.name}: {problem}; trying again", file=sys.stderr)
                problem = yield from train_run(run, environment, running)
            if problem:
                console = run.folder / "console.txt"
                failed.append(f"{run.folder.name} failed twice, {problem} (see {console})")
        except (OSError, InputError) as error:
            failed.append(f"{run.folder.name} cannot be started: {error}")


def train_run(run, environment, running):
    """Run train.py; yields until it has ended. Returns what went wrong, or ""."""
    path = run.folder / "console.txt"
    with open(path, "ab") as console:
        first_byte = console.tell()
        process = subprocess.Popen(
            run.command(sys.executable, train.__file__),
            stdout=console,
            stderr=console,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            start_new_session=True,  # so that Ctrl-C reaches it once, from stop()
        )
    running.add(process)
    while process.poll() is None:
        yield
    running.remove(process)
    text = path.read_bytes()[first_byte:].decode(errors="replace")
    lines = text.splitlines() or ["no output"]
    errors = [line for line in lines if line.startswith("error: ")]
    code = process.returncode
    return f"exit code {code}: {(errors or lines)[-1]}" if code else ""


def work(runs, environments, bar):
    """Run all of them, one at a time in each environment. Returns a line for each that failed."""
    waiting, running, failed = collections.deque(runs), set(), []
    lanes = [lane(environment, waiting, running, failed) for environment in environments]
    try:
        while lanes:
            lanes = [each for each in lanes if next(each, "ended") != "ended"]
            bar.n = sum(run.share_done() for run in runs)
            bar.set_postfix_str(f"{len(running)} running, {len(failed)} failed", refresh=False)
            bar.update(0)
            time.sleep(0.5)
    finally:
        stop(running)
    return failed


def stop(processes):
    """Let the runs save a checkpoint and end (SIGTERM). Another Ctrl-C kills them."""
    try:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()


def write_index(folder, sweep, groups, runs):
    """Write sweep.json: what the runs' logs cannot tell tools.report."""
    doc = ast.get_docstring(ast.parse(Path(file).read_text(encoding="utf-8"))) or Path(file).stem
    args = [arg for arg in sys.argv[1:] if arg != "--print"]
    index = {
        "title": re.split(r"(?<=\?)\s|\n\n", doc)[0].replace("\n", " "),  # its question
        "command": shlex.join(["python", "-m", "tools.sweep", *args]),
        "baseline": sweep["baseline"],
        "findings": sweep["findings"],
        "runs": {group.name: {"match": group.match, "folders": []} for group in groups},
    }
    for run in runs:
        index["runs"][run.group.name]["folders"].append(run.folder.name)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.replace(folder / "sweep.json", json.dumps(index, indent=1))


@functools.cache
def vocab_size_of(dataset):
    """For --dry_run and --print, the dataset need not be prepared."""
    try:
        return pad_vocab_size(load_meta(dataset)["vocab_size"])
    except InputError as error:
        if not dry_run and not print_:
            raise
        note = "until then, sizes assume GPT-2's vocabulary"
        print(f"error: {error}; {note}", file=sys.stderr, flush=True)
        return pad_vocab_size(GPT2_VOCAB)


def main():
    own, flags, paths = split_argv(globals())
    configure(globals(), [*own, *paths], positional=("file",))
    if not file:
        raise InputError("expected a sweep file, like config/sweeps/expert_count.py")
    if jobs < 0:
        raise InputError(f"jobs is {jobs}, expected at least 0")
    limit_threads()
    sweep = read_sweep(file, size)
    suffix = "" if size == "laptop" else f"-{size}"
    folder = Path(out or f"out/sweeps/{Path(file).stem}{suffix}")
    plan = Plan(sweep, flags, folder, vocab_size_of)
    device = choose_device(plan.settings["device"], try_it=False)
    numbers = [number.strip() for number in gpus.split(",")] if gpus else []
    if device.type == "cuda" and not gpus:
        numbers = [str(number) for number in range(torch.cuda.device_count())]
    if not all(number.isdecimal() for number in numbers):
        raise InputError(f"gpus is '{gpus}', expected numbers, like 0,1")
    for group in plan.groups:
        if numbers and group.settings["device"] == "auto":
            group.flags["device"] = "cuda"  # 'auto' would train on the CPU if the GPU is missing
        elif not print_ and device.type == "cpu" and group.settings["dtype"] == "auto":
            # choose once: every run would measure for itself, beside the others
            group.flags["dtype"] = group.settings["dtype"] = choose_dtype("auto", device)
    runs = []
    for run in plan.runs:
        try:
            check_folder(run)
            runs.append(run)
        except InputError as error:
            plan.problems.append(f"run '{run.group.name}' is left out: {error}")
    for line in plan.problems:
        print(f"error: {line}", file=sys.stderr, flush=True)
    if not runs:
        raise InputError(f"{file}: there is no run that can be run")

    cores = torch.get_num_threads()
    at_a_time = min(jobs or (1 if numbers else cores), len(runs))
    threads = {"OMP_NUM_THREADS": str(max(1, cores // at_a_time))}
    environments = [{"CUDA_VISIBLE_DEVICES": number} for number in numbers] or [threads]
    environments *= at_a_time
    exit_code = 2 if plan.problems else 0
    if dry_run:
        print_table(plan.groups, runs, len(environments), device)
        sys.exit(exit_code)
    write_index(folder, sweep, plan.groups, runs)
    if print_:
        for run in runs:
            if run.share_done() == 1:
                continue
            # a command whose run is running already exits with 2
            print(shlex.join(run.command("python", short_path(train.__file__))))
        sys.exit(exit_code)

    for name in ("SIGTERM", "SIGHUP"):
        if number := getattr(signal, name, None):  # Windows has no SIGHUP
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tqdm(
        total=len(runs),
        initial=sum(run.share_done() for run in runs),
        miniters=0,
        mininterval=1 if sys.stderr.isatty() else 60,
        dynamic_ncols=True,
        bar_format="{n:.1f}/{total} runs |{bar:30}| {elapsed}, {remaining} left{postfix}",
    ) as bar:
        failed = work(runs, environments, bar)
    for line in failed:
        print(f"error: {line}", file=sys.stderr, flush=True)
    done = len(runs) - len(failed)
    report = shlex.join(["python", "-m", "tools.report", str(folder)])
    print(f"{done} of {len(runs)} runs are done; next: {report}")
    sys.exit(1 if failed else exit_code)


if __name__ == "__main__":
    run_main(main)
