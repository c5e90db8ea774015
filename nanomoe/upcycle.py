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


def group_size(dense, config):
    """G, the number of experts that hold all hidden units of the dense MLP between them.

    dense, config: the configs of the two models. Raises InputError if the widths or counts do not
    fit.
    """
    W = dense.mlp_hidden_dim
    H = config.expert_hidden_dim
    E, K, S = config.num_experts, config.top_k, config.num_shared_experts
    G = (W - S * H) // H
    if G < 1 or (G + S) * H != W:
        fitting = []
        for parts in range(S + 1, W + 1):
            group = parts - S
            if W % parts == 0 and K % group == 0 and E % group == 0:
                fitting.append(str(W // parts))
        advice = "use other num_shared_experts or top_k"
        if fitting:
            advice = (
                f"with num_shared_experts={S}, num_experts={E} and top_k={K}, expert_dim can be "
                f"{' or '.join(fitting)}"
            )
        raise InputError(
            f"the dense MLP's {W} hidden units cannot be split into experts of {H}: {advice}"
        )
    if E % G or K % G:
        raise InputError(
            f"{G} experts of {H} hidden units make up the {W} of the dense MLP: num_experts ({E}) "
            f"and top_k ({K}) must be multiples of {G}"
        )
    return G


def inexact_reason(config):
    """Why the upcycled model does not compute at first what the dense one does; None if it does."""
    normalized = config.norm_top_k and config.top_k > 1
    all_of_a_softmax = config.router_score == "softmax" and config.top_k == config.num_experts
    if normalized or all_of_a_softmax:
        return None
    needed = "top_k > 1" if config.top_k == 1 else "norm_top_k"
    return f"a token's gates do not sum to 1, which needs {needed}"


def describe(dense, config):
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


def hidden_units(p, first, count, mlp):
    """The rows of `count` hidden units of c_fc's weight or bias.

    SwiGLU has two rows for each unit: one in the gate's half, one in the up-projection's half.
    """
    if mlp != "swiglu":
        return p[first : first + count]
    gate, up = p.chunk(2)
    return torch.cat((gate[first : first + count], up[first : first + count]))


def upcycle(weights, dense, config, seed=0):
    """The weights of the MoE, made from those of a dense model; both {name: tensor}.

    dense, config: the configs of the two models. seed: of the routers. Raises InputError as
    group_size does.
    """
    G = group_size(dense, config)
    H, E = config.expert_hidden_dim, config.num_experts
    num_groups = E // G
    num_shared_units = config.num_shared_experts * H
    first_units = range(num_shared_units, dense.mlp_hidden_dim, H)  # of the G experts of a group
    generator = torch.Generator().manual_seed(seed)
    out = dict(weights)
    for layer in range(config.n_layer):
        if not config.is_moe(layer):
            continue
        name = f"transformer.h.{layer}.mlp."
        c_fc = out.pop(name + "c_fc.weight")
        c_proj = out.pop(name + "c_proj.weight")

        router = 0.02 * torch.randn(num_groups, config.n_embd, generator=generator)
        out[name + "router.weight"] = router.repeat_interleave(G, dim=0)
        out[name + "router.bias"] = torch.zeros(E)
        out[name + "router.load"] = torch.full((E,), 1 / E)

        # an expert's gate is 1/G of what the gate of a whole copy would be
        factor = G / config.route_scale
        group_c_fc = [hidden_units(c_fc, first, H, config.mlp) for first in first_units]
        group_c_proj = [factor * c_proj[:, first : first + H] for first in first_units]
        out[name + "experts.c_fc"] = torch.stack(group_c_fc).repeat(num_groups, 1, 1)
        out[name + "experts.c_proj"] = torch.stack(group_c_proj).repeat(num_groups, 1, 1)
        if num_shared_units:
            out[name + "shared.c_fc.weight"] = hidden_units(c_fc, 0, num_shared_units, config.mlp)
            out[name + "shared.c_proj.weight"] = c_proj[:, :num_shared_units]

        if config.bias:
            c_fc_bias = out.pop(name + "c_fc.bias")
            c_proj_bias = out.pop(name + "c_proj.bias")
            group_bias = [hidden_units(c_fc_bias, first, H, config.mlp) for first in first_units]
            out[name + "experts.c_fc_bias"] = torch.stack(group_bias).repeat(num_groups, 1)
            # gates sum to 1, so every expert has the whole output bias, and the shared ones none
            out[name + "experts.c_proj_bias"] = (c_proj_bias / config.route_scale).repeat(E, 1)
            if num_shared_units:
                shared_bias = hidden_units(c_fc_bias, 0, num_shared_units, config.mlp)
                out[name + "shared.c_fc.bias"] = shared_bias
                out[name + "shared.c_proj.bias"] = torch.zeros_like(c_proj_bias)
    return out
