"""train.py as a user runs it: every config, console and log, what a run must not depend on."""

import json
import math

import numpy as np
import pytest
import torch

import train as train_module
from configurator import read_settings
from nanomoe import checkpoint
from nanomoe.load import load
from nanomoe.optim import build_optimizer
from tests.helpers import (
    MOE,
    ROOT,
    SMALL,
    full,
    log,
    losses,
    needs_gpt2_tokenizer,
    run_script,
    small_model,
    succeeded,
    tokens,
    train,
    weights,
)

CONFIGS = sorted(path.name for path in (ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_trains_two_steps_and_samples(config, play, play_gpt2, gpt2_hub, tmp_path):
    path = ROOT / "config" / config
    text = path.read_text()
    assert text.startswith('"""') and "Parameters:" in text and "To expect:" in text
    settings, _ = read_settings(dict(vars(train_module)), [str(path)])
    # shrunk by flags alone; heads and everything else stay the config's
    shrink = {"batch_size": 2, "gradient_accumulation_steps": 2, "out_dir": tmp_path}
    for name in [
        "block_size",
        "max_iters",
        "warmup_iters",
        "eval_iters",
        "eval_interval",
        "log_interval",
    ]:
        shrink[name] = SMALL[name]
    if not settings["init_from"].startswith("gpt2") and not settings["upcycle_from"]:
        shrink |= {"n_layer": 2, "n_embd": 96 if settings["n_head"] == 12 else 48}
    if settings["num_experts"] > 10:
        shrink |= {"num_experts": 10, "top_k": min(7, settings["top_k"])}
    gpt2 = settings["dataset"] in ("openwebtext", "shakespeare")
    shrink |= {"sample_tokens": 0 if gpt2 else 8, "dataset": play_gpt2 if gpt2 else play}
    out = succeeded(run_script("train.py", path, **shrink, device="cpu", env=gpt2_hub))
    if settings["eval_only"]:
        assert "step 0/2 | validation loss 10." in out and not list(tmp_path.iterdir())
        return
    assert "step 2/2 | loss" in out and "validation loss" in out
    model = load(tmp_path).build_model()
    assert model.config.n_layer == 2 and settings["use_moe"] == hasattr(model.config, "top_k")
    if gpt2:  # GPT-2's tokenizer would be fetched from the network
        assert model.generate(tokens(1, 4), 4, vocab_size=50257).shape == (1, 8)
        return
    assert "more: python sample.py" in out
    sampled = run_script("sample.py", out_dir=tmp_path, num_samples=2, max_new_tokens=20)
    assert sampled.stdout.count("-" * 15) == 2


def test_gpt2_by_name(play, play_gpt2, gpt2_hub, tmp_path):
    """A hub name is fine-tuned with fewer positions; a dataset of other tokens is refused."""
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
    c = load(tmp_path / "run").config
    assert (c.mlp, c.bias, c.n_embd, c.n_head, c.vocab_size) == ("gelu_tanh", True, 96, 12, 50257)
    assert (c.block_size, c.dropout) == (64, 0.1)
    out = succeeded(
        run_script("train.py", dataset=play_gpt2, **run | {"init_from": "resume", "max_iters": 3})
    )
    assert "after step 2" in out and "step 3/3" in out
    for settings, words in (
        ({"dataset": play}, "uses another tokenizer than"),
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
    needs_gpt2_tokenizer()
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
    val_losses = {e["step"]: e["val_loss"] for e in entries if "val_loss" in e}
    kept = {4, 5, min(val_losses, key=val_losses.get)}  # the newest two and the best
    assert {checkpoint.step_of(path) for path in checkpoint.list_steps(tmp_path)} == kept


def test_validation_loss_is_the_models(play, tmp_path):
    """The logged loss is the saved weights' pure cross-entropy on the fixed windows."""
    from nanomoe.dataset import Dataset

    succeeded(train(out_dir=tmp_path, dataset=play, eval_iters=3, **MOE))
    model, data = load(tmp_path).build_model().eval(), Dataset(play, 32)
    x, y = (torch.from_numpy(a) for a in data.read_windows("val", data.val_offsets(12)))
    with torch.no_grad():
        assert abs(model(x, y)[1].item() - losses(tmp_path)[2]["val_loss"]) < 1e-5


def test_the_enwik8_pair_has_the_same_wall_clock(tmp_path):
    """config/train_enwik8.py and its MoE twin, shrunk by flags alone, on the bytes of a text.

    Both run for the same time, to the end of their learning rate schedule. The log has the loss
    in nats and in bits per byte, which for bytes is nats / ln 2.
    """
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
        "max_seconds": 1,
        "device": "cpu",
        "sample_tokens": 0,
        "eval_interval": 10,
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
            1 <= evaluations[-1]["seconds"] < 20
            and [e["lr"] for e in entries if "lr" in e][-1] < 1e-4
        )


@pytest.mark.parametrize("settings", [{"n_embd": 64}, MOE | {"n_embd": 64}], ids=["dense", "moe"])
def test_overfits_one_batch(settings):
    model = small_model(**settings)
    optimizer = build_optimizer(model, "adamw", 3e-3, 0.0, (0.9, 0.95), "cpu")
    idx = tokens(4, 17)
    for _ in range(300):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.stats["cross_entropy"] < 0.1


@pytest.mark.parametrize(
    "settings", [full({}, id="dense"), pytest.param(MOE | {"dropout": 0.2}, id="moe")]
)
def test_two_ranks_equal_one_process(settings, play, tmp_path):
    """The same global batch, with dropout, MoE and accumulation: same losses, same weights."""
    common = (
        SMALL
        | settings
        | {"gradient_accumulation_steps": 4, "max_iters": 4, "eval_interval": 2, "dataset": play}
    )
    succeeded(train(out_dir=tmp_path / "one", **common))
    out = succeeded(train(out_dir=tmp_path / "two", ranks=2, **common))
    assert out.count("step 4/4 | loss") == 1  # only rank 0 prints
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 4
    for step in one:
        for key in ("loss", "val_loss", "balance_loss"):
            if key in one[step]:
                assert two[step][key] == pytest.approx(one[step][key], abs=2e-5), (step, key)
    a, b = (weights(checkpoint.latest_good(tmp_path / name)) for name in ("one", "two"))
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


def test_eval_only(play, tmp_path):
    succeeded(train(out_dir=tmp_path, dataset=play))
    before = sorted(p.name for p in tmp_path.rglob("*")), losses(tmp_path)
    out = succeeded(train(out_dir=tmp_path, dataset=play, init_from="resume", eval_only=True))
    assert f"validation loss {before[1][2]['val_loss']:.4f}" in out and "a sample" not in out
    assert (sorted(p.name for p in tmp_path.rglob("*")), losses(tmp_path)) == before


def test_collapse_is_reported(play, tmp_path):
    """Without balancing and with a huge learning rate, a layer's tokens end on one expert."""
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
