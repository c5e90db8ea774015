"""The length of a run in tokens or epochs instead of steps."""

import math
import re

import pytest

from nanomoe.dataset import Dataset
from nanomoe.load import load
from tests.helpers import SMALL, full, losses, one_line, run_script, succeeded, train

SIZES = {key: SMALL[key] for key in ("batch_size", "gradient_accumulation_steps", "block_size")}
TOKENS = math.prod(SIZES.values())  # of a step


def run(*args, **settings):
    """train.py with SMALL, but without its max_iters."""
    small = {key: value for key, value in SMALL.items() if key != "max_iters"}
    return run_script("train.py", *args, **small | settings)


@pytest.mark.parametrize("extra, steps", [(0, 3), (1, 4), full(-1, 3)])
def test_max_tokens(extra, steps, play, tmp_path):
    tokens = 3 * TOKENS + extra
    out = succeeded(run(dataset=play, out_dir=tmp_path, max_tokens=tokens))
    assert f"max_tokens {tokens:,} is {steps} steps" in out.splitlines()[0]
    assert load(tmp_path).step == steps and max(losses(tmp_path)) == steps


def test_max_epochs(play, tmp_path):
    windows = Dataset(play, SMALL["block_size"]).windows_per_epoch
    steps = math.ceil(0.02 * windows * SMALL["block_size"] / TOKENS)
    out = succeeded(run(dataset=play, out_dir=tmp_path, max_epochs=0.02))
    assert f"max_epochs 0.02 is {steps} steps" in out and load(tmp_path).step == steps


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
    one_line(run(dataset=play, out_dir=tmp_path / "run", **settings), 2, words)
    assert not (tmp_path / "run").exists()


def test_a_flag_goes_before_a_file(play, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("max_iters = 5000\n")
    settings = {"dataset": play, "out_dir": tmp_path / "run", "max_tokens": 2 * TOKENS}
    succeeded(run(str(config), **settings))
    assert load(tmp_path / "run").step == 2
    config.write_text(f"max_iters = 5000\nmax_tokens = {2 * TOKENS}\n")
    del settings["max_tokens"]
    one_line(run(str(config), **settings), 2, "max_iters and max_tokens say how long")


def test_resuming_keeps_the_length(play, tmp_path):
    """Also with another batch size: the tokens count. A new max_iters takes its place."""
    tokens = {"dataset": play, "out_dir": tmp_path, "max_tokens": 4 * TOKENS}
    succeeded(run(**tokens | {"max_tokens": 2 * TOKENS}))
    resume = {"dataset": play, "out_dir": tmp_path, "init_from": "resume"}
    half = {"batch_size": SMALL["batch_size"] // 2}
    out = succeeded(run(**tokens | resume | half))
    assert "max_tokens" in out.splitlines()[0] and load(tmp_path).step == 2 + 4
    assert load(tmp_path).sequences * SMALL["block_size"] == 4 * TOKENS
    assert "nothing to train" in succeeded(run(**resume | half))
    succeeded(train(**resume | half | {"max_iters": 8}))
    found = load(tmp_path)
    assert found.step == 8 and found.settings["max_tokens"] == 0


def test_a_longer_run_that_goes_back_before_its_decay(play, tmp_path):
    """Its tokens count from the checkpoint that it goes back to, also with another batch size."""
    settings = {"dataset": play, "out_dir": tmp_path, "warmup_iters": 0, "keep_last": 0}
    settings |= {"lr_schedule": "wsd", "decay_share": 0.2, "eval_interval": 5}
    succeeded(run(**settings, max_tokens=20 * TOKENS))
    batch = {"batch_size": 3 * SMALL["batch_size"], "init_from": "resume"}
    out = succeeded(run(**settings, max_tokens=40 * TOKENS, **batch))
    back = int(re.search(r"goes back to step (\d+)", out)[1])
    found = load(tmp_path)
    assert 0 < back < 20 and found.step == back + math.ceil((40 - back) / 3)
    assert 0 <= found.sequences * SMALL["block_size"] - 40 * TOKENS < 3 * TOKENS
