"""Whatever fails after a step costs no step: the state is saved, then the error is told."""

import json
import random

import pytest

from nanomoe import checkpoint
from nanomoe.load import load
from tests.helpers import (
    altered_train,
    assert_same_run,
    full,
    losses,
    start_train,
    succeeded,
    train,
)

# what fails: lines for altered_train(), which fail in the first start alone, at step 5
FAILURES = {
    "evaluation, no memory": """
def evaluate(*args):
    raise MemoryError("out of memory in the evaluation")
train.evaluate = evaluate
""",
    "evaluation, a damaged file": """
def evaluate(*args):
    raise OSError("val.bin is gone")
train.evaluate = evaluate
""",
    "evaluation, a bug": """
def evaluate(*args):
    raise RuntimeError("a bug")
train.evaluate = evaluate
""",
    "log": """
write = train.RunLog.write
def fail(self, **entry):
    if entry.get("step") == 5:
        raise OSError("could not write log.jsonl: no space left")
    write(self, **entry)
train.RunLog.write = fail
""",
    "console": """
console_line = train.console_line
def fail(entry, *rest):
    if entry["step"] == 5:
        raise BrokenPipeError("whoever read our output has gone")
    return console_line(entry, *rest)
train.console_line = fail
""",
    "prune": """
def fail(*args):
    raise OSError("could not remove step-00000005")
checkpoint.prune = fail
""",
    "sample": """
def fail(*args, **options):
    raise MemoryError("no memory for a sample")
import model
model.GPT.generate = fail
""",
}
MAX_ITERS = {"evaluation, no memory": 5, "sample": 5}


def run_settings(play, out_dir):
    return {
        "dataset": play,
        "out_dir": out_dir,
        "eval_interval": 5,
        "dropout": 0.1,
        "decay_lr": False,
    }


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("always_save", [True, full(False)])
def test_a_failure_costs_no_step(what, always_save, play, tmp_path):
    script = altered_train(tmp_path / "altered.py", FAILURES[what])
    run = run_settings(play, tmp_path / "run") | {"always_save_checkpoint": always_save}
    last = MAX_ITERS.get(what, 8)
    done = train(**run, max_iters=last, script=script)
    if what == "console":  # like `train.py | head`
        assert done.returncode == 0
    else:
        assert done.returncode == 1, done.stdout + done.stderr
    assert load(run["out_dir"]).step == 5
    succeeded(train(**run, max_iters=8, init_from="auto"))
    run["out_dir"] = tmp_path / "undisturbed"
    succeeded(train(**run, max_iters=8))
    if what == "log":  # only that line is missing
        with open(tmp_path / "run" / "log.jsonl", "a") as file:
            file.write(json.dumps(losses(tmp_path / "undisturbed")[5]))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
    a, b = (val_losses(tmp_path / name) for name in ("run", "undisturbed"))
    assert a == b


def test_evaluating_alone_adds_no_loss(play, tmp_path):
    """A reader changes nothing, also where the loss is missing."""
    script = altered_train(tmp_path / "altered.py", FAILURES["evaluation, a bug"])
    run = run_settings(play, tmp_path / "run") | {"max_iters": 8}
    assert train(**run, script=script).returncode == 1
    path = checkpoint.latest_good(tmp_path / "run")
    before = {file: file.read_bytes() for file in path.iterdir()}
    assert "step 5/8 | validation loss" in succeeded(train(**run, init_from="auto", eval_only=True))
    assert {file: file.read_bytes() for file in path.iterdir()} == before
    assert checkpoint.read_facts(path)["val_loss"] is None


def val_losses(out_dir):
    """What the checkpoints say; the best one is found by it."""
    return {
        path.name: checkpoint.read_facts(path)["val_loss"]
        for path in checkpoint.list_steps(out_dir)
    }


@pytest.mark.full
@pytest.mark.parametrize("parallel, failing", [("ddp", 0), ("ddp", 1), ("fsdp", 0)])
def test_a_failure_on_one_rank_costs_no_step(parallel, failing, play, tmp_path):
    """FSDP's state is copied before the evaluation, so rank 0 has it, whoever fails."""
    change = f"""
evaluate = train.evaluate
def fail(*args):
    if rank == {failing}:
        raise MemoryError("out of memory in the evaluation")
    return evaluate(*args)
train.evaluate = fail
"""
    script = altered_train(tmp_path / "altered.py", change)
    run = run_settings(play, tmp_path / "run")
    process = start_train(**run, parallel=parallel, processes=2, max_iters=5, script=script)
    out, _ = process.communicate(timeout=120)
    assert process.returncode and "error: " in out, out
    assert load(run["out_dir"]).step == 5


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_an_error_that_all_ranks_know_of(parallel, play, tmp_path):
    """Then they can save together, which FSDP needs."""
    script = altered_train(tmp_path / "altered.py", FAILURES["log"])
    run = run_settings(play, tmp_path / "run") | {"eval_interval": 100, "log_interval": 5}
    process = start_train(**run, parallel=parallel, processes=2, max_iters=8, script=script)
    out, _ = process.communicate(timeout=120)
    assert process.returncode and "error: could not write log.jsonl" in out, out
    assert load(run["out_dir"]).step == 6  # they learn of it after the next step


def test_a_step_that_is_half_done_is_not_saved(play, tmp_path):
    """If the optimizer fails, weights and moments may not fit each other."""
    change = """
step, calls = train.optimizer_step, []
def fail(*args):
    step(*args)
    calls.append(1)
    if len(calls) == 7:
        raise MemoryError("out of memory in the optimizer")
train.optimizer_step = fail
"""
    script = altered_train(tmp_path / "altered.py", change)
    run = run_settings(play, tmp_path / "run")
    done = train(**run, max_iters=8, script=script)
    assert done.returncode == 1 and "error: out of memory" in done.stderr
    assert load(run["out_dir"]).step == 5


@pytest.mark.full
@pytest.mark.repeat(2)
def test_an_error_in_an_evaluation(seed, play, tmp_path):
    """At a random step, of a random kind, with a random number of steps since the last save."""
    rng = random.Random(seed)
    every = rng.randrange(1, 9)
    step = every * rng.randrange(1, 5)
    kind = rng.choice(["MemoryError", "OSError", "RuntimeError", "ValueError", "InputError"])
    change = f"""
from configurator import InputError
validate = train.validate
def fail(*args):
    if args[-3] == {step}:
        raise {kind}("it fails")
    return validate(*args)
train.validate = fail
"""
    script = altered_train(tmp_path / "altered.py", change)
    run = run_settings(play, tmp_path / "run") | {"eval_interval": every}
    run["always_save_checkpoint"] = rng.random() < 0.5
    done = train(**run, max_iters=40, script=script)
    assert done.returncode == (2 if kind == "InputError" else 1), done.stdout + done.stderr
    assert load(run["out_dir"]).step == step
    succeeded(train(**run, max_iters=40, init_from="auto"))
    run["out_dir"] = tmp_path / "undisturbed"
    succeeded(train(**run, max_iters=40))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
