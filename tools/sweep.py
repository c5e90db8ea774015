"""
A set of runs for one question: every run that a sweep file names, with each of its seeds, side by side, until all are done.

$ python -m tools.sweep config/sweeps/expert_count.py --dry_run                     # the runs, their sizes and cost
$ python -m tools.sweep config/sweeps/expert_count.py                               # run them
$ python -m tools.sweep config/sweeps/expert_count.py --size=gpt2 --gpus=0,1,2,3    # in another size, on four GPUs
$ python -m tools.sweep config/sweeps/expert_count.py --print | xargs -d '\\n' -P 4 -I{} sh -c {}

After any end the same command goes on: finished runs are skipped, interrupted ones resume at their last checkpoint, a failed
one is tried once more. Started twice, the two share the runs. Then `python -m tools.report out/sweeps/expert_count`.

A sweep file is Python that assigns to these names:
  base      {"config": "config/a.py", "max_iters": 500}: a config file and settings over it, which all runs have; or several
            by size, {"laptop": {...}, "gpt2": {...}}; the file sees `size`
  runs      {"dense": {"use_moe": False}, ...}: runs by name, with their own settings
  grid      {"num_experts": [2, 4], "top_k": [1, 2]}: or every combination, named by its settings
  seeds     [1, 2, 3]: every run is run with each of them
  baseline  "dense": the run that the others are compared with
  match     "active_flops", "active_params" or "total_params": the width of a MoE's experts (expert_dim), or of a dense model's
            MLP (mlp_dim), is solved for as many as the baseline has. A run's own settings may say "match": "total_params" (or
            "": not at all) and "match_to": "another run"
  findings  claims that tools/report judges, see config/sweeps/findings.py

Settings of train.py as flags (--max_iters=20) hold for all runs. Own options:
  --dry_run       only print the table of the runs
  --print         only print the commands of the runs that are not done, one a line
  --size=NAME     which base (default: laptop)
  --out=FOLDER    default: out/sweeps/ and the file's name, and the size's if it is not laptop
  --gpus=0,1      default: all there are
  --jobs=N        runs at a time on each GPU (default 1), or on the CPU (default: one a core, or as many as OMP_NUM_THREADS)
Exit codes: 0 all done; 1 some run failed; 2 something in the file cannot be run (all else was); 130 and 143 stopped.
"""

import argparse
import ast
import collections
import fcntl
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configurator
import train
from configurator import InputError
from nanomoe.dataset import load_meta, pad_vocab_size
from nanomoe.device import choose_device, choose_dtype, limit_threads
from nanomoe.init_from import PER_LAUNCH
from nanomoe.tokenizer import GPT2_VOCAB
from tools.run_logs import share_done, start_of
from tools.sweep_plan import Plan, print_table, read_sweep


def other_run(run):
    """Where a run's folder holds a run with other settings, what differs, else ""."""
    start, wanted = start_of(run.folder) or {}, run.group.settings | {"seed": run.seed}
    before = start.get("settings", {})
    free = PER_LAUNCH | {"wandb_log", "wandb_project", "wandb_run_name"}
    differ = sorted(key for key in set(before) & set(wanted) - free if before[key] != wanted[key])
    if (
        "auto" != wanted["dtype"] != start.get("dtype", wanted["dtype"])
    ):  # the log tells what 'auto' came to
        before, differ = before | {"dtype": start["dtype"]}, [*differ, "dtype"]
    return ", ".join(f"{key}={before[key]} instead of {wanted[key]}" for key in differ)


def lock(folder):
    """Take a run's folder: an open file, or None if another process has it. The run's process inherits the file, so the lock
    is held as long as either lives, and a run whose sweep was killed is not begun a second time beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "a")  # noqa: SIM115 (open as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()


def start(run, held, environment):
    """The run's process, and where in console.txt its words begin."""
    with open(run.folder / "console.txt", "ab") as console:
        since = console.tell()
        # a session of its own: a Ctrl-C for the sweep reaches the run once, from stop()
        process = subprocess.Popen(
            run.command(sys.executable, train.__file__),
            stdout=console,
            stderr=console,
            stdin=subprocess.DEVNULL,
            env=os.environ | environment,
            pass_fds=(held.fileno(),),
            start_new_session=True,
        )
    return process, since


def last_words(run, since):
    """The error line of a run's console.txt, or the last one, from the byte `since` on."""
    lines = (run.folder / "console.txt").read_bytes()[since:].decode(errors="replace").splitlines()
    return next(
        (line for line in reversed(lines) if line.startswith("error: ")),
        lines[-1] if lines else "it said nothing",
    )


def work(runs, lanes, bar):
    """Run all of them, in as many lanes as there are environments. Returns a line for each that failed."""
    waiting, running, tries, failed, done = (
        collections.deque(runs),
        {},
        collections.Counter(),
        [],
        bar.initial,
    )
    try:
        while waiting or running:
            for lane in [lane for lane in range(len(lanes)) if lane not in running]:
                for _ in range(len(waiting)):
                    run = waiting.popleft()
                    try:
                        if not (
                            held := lock(run.folder)
                        ):  # another process is at it: come back later
                            waiting.append(run)
                        elif differ := other_run(run):  # it was
                            held.close()
                            failed.append(
                                f"{run.folder.name}: another sweep has made one there with {differ}"
                            )
                        elif share_done(run.folder, run.group.settings) == 1:
                            held.close()
                            done += 1
                        else:
                            running[lane] = run, *start(run, held, lanes[lane]), held
                            break
                    except OSError as error:
                        failed.append(f"{run.folder.name} cannot be started: {error}")
            time.sleep(0.5)
            for lane, (run, process, since, held) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[lane]
                held.close()
                tries[run.folder] += 1
                if process.returncode == 0:
                    done += 1
                elif tries[run.folder] == 1:
                    bar.write(
                        f"{run.folder.name}: exit code {process.returncode}, {last_words(run, since)}; trying once more",
                        file=sys.stderr,
                    )
                    waiting.appendleft(run)
                else:
                    failed.append(
                        f"{run.folder.name} failed twice, exit code {process.returncode}: {last_words(run, since)} "
                        f"(all of it: {run.folder / 'console.txt'})"
                    )
            bar.n = done + sum(
                share_done(run.folder, run.group.settings) for run, *_ in running.values()
            )
            bar.set_postfix_str(f"{len(running)} running, {len(failed)} failed", refresh=False)
            bar.update(0)
    finally:
        stop(running.values())
    return failed


def stop(running):
    """SIGTERM to the runs' processes: they save a checkpoint and end. Another Ctrl-C ends them at once."""
    running = [process for _, process, *_ in running if process.poll() is None]
    try:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
    except KeyboardInterrupt:
        for process in running:
            process.kill()


def write_index(out, file, sweep, groups, runs):
    """sweep.json: what the runs' own logs cannot tell tools/report."""
    out.mkdir(parents=True, exist_ok=True)
    text = ast.get_docstring(ast.parse(Path(file).read_text())) or Path(file).stem
    command = shlex.join(
        ["python", "-m", "tools.sweep", *(arg for arg in sys.argv[1:] if arg != "--print")]
    )
    index = {
        "title": re.split(r"(?<=\?)\s|\n\n", text)[0].replace("\n", " "),
        "command": command,
        "baseline": sweep["baseline"],
        "findings": sweep["findings"],
        "runs": {
            g.name: {
                "match": g.match,
                "folders": [one.folder.name for one in runs if one.group is g],
            }
            for g in groups
        },
    }
    new = out / f"sweep.json.tmp-{os.getpid()}"
    new.write_text(json.dumps(index, indent=1))
    new.rename(out / "sweep.json")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("file", help=argparse.SUPPRESS)
    for name in ("--dry_run", "--print"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name, default in (("--size", "laptop"), ("--out", ""), ("--gpus", "")):
        parser.add_argument(name, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--jobs", type=int, help=argparse.SUPPRESS)
    own, flags = parser.parse_known_args()
    if own.jobs is not None and own.jobs < 1:
        raise InputError(f"--jobs is {own.jobs}, expected at least 1")
    limit_threads()
    sweep = read_sweep(own.file, own.size)
    out = Path(
        own.out or f"out/sweeps/{Path(own.file).stem}" + f"-{own.size}" * (own.size != "laptop")
    )
    unprepared = set()

    def vocab_size_of(settings):
        try:
            return pad_vocab_size(load_meta(settings["dataset"])["vocab_size"])
        except InputError as error:
            if not own.dry_run and not own.print:
                raise
            unprepared.add(f"{error}; until then it is counted with GPT-2's vocabulary")
            return pad_vocab_size(GPT2_VOCAB)

    if other := [flag for flag in flags if not flag.startswith("--")]:
        raise InputError(f"'{other[0]}': one sweep file, and then flags, like --max_iters=20")
    plan = Plan(sweep, flags, out, vocab_size_of)
    device = choose_device(plan.settings["device"])
    gpus = (
        [gpu.strip() for gpu in own.gpus.split(",")]
        if own.gpus
        else list(map(str, range(torch.cuda.device_count() if device.type == "cuda" else 0)))
    )
    if not all(gpu.isdecimal() for gpu in gpus):
        raise InputError(f"--gpus is '{own.gpus}', expected numbers, like 0,1")
    for g in plan.groups:
        if gpus and g.settings["device"] == "auto":
            g.flags["device"] = "cuda"  # or a lane without a GPU would go on to the CPU
        elif not own.print and device.type == "cpu" and g.settings["dtype"] == "auto":
            # once for all: every run would measure anew, beside the others
            g.flags["dtype"] = g.settings["dtype"] = choose_dtype("auto", device)
    problems, runs = plan.problems, []
    for one in plan.runs:
        if differ := other_run(one):
            problems.append(
                f"run '{one.group.name}' is left out: {one.folder} holds one with {differ}; move that away, or "
                "take another --out"
            )
        else:
            runs.append(one)
    for line in (*problems, *unprepared):
        print(f"error: {line}", file=sys.stderr, flush=True)
    if not runs:
        raise InputError(f"{own.file}: there is no run that can be run")
    cores = torch.get_num_threads()
    jobs = min(own.jobs or (1 if gpus else cores), len(runs))
    threads = max(1, cores // jobs)
    lanes = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] * jobs or [
        {"OMP_NUM_THREADS": str(threads)}
    ] * jobs
    if own.dry_run:
        print_table(plan.groups, runs, len(lanes), device, threads)
    else:
        write_index(out, own.file, sweep, plan.groups, runs)
    to_do = [one for one in runs if share_done(one.folder, one.group.settings) < 1]
    for one in to_do if own.print and not own.dry_run else ():
        one.folder.mkdir(parents=True, exist_ok=True)
        # with the same lock as lock() takes: a line that is run twice ends at once, with code 1
        print(
            shlex.join(
                [
                    "flock",
                    "--nonblock",
                    str(one.folder / "lock"),
                    *one.command("python", os.path.relpath(train.__file__)),
                ]
            )
        )
    if own.dry_run or own.print:
        sys.exit(2 if problems else 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tqdm(
        total=len(runs),
        initial=len(runs) - len(to_do),
        miniters=0,
        mininterval=1 if sys.stderr.isatty() else 60,
        dynamic_ncols=True,
        bar_format="{n:.1f}/{total} runs |{bar:30}| {elapsed}, {remaining} left{postfix}",
    ) as bar:
        failed = work(to_do, lanes, bar)
    for line in failed:
        print(f"error: {line}", file=sys.stderr, flush=True)
    print(
        f"{len(runs) - len(failed)} of {len(runs)} runs are done; now: python -m tools.report {out}"
    )
    sys.exit(1 if failed else 2 if problems else 0)


if __name__ == "__main__":
    configurator.run_main(main)
