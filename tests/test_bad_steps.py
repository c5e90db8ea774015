"""Steps with a loss or gradient that is not finite or leaps update nothing; many stop the run."""

import pytest
import torch

from nanomoe import checkpoint
from tests.helpers import MOE, ROOT, SMALL, full, run_script, succeeded, weights

POISON = """
import os, sys
sys.path.insert(0, {root!r})
import train
from model import GPT
calls, head = [], GPT.logits_and_loss

def poisoned(self, x, targets):
    logits, loss = head(self, x, targets)
    if loss is not None and self.training:
        calls.append(1)
        if len(calls) in {calls} and int(os.environ.get("RANK", 0)) == {rank}:
            loss = {poison}
    return logits, loss
GPT.logits_and_loss = poisoned
configure_optimizers = GPT.configure_optimizers

def without_fused_kernel(self, weight_decay, learning_rate, betas, device_type):
    return configure_optimizers(self, weight_decay, learning_rate, betas, "mps")
if {plain}:
    GPT.configure_optimizers = without_fused_kernel
if __name__ == "__main__":
    train.run_main(train.main)
"""


@pytest.mark.parametrize(
    "processes, plain, poison",
    [
        (1, False, "loss * float('nan')"),
        (1, True, "loss * float('nan')"),
        (2, False, "loss * float('nan')"),
        # the gradient of this one is finite, only the loss is not
        full(2, False, "loss + float('inf')"),
    ],
)
def test_bad_steps_update_nothing(processes, plain, poison, play, tmp_path):
    """If one rank's loss or gradient is not finite, every rank skips the step.

    All state stays as it was, and one line says so.
    """
    (tmp_path / "poison.py").write_text(
        POISON.format(root=str(ROOT), calls=[3], rank=processes - 1, plain=plain, poison=poison)
    )
    run = SMALL | {
        "dataset": play,
        "out_dir": tmp_path / "run",
        "max_iters": 4,
        "eval_interval": 1,
        "keep_last": 0,
        **MOE,
        "router_bias_update_rate": 1e-3,
        "gradient_accumulation_steps": processes,
    }
    done = run_script(tmp_path / "poison.py", processes=processes, **run)
    out = succeeded(done)
    assert out.count("step 3 skipped: loss or gradient not finite; weights unchanged") == 1
    assert out.count("not finite") == 1
    two, three, four = (checkpoint.load(tmp_path / "run" / str(step)) for step in (2, 3, 4))
    assert all(two.weights[name].equal(three.weights[name]) for name in two.weights)
    assert not all(three.weights[name].equal(four.weights[name]) for name in two.weights)
    before, after = (c.training_state()["optimizer"]["state"] for c in (two, three))
    assert all(before[i][key].equal(after[i][key]) for i in before for key in before[i])
    assert all(torch.isfinite(p).all() for p in four.weights.values())


def test_too_many_bad_steps_in_a_row_stop_the_run(play, tmp_path):
    poison = POISON.format(
        root=str(ROOT), calls=[2, *range(5, 18)], rank=0, plain=False, poison="loss * float('nan')"
    )
    (tmp_path / "poison.py").write_text(poison)
    run = SMALL | {
        "dataset": play,
        "out_dir": tmp_path / "run",
        "max_iters": 20,
        "eval_interval": 4,
        "gradient_accumulation_steps": 1,
    }
    done = run_script(tmp_path / "poison.py", **run)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "11 steps in a row had a loss or gradient not finite" in done.stderr
    good = checkpoint.load(tmp_path / "run")
    assert good.step == 4 and all(torch.isfinite(p).all() for p in good.weights.values())
    assert [step for step in range(1, 21) if f"step {step} skipped: " in done.stdout] == [
        2,
        *range(5, 16),
    ]


def test_spike_guard_skips_a_leap_and_resumes_to_the_bit(play, tmp_path):
    """After 64 steps, a step whose loss is a hundred times as large is skipped.

    Neither a skipped step nor resuming changes which steps are skipped later.
    """
    run = SMALL | {
        "dataset": play,
        "max_iters": 90,
        "eval_interval": 70,
        "keep_last": 0,
        "spike_guard": 6.0,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
    }
    poison = {"root": str(ROOT), "rank": 0, "plain": False, "poison": "loss * 100"}
    (tmp_path / "poison.py").write_text(POISON.format(**poison, calls=[10, 75, 76]))
    out = succeeded(run_script(tmp_path / "poison.py", **run, out_dir=tmp_path / "run"))
    assert "skipped: loss or gradient not finite (or a spike)" in out
    assert [step for step in range(91) if f"step {step} skipped: " in out] == [75, 76]
    (tmp_path / "poison.py").write_text(POISON.format(**poison, calls=[5, 6]))
    again = succeeded(
        run_script(
            tmp_path / "poison.py",
            **run,
            out_dir=tmp_path / "again",
            init_from=tmp_path / "run" / "70",
        )
    )
    assert [step for step in range(91) if f"step {step} skipped: " in again] == [75, 76]
    a, b = (weights(checkpoint.locate(tmp_path / name)) for name in ("run", "again"))
    assert all(a[name].equal(b[name]) for name in a)
