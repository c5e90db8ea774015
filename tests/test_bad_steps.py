"""Steps whose loss or gradient is not finite, or leaps, update nothing; too many stop the run."""

import random
import re

import pytest
import torch

from nanomoe import checkpoint
from nanomoe.load import load
from tests.helpers import MOE, altered_train, full, succeeded, train, weights

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


@pytest.mark.parametrize(
    "processes, poison, more",
    [
        pytest.param(1, NAN_LOSS, "", id="nan"),
        pytest.param(1, NAN_LOSS, NOT_FUSED, id="nan, not fused"),
        pytest.param(2, NAN_LOSS, "", id="nan on one of two ranks"),
        full(2, INFINITE_LOSS, "", id="inf on one of two ranks"),
    ],
)
def test_bad_steps_update_nothing(processes, poison, more, play, tmp_path):
    """A loss or gradient is not finite, on one rank only. Every rank skips the step and says so in
    one line; weights and optimizer state do not change."""
    script = poisoned_train(tmp_path / "poison.py", poison, [3], processes - 1, more)
    run = {
        "dataset": play,
        "out_dir": tmp_path / "run",
        "max_iters": 4,
        "eval_interval": 1,
        "keep_last": 0,
        **MOE,
        "router_bias_update_rate": 1e-3,
        "gradient_accumulation_steps": processes,
    }
    out = succeeded(train(script=script, ranks=processes, **run))
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
    run = {
        "dataset": play,
        "out_dir": tmp_path / "run",
        "max_iters": 20,
        "eval_interval": 4,
        "gradient_accumulation_steps": 1,
    }
    done = train(script=script, **run)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "11 steps in a row had a loss or gradient not finite" in done.stderr
    good = load(tmp_path / "run")
    assert good.step == 12  # saved while steps were skipped, with the weights of step 4
    assert all(torch.isfinite(p).all() for p in good.weights.values())
    assert [step for step in range(1, 21) if f"step {step} skipped: " in done.stdout] == [
        2,
        *range(5, 16),
    ]


def test_spike_guard_skips_a_leap_and_resumes_to_the_bit(play, tmp_path):
    """After 64 steps, a step with a hundred times the loss is skipped. Neither that step nor
    resuming changes what is skipped later."""
    run = {
        "dataset": play,
        "max_iters": 90,
        "eval_interval": 70,
        "keep_last": 0,
        "spike_guard": 6.0,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
    }
    script = poisoned_train(tmp_path / "poison.py", "loss = loss * 100", [10, 75, 76])
    out = succeeded(train(script=script, **run, out_dir=tmp_path / "run"))
    assert "skipped: loss or gradient not finite (or a spike)" in out
    assert [step for step in range(91) if f"step {step} skipped: " in out] == [75, 76]
    script = poisoned_train(tmp_path / "poison.py", "loss = loss * 100", [5, 6])
    run |= {"out_dir": tmp_path / "again", "init_from": tmp_path / "run" / "70"}
    again = succeeded(train(script=script, **run))
    assert [step for step in range(91) if f"step {step} skipped: " in again] == [75, 76]
    a, b = (weights(checkpoint.latest_good(tmp_path / name)) for name in ("run", "again"))
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
    out = succeeded(train(script=script, ranks=2, **run))
    assert re.findall(r"step (\d+) skipped: ", out) == [str(step)], out
    before, bad, after = (
        weights(checkpoint.latest_good(out_dir / str(n))) for n in (step - 1, step, step + 1)
    )
    assert all(before[name].equal(bad[name]) for name in bad)
    assert not all(after[name].equal(bad[name]) for name in bad)
    last = weights(checkpoint.latest_good(out_dir))
    assert all(w.isfinite().all() for w in last.values())
