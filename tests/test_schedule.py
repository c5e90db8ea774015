"""The learning rate of each step, and runs that are made longer."""

import itertools
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomoe import checkpoint
from nanomoe.schedule import get_lr, has_decayed
from tests.helpers import (
    MOE,
    assert_same_run,
    log,
    one_line,
    read_until,
    start_train,
    succeeded,
    train,
)

COSINE = {
    "learning_rate": 1.0,
    "min_lr": 0.1,
    "warmup_iters": 10,
    "lr_decay_iters": 110,
    "max_iters": 200,
    "max_seconds": 0.0,
    "decay_lr": True,
    "lr_schedule": "cosine",
    "decay_share": 0.2,
}
WSD = COSINE | {"lr_schedule": "wsd", "lr_decay_iters": 0, "min_lr": 0.0}


def rates(settings, steps=200):
    return [get_lr(settings, step) for step in range(steps)]


def test_cosine():
    found = rates(COSINE)
    assert found[:11] == pytest.approx([(i + 1) / 11 for i in range(11)]) and found[10] == 1.0
    assert found[60] == pytest.approx(0.55) and found[110] == found[199] == pytest.approx(0.1)
    assert found[10:] == sorted(found[10:], reverse=True)
    to_the_end = COSINE | {"lr_decay_iters": 0}
    assert get_lr(to_the_end, 199) == pytest.approx(0.1, abs=1e-3)
    assert get_lr(to_the_end, 105) == pytest.approx(0.55)


def test_wsd():
    found = rates(WSD)
    assert found[:11] == pytest.approx([(i + 1) / 11 for i in range(11)])
    assert found[10:161] == [1.0] * 151
    assert found[160:] == pytest.approx([1 - i / 40 for i in range(40)])
    assert [has_decayed(WSD, step, 0) for step in (0, 160, 161, 199)] == [False, False, True, True]
    assert not any(has_decayed(COSINE, step, 0) for step in range(200))


@pytest.mark.parametrize("settings", [COSINE, WSD])
def test_decay_lr_false_is_constant(settings):
    assert set(rates(settings | {"decay_lr": False})) == {1.0}
    assert not has_decayed(settings | {"decay_lr": False}, 199, 0)


def test_over_seconds():
    timed = WSD | {"max_seconds": 100.0, "max_iters": 10**6}
    assert [get_lr(timed, 10**3, seconds) for seconds in (50, 80, 90, 100, 200)] == pytest.approx(
        [1, 1, 0.5, 0, 0]
    )
    assert not has_decayed(timed, 10**3, 80) and has_decayed(timed, 10**3, 81)
    timed["lr_schedule"] = "cosine"
    assert [get_lr(timed, 10**3, seconds) for seconds in (0, 50, 100)] == pytest.approx([1, 0.5, 0])


def test_no_decay_and_nothing_but_decay():
    assert rates(WSD | {"decay_share": 0.0})[10:] == [1.0] * 190
    found = rates(WSD | {"decay_share": 1.0, "warmup_iters": 0})
    assert found == pytest.approx([1 - i / 200 for i in range(200)])


@given(
    schedule=st.sampled_from(["cosine", "wsd"]),
    warmup=st.integers(0, 60),
    last=st.integers(0, 60),
    steps=st.integers(1, 60),
    share=st.floats(0, 1),
    lowest=st.floats(0, 1),
)
def test_rates_stay_in_range_and_do_not_jump(schedule, warmup, last, steps, share, lowest):
    """Whatever warm-up and decay are, also if they overlap."""
    settings = WSD | {
        "lr_schedule": schedule,
        "warmup_iters": warmup,
        "lr_decay_iters": last,
        "max_iters": steps,
        "decay_share": share,
        "min_lr": lowest,
    }
    found = rates(settings, steps)
    assert all(0 <= rate <= 1 for rate in found)
    end = last or steps
    if schedule == "wsd":
        most = max(1 / (warmup + 1), 1 / max(1, share * end))
        jumps = [abs(b - a) for a, b in itertools.pairwise(found)]
        assert max(jumps, default=0) <= most + 1e-9


# -----------------------------------------------------------------------------
# runs that are made longer


def wsd_run(play, **settings):
    run = {"dataset": play, "lr_schedule": "wsd", "decay_share": 0.5, "learning_rate": 1e-2}
    return (
        run
        | MOE
        | {"dropout": 0.1, "min_lr": 0.0, "warmup_iters": 2, "eval_interval": 4}
        | settings
    )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_longer_wsd_run_equals_one_that_was_so_long_from_the_start(optimizer, play, tmp_path):
    run = wsd_run(play, optimizer=optimizer, keep_last=1, init_from="auto")
    succeeded(train(**run, max_iters=30, out_dir=tmp_path / "whole"))
    succeeded(train(**run, max_iters=20, out_dir=tmp_path / "longer"))
    names = [path.name for path in checkpoint.list_steps(tmp_path / "longer")]
    assert "step-00000011" in names and names[-1] == "step-00000020"  # kept for this moment
    out = succeeded(train(**run, max_iters=30, out_dir=tmp_path / "longer"))
    assert "continues from before its decay, step-00000011" in out
    assert "rate jumps" not in out and "step 12/30 | loss" in out and "step 11/30" not in out
    assert_same_run(tmp_path / "longer", tmp_path / "whole")
    earlier = checkpoint.list_steps(tmp_path / "longer" / "earlier-1")
    assert "step-00000020" in [path.name for path in earlier]


def test_a_longer_run_after_a_kill_in_the_decay(play, tmp_path):
    run = wsd_run(play, init_from="auto")
    succeeded(train(**run, max_iters=40, out_dir=tmp_path / "whole"))
    process = start_train(**run, max_iters=24, out_dir=tmp_path / "killed")
    read_until(process, "step 21/24")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and checkpoint.load(tmp_path / "killed").decayed
    # of the same length it goes on in its decay
    out = succeeded(train(**run, max_iters=24, out_dir=tmp_path / "killed"))
    assert (
        "step-00000020 after step 20" in out
        and "rate jumps" not in out
        and "is longer now" not in out
    )
    out = succeeded(train(**run, max_iters=40, out_dir=tmp_path / "killed"))
    assert "continues from before its decay, step-00000013" in out
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_longer_run_by_time(play, tmp_path):
    run = wsd_run(play, init_from="auto", max_iters=10**6, eval_interval=10**6)
    succeeded(train(**run, max_seconds=1.0, out_dir=tmp_path))
    before, last = checkpoint.list_steps(tmp_path)
    out = succeeded(train(**run, max_seconds=2.0, out_dir=tmp_path))
    assert f"continues from before its decay, {before.name}" in out and "rate jumps" not in out
    rate = {entry["step"]: entry["lr"] for entry in log(tmp_path) if "lr" in entry}
    assert rate[checkpoint.step_of(before) + 1] == rate[checkpoint.step_of(last)] == 1e-2


def test_without_a_checkpoint_from_before_the_decay_the_rate_jumps(play, tmp_path):
    run = wsd_run(play, init_from="auto")
    succeeded(train(**run, max_iters=20, out_dir=tmp_path))
    for path in checkpoint.list_steps(tmp_path)[:-1]:
        (path / "model.safetensors").write_bytes(b"damaged")
    out = succeeded(train(**run, max_iters=40, out_dir=tmp_path))
    assert "the learning rate jumps from 0.00e+00 to 1.00e-02, because" in out
    assert "step-00000020 after step 20" in out


def test_the_checkpoint_that_was_named_is_resumed(play, tmp_path):
    run = wsd_run(play)
    succeeded(train(**run, max_iters=20, out_dir=tmp_path / "a"))
    again = run | {"max_iters": 40, "out_dir": tmp_path / "b"}
    out = succeeded(train(**again, init_from=tmp_path / "a" / "16"))
    assert "step-00000016 after step 16" in out and "jumps from 4.00e-03 to 1.00e-02" in out
    out = succeeded(train(**again | {"out_dir": tmp_path / "c"}, init_from=tmp_path / "a"))
    assert "continues from before its decay, step-00000011" in out


def test_a_longer_cosine_run_says_how_the_rate_jumps(play, tmp_path):
    run = wsd_run(play, init_from="auto", lr_schedule="cosine", out_dir=tmp_path)
    assert "rate jumps" not in succeeded(train(**run, max_iters=6))
    out = succeeded(train(**run, max_iters=12))
    expected = get_lr(COSINE | run | {"max_iters": 12, "lr_decay_iters": 0}, 6)
    assert f"the learning rate jumps from 0.00e+00 to {expected:.2e}, because" in out
    assert "after step 6" in out and "rate jumps" not in succeeded(train(**run, max_iters=12))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"decay_share": -0.1}, "decay_share is -0.1, expected at least 0"),
        ({"decay_share": 1.1}, "decay_share is 1.1, expected at most 1"),
        ({"lr_schedule": "linear"}, "lr_schedule is 'linear', expected one of cosine, wsd"),
    ],
)
def test_mistakes_are_one_line(settings, words, play, tmp_path):
    one_line(train(dataset=play, out_dir=tmp_path / "run", **settings), 2, words)
    assert not (tmp_path / "run").exists()
