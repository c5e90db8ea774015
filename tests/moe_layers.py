"""MoE layers by themselves, for the tests of the implementations on each device."""

import torch

from tests.helpers import small_model

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def layer(sizes, impl, seed=0):
    """A MoE layer with weights that give outputs of about 1."""
    config = {"use_moe": True, "n_layer": 1, "n_head": 1, **sizes, "expert_impl": impl}
    moe = small_model(**config).transformer.h[0].mlp
    generator = torch.Generator().manual_seed(seed)
    for p in moe.parameters():
        p.data.normal_(std=p.shape[-1] ** -0.5, generator=generator)
    return moe


def values_and_gradients(moe, x, dtype):
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        out, routing = moe(x)
    # a gradient that differs everywhere
    weight = torch.linspace(-1, 1, out.numel(), device=x.device).view_as(out)
    grads = torch.autograd.grad(
        (out.float() * weight).sum() + routing.balance_loss + 1e-3 * routing.z_loss,
        [x, *moe.parameters()],
    )
    grads = zip(["x", *dict(moe.named_parameters())], grads, strict=True)
    return {"out": out, **routing._asdict()} | {f"gradient of {name}": p for name, p in grads}


def assert_equal(a, b, dtype):
    """Every tensor equal to the tolerance, relative to its largest element."""
    assert a.keys() == b.keys()
    for name, u in a.items():
        v = b[name]
        scale = v.float().abs().max().clamp_min(1e-3)
        assert (u.float() - v.float()).abs().max() <= TOLERANCE[dtype] * scale, f"{name}: {u} {v}"


def inputs(sizes, shape, load, seed, *moes):
    """x (B, T, D). Sets the layers' routers so that the experts are loaded as `load` says."""
    for moe in moes:
        if load == "all on one":
            moe.router.bias[0] = 5.0
        elif load == "ties":
            moe.router.weight.data.zero_()
        elif load == "one is silent":
            moe.router.bias[-1] = -5.0
    return torch.randn(*shape, sizes["n_embd"], generator=torch.Generator().manual_seed(seed))
