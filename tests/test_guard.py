"""What a run says about itself: right numbers, and the first layer that is not finite."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nanomoe import guard as guard_module
from nanomoe.guard import StepGuard, first_non_finite_layer
from nanomoe.log import summarize
from nanomoe.optim import build_optimizer
from tests.helpers import MOE, small_model, tokens, train


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_nan_in_a_router_raises_nothing(impl, score):
    model, idx = (
        small_model(**MOE, router_score=score, expert_impl=impl, capacity_factor=1.0),
        tokens(2, 16),
    )
    assert first_non_finite_layer(model, lambda: model(idx)) is None
    model.transformer.h[1].ln_2.weight.data[3] = math.nan
    assert first_non_finite_layer(model, lambda: model(idx)) == "transformer.h.1.ln_2"
    loss = model(idx, idx)[1]
    loss.backward()
    model.update_balance(model.stats)
    assert loss.isnan() and math.isnan(summarize(model.stats)["loss"])
    model.transformer.h[1].ln_2.weight.data[3] = 1.0
    model.transformer.h[1].mlp.experts.c_fc.data[:] = math.nan  # inside comes before outside
    inner = first_non_finite_layer(model, lambda: model(idx))
    assert inner == "transformer.h.1.mlp.experts"


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_skipped_step_names_the_layer(compiled, play, tmp_path):
    """Weights of 1e30 overflow: each later step is skipped, its line names the first layer whose
    output is not finite, and after more than 10 in a row the run stops."""
    done = train(
        dataset=play,
        out_dir=tmp_path,
        learning_rate=1e30,
        max_iters=20,
        warmup_iters=0,
        compile=compiled,
        **MOE,
    )
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    where = "the first output that is not finite is that of transformer."
    skipped = [line for line in done.stdout.splitlines() if " skipped: " in line]
    assert len(skipped) == 11 and all(where in line for line in skipped), done.stdout
    assert skipped[0].startswith("step 2 skipped: loss or gradient not finite; ")
    assert "error: 11 steps in a row had a loss or gradient not finite" in done.stderr
    assert where in done.stderr


def test_nothing_waits_for_the_device():
    """Steps run on tensors with shapes but no numbers, so a wait for a number would fail."""
    with FakeTensorMode():
        model = small_model(
            **MOE, expert_impl="grouped", router_bias_update_rate=1e-3, capacity_factor=1.0
        )
        optimizer = build_optimizer(model, "adamw", 1e-3, 0.1, (0.9, 0.95), "cpu")
        idx, stats = torch.zeros(2, 16, dtype=torch.int64), {}
        for _ in range(2):
            with torch.autocast(
                "cpu", torch.bfloat16
            ):  # without numbers, as compiled, grouped GEMMs are bfloat16 only
                model(idx, idx)[1].backward()
            for name, value in model.stats.items():
                stats[name] = stats.get(name, 0) + value
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.update_balance(stats)
        with pytest.raises(DataDependentOutputException):
            summarize(stats)


def test_spike_guard():
    """A step whose loss or norm lies six deviations above the window is skipped.

    None is skipped before half a window is full. A skipped step does not enter the window, so
    a second leap is skipped too.
    """
    guard, generator = StepGuard(6.0, "cpu", window=16), torch.Generator().manual_seed(0)

    def step(loss, norm):
        return guard.is_bad(torch.tensor(float(loss)), torch.tensor(float(norm))).item()

    assert not step(100, 1)  # the first one
    normal = (torch.randn(60, 2, generator=generator) * 0.1 + torch.tensor([3.0, 1.0])).tolist()
    assert not any(step(*pair) for pair in normal[:30])
    assert guard.count == 31 and guard.seen[:, 0].max() < 4  # the 100 has left the window
    assert (
        step(4.5, 1) and step(3, 2.5) and step(4.5, 1) and step(float("nan"), 1) and step(1e30, 1)
    )
    assert guard.count == 31 and torch.isfinite(guard.seen).all()
    other = StepGuard(6.0, "cpu", window=16)
    other.load_state_dict(guard.state_dict())
    assert other.is_bad(torch.tensor(4.5), torch.tensor(1.0)) and not step(
        0.1, 0.1
    )  # falling is no spike
    assert not any(step(*pair) for pair in normal[30:])


def test_lowering_the_scale_is_no_bad_step(monkeypatch, capsys):
    """A float16 run starts with a scale that overflows. Only at scale 1 is a skipped step bad."""
    monkeypatch.setattr(guard_module, "MAX_SKIPPED_IN_A_ROW", 2)
    for scale, enabled, stops in (
        (65536.0, True, False),
        (1.0, True, True),
        (65536.0, False, True),
    ):
        guard, scaler = (
            StepGuard(0.0, "cpu"),
            torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled),
        )
        scaler.scale(torch.ones(()))  # it makes its scale at the first use
        for loss in (1.0, math.inf, math.inf, math.inf):
            guard.is_bad(torch.tensor(loss), torch.tensor(1.0))
        if stops:
            with pytest.raises(FloatingPointError, match="3 steps in a row"):
                guard.report_skipped(4, scaler)
        else:
            guard.report_skipped(4, scaler)
        said = capsys.readouterr().out.splitlines()
        assert len(said) == 3 and said[0].startswith("step 2 skipped: ")
