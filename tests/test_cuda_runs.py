"""
Whole runs on each device: train.py and sample.py as a user starts them.

On a GPU: pytest -n 0 tests/test_cuda.py tests/test_cuda_runs.py
"""

import re

import pytest
import torch

from tests.helpers import (
    MOE,
    ROOT,
    altered_train,
    assert_same_run,
    full,
    log,
    losses,
    one_line,
    run_script,
    succeeded,
    train,
)

ON_CPU_FULL = pytest.mark.parametrize("device", [full("cpu"), "cuda"], indirect=True)
ONLY_CUDA = pytest.mark.parametrize("device", ["cuda"], indirect=True)


def assert_near(out_dir, other, **tolerance):
    """Two runs have nearly the same losses."""
    found, wanted = losses(out_dir), losses(other)
    for step, entry in wanted.items():
        assert found[step]["loss"] == pytest.approx(entry["loss"], **tolerance), step


@ON_CPU_FULL
def test_the_first_steps_are_those_of_a_cpu(device, play, tmp_path):
    run = MOE | {"dataset": play, "max_iters": 5, "learning_rate": 1e-2}
    succeeded(train(out_dir=tmp_path / "cpu", **run))
    succeeded(train(out_dir=tmp_path / "here", **run | {"device": device}))
    # TF32 has 10 bits after the point
    assert_near(tmp_path / "here", tmp_path / "cpu", rel=2e-3)


# In the ten steps between two log lines the host never waits for the device: torch raises an error
# where it would.
WATCH_FOR_SYNCS = """
import torch
mode = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else lambda mode: None
watched = set()
train_step, log_step = train.train_step, train.log_step
def watch(run):
    if 1 <= run.step < 11:
        mode("error")
        watched.add(run.step)
    return train_step(run)
def stop_watching(*args):
    mode("default")
    print("watched", len(watched), "steps")
    return log_step(*args)
train.train_step, train.log_step = watch, stop_watching
"""


@ON_CPU_FULL
@pytest.mark.parametrize(
    "more",
    [
        MOE,
        MOE | {"optimizer": "muon", "router_bias_update_rate": 1e-3, "spike_guard": 6.0},
        MOE | {"compile": True, "capacity_factor": 1.25, "dropout": 0.1},
    ],
    ids=["moe", "muon and guard", "compiled"],
)
def test_the_host_does_not_wait(device, more, play, tmp_path):
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("below 9.0 torch's grouped GEMMs read on the host where experts end")
    script = altered_train(tmp_path / "watched.py", WATCH_FOR_SYNCS)
    run = {"max_iters": 11, "log_interval": 11, "device": device, "dtype": "bfloat16"} | more
    if device.type == "cpu":
        run["compile"] = False
    out = succeeded(train(dataset=play, out_dir=tmp_path / "run", script=script, **run))
    assert "watched 10 steps" in out


@ON_CPU_FULL
def test_float16_and_its_scaler(device, play, tmp_path):
    run = MOE | {"dataset": play, "dtype": "float16", "device": device, "max_iters": 12}
    succeeded(train(out_dir=tmp_path / "half", learning_rate=1e-2, **run))
    entries = [entry["loss"] for entry in log(tmp_path / "half") if "loss" in entry]
    assert entries[-1] < entries[0] - 0.2
    run |= {"max_iters": 14, "init_from": "resume"}
    assert "step 14/14" in succeeded(train(out_dir=tmp_path / "half", learning_rate=1e-2, **run))


# What several processes do, in one: nccl on a GPU.
ALONE = """
import torch.distributed as dist
from nanomoe import parallel
initial_model = train.initial_model
def alone(plan):
    model, line = initial_model(plan)
    def to(device):
        del model.to
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return parallel.parallelize(model, train.parallel, device, train.dtype)
    model.to = to
    return model, line
train.initial_model = alone
"""


@ON_CPU_FULL
@pytest.mark.parametrize("parallel, optimizer", [("ddp", "adamw"), ("fsdp", "muon")])
def test_one_process_with_ddp_and_fsdp(device, parallel, optimizer, play, tmp_path):
    run = MOE | {"dataset": play, "device": device, "max_iters": 4, "optimizer": optimizer}
    succeeded(train(out_dir=tmp_path / "plain", **run))
    script = altered_train(tmp_path / "alone.py", ALONE)
    done = train(out_dir=tmp_path / "run", parallel=parallel, script=script, **run)
    assert "saved" in succeeded(done)
    assert_near(tmp_path / "run", tmp_path / "plain", abs=2e-3)


@ON_CPU_FULL
def test_a_deterministic_run_resumes_to_the_bit(device, play, tmp_path):
    """What is saved while the run trains on, as on a GPU, is what it was at that step."""
    run = MOE | {"dataset": play, "device": device, "dropout": 0.1, "eval_interval": 3}
    run |= {"deterministic": True, "dtype": "bfloat16", "lr_decay_iters": 6}
    run |= {"router_bias_update_rate": 1e-3}
    run["compile"] = device.type == "cuda"
    succeeded(train(out_dir=tmp_path / "whole", max_iters=6, **run))
    succeeded(train(out_dir=tmp_path / "parts", max_iters=3, **run))
    succeeded(train(out_dir=tmp_path / "parts", max_iters=6, init_from="resume", **run))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@ON_CPU_FULL
def test_a_run_moves_to_the_other_device(device, play, tmp_path):
    run = MOE | {"dataset": play, "out_dir": tmp_path, "learning_rate": 1e-2, "decay_lr": False}
    for max_iters, where in ((20, device), (40, "cpu"), (60, device)):
        out = succeeded(train(max_iters=max_iters, device=where, init_from="auto", **run))
    assert "step 60/60" in out
    sample = {"out_dir": tmp_path, "temperature": 1.0, "num_samples": 1, "max_new_tokens": 40}
    sample |= {"dtype": "float32"}
    texts = [
        succeeded(run_script("sample.py", device=where, cached=cached, **sample))
        for where, cached in (("cpu", True), (device, True), (device, False))
    ]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 5
    shown = run_script("sample.py", show_experts=0, device=device, **sample)
    assert "\x1b[38;5;" in succeeded(shown) and "expert" in shown.stderr


@ONLY_CUDA
def test_out_of_memory_is_one_line(device, play, tmp_path):
    """A card of which this process may have half a gigabyte."""
    change = """
import torch
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(5e8 / total)
"""
    script = altered_train(tmp_path / "altered.py", change)
    run = MOE | {"dataset": play, "device": device, "batch_size": 4096, "script": script}
    smaller = "out of memory: with --batch_size=2048 --gradient_accumulation_steps=4"
    one_line(train(out_dir=tmp_path / "run", **run), 1, smaller)
    run["batch_size"] = 1
    done = train(out_dir=tmp_path / "wide", n_embd=2048, n_layer=1, **run)
    one_line(done, 1, "out of memory: the model and its optimizer do not fit")


@ONLY_CUDA
def test_memory_that_another_process_holds(device, play, tmp_path):
    """It holds all but two gigabytes; the line says so."""
    free, total = torch.cuda.mem_get_info()
    other = torch.empty(int(free - 2e9), dtype=torch.uint8, device=device)
    run = MOE | {"dataset": play, "device": device, "n_embd": 4096, "n_layer": 1}
    try:
        done = train(out_dir=tmp_path / "run", **run)
    finally:
        del other
        torch.cuda.empty_cache()
    held = re.search(r"other processes hold ([\d.]+) of this GPU's ([\d.]+) GB", done.stderr)
    one_line(done, 1, "out of memory")
    assert held and float(held[1]) == pytest.approx((total - 2e9) / 1e9, rel=0.05), done.stderr


# The memory that torch has had at most, in the line that follows the last one.
PEAK = """
import atexit, torch
def say():
    if torch.cuda.is_available():
        print("peak", torch.cuda.max_memory_allocated())
atexit.register(say)
"""


@ON_CPU_FULL
def test_steps_of_293_million_parameters(device, play_gpt2, tmp_path):
    """config/train_gpt2_moe.py: on a GPU with its batches and compiled, and the estimate of its
    memory is right to a quarter."""
    script = altered_train(tmp_path / "altered.py", PEAK)
    run = {"dataset": play_gpt2, "out_dir": tmp_path / "run", "device": device, "max_iters": 3}
    run |= {"gradient_accumulation_steps": 1, "eval_iters": 1, "sample_tokens": 5}
    run |= {"warmup_iters": 1, "load_interval": 1, "log_interval": 1, "eval_interval": 100}
    if device.type == "cpu":
        run |= {"batch_size": 1, "block_size": 32}
    config = ROOT / "config" / "train_gpt2_moe.py"
    out = succeeded(run_script(script, config, timeout=600, **run))
    assert re.search(r"MoEGPT: 29\d,\d{3},\d{3} parameters", out), out
    entries = [entry for entry in log(tmp_path / "run") if "loss" in entry]
    assert len(entries) == 3 and entries[-1]["loss"] < entries[0]["loss"]
    if device.type == "cuda":
        parts = re.findall(r"([\d.]+) GB for", out)
        estimate = sum(map(float, parts)) * 1e9
        assert estimate == pytest.approx(int(re.search(r"peak (\d+)", out)[1]), rel=0.25)
        assert entries[-1]["mfu"] is None or 0 < entries[-1]["mfu"] < 1, entries[-1]
