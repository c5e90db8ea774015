"""An upcycled MoE computes at first what the dense model does, if its gates sum to 1."""

import re

import pytest
import torch

from configurator import InputError
from moe_model import MoEBlock, build_config, build_model, config_to_dict
from nanomoe.load import load
from nanomoe.optim import build_optimizer
from nanomoe.upcycle import group_size, inexact_reason, upcycle
from tests.helpers import (
    MODERN,
    MOE,
    log,
    losses,
    one_line,
    run_script,
    small_model,
    succeeded,
    tokens,
    train,
)

NARROW = MODERN | {"bias": False, "mlp_dim": 96}
SIGMOID = {"router_score": "sigmoid", "route_scale": 2.5}
TOP_2 = {"num_experts": 4, "top_k": 2}
TOP_4 = {"num_experts": 8, "top_k": 4}
# name: the dense part, the MoE part, G. A dense MLP has 128 hidden units, or 96
EXACT = {
    "copies": ({}, TOP_2, 1),
    "all copies at once": ({}, {"num_experts": 3, "top_k": 3}, 1),
    "halves": ({}, TOP_2 | {"num_experts": 8, "expert_dim": -1}, 2),
    "quarters": ({"bias": False}, TOP_4 | {"expert_dim": 32}, 4),
    "two groups of halves": ({}, TOP_4 | {"expert_dim": 64}, 2),
    "shared": ({}, TOP_2 | {"num_experts": 6, "num_shared_experts": 2, "expert_dim": -1}, 2),
    "one shared": (NARROW, TOP_2 | {"num_shared_experts": 1, "expert_dim": 32}, 2),
    "sigmoid and scale": (NARROW, SIGMOID | {"num_experts": 9, "top_k": 3, "expert_dim": 32}, 3),
    "scale and biases": ({}, TOP_2 | {"expert_dim": 64, "route_scale": 0.3}, 2),
    "some layers": ({"mlp": "relu2"}, TOP_2 | {"num_dense_layers": 1}, 1),
    "all experts": ({}, {"num_experts": 4, "top_k": 4, "norm_top_k": False, "expert_dim": 64}, 2),
    "one expert": ({"mlp": "gelu_tanh"}, {"num_experts": 1, "top_k": 1}, 1),
    "in training": ({"n_kv_head": 1}, TOP_2 | {"router_jitter": 0.3}, 1),
}


def dense_model(**settings):
    model = small_model(**settings)
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.data = p.data + torch.randn(p.shape, generator=generator) * 0.7 * p.shape[-1] ** -0.5
    return model


def moe_config(dense, moe):
    return build_config(config_to_dict(dense.config) | {"use_moe": True} | moe)


def upcycled(dense, moe, **options):
    model = build_model(moe_config(dense, moe))
    weights = upcycle(dict(dense.state_dict()), dense.config, model.config, **options)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("settings, moe, G", EXACT.values(), ids=EXACT)
def test_the_first_loss_is_the_dense_models(settings, moe, G, impl):
    """To 1e-5, in evaluation and in training; and each logit."""
    dense, idx = dense_model(**settings), tokens(4, 16)
    model = upcycled(dense, moe | {"expert_impl": impl})
    assert group_size(dense.config, model.config) == G and inexact_reason(model.config) is None
    for training in (False, True):
        expected, loss = dense.train(training)(idx, idx)
        logits, _ = model.train(training)(idx, idx)
        assert abs(model.stats["cross_entropy"] - loss) < 1e-5 and loss > 1
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


def test_a_group_has_equal_router_rows():
    """Groups and layers have different ones, drawn with the seed."""
    moe = {"num_experts": 6, "top_k": 2, "expert_dim": 64}
    blocks = upcycled(dense_model(), moe, seed=3).transformer.h
    first, second = (block.mlp.router.weight for block in blocks)
    for router in (first, second):
        rows = router.view(3, 2, 32)
        assert rows[:, 0].equal(rows[:, 1]) and len(rows[:, 0].unique(dim=0)) == 3
        assert 0.01 < router.std() < 0.03
    assert not first.equal(second)
    for seed in (3, 4):
        again = upcycled(dense_model(), moe, seed=seed).transformer.h[0].mlp.router.weight
        assert first.equal(again) == (seed == 3)


def test_experts_become_different_in_training():
    """Copies and slices of one MLP become different, and so do a group's router rows."""
    model = upcycled(dense_model(), {"num_experts": 4, "top_k": 2, "expert_dim": 64})
    idx = tokens(8, 16)
    optimizer = build_optimizer(model, "adamw", 1e-2, 0.0, (0.9, 0.95), "cpu")
    for _ in range(5):
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    for block in model.transformer.h:
        experts, rows = block.mlp.experts.c_fc, block.mlp.router.weight
        assert not experts[0].equal(experts[2]) and not rows[0].equal(rows[1])


INEXACT = [
    ({"num_experts": 4, "top_k": 1}, "top_k > 1"),
    (TOP_2 | {"norm_top_k": False}, "norm_top_k"),
    (TOP_2 | SIGMOID | {"num_experts": 2, "norm_top_k": False}, "norm_top_k"),
    ({"num_experts": 1, "top_k": 1, "router_score": "sigmoid"}, "top_k > 1"),
]


@pytest.mark.parametrize("moe, why", INEXACT)
def test_an_inexact_start_is_reported(moe, why):
    dense, idx = dense_model(), tokens(4, 16)
    model = upcycled(dense, moe)
    assert why in inexact_reason(model.config)
    assert abs(model.eval()(idx, idx)[1] - dense.eval()(idx, idx)[1]) > 1e-3


NO_FIT = [
    (TOP_2 | {"expert_dim": 100}, "expert_dim can be 128 or 64"),
    (TOP_2 | {"num_shared_experts": 1}, "top_k=2, expert_dim can be 64"),
    (TOP_2 | {"num_experts": 5, "expert_dim": 64}, "(5) and top_k (2) must be multiples of 2"),
    (TOP_2 | {"top_k": 3, "expert_dim": 64}, "(4) and top_k (3) must be multiples of 2"),
    (TOP_2 | {"num_experts": 5, "expert_dim": 256}, "expert_dim can be 128"),
    (TOP_2 | {"top_k": 3, "expert_dim": 256}, "expert_dim can be 128"),
    (TOP_2 | {"num_shared_experts": 128}, "other num_shared_experts or top_k"),
]


@pytest.mark.parametrize("moe, words", NO_FIT)
def test_widths_that_do_not_fit(moe, words):
    dense = small_model()
    with pytest.raises(InputError) as error:
        group_size(dense.config, moe_config(dense, moe))
    assert str(error.value).endswith(words) and "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# train.py


def val_loss(out):
    return re.search(r"validation loss (\S+)", out)[1]


def test_a_run_starts_upcycled_and_resumes(dense_run, play, tmp_path):
    """With init_from 'upcycle' or 'auto'; later starts resume from the run's own checkpoints."""
    out_dir, whole = tmp_path / "run", tmp_path / "whole"
    run = {"dataset": play, "upcycle_from": dense_run, "learning_rate": 1e-3}
    run |= {"num_experts": 8, "top_k": 2, "expert_dim": -1}
    loss = load(dense_run).val_loss
    out = succeeded(train(**run, out_dir=out_dir, init_from="upcycle", eval_only=True))
    assert val_loss(out) == f"{loss:.4f}" and "step 0/2" in out and not out_dir.exists()
    assert "in 2 layers 8 experts, groups of 2" in out
    assert "at first it computes what the dense model does\n" in out
    run["max_iters"] = 3
    out = succeeded(train(**run, out_dir=out_dir, init_from="auto"))
    assert f"upcycled {dense_run}" in out and [*losses(out_dir)] == [1, 2, 3]
    settings = load(out_dir).settings  # the dense model's; its own
    assert settings["bias"] is True and settings["dropout"] == 0.0 and settings["n_embd"] == 32
    run["max_iters"] = 6
    out = succeeded(train(**run, out_dir=out_dir, init_from="auto"))
    assert f"upcycled {dense_run}" not in out and "after step 3" in out
    assert [*losses(out_dir)] == [1, 2, 3, 4, 5, 6]
    succeeded(train(**run, out_dir=whole, init_from="upcycle"))
    found, expected = losses(out_dir), losses(whole)
    assert all(found[step]["loss"] == expected[step]["loss"] for step in (1, 2, 3))
    assert log(whole)[0]["settings"]["upcycle_from"] == str(dense_run)
    run |= {"top_k": 1, "expert_dim": 0, "init_from": "upcycle"}
    out = succeeded(train(**run, out_dir=tmp_path / "top-1", eval_only=True))
    assert "not what the dense model does: a token's gates do not sum to 1, which needs" in out


@pytest.mark.full
def test_two_ranks_start_with_the_same_weights(dense_run, play, tmp_path):
    run = MOE | {"dataset": play, "init_from": "upcycle", "upcycle_from": dense_run}
    succeeded(train(**run, out_dir=tmp_path / "one"))
    for parallel in ("ddp", "fsdp"):
        succeeded(train(**run, out_dir=tmp_path / parallel, ranks=2, parallel=parallel))
        for step, entry in losses(tmp_path / parallel).items():
            assert abs(entry["loss"] - losses(tmp_path / "one")[step]["loss"]) < 1e-4


def test_a_longer_context_where_positions_are_rotations(play, tmp_path):
    succeeded(train(dataset=play, out_dir=tmp_path / "rope", position="rope"))
    run = {"dataset": play, "init_from": "upcycle", "upcycle_from": tmp_path / "rope"}
    succeeded(train(**run, use_moe=False, out_dir=tmp_path / "long", block_size=64))
    assert load(tmp_path / "long").config.block_size == 64
    # not given, it is the checkpoint's
    run |= {"use_moe": False, "eval_only": True, "batch_size": 2, "eval_iters": 2, "device": "cpu"}
    out = succeeded(run_script("train.py", **run, out_dir=tmp_path / "same"))
    assert "sequences x 32 tokens" in out


def test_refusals(dense_run, play, tmp_path):
    run = MOE | {"dataset": play, "init_from": "upcycle", "upcycle_from": dense_run}
    run["out_dir"] = tmp_path / "run"
    for settings, words in (
        ({"n_layer": 3}, ["--n_layer=3", "n_layer = 2"]),
        ({"out_dir": dense_run}, ["are both"]),
        ({"block_size": 64}, ["block_size is 64", "32 tokens"]),
        ({"expert_dim": 100}, ["expert_dim can be 128"]),
    ):
        one_line(train(**run | settings), 2, *words)
    done = train(**run | {"n_layer": 3, "bias": False})  # all of them
    flags = [line.split(": ")[1] for line in done.stderr.splitlines()]
    assert done.returncode == 2 and flags == ["--bias=False", "--n_layer=3"]
    assert not (tmp_path / "run").exists()
    succeeded(train(**run, max_iters=1))
    again = run | {"upcycle_from": tmp_path / "run", "out_dir": tmp_path / "again"}
    assert "starting with the weights of" in succeeded(train(**again))  # it is a MoE already
    one_line(train(**again | {"num_experts": 8}), 2, "num_experts = 8 contradicts")
    model = load(tmp_path / "run").build_model()
    assert all(isinstance(block, MoEBlock) for block in model.transformer.h)
