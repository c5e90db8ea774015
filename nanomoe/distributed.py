"""
Many processes: which one this is, what they tell each other, how a model is spread over them, and
the signals that stop them.

torchrun starts the processes, or anything else that sets torch.distributed's environment (RANK,
LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). All of this works in a single process, too.
"""

import contextlib
import errno
import gc
import math
import os
import re
import signal
import socket
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from configurator import InputError
from nanomoe.errors import could_wait_at_exit, end_process

rank = int(os.environ.get("RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))

Stats = TypeVar("Stats", torch.Tensor, dict[str, torch.Tensor])

# How long a process waits for the others before it gives up. Long, because one of them may be
# reading or writing on a slow disk; torchrun notices at once when one has died.
TIMEOUT = timedelta(hours=2)

stopping = False  # StopSignals sets it when a signal has come


def print0(*words: object) -> None:
    """Rank 0 prints a line. It stops printing when the terminal is gone, or when `tee` or the like
    has ended by the same Ctrl-C that now makes us save."""
    if rank == 0:
        try:
            print(*words, flush=True)
        except OSError as error:
            gone = error.errno == errno.EIO or (error.errno == errno.EPIPE and stopping)
            if not gone:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


# -----------------------------------------------------------------------------
# start and end


def shutdown(code: int) -> None:
    """End this process, together with the others. An orderly shutdown of DDP and gloo was seen to
    deadlock on torch 2.13: its destructor waits for threads that wait for Python."""
    if world_size > 1:
        dist.all_reduce(torch.zeros(1))
    if code or could_wait_at_exit():
        end_process(code)


def torchrun_ids() -> list[str]:
    """The torchruns that started these processes, one per machine: host, process id and start
    time; empty without torchrun. Processes that torchrun restarts after a crash find the same."""
    own = process_id(os.getppid()) if "TORCHELASTIC_RUN_ID" in os.environ else None
    ids = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(ids, own)
    return sorted({name for name in ids if name})


def process_id(pid):
    """Host, process id and start time, which no other process has; the time only on Linux."""
    start_time = ""
    with contextlib.suppress(OSError):
        start_time = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()} {pid} {start_time}"


def is_alive(torchrun_id: str) -> bool:
    """Whether a process of this machine has this id. False where start times are not known."""
    _, pid, start_time = torchrun_id.rsplit(" ", 2)
    return bool(start_time) and process_id(pid) == torchrun_id


@contextlib.contextmanager
def one_line_comm_errors() -> Iterator[None]:
    """Turn an error of gloo or NCCL, as after another process's death, into a one-line OSError."""
    try:
        yield
    except RuntimeError as error:
        if world_size == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        first_line = str(error).splitlines()[0]
        raise OSError(f"lost contact with another process: {first_line}") from None


# -----------------------------------------------------------------------------
# what processes tell each other


def broadcast_from_rank0(make: Callable[[], Any]) -> Any:
    """Rank 0's make(), for all ranks. An InputError or OSError that it raises, all ranks raise."""
    result, error = None, None
    if rank == 0:
        try:
            result = make() if world_size == 1 else in_a_thread(make)
        except (InputError, OSError) as raised:
            error = raised
    elif world_size > 1:
        wait_for_rank0()
    if world_size > 1:
        pair = [result, error]
        dist.broadcast_object_list(pair)
        result, error = pair
    if error:
        error.on_all_ranks = world_size > 1
        raise error
    return result


def in_a_thread(make):
    """Rank 0's make() in a thread, while the other ranks wait in wait_for_rank0()."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(make)
        wait_for_rank0(future)
        return future.result()


def wait_for_rank0(future: Future | None = None) -> None:
    """Wait until rank 0's future is done, however long that takes. All ranks call it. Now and then
    they tell each other that they are there, so that no time-out ends the waiting."""
    waiting, pause = torch.ones(1), 0.001
    while waiting:
        if rank == 0:
            wait([future] if future else [], timeout=pause)
            waiting.fill_(future is not None and not future.done())
            pause = min(1.0, 2 * pause)
        if world_size > 1:
            dist.broadcast(waiting, src=0)


def exchange(signal_number: int, seconds: float, error: OSError | None) -> tuple[int, float]:
    """What all ranks have to agree on after a step: the signal that any of them got (0 = none), and
    the largest of their training seconds. If a rank has an error, all of them raise one."""
    mine = [signal_number, seconds, error is not None]
    values = torch.tensor(mine, dtype=torch.float64)
    if world_size > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    signal_number, seconds, failed = values.tolist()
    if failed:
        error = error or OSError("another process has failed")
        error.on_all_ranks = world_size > 1
        raise error
    return int(signal_number), seconds


def first_of_ranks(value: Any) -> Any:
    """The value of the first rank on which it is not None; None if it is None on all of them."""
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    for value in values:
        if value is not None:
            return value
    return None


def all_reduce_sum(stats: Stats) -> Stats:
    """A tensor, or a dict of tensors, summed over all ranks, in one message that the host does not
    wait for."""
    if world_size == 1:
        return stats
    if torch.is_tensor(stats):
        dist.all_reduce(stats)
        return stats
    flat = torch.cat([value.flatten().float() for value in stats.values()])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in stats.values()])
    return {
        name: part.view_as(value) for (name, value), part in zip(stats.items(), parts, strict=True)
    }


def gradient_sync(train_model: torch.nn.Module, last: bool) -> AbstractContextManager:
    """The context of a micro-batch's forward and backward: DDP reduces gradients in the last one
    alone."""
    if last or not hasattr(train_model, "no_sync"):
        return contextlib.nullcontext()
    return train_model.no_sync()


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from its shards. All ranks have to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# -----------------------------------------------------------------------------
# signals and pauses


class StopSignals:
    """While this context is open, SIGINT, SIGTERM, SIGUSR1 and SIGHUP, which a process gets when
    its terminal closes, only set `number`, for the training loop to look at. A second Ctrl-C ends
    the process at once. A signal that is ignored, as SIGHUP is under nohup, stays ignored."""

    def __init__(self):
        self.number = 0
        self.ctrl_c = math.inf  # the time of the first

    def __enter__(self):
        self.handlers = {}
        for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has but two of them
            if number and signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.note)
        return self

    def note(self, number, _frame):
        global stopping
        stopping, now, is_ctrl_c = True, time.monotonic(), number == signal.SIGINT
        # torchrun forwards a Ctrl-C that the process got, too: within a second that is no new one
        tolerance = 1 if "TORCHELASTIC_RUN_ID" in os.environ else 0
        if is_ctrl_c and now - self.ctrl_c > tolerance:
            os._exit(128 + number)
        first_ctrl_c, is_first = is_ctrl_c and self.ctrl_c == math.inf, not self.number
        self.number = self.number or number  # before the line: the next signal may follow it
        if first_ctrl_c:
            self.ctrl_c = now
        if rank == 0 and (first_ctrl_c or is_first):
            line = f"{signal.Signals(number).name}: saving after this step"
            if is_ctrl_c:
                line += "; a second Ctrl-C ends at once and saves nothing"
            with contextlib.suppress(OSError):
                os.write(1, f"\n{line}\n".encode())  # print() is not safe in a handler
        if number == getattr(signal, "SIGHUP", None):
            drop_terminal()

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def drop_terminal():
    """Print to nowhere instead of to a terminal that is gone, where it would fail."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty() denies it once it is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Python's garbage collector would halt each rank, and with it all others, at its own time.
    The training loop calls gc.collect() instead, on all ranks at the same step."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
