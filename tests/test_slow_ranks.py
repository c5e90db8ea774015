"""One rank waits for a slow disk, and the others do not give up."""

import pytest

from nanomoe import distributed
from nanomoe.load import load
from tests.helpers import altered_train, start_train

# every collective gives up after 3 seconds, and something takes 8 on rank 0
IMPATIENT = """
import time
from datetime import timedelta
distributed.TIMEOUT = timedelta(seconds=3)
def slow(function):
    def slowly(*args, **options):
        if rank == 0:
            time.sleep(8)
        return function(*args, **options)
    return slowly
"""
SLOW = {
    "save": "checkpoint.write = slow(checkpoint.write)",
    "prune": "checkpoint.prune = slow(checkpoint.prune)",
    "preparation": "run_dir.prepare_run_dir = slow(run_dir.prepare_run_dir)",
    "search": "load.find = slow(load.find)",
    "disk space": "train.check_disk_space = slow(train.check_disk_space)",
}


@pytest.mark.full
@pytest.mark.parametrize("what", SLOW)
@pytest.mark.parametrize("background", [True, False])
def test_slow_on_one_rank(what, background, play, tmp_path):
    if background and what in ("preparation", "search", "disk space"):
        pytest.skip("the same as without a background")
    change = IMPATIENT + SLOW[what]
    if background:
        change += """
saver = train.Saver
train.Saver = lambda out_dir, keep, background, *a, **facts: saver(out_dir, keep, True, *a, **facts)
"""
    script = altered_train(tmp_path / "altered.py", change)
    run = {"dataset": play, "out_dir": tmp_path / "run", "keep_last": 1, "init_from": "auto"}
    for max_iters in (4, 6) if what == "search" else (6,):
        process = start_train(
            **run, processes=2, max_iters=max_iters, eval_interval=2, script=script
        )
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
    assert load(tmp_path / "run").step == 6


def test_the_time_out_is_long():
    """A rank that reads or writes on a slow disk must not end the run."""
    assert distributed.TIMEOUT.total_seconds() >= 3600
