"""
One MoE layer, forward and backward, taken apart: router, dispatch, the experts' GEMMs, combine; and against its floor, which is
its FLOPs at the matmul rate and its bytes at the copy bandwidth that this machine reaches in the same run.
It is the suite 'layer' of tools/bench.
"""

import copy
import dataclasses
import statistics

import torch

from moe_model import MoE, MoveRows, build_config, choose_impl, sort_by_expert
from nanomoe.device import autocast, choose_compile, choose_dtype, synchronized_time


def times_of(functions, device, steps):
    """Median seconds of each function, called in turns, because a machine's speed drifts; after 3 calls to warm up."""
    found = {name: [] for name in functions}
    for _ in range(steps + 3):
        for name, function in functions.items():
            start = synchronized_time(device)
            function()
            found[name].append(synchronized_time(device) - start)
    return {name: statistics.median(seconds[3:]) for name, seconds in found.items()}


def forward_backward(function, compiled, *inputs, parameters=()):
    """A function that runs function(*inputs) and its backward, for all inputs that are floating point."""
    function = torch.compile(function) if compiled else function
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        grad = torch.randn_like(function(*leaves))

    def both():
        torch.autograd.backward(function(*leaves), grad)
        for leaf in (
            *leaves,
            *parameters,
        ):  # as a training step does, which would otherwise add to old gradients
            leaf.grad = None

    return both


def measure(settings, steps, device):
    """Print the table for the layer that the settings describe; returns its rows."""
    dtype = getattr(torch, choose_dtype(settings["dtype"], device))
    config = build_config(
        settings
        | {
            "use_moe": True,
            "n_layer": 1,
            "moe_stride": 1,
            "num_dense_layers": 0,
            "bias": False,
            "num_shared_experts": 0,
            "vocab_size": 64,
        }
    )
    with device:
        moe = MoE(config)
        for p in moe.parameters():
            torch.nn.init.normal_(p, std=0.02)
    N, D, K, H = (
        settings["batch_size"] * config.block_size,
        config.n_embd,
        config.top_k,
        config.expert_hidden_dim,
    )
    x = torch.randn(settings["batch_size"], config.block_size, D, device=device)
    cast = autocast(device, str(dtype).removeprefix("torch."))
    with torch.no_grad(), cast:
        gate, expert, _ = moe.router(x)
    order, inverse, key, end = sort_by_expert(expert, config.num_experts)
    counts = end.diff(prepend=end.new_zeros(1)).tolist()
    x_ND = x.flatten(0, 1).to(dtype)
    x_MD, gate_M = x_ND[order // K], gate.flatten()[order].to(dtype)
    weights = [
        w.detach().to(dtype).requires_grad_() for w in (moe.experts.c_fc, moe.experts.c_proj)
    ]
    compiled = choose_compile(settings["compile"], device)
    impl, _ = choose_impl(config, device.type, dtype, compiled, N * K)

    def layer(x):
        with cast:
            return moe(x)[0]

    plain = copy.deepcopy(moe)
    plain.experts.config = dataclasses.replace(config, expert_impl="loop")

    def plain_loop(x):
        return plain(x)[0]

    def router(x):
        with cast:
            return moe.router(x)[0]

    def dispatch(x_ND):
        order, inverse, _, _ = sort_by_expert(expert, config.num_experts)
        return MoveRows.apply(x_ND, order, inverse, K, False)

    def gemms(x_MD, gate_M, c_fc, c_proj):
        if impl == "grouped":
            return moe.experts.multiply(
                x_MD, gate_M.unsqueeze(1), key, end, c_fc, None, c_proj, None
            )
        return torch.cat(
            moe.experts.one_by_one(
                x_MD.split(counts), gate_M.split(counts), (c_fc, None, c_proj, None)
            )
        )

    def combine(y_MD):
        return MoveRows.apply(y_MD, order, inverse, K, True)

    a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((N, D), (D, 4 * D)))
    big = torch.randn(2**25, device=device)
    other = torch.empty_like(big)
    times = times_of(
        {
            "whole layer": forward_backward(layer, compiled, x, parameters=list(moe.parameters())),
            "router": forward_backward(
                router, compiled, x, parameters=list(moe.router.parameters())
            ),
            "dispatch": forward_backward(dispatch, compiled, x_ND),
            "GEMMs and activation": forward_backward(gemms, compiled, x_MD, gate_M, *weights),
            "combine": forward_backward(combine, compiled, x_MD),
            "plain loop, float32": forward_backward(
                plain_loop, False, x, parameters=list(plain.parameters())
            ),
            "matmul": lambda: a @ b,
            "copy": lambda: other.copy_(big),
        },
        device,
        steps,
    )
    rate = 2 * N * D * 4 * D / times.pop("matmul")
    bandwidth = 2 * big.numel() * big.element_size() / times.pop("copy")
    flops = 3 * 2 * sum(w[0].numel() for w in weights) * N * K
    rows_bytes = (
        dtype.itemsize * N * K * (4 * D + 4 * H)
    )  # both directions: rows in and out, hidden units written and read
    weight_bytes = 24 * sum(w.numel() for w in weights)  # cast, gradient to float32, added up
    floor = flops / rate + (rows_bytes + weight_bytes) / bandwidth
    whole, around = times["whole layer"], times["router"] + times["dispatch"] + times["combine"]
    times["the rest: casts"] = whole - around - times["GEMMs and activation"]
    print(
        f"{N:,} tokens, D {D}, H {H}, {config.num_experts} experts top-{K}, {dtype}, {config.mlp}, '{impl}', "
        f"compile {'on' if compiled else 'off'}\n"
        f"floor {floor * 1e3:.2f} ms = {flops / 1e9:.1f} GFLOP at {rate / 1e12:.3f} TFLOP/s + "
        f"{(rows_bytes + weight_bytes) / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s"
    )
    for name, t in times.items():
        print(f"{name:24s} {t * 1e3:9.2f} ms {t / whole:7.1%}  {t / floor:6.2f} x floor")
    print(
        f"the layer is {times['plain loop, float32'] / whole:.2f} times as fast as the plain loop in float32\n"
        f"router, dispatch and combine: {around / whole:.1%} of the layer"
    )
    return [{"name": name, "ms": t * 1e3} for name, t in times.items()] + [
        {"name": "floor", "ms": floor * 1e3}
    ]
