"""
What tools/chaos.py throws at a run: pickles that execute something, config files with mistakes, a gradient that is NaN.
"""

import contextlib
import io
import os
import pickle
import zipfile

import torch

import train
from configurator import read_defaults
from nanomoe import checkpoint

# train.py with one gradient that is NaN on one rank in one step, the loss being a number
NAN_GRADIENT = """
import os, sys
sys.path.insert(0, {root!r})
import train
from model import GPT
calls, head = [], GPT.logits_and_loss

def poisoned(self, x, targets):
    if targets is not None and self.training:
        calls.append(1)
        if len(calls) == {step} and int(os.environ["RANK"]) == {rank}:
            x.register_hook(lambda grad: grad * float("nan"))
    return head(self, x, targets)
GPT.logits_and_loss = poisoned
if __name__ == "__main__":
    train.run_main(train.main)
"""

PICKLES = [
    "torch.save",
    "torch.save before 1.6",
    "protocol 0",
    "protocol 2",
    "protocol 4",
    "eval of a string",
    "getattr chain",
    "state of an optimizer",
    "weights",
    "numbers of a run",
]


class Bomb:
    """When it is unpickled, function(argument) is called."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


class Attribute:
    """When it is unpickled, os.system, by way of getattr and __import__."""

    def __call__(self):  # only what can be called may be pickled as a function
        raise NotImplementedError

    def __reduce__(self):
        return getattr, (Bomb(__import__, "os"), "system")


def read_carelessly(file):
    """Read a file as one should not: a pickle that does no harm even then would prove nothing."""
    try:
        torch.load(file, weights_only=False)
    except Exception:
        with contextlib.suppress(Exception):
            pickle.loads(file.read_bytes())


def plant(kind, out_dir, trace):
    """Put a pickle of that kind, which would make the file `trace`, in place of a run's checkpoint or of a part of it, whose
    manifest then fits. Returns it, the script that will read it, and that one's flags."""
    command = f"touch '{trace}'"
    bomb = Bomb(os.system, command)
    run = checkpoint.locate(out_dir)
    part = {
        "state of an optimizer": "training.pt",
        "weights": "model.safetensors",
        "numbers of a run": "config.json",
    }.get(kind)
    file = run / part if part else out_dir / "ckpt.pt"
    if kind in ("torch.save", "state of an optimizer"):
        torch.save({"model": {}, "optimizer": {"state": bomb}}, file)
    elif kind == "torch.save before 1.6":
        torch.save({"model": bomb}, file, _use_new_zipfile_serialization=False)
    elif kind == "protocol 0":
        file.write_bytes(f"cposix\nsystem\n(S{command!r}\ntR.".encode())
    elif kind == "eval of a string":
        file.write_bytes(
            pickle.dumps({"model_args": Bomb(eval, f"__import__('os').system({command!r})")})
        )
    elif kind == "getattr chain":  # in a zip file, as torch writes them
        content = io.BytesIO()
        torch.save({"model": {}}, content)
        with zipfile.ZipFile(content) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                new.writestr(
                    name,
                    pickle.dumps(Bomb(Attribute(), command))
                    if name.endswith("data.pkl")
                    else old.read(name),
                )
    else:
        file.write_bytes(
            pickle.dumps(bomb, protocol=int(kind[-1]) if kind.startswith("protocol") else 2)
        )
    if part:
        checkpoint.write_manifest(run)
        return file, "train.py", [f"--out_dir={out_dir}", "--init_from=resume", "--max_iters=4"]
    return file, "sample.py", [f"--out_dir={file}"]


def mutated_configs(root, rng, number, data):
    """So many config files with one mistake each, made from those in config/: [(text, [words that the error must have])]."""
    texts = [path.read_text() for path in sorted((root / "config").glob("*.py"))]
    keys = list(read_defaults((root / "train.py").read_text()))
    mutations = []
    while len(mutations) < number:
        # what runs on any machine, but for the mistake
        text = rng.choice(texts) + f"\ndataset = {str(data)!r}\nblock_size = 32\ndevice = 'cpu'\n"
        kind = ("typo", "type", "contradiction")[len(mutations) % 3]
        if kind == "typo":
            key = rng.choice([k for k in keys if len(k) > 4])
            typo = misspell(key, rng)
            if typo not in keys:
                mutations.append(
                    (
                        text + f"{typo} = {getattr(train, key)!r}\n",
                        [f"unknown key '{typo}'", f"'{key}'"],
                    )
                )
        elif kind == "type":
            key = rng.choice([k for k in keys if getattr(train, k) != "auto"])
            kind = type(getattr(train, key))
            wrong = rng.choice(
                [v for v in (None, [1], "some", 1.5, True, {"a": 1}, b"x") if type(v) is not kind]
            )
            mutations.append((text + f"{key} = {wrong!r}\n", [f"'{key}' is {wrong!r}", "expected"]))
        else:
            mutations.append(rng.choice([(text + lines, words) for lines, words in CONTRADICTIONS]))
    return mutations


def misspell(key, rng):
    i = rng.randrange(1, len(key) - 1)
    return rng.choice(
        [
            key[:i] + key[i + 1 :],
            key[:i] + key[i] * 2 + key[i + 1 :],
            key[:i] + key[i + 1] + key[i] + key[i + 2 :],
            key.replace("_", "") if "_" in key else key + "s",
            key.title(),
        ]
    )


CONTRADICTIONS = [
    ("use_moe = True\nnum_experts = 4\ntop_k = 5\n", ["top_k (5)", "num_experts (4)"]),
    ("n_head = 5\nn_embd = 64\n", ["n_embd (64)", "n_head (5)"]),
    ("n_head = 4\nn_embd = 64\nn_kv_head = 3\n", ["n_head (4)", "n_kv_head (3)"]),
    ("position = 'rope'\nn_head = 2\nn_embd = 6\n", ["rope", "3"]),
    ("use_moe = True\nn_layer = 2\nnum_dense_layers = 2\n", ["no layer is MoE"]),
    (
        "use_moe = True\nrouter_score = 'sigmoid'\nrouter_z_loss_coef = 0.1\n",
        ["router_z_loss_coef", "sigmoid"],
    ),
    ("dtype = 'float16'\nspike_guard = 6.0\n", ["spike_guard", "float16"]),
    ("parallel = 'fsdp'\ndtype = 'float16'\n", ["fsdp", "float16"]),
    ("block_size = 10**9\n", ["block_size (1000000000)"]),
    ("beta1 = 1.0\n", ["beta1 is 1.0"]),
    ("learning_rate = -1.0\n", ["learning_rate is -1.0"]),
    ("norm = 'batchnorm'\n", ["norm is 'batchnorm'", "rmsnorm"]),
    ("parallel = 'ddpp'\n", ["parallel is 'ddpp'", "fsdp"]),
    ("dataset = 'shakespear'\n", ["no dataset 'shakespear'"]),
    ("init_from = 'resum'\n", ["no checkpoint at resum"]),
    ("weight_decay = float('nan')\n", ["weight_decay is nan"]),
    ("device = 'tpu'\n", ["device is 'tpu'"]),
    ("batch_size = 0\n", ["batch_size is 0"]),
]
