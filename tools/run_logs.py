"""
The log.jsonl of runs, as numbers. tools/report makes tables and pictures of them.
"""

import contextlib
import json
import math
import os
import re
import statistics

import numpy as np

from configurator import InputError

LINES = (
    500  # training lines read of one log: a long one has 10,000 and more, of over a kilobyte each
)
NEEDED = {  # the kinds of lines, each named by the key that no earlier kind has, and their numbers
    "start": ("params", "active_params", "flops_per_token", "tokens_per_step"),
    "end": (),
    "val_loss": ("val_loss", "step", "seconds"),
    "loss": ("loss", "step", "tokens_per_s"),
}


def start_of(folder):
    """The last start that a run's log tells of, or None."""
    with contextlib.suppress(OSError, ValueError):
        starts = [
            line
            for line in (folder / "log.jsonl").read_bytes().splitlines()
            if line.startswith(b'{"start"')
        ]
        return json.loads(starts[-1]) if starts else None


def share_done(folder, settings):
    """1 for a run that has come to its end, else the share of its steps or seconds that the end of its log tells of."""
    restarted = False
    with contextlib.suppress(OSError), open(folder / "log.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**18))
        for line in reversed(file.read().splitlines()):
            with contextlib.suppress(ValueError, TypeError):  # half a line
                entry = json.loads(line)
                if "end" in entry and not restarted:
                    return 1.0
                restarted |= "start" in entry  # and an end before it was that of a shorter run
                if "step" in entry:
                    limit = settings["max_seconds"]
                    return min(
                        0.99,
                        entry["seconds"] / limit
                        if limit
                        else entry["step"] / settings["max_iters"],
                    )
    return 0.0


def parse(line):
    """A line of a log and its kind. ValueError for what train.py would not write."""
    entry = json.loads(line)
    kind = next((kind for kind in NEEDED if isinstance(entry, dict) and kind in entry), None)
    if (
        not kind
        or not all(isinstance(entry.get(key), int | float) for key in NEEDED[kind])
        or (kind == "start" and not {"seed", "max_iters"} <= dict(entry.get("settings", {})).keys())
    ):
        raise ValueError
    return entry, kind


def read_log(path):
    """A run as a dict: the last start line and its settings; evals, {step: evaluation}; training lines; state; how far it is
    (progress); problems."""
    try:
        data, unread = path.read_bytes(), ""
    except OSError as error:
        data, unread = b"", f"its log cannot be read: {error.strerror}"
    raw, marks = data.splitlines(), (b'"val_loss"', b'"start"', b'"end"')
    training = [
        i
        for i, line in enumerate(raw)
        if line[:1] == b"{" and line[-1:] == b"}" and not any(m in line for m in marks)
    ]
    chosen = {
        training[int(i)]
        for i in np.linspace(0, len(training) - 1, min(LINES, len(training))).round()
    }
    start, ended, evals, lines, bad = None, False, {}, [], []
    for i in sorted(chosen.union(range(len(raw))) - (set(training) - chosen)):
        try:
            entry, kind = parse(raw[i])
        except (ValueError, TypeError):
            # a run that is going, or was killed, leaves half a line at the end
            if raw[i].strip() and (i < len(raw) - 1 or data.endswith(b"\n")):
                bad.append(i + 1)
            continue
        if kind == "start":
            start, ended = entry, False  # a run that had come to its end may go on, to more steps
        elif kind == "end":
            ended = True
        elif kind == "val_loss":
            evals[entry["step"]] = entry
        else:
            lines.append(entry)
    settings, step = (
        start["settings"] if start else {},
        max([*evals, *(line["step"] for line in lines), 0]),
    )
    last = evals[max(evals)] if evals else {"val_loss": 0.0, "seconds": 0.0}
    limit = settings.get("max_seconds", 0)
    # the logs of older versions do not tell the end
    ended = ended or settings.get("max_iters") in evals or 0 < limit <= last["seconds"]
    finite = all(map(math.isfinite, (last["val_loss"], *(line["loss"] for line in lines[-1:]))))
    state = (
        "unreadable"
        if not start
        else "diverged"
        if not finite
        else "without an evaluation"
        if not evals
        else "finished"
        if ended
        else "under way"
    )
    problems = (
        [
            f"left out {len(bad)} line{'s' * (len(bad) > 1)} that train.py does not write, the first is line "
            f"{bad[0]}"
        ]
        if bad
        else []
    )
    problems += {
        "unreadable": [
            unread or ("a log without a start line: left out" if raw else "an empty log: left out")
        ],
        "diverged": [f"diverged, its loss is not finite at step {step}: left out of all means"],
        "without an evaluation": ["without an evaluation: left out"],
    }.get(state, [])
    return {
        "start": start,
        "settings": settings,
        "evals": evals,
        "lines": lines,
        "state": state,
        "problems": problems,
        "progress": f"{last['seconds']:.0f}/{limit:.0f} s"
        if limit
        else f"step {step}/{settings.get('max_iters')}",
    }


def read_runs(folder):
    """{name: run} of a folder's sub-folders, and of itself if it is a run."""
    logs = {
        path.parent.name: path
        for path in sorted(folder.glob("*/log.jsonl"))
        if not re.fullmatch(r"earlier-\d+", path.parent.name)
    }  # where train.py puts what a run replaces
    if (folder / "log.jsonl").exists():
        logs[folder.resolve().name] = folder / "log.jsonl"
    if not logs:
        raise InputError(
            f"'{folder}' {'holds no log.jsonl, nor does a folder in it' if folder.is_dir() else 'is no folder'}; "
            "expected a folder of runs, as tools/sweep or train.py make them"
        )
    return {name: read_log(path) for name, path in logs.items()}


def last_of(run):
    return run["evals"][max(run["evals"])]


def late(run, key):
    """The mean over the last fifth of the training lines of a number, or of a list's mean over layers."""
    found = [
        np.mean(line[key])
        for line in run["lines"][-math.ceil(len(run["lines"]) / 5) :]
        if key in line
    ]
    return float(np.mean(found)) if found else None


def load_of(run):
    """(lines, layers, E): each expert's load over the mean load."""
    load = np.array([line["expert_load"] for line in run["lines"] if "expert_load" in line])
    return load * load.shape[-1]


def layers_vio(run, layers):
    load = load_of(run)
    vio = load.max(axis=2).mean(axis=0)[layers] - 1 if load.size else load
    return float(vio.mean()) if vio.size else None


def log_e(run):
    return math.log(max(2, run["settings"].get("num_experts", 1)))


METRICS = {  # of a run; None where its log does not tell
    "val_loss": lambda run: last_of(run)["val_loss"],
    "seconds": lambda run: last_of(run)["seconds"],
    "tokens_per_s": lambda run: (
        statistics.median(line["tokens_per_s"] for line in run["lines"]) if run["lines"] else None
    ),
    "max_vio": lambda run: late(run, "max_vio_mean"),
    "max_vio_worst": lambda run: late(run, "max_vio"),
    "first_layer_vio": lambda run: layers_vio(run, slice(0, 1)),
    "other_layers_vio": lambda run: layers_vio(run, slice(1, None)),
    "dead_experts": lambda run: late(run, "dead_experts"),
    "z_loss": lambda run: late(run, "z_loss"),
    "logit_norm": lambda run: late(run, "logit_norm"),
    "dropped": lambda run: late(run, "dropped"),
    "entropy": lambda run: (
        None if (found := late(run, "router_entropy")) is None else found / log_e(run)
    ),
}
