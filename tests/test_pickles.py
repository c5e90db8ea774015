"""Malicious pickles in place of a checkpoint: refused in one line, and nothing is executed."""

import contextlib
import io
import os
import pickle
import zipfile

import pytest
import torch

from configurator import InputError
from nanomoe import checkpoint
from nanomoe.load import load
from tests.helpers import Bomb, fit_manifest, save_step, saver_for, stepped

# what is replaced: a whole nanoGPT checkpoint, or one file of ours
CKPT = "ckpt.pt"
KINDS = {
    "torch.save": CKPT,
    "torch.save before 1.6": CKPT,
    "protocol 0": CKPT,
    "protocol 2": CKPT,
    "protocol 4": CKPT,
    "eval of a string": CKPT,
    "getattr chain": CKPT,
    "optimizer state": "training.pt",
    "weights": "model.safetensors",
    "config": "config.json",
}


class OsSystem:
    """Is os.system after unpickling, by way of getattr and __import__."""

    def __call__(self):  # pickle wants a callable in its place
        raise NotImplementedError

    def __reduce__(self):
        return getattr, (Bomb(__import__, "os"), "system")


def write_pickle(kind, file, command):
    """Write a pickle of that kind, which runs a shell command when it is read."""
    bomb = Bomb(os.system, command)
    if kind in ("torch.save", "optimizer state"):
        torch.save({"model": {}, "optimizer": {"state": bomb}}, file)
    elif kind == "torch.save before 1.6":
        torch.save({"model": bomb}, file, _use_new_zipfile_serialization=False)
    elif kind == "protocol 0":
        file.write_bytes(f"cposix\nsystem\n(S{command!r}\ntR.".encode())
    elif kind == "eval of a string":
        code = f"__import__('os').system({command!r})"
        file.write_bytes(pickle.dumps({"model_args": Bomb(eval, code)}))
    elif kind == "getattr chain":  # in a zip file, as torch writes them
        good = io.BytesIO()
        torch.save({"model": {}}, good)
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(file, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if name.endswith("data.pkl"):
                    content = pickle.dumps(Bomb(OsSystem(), command))
                new.writestr(name, content)
    else:
        protocol = 4 if kind == "protocol 4" else 2
        file.write_bytes(pickle.dumps(bomb, protocol=protocol))


def read_carelessly(file):
    try:
        torch.load(file, weights_only=False)
    except Exception:
        with contextlib.suppress(Exception):
            pickle.loads(file.read_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_malicious_pickles_are_refused(kind, tmp_path):
    """The same file, read carelessly, does its harm: else the refusal would prove nothing."""
    executed = tmp_path / "executed"
    with saver_for(tmp_path, *stepped()) as saver:
        save_step(saver, 1)
    path = checkpoint.latest_good(tmp_path)
    file = tmp_path / CKPT if KINDS[kind] == CKPT else path / KINDS[kind]
    write_pickle(kind, file, f"touch '{executed}'")
    read_carelessly(file)
    assert executed.exists(), "it would do nothing"
    executed.unlink()
    name = file
    if KINDS[kind] != CKPT:
        with pytest.raises(OSError, match=f"{file.name} is not as it was written"):
            load(path)
        fit_manifest(path)  # by someone who made the manifest fit
        name = path
    with pytest.raises((InputError, OSError)) as error:
        load(name).training_state()
    assert not executed.exists(), "it was executed"
    assert "refused" in str(error.value) or "damaged" in str(error.value)
    assert "\n" not in str(error.value)
