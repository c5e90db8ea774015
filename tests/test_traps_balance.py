"""Traps of balancing: the balance loss, and the bias of loss-free balancing.

One test per trap, named after it. tests/traps.py says where the table of all traps is.
"""

import pytest
import torch
import torch.nn.functional as F

import moe_model
from moe_model import build_config
from tests.helpers import full, small_model, succeeded, tokens, train, weights
from tests.traps import (
    SIGMOID_2,
    SOFTMAX_1,
    SOFTMAX_2,
    Broken,
    E,
    caught,
    close,
    collapse,
    every_variant,
    routers,
)


def direct_router(variant):
    """A router whose inputs are the logits."""
    options = variant | {"balance_scope": "micro", "n_embd": E, "n_head": 1}
    router = moe_model.Router(build_config(options))
    router.weight.data = torch.eye(E)
    return router


@every_variant
@pytest.mark.parametrize("scope", ["micro", "global"])
def test_balance_loss_pooled_over_layers(variant, scope):
    """Layers that collapsed onto different experts score E / K. Pooled, they look balanced."""
    model, idx = small_model(**variant, n_layer=4, balance_scope=scope), tokens(2, 16)
    collapse(model)
    coef, K = model.config.expert_load_balance_loss_coef, variant["top_k"]
    for _ in range(2):  # the global scope knows the load from the step before
        objective = model(idx, idx)[1]
        model.update_balance(model.stats)
    torch.testing.assert_close(model.stats["balance_loss"], torch.full((4,), E / K))
    close(objective - model.stats["cross_entropy"], torch.tensor(coef * E / K))
    torch.testing.assert_close(
        model.stats["expert_count"].sum(0), torch.full((E,), 32.0 * K)
    )  # what a pooled loss would see


@every_variant
@pytest.mark.parametrize("n_layer", [1, 2, 6])
def test_balance_loss_grows_with_k_or_with_depth(variant, n_layer):
    """Perfect balance is 1 for every K and every depth."""
    model = small_model(**variant, n_layer=n_layer, expert_load_balance_loss_coef=1.0)
    for router in routers(model):
        router.weight.data.zero_()  # equal scores, P = 1 / E: the loss is 1 whatever the load
    objective = model(tokens(2, 16), tokens(2, 16))[1]
    close(objective - model.stats["cross_entropy"], torch.tensor(1.0))
    router = direct_router(variant)
    # token n likes experts n, n + 1, ... best first: all are liked and loaded equally
    routing = router(torch.stack([-torch.arange(float(E)).roll(n) for n in range(E)])[None])[2]
    close(routing.balance_loss, torch.tensor(1.0))


@every_variant
def test_balance_loss_can_be_gamed(variant):
    """Shifting all logits gains nothing.

    Softmax: the loss stays as it is. Sigmoid: at balanced load the loss is 1 whatever the shift."""
    router = direct_router(variant)
    balanced = torch.stack([-torch.arange(float(E)).roll(n) for n in range(E)])[None]
    logits = torch.randn(1, 64, E)
    for shift in (-20.0, -3.0, 5.0):
        close(router(balanced + shift)[2].balance_loss, torch.tensor(1.0))
        if variant["router_score"] == "softmax":
            close(router(logits + shift)[2].balance_loss, router(logits)[2].balance_loss)


# -----------------------------------------------------------------------------
# loss-free balancing
@every_variant
def test_bias_leaks_into_gates(variant):
    """Given the choice, the gates are independent of the bias, and the choice depends on it."""
    router = routers(small_model(**variant, norm_top_k=False))[0]
    x = torch.randn(2, 16, 32)
    score = F.linear(x.flatten(0, 1), router.weight)
    score = score.softmax(-1) if variant["router_score"] == "softmax" else score.sigmoid()
    _, before, _ = router(x)
    router.bias.data = torch.tensor([0.0, 0.7, 0.1, -0.5])
    gate, expert, routing = router(x)
    close(gate, score.gather(1, expert))
    assert (expert == 1).any(dim=1).all() and (variant["top_k"] == E or not before.equal(expert))
    assert not router.bias.requires_grad
    close(routing.balance_loss, torch.tensor(1.0))  # P does not depend on the bias either


@pytest.mark.parametrize(
    "variant",
    [
        full({"router_score": "softmax", "top_k": 1}),
        {"router_score": "sigmoid", "top_k": 2, "expert_impl": "grouped"},
    ],
    ids=str,
)
def test_bias_updated_per_micro_step_or_in_eval(variant, play, tmp_path):
    """1 x 8 sequences, 2 x 4 accumulated, 2 ranks x 4: same bias, loss and weights."""
    runs = {"1x8": (1, 8, 1), "2x4": (2, 4, 1), "2 ranks": (2, 4, 2), "with eval": (2, 4, 1)}
    run = {"dataset": play, "use_moe": True, "num_experts": 8, "max_iters": 5, **variant}
    run |= {"router_bias_update_rate": 1e-2, "expert_load_balance_loss_coef": 0.1}
    run |= {"learning_rate": 1e-4}
    found = {}
    for name, (accumulation, batch_size, ranks) in runs.items():
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        sizes["eval_interval"] = 1 if name == "with eval" else 100
        succeeded(train(**run, **sizes, out_dir=tmp_path / name, ranks=ranks))
        found[name] = weights(tmp_path / name / "step-00000005")
    bias = [p for name, p in found["1x8"].items() if name.endswith("router.bias")]
    assert all(b.abs().max() >= 9.99e-3 and abs(b.sum()) < 1e-6 for b in bias)
    for name, ours in found.items():
        for key, p in ours.items():
            assert (p - found["1x8"][key]).abs().max() <= 1e-6, (name, key)


@pytest.mark.parametrize("how", ["micro", "global", "bias"])
def test_balancing_evens_out_the_load(how):
    """By the balance loss alone, in each scope, and by the bias alone: an expert that most tokens
    like ends with little more than its share."""
    torch.manual_seed(0)
    balance = {"router_bias_update_rate": 2e-3} if how == "bias" else {"balance_scope": how}
    model = small_model(use_moe=True, num_experts=8, top_k=2, n_layer=1, n_embd=16, **balance)
    router, loads = routers(model)[0], []
    router.weight.data = 0.25 * torch.randn(8, 16)
    x = (torch.randn(1024, 16) + 2 * router.weight.data[0])[None]  # most tokens like expert 0
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0 if how == "bias" else 0.03)
    for _ in range(300):
        routing = router(x)[2]
        loads.append(routing.expert_count.max() / routing.expert_count.mean())
        routing.balance_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_balance({"expert_count": routing.expert_count[None]})
    assert loads[0] > 3 and loads[-1] < 1.15


# -----------------------------------------------------------------------------
# broken on purpose

test_broken_variants_are_caught = caught(
    (Broken.PooledBalanceLoss, test_balance_loss_pooled_over_layers, SOFTMAX_1, "micro"),
    (Broken.PooledBalanceLoss, test_balance_loss_pooled_over_layers, SIGMOID_2, "global"),
    (Broken.SumOverK, test_balance_loss_grows_with_k_or_with_depth, SOFTMAX_2, 2),
    (Broken.UnnormalisedSigmoid, test_balance_loss_can_be_gamed, SIGMOID_2),
    (Broken.BiasInGates, test_bias_leaks_into_gates, SOFTMAX_2),
    (Broken.BiasInGates, test_bias_leaks_into_gates, SIGMOID_2),
)
