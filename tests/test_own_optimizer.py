"""An optimizer of one's own, as a user would add it: Lion, which has no `fused`, knows nothing of
found_inf, and keeps a state of another form than AdamW's."""

import pytest

from nanomoe.load import load
from tests.helpers import (
    MOE,
    altered_train,
    assert_same_run,
    full,
    losses,
    succeeded,
    train,
)

# What goes into optim.py, the line in build_optimizer, and the name among the choices.
LION = """
import torch
from nanomoe import optim
from nanomoe.settings import SETTINGS


class Lion(torch.optim.Optimizer):
    def __init__(self, groups, lr, betas):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["steps"] = 0
                    state["momentum"] = torch.zeros_like(p)
                state["steps"] += 1
                beta1, beta2 = group["betas"]
                update = state["momentum"].lerp(p.grad, 1 - beta1).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                state["momentum"].lerp_(p.grad, 1 - beta2)


build_optimizer = train.build_optimizer


def with_lion(model, name, learning_rate, weight_decay, betas, device_type):
    if name == "lion":
        return Lion(optim.decay_groups(model, weight_decay), learning_rate, betas)
    return build_optimizer(model, name, learning_rate, weight_decay, betas, device_type)


train.build_optimizer = with_lion
SETTINGS["optimizer"].limits["choices"] += ("lion",)
"""
# The gradient of the third step is not finite.
POISON = """
from model import GPT
calls = []
logits_and_loss = GPT.logits_and_loss
def poisoned(self, x, targets):
    if targets is not None and self.training:
        calls.append(1)
        if len(calls) == 3:
            x.register_hook(lambda grad: grad * float("nan"))
    return logits_and_loss(self, x, targets)
GPT.logits_and_loss = poisoned
"""


@pytest.mark.parametrize("moe", [full({}, id="dense"), pytest.param(MOE, id="moe")])
def test_it_trains_skips_a_bad_step_and_resumes(moe, play, tmp_path):
    script = altered_train(tmp_path / "lion.py", LION + POISON)
    run = moe | {"dataset": play, "optimizer": "lion", "learning_rate": 1e-3, "bias": True}
    run |= {"gradient_accumulation_steps": 1, "eval_interval": 1, "keep_last": 0}
    run |= {"script": script, "max_iters": 6}

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    out = succeeded(train(**run, out_dir=whole))
    assert out.count("skipped") == 1 and "step 3 skipped" in out
    log = losses(whole)
    assert log[6]["val_loss"] < log[1]["val_loss"] - 0.1
    step2, step3, step4 = (load(whole / str(step)) for step in (2, 3, 4))
    for name, p in step3.weights.items():
        assert "load" in name or p.equal(step2.weights[name]), name
    assert not step4.weights["transformer.wte.weight"].equal(
        step3.weights["transformer.wte.weight"]
    )
    state = step4.training_state()["optimizer"]["state"]
    assert {entry["steps"] for entry in state.values()} == {3}

    succeeded(train(**run | {"max_iters": 4, "lr_decay_iters": 6}, out_dir=parts))
    resumed = train(**run, lr_decay_iters=0, init_from="resume", out_dir=parts)
    assert "after step 4" in succeeded(resumed)
    assert_same_run(parts, whole)
