"""Routing and the MoE GPT: the traps of this kind of project that this code reaches, each under its name."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import small_model, tokens

from model import MLP, activate
from moe_model import MoEGPTConfig, Router, summarize_routing

MOE = {"use_moe": True, "num_experts": 4, "top_k": 2}
# as many routings as there are kinds of them: K = 1, 2, E; with biases, shared experts, gated hidden layers
ROUTINGS = [MOE | {"top_k": 1}, MOE, MOE | {"top_k": 4}, MOE | {"bias": False, "norm_top_k": False},
            MOE | {"num_shared_experts": 2, "expert_dim": -1, "mlp": "swiglu"}]


def moe_layer(model, layer=0):
    return model.transformer.h[layer].mlp


def every_expert_on_every_token(moe, x_ND):
    """A MoE layer's output written down the dense way: all experts on all tokens, weighted by a gate that is 0 for the
    experts that a token does not visit."""
    score_NE = F.linear(x_ND, moe.router.weight).softmax(-1)
    chosen = torch.zeros_like(score_NE)
    for n, row in enumerate(score_NE):
        chosen[n, sorted(range(len(row)), key=lambda e: -row[e].item())[:moe.router.top_k]] = 1
    gate_NE = score_NE * chosen
    if moe.router.norm_top_k and moe.router.top_k > 1:
        gate_NE = gate_NE / gate_NE.sum(-1, keepdim=True)
    experts = moe.experts
    biases = (0, 0) if experts.c_fc_bias is None else (experts.c_fc_bias[:, None], experts.c_proj_bias[:, None])
    h_END = activate(x_ND @ experts.c_fc.transpose(1, 2) + biases[0], experts.kind)
    y_END = h_END @ experts.c_proj.transpose(1, 2) + biases[1]
    out = torch.einsum("ne,end->nd", gate_NE, y_END)
    return out if moe.shared is None else out + moe.shared(x_ND)


@pytest.mark.parametrize("settings", ROUTINGS, ids=str)
class TestLayer:
    def test_equals_every_expert_on_every_token(self, settings):
        moe = moe_layer(small_model(**settings))
        for p in moe.parameters():
            torch.nn.init.normal_(p, std=0.3)
        x = torch.randn(3, 7, 32)
        results = []
        for function in (lambda x: moe(x)[0].flatten(0, 1), lambda x: every_expert_on_every_token(moe, x.flatten(0, 1))):
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            grads = torch.autograd.grad((y * torch.linspace(-1, 1, 32)).sum(), [leaf, *moe.parameters()])
            results.append([y, *grads])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)

    def test_no_future_leak(self, settings):
        for mode in (True, False):
            model, idx = small_model(**settings).train(mode), tokens(1, 16)
            other = idx.clone()
            other[:, 9:] = (other[:, 9:] + 1) % 50
            torch.testing.assert_close(model(idx, idx)[0][:, :9], model(other, other)[0][:, :9], atol=1e-6, rtol=0)

    def test_batch_independence(self, settings):
        model, idx = small_model(**settings).eval(), tokens(5, 16)
        together = model(idx, idx)[0]
        for i in range(5):
            torch.testing.assert_close(together[[i]], model(idx[[i]], idx[[i]])[0], atol=1e-6, rtol=1e-5)

    def test_eval_loss_is_cross_entropy_to_the_last_bit(self, settings):
        model = small_model(**settings, expert_load_balance_loss_coef=1.0, router_z_loss_coef=1.0, dropout=0.3).eval()
        idx = tokens(2, 16)
        logits, loss = model(idx, idx)
        assert loss == F.cross_entropy(logits.float().flatten(0, 1), idx.flatten()) == model.stats["cross_entropy"]
        assert model(idx, idx)[1] == loss  # two evaluations are bit-equal
        model.train()
        torch.manual_seed(0)
        objective, stats = model(idx, idx)[1], model.stats
        torch.testing.assert_close(objective, stats["cross_entropy"] + stats["balance_loss"] + stats["z_loss"])

    def test_activation_checkpointing_routes_and_counts_once(self, settings):
        idx, results = tokens(2, 16), []
        for checkpointing in (False, True):
            model = small_model(**settings, gradient_checkpointing=checkpointing, dropout=0.1)
            torch.manual_seed(1)
            _, loss = model(idx, idx)
            loss.backward()
            results.append([loss, *model.stats.values(), *(p.grad for p in model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)

    def test_router_is_float32_under_autocast(self, settings):
        moe, x = moe_layer(small_model(**settings)), torch.randn(9, 32).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            gate, _, routing = moe.router(x)
        assert gate.dtype == torch.float32
        torch.testing.assert_close(gate, moe.router(x.float())[0], atol=1e-6, rtol=0)
        assert routing.balance_loss.dtype == routing.z_loss.dtype == torch.float32

    @pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (5, 13)])
    def test_odd_sizes_and_ties(self, settings, shape):
        model = small_model(**settings)
        moe_layer(model).router.weight.data.zero_()  # every expert ties with every other
        _, loss = model(tokens(*shape), tokens(*shape))
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())


def test_compiles():
    model, idx = small_model(**MOE), tokens(2, 16)
    _, eager = model(idx, idx)
    stats = model.stats
    _, loss = torch.compile(model, backend="aot_eager")(idx, idx)
    torch.testing.assert_close(loss, eager)
    torch.testing.assert_close(model.stats, stats)
    loss.backward()


def route(logit_NE, top_k):
    """A router that gives these logits; its Routing."""
    E = logit_NE.shape[1]
    config = MoEGPTConfig(n_embd=E, n_head=1, num_experts=E, top_k=top_k, vocab_size=8, block_size=8, n_layer=1)
    router = Router(config)
    router.weight.data = torch.eye(E)
    return router, router(logit_NE)


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_perfect_balance_is_one_for_every_k(top_k):
    # token n likes expert n, n + 1, ... in falling order: all experts are equally liked
    logits = torch.stack([-torch.arange(8.0).roll(n) for n in range(8)])
    _, (_, _, routing) = route(logits, top_k)
    torch.testing.assert_close(routing.load_E, torch.full((8,), 1 / 8))
    assert abs(routing.balance_loss - 1) < 1e-6


@pytest.mark.parametrize("n_layer", [1, 2, 6])
def test_balance_loss_does_not_grow_with_depth(n_layer):
    model = small_model(**MOE, n_layer=n_layer)
    for block in model.transformer.h:
        block.mlp.router.weight.data.zero_()  # equal scores, P = 1 / E, so the loss is 1 whatever the load
    model(tokens(2, 16), tokens(2, 16))
    assert abs(model.stats["balance_loss"] - 1) < 1e-6


def test_balance_loss_is_not_pooled_over_layers():
    """Layers that have each collapsed onto another expert score E; pooled over layers they would look balanced."""
    model = small_model(**MOE | {"top_k": 1}, n_layer=4, norm="layernorm")
    for i, block in enumerate(model.transformer.h):
        block.ln_2.weight.data.zero_()
        block.ln_2.bias.data.fill_(1.0)  # the same input for every token
        block.mlp.router.weight.data.zero_()
        block.mlp.router.weight.data[i] = 1.0  # expert i gets a logit of 32
    model(tokens(2, 16), tokens(2, 16))
    assert abs(model.stats["balance_loss"] - 4) < 1e-3
    torch.testing.assert_close(model.stats["expert_load"], torch.eye(4))
    pooled = model.stats["expert_load"].mean(0)
    assert (4 * (pooled * pooled).sum() - 1).abs() < 1e-6  # what a pooled loss says of the same routing


def test_balance_loss_cannot_be_gamed_by_a_constant():
    logits = torch.randn(64, 4)
    (_, (_, _, a)), (_, (_, _, b)) = route(logits, 2), route(logits + 7.0, 2)
    torch.testing.assert_close(a.balance_loss, b.balance_loss)
    assert b.z_loss > a.z_loss + 1


def test_balance_loss_pushes_towards_balance():
    """Descending it alone evens the load out."""
    torch.manual_seed(0)
    config = MoEGPTConfig(n_embd=16, n_head=1, num_experts=8, top_k=1, vocab_size=8, block_size=8, n_layer=1)
    router = Router(config)
    router.weight.data = 0.1 * torch.randn(8, 16)
    x = torch.randn(512, 16) + 10 * router.weight.data[0]  # most tokens like expert 0
    optimizer, loads = torch.optim.Adam(router.parameters(), lr=0.02), []
    for _ in range(100):
        _, _, routing = router(x)
        loads.append(routing.load_E.max())
        routing.balance_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loads[0] > 0.5 and loads[-1] < 0.2


@pytest.mark.parametrize("norm_top_k", [True, False])
def test_top_1_is_not_renormalised(norm_top_k):
    """With K = 1 the router gets a gradient from the language-model loss alone."""
    model = small_model(**MOE | {"top_k": 1, "norm_top_k": norm_top_k, "expert_load_balance_loss_coef": 0.0})
    _, loss = model(tokens(2, 16), tokens(2, 16))
    loss.backward()
    assert all(block.mlp.router.weight.grad.abs().max() > 1e-7 for block in model.transformer.h)


def test_silent_expert():
    """An expert without tokens has a gradient of zeros, and a step leaves everything finite."""
    model = small_model(**MOE | {"bias": True})
    experts, router = moe_layer(model).experts, moe_layer(model).router
    x = torch.randn(12, 32).abs()
    router.weight.data[3] = -10.0  # never among the best two
    y = experts(x, *router(x)[:2])
    y.square().sum().backward()
    for p in experts.parameters():
        assert (p.grad[3] == 0).all() and (p.grad[:3] != 0).any()
    _, loss = model(tokens(2, 16), tokens(2, 16))
    loss.backward()
    model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_one_expert_equals_the_dense_mlp():
    for settings in ({}, {"mlp": "swiglu", "bias": False}):
        model = small_model(use_moe=True, num_experts=1, top_k=1, **settings)
        moe, mlp = moe_layer(model), MLP(model.config)
        mlp.load_state_dict({name.replace("_bias", ".bias") if "bias" in name else f"{name}.weight": p[0]
                             for name, p in moe.experts.state_dict().items()})
        x = torch.randn(2, 5, 32)
        torch.testing.assert_close(moe(x)[0], mlp(x))


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
    assert moe.flops_per_token() == small_model(use_moe=True, num_experts=64, top_k=2, expert_dim=-1).flops_per_token() - \
        6 * 2 * 56 * 32  # more experts cost their rows of the router and nothing else


def test_which_layers_are_moe():
    def layers(**settings):
        model = small_model(n_layer=6, **MOE, **settings)
        model(tokens(1, 8), tokens(1, 8))
        found = [i for i, block in enumerate(model.transformer.h) if hasattr(block.mlp, "router")]
        assert len(model.stats["expert_load"]) == len(found)
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


def test_telemetry():
    even, uneven = torch.full((2, 4), 0.25), torch.tensor([[0.25] * 4, [0.7, 0.3, 0.0, 0.0]])
    stats = {"cross_entropy": torch.tensor(2.0), "balance_loss": torch.tensor(1.0), "z_loss": torch.tensor(0.0)}
    summary = summarize_routing(stats | {"expert_load": even})
    assert (summary["loss"], summary["max_vio"], summary["dead_experts"], summary["collapsed_layers"]) == (2.0, 0.0, 0, [])
    summary = summarize_routing(stats | {"expert_load": uneven})
    assert math.isclose(summary["max_vio"], 1.8, rel_tol=1e-6) and math.isclose(summary["max_vio_mean"], 0.9, rel_tol=1e-6)
    assert (summary["dead_experts"], summary["collapsed_layers"]) == (2, [1])
    nearly = torch.tensor([[0.97, *[0.03 / 7] * 7]])  # no expert is dead, and yet
    assert summarize_routing(stats | {"expert_load": nearly})["collapsed_layers"] == [0]
    assert summarize_routing({"cross_entropy": torch.tensor(2.0)}) == {"loss": 2.0}


@pytest.mark.parametrize("settings, message", [
    ({"top_k": 0}, "top_k is 0"), ({"num_experts": 0}, "num_experts is 0"),
    ({"top_k": 5}, r"top_k \(5\) is larger than num_experts \(4\)"), ({"num_dense_layers": 2}, "no layer is MoE"),
    ({"expert_dim": -2}, "expert_dim is -2"), ({"moe_stride": 0}, "moe_stride is 0"),
    ({"expert_load_balance_loss_coef": -1.0}, "coef is -1"), ({"router_z_loss_coef": float("nan")}, "coef is nan")], ids=str)
def test_bad_config_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        small_model(**MOE | settings)
