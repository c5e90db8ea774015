"""
Which experts the tokens of a text visit, and the loss without each expert.

batches: a list of (idx, targets), each (B, T); a target of -1 does not count.
"""

import contextlib
import math

import torch

from moe_model import MoEBlock
from nanomoe.device import autocast


@torch.no_grad()
def loss_of(model, batches, torch_device, compute_dtype):
    """Mean cross-entropy in nats per token; nan if no token has a target."""
    total, count = 0.0, 0
    for idx, targets in batches:
        known = int((targets != -1).sum())
        with autocast(torch_device, compute_dtype):
            loss = model(idx.to(torch_device), targets.to(torch_device))[1].item()
        if known:
            total += loss * known
            count += known
    return total / count if count else math.nan


def loss_and_routes(model, batches, torch_device, compute_dtype):
    """loss_of(), and {layer: (gate_NK, expert_NK)} of all tokens, from the routers, on the CPU."""
    blocks = enumerate(model.transformer.h)
    routers = {layer: block.mlp.router for layer, block in blocks if isinstance(block, MoEBlock)}
    calls = {router: [] for router in routers.values()}

    def record(router, _x, out):
        calls[router].append([tensor.cpu() for tensor in out[:2]])

    hooks = [router.register_forward_hook(record) for router in calls]
    loss = loss_of(model, batches, torch_device, compute_dtype)
    for hook in hooks:
        hook.remove()
    routes = {}
    for layer, router in routers.items():
        gates, experts = zip(*calls[router], strict=True)
        routes[layer] = torch.cat(gates), torch.cat(experts)
    return loss, routes


@contextlib.contextmanager
def knocked_out(experts, e):
    """Zero the output of expert e (its last matrix and bias), and put it back at the end."""
    parts = [p.data[e] for p in (experts.c_proj, experts.c_proj_bias) if p is not None]
    kept = [p.clone() for p in parts]
    try:
        for p in parts:
            p.zero_()
        yield
    finally:
        for p, old in zip(parts, kept, strict=True):
            p.copy_(old)


def knockout_losses(model, layer, batches, torch_device, compute_dtype):
    """The loss without each expert of a layer, a list."""
    losses = []
    for e in range(model.config.num_experts):
        with knocked_out(model.transformer.h[layer].mlp.experts, e):
            losses.append(loss_of(model, batches, torch_device, compute_dtype))
    return losses
