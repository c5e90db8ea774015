"""train.py as a user runs it: every config, console and log, what a run must not depend on."""

import math
import re
import shutil

import pytest
import torch

import train as train_module
from configurator import read_settings
from nanomoe import checkpoint
from nanomoe.dataset import Dataset
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
    one_line,
    run_script,
    small_model,
    succeeded,
    tokens,
    train,
)

CONFIGS = sorted(path.name for path in (ROOT / "config").glob("*.py"))


def settings_of(config):
    return read_settings(dict(vars(train_module)), [str(ROOT / "config" / config)])[0]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_trains_two_steps_and_samples(
    config, play, play_bytes, play_gpt2, gpt2_hub, tmp_path
):
    text = (ROOT / "config" / config).read_text()
    assert text.startswith('"""') and "Parameters:" in text and "To expect:" in text
    settings = settings_of(config)
    # shrunk by flags alone; heads and everything else stay the config's
    same = ("block_size", "max_iters", "warmup_iters", "eval_iters", "eval_interval")
    shrink = {name: SMALL[name] for name in (*same, "log_interval", "device")}
    shrink |= {"batch_size": 2, "gradient_accumulation_steps": 2, "out_dir": tmp_path}
    if not settings["init_from"].startswith("gpt2") and not settings["upcycle_from"]:
        shrink |= {"n_layer": 2, "n_embd": 48}
    if settings["num_experts"] > 10:
        shrink |= {"num_experts": 10, "top_k": min(7, settings["top_k"])}
    gpt2 = settings["dataset"] in ("openwebtext", "shakespeare")
    shrink["dataset"] = play_gpt2 if gpt2 else play
    if settings["dataset"] == "enwik8":
        shrink["dataset"] = play_bytes
    shrink["sample_tokens"] = 0 if gpt2 else 8
    out = succeeded(run_script("train.py", f"config/{config}", **shrink, env=gpt2_hub))
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


def test_the_enwik8_pair_differs_in_its_experts_alone():
    """So both train for the same time."""
    dense, moe = settings_of("train_enwik8.py"), settings_of("train_enwik8_moe.py")
    experts = {"use_moe", "num_experts", "top_k", "expert_dim", "expert_load_balance_loss_coef"}
    differ = {key for key in dense if dense[key] != moe[key]}
    assert differ == experts | {"out_dir", "wandb_run_name"} and dense["max_seconds"] == 240


def test_gpt2_by_name(play, play_gpt2, gpt2_hub, tmp_path):
    """A hub name is fine-tuned with fewer positions; a dataset of other tokens is refused."""
    run = {"init_from": "gpt2-medium", "dataset": play_gpt2, "out_dir": tmp_path / "run"}
    run |= {"batch_size": 2, "gradient_accumulation_steps": 1, "max_iters": 2, "warmup_iters": 1}
    run |= {"eval_iters": 2, "sample_tokens": 0, "device": "cpu", "env": gpt2_hub}
    out = succeeded(run_script("train.py", **run, block_size=64, dropout=0.1))
    assert "starting with the weights of" in out and "sequences x 64 tokens" in out
    assert "step 1/2 | loss 10." in out
    c = load(tmp_path / "run").config
    assert (c.mlp, c.bias, c.n_embd, c.n_head, c.vocab_size) == ("gelu_tanh", True, 48, 12, 50257)
    assert (c.block_size, c.dropout) == (64, 0.1)
    out = succeeded(run_script("train.py", **run | {"init_from": "resume", "max_iters": 3}))
    assert "after step 2" in out and "step 3/3" in out
    for settings, words in (
        ({"dataset": play}, "uses another tokenizer than"),
        ({"n_layer": 12}, "n_layer = 12 contradicts"),
        ({"block_size": 2048}, "block_size is 2048"),
        ({"use_moe": True}, "to make a MoE of it, use --init_from=upcycle"),
    ):
        done = run_script("train.py", **run | {"out_dir": tmp_path / "no"} | settings)
        one_line(done, 2, words)
    assert not (tmp_path / "no").exists()


def test_gpt2_dataset_samples(play_gpt2, tmp_path):
    needs_gpt2_tokenizer()
    out = succeeded(train(out_dir=tmp_path, dataset=play_gpt2, **MOE))
    assert "a sample:" in out and "no sample" not in out
    sampling = {"start": "Macbeth<|endoftext|>", "num_samples": 1, "max_new_tokens": 9}
    done = run_script("sample.py", out_dir=tmp_path, **sampling)
    assert succeeded(done).startswith("Macbeth<|endoftext|>")


@pytest.fixture(scope="module")
def five_steps(play, tmp_path_factory):
    """The folder and the output of a MoE's run of five steps. To read only."""
    out_dir = tmp_path_factory.mktemp("train") / "run"
    run = {"dataset": play, "max_iters": 5, "eval_interval": 2, "eval_iters": 3}
    return out_dir, succeeded(train(out_dir=out_dir, **run, **MOE))


def test_console_and_log(five_steps):
    out_dir, out = five_steps
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
        "a sample:",
        f"more: python sample.py --out_dir={out_dir}",
    ):
        assert words in out, words
    assert "mfu" not in out  # no peak is known for a CPU
    evaluated = re.findall(r"step (\d)/5 \| validation loss [\d.]+ \| [\d.]+ bits per byte", out)
    assert evaluated == ["2", "4", "5"]
    start, *entries = log(out_dir)
    assert start["settings"]["num_experts"] == 4 and start["active_params"] < start["params"]
    steps = [e for e in entries if "loss" in e]
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5]
    assert steps[0]["mfu"] is None and steps[0]["dead_experts"] == 0
    assert abs(steps[0]["loss"] - math.log(64)) < 0.3
    evaluations = [e for e in entries if "val_loss" in e]
    assert [e["step"] for e in evaluations] == [2, 4, 5]
    for e in evaluations:  # each character is a byte
        assert e["val_bits_per_byte"] == pytest.approx(e["val_loss"] / math.log(2), rel=1e-3)
    best = min(evaluations, key=lambda e: e["val_loss"])["step"]
    kept = {checkpoint.step_of(path) for path in checkpoint.list_steps(out_dir)}
    assert kept == {4, 5, best}  # the newest two and the best


def test_validation_loss_is_the_models(five_steps, play):
    """The logged loss is the saved weights' pure cross-entropy on the fixed windows."""
    out_dir, _ = five_steps
    model, data = load(out_dir).build_model().eval(), Dataset(play, 32)
    x, y = (torch.from_numpy(a) for a in data.read_windows("val", data.val_offsets(12)))
    with torch.no_grad():
        assert abs(model(x, y)[1].item() - losses(out_dir)[5]["val_loss"]) < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluating_leaves_a_run_alone(ranks, five_steps, play, tmp_path):
    """Also a run that is inside a save at that moment."""
    out_dir = shutil.copytree(five_steps[0], tmp_path / "run")
    (out_dir / "step-00000006.tmp-1").mkdir()
    before = sorted(out_dir.rglob("*")), losses(out_dir)
    run = {"dataset": play, "out_dir": out_dir, "init_from": "resume", "eval_iters": 3}
    run |= {"ranks": ranks, "parallel": "fsdp" if ranks > 1 else "ddp"}
    out = succeeded(train(**run, eval_only=True))
    found = float(out.split("validation loss ")[1].split()[0])
    assert abs(found - before[1][5]["val_loss"]) < 1e-4 and "a sample" not in out
    assert (sorted(out_dir.rglob("*")), losses(out_dir)) == before


@pytest.mark.parametrize("settings", [{"n_embd": 64}, MOE | {"n_embd": 64}], ids=["dense", "moe"])
def test_overfits_one_batch(settings):
    model = small_model(**settings)
    optimizer = build_optimizer(model, "adamw", 1e-2, 0.0, (0.9, 0.95), "cpu")
    idx = tokens(4, 17)
    for _ in range(80):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.stats["cross_entropy"] < 0.1


@pytest.mark.parametrize("moe", [full({}, id="dense"), pytest.param(MOE, id="moe")])
def test_ranks_and_evaluations_change_nothing(moe, play, tmp_path):
    """The same global batch, with dropout and accumulation: two ranks get one's losses and weights,
    to rounding, and a run with fewer evaluations gets them to the bit."""
    run = moe | {"dataset": play, "dropout": 0.2, "gradient_accumulation_steps": 4, "max_iters": 4}
    found = {}
    for name, more in (("one", {}), ("two", {"ranks": 2}), ("rarely", {"eval_interval": 100})):
        out = succeeded(train(out_dir=tmp_path / name, **run | {"eval_interval": 2} | more))
        assert out.count("step 4/4 | loss") == 1  # only rank 0 prints
        found[name] = losses(tmp_path / name), load(tmp_path / name).weights
    (one, weights), (two, theirs), (rarely, same) = found.values()
    assert one.keys() == two.keys() and len(one) == 4
    for step in one:
        assert rarely[step]["loss"] == one[step]["loss"]
        for key in one[step].keys() & {"loss", "val_loss", "balance_loss"}:
            assert two[step][key] == pytest.approx(one[step][key], abs=2e-5), (step, key)
    for name in weights:
        assert weights[name].equal(same[name])
        torch.testing.assert_close(weights[name], theirs[name], atol=2e-5, rtol=1e-4)


def test_collapse_is_reported(play, tmp_path):
    """Without balancing and with a huge learning rate, a layer's tokens end on one expert."""
    run = {"use_moe": True, "num_experts": 8, "top_k": 1, "expert_load_balance_loss_coef": 0.0}
    run |= {"learning_rate": 0.3, "min_lr": 0.3, "grad_clip": 0.0, "n_layer": 1, "max_iters": 40}
    out = succeeded(train(out_dir=tmp_path, dataset=play, **run))
    assert "warning: routing has collapsed in MoE layers [0]" in out
