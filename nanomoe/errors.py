"""
A script's process: how it ends, with errors as one line and an exit code, also of many ranks; and
how many cores it has. Without torch, so that preparing data starts at once.
"""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from configurator import InputError


def run_main(main: Callable[[], object]) -> None:
    """Call main() and turn the errors that a user can cause into one line and an exit code.

    InputError ends the process with code 2; OSError, MemoryError and FloatingPointError with
    code 1; Ctrl-C with code 130. None prints a traceback, not even under torchrun."""
    if sys.stdout is None:  # closed, as by >&-
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open as long as the process)
    # print a question mark for a character that the terminal cannot show
    sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        end_process(130)
    except BrokenPipeError:  # whoever reads our output, like `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError, MemoryError, FloatingPointError) as error:
        report_and_exit(error)


def report_and_exit(error: BaseException) -> NoReturn:
    """Print an error to stderr and end this process. Of several ranks, one reports."""
    if os.environ.get("RANK", "0") != "0":
        # Most errors hit every rank: rank 0 reports, and torchrun kills the others during this
        # sleep. A rank that is still alive after it failed alone, so it reports itself. If all
        # know of the error, rank 0 may first be saving the last step.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        known = getattr(error, "on_all_ranks", False) and "TORCHELASTIC_RUN_ID" in os.environ
        time.sleep(900 if known else 10)
    message = str(error) or type(error).__name__
    lines = [f"error: {line}" for line in message.splitlines()]
    print("\n".join(lines), file=sys.stderr, flush=True)
    end_process(2 if isinstance(error, InputError) else 1)


def note(line: str) -> None:
    """Print a line to stderr. Of several ranks, the first one does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def could_wait_at_exit() -> bool:
    """Whether an orderly exit could wait for ever: with an open process group for the other ranks,
    with wandb for its server."""
    return "RANK" in os.environ or "wandb" in sys.modules


def end_process(code: int) -> NoReturn:
    """sys.exit(code), but at once if an orderly exit could wait."""
    if could_wait_at_exit():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def num_cores(cpu_max: str = "/sys/fs/cgroup/cpu.max") -> int:
    """The CPU cores that this process may use, also in a container that may use a part of them."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no limit ("max 100000"), or not Linux
        quota, period = map(int, Path(cpu_max).read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return cores
