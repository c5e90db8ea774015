"""
Measure speed: time per optimizer step, tokens per second, MFU and memory, on random tokens.

$ python -m tools.bench config/train_gpt2.py config/train_gpt2_moe.py --batch_size=12
$ python -m tools.bench --suite=gpt2
$ python -m tools.bench --suite=cpu --rows="dense,8 experts top-2"
$ python -m tools.bench config/train_gpt2_moe.py --layer=True

Each config file is a row of the table. So is each member of a suite: 'gpt2' holds the dense GPT-2
(124M) and MoE models like it, for a GPU; 'cpu' the same at 6 layers x 384, in float32 and bfloat16.
Settings of train.py can be given as flags and hold for all rows. The columns `time` and `FLOPs` are
per token and relative to the first row. With --layer=True it measures one MoE layer of each config
instead, against the time that its matrix products and memory traffic take at least.
"""

import gc
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

import train
from configurator import InputError, configure, split_argv
from model import fc_out_features
from moe_model import build_config, build_model, expert_impl_problem
from nanomoe.device import (
    autocast,
    choose_compile,
    choose_device,
    choose_dtype,
    device_name,
    keep_freed_memory,
    limit_threads,
    peak_flops,
    synchronized_time,
)
from nanomoe.errors import run_main
from nanomoe.optim import build_optimizer
from tools.figures import BLUE, GREY, ORANGE, new_figure

# -----------------------------------------------------------------------------
# settings
suite = ""  # 'gpt2' or 'cpu' instead of config files
rows = ""  # only the rows whose name contains this text, or one of several: a,b
steps = 20  # timed steps of each row, after 3 steps to warm up
vocab_size = 0  # of the model and the random tokens; 0 = 50304 (suite cpu: 256). No dataset is read
layer = False  # one MoE layer, forward and backward, against its floor, instead of a whole step
json_ = "bench.json"  # write the table to this file
picture = ""  # draw the rows' times to this PNG file
profile = ""  # write a Chrome trace of a step of the last row here; print its heaviest kernels
# -----------------------------------------------------------------------------

WARMUP = 3
# relatives of a dense model: experts, top_k, and whether their FLOPs equal the dense model's
RELATIVES = ((8, 2, True), (4, 1, False), (8, 1, False), (16, 1, False), (16, 2, False))
RELATIVES += ((64, 8, True),)
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
        for num_experts, top_k, equal_flops in RELATIVES:
            name = f"{num_experts} experts top-{top_k}"
            moe = dense | {"use_moe": True, "num_experts": num_experts, "top_k": top_k}
            if equal_flops:
                name += ", equal FLOPs"
                moe["expert_dim"] = -1
            for impl in ("grouped", "loop"):
                found[f"{name}, {impl}, {suffix}"] = moe | {"expert_impl": impl}
    return found


def set_up_torch(config, settings, device):
    """As train.py does. Returns the precision's name and whether to compile; raises InputError if
    the model of this config cannot run so."""
    dtype = choose_dtype(settings["dtype"], device)
    compiled = choose_compile(settings["compile"], device)
    if problem := expert_impl_problem(config, device.type, getattr(torch, dtype), compiled):
        raise InputError(problem)
    torch.set_float32_matmul_precision("high" if dtype == "float32" else "highest")
    torch.manual_seed(settings["seed"])
    return dtype, compiled


class Row:
    """A model and its optimizer. step() does and times what train.py does in a step."""

    def __init__(self, name, settings, device):
        self.name, self.device = name, device
        self.max_norm = settings["grad_clip"] or math.inf
        config = build_config(settings)
        self.compute_dtype, self.compiled = set_up_torch(config, settings, device)
        with device:
            self.model = build_model(config).train()
        if self.compiled:
            self.model.compile_parts()
        rates = settings["learning_rate"], settings["weight_decay"]
        betas = settings["beta1"], settings["beta2"]
        self.optimizer = build_optimizer(
            self.model, settings["optimizer"], *rates, betas, device.type
        )
        shape = (settings["batch_size"], config.block_size + 1)
        self.tokens = torch.randint(config.vocab_size, shape, device=device)
        self.tokens_per_step = settings["batch_size"] * config.block_size
        self.flops = self.model.flops_per_token()
        self.seconds = []

    def step(self):
        start = synchronized_time(self.device)
        with autocast(self.device, self.compute_dtype):
            loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_balance(self.model.stats)
        self.seconds.append(synchronized_time(self.device) - start)

    def result(self, first):
        """The row of the table as a dict; `time` and `flops` are relative to the Row `first`."""
        seconds = self.seconds[WARMUP:]
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4)
        # a CPU's speed drifts, so its steps are compared one by one
        pairs = zip(seconds, first.seconds[-len(seconds) :], strict=True)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        result = {
            "name": self.name,
            "ms": median * 1e3,
            "spread_ms": (high - low) * 1e3,
            "tokens_per_s": self.tokens_per_step / median,
            "mfu": None,
            "memory_gb": None,
            "compile_s": None,
            "time": ratio * first.tokens_per_step / self.tokens_per_step,
            "flops": self.flops / first.flops,
            "params": self.model.num_params(),
            "active_params": self.model.num_active_params(),
            "flops_per_token": self.flops,
            "dtype": self.compute_dtype,
            "steps": len(seconds),
        }
        peak = peak_flops(self.device)
        if peak and self.compute_dtype == "bfloat16":
            result["mfu"] = result["tokens_per_s"] * self.flops / peak
        if self.device.type == "cuda":
            result["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if self.compiled:
            result["compile_s"] = max(0.0, self.seconds[0] - median)
        return result


def measure(settings_of, device):
    """Yield (Row, its result) for each name and settings.

    On a CPU every row's steps take turns with the first row's, because the speed drifts. On a GPU
    each row may need all the memory, so only the first row's figures are kept.
    """
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
            row = Row(name, settings, device)
            for _ in range(steps + WARMUP):
                if first and device.type != "cuda":
                    first.step()
                row.step()
        except torch.OutOfMemoryError:
            print(f"{name:50s} out of memory", flush=True)
            continue
        except InputError as error:
            print(f"{name:50s} {error}", flush=True)
            continue
        first = first or row
        yield row, row.result(first)
        if device.type == "cuda":
            row.model = row.optimizer = None


# -----------------------------------------------------------------------------
# one layer


def measure_layer(name, settings, device):
    """Forward and backward of one MoE layer, as in the second micro-batch of a step: gradients are
    added to those that are there. Returns a result, times in ms."""
    config = build_config(settings | {"n_layer": 1, "moe_stride": 1, "num_dense_layers": 0})
    if not hasattr(config, "num_experts"):
        raise InputError(f"{name} has no experts: --layer=True measures MoE layers")
    dtype, compiled = set_up_torch(config, settings, device)
    with device:
        moe = build_model(config).train().transformer.h[0].mlp
        x = torch.randn(settings["batch_size"], config.block_size, config.n_embd)
        x.requires_grad_()
        gradient = torch.randn_like(x)
        coef = torch.tensor(config.expert_load_balance_loss_coef)
    if compiled:
        moe.compile()

    def run():
        with autocast(device, dtype):
            out, routing = moe(x)
        torch.autograd.backward([out.float(), routing.balance_loss], [gradient, coef])

    tokens = settings["batch_size"] * config.block_size
    flops, layer_bytes = layer_cost(config, tokens, getattr(torch, dtype).itemsize)
    flops_per_s, bytes_per_s = device_speed(device, getattr(torch, dtype))
    products, traffic = flops / flops_per_s * 1e3, layer_bytes / bytes_per_s * 1e3
    ms = median_seconds(run, device, steps) * 1e3
    return {
        "name": name,
        "dtype": dtype,
        "tokens": tokens,
        "ms": ms,
        "floor_ms": products + traffic,
        "products_ms": products,
        "traffic_ms": traffic,
        "of_floor": ms / (products + traffic),
        "tflop_per_s": flops_per_s / 1e12,
        "gb_per_s": bytes_per_s / 1e9,
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
    rows = 4 * tokens * D + 4 * assignments * D + assignments * (3 * F + 2 * H)
    per_weight = 24 if size == 2 else 12
    return flops, rows * size + per_weight * weights


def device_speed(device, dtype):
    """(FLOP/s, bytes/s) that the device reaches in a large matrix product and in a copy."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device).to(dtype)
    target = torch.empty_like(a)
    product = median_seconds(lambda: torch.mm(a, a, out=target), device, 10)
    source = torch.zeros(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, 10)
    return 2 * n**3 / product, 2 * source.nbytes / copy


def median_seconds(run, device, count):
    """The median seconds of a run() over `count` measurements, after a warm-up. On a GPU each
    measurement is of ten runs, so that waiting for the last kernel counts little."""
    repeats = 10 if device.type == "cuda" else 1
    for _ in range(WARMUP):
        run()
    seconds = []
    for _ in range(count):
        start = synchronized_time(device)
        for _ in range(repeats):
            run()
        seconds.append((synchronized_time(device) - start) / repeats)
    return statistics.median(seconds)


# -----------------------------------------------------------------------------
# output

# key of a result, heading, format
COLUMNS = [
    ("ms", "ms", ".1f"),
    ("spread_ms", "spread", ".1f"),
    ("tokens_per_s", "tokens/s", ",.0f"),
]
COLUMNS += [("mfu", "MFU", ".1%"), ("memory_gb", "GB", ".1f"), ("compile_s", "compile", ".0f")]
COLUMNS += [("time", "time", ".2f"), ("flops", "FLOPs", ".2f")]
LAYER_COLUMNS = [("ms", "ms", ".3f"), ("floor_ms", "floor", ".3f"), ("of_floor", "of floor", ".2f")]
LAYER_COLUMNS += [("products_ms", "products", ".3f"), ("traffic_ms", "traffic", ".3f")]
LAYER_COLUMNS += [("tflop_per_s", "TFLOP/s", ".2f"), ("gb_per_s", "GB/s", ",.0f")]


def columns():
    return LAYER_COLUMNS if layer else COLUMNS


def cells(result, columns):
    """A result as texts; what was not measured is empty."""
    return ["" if result[key] is None else format(result[key], form) for key, _, form in columns]


def print_result(result):
    line = f"{result['name']:50s}"
    for cell in cells(result, columns()):
        line += f" {cell:>9s}"
    print(line, flush=True)


def write_profile(row):
    """Write a Chrome trace of one step; print the ten heaviest kernels (on a CPU, operators)."""
    activities, key = [ProfilerActivity.CPU], "self_cpu_time_total"
    if row.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        key = "self_device_time_total"
    with torch_profile(activities=activities) as trace:
        row.step()
    trace.export_chrome_trace(profile)
    print(trace.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=70))


def draw(about, results):
    """Bars of the time per token, with a mark where the FLOPs alone would put each bar's end."""
    figure, axes = new_figure(1, 1, height=0.8 + 0.26 * len(results))
    ax = axes[0, 0]
    names = [result["name"] for result in results]
    colours = [BLUE if "dense" in name else ORANGE for name in names]
    ax.barh(names, [result["time"] for result in results], color=colours)
    flops = [result["flops"] for result in results]
    ax.plot(flops, names, "|", color=GREY, markersize=12, label="expected from FLOPs")
    ax.invert_yaxis()
    measured = f"{about['machine']}, torch {about['torch']}, {about['date']}"
    ax.set_xlabel(f"time per token, '{names[0]}' = 1\n{measured}")
    ax.legend()
    figure.savefig(picture)


def main():
    own, flags, configs = split_argv(globals())
    configure(globals(), own)
    if steps < 2:
        raise InputError(f"steps is {steps}, expected at least 2")
    if suite and suite not in SUITES:
        raise InputError(f"suite is '{suite}', expected one of {', '.join(SUITES)}")
    if layer and (picture or profile):
        raise InputError("--layer=True makes no picture and no profile")
    if not suite and not configs:
        raise InputError("nothing to measure: give config files, --suite=gpt2 or --suite=cpu")
    limit_threads()
    settings, given = configure(dict(vars(train)), flags, retired=train.RETIRED)
    device = choose_device(settings["device"])
    if device.type == "cpu":
        keep_freed_memory()
    forced = {key: settings[key] for key in given}
    if vocab_size:
        forced["vocab_size"] = vocab_size
    found = suite_rows(SUITES[suite]) if suite else {}
    for path in configs:
        found[Path(path).stem] = configure(dict(vars(train)), [path], retired=train.RETIRED)[0]
    settings_of = {}
    for name, row in found.items():
        if any(part in name for part in rows.split(",")):
            settings_of[name] = settings | {"vocab_size": 50304} | row | forced
    if not settings_of:
        raise InputError(f"no row has '{rows}' in its name")
    about = {
        "machine": device_name(device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "tools.bench", *sys.argv[1:]]),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(" " * 50 + "".join(f" {heading:>9s}" for _, heading, _ in columns()))
    results = []
    found = measure(settings_of, device)
    if layer:
        found = ((None, measure_layer(name, row, device)) for name, row in settings_of.items())
    for row, result in found:
        results.append(result)
        print_result(result)
        # after each row, so that a failure of the next one loses nothing
        Path(json_).write_text(json.dumps(about | {"rows": results}, indent=1))
        if profile and result["name"] == list(settings_of)[-1]:
            write_profile(row)
    if picture and results:
        draw(about, results)


if __name__ == "__main__":
    run_main(main)
