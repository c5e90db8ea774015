"""Many processes: gloo ranks on a CPU, started by torchrun and without it."""

import os
import signal
import time

import pytest
import torch

from nanomoe.load import load
from nanomoe.run_dir import claim
from tests.helpers import (
    MODERN,
    ROOT,
    altered_train,
    children,
    full,
    losses,
    read_until,
    run_script,
    start_train,
    succeeded,
    train,
)
from tests.warm import free_port, ranks_of_srun

# 3 experts cannot be split evenly between 2 processes
MOE = {"use_moe": True, "num_experts": 3, "top_k": 2}


@pytest.mark.parametrize(
    "settings",
    [
        full({"dtype": "bfloat16"}),
        full({"dtype": "bfloat16", "bias": True, "gradient_checkpointing": True}),
        # one process has fewer windows to validate on
        MODERN | {"num_shared_experts": 1, "tie_weights": False, "batch_size": 1},
        # 3 experts are cut across and gathered, 4 are shared out
        full({"optimizer": "muon", "mlp": "swiglu", "n_kv_head": 1, "num_shared_experts": 1}),
        full({"optimizer": "muon", "num_experts": 4}),
    ],
    ids=str,
)
def test_fsdp_equals_ddp(settings, play, tmp_path):
    """FSDP and DDP give the same losses and weights, to rounding, and the same checkpoints."""
    run = {"dataset": play, "ranks": 2, "max_iters": 4, "eval_interval": 2, "eval_iters": 3}
    for parallel in ("ddp", "fsdp"):
        done = train(**run | MOE | settings, out_dir=tmp_path / parallel, parallel=parallel)
        out = succeeded(done)
        assert out.count("a sample:") == 1 and out.count("step 4/4 | validation loss") == 1
    close = 1e-2 if "dtype" in settings else 2e-5
    a, b = losses(tmp_path / "ddp"), losses(tmp_path / "fsdp")
    for step in (1, 2, 3, 4):
        for key in a[step].keys() & {"loss", "val_loss", "balance_loss"}:
            assert b[step][key] == pytest.approx(a[step][key], abs=close), (step, key)
    a, b = load(tmp_path / "ddp"), load(tmp_path / "fsdp")
    b.build_model()
    assert a.config == b.config and a.weights.keys() == b.weights.keys()
    for name in a.weights:
        torch.testing.assert_close(a.weights[name], b.weights[name], atol=close, rtol=1e-2)


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_world_sizes(parallel, optimizer, play, tmp_path):
    """One process, then two, then one again: the same batches, so every loss is one process's."""
    run = {"dataset": play, "dropout": 0.1, "optimizer": optimizer, "lr_decay_iters": 12, **MOE}
    run |= {"router_bias_update_rate": 1e-3, "eval_interval": 4, "gradient_accumulation_steps": 4}
    succeeded(train(**run, out_dir=tmp_path / "one", max_iters=12))
    run |= {"out_dir": tmp_path / "run", "parallel": parallel, "init_from": "auto"}
    for processes, max_iters in ((1, 4), (2, 8), (1, 12)):
        succeeded(train(**run, ranks=processes, max_iters=max_iters))
    one, resized = losses(tmp_path / "one"), losses(tmp_path / "run")
    assert one.keys() == resized.keys() == set(range(1, 13))
    for step, entry in one.items():
        for key in entry.keys() & {"loss", "val_loss"}:
            assert resized[step][key] == pytest.approx(entry[key], rel=1e-6), (step, key)


@pytest.mark.full
def test_fsdp_compiles(play, tmp_path):
    """Compiled, as by default on GPUs, the losses are the same."""
    run = {"dataset": play, "max_iters": 3, "gradient_accumulation_steps": 2, **MOE}
    succeeded(train(**run, out_dir=tmp_path / "one"))
    run |= {"processes": 2, "parallel": "fsdp", "compile": True, "timeout": 600}
    assert "compile on" in succeeded(train(**run, out_dir=tmp_path / "fsdp"))
    a, b = losses(tmp_path / "one"), losses(tmp_path / "fsdp")
    assert all(b[step]["loss"] == pytest.approx(a[step]["loss"], abs=2e-5) for step in (1, 2, 3))


@pytest.mark.parametrize("optimizer", [full("adamw"), "muon"])
def test_fsdp_holds_a_share(optimizer, tmp_path):
    """Each of two processes keeps half of every large weight and of its moments."""
    (tmp_path / "shares.py").write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch
from nanomoe import distributed, parallel
from nanomoe.optim import build_optimizer, num_moments
from tests.helpers import small_model, tokens
parallel.connect(torch.device("cpu"))
model = small_model(use_moe=True, num_experts=3, top_k=2)
whole = sum(p.numel() for p in model.parameters())
parallel.parallelize(model, "fsdp", torch.device("cpu"), "float32")
moments = num_moments(model, {optimizer!r})
optimizer = build_optimizer(model, {optimizer!r}, 1e-3, 0.1, (0.9, 0.95), "cpu")
model(tokens(2, 16), tokens(2, 16))[1].backward()
optimizer.step()
state = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
assert sum(value.numel() for value in state) == moments
assert sum(value.to_local().numel() for value in state) <= 0.52 * moments
assert sum(p.to_local().numel() for p in model.parameters()) <= 0.52 * whole
assert sum(p.numel() for p in model.parameters()) == whole == model.num_params() + 16 * 32
distributed.print0("held")
distributed.shutdown(0)
""")
    assert "held" in succeeded(run_script(tmp_path / "shares.py", ranks=2))


@pytest.mark.parametrize("parallel", [full("ddp"), "fsdp"])
def test_without_torchrun_a_signal_saves_and_ends_both(parallel, play, tmp_path):
    """Slurm sends SIGUSR1 to every process before its time limit; the same command resumes.

    With FSDP the signal goes to rank 1 alone, which is enough to stop both."""
    run = {"dataset": play, "out_dir": tmp_path, "init_from": "auto", "parallel": parallel}
    both = [start_train(env=env, **run, max_iters=10**6) for env in ranks_of_srun(2)]
    read_until(both[0], "step 5/")
    for process in both[1:] if parallel == "fsdp" else both:
        process.send_signal(signal.SIGUSR1)
    try:
        outs = [process.communicate(timeout=60)[0] for process in both]
    finally:
        for process in both:
            process.kill()  # does nothing to one that has ended
    assert [process.returncode for process in both] == [138, 138], outs
    step = load(tmp_path).step
    assert "stopped by SIGUSR1" in outs[0] and step >= 5 and not outs[1]
    out = succeeded(train(ranks=2, **run, max_iters=step + 2))
    assert f"after step {step}" in out and f"step {step + 2}/{step + 2} | validation loss" in out


@pytest.mark.full
def test_two_machines_resume_after_a_worker_dies(play, tmp_path):
    """Two torchruns, as on two machines. A process of the second dies; both start again."""
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    options += ["--rdzv-id=1", "--max-restarts=1"]
    run = {"dataset": play, "out_dir": tmp_path, "max_iters": 200, "eval_interval": 50}
    both = [start_train(torchrun=options, **run) for _ in "12"]
    while not (tmp_path / "step-00000050").exists():
        assert all(process.poll() is None for process in both)
        time.sleep(0.01)
    os.kill(children(both[1].pid)[0], signal.SIGKILL)
    outs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outs
    assert "resuming from" in "".join(outs) and "step 200/200 | validation loss" in "".join(outs)
    assert not list(tmp_path.glob("earlier-*"))


def test_launchers_of_any_log(tmp_path):
    """Whether a torchrun started the last run; none did where the log cannot be read."""
    log = tmp_path / "log.jsonl"
    assert not claim(tmp_path, ["h 1 1", "h 2 2"], {})
    for text, expected in (
        ("", []),
        ('{"start": "2026"}\n', []),
        ('{"start": "2026", "laun', []),
        ('{"start": 1, "launchers": ["h 1 1"]}\n{"start": 2, "launchers": ["h 2 2"]}\n', ["h 2 2"]),
    ):
        log.write_text(text)
        for name in ("h 1 1", "h 2 2"):
            assert claim(tmp_path, [name], {}) == (name in expected), text


@pytest.mark.full
def test_a_worker_that_dies_while_starting_leaves_an_earlier_run_aside(play, tmp_path):
    """An earlier run that this job has not yet moved aside is not what a restart resumes."""
    succeeded(train(dataset=play, out_dir=tmp_path / "run", seed=1, max_iters=3))
    change = "if not again: train.choose_start = lambda *_: os._exit(9)"
    run = {"script": altered_train(tmp_path / "dies.py", change), "torchrun": ["--max-restarts=1"]}
    process = start_train(**run, dataset=play, out_dir=tmp_path / "run", seed=2, max_iters=6)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "resuming" not in out, out
    assert "moved an earlier run" in out
    assert load(tmp_path / "run" / "earlier-1").settings["seed"] == 1
    assert load(tmp_path / "run").settings["seed"] == 2 and len(losses(tmp_path / "run")) == 6


@pytest.mark.full
def test_a_tokenizer_missing_on_one_rank_stops_no_rank(play, tmp_path):
    run = {"dataset": play, "out_dir": tmp_path / "run", "parallel": "fsdp"}
    for rank, words in ((1, "a sample:"), (0, "no sample: no tables")):
        script = altered_train(
            tmp_path / f"{rank}.py",
            f"def lack(_): raise OSError('no tables')\nif rank == {rank}: train.Tokenizer = lack",
        )
        out = succeeded(train(script=script, ranks=2, **run))
        assert out.count(words) == 1 and ("no sample" in out) == (rank == 0)


@pytest.mark.parametrize("what", ["train.check_disk_space", full("train.Saver.write")])
def test_an_error_on_rank_0_is_one_line(what, play, tmp_path):
    change = f"def fail(*_): raise OSError('the disk is on fire')\nif rank == 0: {what} = fail"
    script = altered_train(tmp_path / "fails.py", change)
    done = train(dataset=play, out_dir=tmp_path / "run", processes=2, timeout=60, script=script)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and said[0] == "error: the disk is on fire", done.stderr
    assert len(said) <= 2 and 'train.py", line' not in done.stderr  # no traceback of ours
