"""
What a run leaves in its out_dir: checkpoints, saved in the background if wanted, and log.jsonl.
"""

import contextlib
import json
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from configurator import InputError
from moe_model import config_to_dict
from nanomoe import checkpoint
from nanomoe.distributed import full_tensor, print0, rank


def prepare_run_dir(out_dir, resumed):
    """Make out_dir, see now that it can be written, and remove what a killed run left half written. What is not this run's
    past, another run or steps behind the one that it resumes from, is moved to out_dir/earlier-N, so that nothing is lost
    or mixed. Raises OSError."""
    folder = Path(out_dir)
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.fsync(folder.absolute().parent)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"out_dir '{out_dir}' cannot be written: {error.strerror}") from None
    for leftover in folder.glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    log, same_run = (
        folder / "log.jsonl",
        resumed and resumed.path.parent.resolve() == folder.resolve(),
    )
    old = [
        p
        for p in checkpoint.list_steps(folder)
        if not same_run or checkpoint.step_of(p) > resumed.step
    ]
    if old or (not same_run and log.exists()):
        number = next(n for n in range(1, 10**6) if not (folder / f"earlier-{n}").exists())
        earlier = folder / f"earlier-{number}"
        earlier.mkdir()
        for p in old:
            shutil.move(p, earlier)
        if log.exists():
            (shutil.copy if same_run else shutil.move)(log, earlier)
        print(f"moved an earlier run in {out_dir} to {earlier}", flush=True)


def check_disk_space(out_dir, model):
    """Raises OSError unless a checkpoint of the model fits: its weights and AdamW's two moments, in float32."""
    free, needed = shutil.disk_usage(out_dir).free, 12 * sum(p.numel() for p in model.parameters())
    if free < needed:
        raise OSError(
            f"out_dir '{out_dir}' has {free / 1e6:,.1f} MB left, but a checkpoint takes {needed / 1e6:,.1f} MB"
        )


class Saver:
    """Saves a run's checkpoints in out_dir, and keeps the newest keep_last of them and the best. In the background, if told
    so: then training stands still only while its state is copied to the host's memory. A context: its end waits."""

    def __init__(self, out_dir, keep_last, background):
        self.out_dir, self.keep_last, self.background = Path(out_dir), keep_last, background
        self.thread, self.pending = ThreadPoolExecutor(1), None

    def save(self, step, model, state, **facts):
        """state: the optimizer and what else has a state_dict, by name. facts: plain JSON, of the fields of Checkpoint. All
        processes call it, rank 0 writes. Raises OSError, if need be of the save before."""
        self.poll(wait=True)
        start = time.perf_counter()

        def to_host(value):
            if not torch.is_tensor(value):
                return value
            value = full_tensor(
                value.detach()
            )  # one after the other: there is never a second copy of it all on the device
            # from CUDA into pinned memory, without waiting
            return (
                value.to("cpu", non_blocking=value.is_cuda, copy=self.background)
                if rank == 0
                else None
            )

        weights = model.state_dict()
        if model.config.tie_weights:  # safetensors stores a tensor once
            del weights["lm_head.weight"]
        weights, training = tree_map(
            to_host, (dict(weights), {name: part.state_dict() for name, part in state.items()})
        )
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.copy_seconds = time.perf_counter() - start
        if rank == 0:
            facts = {"step": step, "model": config_to_dict(model.config), **facts}
            self.pending = self.thread.submit(self.write, step, weights, training, facts)
            self.poll(wait=not self.background)

    def write(self, step, weights, training, facts):
        start = time.perf_counter()
        path = checkpoint.write(self.out_dir, step, weights, training, facts)
        checkpoint.prune(self.out_dir, self.keep_last)
        return f"saved {path} (copied in {self.copy_seconds:.2f} s, written in {time.perf_counter() - start:.2f} s)"

    def poll(self, wait=False):
        """If a save has come to its end, say so, or raise its OSError: to be called after every step."""
        if self.pending and (wait or self.pending.done()):
            pending, self.pending = self.pending, None
            print0(pending.result())

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.thread.shutdown()
        if kind is None:
            self.poll()
        elif self.pending and (
            error := self.pending.exception()
        ):  # beside the error that is on its way already
            print(f"error: {error}", file=sys.stderr, flush=True)


def last_torchrun_ids(out_dir):
    """Which torchruns started the processes that wrote out_dir last, see distributed.torchrun_ids()."""
    with contextlib.suppress(OSError, ValueError):
        starts = [
            line
            for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()
            if line.startswith('{"start"')
        ]
        return json.loads(starts[-1]).get("launchers", []) if starts else []
    return []


class RunLog:
    """log.jsonl in out_dir, one JSON object a line, and wandb, if wanted. Lines of steps behind `step`, which a killed run left
    and which are coming again, are dropped. Raises OSError when it cannot be written."""

    def __init__(self, out_dir, step):
        self.path, self.wandb = Path(out_dir) / "log.jsonl", None
        with self.explained():
            if self.path.exists():
                kept = []
                for line in self.path.read_bytes().splitlines():
                    with contextlib.suppress(ValueError):  # a killed run leaves half a line
                        kept += [line, b"\n"] if json.loads(line).get("step", 0) <= step else []
                new = self.path.with_suffix(".tmp")
                new.write_bytes(b"".join(kept))
                new.rename(self.path)  # at once: a kill here must not cost the log
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)

    @contextlib.contextmanager
    def explained(self):
        try:
            yield
        except OSError as error:
            raise OSError(f"could not write {self.path}: {error.strerror}") from None

    def start_wandb(self, project, name, settings):
        import wandb  # late: only for those who use it

        if os.environ.get("WANDB_MODE") not in ("offline", "disabled") and not wandb.login(
            prompt=False
        ):
            raise InputError(
                "wandb_log is on, but there is no login: run `wandb login`, or set WANDB_MODE=offline"
            )
        self.wandb = wandb.init(project=project, name=name, config=settings, dir=self.path.parent)

    def write(self, **entry):
        with self.explained():
            self.file.write(json.dumps(entry).encode() + b"\n")
        if self.wandb and "step" in entry:
            self.wandb.log(entry, step=entry["step"])
