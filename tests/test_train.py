"""train.py and sample.py as a user runs them: subprocesses, real files, real signals, torchrun."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train as train_module
from nanomoe import checkpoint
from nanomoe.device import limit_threads
from tests.conftest import ROOT, SHARED, SMALL, run_script, small_model, start_train, tokens, train

CONFIGS = sorted(path.name for path in (ROOT / "config").glob("*.py"))
MOE = {"use_moe": True, "num_experts": 4, "top_k": 2}


def log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def losses(out_dir):
    """{step: (training loss, validation loss)} without wall-clock times."""
    found = {}
    for entry in log(out_dir):
        if "step" in entry:
            found.setdefault(entry["step"], {}).update(
                {k: v for k, v in entry.items() if k not in ("ms", "tokens_per_s", "seconds")}
            )
    return found


def weights(path):
    return load_file(path / "model.safetensors")


def succeeded(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_trains_two_steps_and_samples(config, play, play_gpt2, gpt2_hub, tmp_path):
    text = (ROOT / "config" / config).read_text()
    assert text.startswith('"""') and "Parameters:" in text and "To expect:" in text
    small = {
        "n_embd": 96 if "n_head = 12" in text or "GPT-2" in text else 48,
        "n_layer": 2,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    if (
        'from = "gpt2' in text
    ):  # of OpenAI's sizes is what the hub has under that name, here a small model
        small = {"batch_size": 2, "gradient_accumulation_steps": 2}
    sizes = {"num_experts": 10, "top_k": 7} if "top_k = 7" in text else {}
    gpt2 = 'dataset = "openwebtext"' in text or 'dataset = "shakespeare"' in text
    # shrunk by flags alone; heads and everything else stay the config's
    keep = {
        "block_size",
        "max_iters",
        "warmup_iters",
        "eval_iters",
        "eval_interval",
        "log_interval",
        "device",
    }
    shrink = (
        {k: v for k, v in SMALL.items() if k in keep}
        | small
        | sizes
        | {"sample_tokens": 0 if gpt2 else 8}
    )
    out = succeeded(
        run_script(
            "train.py",
            f"config/{config}",
            **shrink,
            out_dir=tmp_path,
            env=gpt2_hub,
            dataset=play_gpt2 if gpt2 else play,
        )
    )
    if "eval_only = True" in text:
        assert "step 0/2 | validation loss 10." in out and not list(tmp_path.iterdir())
        return
    assert (
        "step 2/2 | loss" in out
        and "validation loss" in out
        and (gpt2 or "more: python sample.py" in out)
    )
    model = checkpoint.load(tmp_path).build_model()
    assert model.config.n_layer == 2 and ("use_moe = True" in text) == hasattr(
        model.config, "top_k"
    )
    if not gpt2:  # GPT-2's tokenizer would be fetched from the network
        assert (
            run_script(
                "sample.py", out_dir=tmp_path, num_samples=2, max_new_tokens=20
            ).stdout.count("-" * 15)
            == 2
        )
    else:
        assert model.generate(tokens(1, 4), 4, vocab_size=50257).shape == (1, 8)


def test_gpt2_by_name(play, play_gpt2, gpt2_hub, tmp_path):
    """Fine-tuned from the hub's name, with fewer positions; its config stays; and a dataset of other tokens is refused."""
    run = {
        "init_from": "gpt2-medium",
        "out_dir": tmp_path / "run",
        "env": gpt2_hub,
        "batch_size": 2,
        "eval_iters": 2,
        "device": "cpu",
        "gradient_accumulation_steps": 1,
        "max_iters": 2,
        "sample_tokens": 0,
        "warmup_iters": 1,
    }
    out = succeeded(run_script("train.py", dataset=play_gpt2, block_size=64, dropout=0.1, **run))
    assert (
        "starting with the weights of" in out
        and "step 1/2 | loss 10." in out
        and "sequences x 64 tokens" in out
    )
    c = checkpoint.load(tmp_path / "run").config
    assert (c.mlp, c.bias, c.n_embd, c.n_head, c.vocab_size) == ("gelu_tanh", True, 96, 12, 50257)
    assert (c.block_size, c.dropout) == (64, 0.1)
    out = succeeded(
        run_script("train.py", dataset=play_gpt2, **run | {"init_from": "resume", "max_iters": 3})
    )
    assert "after step 2" in out and "step 3/3" in out
    for settings, words in (
        ({"dataset": play}, "has other token ids"),
        ({"n_layer": 12}, "n_layer = 12 contradicts"),
        ({"block_size": 2048}, "block_size is 2048"),
        ({"use_moe": True}, "to make a MoE of it, use --init_from=upcycle"),
    ):
        done = run_script(
            "train.py", **{"dataset": play_gpt2} | run | {"out_dir": tmp_path / "no"} | settings
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and words in done.stderr, (
            done.stderr
        )
    assert not (tmp_path / "no").exists()


def test_gpt2_dataset_samples(play_gpt2, tmp_path):
    if not (SHARED / "tiktoken").exists():
        pytest.skip("no tiktoken cache at hand")
    out = succeeded(train(out_dir=tmp_path, dataset=play_gpt2, **MOE))
    assert "a sample:" in out and "no sample" not in out
    done = run_script(
        "sample.py", out_dir=tmp_path, start="Macbeth<|endoftext|>", num_samples=1, max_new_tokens=9
    )
    assert succeeded(done).startswith("Macbeth<|endoftext|>")


def test_console_and_log(play, tmp_path):
    out = succeeded(train(out_dir=tmp_path, dataset=play, max_iters=5, eval_interval=2, **MOE))
    for words in (
        "MoEGPT: ",
        "active per token",
        "256 tokens per step = 2 micro-batches x 4 sequences x 32 tokens",
        "MFLOPs",
        "estimated memory",
        "step 1/5 | loss 4.",
        " tokens/s | balance 1.",
        "maxvio",
        "dead 0",
        "left",
        "step 2/5 | validation loss",
        "step 4/5 | validation loss",
        "step 5/5 | validation loss",
        "bits per byte",
        "a sample:",
        f"more: python sample.py --out_dir={tmp_path}",
    ):
        assert words in out, words
    assert "mfu" not in out  # no peak is known for a CPU
    start, *entries = log(tmp_path)
    assert start["settings"]["num_experts"] == 4 and start["active_params"] < start["params"]
    steps = [e["step"] for e in entries if "loss" in e]
    assert steps == [1, 2, 3, 4, 5]
    assert [e["step"] for e in entries if "val_loss" in e] == [2, 4, 5]
    first = entries[0]
    assert (
        first["mfu"] is None
        and first["dead_experts"] == 0
        and abs(first["loss"] - math.log(64)) < 0.3
    )
    assert [p.name for p in checkpoint.list_steps(tmp_path)] == [
        "step-00000002",
        "step-00000004",
        "step-00000005",
    ] or len(checkpoint.list_steps(tmp_path)) == 2


def test_validation_loss_is_the_models(play, tmp_path):
    """The number in the log is the pure cross-entropy of the saved weights on the fixed windows."""
    from nanomoe.dataset import Dataset

    succeeded(train(out_dir=tmp_path, dataset=play, eval_iters=3, **MOE))
    model, data = checkpoint.load(tmp_path).build_model().eval(), Dataset(play, 32)
    x, y = (torch.from_numpy(a) for a in data.read_windows("val", data.val_offsets(12)))
    with torch.no_grad():
        assert abs(model(x, y)[1].item() - losses(tmp_path)[2]["val_loss"]) < 1e-5


def test_the_enwik8_pair_has_the_same_wall_clock(tmp_path):
    """config/train_enwik8.py and its MoE twin, shrunk by flags alone, on bytes of text: as long as each other, the learning
    rate at its end, and the loss in nats and in bits per byte, which for bytes is nats / ln 2."""
    text, data_dir = np.fromfile(ROOT / "tests" / "macbeth.txt", np.uint8), tmp_path / "bytes"
    data_dir.mkdir()
    meta = {"vocab_size": 256, "dtype": "uint16", "tokenizer": "byte"}
    for split, part in (("train", text[:-5000]), ("val", text[-5000:])):
        part.astype(np.uint16).tofile(data_dir / f"{split}.bin")
        meta[split] = {"tokens": len(part), "bytes": len(part)}
    (data_dir / "meta.json").write_text(json.dumps(meta))
    shrink = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "batch_size": 4,
        "warmup_iters": 5,
        "eval_iters": 2,
        "max_seconds": 3,
        "device": "cpu",
        "sample_tokens": 0,
        "eval_interval": 50,
    }
    for config in ("train_enwik8", "train_enwik8_moe"):
        succeeded(
            run_script(
                "train.py",
                f"config/{config}.py",
                **shrink,
                dataset=data_dir,
                out_dir=tmp_path / config,
            )
        )
        entries = log(tmp_path / config)
        evaluations = [e for e in entries if "val_loss" in e]
        assert (
            len(evaluations) >= 2 and evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] < 5.6
        )
        assert all(
            e["val_bits_per_byte"] == pytest.approx(e["val_loss"] / math.log(2), rel=1e-3)
            for e in evaluations
        )
        assert (
            3 <= evaluations[-1]["seconds"] < 6
            and [e["lr"] for e in entries if "lr" in e][-1] < 1e-4
        )


@pytest.mark.parametrize("processes", [1, 2])
def test_max_seconds(play, tmp_path, processes):
    """The run ends when its time is up, whatever max_iters; the learning rate has fallen to its lowest by then; resuming adds
    nothing."""
    run = {
        "dataset": play,
        "out_dir": tmp_path,
        "max_seconds": 2,
        "max_iters": 10**6,
        "warmup_iters": 0,
        "min_lr": 1e-5,
        "learning_rate": 1e-3,
        "eval_interval": 10**6,
    }
    out = succeeded(train(**run, processes=processes))
    entries = log(tmp_path)[1:]
    steps = [e for e in entries if "loss" in e]
    assert 2 <= steps[-1]["seconds"] < 20 and steps[-2]["seconds"] < 2 and len(steps) > 20
    lrs = [e["lr"] for e in steps]
    assert lrs == sorted(lrs, reverse=True) and lrs[0] == 1e-3 and lrs[-1] < 5e-5
    assert (
        [e["step"] for e in entries if "val_loss" in e]
        == [steps[-1]["step"]]
        == [checkpoint.load(tmp_path).step]
    )
    middle = steps[
        len(steps) // 2
    ]  # a step takes the rate of the time at which the one before ended
    before = steps[len(steps) // 2 - 1]["seconds"]
    assert middle["lr"] == pytest.approx(
        1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * before / 2))
    )
    assert "saved" in out
    out = succeeded(train(**run, init_from="resume"))
    assert "| loss" not in out and checkpoint.load(tmp_path).step == steps[-1]["step"]


@pytest.mark.parametrize("settings", [{"n_embd": 64}, MOE | {"n_embd": 64}], ids=["dense", "moe"])
def test_overfits_one_batch(settings):
    model = small_model(**settings)
    optimizer = model.configure_optimizers(0.0, 3e-3, (0.9, 0.95), "cpu")
    idx = tokens(4, 17)
    for _ in range(300):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.stats["cross_entropy"] < 0.1


def test_learning_rate_schedule(monkeypatch):
    schedule = {
        "learning_rate": 1.0,
        "min_lr": 0.1,
        "warmup_iters": 10,
        "lr_decay_iters": 110,
        "max_iters": 200,
        "decay_lr": True,
    }
    for key, value in schedule.items():
        monkeypatch.setattr(train_module, key, value)
    rates = [train_module.get_lr(step) for step in range(200)]
    assert (
        rates[0] == pytest.approx(1 / 11)
        and rates[9] == pytest.approx(10 / 11)
        and rates[10] == 1.0
    )
    assert rates[60] == pytest.approx(0.55) and rates[110] == rates[199] == pytest.approx(0.1)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    monkeypatch.setattr(train_module, "lr_decay_iters", 0)  # = max_iters
    assert train_module.get_lr(199) == pytest.approx(0.1, abs=1e-3) and train_module.get_lr(
        105
    ) == pytest.approx(0.55)
    monkeypatch.setattr(train_module, "decay_lr", False)
    assert {train_module.get_lr(step) for step in range(200)} == {1.0}


@pytest.mark.parametrize("settings", [{}, MOE | {"dropout": 0.2}], ids=["dense", "moe"])
def test_two_ranks_equal_one_process(settings, play, tmp_path):
    """The same global batch, with dropout, MoE and accumulation: same losses, same weights."""
    common = (
        SMALL
        | settings
        | {"gradient_accumulation_steps": 4, "max_iters": 4, "eval_interval": 2, "dataset": play}
    )
    succeeded(train(out_dir=tmp_path / "one", **common))
    out = succeeded(train(out_dir=tmp_path / "two", processes=2, **common))
    assert out.count("step 4/4 | loss") == 1  # only rank 0 prints
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 4
    for step in one:
        for key in ("loss", "val_loss", "balance_loss"):
            if key in one[step]:
                assert two[step][key] == pytest.approx(one[step][key], abs=2e-5), (step, key)
    a, b = (weights(checkpoint.locate(tmp_path / name)) for name in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4)


def test_the_size_of_a_micro_batch_changes_nothing(play, tmp_path):
    for name, batch_size, accumulation in (("a", 8, 1), ("b", 2, 4)):
        succeeded(
            train(
                out_dir=tmp_path / name,
                dataset=play,
                batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                max_iters=3,
            )
        )
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert all(a[step]["loss"] == pytest.approx(b[step]["loss"], abs=2e-5) for step in (1, 2, 3))


def test_evaluation_changes_nothing(play, tmp_path):
    for name, interval in (("a", 1), ("b", 100)):
        succeeded(
            train(
                out_dir=tmp_path / name,
                dataset=play,
                eval_interval=interval,
                max_iters=4,
                dropout=0.1,
                **MOE,
            )
        )
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(a) == 4 and all(a[step]["loss"] == b[step]["loss"] for step in a)


@pytest.mark.parametrize("settings", [{}, MOE | {"dropout": 0.1}], ids=["dense", "moe"])
def test_resume_goes_on_where_it_stopped(settings, play, tmp_path):
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


def test_auto_is_one_command_line_from_start_to_end(play, tmp_path):
    """It starts, goes on after a kill -9 at any moment, passes over a damaged checkpoint, and ends with the same weights and
    losses as a run that nothing disturbed."""
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
            with open(checkpoint.locate(tmp_path / "killed") / "model.safetensors", "r+b") as file:
                file.seek(1000)
                file.write(b"damaged")
    out = succeeded(train(**run, out_dir=tmp_path / "killed"))
    assert (
        "model.safetensors is not as it was written; taking step-" in out and "resuming from" in out
    )
    a, b = (weights(checkpoint.locate(tmp_path / name)) for name in ("whole", "killed"))
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("*.tmp-*"))
    assert "| loss" not in succeeded(
        train(**run, out_dir=tmp_path / "killed")
    )  # there is nothing left to do


def test_all_processes_start_from_what_the_first_one_finds(play, tmp_path):
    """Also when another one would have found nothing, as in the moment in which torchrun restarts them."""
    run = SMALL | {"dataset": play, "init_from": "auto"}
    succeeded(run_script("train.py", **run, out_dir=tmp_path / "0"))
    (tmp_path / "own.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
        f"sys.argv.append('--out_dir={tmp_path}/' + os.environ['RANK'])\ntrain.run(train.main)\n"
    )
    out = succeeded(run_script(tmp_path / "own.py", processes=2, **run | {"max_iters": 4}))
    assert (
        "after step 2" in out
        and "step 4/4 | validation loss" in out
        and not (tmp_path / "1").exists()
    )


POISON = """
import os, sys
sys.path.insert(0, {root!r})
import train
from model import GPT
calls, head = [], GPT.logits_and_loss

def poisoned(self, x, targets):
    logits, loss = head(self, x, targets)
    if loss is not None and self.training:
        calls.append(1)
        if len(calls) in {calls} and int(os.environ.get("RANK", 0)) == {rank}:
            loss = {poison}
    return logits, loss
GPT.logits_and_loss = poisoned
fused = GPT.configure_optimizers
if {plain}:  # AdamW without the fused kernel, as on mps
    GPT.configure_optimizers = lambda self, decay, rate, betas, _: fused(self, decay, rate, betas, "mps")
if __name__ == "__main__":
    train.run_main(train.main)
"""


@pytest.mark.parametrize(
    "processes, plain, poison",
    [
        (1, False, "loss * float('nan')"),
        (1, True, "loss * float('nan')"),
        (2, False, "loss * float('nan')"),
        (2, False, "loss + float('inf')"),
    ],
)  # whose gradient is finite: only the loss tells
def test_bad_steps_update_nothing(processes, plain, poison, play, tmp_path):
    """A loss or gradient that is not finite, on one rank only: every rank skips the step, all of its state untouched, with one
    line."""
    (tmp_path / "poison.py").write_text(
        POISON.format(root=str(ROOT), calls=[3], rank=processes - 1, plain=plain, poison=poison)
    )
    run = SMALL | {
        "dataset": play,
        "out_dir": tmp_path / "run",
        "max_iters": 4,
        "eval_interval": 1,
        "keep_last": 0,
        **MOE,
        "router_bias_update_rate": 1e-3,
        "gradient_accumulation_steps": processes,
    }
    done = run_script(tmp_path / "poison.py", processes=processes, **run)
    out = succeeded(done)
    assert (
        out.count(
            "step 3: skipped, for a loss or gradient that is not finite; weights and optimizer stay"
        )
        == 1
    )
    assert out.count("not finite") == 1
    two, three, four = (checkpoint.load(tmp_path / "run" / str(step)) for step in (2, 3, 4))
    assert all(two.weights[name].equal(three.weights[name]) for name in two.weights)
    assert not all(three.weights[name].equal(four.weights[name]) for name in two.weights)
    before, after = (c.training_state()["optimizer"]["state"] for c in (two, three))
    assert all(before[i][key].equal(after[i][key]) for i in before for key in before[i])
    assert all(torch.isfinite(p).all() for p in four.weights.values())


def test_too_many_bad_steps_in_a_row_stop_the_run(play, tmp_path):
    poison = POISON.format(
        root=str(ROOT), calls=[2, 5, 6, 7, 8, 9], rank=0, plain=False, poison="loss * float('nan')"
    )
    (tmp_path / "poison.py").write_text(poison)
    run = SMALL | {
        "dataset": play,
        "out_dir": tmp_path / "run",
        "max_iters": 20,
        "eval_interval": 4,
        "max_bad_steps": 2,
        "gradient_accumulation_steps": 1,
    }
    done = run_script(tmp_path / "poison.py", **run)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "3 steps in a row had a loss or gradient that is not finite" in done.stderr
    good = checkpoint.load(tmp_path / "run")
    assert good.step == 4 and all(torch.isfinite(p).all() for p in good.weights.values())
    assert [step for step in range(1, 9) if f"step {step}: skipped" in done.stdout] == [2, 5, 6, 7]


def test_spike_guard_skips_a_leap_and_resumes_to_the_bit(play, tmp_path):
    """Once it has seen 64 steps, one whose loss is a hundred times as large is skipped, and neither it nor a resumption changes
    what is skipped later."""
    run = SMALL | {
        "dataset": play,
        "max_iters": 90,
        "eval_interval": 70,
        "keep_last": 0,
        "spike_guard": 6.0,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
    }
    poison = {"root": str(ROOT), "rank": 0, "plain": False, "poison": "loss * 100"}
    (tmp_path / "poison.py").write_text(POISON.format(**poison, calls=[10, 75, 76]))
    out = succeeded(run_script(tmp_path / "poison.py", **run, out_dir=tmp_path / "run"))
    assert "skipped, for a loss or gradient that is not finite or leaps up" in out
    assert [step for step in range(91) if f"step {step}: skipped" in out] == [75, 76]
    (tmp_path / "poison.py").write_text(POISON.format(**poison, calls=[5, 6]))
    again = succeeded(
        run_script(
            tmp_path / "poison.py",
            **run,
            out_dir=tmp_path / "again",
            init_from=tmp_path / "run" / "70",
        )
    )
    assert [step for step in range(91) if f"step {step}: skipped" in again] == [75, 76]
    a, b = (weights(checkpoint.locate(tmp_path / name)) for name in ("run", "again"))
    assert all(a[name].equal(b[name]) for name in a)


def test_resume_drops_log_lines_of_lost_steps(play, tmp_path):
    succeeded(train(out_dir=tmp_path, dataset=play, max_iters=3))
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 5, "lo')  # a run that was killed in mid-line
    succeeded(train(out_dir=tmp_path, dataset=play, max_iters=5, init_from="resume"))
    assert [e["step"] for e in log(tmp_path) if "loss" in e] == [1, 2, 3, 4, 5]


def test_resume_from_a_nanogpt_checkpoint(play, tmp_path):
    from tests.test_checkpoint import nanogpt_file, stepped

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
    assert checkpoint.locate(tmp_path).name == "step-00000002"


def test_a_run_from_scratch_loses_no_earlier_one(play, tmp_path):
    for _ in range(3):
        out = succeeded(train(out_dir=tmp_path, dataset=play))
    assert f"moved an earlier run in {tmp_path} to {tmp_path / 'earlier-2'}" in out
    for folder in (tmp_path, tmp_path / "earlier-1", tmp_path / "earlier-2"):
        assert (folder / "log.jsonl").exists() and checkpoint.locate(folder).name == "step-00000002"


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
    # into another folder: a run of its own, which leaves this one alone
    succeeded(train(out_dir=tmp_path / "b", dataset=play, max_iters=5, init_from=tmp_path))
    assert [e["step"] for e in log(tmp_path / "b") if "loss" in e] == [5] and checkpoint.locate(
        tmp_path
    ).name == "step-00000004"


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGTERM, 143)]
)
def test_signals_save_and_stop(number, code, play, tmp_path):
    process = start_train(out_dir=tmp_path, dataset=play, max_iters=100_000)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 5/" in line:
            process.send_signal(number)
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == code, rest
    assert (
        f"stopped by {number.name}; go on with --init_from=auto" in rest and "Traceback" not in rest
    )
    step = checkpoint.load(tmp_path).step
    assert 5 <= step < 1000 and log(tmp_path)[-1]["step"] == step
    out = succeeded(train(out_dir=tmp_path, dataset=play, max_iters=step + 2, init_from="resume"))
    assert f"after step {step}" in out and f"step {step + 2}/{step + 2} | validation loss" in out


@pytest.mark.parametrize("to", ["torchrun", "all"])
def test_a_signal_to_torchrun_or_to_all_stops_both_ranks(to, play, tmp_path):
    """torchrun hands a signal to its processes, at different moments; a cluster sends it to all, so that each gets it twice."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
        *[
            f"--{k}={v}"
            for k, v in (
                SMALL | {"out_dir": tmp_path, "dataset": play, "max_iters": 100_000}
            ).items()
        ],
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    for line in process.stdout:
        if "step 5/" in line:
            (os.killpg if to == "all" else os.kill)(process.pid, signal.SIGTERM)
            break
    rest, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM" in rest, rest
    assert checkpoint.load(tmp_path).step >= 5


def test_a_signal_ends_an_evaluation(play, tmp_path):
    """There is nothing to save: it ends at once, without a word."""
    for number in (signal.SIGTERM, signal.SIGINT):
        process = start_train(
            out_dir=tmp_path,
            dataset=play,
            eval_only=True,
            eval_iters=10**6,
            batch_size=1,
            n_layer=12,
            n_embd=512,
        )
        for line in process.stdout:
            if "estimated memory" in line:
                break
        time.sleep(1)
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
        assert (
            process.returncode in (130, -signal.SIGTERM)
            and "Traceback" not in out
            and "loss" not in out
        ), out


def test_eval_only(play, tmp_path):
    succeeded(train(out_dir=tmp_path, dataset=play))
    before = sorted(p.name for p in tmp_path.rglob("*")), losses(tmp_path)
    out = succeeded(train(out_dir=tmp_path, dataset=play, init_from="resume", eval_only=True))
    assert f"validation loss {before[1][2]['val_loss']:.4f}" in out and "a sample" not in out
    assert (sorted(p.name for p in tmp_path.rglob("*")), losses(tmp_path)) == before


def test_collapse_is_reported(play, tmp_path):
    """Without balancing and with a wild learning rate one layer's tokens end on one expert."""
    out = succeeded(
        train(
            out_dir=tmp_path,
            dataset=play,
            max_iters=40,
            learning_rate=0.3,
            min_lr=0.3,
            grad_clip=0.0,
            n_layer=1,
            use_moe=True,
            num_experts=8,
            top_k=1,
            expert_load_balance_loss_coef=0.0,
        )
    )
    assert "warning: routing has collapsed in MoE layers [0]" in out


def test_sample_is_reproducible_and_reads_prompts(play, tmp_path):
    succeeded(train(out_dir=tmp_path, dataset=play, **MOE))
    (tmp_path / "prompt.txt").write_text("MACBETH:\nIs this")
    kw = {"out_dir": tmp_path, "num_samples": 2, "max_new_tokens": 40}
    prompt = f"FILE:{tmp_path / 'prompt.txt'}"
    a, b, c = (
        succeeded(run_script("sample.py", **kw, seed=seed, start=prompt)) for seed in (1, 1, 2)
    )
    assert a == b != c and a.count("MACBETH:\nIs this") == 2
    assert succeeded(run_script("sample.py", **kw, temperature=0, start="ROSS")).count("ROSS") == 2
    assert (
        succeeded(
            run_script(
                "sample.py", **kw | {"out_dir": checkpoint.locate(tmp_path)}, seed=1, start=prompt
            )
        )
        == a
    )


def test_runs_from_any_folder(play, tmp_path):
    done = run_script(
        "train.py",
        "config/train_plays_char_moe.py",
        cwd=tmp_path,
        dataset=play,
        out_dir="here",
        **{k: v for k, v in SMALL.items() if k != "n_head"} | {"n_embd": 64},
    )
    assert "step 2/2 | validation loss" in succeeded(done)
    assert checkpoint.locate(tmp_path / "here").name == "step-00000002"


def test_heavy_imports_are_late(play, tmp_path):
    """wandb, datasets and their like are not imported by a run that does not use them."""
    code = (
        "import sys, runpy; sys.argv = ['train.py', *sys.argv[1:]]; runpy.run_path('train.py', run_name='__main__'); "
        "print([m for m in ('wandb', 'datasets', 'tiktoken', 'matplotlib', 'transformers', 'pandas') if m in sys.modules])"
    )
    arguments = [f"--{k}={v}" for k, v in (SMALL | {"out_dir": tmp_path, "dataset": play}).items()]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert succeeded(done).splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "text, omp, threads",
    [
        ("150000 100000", None, 2),
        ("50000 100000", None, 1),
        ("max 100000", None, 4),
        ("50000 100000", "4", 4),
        ("9900000 100000", None, 4),
        (None, None, 4),
    ],
)
def test_threads_within_a_containers_limit(text, omp, threads, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    if text:
        (tmp_path / "cpu.max").write_text(text)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        limit_threads(tmp_path / "cpu.max")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_wandb_offline(play, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    succeeded(train(out_dir=tmp_path, dataset=play, wandb_log=True))
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_wandb_without_login_is_one_line(play, tmp_path, monkeypatch):
    for key in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    start = time.monotonic()
    done = train(out_dir=tmp_path, dataset=play, wandb_log=True)
    assert (
        done.returncode == 2 and "error: wandb_log is on, but there is no login" in done.stderr
    ), done.stderr
    assert time.monotonic() - start < 60  # and no prompt that waits
