"""
How fast: time per optimizer step, tokens per second, MFU and memory of configs side by side, on random tokens.

$ python -m tools.bench config/train_gpt2.py config/train_gpt2_moe.py --batch_size=12
$ python -m tools.bench --suite=cpu
$ python -m tools.bench --suite=layer --n_embd=768 --num_experts=8 --batch_size=12

Suites: gpt2 (dense GPT-2 124M and its MoE relatives, for a GPU), cpu (the same at 6 layers x 384, in float32 and bfloat16),
layer (one MoE layer, taken apart, against the floor that its FLOPs and bytes set on this machine). Every setting of train.py
can be given and holds for all rows. Own options:
  --suite=NAME      instead of config files
  --rows=TEXT       only the rows whose name contains TEXT (several, separated by commas)
  --steps=N         timed steps of each row, after 3 to warm up (default 20)
  --vocab_size=N    of the random tokens and the model (default 50304; a dataset's own is not read)
  --json=PATH       write the table there, too (default: bench.json in the current folder)
  --picture=PATH    draw the rows' times there, as a PNG
  --profile=PATH    write a Chrome trace of the last row's step there and print its ten heaviest kernels
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from configurator import InputError, configure, run_main
from moe_model import build_config, build_model
from nanomoe.device import (
    autocast,
    choose_compile,
    choose_device,
    choose_dtype,
    device_name,
    limit_threads,
    peak_flops,
    synchronized_time,
)
from tools import layer

MOE = {"use_moe": True}
RELATIVES = {  # of a dense model
    "8 experts top-2, equal FLOPs": MOE | {"num_experts": 8, "top_k": 2, "expert_dim": -1},
    "4 experts top-1": MOE | {"num_experts": 4, "top_k": 1},
    "8 experts top-1": MOE | {"num_experts": 8, "top_k": 1},
    "16 experts top-1": MOE | {"num_experts": 16, "top_k": 1},
    "16 experts top-2": MOE | {"num_experts": 16, "top_k": 2},
    "64 experts top-8, equal FLOPs": MOE | {"num_experts": 64, "top_k": 8, "expert_dim": -1},
}


def family(base, impls, **more):
    """A dense row and its relatives, each with these implementations of the experts: {name: settings}."""
    rows = {"dense": base}
    for name, settings in RELATIVES.items():
        rows |= {f"{name}, {impl}": base | settings | {"expert_impl": impl} for impl in impls}
    suffix = "".join(
        f", {value}" if key == "dtype" else f", {value} x {base['block_size']}"
        for key, value in more.items()
    )
    return {name + suffix: settings | more for name, settings in rows.items()}


GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": False}
SMALL = {
    "n_layer": 6,
    "n_head": 6,
    "n_embd": 384,
    "block_size": 256,
    "batch_size": 16,
    "bias": False,
    "vocab_size": 256,
}
GPU, CPU = ("grouped", "loop"), ("split", "loop", "grouped")
SUITES = {
    "gpt2": family(GPT2, GPU, batch_size=12) | family(GPT2, GPU, batch_size=48),
    "cpu": family(SMALL, CPU, dtype="bfloat16") | family(SMALL, CPU, dtype="float32"),
}


class Row:
    """One model and its optimizer; step() is what train.py does for a micro-batch and an update, timed."""

    def __init__(self, name, settings, device):
        self.name, self.device, self.batch_size = name, device, settings["batch_size"]
        self.compute_dtype = choose_dtype(settings["dtype"], device)
        torch.set_float32_matmul_precision(
            "high" if self.compute_dtype == "float32" else "highest"
        )  # as train.py
        torch.manual_seed(settings["seed"])
        with device:
            self.model = build_model(build_config(settings)).train()
        self.compiled = choose_compile(settings["compile"], device)
        if self.compiled:
            self.model.compile_parts()
        self.optimizer = self.model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
        self.grad_clip, c = settings["grad_clip"], self.model.config
        self.tokens = torch.randint(
            c.vocab_size, (self.batch_size, c.block_size + 1), device=device
        )
        self.seconds = []

    def step(self):
        start = synchronized_time(self.device)
        with autocast(self.device, self.compute_dtype):
            loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])[1]
        loss.backward()
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_balance(self.model.stats)
        self.seconds.append(synchronized_time(self.device) - start)

    def free(self):
        self.model, self.optimizer = self.model.to("meta"), None

    def result(self, first):
        """The figures as a dict; `time`, per token, relative to `first`, on a CPU step by step."""
        start, *seconds = self.seconds
        seconds, c = seconds[2:], self.model.config
        median, flops = statistics.median(seconds), self.model.flops_per_token()
        tokens, peak = self.batch_size * c.block_size, peak_flops(self.device)
        quartiles = statistics.quantiles(seconds, n=4)
        pairs = zip(seconds, first.seconds[-len(seconds) :], strict=True)
        return {
            "name": self.name,
            "ms": median * 1e3,
            "spread_ms": (quartiles[2] - quartiles[0]) * 1e3,
            "tokens_per_s": tokens / median,
            "mfu": tokens * flops / median / peak
            if peak and self.compute_dtype == "bfloat16"
            else None,
            "memory_gb": torch.cuda.max_memory_allocated() / 1e9
            if self.device.type == "cuda"
            else None,
            "compile_s": max(0.0, start - median) if self.compiled else None,
            "time": statistics.median(a / b for a, b in pairs)
            * first.batch_size
            * first.model.config.block_size
            / tokens,
            "flops": flops / first.model.flops_per_token(),
            "params": self.model.num_params(),
            "active_params": self.model.num_active_params(),
            "flops_per_token": flops,
            "dtype": self.compute_dtype,
            "steps": len(seconds),
        }


def measure(rows, settings, steps, device):
    """Yield each Row and its result. On a CPU, whose speed drifts, the first one is stepped beside every other; on a GPU only
    its figures stay, because each may need all the memory."""
    first = None
    for name, own in rows.items():
        torch.compiler.reset()  # blocks of all rows share their code, and only a few compilations of one code are kept
        row = None
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            row = Row(name, settings | own, device)
            for _ in range(steps + 3):
                if first and device.type != "cuda":
                    first.step()
                row.step()
        except torch.OutOfMemoryError:
            print(f"{name:44s} does not fit the memory", flush=True)
        else:
            first = first or row
            yield row, row.result(first)
        if device.type == "cuda":
            if row:
                row.free()
            gc.collect()
            torch.cuda.empty_cache()


HEADER = (
    f"{'':44s} {'ms':>9s} {'spread':>8s} {'tokens/s':>10s} "
    f"{'mfu':>6s} {'GB':>6s} {'compile':>8s} {'time':>6s} {'FLOPs':>6s}"
)


def line(r):
    """A result as a line of the table; the last two columns are ratios to the first row's, per token."""

    def text(value, form):
        return format(value, form) if value is not None else ""

    return (
        f"{r['name']:44s} {r['ms']:9.1f} {r['spread_ms']:8.1f} {r['tokens_per_s']:10,.0f} {text(r['mfu'], '.1%'):>6s} "
        f"{text(r['memory_gb'], '.1f'):>6s} {text(r['compile_s'], '.0f'):>8s} {r['time']:6.2f} {r['flops']:6.2f}"
    )


def write_profile(row, path):
    """A Chrome trace of one step, and the ten heaviest kernels (or, on a CPU, operators)."""
    cuda = row.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
        row.step()
        synchronized_time(row.device)
    trace.export_chrome_trace(str(path))
    print(
        trace.key_averages().table(
            sort_by=f"self_{'device' if cuda else 'cpu'}_time_total",
            row_limit=10,
            max_name_column_width=70,
        )
    )


def picture(about, results, path):
    """Bars of the time per token relative to the first row, and a mark where its FLOPs would put it."""
    from matplotlib import pyplot  # late: only for those who use it

    grey = "#808080"  # readable on light and dark pages
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.26 * len(results)))
    names, positions = [r["name"] for r in results], range(len(results))
    axes.barh(
        positions,
        [r["time"] for r in results],
        color=["#4c8dbf" if "dense" in name else "#d98a3d" for name in names],
    )
    axes.plot(
        [r["flops"] for r in results],
        positions,
        "|",
        color=grey,
        markersize=12,
        label="as its FLOPs",
    )
    axes.set_yticks(positions, names, fontsize=9)
    axes.invert_yaxis()
    where = f"{about['machine']}, torch {about['torch']}, {about['date']}"
    axes.set_xlabel(f"time per token, '{names[0]}' = 1\n{where}", color=grey)
    axes.legend(frameon=False, labelcolor=grey)
    axes.tick_params(colors=grey)
    axes.spines[:].set_visible(False)
    figure.savefig(path, dpi=120, bbox_inches="tight", transparent=True)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("--suite", choices=[*SUITES, "layer"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", default="", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=20, help=argparse.SUPPRESS)
    parser.add_argument("--vocab_size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", default="bench.json", help=argparse.SUPPRESS)
    parser.add_argument("--picture", help=argparse.SUPPRESS)
    parser.add_argument("--profile", help=argparse.SUPPRESS)
    own, rest = parser.parse_known_args()
    if own.steps < 2:
        raise InputError(f"--steps is {own.steps}, expected at least 2")
    limit_threads()
    flags = [arg for arg in rest if arg.startswith("--")]
    settings, given = configure(dict(vars(train)), flags)
    rows = (
        SUITES.get(own.suite, {})
        if own.suite
        else {
            Path(path).stem: configure(dict(vars(train)), [path])[0]
            for path in rest
            if path not in flags
        }
    )
    forced = {key: settings[key] for key in given} | (
        {"vocab_size": own.vocab_size} if own.vocab_size else {}
    )
    rows = {
        name: {"vocab_size": 50304} | row | forced
        for name, row in rows.items()
        if any(part in name for part in own.rows.split(","))
    }
    if own.suite != "layer" and not rows:
        raise InputError(
            f"no row has '{own.rows}' in its name; give config files or --suite"
            if own.rows or own.suite
            else "nothing to measure: give config files, or --suite=gpt2, cpu or layer"
        )
    device = choose_device(settings["device"])
    about = {
        "machine": device_name(device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m tools.bench " + " ".join(sys.argv[1:]),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = []

    def write():
        Path(own.json).write_text(json.dumps(about | {"rows": results}, indent=1))

    if own.suite == "layer":
        results = layer.measure(settings, own.steps, device)
    else:
        print(HEADER)
        for row, result in measure(rows, settings, own.steps, device):
            results.append(result)
            print(line(result), flush=True)
            write()  # what is measured so far, should the next row come to nothing
            if own.profile and result["name"] == list(rows)[-1]:
                write_profile(row, own.profile)
        if own.picture:
            picture(about, results, own.picture)
    write()


if __name__ == "__main__":
    run_main(main)
