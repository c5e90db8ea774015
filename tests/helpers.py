"""What the test files share, apart from fixtures.

Paths, small settings, functions that run the scripts as a user does and read what they leave.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_model import build_config, build_model
from nanomoe import checkpoint
from nanomoe.optim import build_optimizer
from nanomoe.run_dir import Saver
from nanomoe.tokenizer import Tokenizer
from tests import warm

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
MACBETH = (ROOT / "tests" / "macbeth.txt").read_text()
TEXTS = {"train": MACBETH[:80_000], "val": MACBETH[80_000:]}
# Flags for a run that takes a second. They override the sizes of a config file.
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
    "load_interval": 1,
    "sample_tokens": 8,
    "device": "cpu",
    "compile": False,
    "dtype": "float32",
}
MOE = {"use_moe": True, "num_experts": 4, "top_k": 2}
MODERN = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "qk_norm": True}


def full(*values, **options):
    """A parametrisation that takes long, so that only `pytest --full` runs it."""
    return pytest.param(*values, marks=pytest.mark.full, **options)


def needs_gpt2_tokenizer():
    """Skip a test where tiktoken's GPT-2 tokenizer is neither at hand nor can be fetched."""
    try:
        Tokenizer({"tokenizer": "gpt2", "vocab_size": 50257})
    except OSError as error:
        pytest.skip(str(error))


def flags(**settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def python(processes=1, torchrun=()):
    """The command that runs a script: python, or torchrun with these options."""
    command = [sys.executable]
    if processes > 1 or torchrun:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *torchrun]
        command += [] if "--nnodes=2" in torchrun else ["--standalone"]
    return command


def run_script(script, *args, processes=1, ranks=1, timeout=240, cwd=ROOT, env=(), **settings):
    """`python script args --key=value ...`. Returns a CompletedProcess. ranks: that many processes,
    as srun starts them, which is fast; processes: by torchrun, where that matters."""
    command = [str(ROOT / script), *map(str, args), *flags(**settings)]
    env = os.environ | dict(env)
    if processes == 1:
        return warm.run(command, cwd, env, timeout, ranks)
    command = python(processes) + command
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, cwd=cwd, env=env
    )


def run_module(module, *args, timeout=240, **settings):
    """`python -m module args --key=value ...` in the root folder. Returns a CompletedProcess."""
    command = ["-m", module, *map(str, args), *flags(**settings)]
    return warm.run(command, ROOT, dict(os.environ), timeout)


def train(*args, script="train.py", **settings):
    """train.py, or an altered_train(), with SMALL sizes. Options as of run_script()."""
    return run_script(script, *args, **(SMALL | settings))


def start_train(
    *args, script="train.py", processes=1, torchrun=(), preexec=None, env=(), **settings
):
    """train() in the background, its output on a pipe; preexec() runs in its process first.
    torchrun: more options for it."""
    command = [str(ROOT / script), *args, *flags(**SMALL | settings)]
    env = os.environ | dict(env)
    if processes == 1 and not torchrun and not preexec:
        return warm.Started(command, ROOT, env)

    def prepare():  # whatever the shell that runs the tests ignores
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        if preexec:
            preexec()

    return subprocess.Popen(
        [*python(processes, torchrun), *command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=env,
        preexec_fn=prepare,
    )


def read_until(process, words):
    """A process's output up to the first line with these words, or to its end."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            break
    return "".join(lines)


def killed_at(words, **settings):
    """Start train() and kill -9 it at the first line with these words. Returns its output."""
    process = start_train(**settings)
    out = read_until(process, words)
    process.kill()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, out + rest
    return out


def children(pid):
    """The ids of the processes that a process has started."""
    done = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in done.stdout.split()]


def succeeded(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def one_line(done, code, *words):
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, (word, done.stderr)
    return done


def log(out_dir):
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def losses(out_dir):
    """{step: what the log says about it, without wall-clock times}."""
    found = {}
    for entry in log(out_dir):
        if "step" in entry:
            found.setdefault(entry["step"], {}).update(entry)
    times = ("ms", "tokens_per_s", "mfu", "seconds")
    return {step: {k: v for k, v in e.items() if k not in times} for step, e in found.items()}


def weights(path):
    return load_file(path / "model.safetensors")


def fit_manifest(path):
    """Make the manifest of a changed checkpoint fit its files, and its evaluation the manifest."""
    names = json.loads((path / "manifest.json").read_text())
    entries = {}
    for name in names:
        content = (path / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        entries[name] = {"sha256": digest, "bytes": len(content)}
    (path / "manifest.json").write_text(json.dumps(entries))
    if (path / "evaluation.json").exists():
        losses = json.loads((path / "evaluation.json").read_text())
        checkpoint.add_evaluation(path, losses["val_loss"], losses["best_val_loss"])


def assert_same_run(out_dir, undisturbed):
    """Two runs ended with the same losses and weights, to the last bit."""
    assert losses(out_dir) == losses(undisturbed), f"{out_dir} has another loss curve"
    a, b = (weights(checkpoint.latest_good(path)) for path in (out_dir, undisturbed))
    assert a.keys() == b.keys(), f"{out_dir} has other tensors"
    assert all(a[name].equal(b[name]) for name in a), f"{out_dir} has other weights"


def small_model(**settings):
    """A model in train mode with reproducible weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return build_model(build_config(sizes | settings))


def tokens(*shape, vocab_size=50, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def stepped(**settings):
    """A model and its optimizer, after two steps."""
    model = small_model(**settings)
    optimizer = build_optimizer(model, "adamw", 1e-2, 0.1, (0.9, 0.95), "cpu")
    for i in range(2):
        model(tokens(2, 16, seed=i), tokens(2, 16, seed=i))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def saver_for(out_dir, model, optimizer, keep_last=0, background=False, **facts):
    """A Saver of a state whose facts can be changed: saver.now["step"] = 5."""
    now = {"run": {}, "step": 0, "sequences": 0, "seconds": 0.0, "best_val_loss": None}
    now |= {"before_decay": False, "device": "cpu", "dtype": "float32"} | facts
    state = {"optimizer": optimizer, "scaler": torch.amp.GradScaler("cpu", enabled=False)}
    saver = Saver(out_dir, keep_last, background, model, state, lambda: dict(now))
    saver.now = now
    return saver


def save_step(saver, step, val_loss=None):
    """Save the state as that of a step."""
    with saver.changing():
        saver.now["step"] = step
    saver.save(val_loss)


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def nanogpt_file(path, model, optimizer):
    """What nanoGPT's train.py saves after compiling its model."""
    c = model.config
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    weights = {f"_orig_mod.{name}": p for name, p in model.state_dict().items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    torch.save(
        {
            "model": weights,
            "optimizer": optimizer.state_dict(),
            "model_args": {name: getattr(c, name) for name in names},
            "iter_num": 2,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "shakespeare_char", "batch_size": 12},
        },
        path,
    )


ALTERED_TRAIN = """
import os, sys
sys.path.insert(0, {root!r})
import train
from nanomoe import checkpoint, device, distributed, load, run_dir
rank = int(os.environ.get("RANK", 0))
again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
{change}
if __name__ == "__main__":
    train.run_main(train.main)
"""
# With this, train.py saves in the background on a CPU too.
BACKGROUND = """
saver = train.Saver
train.Saver = lambda out_dir, keep, background, *a, **facts: saver(out_dir, keep, True, *a, **facts)
"""


def altered_train(path, change):
    """Write a script that makes a change and then runs train.py. Returns its path.

    change: lines of Python that see `train`, `rank` and, under torchrun, `again`, the number of
    restarts."""
    path.write_text(ALTERED_TRAIN.format(root=str(ROOT), change=change))
    return path


class Bomb:
    """Calls function(argument) when it is unpickled."""

    def __init__(self, function=print, argument="a pickle was executed"):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call
