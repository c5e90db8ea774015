"""
What the log.jsonl of runs tells, for tools.report and tools.watch.
"""

import math
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from configurator import InputError
from nanomoe.log import LOG, parse

# How many training lines are read of one log; if few lines have every expert's load, up to as many
# of them in addition. A long run writes 100,000 lines and more.
MAX_LINES = 500
NEWEST = 8  # the last lines are read in any case
ROUTING = {"expert_load", "max_vio_mean", "router_entropy"}


@dataclass
class LoggedRun:
    start: dict = field(default_factory=dict)  # the last start line; {} if there is none
    evals: dict = field(default_factory=dict)  # {step: evaluation}
    lines: list = field(default_factory=list)  # of training, as many as are read
    newest: list = field(default_factory=list)  # the last of all training lines
    unreadable: list = field(default_factory=list)  # numbers of lines
    state: str = ""  # "finished", "under way", or why it has no results

    @property
    def settings(self):
        return self.start.get("settings", {})

    @property
    def last_eval(self):
        return self.evals[max(self.evals)]

    @property
    def routes(self):
        return any(line.keys() >= ROUTING for line in self.lines)

    @property
    def progress(self):
        """How far it is, as text."""
        if not (self.evals or self.newest):
            return "no step"
        last = max([*self.evals.values(), *self.newest[-1:]], key=lambda line: line["step"])
        if self.settings.get("max_seconds"):
            return f"{last['seconds']:.0f}/{self.settings['max_seconds']:.0f} s"
        return f"step {last['step']}/{self.settings.get('max_iters', '?')}"

    def late(self, key):
        """Mean of a logged number (or of a list's mean over layers) over the last fifth of
        training."""
        lines = self.lines[-math.ceil(len(self.lines) / 5) :]
        found = [np.mean(line[key]) for line in lines if key in line]
        return float(np.mean(found)) if found else None

    def relative_load(self):
        """Each expert's load over the mean load, (lines, layers, E)."""
        load = np.array([line["expert_load"] for line in self.lines if "expert_load" in line])
        return load * load.shape[-1]


def read_log(path: Path) -> LoggedRun:
    data = path.read_bytes()
    raw = data.splitlines()
    if raw and not data.endswith(b"\n"):
        raw.pop()  # a running or killed run may leave half a line at the end
    training, detailed = [], []  # numbers of the training lines; those with every expert's load
    for i, line in enumerate(raw):
        if line.startswith(b'{"step"') and line.endswith(b"}") and b'"val_loss"' not in line:
            training.append(i)
            if b'"expert_load"' in line:
                detailed.append(i)
    read = {i for some in (training, detailed) for i in some[:: len(some) // MAX_LINES + 1]}
    skipped = {*training[:-NEWEST]} - read
    run = LoggedRun()
    for i, line in enumerate(raw):
        if i in skipped:
            continue
        entry = parse(line if b'"settings"' in line else line.replace(b"null", b"NaN"))
        if "start" in entry:
            run.start, run.state = entry, "under way"  # a finished run can be resumed for more
        elif "end" in entry:
            run.state = "finished"
        elif "val_loss" in entry:
            run.evals[entry["step"]] = entry
        elif "loss" in entry:
            run.newest = [*run.newest, entry][-NEWEST:]
            if i in read:
                run.lines.append(entry)
        else:
            run.unreadable.append(i + 1)
    even_entropy = math.log(max(2, run.settings.get("num_experts", 2)))  # without a preference
    for line in run.lines:
        if "router_entropy" in line:
            line["entropy"] = np.mean(line["router_entropy"]) / even_entropy
    losses = [line["loss"] for line in run.newest[-1:]]
    losses += [run.evals[step]["val_loss"] for step in sorted(run.evals)[-1:]]
    if not run.start:
        run.state = "without a start line"
    elif not all(map(math.isfinite, losses)):
        run.state = "diverged"
    elif not run.evals:
        run.state = "without an evaluation"
    return run


def read_runs(folder: Path) -> dict[str, LoggedRun]:
    """The runs of a folder's sub-folders by name, and of the folder itself if it is a run."""
    runs = {}
    for path in [*sorted(folder.glob(f"*/{LOG}")), *folder.glob(LOG)]:
        name = path.resolve().parent.name
        # train.py moves what a run replaces to earlier-N
        if path.parent == folder or not re.fullmatch(r"earlier-\d+", name):
            runs[name] = read_log(path)
    if not runs:
        what = "holds no run (no log.jsonl)" if folder.is_dir() else "is not a folder"
        raise InputError(f"'{folder}' {what}; give a folder of runs, like out/sweeps/expert_count")
    return runs


def tokens_per_s(run):
    speeds = [line["tokens_per_s"] for line in run.lines]
    return statistics.median(speeds) if speeds else None


def max_vio_of_layers(run, layers):
    """Mean MaxVio of some layers (a slice) over all of training, or None."""
    load = run.relative_load()
    if not load.size or not load[:, layers].size:
        return None
    return float(load[:, layers].max(axis=2).mean()) - 1


METRICS = {  # of a run; None where its log does not tell
    "val_loss": lambda run: run.last_eval["val_loss"],
    "seconds": lambda run: run.last_eval["seconds"],
    "tokens_per_s": tokens_per_s,
    "max_vio": lambda run: run.late("max_vio_mean"),
    "max_vio_worst": lambda run: run.late("max_vio"),
    "first_layer_vio": lambda run: max_vio_of_layers(run, slice(0, 1)),
    "other_layers_vio": lambda run: max_vio_of_layers(run, slice(1, None)),
}
for name in ("dead_experts", "z_loss", "logit_norm", "dropped", "entropy"):
    METRICS[name] = lambda run, name=name: run.late(name)
