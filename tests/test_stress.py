"""A share of every row of assets/reliability.md but the last, whose promise is a time: real runs, real kills, real files."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT

SHARES = {
    "kills": 0.02,
    "window": 0.02,
    "sigterm": 0.02,
    "disk": 0.06,
    "flips": 0.05,
    "truncations": 0.05,
    "pickles": 1,
    "elastic": 0.1,
    "world_sizes": 1,
    "nan": 0.2,
    "configs": 0.1,
}


@pytest.mark.parametrize("case", SHARES)
def test_chaos(case, play):
    command = [
        sys.executable,
        "-m",
        "tools.chaos",
        f"--only={case}",
        f"--share={SHARES[case]}",
        f"--dataset={play}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    row = done.stdout.splitlines()[-1]
    assert done.returncode == 0 and " held" in row and "BROKEN" not in row, (
        done.stdout + done.stderr
    )


def test_unknown_case():
    done = subprocess.run(
        [sys.executable, "-m", "tools.chaos", "--only=kill"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "unknown case kill; known: kills, window" in done.stderr
