"""Malicious pickles in place of a checkpoint: refused in one line, and nothing is executed."""

import contextlib
import io
import os
import pickle
import shutil
import zipfile

import pytest
import torch

from nanomoe import checkpoint
from tests.helpers import Bomb, fit_manifest, run_script, succeeded, train

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


@pytest.fixture(scope="module")
def good_run(play, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("good") / "run"
    succeeded(train(dataset=play, out_dir=out_dir))
    return out_dir


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_malicious_pickles_are_refused(kind, good_run, tmp_path):
    """The same file, read carelessly, does its harm: else the refusal would prove nothing."""
    out_dir, executed = tmp_path / "run", tmp_path / "executed"
    shutil.copytree(good_run, out_dir)
    path = checkpoint.latest_good(out_dir)
    file = out_dir / CKPT if KINDS[kind] == CKPT else path / KINDS[kind]
    write_pickle(kind, file, f"touch '{executed}'")
    read_carelessly(file)
    assert executed.exists(), "it would do nothing"
    executed.unlink()
    if KINDS[kind] == CKPT:
        done = run_script("sample.py", out_dir=file, device="cpu")
    else:
        fit_manifest(path)  # by someone who made the manifest fit
        resume = {"init_from": "resume", "max_iters": 4, "device": "cpu"}
        done = run_script("train.py", out_dir=out_dir, **resume)
    assert not executed.exists(), "it was executed"
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "refused" in done.stderr or "damaged" in done.stderr, done.stderr
