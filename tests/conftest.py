"""What the tests share: small prepared datasets from one real play, and running the scripts as a user does."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
if (SHARED / "tiktoken").exists():
    os.environ["TIKTOKEN_CACHE_DIR"] = str(SHARED / "tiktoken")
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

from common import char_meta, write_dataset, write_texts  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from moe_model import build_config, build_model  # noqa: E402
from nanomoe import hf_classes  # noqa: E402

MACBETH = (ROOT / "tests" / "macbeth.txt").read_text()
TEXTS = {"train": MACBETH[:80_000], "val": MACBETH[80_000:]}
# a model and a run that take seconds; a config's own sizes are overridden by these
SMALL = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "block_size": 32,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_iters": 2,
    "warmup_iters": 1,
    "eval_iters": 2,
    "eval_interval": 100,
    "log_interval": 1,
    "sample_tokens": 8,
    "device": "cpu",
    "compile": False,
    "dtype": "float32",
}

torch.set_num_threads(
    1
)  # the tests are too small to gain from more, and share the machine; nor are their processes
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def play(tmp_path_factory):
    """Macbeth as characters."""
    folder = tmp_path_factory.mktemp("data") / "play"
    write_texts(folder, char_meta(MACBETH), TEXTS, "tests")
    return folder


@pytest.fixture(scope="session")
def play_gpt2(tmp_path_factory):
    """Macbeth's bytes as the ids of a dataset in GPT-2 tokens: every byte is one, so no tokenizer has to be fetched."""
    folder = tmp_path_factory.mktemp("data") / "play_gpt2"
    pieces = ((split, list(text.encode()), len(text)) for split, text in TEXTS.items())
    write_dataset(folder, {"tokenizer": "gpt2", "vocab_size": 50257}, pieces, "tests")
    return folder


@pytest.fixture(scope="session")
def gpt2_hub(tmp_path_factory):
    """What has to be in the environment for hub names of GPT-2 to be found without a network: a cache of the hub's that has a
    small model under all four."""
    cache = tmp_path_factory.mktemp("hub")
    model = small_model(
        vocab_size=50257, n_embd=96, n_head=12, block_size=1024, bias=True, mlp="gelu_tanh"
    )
    family = hf_classes.matching_class(model.config)
    config = hf_classes.hf_config(model.config, family)
    del config["nanomoe"]  # it is not one of ours
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        repository = cache / f"models--openai-community--{name}"
        folder = repository / "snapshots" / "0123"
        folder.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123")
        (folder / "config.json").write_text(json.dumps(config))
        weights = hf_classes.export_weights(model.config, family, model.state_dict())
        save_file(
            {key.removeprefix("transformer."): p for key, p in weights.items()},
            folder / "model.safetensors",
        )
    return {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def flags(**settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def run_script(script, *args, processes=1, timeout=240, cwd=ROOT, env=(), **settings):
    """`python script args --key=value ...`, or under torchrun; a CompletedProcess with text output."""
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
    else:
        command = [sys.executable]
    return subprocess.run(
        [*command, str(ROOT / script), *args, *flags(**settings)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=os.environ | dict(env),
    )


def train(*args, processes=1, **settings):
    """train.py with SMALL sizes."""
    return run_script("train.py", *args, processes=processes, **(SMALL | settings))


def start_train(*args, preexec=lambda: None, **settings):
    """train.py in the background, its output on a pipe; preexec() runs in its process first."""

    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        preexec()

    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args, *flags(**(SMALL | settings))],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        preexec_fn=prepare,
    )


def small_model(**settings):
    """A model in train mode with reproducible weights."""
    torch.manual_seed(0)
    return build_model(
        build_config(
            {"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32} | settings
        )
    )


def tokens(*shape, vocab_size=50, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
