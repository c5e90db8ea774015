"""
Measure speed: time per optimizer step, tokens per second, MFU and memory, on random tokens.

$ python -m tools.bench config/train_gpt2.py config/train_gpt2_moe.py --batch_size=12
$ python -m tools.bench --suite=gpt2
$ python -m tools.bench --suite=cpu --rows="dense,8 experts top-2"
$ python -m tools.bench config/train_gpt2_moe.py --layer=True

Each config file is a row of the table. So is each member of a suite: 'gpt2' holds the dense GPT-2
(124M) and MoE models like it, for a GPU; 'cpu' the same at 6 layers x 384, in float32 and bfloat16.
Settings of train.py can be given as flags and hold for all rows. A step is train.py's own, with one
micro-batch. The columns `time` and `FLOPs` are per token and relative to the first row. With
--layer=True it measures one MoE layer of each config instead, against the time that its matrix
products and memory traffic take at least.
"""

import contextlib
import gc
import json
import math
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.profiler import profile as torch_profile
from torch.utils import benchmark

import train
from configurator import InputError, configure, read_settings, split_argv
from model import fc_out_features
from moe_model import build_config, build_model
from nanomoe.device import (
    Timer,
    autocast,
    choose_compile,
    choose_device,
    choose_dtype,
    device_name,
    explain_out_of_memory,
    keep_freed_memory,
    limit_threads,
    speed,
    synchronized_time,
)
from nanomoe.errors import run_main
from nanomoe.init_from import Plan, Start, device_problems
from nanomoe.log import LOG, RunLog
from nanomoe.schedule import Schedule
from tools.run_logs import LoggedRun

# -----------------------------------------------------------------------------
# settings
suite = ""  # 'gpt2' or 'cpu' instead of config files
rows = ""  # only the rows whose name contains this text, or one of several: a,b
steps = 20  # timed steps of each row, after 3 steps to warm up
vocab_size = 0  # of the model and the random tokens; 0 = 50304 (suite cpu: 256). No dataset is read
layer = False  # not steps but a second of one MoE layer, forward and backward, against its floor
json_ = "bench.json"  # write the table to this file
profile = ""  # write a Chrome trace of a step of the last row here; print its heaviest kernels
targets = ""  # a folder of tools/gpu_day.sh: print its targets and what it measured, nothing else
# -----------------------------------------------------------------------------

WARMUP = 3
ENWIK8 = ("enwik8", "enwik8_moe")  # configs of tools/gpu_day.sh
E8, E64 = "8 experts top-2, equal FLOPs", "64 experts top-8, equal FLOPs"  # as the dense model
# relatives of a dense model: (experts, top_k): expert_dim
RELATIVES = {(8, 2): -1, (4, 1): 0, (8, 1): 0, (16, 1): 0, (16, 2): 0, (64, 8): -1}
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16}
SMALL |= {"vocab_size": 256}
SUITES = {  # dense models, by the end of their rows' names; the defaults of train.py are GPT-2's
    "gpt2": {"12 x 1024": {"batch_size": 12}, "48 x 1024": {"batch_size": 48}},
    "cpu": {dtype: SMALL | {"dtype": dtype} for dtype in ("bfloat16", "float32")},
}


def suite_rows(models):
    """{name: settings} of dense models and their relatives."""
    found = {}
    for suffix, dense in models.items():
        found[f"dense, {suffix}"] = dense
        for (num_experts, top_k), expert_dim in RELATIVES.items():
            name = f"{num_experts} experts top-{top_k}" + (", equal FLOPs" if expert_dim else "")
            moe = dense | {"use_moe": True, "num_experts": num_experts, "top_k": top_k}
            moe["expert_dim"] = expert_dim
            for impl in ("grouped", "loop"):
                found[f"{name}, {impl}, {suffix}"] = moe | {"expert_impl": impl}
    return found


def check(settings, config, device):
    if problems := device_problems(settings, config, device):
        raise InputError("; ".join(problems))


class Row:
    """A run of train.py on random tokens, and the seconds that its steps took."""

    def __init__(self, name, settings, device):
        self.name, self.settings, self.device = name, settings, device
        config = build_config(settings)
        check(settings, config, device)
        vars(train).update(settings)
        plan = Plan(settings, Start("scratch"), None, config, Schedule.of(settings), [])
        with device:  # weights are drawn there: on the CPU it takes long for a large model
            self.run = train.build_run(plan, device, RunLog(None))
        shape = (2, settings["batch_size"], config.block_size)  # tokens and targets
        windows = np.random.default_rng(0).integers(config.vocab_size, size=shape)
        self.run.reader = SimpleNamespace(next=lambda: (0, windows))
        self.run.saver = SimpleNamespace(changing=contextlib.nullcontext)
        self.run.timer = Timer(device)
        self.tokens_per_step = windows[0].size * settings["gradient_accumulation_steps"]
        self.flops = self.run.flops_per_token
        self.seconds = []

    def step(self):
        vars(train).update(self.settings)  # rows take turns
        start = synchronized_time(self.device)
        train.train_step(self.run)
        self.seconds.append(synchronized_time(self.device) - start)

    def result(self, first):
        """The row of the table as a dict; `time` and `flops` are relative to the Row `first`."""
        seconds, model, dtype = np.array(self.seconds), self.run.model, self.settings["dtype"]
        low, median, high = np.quantile(seconds[WARMUP:], [0.25, 0.5, 0.75])
        # a CPU's speed drifts, so its steps are compared one by one
        ratio = np.median((seconds / first.seconds[-len(seconds) :])[WARMUP:])
        on_gpu = self.device.type == "cuda"
        compiled = choose_compile(self.settings["compile"], self.device)
        return {
            "name": self.name,
            **speed(median, self.tokens_per_step, self.flops, self.device, 1, dtype),
            "spread_ms": (high - low) * 1e3,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
            "compile_s": max(0.0, self.seconds[0] - median) if compiled else None,
            "time": ratio * first.tokens_per_step / self.tokens_per_step,
            "flops": self.flops / first.flops,
            "params": model.num_params(),
            "active_params": model.num_active_params(),
            "flops_per_token": self.flops,
            "dtype": dtype,
            "steps": len(seconds) - WARMUP,
        }


def measure(settings_of, device):
    """Yield (Row, its result) for each name and settings.

    On a CPU every row's steps take turns with the first row's, because the speed drifts. On a GPU
    each row may need all the memory, so only the first row's figures are kept."""
    first = None
    for name, settings in settings_of.items():
        # rows share the code of their blocks, and torch keeps only a few compilations of one code
        torch.compiler.reset()
        row = None  # frees a row that did not fit into memory
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with explain_out_of_memory(settings):
                row = Row(name, settings, device)
                for _ in range(steps + WARMUP):
                    if first and device.type != "cuda":
                        first.step()
                    row.step()
        except (MemoryError, InputError) as error:
            print(f"{name:50s} {error}", flush=True)
            continue
        first = first or row
        yield row, row.result(first)
        if device.type == "cuda":
            row.run = None


# -----------------------------------------------------------------------------
# one layer


def measure_layer(name, settings, device):
    """Forward and backward of one MoE layer, as in the second micro-batch of a step: gradients are
    added to those that are there. Returns a result, times in ms."""
    config = build_config(settings | {"n_layer": 1, "moe_stride": 1, "num_dense_layers": 0})
    if not hasattr(config, "num_experts"):
        raise InputError(f"{name} has no experts: --layer=True measures MoE layers")
    check(settings, config, device)
    dtype = getattr(torch, settings["dtype"])
    with device:
        moe = build_model(config).train().transformer.h[0].mlp
        x = torch.randn(settings["batch_size"], config.block_size, config.n_embd)
        x.requires_grad_()
        gradient = torch.randn_like(x)
        coef = torch.tensor(config.expert_load_balance_loss_coef)
        n = 8192 if device.type == "cuda" else 1024
        a = torch.randn(n, n).to(dtype)
        source = torch.zeros(2**28 if device.type == "cuda" else 2**24)
    product, target = torch.empty_like(a), torch.empty_like(source)
    if choose_compile(settings["compile"], device):
        moe.compile()

    def run():
        with autocast(device, settings["dtype"]):
            out, routing = moe(x)
        torch.autograd.backward([out.float(), routing.balance_loss], [gradient, coef])

    flops, layer_bytes = layer_cost(config, x[..., 0].numel(), dtype.itemsize)
    # the speeds that the device reaches in a large product and in a copy
    flops_per_s = 2 * n**3 / median_seconds(lambda: torch.mm(a, a, out=product))
    bytes_per_s = 2 * source.nbytes / median_seconds(lambda: target.copy_(source))
    products, traffic = flops / flops_per_s * 1e3, layer_bytes / bytes_per_s * 1e3
    ms = median_seconds(run) * 1e3
    return {
        "name": name,
        "dtype": settings["dtype"],
        "tokens": x[..., 0].numel(),
        "ms": ms,
        "floor_ms": products + traffic,
        "of_floor": ms / (products + traffic),
        "products_ms": products,
        "traffic_ms": traffic,
    }


def layer_cost(config, tokens, size):
    """(FLOPs, bytes) that the experts of a layer need at least, forward and backward.

    Bytes are those outside of the matrix products, with activations of `size` bytes: gathering the
    experts' rows, the activation, the sum over a token's experts, and their gradients; and what
    float32 weights cost: cast, and their gradient cast and added."""
    assignments = tokens * (config.top_k + config.num_shared_experts)
    D, H = config.n_embd, config.expert_hidden_dim
    F = fc_out_features(config.mlp, H)
    weights = (config.num_experts + config.num_shared_experts) * D * (F + H)
    flops = 6 * assignments * D * (F + H)
    numbers = 4 * tokens * D + 4 * assignments * D + assignments * (3 * F + 2 * H)
    per_weight = 24 if size == 2 else 12
    return flops, numbers * size + per_weight * weights


def median_seconds(run):
    """The median seconds of a run(), over a second of runs after a warm-up. Where a run is short,
    several are timed together: then the clock, and waiting for the last kernel, count little."""
    for _ in range(WARMUP):
        run()
    timer = benchmark.Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=1).median


# -----------------------------------------------------------------------------
# targets


def targets_of(folder):
    """What tools/gpu_day.sh wants of a GPU: rows (what, target, measured) from the files that it
    has left in a folder. What was not measured is NaN."""
    found = {}
    for name in ("bench.json", "layer.json"):
        with contextlib.suppress(OSError):
            found |= {row["name"]: row for row in json.loads((folder / name).read_text())["rows"]}

    def at(name, key):
        return found.get(name, {}).get(key) or math.nan

    for end in SUITES["gpt2"]:
        dense, moe = f"dense, {end}", f"{E8}, grouped, {end}"
        yield f"{E8}, {end}: ms of dense", "<= 1.15", at(moe, "ms") / at(dense, "ms")
        yield "  its MFU", ">= 0.40", at(moe, "mfu")
        # 16 bytes per parameter: weight, gradient and AdamW's two moments
        extra = 16e-9 * (at(moe, "params") - at(dense, "params"))
        memory = at(moe, "memory_gb") / (at(dense, "memory_gb") + extra)
        yield "  its memory, of dense with its extra state", "<= 1.25", memory
        for name, target in (("16 experts top-2", ">= 3"), (E64, ">= 8")):
            loop, grouped = (at(f"{name}, {impl}, {end}", "ms") for impl in ("loop", "grouped"))
            yield f"{name}, {end}: loop / grouped", target, loop / grouped
    yield "one MoE layer: ms of its floor", "<= 1.4", at("train_gpt2_moe", "of_floor")
    for optimizer in ("adamw", "muon"):
        dense, moe = (evaluations(folder / "enwik8" / f"{name}-{optimizer}") for name in ENWIK8)
        seconds, loss = dense[:, -1]
        what = f"enwik8, {optimizer}: MoE's seconds to dense's last loss, of dense's"
        yield what, "<= 0.7", seconds_to(loss, *moe) / seconds


def evaluations(out_dir):
    """Seconds and validation losses of a finished run, two arrays; NaN of one that is not."""
    with contextlib.suppress(OSError):
        run = LoggedRun(out_dir / LOG)
        if run.state == "finished":
            return np.array([(e["seconds"], e["val_loss"]) for e in run.evals.values()]).T
    return np.full((2, 1), math.nan)


def seconds_to(loss, seconds, losses):
    """When a run first came down to a loss, in a straight line between its evaluations; or
    infinity."""
    lowest = np.minimum.accumulate(losses)
    return np.interp(loss, lowest[::-1], seconds[::-1], left=math.inf)


# -----------------------------------------------------------------------------
# output

# key of a result, heading, format
COLUMNS = [("ms", "ms", ".1f"), ("spread_ms", "spread", ".1f")]
COLUMNS += [("tokens_per_s", "tokens/s", ",.0f"), ("mfu", "MFU", ".1%")]
COLUMNS += [("memory_gb", "GB", ".1f"), ("compile_s", "compile", ".0f")]
COLUMNS += [("time", "time", ".2f"), ("flops", "FLOPs", ".2f")]
LAYER_COLUMNS = [("ms", "ms", ".3f"), ("floor_ms", "floor", ".3f"), ("of_floor", "of floor", ".2f")]
LAYER_COLUMNS += [("products_ms", "products", ".3f"), ("traffic_ms", "traffic", ".3f")]


def print_row(name, cells):
    print(f"{name:50s}", *(f"{cell:>9s}" for cell in cells), flush=True)


def write_profile(row):
    """Write a Chrome trace of one step; print the ten heaviest kernels (on a CPU, operators)."""
    with torch_profile() as trace:
        row.step()
    trace.export_chrome_trace(profile)
    key = f"self_{'device' if row.device.type == 'cuda' else 'cpu'}_time_total"
    print(trace.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=70))


def rows_to_measure(flags, configs):
    """{name: settings} of the table's rows, and their device."""
    if suite and suite not in SUITES:
        raise InputError(f"suite is '{suite}', expected one of {', '.join(SUITES)}")
    if not suite and not configs:
        raise InputError("nothing to measure: give config files, --suite=gpt2 or --suite=cpu")
    defaults = dict(vars(train))
    settings, given = read_settings(defaults, flags, retired=train.RETIRED)
    device = choose_device(settings["device"])
    found = suite_rows(SUITES[suite]) if suite else {}
    for path in configs:
        found[Path(path).stem] = read_settings(defaults, [path], retired=train.RETIRED)[0]
    forced = {"gradient_accumulation_steps": 1} | {key: settings[key] for key in given}
    if vocab_size:
        forced["vocab_size"] = vocab_size
    settings_of = {}
    for name, row in found.items():
        if any(part in name for part in rows.split(",")):
            row = settings | {"vocab_size": 50304} | row | forced
            settings_of[name] = row | {"dtype": choose_dtype(row["dtype"], device)}
    if not settings_of:
        raise InputError(f"no row has '{rows}' in its name")
    return settings_of, device


def main():
    own, flags, configs = split_argv(globals())
    configure(globals(), own)
    if targets:
        for what, target, value in targets_of(Path(targets)):
            print(
                f"{what:64s} {target:>8s}  ", "not measured" if value != value else f"{value:.2f}"
            )
        return
    if steps < 2:
        raise InputError(f"steps is {steps}, expected at least 2")
    if layer and profile:
        raise InputError("--layer=True makes no profile")
    limit_threads()
    keep_freed_memory()
    settings_of, device = rows_to_measure(flags, configs)
    about = {
        "machine": device_name(device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "tools.bench", *sys.argv[1:]]),
    }
    columns = LAYER_COLUMNS if layer else COLUMNS
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print_row("", [heading for _, heading, _ in columns])
    found = measure(settings_of, device)
    if layer:
        found = ((None, measure_layer(name, row, device)) for name, row in settings_of.items())
    results = []
    for row, result in found:
        results.append(result)
        cells = [(result[key], form) for key, _, form in columns]
        print_row(result["name"], ["" if x is None else format(x, form) for x, form in cells])
        # after each row, so that a failure of the next one loses nothing
        Path(json_).write_text(json.dumps(about | {"rows": results}, indent=1))
        if profile and result["name"] == list(settings_of)[-1]:
            write_profile(row)


if __name__ == "__main__":
    run_main(main)
