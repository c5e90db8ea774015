"""The learning rate's schedule, the length of a run in steps, seconds, tokens or epochs, and runs
that are made longer when they are resumed."""

import itertools
import json
import math
import random
import re
import shutil

import pytest

from nanomoe import checkpoint
from nanomoe.load import load
from nanomoe.log import share_done
from nanomoe.schedule import Schedule, run_length
from tests.helpers import (
    MOE,
    SMALL,
    altered_train,
    assert_same_run,
    fit_manifest,
    full,
    killed_at,
    log,
    losses,
    one_line,
    run_script,
    succeeded,
    train,
)

SCHEDULE = {"learning_rate": 1.0, "min_lr": 0.1, "warmup_iters": 10, "decay_lr": True}
SCHEDULE |= {"max_iters": 100, "max_seconds": 0.0, "lr_decay_iters": 0}
SCHEDULE |= {"lr_schedule": "wsd", "decay_share": 0.2}
WSD = {"lr_schedule": "wsd", "eval_interval": 25, "sample_tokens": 0, "keep_last": 1}
# Each step takes a second.
CLOCK = """
def seconds(self):
    self.ticks = getattr(self, "ticks", 0) + 1
    return self.seconds_before + self.ticks

device.Timer.seconds = seconds
"""


def rates(number, **settings):
    return [Schedule.of(SCHEDULE | settings).lr(step) for step in range(number)]


def steps_in(out_dir):
    return [checkpoint.step_of(path) for path in checkpoint.list_steps(out_dir)]


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
    lr = Schedule.of(SCHEDULE | {"max_seconds": 60.0}).lr
    assert [lr(1000, seconds) for seconds in (0.0, 47.9, 48.0)] == [1.0] * 3
    assert lr(1000, 54.0) == lr(50, 54.0) == pytest.approx(0.55)
    assert lr(1000, 60.0) == lr(1000, 99.0) == pytest.approx(0.1)
    assert lr(4, 54.0) == pytest.approx(5 / 11)  # the smaller of the two


def test_the_end():
    """Of steps or of seconds, whichever comes first."""
    timed = Schedule.of(SCHEDULE | {"max_seconds": 60.0})
    assert not timed.is_over(99, 59.9) and timed.is_over(100, 0.0) and timed.is_over(3, 60.0)
    assert not Schedule.of(SCHEDULE).is_over(99, 1e9)
    assert timed.seconds_left(50, 45.0, 2.0) == 15.0
    assert Schedule.of(SCHEDULE).seconds_left(90, 45.0, 2.0) == 20.0


@pytest.mark.parametrize(
    "settings, given, done, expected",
    [
        ({}, {}, (0, 0), (100, 0, 0)),
        ({"max_tokens": 650}, {"max_tokens": "--max_tokens=650"}, (0, 0), (7, 650, 0)),
        ({"max_epochs": 0.5}, {"max_epochs": "a.py"}, (0, 0), (50, 0, 0.5)),
        ({"max_epochs": 0.5}, {}, (40, 800), (50, 0, 0.5)),  # resumed; other steps were larger
        ({"max_epochs": 0.5}, {}, (70, 1001), (70, 0, 0.5)),
        ({"max_tokens": 650}, {"max_iters": "--max_iters=9"}, (0, 0), (100, 0, 0)),
    ],
)
def test_the_length_in_steps(settings, given, done, expected):
    """Steps of 20 sequences of 5 tokens; an epoch has 2,000 sequences."""
    sizes = {"block_size": 5, "batch_size": 10, "gradient_accumulation_steps": 2}
    settings = {"max_iters": 100, "max_tokens": 0, "max_epochs": 0.0} | sizes | settings
    before = dict(settings)
    assert tuple(run_length(settings, given, 2000, *done).values()) == expected
    assert settings == before


@pytest.mark.repeat(50)
def test_wsd_with_any_settings(seed):
    """Warm-up and decay may overlap: a rate is never below 0, above the highest, or far from that
    of the step before. Until its decay begins, a run has the rates of every longer one."""
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
    steady = [Schedule.of(settings).before_decay(step) for step in range(200)]
    assert steady[0] and steady == sorted(steady, reverse=True)
    longer = {"max_iters": max_iters + 37, "lr_decay_iters": 0}
    if not settings["lr_decay_iters"]:
        in_longer = rates(200, **settings | longer)
        assert found[: steady.count(True)] == in_longer[: steady.count(True)]


# -----------------------------------------------------------------------------
# runs that are made longer


@pytest.fixture(scope="module")
def run_of_100(play, tmp_path_factory):
    """A function: the folder of a run of 100 steps with 'wsd' that nothing disturbed."""
    folders = {}

    def find(name, **settings):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(f"whole-{name}")
            run = WSD | {"dataset": play, "out_dir": folders[name], "max_iters": 100}
            succeeded(train(**run | settings))
        return folders[name]

    return find


def assert_goes_back(out, out_dir, newest, to):
    line = f"the run is longer than it was: from step {newest} it goes back to step {to}, "
    assert out.count(line) == 1 and f"after step {to}\n" in out and "jumps" not in out, out
    assert max(steps_in(out_dir / "earlier-1")) == newest


@pytest.mark.parametrize(
    "name, settings",
    [
        ("dense", {}),
        ("moe", MOE | {"dropout": 0.1, "router_bias_update_rate": 1e-3}),
        full("two", {"ranks": 2, "parallel": "fsdp"}),
    ],
)
def test_a_longer_run_equals_one_that_had_this_length_from_the_start(
    name, settings, play, tmp_path, run_of_100
):
    """Losses and weights, to the last bit. The best checkpoints alone are saved, and that from
    before the decay; after a second try there are several to go back to."""
    run = WSD | {"dataset": play, "out_dir": tmp_path} | settings
    succeeded(train(**run, max_iters=40, always_save_checkpoint=False))
    assert 33 in steps_in(tmp_path) and max(steps_in(tmp_path)) == 40
    out = succeeded(train(**run, max_iters=60, init_from="resume"))
    assert_goes_back(out, tmp_path, 40, 33)
    assert 49 in steps_in(tmp_path) and len(steps_in(tmp_path)) <= 3
    out = succeeded(train(**run, max_iters=100, init_from="auto"))
    assert "from step 60 it goes back to step 49" in out and "jumps" not in out
    assert_same_run(tmp_path, run_of_100(name, **settings))
    assert share_done(tmp_path, {"max_iters": 100, "max_seconds": 0.0}) == 1


def test_a_run_killed_in_its_decay_gets_longer_or_goes_on(play, tmp_path, run_of_100):
    """With the same length it ends as a run that was not killed, with a larger one as a longer
    one. A kill while the later checkpoints move aside does no harm."""
    run = WSD | {"dataset": play, "out_dir": tmp_path / "run", "init_from": "auto"}
    killed_at("step 55/", **run, max_iters=60)
    assert steps_in(tmp_path / "run") == [49, 50]
    same = tmp_path / "same"
    shutil.copytree(tmp_path / "run", same)
    out = succeeded(train(**run | {"out_dir": same}, max_iters=60))
    assert "after step 50" in out and "jumps" not in out and "goes back" not in out
    succeeded(train(**run | {"out_dir": tmp_path / "sixty"}, max_iters=60))
    assert_same_run(same, tmp_path / "sixty")

    out = killed_at("step 95/", **run, max_iters=100)  # in the new decay
    assert_goes_back(out, tmp_path / "run", 50, 49)
    assert share_done(tmp_path / "run", {"max_iters": 100, "max_seconds": 0.0}) < 1
    out = succeeded(train(**run, max_iters=100))
    assert "after step 81" in out and "jumps" not in out and "goes back" not in out
    assert_same_run(tmp_path / "run", run_of_100("dense"))


def test_more_seconds(play, tmp_path):
    """The same for a run that is measured in seconds."""
    script = altered_train(tmp_path / "clock.py", CLOCK)
    run = WSD | {"dataset": play, "script": script, "max_iters": 10**6}
    succeeded(train(**run, out_dir=tmp_path / "whole", max_seconds=50.0))
    succeeded(train(**run, out_dir=tmp_path / "parts", max_seconds=30.0))
    longer = run | {"out_dir": tmp_path / "parts", "init_from": "auto"}
    out = succeeded(train(**longer, max_seconds=50.0))
    assert_goes_back(out, tmp_path / "parts", 30, 25)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_rate_that_jumps_is_said(play, tmp_path):
    """Without a checkpoint from before the decay, and from one that was named."""
    run = WSD | {"dataset": play, "out_dir": tmp_path, "learning_rate": 1e-3, "min_lr": 1e-4}
    succeeded(train(**run, max_iters=20))
    assert 17 in steps_in(tmp_path)
    named = shutil.copytree(tmp_path, tmp_path / "named")
    longer = run | {"max_iters": 40, "out_dir": named, "init_from": named / "20"}
    line = "the learning rate jumps from 1.000e-04 to 1.000e-03"
    out = succeeded(train(**longer))
    assert out.count(line) == 1 and "after step 20" in out and "goes back" not in out
    damaged = tmp_path / "step-00000017" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    out = succeeded(train(**run, max_iters=40, init_from="auto"))
    assert out.count(line) == 1 and "after step 20" in out and "goes back" not in out
    assert out.count("step-00000017 is damaged: model.safetensors") == 1
    entries = [e for e in log(tmp_path) if "loss" in e]
    assert [e["step"] for e in entries] == list(range(1, 41)) and entries[20]["lr"] == 1e-3
    # a shorter run: the new decay has begun already
    shorter = run | {"max_iters": 36, "out_dir": tmp_path / "b", "init_from": tmp_path / "33"}
    out = succeeded(train(**shorter))
    assert out.count("the learning rate jumps from 8.875e-04 to 4.750e-04") == 1


def test_a_checkpoint_of_an_earlier_version_had_a_cosine(play, tmp_path):
    """Its settings do not say so, and a flag now asks for 'wsd'."""
    run = {"dataset": play, "out_dir": tmp_path, "learning_rate": 1e-3, "min_lr": 1e-4}
    run |= {"warmup_iters": 0}
    succeeded(train(**run, max_iters=4, lr_decay_iters=8))
    path = checkpoint.latest_good(tmp_path)
    facts = json.loads((path / "config.json").read_text())
    del facts["before_decay"], facts["run"]["lr_schedule"], facts["run"]["decay_share"]
    (path / "config.json").write_text(json.dumps(facts))
    fit_manifest(path)
    assert "jumps" not in succeeded(train(**run, max_iters=5, init_from=path))
    run |= {"out_dir": tmp_path / "b", "init_from": path}
    out = succeeded(train(**run, max_iters=20, lr_schedule="wsd"))
    assert out.count("the learning rate jumps from 5.500e-04 to 1.000e-03") == 1


def test_a_cosine_that_gets_longer_jumps(play, tmp_path):
    """No line where the rate does not: the same length, a fixed schedule, an evaluation."""
    run = {"dataset": play, "out_dir": tmp_path, "learning_rate": 1e-3, "min_lr": 1e-4}
    run |= {"warmup_iters": 0, "sample_tokens": 0}
    succeeded(train(**run, max_iters=4))
    again = run | {"init_from": "auto"}
    assert "jumps" not in succeeded(train(**again, max_iters=4))
    assert "jumps" not in succeeded(train(**again, max_iters=8, eval_only=True))
    assert "jumps" not in succeeded(train(**again, max_iters=6, lr_decay_iters=4))
    out = succeeded(train(**again, max_iters=12, lr_decay_iters=0))
    assert out.count("the learning rate jumps from 1.000e-04 to 5.500e-04") == 1
    assert "step 7/12 | loss" in out and "lr 5.50e-04" in out


# -----------------------------------------------------------------------------
# a length in tokens or epochs

TOKENS = 4 * 2 * 32  # of a step


def run_for(*args, **settings):
    """train.py with SMALL, but without its max_iters."""
    small = {key: value for key, value in SMALL.items() if key != "max_iters"}
    return run_script("train.py", *args, **small | settings)


@pytest.mark.parametrize(
    "length, steps, said",
    [
        ({"max_tokens": 3 * TOKENS}, 3, "max_tokens 768 is 3 steps"),
        ({"max_tokens": 3 * TOKENS + 1}, 4, "max_tokens 769 is 4 steps"),
        ({"max_epochs": 0.02}, 7, "max_epochs 0.02 is 7 steps"),
    ],
)
def test_a_length_in_tokens_or_epochs(length, steps, said, play, tmp_path):
    out = succeeded(run_for(dataset=play, out_dir=tmp_path, **length))
    assert said in out.splitlines()[0]
    assert load(tmp_path).step == steps and max(losses(tmp_path)) == steps


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"max_tokens": 999, "max_epochs": 1}, "max_tokens and max_epochs say how long"),
        ({"max_tokens": 999, "max_iters": 1}, "max_iters and max_tokens say how long"),
        full({"max_epochs": 0.5, "max_iters": 1}, "max_iters and max_epochs say how long"),
        ({"max_tokens": -1}, "max_tokens is -1, expected at least 0"),
        full({"max_epochs": -0.5}, "max_epochs is -0.5, expected at least 0"),
    ],
    ids=str,
)
def test_one_length_only(settings, words, play, tmp_path):
    one_line(run_for(dataset=play, out_dir=tmp_path / "run", **settings), 2, words)
    assert not (tmp_path / "run").exists()


def test_a_flag_goes_before_a_file(play, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("max_iters = 5000\n")
    settings = {"dataset": play, "out_dir": tmp_path / "run", "max_tokens": 2 * TOKENS}
    succeeded(run_for(str(config), **settings))
    assert load(tmp_path / "run").step == 2
    config.write_text(f"max_iters = 5000\nmax_tokens = {2 * TOKENS}\n")
    del settings["max_tokens"]
    one_line(run_for(str(config), **settings), 2, "max_iters and max_tokens say how long")


def test_resuming_keeps_the_length(play, tmp_path):
    """Also with another batch size: the tokens count. A new max_iters takes its place."""
    tokens = {"dataset": play, "out_dir": tmp_path, "max_tokens": 4 * TOKENS}
    succeeded(run_for(**tokens | {"max_tokens": 2 * TOKENS}))
    resume = {"dataset": play, "out_dir": tmp_path, "init_from": "resume"}
    half = {"batch_size": 2}
    out = succeeded(run_for(**tokens | resume | half))
    assert "max_tokens" in out.splitlines()[0] and load(tmp_path).step == 2 + 4
    assert load(tmp_path).sequences * 32 == 4 * TOKENS
    assert "nothing to train" in succeeded(run_for(**resume | half))
    succeeded(train(**resume | half | {"max_iters": 8}))
    found = load(tmp_path)
    assert found.step == 8 and found.settings["max_tokens"] == 0


def test_a_longer_run_that_goes_back_before_its_decay(play, tmp_path):
    """Its tokens count from the checkpoint that it goes back to, also with another batch size."""
    settings = {"dataset": play, "out_dir": tmp_path, "warmup_iters": 0, "keep_last": 0}
    settings |= {"lr_schedule": "wsd", "decay_share": 0.2, "eval_interval": 5}
    succeeded(run_for(**settings, max_tokens=20 * TOKENS))
    batch = {"batch_size": 12, "init_from": "resume"}
    out = succeeded(run_for(**settings, max_tokens=40 * TOKENS, **batch))
    back = int(re.search(r"goes back to step (\d+)", out)[1])
    found = load(tmp_path)
    assert 0 < back < 20 and found.step == back + math.ceil((40 - back) / 3)
    assert 0 <= found.sequences * 32 - 40 * TOKENS < 3 * TOKENS
