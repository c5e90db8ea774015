"""Resuming: a stopped run ends as one that was not stopped, and nothing on disk is lost. The data
goes on after the last sequence, also where something has changed, and a line says what."""

import json
import math
import os
import random
import signal

import pytest
import torch

from nanomoe import checkpoint
from tests.helpers import (
    MODERN,
    MOE,
    SMALL,
    altered_train,
    assert_same_run,
    children,
    full,
    killed_at,
    log,
    nanogpt_file,
    one_line,
    read_until,
    run_script,
    start_train,
    stepped,
    succeeded,
    train,
    weights,
)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        MOE | {"dropout": 0.1, "router_bias_update_rate": 1e-3, "deterministic": True},
        full({"optimizer": "muon"}),
        MOE | MODERN | {"dropout": 0.1, "optimizer": "muon"},
    ],
    ids=["dense", "moe", "dense muon", "moe muon"],
)
def test_a_resumed_run_equals_one_that_never_stopped(settings, play, tmp_path):
    common = {"dataset": play, "max_iters": 6, "eval_interval": 3} | settings
    succeeded(train(out_dir=tmp_path / "whole", **common))
    succeeded(train(out_dir=tmp_path / "parts", **common | {"max_iters": 3, "lr_decay_iters": 6}))
    # everything that is not given comes from the checkpoint: dataset, sizes, schedule, ...
    given = {"init_from": "resume", "out_dir": tmp_path / "parts", "max_iters": 6}
    out = succeeded(run_script("train.py", **given, compile=False, dtype="float32"))
    assert "after step 3" in out and "step 4/6 | loss" in out
    assert "step 3/6" not in out and "step 7" not in out
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_auto_resumes_after_kills_and_damage(play, tmp_path):
    """It starts, resumes after each kill -9, and passes over a damaged checkpoint.

    Weights and losses at the end equal those of a run that nothing disturbed. Nothing has changed
    in between, so nothing is said of it."""
    run = {"dataset": play, "max_iters": 30, "eval_interval": 3, "dropout": 0.1}
    run |= MOE | {"router_bias_update_rate": 1e-3, "init_from": "auto"}
    killed = tmp_path / "killed"
    succeeded(train(**run, out_dir=tmp_path / "whole"))
    for kills, line_to_wait_for in enumerate(("step 7/", "saved", "step 20/")):
        killed_at(line_to_wait_for, **run, out_dir=killed)
        if kills == 0:  # and what a kill within a save leaves
            (killed / "step-00000009.tmp-1").mkdir()
        if kills == 2:
            with open(checkpoint.latest_good(killed) / "model.safetensors", "r+b") as file:
                file.seek(1000)
                file.write(b"damaged")
    out = succeeded(train(**run, out_dir=killed))
    assert "model.safetensors is not as it was written; taking step-" in out
    assert "resuming from" in out and "resumed with" not in out
    assert_same_run(killed, tmp_path / "whole")
    assert [e["step"] for e in log(killed) if "loss" in e] == list(range(1, 31))
    assert not list(killed.glob("*.tmp-*"))
    assert "| loss" not in succeeded(train(**run, out_dir=killed))  # there is nothing left to do


def test_all_ranks_start_from_what_rank_0_finds(play, tmp_path):
    """Also when another process finds nothing, which can happen while torchrun restarts them."""
    succeeded(train(dataset=play, out_dir=tmp_path / "0"))
    change = f"sys.argv.append('--out_dir={tmp_path}/' + str(rank))"
    script = altered_train(tmp_path / "own.py", change)
    run = SMALL | {"dataset": play, "init_from": "auto", "max_iters": 4}
    out = succeeded(run_script(script, ranks=2, **run))
    assert "after step 2" in out and "step 4/4 | validation loss" in out
    assert not (tmp_path / "1").exists()


def test_resume_from_a_nanogpt_checkpoint(play, tmp_path):
    """Its optimizer is AdamW, though it does not say so, as in our own earlier versions."""
    model, optimizer = stepped(vocab_size=64, block_size=32)
    nanogpt_file(tmp_path / "ckpt.pt", model, optimizer)
    run = {"dataset": play, "out_dir": tmp_path, "init_from": "resume", "max_iters": 4}
    run |= {"gradient_accumulation_steps": 1, "batch_size": 4, "warmup_iters": 1, "eval_iters": 1}
    one_line(run_script("train.py", **run, optimizer="muon"), 2, "'adamw', not 'muon'")
    saved = torch.load(tmp_path / "ckpt.pt")
    positions = saved["model"].pop("_orig_mod.transformer.wpe.weight")
    for wrong in ({}, {"transformer.wpe.weight": positions.repeat(2, 1)}):
        (tmp_path / "wrong").mkdir(exist_ok=True)
        torch.save(saved | {"model": saved["model"] | wrong}, tmp_path / "wrong" / "ckpt.pt")
        done = run_script("train.py", **run | {"out_dir": tmp_path / "wrong"})
        one_line(done, 2, "does not fit its own config: transformer.wpe.weight: expected (32, 32)")
    out = succeeded(run_script("train.py", **run, sample_tokens=8))
    assert "ckpt.pt after step 2" in out and "step 3/4 | loss" in out
    assert "step 4/4 | validation loss" in out
    sample = {"out_dir": tmp_path / "ckpt.pt", "num_samples": 1, "max_new_tokens": 9}
    assert "-" * 15 in succeeded(run_script("sample.py", **sample, dataset=play))


def test_a_run_from_scratch_loses_no_earlier_one(play, tmp_path):
    for _ in range(3):
        out = succeeded(train(out_dir=tmp_path, dataset=play))
    assert f"moved an earlier run in {tmp_path} to {tmp_path / 'earlier-2'}" in out
    for folder in (tmp_path, tmp_path / "earlier-1", tmp_path / "earlier-2"):
        assert (folder / "log.jsonl").exists()
        assert checkpoint.latest_good(folder).name == "step-00000002"


def test_going_back_to_an_older_step_loses_nothing(play, tmp_path):
    run = {"dataset": play, "out_dir": tmp_path, "max_iters": 4}
    succeeded(train(**run, eval_interval=2))
    kept, older = weights(tmp_path / "step-00000004"), tmp_path / "step-00000002"
    out = succeeded(train(**run, init_from=older, learning_rate=0.01))
    assert f"to {tmp_path / 'earlier-1'}" in out and "step 4/4 | validation loss" in out
    before = weights(tmp_path / "earlier-1" / "step-00000004")
    after = weights(tmp_path / "step-00000004")
    assert all(kept[k].equal(before[k]) for k in kept)
    assert not all(kept[k].equal(after[k]) for k in kept)
    assert [e["step"] for e in log(tmp_path) if "loss" in e] == [1, 2, 3, 4]
    # In another folder it is a run of its own, and leaves this one alone.
    succeeded(train(out_dir=tmp_path / "b", dataset=play, max_iters=5, init_from=tmp_path))
    assert [e["step"] for e in log(tmp_path / "b") if "loss" in e] == [5]
    assert checkpoint.latest_good(tmp_path).name == "step-00000004"


def test_a_resumed_run_keeps_its_precision(play, tmp_path):
    """dtype 'auto' is measured at each start; a resumed run takes the checkpoint's instead."""
    for dtype in ("float32", "bfloat16"):
        run = {"dataset": play, "out_dir": tmp_path / dtype}
        succeeded(train(**run, dtype=dtype))
        out = succeeded(train(**run, dtype="auto", init_from="resume", max_iters=3))
        assert f"threads), {dtype}, compile off" in out
        assert "resumed with max_iters 3 instead of 2\n" in out  # so no dtype
    # unless told otherwise
    out = succeeded(train(**run, dtype="float32", init_from="resume", max_iters=4))
    assert "threads), float32, compile off" in out and "dtype float32 instead of bfloat16" in out


def test_torchrun_resumes_a_run_from_scratch(play, tmp_path):
    """torchrun starts a dead worker again with the same command line, 'scratch' included.

    The worker resumes, and an earlier run in that folder stays aside."""
    succeeded(train(dataset=play, out_dir=tmp_path, seed=1))
    run = {"dataset": play, "out_dir": tmp_path, "max_iters": 300, "eval_interval": 100}
    process = start_train(**run, torchrun=["--max-restarts=1"])
    out = read_until(process, "step 150/")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    out += process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "step 300/300 | validation loss" in out
    assert "resuming from" in out and "after step 100" in out
    assert out.count("moved an earlier") == 1
    assert checkpoint.latest_good(tmp_path / "earlier-1").name == "step-00000002"


# -----------------------------------------------------------------------------
# with something changed

# train.py that writes down which windows it trains on
RECORDING = """
import json
next_batch = train.BatchReader.next
def recorded(self):
    first, windows = next_batch(self)
    with open({path!r} + str(rank), "a") as file:
        print(json.dumps(list(range(first, first + self.batch_size))), file=file)
    return first, windows
train.BatchReader.next = recorded
"""


def recording(play, folder):
    """Settings for train(), of a run that is recorded."""
    script = altered_train(folder / "recording.py", RECORDING.format(path=f"{folder}/windows"))
    return {"dataset": play, "out_dir": folder / "run", "init_from": "auto", "script": script}


def seen(folder):
    """The numbers of all windows that were trained on, in order."""
    lines = [line for path in folder.glob("windows*") for line in path.read_text().splitlines()]
    return sorted(number for line in lines for number in json.loads(line))


SIZES = {"batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize(
    "changed, ranks",
    [
        ({"batch_size": 3}, 1),
        ({"batch_size": 8, "gradient_accumulation_steps": 1}, 1),
        full({"gradient_accumulation_steps": 6}, 1),
        ({"batch_size": 1, "gradient_accumulation_steps": 4}, 2),
    ],
)
def test_no_window_twice_and_none_left_out(changed, ranks, play, tmp_path):
    """Also after a second change. A line says what is another."""
    run = recording(play, tmp_path)
    succeeded(train(**run, max_iters=5))
    assert seen(tmp_path) == list(range(5 * 2 * 4))
    out = succeeded(train(**run, **changed, ranks=ranks, max_iters=8))
    assert out.count("resumed with") == 1
    for key, value in changed.items():
        assert f"{key} {value} instead of {SIZES[key]}" in out
    count = 40 + 3 * math.prod((SIZES | changed).values())
    assert seen(tmp_path) == list(range(count))
    succeeded(train(**run, batch_size=5, max_iters=10))
    assert seen(tmp_path) == list(range(count + 2 * 5 * 2))


@pytest.mark.full
@pytest.mark.repeat(2)
def test_another_batch_size(seed, play, tmp_path):
    """Through four starts of any sizes, two of them killed: no window twice, none left out."""
    rng = random.Random(seed)
    run = recording(play, tmp_path)
    expected, step = 0, 0
    for start in range(4):
        sizes = {"batch_size": rng.randrange(1, 9)}
        sizes["gradient_accumulation_steps"] = rng.randrange(1, 4)
        steps = rng.randrange(1, 6)
        if start % 2:  # a start that is killed: what it did after the last save is done again
            before = {path: path.read_text() for path in tmp_path.glob("windows*")}
            killed_at(f"step {step + 3}/", **run, **sizes, max_iters=10**6, eval_interval=10**6)
            for path in tmp_path.glob("windows*"):
                path.write_text(before.get(path, ""))
        step += steps
        expected += steps * sizes["batch_size"] * sizes["gradient_accumulation_steps"]
        succeeded(train(**run, **sizes, max_iters=step))
        assert seen(tmp_path) == list(range(expected))
