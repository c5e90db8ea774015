"""Fixtures that several test files use, pytest's extra options, and the tests' environment."""

import functools
import json
import os

import pytest
import torch
from common import BYTE_META, GPT2_META, char_meta
from hypothesis import settings
from safetensors.torch import save_file
from writing import write_dataset, write_texts

from nanomoe.hf import classes
from tests.helpers import MACBETH, MOE, SHARED, TEXTS, small_model, succeeded, train
from tests.preparing import copy_scripts

if (SHARED / "tiktoken").exists():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken")

# Hypothesis draws the same examples in every run, so that a failure can be repeated.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# The tests run side by side, and are too small to gain from more threads than one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the long tests too")
    parser.addoption("--times", type=int, help="how often each repeated test is run")


def pytest_collection_modifyitems(config, items):
    """Leave out the tests that are marked full, unless --full is given."""
    if config.getoption("--full"):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
    items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_generate_tests(metafunc):
    """A test with the marker repeat(N) runs N times, or --times, with seed=0, seed=1, ..."""
    marker = metafunc.definition.get_closest_marker("repeat")
    if marker:
        times = metafunc.config.getoption("--times") or marker.args[0]
        metafunc.parametrize("seed", range(times))


@pytest.fixture(scope="session")
def play(tmp_path_factory):
    """Macbeth as characters."""
    folder = tmp_path_factory.mktemp("data") / "play"
    write_texts(folder, char_meta(MACBETH), TEXTS, "tests")
    return folder


def write_bytes(folder, meta):
    """Macbeth as a dataset whose token ids are the text's bytes."""
    write_dataset(folder, meta, ((k, list(t.encode()), len(t)) for k, t in TEXTS.items()), "tests")
    return folder


@pytest.fixture(scope="session")
def play_bytes(tmp_path_factory):
    """Macbeth as bytes."""
    return write_bytes(tmp_path_factory.mktemp("data") / "play_bytes", BYTE_META)


@pytest.fixture(scope="session")
def play_gpt2(tmp_path_factory):
    """Macbeth as a dataset of GPT-2 tokens. Each byte is one id, so no tokenizer is fetched."""
    return write_bytes(tmp_path_factory.mktemp("data") / "play_gpt2", GPT2_META)


@pytest.fixture(scope="session")
def dense_run(play, tmp_path_factory):
    """A dense run of 30 steps with one checkpoint. To read only: other tests use it, too."""
    out_dir = tmp_path_factory.mktemp("run") / "dense"
    run = {"max_iters": 30, "learning_rate": 1e-2, "bias": True, "dropout": 0.1}
    succeeded(train(dataset=play, out_dir=out_dir, **run))
    return out_dir


@pytest.fixture(scope="session")
def moe_run(play, tmp_path_factory):
    """A run of 60 steps with one checkpoint: four layers, MoE in 1 and 3. To read only."""
    out_dir = tmp_path_factory.mktemp("run") / "moe"
    run = {"max_iters": 60, "learning_rate": 3e-3, "warmup_iters": 10, "bias": True}
    run |= MOE | {"n_layer": 4, "moe_stride": 2, "expert_load_balance_loss_coef": 0.1}
    succeeded(train(dataset=play, out_dir=out_dir, **run))
    return out_dir


@pytest.fixture(scope="session")
def gpt2_hub(tmp_path_factory):
    """Environment variables with which GPT-2's hub names are found without a network.

    They point to a hub cache that holds a small model under each of the four names."""
    cache = tmp_path_factory.mktemp("hub")
    model = small_model(
        vocab_size=50257, n_embd=48, n_head=12, block_size=1024, bias=True, mlp="gelu_tanh"
    )
    family = classes.matching_class(model.config)
    config = classes.hf_config(model.config, family)
    del config["nanomoe"]  # as in a model that is not ours
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        repository = cache / f"models--openai-community--{name}"
        folder = repository / "snapshots" / "0123"
        folder.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123")
        (folder / "config.json").write_text(json.dumps(config))
        weights = classes.export_weights(model.config, family, model.state_dict())
        save_file(
            {key.removeprefix("transformer."): p for key, p in weights.items()},
            folder / "model.safetensors",
        )
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """The CPU, and a GPU if there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device(request.param)


@pytest.fixture
def copy_of(tmp_path):
    """A function that copies a prepare script and returns the copy's folder, data/NAME."""
    return functools.partial(copy_scripts, tmp_path)
