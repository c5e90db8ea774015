"""
What a sweep file asks for: its runs with all their settings and sizes, and the widths that make them comparable.
tools/sweep, whose help describes the file, runs them.
"""

import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import train
from configurator import InputError, check_known, check_type, configure, read_config
from model import out_of_range
from moe_model import build_config, build_model
from nanomoe.device import choose_device, choose_dtype, device_name, estimate_memory
from tools import bench
from tools.run_logs import share_done

SWEEP = {
    "base": {},
    "runs": {},
    "grid": {},
    "seeds": [1337],
    "baseline": "",
    "match": "",
    "findings": [],
}
QUANTITIES = {"active_flops": "flops", "active_params": "active", "total_params": "params"}
SET_BY_SWEEP = {"out_dir", "init_from", "seed", "eval_only"}


@dataclass
class Group:
    """Runs that differ in nothing but their seed."""

    name: str
    config: str  # the path of a config file
    flags: dict  # settings over it
    settings: dict  # all of train.py's
    sizes: dict  # see sizes_of
    match: str  # how exactly it was matched to another group, or ""


@dataclass
class Run:
    group: Group
    seed: int
    folder: Path

    def command(self, python, script):
        own = {"seed": self.seed, "out_dir": self.folder, "init_from": "auto"}
        if self.group.settings["wandb_log"]:
            own["wandb_run_name"] = self.folder.name
        return [python, script, self.group.config, *as_flags(self.group.flags | own)]


def as_flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def read_sweep(path, size):
    """A sweep file, which sees `size`, to its values, a dict like SWEEP, base being that of the size. Raises InputError."""
    sweep = SWEEP | read_config(path, {"size": size}, SWEEP)
    if "config" not in sweep["base"]:
        if size not in sweep["base"]:
            raise InputError(
                f"{path}: base is {sweep['base']!r}, expected {{'config': 'config/a.py', ...}}, or one for each "
                f"size, like {{'{size}': {{'config': 'config/a.py', ...}}}}"
            )
        sweep["base"] = sweep["base"][size]
    if not isinstance(sweep["base"], dict) or not isinstance(sweep["base"].get("config"), str):
        raise InputError(
            f"{path}: base is {sweep['base']!r}, expected {{'config': 'config/a.py', ...}}"
        )
    for name, kind in (("runs", dict), ("grid", list)):
        for key, value in sweep[name].items():
            if (
                not isinstance(key, str)
                or not isinstance(value, kind)
                or (kind is dict and not all(isinstance(setting, str) for setting in value))
            ):
                raise InputError(
                    f"{path}: {name} has {key!r}: {value!r}, expected a name and a {kind.__name__}"
                )
    if not all(isinstance(finding, dict) for finding in sweep["findings"]):
        raise InputError(f"{path}: findings is {sweep['findings']!r}, expected a list of dicts")
    if sweep["baseline"] and sweep["baseline"] not in sweep["runs"]:
        raise InputError(
            f"{path}: baseline is '{sweep['baseline']}', expected one of {', '.join(sweep['runs'])}"
        )
    if not sweep["seeds"] or not all(
        type(seed) is int and 0 <= seed < 2**64 for seed in sweep["seeds"]
    ):
        raise InputError(
            f"{path}: seeds is {sweep['seeds']!r}, expected whole numbers, like [1, 2, 3]"
        )
    return sweep


def sizes_of(settings, vocab_size):
    """Of the model that the settings describe: "params", "active", "flops" (per token), "memory" (in bytes, estimated), and
    "vocab_size". Raises InputError if there is no such model."""
    try:
        with torch.device("meta"):
            model = build_model(build_config(settings | {"vocab_size": vocab_size}))
    except ValueError as error:
        raise InputError(str(error)) from None
    compute_dtype = choose_dtype(settings["dtype"], choose_device(settings["device"]))
    return {
        "params": model.num_params(),
        "active": model.num_active_params(),
        "flops": model.flops_per_token(),
        "memory": sum(estimate_memory(model, settings["batch_size"], compute_dtype)),
        "vocab_size": vocab_size,
    }


def solve_width(settings, quantity, target, vocab_size):
    """The setting for the width, and the one that brings a quantity nearest to a target, of those that GPUs multiply well:
    multiples of 8, which grouped GEMMs need, or from 1024 on of 64."""
    key = "expert_dim" if settings["use_moe"] else "mlp_dim"
    low, high = (
        sizes_of(settings | {key: width}, vocab_size)[quantity] for width in (8, 16)
    )  # it grows linearly
    width = 8 + 8 * (target - low) / (high - low)
    unit = 8 if width < 1024 else 64
    return key, max(8, unit * round(width / unit))


class Plan:
    """groups and runs, lists of Group and Run, and problems: a line for everything in the file that cannot be run.

    sweep: as read_sweep returns it. flags: for train.py, over all that the file says. out: the folder of the runs'
    folders. vocab_size_of: settings to the rows of the embedding, or InputError. Raises InputError if nothing can be run."""

    def __init__(self, sweep, flags, out, vocab_size_of):
        self.sweep, self.vocab_size_of = sweep, vocab_size_of
        base = dict(sweep["base"])
        self.config = base.pop("config")
        base = {"sample_tokens": 0} | base
        self.settings, given = configure(dict(vars(train)), [self.config, *as_flags(base), *flags])
        self.forced = {key for key, source in given.items() if source in flags}
        if both := (self.forced | set(base)) & SET_BY_SWEEP:
            raise InputError(f"{', '.join(sorted(both))}: the sweep itself sets that")
        if self.settings["init_from"] not in ("scratch", "auto", "resume", "upcycle"):
            raise InputError(
                f"{self.config} sets init_from, but a sweep's runs start from scratch, or from upcycle_from"
            )
        self.base = {key: self.settings[key] for key in {**base, **dict.fromkeys(self.forced)}}
        self.named, self.groups, self.runs, self.problems = dict(sweep["runs"]), [], [], []
        if empty := [key for key, values in sweep["grid"].items() if not values]:
            self.problems.append(f"the grid is empty: {', '.join(empty)} has no values")
        for values in itertools.product(*sweep["grid"].values()) if sweep["grid"] else ():
            own = dict(zip(sweep["grid"], values, strict=True))
            name = ",".join(f"{key}={value}" for key, value in own.items())
            if name in self.named:
                self.problems.append(
                    f"run '{name}' of the grid is left out: there is one of that name already"
                )
            self.named.setdefault(name, own)
        taken = {}
        for name in self.named:
            try:
                group = self.group(name)
            except InputError as error:
                self.problems.append(f"run '{name}' is left out: {error}")
                continue
            self.groups.append(group)
            for seed in sweep["seeds"]:
                folder = Path(out) / f"{re.sub(r'[^A-Za-z0-9_.,=+-]+', '-', name)},seed={seed}"
                if folder in taken:
                    self.problems.append(
                        f"run '{name}' with seed {seed} is left out: its folder {folder} is that of run "
                        f"'{taken[folder]}'"
                    )
                else:
                    taken[folder] = name
                    self.runs.append(Run(group, seed, folder))

    @functools.cache
    def group(self, name):
        own = {k: v for k, v in self.named[name].items() if k not in ("match", "match_to")}
        for key, value in own.items():
            check_known(key, self.settings, f"run '{name}'")
            own[key] = check_type(key, value, vars(train)[key], f"run '{name}'")
        if both := sorted(set(own) & (SET_BY_SWEEP | self.forced)):
            raise InputError(f"it sets {', '.join(both)}, which the sweep itself or a flag sets")
        settings, remark = self.settings | own, ""
        if wrong := out_of_range(
            settings,
            dict.fromkeys(("max_iters", "batch_size", "gradient_accumulation_steps"), 1),
            choices={},
            below_one=(),
        ):
            raise InputError("; ".join(wrong))
        vocab_size = self.vocab_size_of(settings)
        to = self.named[name].get("match_to", self.sweep["baseline"])
        match = self.named[name].get("match", self.sweep["match"] if name != to else "")
        if match:
            if match not in list(QUANTITIES) or to not in list(self.named) or to == name:
                raise InputError(
                    f"it is to match {match} of '{to}', expected {', '.join(QUANTITIES)} of another run"
                )
            try:
                target = self.group(to).sizes[QUANTITIES[match]]
            except RecursionError:
                raise InputError(f"it is to match '{to}', which is to match it") from None
            key, width = solve_width(settings, QUANTITIES[match], target, vocab_size)
            if key in own or key in self.forced:
                raise InputError(f"it sets {key}, which match '{match}' is to solve")
            own[key] = settings[key] = width
            off = sizes_of(settings, vocab_size)[QUANTITIES[match]] / target - 1
            remark = f"{match} of '{to}' {off:+.2%} with {key}={width}"
        return Group(
            name, self.config, self.base | own, settings, sizes_of(settings, vocab_size), remark
        )


def seconds_per_step(groups, device, threads):
    """{name: seconds}, measured on this machine, a few steps of each model; left out what would take a CPU too long."""
    torch.set_num_threads(threads)
    rows = {g.name: g.settings | {"vocab_size": g.sizes["vocab_size"]} for g in groups}
    if device.type == "cpu":
        rows = {
            g.name: rows[g.name]
            for g in groups
            if g.sizes["flops"] * g.settings["batch_size"] * g.settings["block_size"] < 1e12
            and g.sizes["memory"] < 4e9
        }
    return {
        result["name"]: result["ms"] / 1e3 * rows[result["name"]]["gradient_accumulation_steps"]
        for _, result in bench.measure(rows, {}, 3, device)
    }


def print_table(groups, runs, lanes, device, threads):
    seconds, left = seconds_per_step(groups, device, threads), 0.0
    print(
        f"{'':34s} {'seeds':>5s} {'done':>5s} {'params':>8s} {'active':>8s} {'MFLOPs/token':>13s} {'tokens':>8s} "
        f"{'GB':>6s} {'min/run':>8s}  matched"
    )
    for g in groups:
        s, done = g.settings, [share_done(r.folder, g.settings) for r in runs if r.group is g]
        tokens = (
            s["max_iters"] * s["gradient_accumulation_steps"] * s["batch_size"] * s["block_size"]
        )
        per_run = s["max_seconds"] or (
            seconds[g.name] * s["max_iters"] if g.name in seconds else None
        )
        left += (per_run or 0) * (len(done) - sum(done))
        print(
            f"{g.name[:34]:34s} {len(done):5d} {done.count(1):5d} {g.sizes['params'] / 1e6:7.2f}M "
            f"{g.sizes['active'] / 1e6:7.2f}M {g.sizes['flops'] / 1e6:13,.2f} "
            f"{'by time' if s['max_seconds'] else f'{tokens / 1e6:,.1f}M':>8s} {g.sizes['memory'] / 1e9:6.2f} "
            f"{f'{per_run / 60:.1f}' if per_run else '?':>8s}  {g.match}".rstrip()
        )
    print(
        f"{len(runs)} runs, {lanes} at a time on {device_name(device)}; about {left / 60 / lanes:.0f} minutes to go, without "
        "evaluations"
        + " and the runs marked '?', of which a step takes this machine too long to measure"
        * any(not g.settings["max_seconds"] and g.name not in seconds for g in groups)
    )
