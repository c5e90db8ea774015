"""
A run's out_dir: making it ready, the lock that keeps other runs out, and saving checkpoints, if
wanted in the background.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

from configurator import InputError
from model import GPT
from moe_model import config_to_dict
from nanomoe import checkpoint
from nanomoe.distributed import (
    broadcast_from_rank0,
    full_tensor,
    is_alive,
    print0,
    rank,
    wait_for_rank0,
)
from nanomoe.log import TENSORBOARD, WANDB_ID, RunLog, last_start, share_done
from nanomoe.optim import num_moments

if TYPE_CHECKING:
    from nanomoe.load import Checkpoint

TRIAL = ".trial-"  # beginning of the name of a folder for a trial
held_locks = {}  # out_dir: its lock, which is held until this process ends


def claim(out_dir: str, torchruns: list[str], settings: dict) -> bool:
    """Keep other runs out of out_dir if it holds checkpoints: before one is chosen, so that nobody
    removes it. Returns whether one of the torchruns, which started these processes, has started
    this run before (see distributed.torchrun_ids()).

    Raises InputError if another run holds it, or another torchrun is about to restart its run in
    it: until it does, nobody holds the lock."""
    last = set(last_start(out_dir).get("launchers", []))
    for other in sorted(last - set(torchruns)):
        under_way = is_alive(other) and share_done(out_dir, settings) < 1
        if under_way and not is_locked(out_dir):
            host, pid, _ = other.rsplit(" ", 2)
            raise in_use(out_dir, f"torchrun, process {pid} on {host}")
    if checkpoint.list_steps(out_dir):
        lock_run_dir(out_dir)
    return bool(last & set(torchruns))


def in_use(out_dir, holder):
    return InputError(
        f"out_dir '{out_dir}' is in use by {holder}; wait for its end, stop it, or choose another "
        "out_dir"
    )


def lock_run_dir(out_dir: str | Path) -> None:
    """Keep other runs out of out_dir until this process ends; nothing if there is no such folder.

    The system frees the lock of a process that has ended, however it did. Readers need no lock.
    Raises InputError that says who holds it, OSError if the folder cannot be written."""
    folder = Path(out_dir).resolve()
    if folder in held_locks or not folder.is_dir():
        return
    # timeout: is_locked() may hold it for a moment. mode: other users of the folder open it, too.
    # thread_local: all threads of this process hold it
    lock = FileLock(folder / "run.lock", timeout=0.5, mode=0o666, thread_local=False)
    holder = folder / "run.lock.json"  # beside it: some versions of filelock empty the lock itself
    try:
        lock.acquire()
    except Timeout:
        raise in_use(out_dir, describe_holder(holder)) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and not os.access(folder, os.W_OK):
            raise cannot_be_written(out_dir, error) from None
        if isinstance(error, PermissionError):
            raise OSError(f"{lock.lock_file} cannot be opened: {error.strerror}") from None
        print(f"note: {folder} has no locks ({error}): nothing keeps a second run out", flush=True)
    held_locks[folder] = lock
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    this = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    with contextlib.suppress(OSError):  # then a second run is refused without the holder's name
        holder.unlink(missing_ok=True)  # it may be another user's
        holder.write_text(json.dumps(this))


def try_lock(path: str | Path) -> FileLock | None:
    """A FileLock of a file, held until its release() or until nobody refers to it; None if another
    process holds it. Where files have no locks, there is nothing to hold."""
    lock = FileLock(path, timeout=0, mode=0o666)
    with contextlib.suppress(OSError, NotImplementedError):
        try:
            lock.acquire()
        except Timeout:  # an OSError, too
            return None
    return lock


def is_locked(out_dir: str | Path) -> bool:
    """Whether a run holds out_dir now."""
    lock = try_lock(Path(out_dir) / "run.lock")
    if lock:
        lock.release()
    return lock is None


def describe_holder(path):
    """Who holds a lock, from its file."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError):  # it is being written
        return "another process"


def open_log(settings: dict, resumed: "Checkpoint | None") -> RunLog:
    """Prepare out_dir, and open the run's log. That of other ranks, and of an evaluation alone,
    writes nothing. All ranks call it. Raises as prepare_run_dir and RunLog do."""
    logs = [RunLog(None)]

    def prepare():
        prepare_run_dir(settings["out_dir"], resumed, auto=settings["init_from"] == "auto")
        logs.append(RunLog(settings["out_dir"], resumed.step if resumed else 0, settings))

    if not settings["eval_only"]:
        broadcast_from_rank0(prepare)
    return logs[-1]


def prepare_run_dir(out_dir: str, resumed: "Checkpoint | None", auto: bool = False) -> None:
    """Make out_dir ready for a run, and lock it. Raises as lock_run_dir does.

    resumed: the Checkpoint that the run resumes from, or None for a new run. auto: whether the run
    would have resumed if there had been a checkpoint.
    Half-written checkpoints of a killed run are removed. Another run's files, and checkpoints
    after the step we resume from, are moved to out_dir/earlier-N, so nothing is lost or mixed."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise cannot_be_written(out_dir, error) from None
    lock_run_dir(out_dir)  # first of all: from now on, whatever another start left is a leftover
    if auto and not resumed and checkpoint.list_steps(folder):
        raise InputError(
            f"another run has saved checkpoints in out_dir '{out_dir}' while this one was "
            "starting; start it again to resume from them"
        )
    for leftover in (*folder.glob("step-*.tmp-*"), *folder.glob(f"{TRIAL}*")):
        shutil.rmtree(leftover, ignore_errors=True)
    try_writing(folder)
    move_earlier_run(folder, resumed)


def try_writing(folder):
    """Save a tiny checkpoint in the folder now, before any work. Raises OSError."""
    trial = folder / f"{TRIAL}{os.getpid()}"
    try:
        trial.mkdir(exist_ok=True)
        checkpoint.flush_folder(folder.absolute().parent)
        # what a folder in a bucket cannot do fails here, and not after the first thousand steps
        path = checkpoint.write(trial, 0, {"weight": torch.zeros(1)}, {}, {})
        checkpoint.verify(path)
        load_file(path / "model.safetensors")
    except (OSError, SafetensorError, ValueError) as error:  # a name that is no UTF-8 is the last
        raise cannot_be_written(folder, error) from None
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def cannot_be_written(out_dir, error):
    reason = getattr(error, "strerror", None) or error
    return OSError(f"out_dir '{out_dir}' cannot be written: {reason}")


def move_earlier_run(folder, resumed):
    """Move what does not belong to this run's past to folder/earlier-N, and say so."""
    same_run = resumed is not None and resumed.path.parent.resolve() == folder.resolve()
    log = folder / "log.jsonl"
    moved = checkpoint.list_steps(folder)
    if same_run:
        moved = [path for path in moved if checkpoint.step_of(path) > resumed.step]
    else:
        moved += [p for p in (log, folder / WANDB_ID, folder / TENSORBOARD) if p.exists()]
    if not moved:
        return
    number = 1
    while (earlier := folder / f"earlier-{number}").exists():
        number += 1
    earlier.mkdir()
    for path in moved:
        shutil.move(path, earlier)
    if log.exists():  # the run goes on with it
        shutil.copy(log, earlier)
    print(f"moved an earlier run in {folder} to {earlier}", flush=True)


def check_disk_space(out_dir: str, model: GPT, optimizer: str) -> None:
    """Raises OSError unless a checkpoint fits: weights and the optimizer's moments, in float32."""
    free = shutil.disk_usage(out_dir).free
    needed = 4 * (sum(p.numel() for p in model.parameters()) + num_moments(model, optimizer))
    if free < needed:
        raise OSError(
            f"out_dir '{out_dir}' has {free / 1e6:,.1f} MB left, but a checkpoint takes "
            f"{needed / 1e6:,.1f} MB: free some space or choose another out_dir"
        )


class Saver:
    """Saves a run's checkpoints in out_dir, and prunes them as checkpoint.prune() says.

    background: write in a thread. Training then waits only while the state is copied to the
    host's memory.
    state: {name: object with a state_dict}, the optimizer and so on.
    facts: returns what else config.json says of the state now, as plain JSON; "step" among it.

    Use it as a context. Leaving it waits for the last save. If an error ends the run, the last
    whole state is saved first, whatever failed after it: an evaluation, a log line, another
    process. All ranks call all methods; rank 0 writes. They raise OSError; of a save in the
    background the next call raises it."""

    def __init__(
        self,
        out_dir: str | Path,
        keep_last: int,
        background: bool,
        model: GPT,
        state: dict,
        facts: Callable[[], checkpoint.Facts],
    ):
        self.out_dir, self.keep_last, self.background = Path(out_dir), keep_last, background
        self.model, self.state, self.facts = model, state, facts
        self.thread = ThreadPoolExecutor(1)
        self.pending = []  # Futures of what the thread has to do, the oldest first
        self.path = None  # of the last checkpoint that the thread has written
        self.step = 0  # of the last whole state
        self.unsaved = None  # the facts of a whole state that is not saved
        self.copied = None  # its weights and training state in the host's memory

    @property
    def is_saved(self) -> bool:
        return self.unsaved is None

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """The context in which the weights, the optimizer and what facts() says change.

        Inside it they may not fit each other: after an error there, nothing is saved. On leaving
        it, the new state is the one to save. First it tells of a save that has ended."""
        self.report()
        self.unsaved = self.copied = None
        yield
        unsaved = {"val_loss": None} | self.facts()  # it is not evaluated yet
        if unsaved["step"] <= self.step:
            raise RuntimeError(f"the state has changed, but its step is still {self.step}")
        self.unsaved, self.step = unsaved, unsaved["step"]

    def save(self, val_loss: float | None = None) -> None:
        """Save the state, unless it is saved. val_loss: if it has been evaluated."""
        if self.is_saved:
            return
        self.copy()
        facts = self.unsaved | {"val_loss": val_loss}
        best = facts["best_val_loss"]
        if val_loss is not None and math.isfinite(val_loss) and (best is None or val_loss < best):
            facts["best_val_loss"] = val_loss
        self.submit(self.write, facts, *self.copied)
        self.unsaved = self.copied = None
        if not self.background:
            self.wait()

    def add_evaluation(self, val_loss: float, best_val_loss: float | None) -> None:
        """Add an evaluation's losses to the checkpoint of this state, which save() has written."""
        if not self.is_saved:
            raise RuntimeError("this state is not saved yet")
        self.submit(self.write_evaluation, val_loss, best_val_loss)
        if not self.background:
            self.wait()

    def copy(self, alone: bool = False) -> None:
        """Copy a state that is not saved to the host's memory, for a save or an error's rescue.

        alone: the other ranks do not call it."""
        if self.is_saved or self.copied:
            return
        if not alone:
            self.wait()  # so there is never a second copy
        start = time.perf_counter()
        weights = dict(self.model.state_dict())
        if self.model.config.tie_weights:  # one tensor under two names, saved once
            del weights["lm_head.weight"]
        training = {name: part.state_dict() for name, part in self.state.items()}
        self.copied = tree_map(self.to_host, (weights, training))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies were only started
        self.copy_seconds = time.perf_counter() - start

    def to_host(self, value):
        """A tensor in the host's memory on rank 0, None on other ranks; other values unchanged.

        Called for one tensor after the other, so the device never holds a second copy of all."""
        if not torch.is_tensor(value):
            return value
        value = full_tensor(value.detach())
        if rank != 0:
            return None
        # from CUDA into pinned memory, without waiting
        return value.to("cpu", non_blocking=value.is_cuda, copy=self.background)

    def submit(self, function, *args):
        if rank == 0:
            self.pending.append(self.thread.submit(function, *args))

    def write(self, facts, weights, training):
        """Write one checkpoint and prune the others; runs in the thread. Returns a line."""
        start, self.path = time.perf_counter(), None
        facts = facts | {"model": config_to_dict(self.model.config)}
        self.path = checkpoint.write(self.out_dir, facts["step"], weights, training, facts)
        checkpoint.prune(self.out_dir, self.keep_last)
        seconds = time.perf_counter() - start
        return (
            f"saved {self.path} (copied in {self.copy_seconds:.2f} s, written in {seconds:.2f} s)"
        )

    def write_evaluation(self, val_loss, best_val_loss):
        if self.path:  # else the save before it has failed
            checkpoint.add_evaluation(self.path, val_loss, best_val_loss)
            checkpoint.prune(self.out_dir, self.keep_last)  # now it is known which is the best

    def wait(self) -> None:
        """Wait until the thread has done all that it has to do."""
        wait_for_rank0(self.pending[-1] if self.pending else None)
        self.report()

    def report(self, wait: bool = False) -> None:
        """If a save has ended, say so or raise its OSError."""
        while self.pending and (wait or self.pending[0].done()):
            line = self.pending.pop(0).result()
            if line:
                print0(line)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        try:
            if kind is None:
                self.wait()
            elif not issubclass(kind, (KeyboardInterrupt, FloatingPointError)):
                self.rescue(all_ranks=getattr(error, "on_all_ranks", False))
        finally:
            self.thread.shutdown()

    def rescue(self, all_ranks):
        """After an error, end the save that is under way, and save the last whole state if it is
        not saved. all_ranks: all have met the error; else this rank must be able to do it alone."""
        with notes_for_errors():
            self.report(wait=True)
        sharded = any(hasattr(p, "full_tensor") for p in self.model.parameters())
        alone = rank == 0 and (self.copied or not sharded)
        if self.is_saved or not (all_ranks or alone):
            return
        with notes_for_errors():
            self.copy(alone=True)  # there is nothing left to wait for
            self.submit(self.write, self.unsaved, *self.copied)
            self.report(wait=True)


@contextlib.contextmanager
def notes_for_errors():
    """Only print errors, because another one is on its way already."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(OSError):
            print(f"note: the last step is not saved: {error}", file=sys.stderr, flush=True)
