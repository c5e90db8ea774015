"""
Sparse upcycling (Komatsuzaki et al. 2023, arXiv 2212.05055): a Mixture-of-Experts GPT that begins as a trained dense one.

The router is new, the rest is the dense model's. An MLP of W hidden units becomes experts that are copies of it, or slices:
with expert_dim = W / G, each group of G experts has all W units between them. The G experts of a group begin with one and the
same row of the router, so that a token that chooses one of them chooses all (virtual groups, He et al. 2024, arXiv
2410.07524); then their different units pull the rows apart. Shared experts take the first units, and the groups the others.

If a token's gates sum to 1 (see differs), the model computes at first what the dense one does.
"""

import torch

from configurator import InputError


def group_size(dense, config):
    """G, the number of experts that have all hidden units of the dense MLP between them, for the configs of the two models.
    Raises InputError if the one cannot become the other."""
    W, H, S = dense.mlp_hidden_dim, config.expert_hidden_dim, config.num_shared_experts
    G = (W - S * H) // H
    if G < 1 or (G + S) * H != W:
        fitting = [
            W // n
            for n in range(S + 1, W + 1)
            if W % n == 0 and config.top_k % (n - S) == 0 and config.num_experts % (n - S) == 0
        ]
        raise InputError(
            f"experts of {H} hidden units cannot share out the {W} of the dense MLP: "
            + (
                f"with num_shared_experts={S}, num_experts={config.num_experts} and top_k={config.top_k} expert_dim "
                f"can be {' or '.join(map(str, fitting))}"
                if fitting
                else "use other num_shared_experts or top_k"
            )
        )
    if config.num_experts % G or config.top_k % G:
        raise InputError(
            f"{G} experts of {H} hidden units make up the {W} of the dense MLP: num_experts "
            f"({config.num_experts}) and top_k ({config.top_k}) have to be multiples of {G}"
        )
    return G


def inexact_reason(config):
    """Why the model does not compute at first what the dense one does, or None if it does."""
    if (config.norm_top_k and config.top_k > 1) or (
        config.router_score == "softmax" and config.top_k == config.num_experts
    ):
        return None
    return f"a token's gates do not sum to 1, which needs {'top_k > 1' if config.top_k == 1 else 'norm_top_k'}"


def upcycle(weights, dense, config, noise=0.0, seed=0):
    """A dense model's weights, a dict, to those of the MoE, for the configs of the two. noise: so many standard
    deviations of a layer's expert matrices are added to them at random. Raises InputError as slices does."""
    G, H, E = group_size(dense, config), config.expert_hidden_dim, config.num_experts
    for_routers, for_noise = (
        torch.Generator().manual_seed(number) for number in (seed, (seed + 1) % 2**64)
    )

    def units(p, first, number):
        """Some hidden units of c_fc's weight or bias: of SwiGLU's two halves each."""
        return torch.cat(
            [half[first : first + number] for half in p.chunk(2 if config.mlp == "swiglu" else 1)]
        )

    def stack(parts):
        parts = torch.stack(parts * (E // G))
        return (
            parts + noise * parts.std() * torch.randn(parts.shape, generator=for_noise)
            if noise
            else parts
        )

    out = dict(weights)
    for layer in filter(config.is_moe, range(config.n_layer)):
        name = f"transformer.h.{layer}.mlp."
        c_fc, c_proj = out.pop(name + "c_fc.weight"), out.pop(name + "c_proj.weight")
        # each of a group's G gates is a G-th of what a copy's would be
        factor, shared = G / config.route_scale, config.num_shared_experts * H
        firsts = range(shared, dense.mlp_hidden_dim, H)
        router = 0.02 * torch.randn(E // G, config.n_embd, generator=for_routers)
        out |= {
            name + "experts.c_fc": stack([units(c_fc, first, H) for first in firsts]),
            name + "experts.c_proj": stack(
                [factor * c_proj[:, first : first + H] for first in firsts]
            ),
            name + "router.weight": router.repeat_interleave(G, dim=0),
            name + "router.bias": torch.zeros(E),
            name + "router.load": torch.full((E,), 1 / E),
        }
        if shared:
            out |= {
                name + "shared.c_fc.weight": units(c_fc, 0, shared),
                name + "shared.c_proj.weight": c_proj[:, :shared],
            }
        if config.bias:
            c_fc_bias, c_proj_bias = out.pop(name + "c_fc.bias"), out.pop(name + "c_proj.bias")
            out |= {
                name + "experts.c_fc_bias": torch.stack(
                    [units(c_fc_bias, first, H) for first in firsts] * (E // G)
                ),
                name + "experts.c_proj_bias": (c_proj_bias / config.route_scale).repeat(E, 1),
            }
            if shared:
                out |= {
                    name + "shared.c_fc.bias": units(c_fc_bias, 0, shared),
                    name + "shared.c_proj.bias": torch.zeros_like(c_proj_bias),
                }
    return out
