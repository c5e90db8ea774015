"""Traps of flow: which token reaches which logit, expert, gradient and random number.

One test per trap, named after it. tests/traps.py says where the table of all traps is.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from model import MLP, activate
from nanomoe.log import summarize
from nanomoe.optim import build_optimizer
from tests.helpers import small_model, succeeded, tokens, train
from tests.traps import (
    GROUPED_2,
    SOFTMAX_1,
    SOFTMAX_2,
    VARIANTS,
    Broken,
    E,
    both_dtypes,
    caught,
    close,
    every_variant,
    lively,
    precision,
    routers,
)

# two more kinds of routing: without norms and biases, and with shared experts
OTHERS = [
    SOFTMAX_2 | {"bias": False, "norm_top_k": False},
    GROUPED_2 | {"num_shared_experts": 2, "expert_dim": -1, "mlp": "swiglu"},
]


@every_variant
@pytest.mark.parametrize("norm_top_k", [True, False])
def test_top_1_renormalised(variant, norm_top_k):
    """The router gets a gradient from the language-model loss alone, also with K = 1.

    There, dividing the gate by itself would cut it off. (With K = E and a softmax, renormalising
    changes nothing.)"""
    model = small_model(**variant, norm_top_k=norm_top_k, expert_load_balance_loss_coef=0.0)
    model(tokens(2, 16), tokens(2, 16))[1].backward()
    assert all(router.weight.grad.abs().max() > 1e-7 for router in routers(model))


@every_variant
@both_dtypes
@pytest.mark.parametrize("capacity_factor", [0.0, 0.5])
def test_future_leak(variant, dtype, capacity_factor):
    """Tokens from t on change no logit before t, in training and eval, capacity on and off."""
    for mode in (True, False):
        model = lively(small_model(**variant, capacity_factor=capacity_factor)).train(mode)
        idx = tokens(2, 16)
        for router in routers(model):  # uneven loads, so that something is dropped
            router.weight.data[0] = router.weight.data[1]
        other = idx.clone()
        other[:, 9:] = (other[:, 9:] + 1) % 50
        other[1] = (idx[1] + 7) % 50  # nor does a neighbour change one
        with precision(dtype):
            close(model(idx, idx)[0][0, :9], model(other, other)[0][0, :9], dtype)
    if capacity_factor and variant["top_k"] < E:
        assert model.train()(idx, idx)[1].isfinite() and model.stats["dropped"].min() > 0.05


@every_variant
@both_dtypes
def test_batch_dependence(variant, dtype):
    """A sequence's logits do not depend on its neighbours in the batch."""
    model, idx = lively(small_model(**variant, capacity_factor=0.5)).eval(), tokens(5, 16)
    with precision(dtype):
        together = model(idx, idx)[0]
        for i in range(5):
            close(together[[i]], model(idx[[i]], idx[[i]])[0], dtype)


@every_variant
@both_dtypes
def test_noise_dropout_dropping_at_eval(variant, dtype):
    """Two evaluations are bit-equal, and equal one without noise, dropout and capacity."""
    noisy = {"router_jitter": 0.3, "expert_dropout": 0.3, "dropout": 0.3, "capacity_factor": 0.3}
    model, plain, idx = small_model(**variant, **noisy), small_model(**variant), tokens(2, 16)
    with precision(dtype):
        assert not model(idx, idx)[0].equal(model(idx, idx)[0])
        model.eval(), plain.eval()
        logits = model(idx, idx)[0]
        assert logits.equal(model(idx, idx)[0]) and logits.equal(plain(idx, idx)[0])
        assert (model.stats["dropped"] == 0).all()


@every_variant
@both_dtypes
def test_silent_expert(variant, dtype):
    """An expert without tokens gets a zero gradient, not None, not NaN; a step stays finite."""
    model = small_model(**variant)
    for router in routers(model):
        router.bias.data[3] = -10.0  # never chosen while there is another
    with precision(dtype):
        loss = model(tokens(2, 16), tokens(2, 16))[1]
    loss.backward()
    for block in model.transformer.h:
        for p in block.mlp.experts.parameters():
            assert (p.grad[3] == 0).all() or variant["top_k"] == E
            assert (p.grad[:3] != 0).any() and p.grad.isfinite().all()
    build_optimizer(model, "adamw", 1e-3, 0.1, (0.9, 0.95), "cpu").step()
    assert loss.isfinite() and all(p.isfinite().all() for p in model.parameters())


def test_silent_expert_does_not_hang_ddp(play, tmp_path):
    run = {"use_moe": True, "num_experts": 64, "top_k": 1, "batch_size": 1, "block_size": 16}
    out = succeeded(train(dataset=play, out_dir=tmp_path, ranks=2, **run))
    assert "dead 0" not in out.split("step 1/2")[1].splitlines()[0]


@every_variant
@both_dtypes
def test_validation_loss_includes_auxiliaries(variant, dtype):
    """In eval mode the loss is the cross-entropy, to the last bit."""
    z_loss = 0.0 if variant["router_score"] == "sigmoid" else 1.0
    losses = {"expert_load_balance_loss_coef": 1.0, "router_z_loss_coef": z_loss}
    model, idx = small_model(**variant, **losses, dropout=0.3), tokens(2, 16)
    with precision(dtype):
        logits, loss = model.eval()(idx, idx)
        cross_entropy = F.cross_entropy(logits.float().flatten(0, 1), idx.flatten())
        assert loss == cross_entropy == model.stats["cross_entropy"]
        objective = model.train()(idx, idx)[1]
    stats = model.stats
    auxiliary = stats["balance_loss"].mean() + z_loss * stats["z_loss"].mean()
    close(objective, stats["cross_entropy"] + auxiliary)


@every_variant
def test_state_leaks_from_sampling_into_training(variant):
    """generate() between two steps changes no loss: no stats, mode or random number."""

    def losses(sampling):
        model = small_model(**variant, dropout=0.1, router_jitter=0.1, router_bias_update_rate=0.1)
        optimizer, found = build_optimizer(model, "adamw", 1e-2, 0.1, (0.9, 0.95), "cpu"), []
        torch.manual_seed(1)
        for _ in range(3):
            loss = model(tokens(2, 16), tokens(2, 16))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if sampling:
                model.generate(tokens(1, 4), 4)
            model.update_balance(model.stats)
            found.append(loss.item())
        return found

    assert losses(True) == losses(False)


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
def test_e_1(impl, mlp):
    """One expert equals the dense MLP with the same weights."""
    model = small_model(use_moe=True, num_experts=1, top_k=1, expert_impl=impl, mlp=mlp)
    moe, dense = model.transformer.h[0].mlp, MLP(model.config)
    for p in moe.experts.parameters():
        torch.nn.init.normal_(p, std=0.2)
    for name, p in moe.experts.named_parameters():
        part, kind = name.removesuffix("_bias"), "bias" if name.endswith("bias") else "weight"
        getattr(getattr(dense, part), kind).data = p.data[0]
    x = torch.randn(2, 5, 32)
    close(moe(x)[0], dense(x))


@every_variant
@both_dtypes
def test_dropless_against_capacity(variant, dtype):
    """A capacity that nothing exceeds equals no limit; one below drops the right tokens."""
    idx, results = tokens(2, 16), []
    for capacity_factor in (0.0, float(E)):
        model = small_model(**variant, capacity_factor=capacity_factor)
        with precision(dtype):
            logits, loss = model(idx, idx)
        loss.backward()
        assert (model.stats["dropped"] == 0).all()
        results.append([logits, loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    # of each sequence, an expert keeps its first ceil(0.5 * T * K / E) tokens
    router, x = routers(small_model(**variant, capacity_factor=0.5))[0], torch.randn(3, 16, 32)
    gate, expert, routing = router(x)
    full, left = router.eval()(x)[0], math.ceil(0.5 * 16 * variant["top_k"] / E)
    expected, dropped = full.clone(), 0
    for sequence in range(3):
        used = [0] * E
        for n in range(16 * sequence, 16 * sequence + 16):
            for k in range(variant["top_k"]):
                used[expert[n, k]] += 1
                if used[expert[n, k]] > left:
                    expected[n, k], dropped = 0.0, dropped + 1
    assert dropped > 0
    close(gate, expected)
    close(routing.dropped, torch.tensor(dropped / gate.numel()))


def test_a_capacity_that_is_an_integer_is_not_rounded_up():
    """1.1 * 100 / 10 is 11.000000000000002 in floating point."""
    sizes = {"num_experts": 10, "top_k": 1, "block_size": 128}
    router = routers(small_model(use_moe=True, **sizes, capacity_factor=1.1))[0]
    expert_NK = torch.zeros(100, 1, dtype=torch.int64)  # all of 100 tokens go to one of ten experts
    chosen_BTE = F.one_hot(expert_NK.view(1, 100), 10)
    assert router.within_capacity(chosen_BTE, expert_NK).sum() == 11


@every_variant
@both_dtypes
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 1), (5, 13)], ids=str)
def test_ties_k_e_single_tokens_and_odd_sizes(variant, dtype, shape):
    odd = {"n_embd": 36, "n_head": 3, "expert_dim": 20}
    if dtype == torch.bfloat16:
        odd["expert_impl"] = "auto"  # grouped GEMMs in bfloat16 need widths of multiples of 8
    for sizes in ({}, odd):
        model = small_model(**variant | sizes, capacity_factor=1.0)
        routers(model)[0].weight.data.zero_()  # every expert ties with every other
        with precision(dtype):
            loss = model(tokens(*shape), tokens(*shape))[1]
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
        assert model.stats["expert_count"].sum() == 2 * shape[0] * shape[1] * variant["top_k"]
        assert summarize(model.stats)["loss"] > 0


# The trap "sample.py on its own checkpoints" is in tests/test_train.py:
# test_every_config_trains_two_steps_and_samples.
# -----------------------------------------------------------------------------
# every token reaches its experts, on both implementations
def every_expert_on_every_token(moe, x_ND):
    """A MoE layer's output, computed the dense way: all experts on all tokens, times the gate.

    The gate is 0 for the experts that a token does not visit."""
    config, experts = moe.router.config, moe.experts
    logit_NE = F.linear(x_ND, moe.router.weight)
    score_NE = logit_NE.softmax(-1) if config.router_score == "softmax" else logit_NE.sigmoid()
    chosen = torch.zeros_like(score_NE)
    for n, row in enumerate(score_NE):
        chosen[n, sorted(range(len(row)), key=lambda e: -row[e].item())[: config.top_k]] = 1
    gate_NE = score_NE * chosen
    if config.norm_top_k and config.top_k > 1:
        gate_NE = gate_NE / gate_NE.sum(-1, keepdim=True)
    biases = (0, 0)
    if experts.c_fc_bias is not None:
        biases = experts.c_fc_bias[:, None], experts.c_proj_bias[:, None]
    h_END = activate(x_ND @ experts.c_fc.transpose(1, 2) + biases[0], config.mlp)
    y_END = h_END @ experts.c_proj.transpose(1, 2) + biases[1]
    out = torch.einsum("ne,end->nd", gate_NE, y_END)
    return out if moe.shared is None else out + moe.shared(x_ND)


@pytest.mark.parametrize("variant", [*VARIANTS, *OTHERS], ids=str)
@both_dtypes
def test_lost_token(variant, dtype):
    """In value and gradient."""
    moe = small_model(**variant).transformer.h[0].mlp
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = torch.randn(21, 32, requires_grad=True)
    with precision(dtype):
        found = moe(x.view(3, 7, 32))[0].view(21, 32).float()
    results, outputs = [], (found, every_expert_on_every_token(moe, x))
    for y in outputs:
        loss = (y * torch.linspace(-1, 1, 32)).sum()
        results.append([y, *torch.autograd.grad(loss, [x, *moe.parameters()])])
    for a, b in zip(*results, strict=True):
        scale = 1e-5 if dtype == torch.float32 else 4e-2
        assert (a - b).abs().max() <= scale * b.abs().max()


# -----------------------------------------------------------------------------
# broken on purpose

test_broken_variants_are_caught = caught(
    (Broken.RenormalisedTop1, test_top_1_renormalised, SOFTMAX_1, True),
    (Broken.BatchwiseCapacity, test_future_leak, SOFTMAX_1, torch.float32, 0.5),
    (Broken.BatchwiseCapacity, test_future_leak, GROUPED_2, torch.float32, 0.5),
    (Broken.BatchwiseCapacity, test_future_leak, GROUPED_2, torch.bfloat16, 0.5),
    (Broken.BatchwiseCapacity, test_dropless_against_capacity, SOFTMAX_1, torch.float32),
    (Broken.LimitAtEval, test_noise_dropout_dropping_at_eval, SOFTMAX_2, torch.float32),
    (Broken.LimitAtEval, test_noise_dropout_dropping_at_eval, GROUPED_2, torch.bfloat16),
    (Broken.NoGradientForSilentExperts, test_silent_expert, SOFTMAX_2, torch.float32),
    (Broken.AuxiliariesAtEval, test_validation_loss_includes_auxiliaries, SOFTMAX_2, torch.float32),
    (Broken.SamplingCounts, test_state_leaks_from_sampling_into_training, SOFTMAX_1),
    (Broken.LostToken, test_lost_token, SOFTMAX_2, torch.float32),
    (Broken.LostToken, test_lost_token, GROUPED_2, torch.bfloat16),
    (Broken.LostToken, test_batch_dependence, SOFTMAX_1, torch.float32),
    (Broken.LostToken, test_batch_dependence, GROUPED_2, torch.bfloat16),
    (Broken.LostToken, test_e_1, "grouped", "gelu"),
)
