"""Resuming: a stopped run ends as one that was not stopped, and nothing on disk is lost."""

import os
import signal
import subprocess

import pytest
import torch

from nanomoe import checkpoint
from tests.helpers import (
    MOE,
    ROOT,
    SMALL,
    TORCHRUN,
    altered_train,
    flags,
    log,
    losses,
    run_script,
    start_train,
    succeeded,
    train,
    weights,
)


@pytest.mark.parametrize("settings", [{}, MOE | {"dropout": 0.1}], ids=["dense", "moe"])
def test_a_resumed_run_equals_one_that_never_stopped(settings, play, tmp_path):
    common = {"dataset": play, "max_iters": 6, "eval_interval": 3} | settings
    succeeded(train(out_dir=tmp_path / "whole", **common))
    succeeded(train(out_dir=tmp_path / "parts", **common | {"max_iters": 3, "lr_decay_iters": 6}))
    # everything that is not given comes from the checkpoint: dataset, sizes, schedule
    done = run_script(
        "train.py",
        init_from="resume",
        out_dir=tmp_path / "parts",
        max_iters=6,
        compile=False,
        dtype="float32",
    )
    out = succeeded(done)
    assert (
        "after step 3" in out
        and "step 4/6 | loss" in out
        and "step 3/6" not in out
        and "step 7" not in out
    )
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")  # to the last bit
    a, b = (weights(tmp_path / name / "step-00000006") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_auto_resumes_after_kills_and_damage(play, tmp_path):
    """It starts, resumes after each kill -9, and passes over a damaged checkpoint.

    Weights and losses at the end equal those of a run that nothing disturbed.
    """
    run = {
        "dataset": play,
        "max_iters": 30,
        "eval_interval": 3,
        "dropout": 0.1,
        "init_from": "auto",
        **MOE,
        "router_bias_update_rate": 1e-3,
    }
    succeeded(train(**run, out_dir=tmp_path / "whole"))
    for kills, line_to_wait_for in enumerate(("step 7/", "saved", "step 20/")):
        process = start_train(**run, out_dir=tmp_path / "killed")
        for line in process.stdout:
            if line_to_wait_for in line:
                process.kill()
                break
        rest = process.communicate(timeout=60)[0]
        assert process.returncode == -signal.SIGKILL, rest
        if kills == 0:  # and what a kill within a save leaves
            (tmp_path / "killed" / "step-00000009.tmp-1").mkdir()
        if kills == 2:
            with open(
                checkpoint.latest_good(tmp_path / "killed") / "model.safetensors", "r+b"
            ) as file:
                file.seek(1000)
                file.write(b"damaged")
    out = succeeded(train(**run, out_dir=tmp_path / "killed"))
    assert (
        "model.safetensors is not as it was written; taking step-" in out and "resuming from" in out
    )
    a, b = (weights(checkpoint.latest_good(tmp_path / name)) for name in ("whole", "killed"))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*.tmp-*"))
    assert "| loss" not in succeeded(
        train(**run, out_dir=tmp_path / "killed")
    )  # there is nothing left to do


@pytest.mark.full
def test_all_ranks_start_from_what_rank_0_finds(play, tmp_path):
    """Also when another process finds nothing, which can happen while torchrun restarts them."""
    run = SMALL | {"dataset": play, "init_from": "auto"}
    succeeded(run_script("train.py", **run, out_dir=tmp_path / "0"))
    script = altered_train(
        tmp_path / "own.py", f"sys.argv.append('--out_dir={tmp_path}/' + str(rank))"
    )
    out = succeeded(run_script(script, processes=2, **run | {"max_iters": 4}))
    assert (
        "after step 2" in out
        and "step 4/4 | validation loss" in out
        and not (tmp_path / "1").exists()
    )


def test_resume_drops_log_lines_of_lost_steps(play, tmp_path):
    succeeded(train(out_dir=tmp_path, dataset=play, max_iters=3))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(
            '{"step": 4, "loss": 1.0}\n{"step": 5, "lo'
        )  # a run that was killed within a line
    succeeded(train(out_dir=tmp_path, dataset=play, max_iters=5, init_from="resume"))
    assert [e["step"] for e in log(tmp_path) if "loss" in e] == [1, 2, 3, 4, 5]


def test_resume_from_a_nanogpt_checkpoint(play, tmp_path):
    from tests.helpers import nanogpt_file, stepped

    model, optimizer = stepped(vocab_size=64, block_size=32)
    nanogpt_file(tmp_path / "ckpt.pt", model, optimizer)
    given = {
        "dataset": play,
        "out_dir": tmp_path,
        "max_iters": 4,
        "sample_tokens": 8,
        "batch_size": 4,
        "warmup_iters": 1,
        "gradient_accumulation_steps": 1,
        "eval_iters": 1,
    }
    out = succeeded(run_script("train.py", init_from="resume", **given))
    assert (
        "ckpt.pt after step 2" in out
        and "step 3/4 | loss" in out
        and "step 4/4 | validation loss" in out
    )
    done = run_script(
        "sample.py", out_dir=tmp_path / "ckpt.pt", num_samples=1, max_new_tokens=9, dataset=play
    )
    assert "-" * 15 in succeeded(done)


def test_contradicting_flags_are_refused(play, tmp_path):
    succeeded(train(out_dir=tmp_path, dataset=play, **MOE))
    for key, value, had in (
        ("num_experts", 8, 4),
        ("top_k", 1, 2),
        ("n_embd", 64, 32),
        ("use_moe", False, True),
        ("norm", "rmsnorm", "layernorm"),
    ):
        done = run_script("train.py", init_from="resume", out_dir=tmp_path, **{key: value})
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{key} = {value!r} contradicts" in done.stderr and f"{key} = {had!r}" in done.stderr
    assert checkpoint.latest_good(tmp_path).name == "step-00000002"


def test_a_run_from_scratch_loses_no_earlier_one(play, tmp_path):
    for _ in range(3):
        out = succeeded(train(out_dir=tmp_path, dataset=play))
    assert f"moved an earlier run in {tmp_path} to {tmp_path / 'earlier-2'}" in out
    for folder in (tmp_path, tmp_path / "earlier-1", tmp_path / "earlier-2"):
        assert (folder / "log.jsonl").exists() and checkpoint.latest_good(
            folder
        ).name == "step-00000002"


def test_going_back_to_an_older_step_loses_nothing(play, tmp_path):
    succeeded(train(out_dir=tmp_path, dataset=play, max_iters=4, eval_interval=2))
    kept = weights(tmp_path / "step-00000004")
    older = tmp_path / "step-00000002"
    out = succeeded(
        train(out_dir=tmp_path, dataset=play, max_iters=4, init_from=older, learning_rate=0.01)
    )
    assert f"to {tmp_path / 'earlier-1'}" in out and "step 4/4 | validation loss" in out
    before, after = (
        weights(tmp_path / "earlier-1" / "step-00000004"),
        weights(tmp_path / "step-00000004"),
    )
    assert all(torch.equal(kept[k], before[k]) for k in kept) and not all(
        torch.equal(kept[k], after[k]) for k in kept
    )
    assert [e["step"] for e in log(tmp_path) if "loss" in e] == [1, 2, 3, 4]
    # In another folder it is a run of its own, and leaves this one alone.
    succeeded(train(out_dir=tmp_path / "b", dataset=play, max_iters=5, init_from=tmp_path))
    assert [e["step"] for e in log(tmp_path / "b") if "loss" in e] == [
        5
    ] and checkpoint.latest_good(tmp_path).name == "step-00000004"


def test_a_resumed_run_keeps_its_precision(play, tmp_path):
    """dtype 'auto' is measured at each start; a resumed run takes the checkpoint's instead."""
    for dtype in ("float32", "bfloat16"):
        run = {"dataset": play, "out_dir": tmp_path / dtype}
        succeeded(train(**run, dtype=dtype))
        out = succeeded(train(**run, dtype="auto", init_from="resume", max_iters=3))
        assert f"threads), {dtype}, compile off" in out
    out = succeeded(train(**run, dtype="float32", init_from="resume", max_iters=4))
    assert "threads), float32, compile off" in out  # unless told otherwise


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_deterministic_runs_resume_to_the_last_bit(device, play, tmp_path):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no cuda")
    run = {
        "dataset": play,
        "deterministic": True,
        "device": device,
        # on a CPU 'auto' measures, and may decide otherwise while other tests run
        "dtype": "float32" if device == "cpu" else "auto",
        "compile": "auto",
        "dropout": 0.1,
        "eval_interval": 3,
        "n_embd": 64,
        **MOE,
        "router_bias_update_rate": 1e-3,
    }
    succeeded(train(**run, out_dir=tmp_path / "whole", max_iters=6, timeout=600))
    succeeded(train(**run, out_dir=tmp_path / "parts", max_iters=3, lr_decay_iters=6, timeout=600))
    succeeded(
        train(**run, out_dir=tmp_path / "parts", max_iters=6, init_from="resume", timeout=600)
    )
    a, b = (weights(tmp_path / name / "step-00000006") for name in ("whole", "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts") and all(
        a[name].equal(b[name]) for name in a
    )


def test_torchrun_resumes_a_run_from_scratch(play, tmp_path):
    """torchrun starts a dead worker again with the same command line, 'scratch' included.

    The worker resumes, and an earlier run in that folder stays aside.
    """
    succeeded(train(dataset=play, out_dir=tmp_path, seed=1))
    command = [
        *TORCHRUN,
        "--standalone",
        "--nproc_per_node=1",
        "--max-restarts=1",
        str(ROOT / "train.py"),
        *flags(
            **SMALL | {"dataset": play, "out_dir": tmp_path, "max_iters": 300, "eval_interval": 100}
        ),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    out = ""
    for line in process.stdout:
        out += line
        if "step 150/" in line:
            with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
                os.kill(int(file.read().split()[0]), signal.SIGKILL)
            break
    out += process.communicate(timeout=120)[0]
    assert (
        process.returncode == 0
        and "resuming from" in out
        and "after step 100" in out
        and out.count("moved an earlier") == 1
    )
    assert (
        "step 300/300 | validation loss" in out
        and checkpoint.latest_good(tmp_path / "earlier-1").name == "step-00000002"
    )
