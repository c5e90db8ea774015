"""Settings that a run makes meaningless get one line before the first step."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import sample
import train
from configurator import configure
from nanomoe.no_effect import (
    SAMPLE_RULES,
    lines_by_reason,
    settings_out_of_reach,
    settings_without_effect,
)
from tests.helpers import MOE, ROOT, succeeded
from tests.helpers import train as run_train

CONFIGS = sorted((ROOT / "config").glob("*.py"))


def notes(*args, tokens_in_val=10**7, windows=10**5, done=(0, 0.0), world_size=1):
    settings, given = configure(dict(vars(train)), list(args))
    data = SimpleNamespace(val=range(tokens_in_val), windows_per_epoch=windows)
    found = settings_without_effect(settings, given, world_size)
    return found + settings_out_of_reach(settings, given, data, *done)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_our_configs_have_none(path):
    assert notes(str(path)) == [] and notes() == []


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if "moe" in p.stem], ids=lambda path: path.stem
)
def test_nor_have_their_dense_twins(path):
    assert [line for line in notes(str(path), "--use_moe=False") if "no effect" in line] == []


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_experts=16"], "num_experts has no effect: use_moe is False"),
        (["--top_k=2", "--router_jitter=0.1"], "top_k, router_jitter have no effect: use_moe"),
        (["--decay_lr=False", "--min_lr=0", "--warmup_iters=9"], "warmup_iters, min_lr have no"),
        (["--decay_share=0.5"], "decay_share has no effect: lr_schedule"),
        (["--lr_schedule=wsd", "--decay_share=0", "--min_lr=0"], "min_lr has no effect: decay_sh"),
        (["--max_seconds=60", "--lr_decay_iters=9"], "lr_decay_iters has no effect: the rate"),
        (["--use_moe", "--expert_load_balance_loss_coef=0", "--balance_scope=micro"], "balance_sc"),
        (["--use_moe", "--norm_top_k=False"], "norm_top_k has no effect: top_k is 1"),
        (["--use_moe", "--top_k=4", "--capacity_factor=1.0"], "capacity_factor has no effect"),
        (["--use_moe", "--expert_dim=8", "--mlp_dim=64"], "mlp_dim has no effect: no layer"),
        (["--wandb_project=mine"], "wandb_project has no effect: wandb_log is False"),
        (["--eval_only", "--sample_tokens=9"], "sample_tokens has no effect"),
        (["--eval_only", "--max_iters=9", "--wandb_log"], "wandb_log, max_iters have no effect"),
        (["--parallel=fsdp"], "parallel 'fsdp' has no effect: there is one process"),
        (["--max_iters=60"], "warmup_iters is 2000 of 60 steps: the learning rate never reaches"),
        (["--max_iters=60", "--max_seconds=9"], "warmup_iters is 2000 of 60 steps"),
        (["--lr_decay_iters=100"], "ends before the warm-up of 2000 steps"),
        (["--lr_schedule=wsd", "--lr_decay_iters=100"], "overlap: the learning rate never"),
        (
            ["--lr_schedule=wsd", "--decay_share=0.01", "--max_iters=60", "--warmup_iters=5"],
            "less than one step: the learning rate never falls",
        ),
        (["--lr_decay_iters=700000"], "the learning rate never reaches 6e-05"),
        (["--min_lr=1.0"], "min_lr (1.0) is above learning_rate (0.0006): it rises"),
        (["--max_iters=50", "--warmup_iters=1", "--spike_guard=6"], "spike_guard needs 64 steps"),
        (["--max_iters=9000", "--eval_interval=9001"], "it only evaluates at the end"),
        (["--max_iters=9000", "--log_interval=9001"], "it only logs two of them"),
        (["--max_iters=9000", "--lr_schedule=wsd", "--decay_share=0.9"], "overlap: the learning r"),
        (["--use_moe", "--top_k=2", "--capacity_factor=2.5"], "drops nothing: no expert can get m"),
    ],
    ids=str,
)
def test_one_line(flags, words):
    found = notes(*flags)
    assert len(found) == 1 and words in found[0], found


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--temperature=0", "--top_k=9", "--seed=3"], "top_k, seed have no effect: temperature"),
        (["--interactive", "--start=x"], "start has no effect: interactive"),
        (["--temperature=0.5", "--top_k=9", "--start=x", "--out_dir=x"], ""),
    ],
    ids=str,
)
def test_of_sample(flags, words):
    settings, given = configure(dict(vars(sample)), flags)
    found = lines_by_reason(SAMPLE_RULES, SimpleNamespace(**settings), given)
    assert len(found) == bool(words) and words in "".join(found), found


def test_what_depends_on_the_data_and_the_checkpoint():
    assert "takes them all" in notes("--eval_iters=900", tokens_in_val=1024 * 100)[0]
    assert "nothing to train" in notes("--max_iters=5000", done=(5000, 9.0))[0]
    assert "61 seconds are done: nothing" in notes("--max_seconds=60", done=(50, 61.2))[0]
    assert "a step trains on 480 sequences" in notes(windows=479)[0] and not notes(windows=480)
    assert notes("--parallel=fsdp", world_size=2) == []
    assert "its own GPU" in notes("--device=cuda:1", world_size=2)[0]
    assert notes("--device=cuda:1") == notes("--eval_only", "--sample_tokens=0") == []
    assert notes("--lr_schedule=wsd", "--decay_share=0", "--learning_rate=1e-5") == []


def test_a_file_with_experts_that_never_says_use_moe(tmp_path):
    path = Path(tmp_path / "config.py")
    path.write_text("num_experts = 16\ntop_k = 2\n")
    assert "num_experts, top_k have no effect: use_moe is False" in notes(str(path))[0]
    path.write_text("num_experts = 16\nwandb_project = 'mine'\nuse_moe = False\n")
    assert notes(str(path)) == []


def test_a_file_that_is_cut_short(tmp_path):
    path = Path(tmp_path / "config.py")
    path.write_text("decay_lr = False\nmax_iters = 5000\neval_interval = 500\n")
    assert notes(str(path)) == notes(str(path), "--max_iters=100") == []
    path.write_text("decay_lr = False\nmax_iters = 100\neval_interval = 500\n")
    assert "it only evaluates at the end" in notes(str(path))[0]


def test_before_the_first_step(play, tmp_path):
    out = succeeded(
        run_train(
            dataset=play, out_dir=tmp_path, warmup_iters=2, eval_interval=2, **MOE, norm_top_k=True
        )
    )
    lines = [line for line in out.splitlines() if line.startswith("note: ")]
    assert lines == ["note: warmup_iters is 2 of 2 steps: the learning rate never reaches 0.0006"]
    assert out.index("note: ") < out.index("step 1/2")
