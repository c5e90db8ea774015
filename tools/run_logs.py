"""
Read the log.jsonl of runs as numbers, for tools.report.
"""

import json
import math
import re
import statistics

import numpy as np

from configurator import InputError

# How many training lines are read of one log; if few lines have every expert's load, up to as many
# of them in addition. A long run writes 100,000 lines and more.
MAX_LINES = 500
# A line's kind is the first of these keys that it has; the tuple names the numbers it must hold.
KINDS = {
    "start": ("params", "active_params", "flops_per_token", "tokens_per_step"),
    "end": (),
    "val_loss": ("val_loss", "step", "seconds"),
    "loss": ("loss", "step", "tokens_per_s"),
}


def parse(line):
    """(entry, kind) of a log line. Raises ValueError, KeyError or TypeError for an unknown line."""
    entry = json.loads(line)
    for kind, keys in KINDS.items():
        if kind in entry:
            if kind in ("val_loss", "loss"):
                entry = {key: nan_for_null(value) for key, value in entry.items()}
            numbers = [entry[key] for key in keys]
            if kind == "start":
                numbers.append(entry["settings"]["seed"])
            if all(isinstance(number, int | float) for number in numbers):
                return entry, kind
    raise ValueError("unknown")


def nan_for_null(value):
    """train.py writes null for a number that is not finite, also in a list."""
    if isinstance(value, list):
        return [nan_for_null(item) for item in value]
    return math.nan if value is None else value


def read_log(path):
    """A run as a dict: start (the last start line) and its settings; evals, {step: evaluation};
    lines (of training); state; progress, as text; problems, a list of texts."""
    data, problems = b"", []
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.append(f"its log cannot be read: {error.strerror}")
    raw = data.splitlines()
    if raw and not data.endswith(b"\n"):
        raw.pop()  # a running or killed run may leave half a line at the end
    detailed = [i for i, line in enumerate(raw) if b'"expert_load"' in line]
    read = {*range(0, len(raw), len(raw) // MAX_LINES + 1)}
    if 2 * len(detailed) < len(raw):  # few lines have it, so few of the others that are read
        read |= {*detailed[:: len(detailed) // MAX_LINES + 1]}
    start, ended, evals, lines, bad = None, False, {}, [], []
    for i, line in enumerate(raw):
        is_training_line = line.startswith(b'{"step"') and b'"val_loss"' not in line
        if is_training_line and i not in read and line.endswith(b"}"):
            continue
        try:
            entry, kind = parse(line)
        except (ValueError, TypeError, KeyError):
            bad.append(i + 1)
            continue
        if kind == "start":
            start, ended = entry, False  # a finished run can be resumed for more steps
        elif kind == "end":
            ended = True
        elif kind == "val_loss":
            evals[entry["step"]] = entry
        else:
            lines.append(entry)
    if bad:
        problems.append(f"{len(bad)} unreadable lines left out, the first is line {bad[0]}")

    settings = start["settings"] if start else {}
    even_entropy = math.log(max(2, settings.get("num_experts", 2)))  # without a preference
    for line in lines:
        if "router_entropy" in line:
            line["entropy"] = np.mean(line["router_entropy"]) / even_entropy
    step = max([0, *evals, *(line["step"] for line in lines)])
    last = evals[max(evals)] if evals else {"val_loss": 0.0, "seconds": 0.0}
    losses = [last["val_loss"], *(line["loss"] for line in lines[-1:])]
    if not start:
        state = "unreadable"
        problems.append("left out: no start line in its log")
    elif not all(map(math.isfinite, losses)):
        state = "diverged"
        problems.append(f"left out: diverged, the loss is not finite at step {step}")
    elif not evals:
        state = "without an evaluation"
        problems.append("left out: no evaluation yet")
    else:
        state = "finished" if ended else "under way"
    progress = f"step {step}/{settings.get('max_iters')}"
    if settings.get("max_seconds"):
        progress = f"{last['seconds']:.0f}/{settings['max_seconds']:.0f} s"
    run = {"start": start, "settings": settings, "evals": evals, "lines": lines, "state": state}
    return run | {"progress": progress, "problems": problems}


def read_runs(folder):
    """{name: run} of a folder's sub-folders, and of the folder itself if it is a run."""
    paths = [*sorted(folder.glob("*/log.jsonl")), *folder.glob("log.jsonl")]
    runs = {}
    for path in paths:
        name = path.resolve().parent.name
        # train.py moves what a run replaces to earlier-N
        if path.parent == folder or not re.fullmatch(r"earlier-\d+", name):
            runs[name] = read_log(path)
    if not runs:
        what = "holds no run (no log.jsonl)" if folder.is_dir() else "is not a folder"
        raise InputError(f"'{folder}' {what}; give a folder of runs, like out/sweeps/expert_count")
    return runs


def last_eval(run):
    return run["evals"][max(run["evals"])]


def tokens_per_s(run):
    speeds = [line["tokens_per_s"] for line in run["lines"]]
    return statistics.median(speeds) if speeds else None


def late(run, key):
    """Mean of a logged number (or of a list's mean over layers) over the last fifth of training."""
    lines = run["lines"][-math.ceil(len(run["lines"]) / 5) :]
    found = [np.mean(line[key]) for line in lines if key in line]
    return float(np.mean(found)) if found else None


def relative_load(run):
    """Each expert's load over the mean load, (lines, layers, E)."""
    load = np.array([line["expert_load"] for line in run["lines"] if "expert_load" in line])
    return load * load.shape[-1]


def max_vio_of_layers(run, layers):
    """Mean MaxVio of some layers (a slice) over all of training, or None."""
    load = relative_load(run)
    if not load.size or not load[:, layers].size:
        return None
    return float(load[:, layers].max(axis=2).mean()) - 1


METRICS = {  # of a run; None where its log does not tell
    "val_loss": lambda run: last_eval(run)["val_loss"],
    "seconds": lambda run: last_eval(run)["seconds"],
    "tokens_per_s": tokens_per_s,
    "max_vio": lambda run: late(run, "max_vio_mean"),
    "max_vio_worst": lambda run: late(run, "max_vio"),
    "first_layer_vio": lambda run: max_vio_of_layers(run, slice(0, 1)),
    "other_layers_vio": lambda run: max_vio_of_layers(run, slice(1, None)),
    "dead_experts": lambda run: late(run, "dead_experts"),
    "z_loss": lambda run: late(run, "z_loss"),
    "logit_norm": lambda run: late(run, "logit_norm"),
    "dropped": lambda run: late(run, "dropped"),
    "entropy": lambda run: late(run, "entropy"),
}
