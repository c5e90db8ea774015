"""What a recipe of config/README.md asks for: a forgotten branch, comment or term is seen here,
for what exists and for what is added."""

import dataclasses
import re

import pytest
import torch

import train
from configurator import read_defaults
from moe_model import MoEGPTConfig, build_config, config_to_dict
from nanomoe import upcycle
from nanomoe.optim import build_optimizer
from nanomoe.schedule import Schedule
from nanomoe.settings import SETTINGS
from tests.helpers import ROOT, small_model, tokens

FIELDS = dataclasses.fields(MoEGPTConfig)
CHOICES = {f.name: f.metadata["choices"] for f in FIELDS if "choices" in f.metadata}
OPTIMIZERS = SETTINGS["optimizer"].limits["choices"]
COEFFICIENTS = [f.name for f in FIELDS if f.name.endswith("_coef")]
MOE = {"use_moe": True, "num_experts": 4, "top_k": 2}


def gradients(**settings):
    """Of a MoE after a second step's forward and backward, by the parameters' names."""
    model = small_model(**MOE | settings)
    first, second = tokens(2, 16, seed=1), tokens(2, 16, seed=2)
    model(first, first)
    model.update_balance(model.stats)
    model(second, second)[1].backward()
    return {name: p.grad for name, p in model.named_parameters()}


def weights_after_a_step(optimizer):
    model = small_model()
    opt = build_optimizer(model, optimizer, 1e-2, 0.1, (0.9, 0.95), "cpu")
    model(tokens(2, 16), tokens(2, 16))[1].backward()
    opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def differ(values):
    for i, one in enumerate(values):
        for other in values[:i]:
            assert one.keys() != other.keys() or any(not one[n].equal(other[n]) for n in one)


@pytest.mark.parametrize("name", sorted(CHOICES.keys() - {"expert_impl"}))
def test_each_choice_of_the_model_computes_something_else(name):
    differ([gradients(**{name: choice}) for choice in CHOICES[name]])


def test_each_optimizer_does_something_else():
    differ([{"weights": weights_after_a_step(name)} for name in OPTIMIZERS])
    with pytest.raises(ValueError, match="'mine' has no line in build_optimizer"):
        weights_after_a_step("mine")


def test_each_learning_rate_schedule_is_another():
    settings = {"learning_rate": 1.0, "min_lr": 0.0, "warmup_iters": 0, "max_iters": 10}
    names = SETTINGS["lr_schedule"].limits["choices"]
    assert len({Schedule.of(settings | {"lr_schedule": name}).lr(5) for name in names}) == len(
        names
    )


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_each_loss_reaches_the_router(name):
    none = dict.fromkeys(COEFFICIENTS, 0.0)
    router = "transformer.h.0.mlp.router.weight"
    assert not gradients(**none)[router].equal(gradients(**none | {name: 1.0})[router])


@pytest.mark.parametrize("score", CHOICES["router_score"])
def test_upcycling_gives_each_router_its_weights(score):
    dense = small_model()
    moe = MOE | {"router_score": score, "expert_dim": 64}
    config = build_config(config_to_dict(dense.config) | moe)
    weights = upcycle.upcycle(dense.state_dict(), dense.config, config)
    assert weights.keys() == small_model(**moe).state_dict().keys()


def test_each_choice_stands_in_its_comment():
    """Or is the default; `compile` takes True and False, as its type says."""
    comments = read_defaults((ROOT / "train.py").read_text())
    rows = {
        name: rule.limits["choices"] for name, rule in SETTINGS.items() if "choices" in rule.limits
    }
    for name, choices in (CHOICES | rows).items():
        comment, _ = comments[name]
        for choice in choices:
            named = choice == getattr(train, name) or re.search(rf"\b{choice}\b", comment)
            assert named or isinstance(choice, bool), (name, choice)
