"""Running the prepare scripts, from a copy, so that tests do not touch the user's datasets."""

import os
import shutil
import subprocess
import sys

from nanomoe.dataset import Dataset
from nanomoe.tokenizer import Tokenizer
from tests.helpers import ROOT


def copy_scripts(root, name):
    """Copies data/NAME/prepare.py and what it needs below `root`. Returns the folder data/NAME."""
    shutil.copytree(ROOT / "nanomoe", root / "nanomoe", dirs_exist_ok=True)
    shutil.copy(ROOT / "configurator.py", root)
    (root / "data" / name).mkdir(parents=True)
    for path in (ROOT / "data").glob("*.py"):
        shutil.copy(path, root / "data")
    shutil.copy(ROOT / "data" / name / "prepare.py", root / "data" / name)
    return root / "data" / name


def prepare(folder, *args, **env):
    """The script of a folder. Returns a CompletedProcess."""
    return subprocess.run(
        [sys.executable, str(folder / "prepare.py"), *args],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder.parent.parent.parent,
        env=os.environ | env,
    )


def decode(folder, split):
    data = Dataset(folder, 8)
    return Tokenizer(data.meta).decode(getattr(data, split).tolist())
