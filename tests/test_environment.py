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


def test_imports_are_late(play, tmp_path):
    """A run from scratch imports neither heavy packages that it does not use, nor the modules that
    read other models; sampling imports nothing of training either."""
    code = (
        "import sys, runpy\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print('modules', *sys.modules)\n"
    )
    unused = {"wandb", "datasets", "tiktoken", "matplotlib", "transformers", "pandas"}
    others = {"nanomoe.nanogpt", "nanomoe.hf", "nanomoe.bpe", "tokenizers"}
    training = {"nanomoe.distributed", "nanomoe.optim", "nanomoe.run_dir", "train"}
    settings = SMALL | {"out_dir": tmp_path, "dataset": play}
    sampling = {"out_dir": tmp_path, "num_samples": 1, "max_new_tokens": 2}
    for script, given, not_loaded in (
        ("train.py", settings, unused | others | {"nanomoe.load", "nanomoe.inherit"}),
        ("sample.py", sampling, unused | others | training),
    ):
        command = [sys.executable, "-c", code, script, *flags(**given)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
        modules = succeeded(done).splitlines()[-1].split()
        assert modules[0] == "modules" and not not_loaded & set(modules)


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
