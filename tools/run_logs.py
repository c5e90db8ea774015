"""
What the log.jsonl of runs tells, for tools.report and tools.watch.
"""

import math
import re
from pathlib import Path

import numpy as np

from configurator import InputError
from nanomoe.log import LOG, parse

# How many training lines are read of one log; if few lines have every expert's load, up to as many
# of them in addition. A long run writes 100,000 lines and more.
MAX_LINES = 500
NEWEST = 8  # the last lines are read in any case
TRAINING = re.compile(rb'\{"step"(?!.*"val_loss").*\}')  # a training line
LAST = ("val_loss", "seconds")  # metrics: of the last evaluation
OF_LAYERS = {"first_layer_vio": slice(0, 1), "other_layers_vio": slice(1, None)}  # of all training
LATE = {name: name for name in ("dead_experts", "z_loss", "logit_norm", "dropped", "entropy")}
LATE |= {"max_vio": "max_vio_mean", "max_vio_worst": "max_vio"}  # means over its last fifth


class LoggedRun:
    def __init__(self, path: Path):
        self.start = {}  # the last start line; {} if there is none
        self.evals = {}  # {step: evaluation}
        self.lines = []  # of training, as many as are read
        self.newest = []  # the last of all training lines
        self.unreadable = []  # numbers of lines
        self.state = ""  # "finished", "under way", or why it has no results
        self.read(path.read_bytes())
        # the log's dtype is what 'auto' came to
        self.settings = self.start.get("settings", {}) | {"dtype": self.start.get("dtype")}
        even_entropy = math.log(max(2, self.settings.get("num_experts", 2)))  # without a preference
        for line in self.lines:
            if "router_entropy" in line:
                line["entropy"] = np.mean(line["router_entropy"]) / even_entropy
        losses = [line["loss"] for line in self.newest[-1:]]
        losses += [self.evals[step]["val_loss"] for step in sorted(self.evals)[-1:]]
        if not self.start:
            self.state = "without a start line"
        elif not all(map(math.isfinite, losses)):
            self.state = "diverged"
        elif not self.evals:
            self.state = "without an evaluation"

    def read(self, data):
        *raw, _ = data.split(b"\n")  # a running or killed run may leave half a line at the end
        training = [i for i, line in enumerate(raw) if TRAINING.fullmatch(line)]
        detailed = [i for i in training if b'"expert_load"' in raw[i]]
        read = {i for some in (training, detailed) for i in some[:: len(some) // MAX_LINES + 1]}
        skipped = {*training[:-NEWEST]} - read
        for i, line in enumerate(raw):
            if i in skipped:
                continue
            # null was a number that is not finite
            entry = parse(line if b'"settings"' in line else line.replace(b"null", b"NaN"))
            if "start" in entry:
                self.start, self.state = entry, "under way"  # also a finished run that gets longer
            elif "end" in entry:
                self.state = "finished"
            elif "val_loss" in entry:
                self.evals[entry["step"]] = entry
            elif "loss" in entry:
                self.newest = [*self.newest, entry][-NEWEST:]
                self.lines += [entry] if i in read else []
            else:
                self.unreadable.append(i + 1)

    @property
    def last_eval(self):
        return self.evals[max(self.evals)]

    @property
    def progress(self):
        """How far it is, as text."""
        if not (self.evals or self.newest):
            return "no step"
        last = max([*self.evals.values(), *self.newest[-1:]], key=lambda line: line["step"])
        if self.settings.get("max_seconds"):
            return f"{last['seconds']:.0f}/{self.settings['max_seconds']:.0f} s"
        return f"step {last['step']}/{self.settings.get('max_iters', '?')}"

    def relative_load(self):
        """Each expert's load over the mean load, (lines, layers, E)."""
        load = np.array([line["expert_load"] for line in self.lines if "expert_load" in line])
        return load * load.shape[-1]

    def metric(self, name: str) -> float | None:
        """tokens_per_s or one of the above, lists averaged over layers; None where the log does not
        tell. Raises KeyError for another name."""
        if name in LAST:
            return self.last_eval[name]
        if name == "tokens_per_s":
            found = [line[name] for line in self.lines]
            return float(np.median(found)) if found else None
        if name in OF_LAYERS:
            loads = [load[OF_LAYERS[name]] for load in self.relative_load()]
            found = [load.max(axis=1).mean() - 1 for load in loads]
        else:
            key, late = LATE[name], self.lines[-math.ceil(len(self.lines) / 5) :]
            found = [np.mean(line[key]) for line in late if key in line]
        return float(np.mean(found)) if found else None


def read_runs(folder: Path) -> dict[str, LoggedRun]:
    """The runs of a folder's sub-folders by name, and of the folder itself if it is a run."""
    runs = {}
    for path in [*sorted(folder.glob(f"*/{LOG}")), *folder.glob(LOG)]:
        name = path.resolve().parent.name
        # train.py moves what a run replaces to earlier-N
        if path.parent == folder or not re.fullmatch(r"earlier-\d+", name):
            runs[name] = LoggedRun(path)
    if not runs:
        what = "holds no run (no log.jsonl)" if folder.is_dir() else "is not a folder"
        raise InputError(f"'{folder}' {what}; give a folder of runs, like out/sweeps/expert_count")
    return runs
