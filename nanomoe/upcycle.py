"""
Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): a Mixture-of-Experts GPT that starts
as a trained dense one.

Only the router is new. An MLP of W hidden units becomes experts that are copies or slices of it.
With expert_dim = W / G, the G experts of a group hold all W units between them. They start with the
same row of the router, so a token that chooses one of them chooses all (virtual groups, He et al.
2024, arXiv 2410.07524); training then pulls the rows apart. Shared experts take the first units,
the groups share the rest.

If a token's gates sum to 1 (see inexact_reason), the model computes at first what the dense one
does.
"""

import torch

from configurator import InputError
from model import GPTConfig, fc_out_features
from moe_model import MoEGPTConfig


def group_size(dense: GPTConfig, config: MoEGPTConfig) -> int:
    """G, the number of experts that hold all hidden units of the dense MLP between them.

    dense, config: the configs of the two models. Raises InputError if the widths or counts do not
    fit."""
    W = dense.mlp_hidden_dim
    H = config.expert_hidden_dim
    E, K, S = config.num_experts, config.top_k, config.num_shared_experts
    G = (W - S * H) // H
    if G < 1 or (G + S) * H != W:
        groups = [g for g in range(1, K + 1) if E % g == K % g == W % (g + S) == 0]
        advice = "use other num_shared_experts or top_k"
        if groups:
            widths = " or ".join(str(W // (g + S)) for g in groups)
            given = f"num_shared_experts={S}, num_experts={E} and top_k={K}"
            advice = f"with {given}, expert_dim can be {widths}"
        raise InputError(
            f"the dense MLP's {W} hidden units cannot be split into experts of {H}: {advice}"
        )
    if E % G or K % G:
        raise InputError(
            f"{G} experts of {H} hidden units make up the {W} of the dense MLP: num_experts ({E}) "
            f"and top_k ({K}) must be multiples of {G}"
        )
    return G


def inexact_reason(config: MoEGPTConfig) -> str | None:
    """Why the upcycled model does not compute at first what the dense one does; None if it does."""
    normalized = config.norm_top_k and config.top_k > 1
    all_of_a_softmax = config.router_score == "softmax" and config.top_k == config.num_experts
    if normalized or all_of_a_softmax:
        return None
    needed = "top_k > 1" if config.top_k == 1 else "norm_top_k"
    return f"a token's gates do not sum to 1, which needs {needed}"


def describe(dense: GPTConfig, config: MoEGPTConfig) -> str:
    """What upcycling has made, for a line on the console."""
    G = group_size(dense, config)
    what = "copies of the dense MLP"
    if G > 1:
        what = f"groups of {G} that share out the dense MLP's hidden units"
    first = "what the dense model does"
    if reason := inexact_reason(config):
        first = f"not what the dense model does: {reason}"
    layers = sum(config.is_moe(layer) for layer in range(config.n_layer))
    return f"in {layers} layers {config.num_experts} experts, {what}; at first it computes {first}"


def split_units(rows, G, H, parts=1):
    """Rows of hidden units: the shared experts', and those of the G experts of a group, stacked.

    parts: 2 for SwiGLU's c_fc, which holds the gate's row of each unit, then the up-projections'.
    """
    units = rows.unflatten(0, (parts, -1))
    shared, group = units[:, : -G * H], units[:, -G * H :]
    return shared.flatten(0, 1), group.unflatten(1, (G, H)).transpose(0, 1).flatten(1, 2)


def upcycle(weights: dict, dense: GPTConfig, config: MoEGPTConfig, seed: int = 0) -> dict:
    """The weights of the MoE, made from those of a dense model; both {name: tensor}.

    dense, config: the configs of the two models. seed: of the routers. Raises InputError as
    group_size does."""
    G = group_size(dense, config)
    H, E = config.expert_hidden_dim, config.num_experts
    num_groups = E // G
    parts = fc_out_features(config.mlp, 1)
    generator = torch.Generator().manual_seed(seed)
    out = dict(weights)
    for layer in range(config.n_layer):
        if not config.is_moe(layer):
            continue
        name = f"transformer.h.{layer}.mlp."
        router = 0.02 * torch.randn(num_groups, config.n_embd, generator=generator)
        out[name + "router.weight"] = router.repeat_interleave(G, dim=0)
        out[name + "router.bias"] = torch.zeros(E)
        out[name + "router.load"] = torch.full((E,), 1 / E)

        shared, experts = {}, {}  # the experts are those of one group
        c_fc, c_proj = out.pop(name + "c_fc.weight"), out.pop(name + "c_proj.weight")
        shared["c_fc.weight"], experts["c_fc"] = split_units(c_fc, G, H, parts)
        shared_c_proj, group_c_proj = split_units(c_proj.T, G, H)
        shared["c_proj.weight"] = shared_c_proj.T
        # an expert's gate is 1/G of what the gate of a whole copy would be
        experts["c_proj"] = G / config.route_scale * group_c_proj.mT
        if config.bias:
            c_fc, c_proj = out.pop(name + "c_fc.bias"), out.pop(name + "c_proj.bias")
            shared["c_fc.bias"], experts["c_fc_bias"] = split_units(c_fc, G, H, parts)
            # gates sum to 1, so every expert has the whole output bias, and the shared ones none
            shared["c_proj.bias"] = torch.zeros_like(c_proj)
            experts["c_proj_bias"] = (c_proj / config.route_scale).repeat(G, 1)
        out |= {f"{name}experts.{key}": torch.cat([p] * num_groups) for key, p in experts.items()}
        if config.num_shared_experts:
            out |= {f"{name}shared.{key}": p for key, p in shared.items()}
    return out
