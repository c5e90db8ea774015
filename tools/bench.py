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
from configurator import InputError, configure, run
from device import autocast, choose_compile, choose_device, choose_dtype, describe, now, peak_flops
from moe_model import MoE, MoveRows, build_config, build_model, sort_by_expert

MOE = {"use_moe": True}
RELATIVES = {  # of a dense model
    "8 experts top-2, equal FLOPs": MOE | {"num_experts": 8, "top_k": 2, "expert_dim": -1},
    "4 experts top-1": MOE | {"num_experts": 4, "top_k": 1},
    "8 experts top-1": MOE | {"num_experts": 8, "top_k": 1},
    "16 experts top-1": MOE | {"num_experts": 16, "top_k": 1},
    "16 experts top-2": MOE | {"num_experts": 16, "top_k": 2},
    "64 experts top-8, equal FLOPs": MOE | {"num_experts": 64, "top_k": 8, "expert_dim": -1},
}


def family(base, **more):
    """A dense row and its relatives, each with both implementations of the experts: {name: settings}."""
    rows = {"dense": base}
    for name, settings in RELATIVES.items():
        rows |= {f"{name}, {impl}": base | settings | {"expert_impl": impl} for impl in ("grouped", "loop")}
    suffix = "".join(f", {value}" if key == "dtype" else f", {value} x {base['block_size']}" for key, value in more.items())
    return {name + suffix: settings | more for name, settings in rows.items()}


GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": False}
SMALL = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 16, "bias": False, "vocab_size": 256}
SUITES = {
    "gpt2": family(GPT2, batch_size=12) | family(GPT2, batch_size=48),
    "cpu": family(SMALL, dtype="bfloat16") | family(SMALL, dtype="float32"),
}


class Row:
    """One model and its optimizer; step() is what train.py does for a micro-batch and an update, timed."""

    def __init__(self, name, settings, device):
        self.name, self.device, self.batch_size = name, device, settings["batch_size"]
        self.precise = choose_dtype(settings["dtype"], device)
        torch.manual_seed(settings["seed"])
        with device:
            self.model = build_model(build_config(settings)).train()
        self.compiled = choose_compile(settings["compile"], device)
        if self.compiled:
            self.model.compile_parts()
        self.optimizer = self.model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device.type)
        self.grad_clip, c = settings["grad_clip"], self.model.config
        self.tokens = torch.randint(c.vocab_size, (self.batch_size, c.block_size + 1), device=device)
        self.seconds = []

    def step(self):
        start = now(self.device)
        with autocast(self.device, self.precise):
            _, loss = self.model(self.tokens[:, :-1], self.tokens[:, 1:])
        loss.backward()
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.after_step(self.model.stats)
        self.seconds.append(now(self.device) - start)

    def result(self):
        first, *rest = self.seconds
        rest, c = rest[2:], self.model.config
        ms, flops = statistics.median(rest) * 1e3, self.model.flops_per_token()
        tokens, peak = self.batch_size * c.block_size, peak_flops(self.device)
        quartiles = statistics.quantiles(rest, n=4)
        return {"name": self.name, "ms": ms, "spread_ms": (quartiles[2] - quartiles[0]) * 1e3,
                "tokens_per_s": tokens / ms * 1e3,
                "mfu": tokens * flops / (ms / 1e3) / peak if peak and self.precise == "bfloat16" else None,
                "memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None,
                "compile_s": max(0.0, first - ms / 1e3) if self.compiled else None,
                "params": self.model.num_params(), "active_params": self.model.num_active_params(), "flops_per_token": flops,
                "dtype": self.precise, "steps": len(rest)}


def measure(rows, settings, steps, device):
    """Time the rows: on a CPU in turns, step by step, because its speed drifts; on a GPU one after the other, because each may
    need all its memory. Returns their results and the last Row."""
    results, live = [], []
    for name, own in rows.items():
        live.append(Row(name, settings | own, device))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            for _ in range(steps + 3):
                live[0].step()
            results.append(live[0].result())
            print(line(results[-1], results[0]), flush=True)
            last = live.pop()
            if len(results) < len(rows):
                del last
                gc.collect()
                torch.cuda.empty_cache()
    if live:
        for _ in range(steps + 3):
            for row in live:
                row.step()
        results, last = [row.result() for row in live], live[-1]
        print("\n".join(line(r, results[0]) for r in results), flush=True)
    return results, last


HEADER = (f"{'':44s} {'ms':>9s} {'spread':>8s} {'tokens/s':>10s} "
          f"{'mfu':>6s} {'GB':>6s} {'compile':>8s} {'time':>6s} {'FLOPs':>6s}")


def line(r, first):
    """A result as a line of the table; the last two columns are ratios to the first row's, per token."""
    def text(value, form):
        return format(value, form) if value is not None else ""
    return (f"{r['name']:44s} {r['ms']:9.1f} {r['spread_ms']:8.1f} {r['tokens_per_s']:10,.0f} {text(r['mfu'], '.1%'):>6s} "
            f"{text(r['memory_gb'], '.1f'):>6s} {text(r['compile_s'], '.0f'):>8s} "
            f"{first['tokens_per_s'] / r['tokens_per_s']:6.2f} {r['flops_per_token'] / first['flops_per_token']:6.2f}")


# -----------------------------------------------------------------------------
# one layer, taken apart

def seconds_of(function, device, steps):
    """Median seconds of function(), after 3 calls to warm up."""
    found = []
    for _ in range(steps + 3):
        start = now(device)
        function()
        found.append(now(device) - start)
    return statistics.median(found[3:])


def forward_backward(function, *inputs):
    """A function that runs function(*inputs) and its backward, for all inputs that are floating point."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        grad = torch.randn_like(function(*leaves))

    def both():
        out = function(*leaves)
        torch.autograd.backward(out, grad)
    return both


def layer_suite(settings, steps, device):
    """One MoE layer, forward and backward, in parts; the floor is its GEMMs at the matmul rate and its memory traffic at the
    copy bandwidth that this machine reaches in this run."""
    dtype = getattr(torch, choose_dtype(settings["dtype"], device))
    config = build_config(settings | MOE | {"n_layer": 1, "moe_stride": 1, "num_dense_layers": 0, "num_shared_experts": 0,
                                            "bias": False, "vocab_size": 64})
    with device:
        moe = MoE(config)
        for p in moe.parameters():
            torch.nn.init.normal_(p, std=0.02)
    N, D, K, H = settings["batch_size"] * config.block_size, config.n_embd, config.top_k, config.expert_hidden_dim
    x = torch.randn(settings["batch_size"], config.block_size, D, device=device)
    cast = autocast(device, str(dtype).removeprefix("torch."))
    with torch.no_grad(), cast:
        gate, expert, _ = moe.router(x)
    order, inverse, key, end = sort_by_expert(expert, config.num_experts)
    x_ND = x.flatten(0, 1).to(dtype)
    x_MD, gate_M1 = x_ND[order // K], gate.flatten()[order].unsqueeze(1).to(dtype)
    weights = [w.detach().to(dtype).requires_grad_() for w in (moe.experts.c_fc, moe.experts.c_proj)]

    def layer(x):
        with cast:
            return moe(x)[0]

    def router(x):
        with cast:
            return moe.router(x)[0]

    def dispatch(x_ND):
        order, inverse, _, _ = sort_by_expert(expert, config.num_experts)
        return MoveRows.apply(x_ND, order, inverse, K, False)

    def gemms(x_MD, gate_M1, c_fc, c_proj):
        return moe.experts.multiply(x_MD, gate_M1, key, end, c_fc, None, c_proj, None)

    def combine(y_MD):
        return MoveRows.apply(y_MD, order, inverse, K, True)
    parts = {"whole layer": forward_backward(layer, x), "router": forward_backward(router, x),
             "dispatch": forward_backward(dispatch, x_ND),
             "GEMMs and activation": forward_backward(gemms, x_MD, gate_M1, *weights),
             "combine": forward_backward(combine, x_MD)}
    times = {name: seconds_of(part, device, steps) for name, part in parts.items()}

    a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((N, D), (D, 4 * D)))
    rate = 2 * N * D * 4 * D / seconds_of(lambda: a @ b, device, steps)
    big = torch.randn(2**25, device=device)
    bandwidth = 2 * 4 * big.numel() / seconds_of(big.clone, device, steps)
    flops = 3 * 2 * sum(w[0].numel() for w in weights) * N * K
    rows_bytes = dtype.itemsize * N * K * (4 * D + 4 * H)  # both directions: rows in and out, hidden units written and read
    weight_bytes = 24 * sum(w.numel() for w in weights)  # cast, gradient to float32, added up
    floor = flops / rate + (rows_bytes + weight_bytes) / bandwidth
    print(f"{N:,} tokens, D {D}, H {H}, {config.num_experts} experts top-{K}, {dtype}, {config.mlp}\n"
          f"floor {floor * 1e3:.2f} ms = {flops / 1e9:.1f} GFLOP at {rate / 1e12:.3f} TFLOP/s + "
          f"{(rows_bytes + weight_bytes) / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s")
    for name, t in times.items():
        print(f"{name:24s} {t * 1e3:9.2f} ms {t / times['whole layer']:7.1%}  {t / floor:6.2f} x floor")
    around = times["router"] + times["dispatch"] + times["combine"]
    print(f"router, dispatch and combine: {around / (around + times['GEMMs and activation']):.1%} of the parts")
    return [{"name": name, "ms": t * 1e3} for name, t in times.items()] + [{"name": "floor", "ms": floor * 1e3}]


def write_profile(row, path):
    """A Chrome trace of one step, and the ten heaviest kernels (or, on a CPU, operators)."""
    cuda = row.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as trace:
        row.step()
        now(row.device)
    trace.export_chrome_trace(str(path))
    print(trace.key_averages().table(sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=10,
                                     max_name_column_width=70))


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    parser.add_argument("--suite", choices=[*SUITES, "layer"], help=argparse.SUPPRESS)
    parser.add_argument("--rows", default="", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=20, help=argparse.SUPPRESS)
    parser.add_argument("--vocab_size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", default="bench.json", help=argparse.SUPPRESS)
    parser.add_argument("--profile", help=argparse.SUPPRESS)
    own, rest = parser.parse_known_args()
    flags = [arg for arg in rest if arg.startswith("--")]
    settings, given = configure(dict(vars(train)), flags)
    rows = SUITES.get(own.suite, {}) if own.suite else {
        Path(path).stem: configure(dict(vars(train)), [path])[0] for path in rest if path not in flags}
    forced = {key: settings[key] for key in given} | ({"vocab_size": own.vocab_size} if own.vocab_size else {})
    rows = {name: {"vocab_size": 50304} | row | forced for name, row in rows.items()
            if any(part in name for part in own.rows.split(","))}
    if own.suite != "layer" and not rows:
        raise InputError(f"no row has '{own.rows}' in its name; give config files or --suite" if own.rows or own.suite else
                         "nothing to measure: give config files, or --suite=gpt2, cpu or layer")
    device = choose_device(settings["device"])
    about = {"machine": describe(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "date": time.strftime("%Y-%m-%d"), "command": "python -m tools.bench " + " ".join(sys.argv[1:])}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    torch.set_float32_matmul_precision("high")
    if own.suite == "layer":
        results = layer_suite(settings, own.steps, device)
    else:
        print(HEADER)
        results, last = measure(rows, settings, own.steps, device)
        if own.profile:
            write_profile(last, own.profile)
    Path(own.json).write_text(json.dumps(about | {"rows": results}, indent=1))


if __name__ == "__main__":
    run(main)
