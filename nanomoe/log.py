"""
A run's log.jsonl, written and read: a JSON object a line for each logged step, each evaluation,
each start, and the end. And what a step's line holds, as the console shows it too.
"""

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

# what a run logs into its out_dir; with the id, a resumed run continues the same wandb run
LOG, WANDB_ID, TENSORBOARD = "log.jsonl", "wandb-id", "tensorboard"
EXACT = ("loss", "val_loss", "val_bits_per_byte")


# -----------------------------------------------------------------------------
# reading


def lines_from_end(path: Path, block: int = 2**20) -> Iterator[bytes]:
    """A file's lines, the last one first. A long log is not read as a whole. The first is what
    follows the last newline: b"", or half a line. Raises OSError."""
    with open(path, "rb") as file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(lines)
            end = start
        yield rest


def parse(line: bytes) -> dict:
    """A line's entry; {} for half a line, as a killed run leaves it, and for what is no entry."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def last_start(out_dir: Path) -> dict:
    """The last start line of a run's log; {} if there is none."""
    with contextlib.suppress(OSError, ValueError):  # out_dir may be no path at all
        for line in lines_from_end(Path(out_dir) / LOG):
            if line.startswith(b'{"start"') and (entry := parse(line)):
                return entry
    return {}


def share_done(out_dir: Path, settings: dict) -> float:
    """1 for a finished run, else the share of its steps or seconds, from the end of its log."""
    key, whole = "step", settings["max_iters"]
    if settings["max_seconds"]:
        key, whole = "seconds", settings["max_seconds"]
    restarted = False
    with contextlib.suppress(OSError):
        for line in lines_from_end(Path(out_dir) / LOG, 2**16):
            entry = parse(line)
            if "end" in entry and not restarted:
                return 1.0
            restarted |= "start" in entry  # an end before it is that of a shorter run
            if "step" in entry:
                return min(0.99, entry[key] / whole)
    return 0.0


# -----------------------------------------------------------------------------
# writing


class RunLog:
    """Appends to out_dir/log.jsonl, and to wandb and TensorBoard if the settings ask for them.
    Without an out_dir it writes nothing: the log of other ranks.

    step: the step that the run resumes after. Lines of later steps, which a killed run has left,
    are dropped, because those steps are done again. Raises OSError if the log cannot be written,
    and InputError without a login to wandb.

    As a context manager it closes the trackers, however the run ends."""

    def __init__(self, out_dir: Path | None, step: int = 0, settings: dict | None = None):
        self.path = self.trackers = self.error = None
        self.last = {}  # the last step's line, if it is of before this start
        if out_dir is None:
            return
        self.path = Path(out_dir) / LOG
        try:
            if self.path.exists():
                self.drop_lines_after(step)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (open as long as the run)
        except OSError as error:
            raise self.explain(error) from None
        if settings and (settings["wandb_log"] or settings["tensorboard_log"]):
            from nanomoe.trackers import Trackers  # late: only for those who use one

            places = {"wandb_log": WANDB_ID, "tensorboard_log": TENSORBOARD}
            places = {name: self.path.with_name(place) for name, place in places.items()}
            self.trackers = Trackers(places, step, settings)

    def drop_lines_after(self, step):
        starts = []  # starts and ends of runs without a step that we keep
        dropped = -1  # bytes; the last line has no newline
        for line in lines_from_end(self.path):
            entry = parse(line)
            if dropped >= 0 and entry.get("step", math.inf) <= step:
                self.last = entry
                break
            dropped += len(line) + 1
            if entry and "step" not in entry:
                starts.insert(0, line + b"\n")
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(-dropped, os.SEEK_END)
            file.write(b"".join(starts))  # they were among what is dropped, so a kill loses none
            file.truncate()

    def explain(self, error):
        return OSError(f"could not write {self.path}: {error.strerror}")

    def write(self, details: bool = True, **entry: object) -> None:
        """Append a line; the trackers get it too. The first OSError is kept as `error`, for the
        ranks to agree on after the step.

        details: False leaves out the lists over layers of a training step. An evaluation that is
        in the log already, because a resumed run repeats it, is not written twice."""
        same = all(entry.get(name) == self.last.get(name) for name in ("step", "val_loss"))
        if not self.path or ("val_loss" in entry and same):
            return
        line = json.dumps(shorten(entry, details), separators=(",", ":"))
        try:
            self.file.write(line.encode() + b"\n")
        except OSError as error:
            self.error = self.error or self.explain(error)
        if "step" in entry and self.trackers:
            self.trackers.write(entry)

    def close(self) -> None:
        """Close the trackers. The run's end can still be written."""
        if self.trackers:
            self.trackers.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def shorten(entry, details):
    """An entry as log.jsonl has it: of a step the losses as they are, other numbers to six digits,
    lists over layers to four, or without them."""
    short = {}
    for name, value in entry.items():
        is_list = isinstance(value, list)
        digits = 4 if is_list else 6
        if name in EXACT or "step" not in entry:
            digits = 17  # every bit of a float
        if details or not is_list:
            short[name] = tree_map(functools.partial(for_json, digits=digits), value)
    return short


def for_json(value: object, digits: int) -> object:
    """JSON has no NaN and no infinity."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


# -----------------------------------------------------------------------------
# a step's numbers


def summarize(stats: dict[str, torch.Tensor], batches: int = 1) -> dict:
    """A model's `stats`, summed over `batches` micro-batches, as plain numbers for a log.

    A dense model's is {"loss"}, the cross-entropy. A MoE model adds balance_loss and z_loss (means
    over layers); lists over its layers of what else is in Routing; expert_load, a list of E shares
    per layer; max_vio, how far the busiest expert's load is above the mean load, relative to it,
    in the worst layer, and max_vio_mean over layers (Wang et al. 2024, arXiv 2408.15664, sec.
    4.1); dead_experts, those without a token; and collapsed_layers."""
    total = {name: value.cpu() for name, value in stats.items()}
    mean = {name: value / batches for name, value in total.items()}
    summary = {"loss": mean.pop("cross_entropy").item()}
    if not mean:
        return summary
    for name in [name for name in mean if name.endswith("_loss")]:
        summary[name] = mean.pop(name).mean().item()
    del mean["expert_count"]
    count = total["expert_count"]  # (layers, E)
    load = count / count.sum(dim=1, keepdim=True)
    vio = load.max(dim=1).values * load.shape[1] - 1
    summary |= {"max_vio": vio.max().item(), "max_vio_mean": vio.mean().item()}
    summary["dead_experts"] = (load == 0).sum().item()
    summary["collapsed_layers"] = collapsed_layers(count, load)
    lists = mean | {"expert_load": load}
    return summary | {name: value.tolist() for name, value in lists.items()}


def collapsed_layers(count: torch.Tensor, load: torch.Tensor) -> list[int]:
    """The layers, a list of indices among the MoE layers, in which half of the experts or more get
    nothing, or whose load is as uneven as that of fewer than E / 4 equally busy experts (its
    perplexity). Below 4 assignments per expert the numbers say nothing."""
    E = load.shape[1]
    dead = (load == 0).sum(dim=1)
    perplexity = torch.special.entr(load).sum(dim=1).exp()
    half_dead = (2 * dead >= E) & (dead > 0)
    collapsed = (count.sum(dim=1) >= 4 * E) & (half_dead | (perplexity < E / 4))
    return collapsed.nonzero().flatten().tolist()


def console_line(entry: dict, max_iters: int, seconds_left: float) -> str:
    """A training step's entry in short."""
    line = "step {step}/{max_iters} | loss {loss:.4f} | grad {grad_norm:.2f} | lr {lr:.2e}"
    line += " | {ms:,.0f} ms | {tokens_per_s:,.0f} tokens/s"
    if entry["mfu"]:
        line += " | mfu {mfu:.1%}"
    if "max_vio" in entry:
        line += " | balance {balance_loss:.3f}, maxvio {max_vio:.2f}, dead {dead_experts}"
    return f"{line.format(max_iters=max_iters, **entry)} | {time_left(seconds_left)}"


def time_left(seconds: float) -> str:
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes:.0f}m{seconds:02.0f}s left"
