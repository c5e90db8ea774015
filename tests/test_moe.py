"""The MoE layer against its definition, written plainly; which layers are MoE, sizes, options.

The traps are in test_traps_*.py, the two implementations in test_implementations.py.
"""

import pytest
import torch
import torch.nn.functional as F

from model import activate
from moe_model import MoEGPT, MoEGPTConfig, Router
from tests.helpers import MOE, small_model, tokens

# One of each kind of routing: K = 1, 2, E; biases, shared experts, gated hidden layers.
ROUTINGS = [
    MOE | {"top_k": 1},
    MOE,
    MOE | {"top_k": 4},
    MOE | {"bias": False, "norm_top_k": False},
    MOE | {"num_shared_experts": 2, "expert_dim": -1, "mlp": "swiglu"},
]


def every_expert_on_every_token(moe, x_ND):
    """A MoE layer's output, computed the dense way: all experts on all tokens, times the gate.

    The gate is 0 for the experts that a token does not visit.
    """
    score_NE, K = F.linear(x_ND, moe.router.weight).softmax(-1), moe.router.config.top_k
    chosen = torch.zeros_like(score_NE)
    for n, row in enumerate(score_NE):
        chosen[n, sorted(range(len(row)), key=lambda e: -row[e].item())[:K]] = 1
    gate_NE = score_NE * chosen
    if moe.router.config.norm_top_k and K > 1:
        gate_NE = gate_NE / gate_NE.sum(-1, keepdim=True)
    experts = moe.experts
    biases = (0, 0)
    if experts.c_fc_bias is not None:
        biases = experts.c_fc_bias[:, None], experts.c_proj_bias[:, None]
    h_END = activate(x_ND @ experts.c_fc.transpose(1, 2) + biases[0], experts.config.mlp)
    y_END = h_END @ experts.c_proj.transpose(1, 2) + biases[1]
    out = torch.einsum("ne,end->nd", gate_NE, y_END)
    return out if moe.shared is None else out + moe.shared(x_ND)


@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
def test_equals_every_expert_on_every_token(settings):
    """In value and gradient."""
    moe = small_model(**settings).transformer.h[0].mlp
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(21, 32, requires_grad=True)
    results = []
    for y in (moe(x.view(3, 7, 32))[0].view(21, 32), every_expert_on_every_token(moe, x)):
        loss = (y * torch.linspace(-1, 1, 32)).sum()
        results.append([y, *torch.autograd.grad(loss, [x, *moe.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scope", ["global", "micro"])
def test_balance_loss_pushes_towards_balance(scope):
    """Descending it alone evens the load out."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "block_size": 8, "n_layer": 1, "n_head": 1, "n_embd": 16}
    config = MoEGPTConfig(**sizes, num_experts=8, top_k=1, balance_scope=scope)
    model = MoEGPT(config)
    router = model.transformer.h[0].mlp.router
    router.weight.data = 0.1 * torch.randn(8, 16)
    x = (torch.randn(512, 16) + 10 * router.weight.data[0])[None]  # most tokens like expert 0
    optimizer, loads = torch.optim.SGD(router.parameters(), lr=0.03), []
    for _ in range(300):
        _, _, routing = router(x)
        loads.append(routing.expert_count.max() / 512)
        routing.balance_loss.backward()
        optimizer.step()
        model.update_balance({"expert_count": routing.expert_count[None]})
        optimizer.zero_grad()
    assert loads[0] > 0.5 and loads[-1] < 0.2


def test_size_and_flops_count_active_experts_only():
    dense = small_model()
    moe = small_model(use_moe=True, num_experts=8, top_k=2, expert_dim=-1)
    router = 2 * 8 * 32
    biases = 2 * 32  # one expert's output bias more per layer than the dense MLP has
    assert moe.num_active_params() == dense.num_params() + router + biases
    assert moe.flops_per_token() == dense.flops_per_token() + 6 * router
    assert moe.num_params() - moe.num_active_params() == 2 * 6 * (2 * 64 * 32 + 64 + 32)
    wide = small_model(use_moe=True, num_experts=8, top_k=2)
    assert wide.flops_per_token() == moe.flops_per_token() + 6 * 2 * 8 * 32 * 32
    # more experts cost their rows of the router and nothing else
    many = small_model(use_moe=True, num_experts=64, top_k=2, expert_dim=-1)
    assert many.flops_per_token() == moe.flops_per_token() + 6 * 2 * 56 * 32


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


def test_balance_scope():
    """'global' takes the load of the whole step before, 'micro' that of this micro-batch."""
    logits = torch.randn(1, 64, 4)
    for scope in ("global", "micro"):
        sizes = {"n_embd": 4, "n_head": 1, "num_experts": 4, "top_k": 1}
        router = Router(MoEGPTConfig(**sizes, balance_scope=scope))
        router.weight.data = torch.eye(4)
        share = logits.softmax(-1).mean((0, 1))
        router.load = torch.tensor([0.7, 0.1, 0.1, 0.1])
        routing = router(logits)[2]
        load = router.load if scope == "global" else routing.expert_count / 64
        torch.testing.assert_close(routing.balance_loss, 4 * (load * share).sum())


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


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"top_k": 5}, r"top_k \(5\) is larger than num_experts \(4\)"),
        ({"num_dense_layers": 2}, "no layer is MoE"),
        ({"expert_dim": -2}, "expert_dim is -2"),
        ({"moe_stride": 0}, "moe_stride is 0"),
        ({"expert_load_balance_loss_coef": -1.0}, "coef is -1"),
        ({"router_z_loss_coef": float("nan")}, "coef is nan"),
        (
            {"router_score": "softplus"},
            "router_score is 'softplus', expected one of softmax, sigmoid",
        ),
        ({"balance_scope": "batch"}, "expected one of global, micro"),
        ({"expert_impl": "fast"}, "expected one of auto, grouped, loop"),
        (
            {"router_score": "sigmoid", "router_z_loss_coef": 1e-3},
            "router_z_loss_coef needs router_score 'softmax', not 'sigmoid'",
        ),
        ({"route_scale": 0.0}, "route_scale is 0.0"),
        ({"capacity_factor": -1.0}, "capacity_factor is -1.0"),
        ({"router_bias_update_rate": -1e-3}, "router_bias_update_rate is -0.001"),
        ({"expert_dropout": 1.0}, "expected at least 0 and less than 1"),
        ({"router_jitter": -0.1}, "router_jitter is -0.1"),
    ],
    ids=str,
)
def test_bad_config_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_model(**MOE | settings)
