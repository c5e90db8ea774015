"""
A run's log.jsonl: one line for each logged step and each evaluation, and for a start and an end.
"""

import contextlib
import functools
import json
import math
import os
from pathlib import Path

from torch.utils._pytree import tree_map

EXACT = ("step", "loss", "val_loss", "val_bits_per_byte")


def lines_from_end(path, block=2**20):
    """(offset, line) of a file's lines, the last one first. A long log is not read as a whole.

    The first pair is what follows the last newline: b"", or half a line. Raises OSError.
    """
    with open(path, "rb") as file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            lines = (file.read(end - start) + rest).split(b"\n")
            position = start + sum(map(len, lines)) + len(lines) - 1
            for line in reversed(lines[1:]):
                position -= len(line)
                yield position, line
                position -= 1  # the newline before it
            rest, end = lines[0], start
        yield 0, rest


def last_start(out_dir):
    """The last start line of a run's log as a dict; {} if there is none."""
    with contextlib.suppress(OSError, ValueError):
        for _, line in lines_from_end(Path(out_dir) / "log.jsonl"):
            if line.startswith(b'{"start"'):
                return json.loads(line)
    return {}


def share_done(out_dir, settings):
    """1 for a finished run, else the share of its steps or seconds, from the end of its log."""
    restarted = False
    with contextlib.suppress(OSError):
        for _, line in lines_from_end(Path(out_dir) / "log.jsonl", 2**16):
            with contextlib.suppress(ValueError, TypeError):  # half a line
                entry = json.loads(line)
                if "end" in entry and not restarted:
                    return 1.0
                restarted |= "start" in entry  # an end before it is that of a shorter run
                if "step" in entry and settings["max_seconds"]:
                    return min(0.99, entry["seconds"] / settings["max_seconds"])
                if "step" in entry:
                    return min(0.99, entry["step"] / settings["max_iters"])
    return 0.0


def finite_or_none(value):
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shorten(entry, details):
    """A step's entry as log.jsonl has it: losses as they are, other numbers to six digits, lists
    over layers to four, or without them."""
    short = {}
    for name, value in entry.items():
        if name in EXACT:
            short[name] = value
        elif not isinstance(value, list):
            short[name] = rounded(value, 6)
        elif details:
            short[name] = tree_map(functools.partial(rounded, digits=4), value)
    return short


def rounded(value, digits):
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


class RunLog:
    """Appends to out_dir/log.jsonl, one JSON object a line, and to a Trackers, if there is one.

    step: the step that the run resumes after. Lines of later steps, which a killed run has left,
    are dropped, because those steps are done again. Raises OSError if the log cannot be written.

    As a context manager it closes the trackers, however the run ends.
    """

    def __init__(self, out_dir, step):
        self.path = Path(out_dir) / "log.jsonl"
        self.trackers = None
        self.last = {}  # the last step's line, if it is of before this start
        with self.explain_errors():
            if self.path.exists():
                self.drop_lines_after(step)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)

    def drop_lines_after(self, step):
        starts, cut = [], 0  # starts and ends of runs without a step that we keep
        for offset, line in lines_from_end(self.path):
            entry = {}
            with contextlib.suppress(ValueError):  # a killed run leaves half a line
                entry = json.loads(line)
            if entry.get("step", math.inf) <= step:
                self.last, cut = entry, offset + len(line) + 1
                break
            if entry and "step" not in entry:
                starts.insert(0, line + b"\n")
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(cut)
            file.write(b"".join(starts))  # they come from after `cut`, so a kill loses none
            file.truncate()

    @contextlib.contextmanager
    def explain_errors(self):
        try:
            yield
        except OSError as error:
            raise OSError(f"could not write {self.path}: {error.strerror}") from None

    def write(self, details=True, **entry):
        """Append a line; the trackers get it too. Raises OSError.

        details: False leaves out the lists over layers of a training step. An evaluation that is
        in the log already, because a resumed run repeats it, is not written twice.
        """
        same = all(entry.get(name) == self.last.get(name) for name in ("step", "val_loss"))
        if "val_loss" in entry and same:
            return
        line = shorten(entry, details) if "step" in entry else entry
        with self.explain_errors():
            text = json.dumps(tree_map(finite_or_none, line), separators=(",", ":"))
            self.file.write(text.encode() + b"\n")
        if "step" in entry and self.trackers:
            self.trackers.write(entry)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.trackers:
            self.trackers.close()
