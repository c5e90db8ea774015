"""Running the prepare scripts so that tests do not touch the user's datasets."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

from common import train_bpe
from writing import write_texts

from nanomoe.dataset import Dataset
from nanomoe.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
# checkpoints every 64 thousand characters, and a preparation that can be stopped on its way
CHANGES = {
    "import json\n": "import json, time\n",
    "BATCH = 2**20": "BATCH = 2**13",
    "CHECKPOINT = 2**26": "CHECKPOINT = 2**16",
    "written += num_bytes": "time.sleep(float(os.environ.get('SLOW', 0))); written += num_bytes",
}


@functools.cache
def learned_bpe(text, vocab_size):
    return train_bpe([text], vocab_size)


def write_halves(folder, meta, text):
    """A dataset of a text, with 80,000 characters for training. Returns the folder."""
    write_texts(folder, meta, {"train": text[:80_000], "val": text[80_000:]}, "tests")
    return folder


def copy_scripts(root, name, changed=False):
    """Copies data/NAME/prepare.py and what it needs below `root`. Returns the folder data/NAME.

    changed: with CHANGES to writing.py."""
    shutil.copytree(ROOT / "nanomoe", root / "nanomoe", dirs_exist_ok=True)
    shutil.copy(ROOT / "configurator.py", root)
    (root / "data" / name).mkdir(parents=True)
    for path in (ROOT / "data").glob("*.py"):
        shutil.copy(path, root / "data")
    writing = root / "data" / "writing.py"
    for old, new in CHANGES.items() if changed else ():
        assert writing.read_text().count(old) == 1
        writing.write_text(writing.read_text().replace(old, new))
    shutil.copy(ROOT / "data" / name / "prepare.py", root / "data" / name)
    return root / "data" / name


def start(folder, *args, env=()):
    """The script of a folder, in the background and in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(folder / "prepare.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(env),
        # whatever the shell that runs the tests ignores
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )


def prepare(folder, *args, **env):
    """The script of a folder. Returns a CompletedProcess."""
    process = start(folder, *args, env=env)
    out, error = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def load_script(name):
    """data/NAME/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / name / "prepare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def prepare_text(data, *flags):
    """data/text/prepare.py in this process: makes the dataset `mine` in the folder `data`."""
    script = load_script("text")
    argv = ["prepare.py", "--name=mine", "--processes=1", *map(str, flags)]
    with mock.patch.object(script, "DATA", data), mock.patch.object(sys, "argv", argv):
        script.main()
    return data / "mine"


def decode(folder, split):
    data = Dataset(folder, 8)
    return Tokenizer(data.meta).decode(getattr(data, split).tolist())


def digest(folder):
    """{name: sha256} of all files of a dataset."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def recorded(folder):
    """How many documents the last checkpoint holds."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        progress = json.loads((folder / "unfinished" / "progress.json").read_text())["progress"]
        return progress["reader"]["documents"]
    return 0


def half_an_answer(meta, connection):
    """In the place of writing.encode_all(): is killed in the middle of its first answer."""
    connection.recv()
    os.write(connection.fileno(), bytes([0, 1, 0, 0, 7]))
    os.kill(os.getpid(), signal.SIGKILL)
