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
    sources = ["configurator.py", "nanomoe/__init__.py", "nanomoe/errors.py"]
    sources += [
        "nanomoe/dataset.py",
        "nanomoe/tokenizer.py",
        "nanomoe/cores.py",
        f"data/{name}/prepare.py",
    ]
    sources += [path.relative_to(ROOT) for path in (ROOT / "data").glob("*.py")]
    for source in sources:
        (root / source).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / source, root / source)
    return root / "data" / name


def prepare(folder, *args, **env):
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
