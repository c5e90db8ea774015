"""The training loop: gradients, clock, log and the choice of checkpoints, with known numbers."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train as train_module
from nanomoe.checkpoint import list_steps, step_of
from nanomoe.device import Timer
from nanomoe.guard import StepGuard
from nanomoe.load import load
from nanomoe.schedule import Schedule
from tests.helpers import MOE, altered_train, log, losses, small_model, succeeded, tokens, train

CPU = torch.device("cpu")
# Evaluations give these losses, and each takes 1000 seconds.
KNOWN_EVALUATIONS = """
import time
clock, values, lost = time.perf_counter, {values}, [0]

def evaluate(run):
    lost[0] += 1000
    return values.pop(0)

time.perf_counter = lambda: clock() + lost[0]
train.evaluate = evaluate
"""
PRINT_NORM = """
clip = train.torch.nn.utils.clip_grad_norm_

def print_norm(*arguments):
    norm = clip(*arguments)
    print("norm", norm.item())
    return norm

train.torch.nn.utils.clip_grad_norm_ = print_norm
"""


class TwoBatches:
    """A reader of two micro-batches, the fifth and the sixth of a run."""

    def __init__(self):
        size = train_module.batch_size
        self.left = [(5 * size, self.windows(5)), (6 * size, self.windows(6))]

    def windows(self, index):
        return tokens(2, 16, seed=index).numpy(), tokens(2, 16, seed=index + 10).numpy()

    def next(self):
        return self.left.pop(0)


class KeepGradients(torch.optim.SGD):
    def step(self):
        self.gradients = [p.grad for group in self.param_groups for p in group["params"]]


def test_gradients_are_the_mean_over_micro_batches(monkeypatch):
    """The stats are the sums. Each micro-batch has its own dropout. The counters go on."""
    settings = {"gradient_accumulation_steps": 2, "dtype": "float32", "grad_clip": 0}
    for name, value in settings.items():
        monkeypatch.setattr(train_module, name, value)
    model, twin = (small_model(dropout=0.2, balance_scope="micro", **MOE) for _ in range(2))
    run = train_module.Run(
        device=CPU,
        settings={},
        data=None,
        schedule=Schedule(learning_rate=0.5, min_lr=0.0, warmup_iters=0, max_iters=9),
        log=None,
        model=model,
        train_model=model,
        opt=KeepGradients(model.parameters(), lr=1.0),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        guard=StepGuard(0.0, CPU),
        flops_per_token=model.flops_per_token(),
        reader=TwoBatches(),
        saver=SimpleNamespace(changing=contextlib.nullcontext),
        timer=Timer(CPU),
    )
    stats, norm = train_module.train_step(run)
    assert (run.step, run.sequences) == (1, 2 * train_module.batch_size)
    assert run.opt.param_groups[0]["lr"] == 0.5
    assert all(p.grad is None for p in model.parameters())
    expected = {}
    for first, (x, y) in TwoBatches().left:
        train_module.seed_dropout(first // train_module.batch_size)
        (twin(torch.from_numpy(x), torch.from_numpy(y))[1] / 2).backward()
        for name, value in twin.stats.items():
            expected[name] = expected.get(name, 0) + value
    for gradient, other in zip(run.opt.gradients, twin.parameters(), strict=True):
        torch.testing.assert_close(gradient, other.grad)
    squares = sum(p.grad.square().sum() for p in twin.parameters())
    torch.testing.assert_close(norm, squares.sqrt())
    torch.testing.assert_close(stats, expected)


def test_dropout_depends_on_seed_and_micro_batch(monkeypatch):
    def draw(seed, index):
        monkeypatch.setattr(train_module, "seed", seed)
        train_module.seed_dropout(index)
        return torch.rand(1).item()

    drawn = [draw(seed, index) for seed in (1, 2) for index in (0, 1, 2)]
    assert len(np.unique(drawn)) == 6 and draw(1, 2) == drawn[2]


def test_log_interval(play, tmp_path):
    """The first step, every third and the last are logged. A resumed run also prints its first
    step, but the log has the same steps wherever the run was resumed. Every sixth step, the first
    and the last have the experts' loads."""
    run = {"dataset": play, "out_dir": tmp_path, "sample_tokens": 0, **MOE}
    run |= {"log_interval": 3, "load_interval": 6}
    out = succeeded(train(**run, max_iters=4, lr_decay_iters=7))
    assert out.count("| loss") == 3
    out = succeeded(train(**run, max_iters=7, init_from="resume"))
    assert out.count("| loss") == 3 and "step 5/7 | loss" in out
    entries = [e for e in log(tmp_path) if "loss" in e]
    assert [e["step"] for e in entries] == [1, 3, 4, 6, 7]
    assert [e["step"] for e in entries if "expert_load" in e] == [1, 4, 6, 7]
    # the first step has half of the highest rate (warmup_iters is 1), the second would have all
    assert entries[0]["lr"] == pytest.approx(3e-4) and entries[1]["lr"] < 6e-4


def test_the_best_checkpoints_and_the_clock(play, tmp_path):
    """Without always_save_checkpoint only the best so far and the last are saved. A resumed run
    knows the best loss and the seconds so far, which leave out evaluations."""
    run = {"dataset": play, "out_dir": tmp_path / "run", "eval_interval": 1, "keep_last": 0}
    run |= {"always_save_checkpoint": False, "lr_decay_iters": 6, "sample_tokens": 0}

    def train_with(values, **settings):
        script = altered_train(tmp_path / "known.py", KNOWN_EVALUATIONS.format(values=values))
        succeeded(train(script=script, **run, **settings))
        folders = list_steps(tmp_path / "run")
        return sorted(step_of(path) for path in folders)

    assert train_with([3.0, 2.0, 2.5, 2.2], max_iters=4) == [1, 2, 4]
    last = load(tmp_path / "run" / "4")
    assert (last.val_loss, last.best_val_loss) == (2.2, 2.0)
    assert train_with([2.1, 1.9, 1.95], max_iters=7, init_from="resume") == [1, 2, 4, 6, 7]
    last = load(tmp_path / "run" / "7")
    assert (last.val_loss, last.best_val_loss) == (1.95, 1.9)
    assert [e["val_loss"] for e in losses(tmp_path / "run").values()][-3:] == [2.1, 1.9, 1.95]
    seconds = [e["seconds"] for e in log(tmp_path / "run") if "loss" in e]
    assert len(seconds) == 7 and seconds == sorted(seconds) and seconds[-1] < 1000


def test_float16_clips_the_gradient_without_its_scale(play, tmp_path):
    """The scaler's factor, 65536, is gone before the norm is taken."""
    norms = {}
    script = altered_train(tmp_path / "norm.py", PRINT_NORM)
    for dtype in ("float16", "float32"):
        out = succeeded(train(script=script, dataset=play, out_dir=tmp_path / dtype, dtype=dtype))
        norms[dtype] = [float(line.split()[1]) for line in out.splitlines() if "norm " in line]
    assert len(norms["float16"]) == 2
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)
