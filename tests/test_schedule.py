"""The learning rate's schedule."""

import itertools
import random

import pytest

from train import get_lr

SCHEDULE = {
    "learning_rate": 1.0,
    "min_lr": 0.1,
    "warmup_iters": 10,
    "lr_decay_iters": 0,
    "max_iters": 100,
    "max_seconds": 0.0,
    "decay_lr": True,
    "lr_schedule": "wsd",
    "decay_share": 0.2,
}


def rates(number, **settings):
    return [get_lr(SCHEDULE | settings, step) for step in range(number)]


def test_cosine():
    cosine = {"lr_schedule": "cosine", "lr_decay_iters": 110, "max_iters": 200}
    found = rates(200, **cosine)
    assert found[0] == pytest.approx(1 / 11) and found[9] == pytest.approx(10 / 11)
    assert found[10] == 1.0 and found[60] == pytest.approx(0.55)
    assert found[110] == found[199] == pytest.approx(0.1)
    assert found[:11] == sorted(found[:11]) and found[10:] == sorted(found[10:], reverse=True)
    found = rates(200, **cosine | {"lr_decay_iters": 0})  # = max_iters
    assert found[199] == pytest.approx(0.1, abs=1e-3) and found[105] == pytest.approx(0.55)
    assert set(rates(200, **cosine, decay_lr=False)) == {1.0}


def test_wsd():
    """Warm-up, then constant, then a line to min_lr over the last fifth."""
    found = rates(130)
    assert found[0] == pytest.approx(1 / 11) and found[9] == pytest.approx(10 / 11)
    assert set(found[10:81]) == {1.0}
    assert found[81] == pytest.approx(0.955) and found[90] == pytest.approx(0.55)
    assert found[99] == pytest.approx(0.145) and found[100:] == pytest.approx([0.1] * 30)
    assert rates(130, max_iters=130, lr_decay_iters=100) == found
    assert set(rates(130, decay_share=0.0)[10:]) == {1.0}
    assert rates(130, decay_share=1.0)[50] == pytest.approx(0.55)
    assert set(rates(130, decay_lr=False)) == {1.0}


def test_wsd_over_seconds():
    """Steps count for the warm-up alone."""
    timed = SCHEDULE | {"max_seconds": 60.0}
    assert [get_lr(timed, 1000, seconds) for seconds in (0.0, 47.9, 48.0)] == [1.0] * 3
    assert get_lr(timed, 1000, 54.0) == get_lr(timed, 50, 54.0) == pytest.approx(0.55)
    assert get_lr(timed, 1000, 60.0) == get_lr(timed, 1000, 99.0) == pytest.approx(0.1)
    assert get_lr(timed, 4, 54.0) == pytest.approx(5 / 11)  # the smaller of the two


@pytest.mark.repeat(50)
def test_wsd_with_any_settings(seed):
    """Warm-up and decay may overlap: a rate is never below 0, above the highest, or far from that
    of the step before."""
    draw = random.Random(seed)
    max_iters = draw.randint(1, 120)
    highest = draw.choice([1.0, 6e-4, 3e-3])
    settings = SCHEDULE | {
        "max_iters": max_iters,
        "warmup_iters": draw.choice([0, 1, draw.randint(0, 200)]),
        "lr_decay_iters": draw.choice([0, 0, draw.randint(1, 150)]),
        "decay_share": draw.choice([0.0, 0.01, 1.0, draw.random()]),
        "learning_rate": highest,
        "min_lr": draw.choice([0.0, highest, highest * draw.random()]),
    }
    found = rates(200, **settings)
    assert all(0 <= rate <= highest for rate in found)
    decay_iters = settings["decay_share"] * (settings["lr_decay_iters"] or max_iters)
    limit = highest / (settings["warmup_iters"] + 1)
    if decay_iters:
        limit = max(limit, highest / max(1, decay_iters))
    for rate, next_rate in itertools.pairwise(found):
        assert abs(next_rate - rate) <= limit * (1 + 1e-9)
