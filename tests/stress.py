"""
How hard it is to break a run: real runs are killed, starved, damaged and misled, and a table tells what held.

$ python -m tools.chaos > assets/reliability.md                  # all of it: half an hour on two cores
$ python -m tools.chaos --only=kills,disk --share=0.1            # a tenth of two cases

It runs small models on a few pages of a prepared dataset, in float32 on the CPU, a process and a thread each, two at a time.
Exit code 1 if anything did not hold. What it looks at as it goes is on stderr.
"""

import argparse
import contextlib
import datetime
import io
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from model import GPT, GPTConfig
from nanomoe import checkpoint
from nanomoe.dataset import Dataset
from nanomoe.run_dir import Saver
from tests import hostile

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "use_moe": True,
    "num_experts": 4,
    "top_k": 2,
    "router_bias_update_rate": 1e-3,
    "max_iters": 100,
    "warmup_iters": 1,
    "eval_iters": 2,
    "sample_tokens": 0,
    "device": "cpu",
    "compile": False,
    "dtype": "float32",
}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


class Broken(Exception):
    """A promise that was not kept."""


def hold(condition, *words):
    if not condition:
        raise Broken(" ".join(map(str, words)))


def pages(folder, dataset):
    """A dataset so small that runs here are in their third epoch and more: the first pages of another."""
    whole = Dataset(dataset, 32)
    folder.mkdir()
    for split, tokens in (("train", whole.train[:16_000]), ("val", whole.val[:4_000])):
        tokens.tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(
        json.dumps({k: v for k, v in whole.meta.items() if k not in ("train", "val")})
    )
    return folder


def start(
    data, out_dir, processes=1, script=ROOT / "train.py", limit=None, torchrun=(), **settings
):
    """train.py in the background, what it says on a pipe."""
    several = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *torchrun,
    ] * (processes > 1)
    flags = [
        f"--{k}={v}" for k, v in (SMALL | {"dataset": data, "out_dir": out_dir} | settings).items()
    ]
    prepare = (
        None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    return subprocess.Popen(
        [sys.executable, *several, str(script), *flags],
        text=True,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=prepare,
        env=ONE_THREAD,
    )


def finish(*args, code=0, **settings):
    """The same to its end, which is awaited; its output."""
    process = start(*args, **settings)
    out, _ = process.communicate(timeout=600)
    hold(process.returncode == code, "exit code", process.returncode, out[-2000:])
    return out


def curve(out_dir):
    """What a run's log says of its steps, but for times."""
    entries = map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in e.items() if k not in ("seconds", "ms", "tokens_per_s")}
        for e in entries
        if "step" in e
    ]


def weights(out_dir):
    return load_file(checkpoint.latest_good(out_dir) / "model.safetensors")


def last_life(out_dir):
    """What the log has since the last start, the time of that first."""
    with contextlib.suppress(FileNotFoundError):
        return (out_dir / "log.jsonl").read_text().rpartition('{"start"')[2]
    return ""


def wait_for_a_step(process, out_dir):
    """Until a process that was just started has logged a step, or ended."""
    before = last_life(out_dir)[:30]
    while process.poll() is None:
        now = last_life(out_dir)
        if now[:30] != before and '"loss"' in now:
            return
        time.sleep(0.01)


def hold_equal(out_dir, reference):
    """That a run ended with the reference's losses and weights, to the last bit."""
    hold(curve(out_dir) == curve(reference), out_dir, "has another loss curve")
    a, b = weights(out_dir), weights(reference)
    hold(
        a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a),
        out_dir,
        "has other weights",
    )


class Case:
    """One row of the table. number: how many; folder: its own; data: a dataset; rng: the chance that it takes."""

    def __init__(self, name, share, folder, data):
        self.name, self.folder, self.data, self.rng = name, folder / name, data, random.Random(name)
        self.what, number, self.must, self.run = CASES[name]
        self.number = max(1, round(number * share)) if number > 2 else number
        self.folder.mkdir()
        self.remark, self.done, self.lock = "", 0, threading.Lock()

    def count(self, *words):
        with self.lock:
            self.done += 1
        print(f"{self.name} {self.done}/{self.number}", *words, file=sys.stderr, flush=True)

    def two_at_a_time(self, work, items):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(work, items))


def kill_and_go_on(case, moment, **settings):
    """Two runs, the second saving in the background, each killed number / 2 times by kill -9 and started again by the same
    command line, then left to end."""
    settings = {
        "init_from": "auto",
        "keep_last": 2,
        "max_iters": max(100, 15 * case.number),
    } | settings
    reference = case.folder / "undisturbed"
    finish(case.data, reference, **settings)

    def life(chain):
        rng, kills, lap, newest = random.Random(f"{case.name} {chain}"), 0, 0, 0
        number = (case.number + 1 - chain) // 2
        if not number:
            return 0
        while kills < number:
            out_dir = case.folder / f"{chain}-{lap}"
            process = start(case.data, out_dir, async_save=bool(chain), **settings)
            moment(process, out_dir, rng, kills)
            process.kill()
            out, _ = process.communicate()
            hold(process.returncode in (0, -signal.SIGKILL), "it ended by itself", out)
            inside = bool(list(out_dir.glob("step-*.tmp-*")))
            told = [
                int(line.split("step-")[1][:8])
                for line in out.splitlines()
                if line.startswith("saved")
            ]
            newest = max([newest, *told])
            if process.returncode == 0:  # it had come to its end: another one
                hold_equal(out_dir, reference)
                lap, newest = lap + 1, 0
                continue
            found = checkpoint.load(out_dir).step if checkpoint.exists(out_dir) else 0
            hold(found >= newest, out_dir, "was saved up to step", newest, "but has", found)
            newest = found
            if inside or "window" not in case.name:
                kills += 1
                case.count(f"after step {found}", "inside a save" if inside else "")
        finish(case.data, out_dir, **settings)
        hold_equal(out_dir, reference)
        hold(not list(out_dir.glob("*.tmp-*")), "half a checkpoint was left")
        return lap + 1

    runs = sum(case.two_at_a_time(life, (0, 1)))
    case.remark = (
        f"{runs} runs of {settings['max_iters']} steps, half of them saving in the background"
    )


def kills(case):
    def moment(process, out_dir, rng, kills):
        if kills % 4 == 3:  # while it starts
            time.sleep(rng.uniform(0, 4))
            return
        wait_for_a_step(process, out_dir)
        while process.poll() is None and not checkpoint.list_steps(
            out_dir
        ):  # else there would be nothing to lose
            time.sleep(0.01)
        # an unread pipe holds 64 KB, which is more than such a life says
        time.sleep(rng.uniform(0, 2.5))

    kill_and_go_on(case, moment, eval_interval=7, log_interval=5)


def window(case):
    def moment(process, out_dir, rng, kills):
        saves, end, seen = rng.randrange(1, 20), time.monotonic() + 60, None
        while process.poll() is None and time.monotonic() < end:
            now = next(iter(out_dir.glob("step-*.tmp-*")), None)
            if now and now != seen:
                seen, saves = now, saves - 1
                if not saves:
                    time.sleep(rng.uniform(0, 0.03))
                    return
            time.sleep(0.0005)

    kill_and_go_on(case, moment, eval_interval=1)


def sigterm(case):
    def one(number):
        rng, out_dir = random.Random(number), case.folder / str(number)
        process = start(case.data, out_dir, eval_interval=10**6, max_iters=10**6, batch_size=64)
        wait_for_a_step(process, out_dir)
        time.sleep(rng.uniform(0, 2))
        process.send_signal(signal.SIGSTOP)  # lest it go on between this look at it and the signal
        running = curve(out_dir)[-1]["step"] + 1
        process.terminate()
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=60)
        hold(
            process.returncode == 143 and "stopped by SIGTERM" in out,
            "exit code",
            process.returncode,
            out,
        )
        hold(
            checkpoint.load(out_dir).step == curve(out_dir)[-1]["step"] in (running, running + 1),
            "not",
            running,
            out,
        )
        shutil.rmtree(out_dir)
        case.count(f"in step {running}")

    case.two_at_a_time(one, range(case.number))


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes at a folder. OSError where one may not be mounted."""
    folder.mkdir()
    mounted = (
        shutil.which("mount")
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", str(folder)],
            capture_output=True,
        ).returncode
        == 0
    )
    if not mounted:
        raise OSError("only root may mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disk(case):
    """A disk that runs full while a run is at it; where none can be made, a limit on the size of its files."""
    base = case.folder / "base"
    finish(case.data, base, max_iters=2, eval_interval=2)
    before = {p.name: p.read_bytes() for p in checkpoint.locate(base).iterdir()}
    size = sum(map(len, before.values()))

    def hold_intact(out_dir, process):
        out, _ = process.communicate(timeout=60)
        hold(process.returncode == 1, "exit code", process.returncode, out)
        hold(
            out.count("\nerror: ") == 1 and "Traceback" not in out and "could not write" in out,
            "not one clear line:",
            out,
        )
        hold(
            {p.name: p.read_bytes() for p in checkpoint.latest_good(out_dir).iterdir()} == before,
            "another checkpoint",
        )
        hold([p.name for p in out_dir.glob("step-*")] == ["step-00000002"], "something is left")
        return out

    def one(number):
        offset = random.Random(number).randrange(size)
        settings = {"init_from": "auto", "max_iters": 60, "eval_interval": 60}
        try:
            with small_disk(case.folder / f"disk {number}", 4 * size) as folder:
                out_dir = Path(shutil.copytree(base, folder / "run"))
                process = start(case.data, out_dir, **settings)
                wait_for_a_step(process, out_dir)
                (folder / "filler").write_bytes(
                    bytes(max(0, shutil.disk_usage(folder).free - offset))
                )
                out = hold_intact(out_dir, process)
                hold("No space left on device" in out, "the reason is missing:", out)
        except OSError:
            offset = min(offset, len(before["training.pt"]) - 1)
            out_dir = Path(shutil.copytree(base, case.folder / str(number)))
            hold_intact(out_dir, start(case.data, out_dir, limit=offset, **settings))
            case.remark = "by a limit on the size of files"
        case.count(f"{offset} bytes left")

    case.two_at_a_time(one, range(case.number))


def damage(case, change):
    """Change a random file of the newest of two checkpoints, again and again."""
    out_dir = case.folder / "run"
    finish(case.data, out_dir, max_iters=2, eval_interval=1)
    newest, said = checkpoint.locate(out_dir), io.StringIO()
    files = sorted(newest.iterdir())
    for _ in range(case.number):
        file = case.rng.choice(files)
        whole = file.read_bytes()
        file.write_bytes(change(whole))
        with contextlib.redirect_stdout(said):
            hold(checkpoint.load(out_dir).step == 1, "the damaged one was taken:", file)
        file.write_bytes(whole)
        case.done += 1
    lines = said.getvalue().splitlines()
    hold(
        len(lines) == case.number and all(" is damaged: " in line for line in lines),
        "not a line for each",
    )
    hold(checkpoint.load(out_dir).step == 2, "it is whole again, but not taken")


def flips(case):
    def flip(data):
        data = bytearray(data)
        data[case.rng.randrange(len(data))] ^= 1 << case.rng.randrange(8)
        return bytes(data)

    damage(case, flip)


def truncations(case):
    damage(case, lambda data: data[: case.rng.randrange(len(data))])


def refused(script, *flags):
    """Run a script that has to refuse what it is given, in one line; that line and the exit code."""
    command = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ONE_THREAD)
    hold(
        done.stderr.startswith("error: ") and "Traceback" not in done.stderr,
        flags,
        done.stdout,
        done.stderr,
    )
    return done.stderr, done.returncode


def pickles(case):
    good = case.folder / "good"
    finish(case.data, good, max_iters=2)

    def one(kind):
        out_dir, trace = case.folder / kind, case.folder / f"{kind} was executed"
        shutil.copytree(good, out_dir)
        file, script, flags = hostile.plant(kind, out_dir, trace)
        hostile.read_carelessly(file)
        hold(trace.exists(), kind, "would do nothing")
        trace.unlink()
        line, code = refused(script, *flags, "--device=cpu")
        hold(not trace.exists(), kind, "was executed")
        hold(
            code in (1, 2) and line.count("\n") == 1 and ("refused" in line or "damaged" in line),
            kind,
            line,
        )
        case.count(kind, line.strip()[-100:])

    case.two_at_a_time(one, hostile.PICKLES[: case.number])


def children(process):
    return list(
        map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    )


def elastic(case):
    settings = {"max_iters": 60, "eval_interval": 5}
    for parallel in ("ddp", "fsdp"):
        finish(case.data, case.folder / parallel, processes=2, parallel=parallel, **settings)

    def one(number):
        rng, out_dir, parallel = (
            random.Random(number),
            case.folder / str(number),
            ("ddp", "fsdp")[number % 2],
        )
        process = start(
            case.data,
            out_dir,
            processes=2,
            parallel=parallel,
            torchrun=["--max-restarts=3"],
            **settings,
        )
        at = rng.randrange(1, 50)
        while (
            not (out_dir / "log.jsonl").exists()
            or not curve(out_dir)
            or curve(out_dir)[-1]["step"] < at
        ):
            hold(process.poll() is None, "it ended by itself")
            time.sleep(0.02)
        os.kill(rng.choice(children(process)), signal.SIGKILL)
        out, _ = process.communicate(timeout=300)
        hold(process.returncode == 0, "exit code", process.returncode, out)
        hold(at < 6 or "resuming from" in out, "it did not resume", out)
        hold_equal(out_dir, case.folder / parallel)
        case.count(parallel, f"at step {at}")

    for number in range(case.number):  # four processes at once would wait for each other
        one(number)


def world_sizes(case):
    settings = {"eval_interval": 4, "lr_decay_iters": 12, "gradient_accumulation_steps": 4}
    finish(case.data, case.folder / "one", max_iters=12, **settings)
    one, worst = curve(case.folder / "one"), 0.0
    for parallel in ("ddp", "fsdp")[: case.number]:
        for processes, steps in ((1, 4), (2, 8), (1, 12)):
            finish(
                case.data,
                case.folder / parallel,
                processes=processes,
                parallel=parallel,
                max_iters=steps,
                init_from="auto",
                **settings,
            )
        for a, b in zip(one, curve(case.folder / parallel), strict=True):
            key = "loss" if "loss" in a else "val_loss"
            difference = abs(a[key] - b[key]) / a[key]
            hold(
                a["step"] == b["step"] and difference < 1e-6,
                parallel,
                "step",
                a["step"],
                key,
                a[key],
                b[key],
            )
            worst = max(worst, difference)
        case.count(parallel)
    case.remark = f"largest difference of a loss {worst:.1e}"


def nan(case):
    def one(number):
        rng, out_dir, parallel = (
            random.Random(number),
            case.folder / str(number),
            ("ddp", "fsdp")[number % 2],
        )
        rank, step = rng.randrange(2), rng.randrange(2, 6)
        script = case.folder / f"{number}.py"
        script.write_text(hostile.NAN_GRADIENT.format(root=str(ROOT), rank=rank, step=step))
        out = finish(
            case.data,
            out_dir,
            2,
            script,
            parallel=parallel,
            max_iters=7,
            eval_interval=1,
            keep_last=0,
        )
        hold(
            [n for n in range(1, 8) if f"step {n}: skipped" in out] == [step],
            "skipped others than",
            step,
            out,
        )
        before, bad, after = (
            load_file(out_dir / f"step-{n:08d}" / "model.safetensors")
            for n in (step - 1, step, step + 1)
        )
        hold(all(before[name].equal(bad[name]) for name in bad), "step", step, "changed weights")
        hold(not all(after[name].equal(bad[name]) for name in bad), "the next step changed none")
        hold(all(w.isfinite().all() for w in weights(out_dir).values()), "a weight is not finite")
        case.count(parallel, f"rank {rank} step {step}")

    for number in range(case.number):
        one(number)


def configs(case):
    def one(mutation):
        number, (text, words) = mutation
        path = case.folder / f"{number}.py"
        path.write_text(text)
        line, code = refused("train.py", str(path), f"--out_dir={case.folder / 'out'}")
        hold(code == 2 and all(word in line for word in words), words, "not in", line)
        hold(not (case.folder / "out").exists(), text, "left something")
        case.count(line.strip()[-100:])

    case.two_at_a_time(
        one, enumerate(hostile.mutated_configs(ROOT, case.rng, case.number, case.data))
    )


def saving(case):
    """The state of a model of 537M parameters, on the CPU, while something else computes."""
    torch.set_num_threads(1)
    model = GPT(GPTConfig(n_layer=24, n_head=20, n_embd=1280, bias=False))
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
    for p in model.parameters():  # what AdamW has after a step
        optimizer.state[p] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    tensors = [
        *model.parameters(),
        *(t for entry in optimizer.state.values() for t in entry.values()),
    ]
    gigabytes = sum(t.numel() * t.element_size() for t in tensors) / 1e9
    a, steps = torch.randn(384, 384), []

    def step():
        begin = time.perf_counter()
        for _ in range(20):
            a @ a
        return time.perf_counter() - begin

    times = []
    del [t.clone() for t in tensors][:]  # the first touch of so much memory takes long
    for repeat in range(3):
        begin = time.perf_counter()
        copy = [t.clone() for t in tensors]
        plain = time.perf_counter() - begin
        del copy
        usual = statistics.median(step() for _ in range(200))
        with Saver(case.folder, 1, background=True) as saver:
            begin = time.perf_counter()
            saver.save(
                repeat + 1,
                model,
                {"optimizer": optimizer},
                run={},
                val_loss=None,
                best_val_loss=None,
                seconds=0.0,
                device="cpu",
                dtype="float32",
            )
            stall, steps = time.perf_counter() - begin, []
            while saver.pending:
                steps.append(step())
                with contextlib.redirect_stdout(io.StringIO()):
                    saver.poll()
            times.append(
                (
                    stall,
                    plain,
                    time.perf_counter() - begin - stall,
                    statistics.median(steps) / usual,
                )
            )
        print(
            f"saving: stall {stall:.2f} s, copy {plain:.2f} s, written in {times[-1][2]:.1f} s",
            file=sys.stderr,
            flush=True,
        )
    stall, plain, written, slower = (
        statistics.median(column) for column in zip(*times, strict=True)
    )
    hold(stall < 1.25 * plain, "training stood still for", stall, "s, a copy takes", plain)
    case.remark = (
        f"{gigabytes:.1f} GB: training stands still for {stall:.2f} s, a plain copy in memory takes {plain:.2f} s "
        f"({gigabytes / plain:.1f} GB/s); written, synced, hashed and verified behind it in {written:.1f} s "
        f"({gigabytes / written:.2f} GB/s); other work takes {slower:.2f} times as long meanwhile (medians of 3)"
    )
    case.done = 1


CASES = {  # in the order of the table: what, how many, what must hold, how
    "kills": (
        "kill -9 at random moments",
        100,
        "no committed step lost, no state that cannot be loaded, losses and weights "
        "equal an undisturbed run's to the bit",
        kills,
    ),
    "window": ("kill -9 inside the save window", 100, "the same", window),
    "sigterm": ("SIGTERM", 50, "a checkpoint of that step or the next, exit code 143", sigterm),
    "disk": (
        "no space left, at different offsets",
        50,
        "previous checkpoint intact, one clear line, exit code 1",
        disk,
    ),
    "flips": (
        "bit flips in checkpoint files",
        1000,
        "all detected, the one before is loaded",
        flips,
    ),
    "truncations": ("truncations of checkpoint files", 1000, "the same", truncations),
    "pickles": (
        "malicious pickles in place of a checkpoint",
        10,
        "refused, nothing executed",
        pickles,
    ),
    "elastic": (
        "one of two gloo ranks killed, elastic restart (DDP and FSDP)",
        10,
        "losses and weights equal an undisturbed run's to the bit",
        elastic,
    ),
    "world_sizes": (
        "world size 1 -> 2 -> 1, DDP and FSDP",
        2,
        "same batches; every loss to 1e-6, relative, of one process's",
        world_sizes,
    ),
    "nan": (
        "NaN gradient on one rank only (DDP and FSDP)",
        10,
        "all ranks skip that step, nothing else",
        nan,
    ),
    "configs": (
        "mutated configs (typos, wrong types, contradictions)",
        100,
        "all refused, the nearest key named",
        configs,
    ),
    "saving": (
        "saving 537M parameters in the background",
        1,
        "training stands still no longer than its copy takes",
        saving,
    ),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CASES), help="some cases, by name: %(default)s")
    parser.add_argument("--share", type=float, default=1.0, help="of the number of each")
    parser.add_argument("--dataset", default="plays_char", help="whose first pages are used")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(CASES):
        parser.error(f"unknown case {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    failed, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = pages(Path(folder) / "data", args.dataset)
        for name in args.only.split(","):
            case, begin = Case(name, args.share, Path(folder), data), time.monotonic()
            try:
                case.run(case)
                hold(case.done == case.number, "only", case.done, "of", case.number)
                result = f"{case.done} of {case.number} held"
            except Exception as error:  # the other cases go on
                failed.append(
                    f"{name}: {error if isinstance(error, Broken) else traceback.format_exc()}"
                )
                result = f"BROKEN after {case.done} of {case.number}"
            seconds = f"{time.monotonic() - begin:.0f} s"
            rows.append(
                [
                    case.what,
                    case.number,
                    case.must,
                    "; ".join(filter(None, (result, case.remark))),
                    seconds,
                ]
            )
            shutil.rmtree(case.folder, ignore_errors=True)
    print(
        f"# Reliability\n\n`python -m tools.chaos {' '.join(sys.argv[1:])}`".rstrip()
        + f", {datetime.date.today()}, "
        f"{os.cpu_count()} cores of {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}.\n\n"
        "| case | how many | must hold | found | took |\n|---|---|---|---|---|"
    )
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    for words in failed:
        print(f"\nbroken: {words}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
