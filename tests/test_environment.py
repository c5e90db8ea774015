"""What surrounds train.py: any folder, a container's share of the CPUs, late imports, wandb."""

import os
import subprocess
import sys

import pytest
import torch

from nanomoe import checkpoint
from nanomoe.device import limit_threads
from nanomoe.errors import num_cores
from tests.helpers import ROOT, SMALL, flags, run_script, succeeded


def test_runs_from_any_folder(play, tmp_path):
    done = run_script(
        "train.py",
        "config/train_plays_char_moe.py",
        cwd=tmp_path,
        dataset=play,
        out_dir="here",
        **{k: v for k, v in SMALL.items() if k != "n_head"} | {"n_embd": 64},
    )
    assert "step 2/2 | validation loss" in succeeded(done)
    assert checkpoint.latest_good(tmp_path / "here").name == "step-00000002"


def test_heavy_imports_are_late(play, tmp_path):
    """A run that does not use wandb, datasets and their like does not import them."""
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train.py', *sys.argv[1:]]\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
        "heavy = {'wandb', 'datasets', 'tiktoken', 'matplotlib', 'transformers', 'pandas'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    arguments = flags(**SMALL | {"out_dir": tmp_path, "dataset": play})
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert succeeded(done).splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "text, omp, cores, threads",
    [
        ("150000 100000", None, 2, 2),
        ("50000 100000", None, 1, 1),
        ("max 100000", None, 7, 4),
        ("50000 100000", "4", 1, 4),
        ("9900000 100000", None, 7, 4),
        (None, None, 7, 4),
    ],
)
def test_a_containers_share_of_the_cores(text, omp, cores, threads, tmp_path, monkeypatch):
    """Of seven cores, where torch would take four threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    if text:
        (tmp_path / "cpu.max").write_text(text)
    assert num_cores(tmp_path / "cpu.max") == cores
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        limit_threads(tmp_path / "cpu.max")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
