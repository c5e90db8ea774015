"""
Read the log.jsonl of runs as numbers. tools/report makes tables and figures of them.
"""

import contextlib
import json
import math
import os
import re
import statistics

import numpy as np

from configurator import InputError

# Training lines that are read of one log. A long run writes 10,000 and more, each over a kilobyte.
MAX_LINES = 500
# The kinds of lines. A line's kind is the first of these keys that it has; the tuple names the
# numbers that it must hold.
KINDS = {
    "start": ("params", "active_params", "flops_per_token", "tokens_per_step"),
    "end": (),
    "val_loss": ("val_loss", "step", "seconds"),
    "loss": ("loss", "step", "tokens_per_s"),
}


def last_start(folder):
    """The last start line of a run's log as a dict, or None."""
    with contextlib.suppress(OSError, ValueError):
        for line in reversed((folder / "log.jsonl").read_bytes().splitlines()):
            if line.startswith(b'{"start"'):
                return json.loads(line)
    return None


def progress(folder, settings):
    """(share of the run that is done, seconds of training), read from the end of its log.

    The share is 1.0 for a finished run only; a run without a log has (0.0, 0.0).
    """
    ended = restarted = False
    with contextlib.suppress(OSError), open(folder / "log.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**18))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError, TypeError):  # half a line
                entry = json.loads(line)
                # an end before the last start is that of a shorter run
                ended |= "end" in entry and not restarted
                restarted |= "start" in entry
                if "step" in entry:
                    share = entry["step"] / settings["max_iters"]
                    if settings["max_seconds"]:
                        share = entry["seconds"] / settings["max_seconds"]
                    return 1.0 if ended else min(0.99, share), entry["seconds"]
    return float(ended), 0.0


def share_done(folder, settings):
    return progress(folder, settings)[0]


def parse(line):
    """(entry, kind) of a log line. Raises ValueError, KeyError or TypeError for an unknown line."""
    entry = json.loads(line)
    for kind, numbers in KINDS.items():
        if kind in entry:
            if not all(isinstance(entry[key], int | float) for key in numbers):
                raise ValueError(f"expected numbers: {numbers}")
            return entry, kind
    raise ValueError("a line of no known kind")


def skipped_lines(raw):
    """Indices of the training lines that are not read. The last one is always read."""
    others = (b'"val_loss"', b'"start"', b'"end"')
    training = []
    for i, line in enumerate(raw):
        whole = line.startswith(b"{") and line.endswith(b"}")
        if whole and not any(word in line for word in others):
            training.append(i)
    stride = math.ceil(len(training) / MAX_LINES)
    return set(training) - set(training[::-1][:: stride or 1])


def read_log(path):
    """A run as a dict: start (the last start line) and its settings; evals, {step: evaluation};
    lines (training lines); state; progress, as text; problems, a list of lines."""
    data, problems = b"", []
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.append(f"its log cannot be read: {error.strerror}")
    raw = data.splitlines()
    if raw and not data.endswith(b"\n"):
        raw.pop()  # a running or killed run may leave half a line at the end
    start, ended, evals, lines, bad = None, False, {}, [], []
    skipped = skipped_lines(raw)
    for i, line in enumerate(raw):
        if i in skipped:
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

    settings = start["settings"] if start else {}
    step = max([0, *evals, *(line["step"] for line in lines)])
    losses = [line["loss"] for line in lines[-1:]]
    if evals:
        losses.append(evals[max(evals)]["val_loss"])
    if bad:
        problems.append(f"{len(bad)} unreadable lines left out, the first is line {bad[0]}")
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
        seconds = evals[max(evals)]["seconds"] if evals else 0.0
        progress = f"{seconds:.0f}/{settings['max_seconds']:.0f} s"
    return {
        "start": start,
        "settings": settings,
        "evals": evals,
        "lines": lines,
        "state": state,
        "progress": progress,
        "problems": problems,
    }


def read_runs(folder):
    """{name: run} of a folder's sub-folders, and of the folder itself if it is a run."""
    paths = sorted(folder.glob("*/log.jsonl"))
    # train.py moves what a run replaces to earlier-N
    logs = {p.parent.name: p for p in paths if not re.fullmatch(r"earlier-\d+", p.parent.name)}
    if (folder / "log.jsonl").exists():
        logs[folder.resolve().name] = folder / "log.jsonl"
    if not logs:
        what = "holds no run (no log.jsonl)" if folder.is_dir() else "is not a folder"
        raise InputError(f"'{folder}' {what}; give a folder of runs, like out/sweeps/expert_count")
    return {name: read_log(path) for name, path in logs.items()}


def last_eval(run):
    return run["evals"][max(run["evals"])]


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


def log_experts(run):
    """ln E: the entropy of a router without a preference."""
    return math.log(max(2, run["settings"].get("num_experts", 1)))


def tokens_per_s(run):
    return (
        statistics.median(line["tokens_per_s"] for line in run["lines"]) if run["lines"] else None
    )


def entropy(run):
    found = late(run, "router_entropy")
    return None if found is None else found / log_experts(run)


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
    "entropy": entropy,
}
