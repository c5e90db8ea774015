"""Traps of what surrounds the model: checkpoints, precision, FLOPs, the optimizer.

One test per trap, named after it. tests/traps.py says where the table of all traps is.
"""

import pytest
import torch

from nanomoe import optim
from nanomoe.load import load
from nanomoe.optim import build_optimizer
from tests.helpers import one_line, run_script, small_model, succeeded, tokens, train
from tests.traps import (
    SOFTMAX_2,
    Broken,
    E,
    both_dtypes,
    caught,
    every_variant,
    precision,
    routers,
)


@every_variant
@both_dtypes
def test_activation_checkpointing_counts_or_routes_twice(variant, dtype):
    """Same loss, gradients and counts as without it."""
    idx, results = tokens(2, 16), []
    for checkpointing in (False, True):
        noise = {"dropout": 0.1, "router_jitter": 0.1, "expert_dropout": 0.1}
        options = noise | {"balance_scope": "micro", "gradient_checkpointing": checkpointing}
        model = small_model(**variant, **options)
        torch.manual_seed(1)
        with precision(dtype):
            loss = model(idx, idx)[1]
        loss.backward()
        results.append([loss, *model.stats.values(), *(p.grad for p in model.parameters())])
    assert model.stats["expert_count"].sum() == 2 * 32 * variant["top_k"]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@every_variant
def test_half_precision_router(variant):
    """Router logits, scores and gates are float32 under autocast."""
    router, x = routers(small_model(**variant))[0], torch.randn(1, 9, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        gate, expert, routing = router(x)
    assert gate.dtype == torch.float32 and all(value.dtype == torch.float32 for value in routing)
    gate_32, expert_32, routing_32 = router(x.float())
    found, wanted = (gate, expert, *routing), (gate_32, expert_32, *routing_32)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_resume_ignores_moe_arguments(play, tmp_path):
    """The checkpoint's config wins. A contradicting flag is an error that names both values."""
    moe = {"num_experts": 8, "top_k": 2, "router_score": "sigmoid", "router_bias_update_rate": 0.01}
    succeeded(train(dataset=play, out_dir=tmp_path, use_moe=True, **moe))
    run = {"dataset": play, "out_dir": tmp_path, "init_from": "resume", "device": "cpu"}
    others = {"num_experts": 16, "top_k": 1, "router_score": "softmax", "use_moe": False}
    for key, value in others.items():
        done = run_script("train.py", **run, **{key: value})
        one_line(done, 2, repr(value), repr(moe.get(key, True)))
    succeeded(run_script("train.py", **run, max_iters=3))  # none of it given again
    config = load(tmp_path).build_model().config
    assert config.expert_impl and all(getattr(config, key) == value for key, value in moe.items())


def test_mfu_with_all_experts():
    """FLOPs and active parameters count the active experts only."""
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


@every_variant
@pytest.mark.parametrize("mlp", ["gelu", "swiglu", "relu2"])
def test_stacked_weights_missed(variant, mlp):
    """A stacked (E, out, in) parameter counts as E matrices, a stacked (E, out) bias as none."""
    model = small_model(**variant, mlp=mlp, n_embd=128, n_layer=8)
    dense = small_model(mlp=mlp, n_embd=128, n_layer=8)
    for block, twin in zip(model.transformer.h, dense.transformer.h, strict=True):
        for name in ("c_fc", "c_proj"):
            stacked, matrix = getattr(block.mlp.experts, name), getattr(twin.mlp, name).weight
            assert stacked.shape == (E, *matrix.shape)
            for expert in stacked:
                assert abs(expert.std() / matrix.std() - 1) < 0.03
                assert abs(expert.mean()) < matrix.std() / 20
    decayed, rest = build_optimizer(model, "adamw", 1e-3, 0.1, (0.9, 0.95), "cpu").param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(rest["params"]) == len(names)
    for group, decays in ((decayed, True), (rest, False)):
        for name in (names[id(p)] for p in group["params"]):
            assert decays == (not name.endswith("bias") and ".ln_" not in name), name


# -----------------------------------------------------------------------------
# broken on purpose

test_broken_variants_are_caught = caught(
    (
        Broken.CountsTwice,
        test_activation_checkpointing_counts_or_routes_twice,
        SOFTMAX_2,
        torch.float32,
    ),
    (Broken.HalfPrecision, test_half_precision_router, SOFTMAX_2),
    (Broken.AllExpertsActive, test_mfu_with_all_experts),
)


def test_a_decay_by_the_number_of_dimensions_is_caught(monkeypatch):
    monkeypatch.setattr(optim, "is_matrix", lambda name, p: p.dim() >= 2)
    with pytest.raises(AssertionError):
        test_stacked_weights_missed(SOFTMAX_2, "gelu")
