"""
What a sweep file asks for: its runs with their settings and sizes. tools/README.md describes it.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
import train
from configurator import InputError
from moe_model import build_config, build_model
from nanomoe.device import choose_device, choose_dtype, device_name, estimate_memory
from nanomoe.log import share_done
from nanomoe.optim import num_moments
from nanomoe.schedule import LENGTHS, run_length
from nanomoe.settings import RETIRED, problems

SWEEP = {"base": {}, "runs": {}, "grid": {}, "seeds": [1337], "findings": []}
SWEEP |= {"baseline": "", "match": ""}
MATCHABLE = ("active_flops", "active_params", "total_params")
SET_BY_SWEEP = {"out_dir", "init_from", "seed", "eval_only"}


@dataclass
class Group:
    """Runs that differ in their seed only."""

    name: str
    config: str  # path of a config file
    flags: dict  # settings that override it
    settings: dict  # all of train.py's settings
    sizes: dict  # see sizes_of
    match: str  # how closely it matches another group's size, or ""
    seeds: list


@dataclass
class Run:
    group: Group
    seed: int
    folder: Path

    def share_done(self):
        return share_done(self.folder, self.group.settings)

    def command(self, python, script):
        own = {"seed": self.seed, "out_dir": self.folder, "init_from": "auto"}
        if self.group.settings["wandb_log"]:
            own["wandb_run_name"] = self.folder.name
        return [python, script, self.group.config, *as_flags(self.group.flags | own)]


def as_flags(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def read_sweep(path, size):
    """A sweep file's values, like SWEEP, with the base of this size. Raises InputError."""
    values = configurator.read_config(path, {"size": size}, SWEEP)
    sweep = SWEEP | configurator.check_settings(values, SWEEP, str(path))

    def expect(good, name, expected):
        if not good:
            raise InputError(f"{path}: {name} is {sweep[name]!r}, expected {expected}")

    base = sweep["base"] if "config" in sweep["base"] else sweep["base"].get(size)
    is_base = isinstance(base, dict) and isinstance(base.get("config"), str)
    like = "{'config': 'config/a.py', ...}"
    expect(is_base, "base", f"{like}, or one for each size, like {{'{size}': {like}}}")
    names = ["", *sweep["runs"]]
    expect(sweep["baseline"] in names, "baseline", f"one of {', '.join(map(str, names[1:]))}")
    are_findings = all(isinstance(finding, dict) for finding in sweep["findings"])
    expect(are_findings, "findings", "a list of dicts")
    expect(are_seeds(sweep["seeds"]), "seeds", "whole numbers, like [1, 2, 3]")
    for name, own in sweep["runs"].items():
        if not isinstance(own, dict) or not all(isinstance(key, str) for key in (name, *own)):
            raise InputError(f"{path}: runs has {name!r}: {own!r}, expected a name and a dict")
    for key, values in sweep["grid"].items():
        if not isinstance(key, str) or not isinstance(values, list):
            raise InputError(f"{path}: grid has {key!r}: {values!r}, expected a name and a list")
    return sweep | {"base": base}


def are_seeds(values):
    is_list = isinstance(values, list) and values != []
    return is_list and all(type(seed) is int and 0 <= seed < 2**64 for seed in values)


class Plan:
    """The groups and runs of a sweep, and problems: a line for each thing that cannot be run.

    sweep: from read_sweep. flags: settings of train.py that override the file. out: the folder of
    the runs' folders. vocab_size_of: a function from a dataset to the vocabulary's size, which may
    raise InputError. Raises InputError if nothing can be run."""

    def __init__(self, sweep, flags, out, vocab_size_of):
        self.sweep, self.vocab_size_of = sweep, vocab_size_of
        base = {"sample_tokens": 0} | sweep["base"]
        self.config = base.pop("config")
        argv = [self.config, *as_flags(base), *flags]
        self.settings, given = configurator.read_settings(vars(train), argv, retired=RETIRED)
        self.forced = {key for key, source in given.items() if source in flags}
        if both := sorted((self.forced | set(base)) & SET_BY_SWEEP):
            raise InputError(f"{', '.join(both)}: the sweep itself sets that")
        if self.settings["init_from"] not in ("scratch", "auto", "resume", "upcycle"):
            raise InputError(f"{self.config} sets init_from; runs of a sweep start from scratch")
        # without retired settings, which are noted and dropped
        self.base = {key: self.settings[key] for key in given if key in self.forced | set(base)}
        self.problems = []
        self.named = self.name_runs()
        self.made = {}  # {name: Group}
        self.groups, self.runs = [], []
        for name in self.named:
            try:
                self.groups.append(self.make_group(name))
            except InputError as error:
                self.problems.append(f"run '{name}' is left out: {error}")
        for group in self.groups:
            name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", group.name)
            for seed in group.seeds:
                self.add_run(Run(group, seed, Path(out) / f"{name},seed={seed}"))

    def add_run(self, run):
        same = [other.group.name for other in self.runs if other.folder == run.folder]
        if not same:
            self.runs.append(run)
            return
        self.problems.append(
            f"run '{run.group.name}' with seed {run.seed} is left out: its folder {run.folder} is "
            f"also that of run '{same[0]}'"
        )

    def name_runs(self):
        """{name: own settings} of the runs, and of the grid's combinations."""
        named, grid = dict(self.sweep["runs"]), self.sweep["grid"]
        if empty := [key for key in grid if not grid[key]]:
            self.problems.append(f"the grid is empty: {', '.join(empty)} has no values")
        for values in itertools.product(*grid.values()) if grid else []:
            own = dict(zip(grid, values, strict=True))
            name = ",".join(f"{key}={value}" for key, value in own.items())
            if name in named:
                self.problems.append(f"run '{name}' of the grid is left out: that name is taken")
            else:
                named[name] = own
        return named

    def make_group(self, name, matched_by=()):
        """The Group of a name. matched_by: the names that wait for its size. Raises InputError."""
        if name in self.made:
            return self.made[name]
        own = dict(self.named[name])
        seeds = own.pop("seeds", self.sweep["seeds"])
        if not are_seeds(seeds):
            raise InputError(f"its seeds are {seeds!r}, expected whole numbers, like [1, 2, 3]")
        to = own.pop("match_to", self.sweep["baseline"])
        match = own.pop("match", self.sweep["match"] if name != to else "")
        defaults = {key: vars(train)[key] for key in self.settings}
        own = configurator.check_settings(own, defaults, f"run '{name}'", RETIRED)
        if both := sorted(set(own) & (SET_BY_SWEEP | self.forced)):
            raise InputError(f"it sets {', '.join(both)}, which the sweep itself or a flag sets")
        flags, settings = self.set_length(own)
        vocab_size = self.vocab_size_of(settings["dataset"])
        if match:
            if match not in MATCHABLE or to not in list(self.named) or to == name:
                expected = f"expected {', '.join(MATCHABLE)} of another run"
                raise InputError(f"it is to match {match} of '{to}', {expected}")
            if to in matched_by:
                raise InputError(f"it is to match '{to}', which is to match it")
            target = self.make_group(to, (*matched_by, name)).sizes[match]
            key, width = solve_width(settings, match, target, vocab_size)
            if key in own or key in self.forced:
                raise InputError(f"it sets {key}, but match '{match}' solves for it")
            flags[key] = settings[key] = width
        sizes = sizes_of(settings, vocab_size)
        remark = ""
        if match:
            remark = f"{match} of '{to}' {sizes[match] / target - 1:+.2%} with {key}={width}"
        self.made[name] = Group(name, self.config, flags, settings, sizes, remark, seeds)
        return self.made[name]

    def set_length(self, own):
        """A run's flags and all its settings, with max_iters worked out. Its own length goes before
        that of all runs. Raises InputError for settings that cannot work."""
        flags, settings = self.base | own, self.settings | own
        if settings["max_epochs"]:
            raise InputError("it sets max_epochs: in a sweep, give max_tokens or max_iters")
        if wrong := problems(settings, world_size=1):
            raise InputError("; ".join(wrong))
        strong = self.forced | set(own)
        given = {key: "--" if key in strong else "file" for key in flags}
        length = run_length(settings, given, windows_per_epoch=0)
        for name in LENGTHS:
            if name in flags and name != ("max_tokens" if length["max_tokens"] else "max_iters"):
                del flags[name]
        return flags, settings | length


def sizes_of(settings: dict, vocab_size: int) -> dict[str, float]:
    """Sizes of the model that the settings describe: MATCHABLE (FLOPs per token), and "memory", the
    estimated bytes of training. Raises InputError."""
    try:
        with torch.device("meta"):
            model = build_model(build_config(settings | {"vocab_size": vocab_size}))
    except ValueError as error:
        raise InputError(str(error)) from None
    compute_dtype = choose_dtype(settings["dtype"], choose_device(settings["device"], try_it=False))
    moments = num_moments(model, settings["optimizer"])
    return {
        "active_flops": model.flops_per_token(),
        "active_params": model.num_active_params(),
        "total_params": model.num_params(),
        "memory": sum(estimate_memory(model, moments, settings["batch_size"], compute_dtype)),
    }


def solve_width(settings: dict, quantity: str, target: float, vocab_size: int) -> tuple[str, int]:
    """(name, value) of the width setting that brings a quantity closest to the target. It is a
    multiple of 8, which grouped GEMMs need, or from 1024 on of 64, which GPUs multiply well."""
    key = "expert_dim" if settings["use_moe"] else "mlp_dim"
    # every quantity grows linearly with the width
    low = sizes_of(settings | {key: 8}, vocab_size)[quantity]
    high = sizes_of(settings | {key: 16}, vocab_size)[quantity]
    width = 8 + 8 * (target - low) / (high - low)
    unit = 8 if width < 1024 else 64
    return key, max(8, unit * round(width / unit))


def print_table(groups, runs, lanes, device):
    """The table of --dry_run."""
    row = "{:34.34s} {:>5} {:>5} {:>8} {:>8} {:>13} {:>8} {:>6}  {}"
    header = ("seeds", "done", "params", "active", "MFLOPs/token", "tokens", "GB", "matched")
    print(row.format("", *header))
    for group in groups:
        s, sizes = group.settings, group.sizes
        done = [run.share_done() == 1 for run in runs if run.group is group]
        params = [f"{sizes[key] / 1e6:.2f}M" for key in ("total_params", "active_params")]
        sequences = s["max_iters"] * s["gradient_accumulation_steps"] * s["batch_size"]
        length = f"{sequences * s['block_size'] / 1e6:,.1f}M"
        if s["max_seconds"]:
            length = f"{s['max_seconds']:,.0f} s"
        costs = [f"{sizes['active_flops'] / 1e6:,.2f}", length, f"{sizes['memory'] / 1e9:.2f}"]
        print(row.format(group.name, len(done), sum(done), *params, *costs, group.match).rstrip())
    print(f"{len(runs)} runs, {lanes} at a time on {device_name(device)}")
