"""
How hard is it to break a run? Real runs are killed, starved of disk space, damaged and misled.
Prints the table of assets/reliability.md; the exit code is 1 if a promise was broken.

$ python -m tests.stress                                  # everything: 40 minutes on two cores
$ python -m tests.stress --only=kills,disk --share=0.1    # two rows, a tenth of each

Small models train on a few pages of Macbeth, on the CPU in float32. Progress is on stderr.
"""

import contextlib
import datetime
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from configurator import InputError, configure
from nanomoe import checkpoint
from nanomoe.errors import run_main
from nanomoe.load import load
from tests import helpers
from tests.helpers import ROOT, assert_same_run, read_until, start_train, succeeded, train

only = ""  # the rows to run, separated by commas; empty = all
share = 1.0  # of each row's number of repetitions

RUN = helpers.MOE | {"router_bias_update_rate": 1e-3, "dropout": 0.1}


class Row:
    """A row of the table while it runs. number: of repetitions; folder: its own."""

    def __init__(self, name, number, folder, data):
        self.name, self.number, self.folder = name, number, folder
        self.settings = RUN | {"dataset": data}
        if name.endswith("_muon"):
            self.settings["optimizer"] = "muon"
        folder.mkdir()
        self.held, self.remark, self.lock = 0, "", threading.Lock()

    def count(self, *words):
        """One more repetition held."""
        with self.lock:
            self.held += 1
        print(f"{self.name} {self.held}/{self.number}", *words, file=sys.stderr, flush=True)


def kill_and_resume(row, moment, **settings):
    """Kill two runs with kill -9, row.number times in all, and start them again with the same
    command line. The second one saves in the background. At last both must end as if undisturbed.

    moment(process, out_dir, rng, kills) waits for the time to kill; returns the output it read."""
    settings = row.settings | {"init_from": "auto", "keep_last": 2} | settings
    settings["max_iters"] = max(100, 15 * row.number)
    undisturbed = row.folder / "undisturbed"
    succeeded(train(out_dir=undisturbed, timeout=600, **settings))
    in_background = helpers.altered_train(row.folder / "in_background.py", helpers.BACKGROUND)
    scripts = ["train.py", in_background]

    def kill_one_run(background):
        rng = random.Random(f"{row.name} {background}")
        wanted = (row.number + 1 - background) // 2
        kills, ended, newest = 0, 0, 0
        while kills < wanted:
            out_dir = row.folder / f"{background}-{ended}"
            process = start_train(script=scripts[background], out_dir=out_dir, **settings)
            out = moment(process, out_dir, rng, kills)
            process.kill()
            out += process.communicate()[0]
            assert process.returncode in (0, -signal.SIGKILL), f"it ended by itself: {out}"
            inside_a_save = any(out_dir.glob("step-*.tmp-*"))
            saved = [int(step) for step in re.findall(r"^saved .*step-(\d+)", out, re.MULTILINE)]
            newest = max([newest, *saved])
            if process.returncode == 0:  # it reached its last step: begin another run
                assert_same_run(out_dir, undisturbed)
                ended, newest = ended + 1, 0
                continue
            found = load(out_dir).step if checkpoint.list_steps(out_dir) else 0
            assert found >= newest, f"{out_dir}: step {newest} was saved, {found} is the newest"
            newest = found
            if inside_a_save or row.name != "window":
                kills += 1
                row.count(f"after step {found}", "inside a save" if inside_a_save else "")
        succeeded(train(out_dir=out_dir, timeout=600, **settings))
        assert_same_run(out_dir, undisturbed)
        assert not any(out_dir.glob("*.tmp-*")), "half a checkpoint was left"
        return ended + 1

    with ThreadPoolExecutor(2) as pool:
        runs = sum(pool.map(kill_one_run, range(min(2, row.number))))
    row.remark = f"{runs} runs of {settings['max_iters']} steps, half save in the background"


def kills(row):
    def moment(process, out_dir, rng, kills):
        if kills % 4 == 3:  # while it starts
            time.sleep(rng.uniform(0, 4))
            return ""
        out = read_until(process, "| loss")
        while process.poll() is None and not checkpoint.list_steps(out_dir):
            time.sleep(0.01)  # before the first checkpoint there is nothing to lose
        time.sleep(rng.uniform(0, 2.5))  # meanwhile the pipe holds what it prints
        return out

    kill_and_resume(row, moment, eval_interval=7, log_interval=5)


def window(row):
    def moment(process, out_dir, rng, kills):
        """Somewhere in one of the next 19 saves."""
        saves, last, deadline = rng.randrange(1, 20), None, time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            now = next(out_dir.glob("step-*.tmp-*"), None)
            if now and now != last:
                last, saves = now, saves - 1
                if not saves:
                    time.sleep(rng.uniform(0, 0.03))
                    break
            time.sleep(0.0005)
        return ""

    kill_and_resume(row, moment, eval_interval=1)


@contextlib.contextmanager
def small_disk(folder, size):
    """Mount a file system of `size` bytes at a new folder; False if this user may not mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "stress", str(folder)]
    mounted = shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode
    try:
        yield bool(mounted)
    finally:
        if mounted:
            # lazily: a process that another thread is starting may still hold one of its files
            subprocess.run(["umount", "-l", str(folder)], check=True)


def disk(row):
    """Fill the disk under a run. Where none can be mounted, limit the size of the run's files."""
    base = row.folder / "base"
    succeeded(train(out_dir=base, **row.settings))
    before = {p.name: p.read_bytes() for p in checkpoint.latest_good(base).iterdir()}
    size = sum(map(len, before.values()))
    settings = row.settings | {"init_from": "auto", "max_iters": 60}

    def fill(number):
        space = random.Random(number).randrange(size)
        folder = row.folder / str(number)
        with small_disk(folder, 4 * size) as mounted:
            out_dir = Path(shutil.copytree(base, folder / "run"))
            if mounted:
                process = start_train(out_dir=out_dir, **settings)
                read_until(process, "| loss")
                too_much = shutil.disk_usage(folder).free - space
                (folder / "filler").write_bytes(bytes(max(0, too_much)))
            else:
                row.remark = "by a limit on the size of files"
                most = min(space, len(before["training.pt"]) - 1)
                limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (most, most))
                process = start_train(out_dir=out_dir, preexec=limit, **settings)
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 1, f"exit code {process.returncode}: {out}"
            assert out.count("error: ") == 1 and "Traceback" not in out, f"not one line: {out}"
            assert "could not write" in out, f"not clear: {out}"
            assert "No space left on device" in out or not mounted, f"not the reason: {out}"
            kept = {p.name: p.read_bytes() for p in checkpoint.latest_good(out_dir).iterdir()}
            assert kept == before, "the previous checkpoint has changed"
            assert len(list(out_dir.glob("step-*"))) == 1, "half a checkpoint was left"
        row.count(f"{space} bytes left")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(row.number)))


def elastic(row):
    settings = row.settings | {"processes": 2, "max_iters": 60, "eval_interval": 5}
    for parallel in ("ddp", "fsdp")[: row.number]:
        succeeded(train(out_dir=row.folder / parallel, parallel=parallel, **settings))
    for number in range(row.number):
        rng, parallel = random.Random(number), ("ddp", "fsdp")[number % 2]
        out_dir, step = row.folder / str(number), rng.randrange(1, 50)
        settings |= {"parallel": parallel, "torchrun": ["--max-restarts=3"]}
        process = start_train(out_dir=out_dir, **settings)
        read_until(process, f"step {step}/")
        os.kill(rng.choice(helpers.children(process.pid)), signal.SIGKILL)
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"exit code {process.returncode}: {out}"
        assert step < 6 or "resuming from" in out, f"it did not resume: {out}"
        assert_same_run(out_dir, row.folder / parallel)
        row.count(parallel, f"killed at step {step}")


def run_test(row, test):
    """Let pytest repeat a test, "file::name", each time with another seed."""
    options = ["--full", f"--times={row.number}", "-q"]
    test = f"tests/test_{test.replace('::', '.py::test_')}"
    command = [sys.executable, "-m", "pytest", test, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    row.held = int(passed[1]) if passed else 0
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


BIT = "losses and weights equal an undisturbed run's to the bit"
STEP = "a checkpoint of that step or the next; exit code"
# name: what is done, how often, what must hold, and the function or the test that pytest repeats
# fmt: off
ROWS = {
    "kills": ("kill -9 at random moments", 100, f"no saved step is lost; {BIT}", kills),
    "window": ("kill -9 inside the save window", 100, "the same", window),
    "sigterm": ("SIGTERM", 50, f"{STEP} 143", "signals::sigterm_at_a_random_moment"),
    "disk": ("the disk runs full", 50, "previous checkpoint intact, one clear line, code 1", disk),
    "flips": ("bit flips in checkpoint files", 1000,
              "all detected; the one before is loaded", "checkpoint::flipped_bits_are_seen"),
    "truncations": ("truncations of checkpoint files", 1000,
                    "the same", "checkpoint::truncations_are_seen"),
    "pickles": ("malicious pickles as checkpoints", 10,
                "refused, nothing executed", "pickles::malicious_pickles_are_refused"),
    "elastic": ("one of two ranks killed, torchrun restarts (DDP, FSDP)", 10, BIT, elastic),
    "kills_muon": ("kill -9 at random moments, with Muon", 20, BIT, kills),
    "elastic_muon": ("one of two ranks killed, with Muon (DDP, FSDP)", 4, BIT, elastic),
    "world_sizes": ("world size 1 -> 2 -> 1 (DDP, FSDP; AdamW, Muon)", 4,
                    "every loss to 1e-6 of one process's", "distributed::world_sizes"),
    "nan": ("NaN gradient on one of two ranks (DDP, FSDP)", 10,
            "all ranks skip that step only", "bad_steps::nan_gradient_on_one_rank"),
    "configs": ("config files with one mistake", 100,
                "all refused; nearest key named", "configurator::config_files_with_one_mistake"),
    "two_starts": ("two starts at once in one folder", 50,
                   "nothing of the first is lost", "two_starts::two_starts_at_once"),
    "evaluation": ("an error in an evaluation", 20,
                   "that step is saved", "saving::an_error_in_an_evaluation"),
    "sighup": ("SIGHUP", 20, f"{STEP} 129", "signals::sighup_at_a_random_moment"),
    "batch_size": ("resumed with another batch size", 20,
                   "no window twice, none left out", "resume::another_batch_size"),
}
# fmt: on
FIXED = ("pickles", "world_sizes")  # every kind once, whatever the share


def prepare_pages(folder):
    """A dataset of a few pages, so that a run has several epochs."""
    sys.path.append(str(ROOT / "data"))
    from common import char_meta
    from writing import write_texts

    pages = {"train": helpers.MACBETH[:16_000], "val": helpers.MACBETH[-4_000:]}
    with contextlib.redirect_stdout(sys.stderr):
        write_texts(folder, char_meta(helpers.MACBETH), pages, "python -m tests.stress")
    return folder


def run_row(name, number, folder, data):
    """Run a row, print it, and return whether it held."""
    row, start, problem = Row(name, number, folder, data), time.monotonic(), None
    what, _, must, how = ROWS[name]
    try:
        if isinstance(how, str):
            run_test(row, how)
        else:
            how(row)
        assert row.held == number, f"only {row.held} of {number}"
    except Exception:  # the other rows still run
        problem = traceback.format_exc()
        print(f"\n{name} is broken: {problem}", file=sys.stderr)
    found = f"BROKEN after {row.held} of {number}" if problem else f"{row.held} of {number} held"
    if row.remark:
        found += f"; {row.remark}"
    seconds = time.monotonic() - start
    print(f"| {what} | {number} | {must} | {found} | {seconds:.0f} s |", flush=True)
    return not problem


def main():
    configure(globals())
    names = only.split(",") if only else list(ROWS)
    unknown = ", ".join(sorted(set(names) - set(ROWS)))
    if unknown:
        raise InputError(f"unknown row {unknown}; known: {', '.join(ROWS)}")
    command = " ".join(["python -m tests.stress", *sys.argv[1:]])
    print(
        f"# Reliability\n\n`{command}`, {datetime.date.today()}, {os.cpu_count()} cores of "
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}.\n\n"
        "| case | how many | must hold | found | took |\n|---|---|---|---|---|"
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # for all processes that are started
    all_held = True
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_pages(Path(folder) / "data")
        for name in names:
            number = ROWS[name][1]
            if name not in FIXED:
                number = max(1, round(number * share))
            all_held &= run_row(name, number, Path(folder) / name, data)
    sys.exit(0 if all_held else 1)


if __name__ == "__main__":
    run_main(main)
