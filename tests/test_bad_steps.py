"""Steps whose loss or gradient is not finite, or leaps, update nothing; too many stop the run. A
line names the first layer that is not finite."""

import contextlib
import math
import random
import re

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nanomoe import guard as guard_module
from nanomoe.guard import StepGuard, first_non_finite_layer
from nanomoe.load import load
from nanomoe.log import summarize
from nanomoe.optim import build_optimizer
from tests.helpers import (
    MOE,
    altered_train,
    full,
    small_model,
    succeeded,
    tokens,
    train,
)

POISON = """
from model import GPT
calls, logits_and_loss = [], GPT.logits_and_loss

def poisoned(self, x, targets):
    logits, loss = logits_and_loss(self, x, targets)
    if loss is not None and self.training:
        calls.append(1)
        if len(calls) in {calls} and rank == {on_rank}:
            {poison}
    return logits, loss
GPT.logits_and_loss = poisoned
"""
NAN_LOSS = "loss = loss * float('nan')"
INFINITE_LOSS = "loss = loss + float('inf')"  # its gradient is finite: only the loss tells
NAN_GRADIENT = "x.register_hook(lambda grad: grad * float('nan'))"  # the loss is finite
# AdamW without the fused kernel, as on mps
NOT_FUSED = """
build_optimizer = train.build_optimizer
def not_fused(*options):
    return build_optimizer(*options[:-1], "mps")
train.build_optimizer = not_fused
"""


def poisoned_train(path, poison, calls, on_rank=0, more=""):
    """Write a script that is train.py with a poison, a line that sees x and loss, in these
    forward passes (the first is 1) of one rank."""
    return altered_train(path, POISON.format(calls=calls, on_rank=on_rank, poison=poison) + more)


def skipped_steps(out):
    return [int(step) for step in re.findall(r"step (\d+) skipped: ", out)]


@pytest.mark.parametrize(
    "ranks, poison, more",
    [
        pytest.param(1, NAN_LOSS, "", id="nan"),
        pytest.param(1, NAN_LOSS, NOT_FUSED, id="nan, not fused"),
        pytest.param(2, NAN_LOSS, "", id="nan on one of two ranks"),
        full(2, INFINITE_LOSS, "", id="inf on one of two ranks"),
    ],
)
def test_bad_steps_update_nothing(ranks, poison, more, play, tmp_path):
    """A loss or gradient is not finite, on one rank only. Every rank skips the step and says so in
    one line; weights and optimizer state do not change."""
    script = poisoned_train(tmp_path / "poison.py", poison, [3], ranks - 1, more)
    run = {"dataset": play, "out_dir": tmp_path / "run", "max_iters": 4, "eval_interval": 1}
    run |= MOE | {"keep_last": 0, "router_bias_update_rate": 1e-3}
    run["gradient_accumulation_steps"] = ranks
    out = succeeded(train(script=script, ranks=ranks, **run))
    assert out.count("step 3 skipped: loss or gradient not finite; weights unchanged") == 1
    assert out.count("not finite") == 1
    two, three, four = (load(tmp_path / "run" / str(step)) for step in (2, 3, 4))
    assert all(two.weights[name].equal(three.weights[name]) for name in two.weights)
    assert not all(three.weights[name].equal(four.weights[name]) for name in two.weights)
    before, after = (c.training_state()["optimizer"]["state"] for c in (two, three))
    assert all(before[i][key].equal(after[i][key]) for i in before for key in before[i])
    assert all(torch.isfinite(p).all() for p in four.weights.values())


def test_too_many_bad_steps_in_a_row_stop_the_run(play, tmp_path):
    script = poisoned_train(tmp_path / "poison.py", NAN_LOSS, [2, *range(5, 18)])
    run = {"dataset": play, "out_dir": tmp_path / "run", "max_iters": 20, "eval_interval": 4}
    done = train(script=script, **run, gradient_accumulation_steps=1)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "11 steps in a row had a loss or gradient not finite" in done.stderr
    good = load(tmp_path / "run")
    assert good.step == 12  # saved while steps were skipped, with the weights of step 4
    assert all(torch.isfinite(p).all() for p in good.weights.values())
    assert skipped_steps(done.stdout) == [2, *range(5, 16)]


@pytest.mark.parametrize("compiled", [False, full(True)])
def test_a_skipped_step_names_the_layer(compiled, play, tmp_path):
    """Weights of 1e30 overflow: each later step is skipped, its line names the first layer whose
    output is not finite, and so does the line with which the run stops."""
    run = {"dataset": play, "out_dir": tmp_path, "max_iters": 20, "compile": compiled, **MOE}
    done = train(**run, learning_rate=1e30, warmup_iters=0)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    where = "the first output that is not finite is that of transformer."
    skipped = [line for line in done.stdout.splitlines() if " skipped: " in line]
    assert len(skipped) == 11 and all(where in line for line in skipped), done.stdout
    assert skipped[0].startswith("step 2 skipped: loss or gradient not finite; ")
    assert where in done.stderr


def test_spike_guard_skips_a_leap_and_resumes_to_the_bit(play, tmp_path):
    """After 64 steps, a step with a hundred times the loss is skipped. Neither that step nor
    resuming changes what is skipped later."""
    run = {"dataset": play, "max_iters": 90, "eval_interval": 70, "keep_last": 0}
    run |= {"spike_guard": 6.0, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    script = poisoned_train(tmp_path / "poison.py", "loss = loss * 100", [10, 75, 76])
    out = succeeded(train(script=script, **run, out_dir=tmp_path / "run"))
    assert "skipped: loss or gradient not finite (or a spike)" in out
    assert skipped_steps(out) == [75, 76]
    script = poisoned_train(tmp_path / "poison.py", "loss = loss * 100", [5, 6])
    run |= {"out_dir": tmp_path / "again", "init_from": tmp_path / "run" / "70"}
    assert skipped_steps(succeeded(train(script=script, **run))) == [75, 76]
    a, b = (load(tmp_path / name).weights for name in ("run", "again"))
    assert all(a[name].equal(b[name]) for name in a)


@pytest.mark.full
@pytest.mark.repeat(2)
def test_nan_gradient_on_one_rank(seed, play, tmp_path):
    """With DDP or FSDP. Every loss is finite, one rank's gradient is not: all ranks skip that step
    and no other."""
    rng = random.Random(seed)
    step = rng.randrange(2, 6)
    script = poisoned_train(tmp_path / "poison.py", NAN_GRADIENT, [step], rng.randrange(2))
    out_dir, parallel = tmp_path / "run", ("ddp", "fsdp")[seed % 2]
    run = {"dataset": play, "out_dir": out_dir, "parallel": parallel, "dropout": 0.1, **MOE}
    run |= {"router_bias_update_rate": 1e-3, "max_iters": 7, "eval_interval": 1, "keep_last": 0}
    assert skipped_steps(succeeded(train(script=script, ranks=2, **run))) == [step]
    before, bad, after = (load(out_dir / str(n)).weights for n in (step - 1, step, step + 1))
    assert all(before[name].equal(bad[name]) for name in bad)
    assert not all(after[name].equal(bad[name]) for name in bad)
    assert all(w.isfinite().all() for w in load(out_dir).weights.values())


# -----------------------------------------------------------------------------
# the guard by itself


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_nan_in_a_router_raises_nothing(impl, score):
    moe = MOE | {"router_score": score, "expert_impl": impl, "capacity_factor": 1.0}
    model, idx = small_model(**moe), tokens(2, 16)
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


def test_nothing_waits_for_the_device():
    """Steps run on tensors with shapes but no numbers, so a wait for a number would fail."""
    moe = MOE | {"expert_impl": "grouped", "router_bias_update_rate": 1e-3, "capacity_factor": 1.0}
    with FakeTensorMode():
        model = small_model(**moe)
        optimizer = build_optimizer(model, "adamw", 1e-3, 0.1, (0.9, 0.95), "cpu")
        idx, stats = torch.zeros(2, 16, dtype=torch.int64), {}
        for _ in range(2):
            # without numbers, as compiled, grouped GEMMs are bfloat16 only
            with torch.autocast("cpu", torch.bfloat16):
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
    a second leap is skipped too."""
    guard, generator = StepGuard(6.0, "cpu", window=16), torch.Generator().manual_seed(0)

    def step(loss, norm, guard=guard):
        return guard.is_bad(torch.tensor(float(loss)), torch.tensor(float(norm))).item()

    assert not step(100, 1)  # the first one
    normal = (torch.randn(60, 2, generator=generator) * 0.1 + torch.tensor([3.0, 1.0])).tolist()
    assert not any(step(*pair) for pair in normal[:30])
    assert guard.count == 31 and guard.seen[:, 0].max() < 4  # the 100 has left the window
    for pair in ((4.5, 1), (3, 2.5), (4.5, 1), (math.nan, 1), (1e30, 1)):
        assert step(*pair), pair
    assert guard.count == 31 and torch.isfinite(guard.seen).all()
    other = StepGuard(6.0, "cpu", window=16)
    other.load_state_dict(guard.state_dict())
    assert step(4.5, 1, other) and not step(0.1, 0.1)  # falling is no spike
    assert not any(step(*pair) for pair in normal[30:])


@pytest.mark.parametrize(
    "scale, enabled, stops", [(65536.0, True, False), (1.0, True, True), (65536.0, False, True)]
)
def test_lowering_the_scale_is_no_bad_step(scale, enabled, stops, monkeypatch, capsys):
    """A float16 run starts with a scale that overflows. Only at scale 1 is a skipped step bad."""
    monkeypatch.setattr(guard_module, "MAX_SKIPPED_IN_A_ROW", 2)
    guard = StepGuard(0.0, "cpu")
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=enabled)
    scaler.scale(torch.ones(()))  # it makes its scale at the first use
    for loss in (1.0, math.inf, math.inf, math.inf):
        guard.is_bad(torch.tensor(loss), torch.tensor(1.0))
    stopped = pytest.raises(FloatingPointError, match="3 steps in a row")
    with stopped if stops else contextlib.nullcontext():
        guard.report_skipped(4, scaler)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[0].startswith("step 2 skipped: ")
