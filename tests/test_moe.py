"""The MoE layer: which layers are MoE, sizes, what the router reports, options.

The traps are in test_traps_*.py, the two implementations in test_implementations.py.
"""

import pytest
import torch

from moe_model import MoEGPTConfig, Router
from tests.helpers import MOE, small_model, tokens


def test_which_layers_are_moe():
    def layers(**settings):
        model = small_model(n_layer=6, **MOE, **settings)
        model(tokens(1, 8), tokens(1, 8))
        found = [i for i, block in enumerate(model.transformer.h) if hasattr(block.mlp, "router")]
        assert len(model.stats["expert_count"]) == len(found)
        return found

    assert layers() == [0, 1, 2, 3, 4, 5]
    assert layers(moe_stride=2) == [1, 3, 5]
    assert layers(num_dense_layers=1) == [1, 2, 3, 4, 5]
    assert layers(num_dense_layers=2, moe_stride=3) == [2, 5]


def test_expert_width():
    def width(**settings):
        config = MoEGPTConfig(n_embd=768, n_head=12, num_experts=8, **settings)
        return config.expert_hidden_dim

    assert width(top_k=1) == 3072 and width(top_k=2, expert_dim=-1) == 1536
    assert width(top_k=2, expert_dim=100) == 100
    assert width(top_k=7, num_shared_experts=1, expert_dim=-1, mlp="swiglu") == 256
    assert width(top_k=5, expert_dim=-1) == 616  # 614.4 to the nearest multiple of 8
    assert (
        width(top_k=2, expert_dim=-1, mlp_dim=1024) == 512 and width(top_k=1, mlp_dim=1024) == 1024
    )


@pytest.mark.parametrize("scope", ["global", "micro"])
def test_stats_of_a_known_routing(scope):
    """Router logits 3, 1, 0, 0 for every token. The balance loss takes the load of the whole step
    before, or that of this micro-batch."""
    sizes = {"n_embd": 4, "n_head": 1, "num_experts": 4, "top_k": 2, "norm_top_k": False}
    router = Router(MoEGPTConfig(**sizes, balance_scope=scope))
    router.weight.data = torch.eye(4)
    router.load = torch.tensor([0.7, 0.2, 0.1, 0.0])
    logit = torch.tensor([3.0, 1.0, 0.0, 0.0])
    routing, p = router(logit.expand(2, 5, 4))[2], logit.softmax(0)
    load = router.load if scope == "global" else torch.tensor([0.5, 0.5, 0.0, 0.0])
    expected = {
        "expert_count": torch.tensor([10.0, 10.0, 0.0, 0.0]),
        "balance_loss": 4 * (load * p).sum(),
        "z_loss": logit.logsumexp(0) ** 2,
        "router_entropy": -(p * p.log()).sum(),
        "first_gate": p[0],
        "logit_norm": torch.tensor(10.0).sqrt(),
        "dropped": torch.tensor(0.0),
    }
    assert expected.keys() == set(routing._fields)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(routing, name), value)


def test_router_jitter_and_route_scale():
    x = torch.randn(2, 8, 32)
    router = small_model(**MOE, router_jitter=0.1).transformer.h[0].mlp.router
    assert not router(x)[0].equal(router(x)[0])
    plain, scaled = (
        small_model(**MOE, **kw).transformer.h[0].mlp.router for kw in ({}, {"route_scale": 2.5})
    )
    torch.testing.assert_close(2.5 * plain(x)[0], scaled(x)[0])
    torch.testing.assert_close(plain(x)[0].sum(-1), torch.ones(16))


def test_expert_dropout():
    """Half of the hidden units, doubled: equal in the mean, and different each time."""
    moe = small_model(**MOE, expert_dropout=0.5, mlp="relu2").transformer.h[0].mlp
    x = torch.randn(1, 4, 32)
    many = torch.stack([moe(x)[0] for _ in range(1000)])
    expected = moe.eval()(x)[0]
    assert many.std(0).mean() > expected.abs().mean() / 5
    assert (many.mean(0) - expected).abs().mean() < expected.abs().mean() / 10


def test_bad_config_is_refused():
    """Every value out of range is named; tests/test_bad_input.py has those that do not go
    together."""
    wrong = {
        "num_experts": (0, "at least 1"),
        "top_k": (0, "at least 1"),
        "expert_dim": (-2, "at least -1"),
        "moe_stride": (0, "at least 1"),
        "expert_load_balance_loss_coef": (-1.0, "at least 0"),
        "router_z_loss_coef": (float("nan"), "a finite number"),
        "router_score": ("softplus", "one of softmax, sigmoid"),
        "balance_scope": ("batch", "one of global, micro"),
        "expert_impl": ("fast", "one of auto, grouped, loop"),
        "route_scale": (0.0, "more than 0"),
        "capacity_factor": (-1.0, "at least 0"),
        "router_bias_update_rate": (-1e-3, "at least 0"),
        "expert_dropout": (1.0, "at least 0 and less than 1"),
        "router_jitter": (-0.1, "at least 0"),
    }
    with pytest.raises(ValueError) as error:
        small_model(**MOE | {name: value for name, (value, _) in wrong.items()})
    for name, (value, expected) in wrong.items():
        assert f"{name} is {value!r}, expected {expected}" in str(error.value)
