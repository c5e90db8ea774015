"""Machines that are not this one: any folder, a container's share of the CPUs, late imports. What
a machine lacks is said in one line, before any work."""

import ast
import ensurepip
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import common
import pytest
import torch

from nanomoe.device import limit_threads
from nanomoe.errors import num_cores
from nanomoe.load import load
from tests.helpers import (
    MOE,
    ROOT,
    SMALL,
    altered_train,
    flags,
    full,
    one_line,
    run_script,
    start_train,
    succeeded,
    train,
)


def test_runs_from_any_folder(play, tmp_path):
    settings = SMALL | {"n_embd": 64, "dataset": play, "out_dir": "here"}
    done = run_script("train.py", "config/train_plays_char_moe.py", cwd=tmp_path, **settings)
    assert "step 2/2 | validation loss" in succeeded(done)
    assert load(tmp_path / "here").step == 2


def test_imports_are_late(play, tmp_path):
    """A run from scratch imports neither heavy packages that it does not use, nor the modules that
    read other models; sampling imports nothing of training either."""
    code = "import sys, runpy; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__'); print('modules', *sys.modules)"
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


def without_pip(monkeypatch):
    """As in an environment that uv has made."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find(name, *a)
    )


def test_pip_is_taken_from_ensurepip(monkeypatch):
    assert common.pip_command("a.whl") == [sys.executable, "-m", "pip"]
    without_pip(monkeypatch)
    if not list((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")):
        pytest.skip("this Python has no ensurepip")
    command = common.pip_command("a.whl")
    assert command != [sys.executable, "-m", "pip"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert succeeded(done).startswith("pip ")


def test_no_pip_at_all(monkeypatch, tmp_path):
    without_pip(monkeypatch)
    monkeypatch.setattr(ensurepip, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(OSError) as error:
        common.pip_command("plays.whl")
    for words in ("no pip", "uv pip install pip", "put plays.whl beside prepare.py"):
        assert words in str(error.value)


@pytest.mark.parametrize("script", ["train.py", full("sample.py")])
def test_no_compiler(script, play, tmp_path):
    """The line is torch's own."""
    run = {"dataset": play, "out_dir": tmp_path / "run"}
    command = [str(ROOT / script), *flags(**SMALL | run), "--compile=True"]
    if script == "sample.py":
        succeeded(train(**run))
        command = [str(ROOT / script), f"--out_dir={tmp_path / 'run'}", "--compile"]
    env = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    one_line(done, 2, "compile cannot work here: InvalidCxxCompiler", "no-such", "--compile=False")


@pytest.mark.parametrize(
    "what_fails",
    [
        "os.rename = fail",  # a folder in a bucket
        "checkpoint.write_weights = fail",
        "checkpoint.torch.save = fail",
        full("os.fsync = fail"),
        full("checkpoint.verify = fail"),
    ],
)
def test_a_file_system_that_cannot_hold_checkpoints(what_fails, play, tmp_path):
    change = f"""
def fail(*args, **options):
    raise OSError(95, "Operation not supported")
{what_fails}
"""
    script = altered_train(tmp_path / "altered.py", change)
    done = train(dataset=play, out_dir=tmp_path / "run", script=script)
    one_line(done, 1, "out_dir", "cannot be written")
    assert "step 1/" not in done.stdout and not list((tmp_path / "run").glob(".trial-*"))


@pytest.mark.full
def test_a_network_that_is_not_there(play, tmp_path):
    env = {"GLOO_SOCKET_IFNAME": "nowhere0"}
    process = start_train(dataset=play, out_dir=tmp_path, processes=2, env=env)
    out, _ = process.communicate(timeout=120)
    assert process.returncode and "error: could not connect to the other processes" in out, out
    assert "GLOO_SOCKET_IFNAME" in out and "NCCL_SOCKET_IFNAME" in out


# What Windows lacks, as far as Linux can play it: signals, fcntl, folders that can be opened and
# flushed, a rename over a file that is there.
WINDOWS = """
import signal
for name in ("SIGUSR1", "SIGHUP"):
    delattr(signal, name)
sys.modules["fcntl"] = None
sys.modules["resource"] = None
os_open, os_fsync, os_rename, flags_of = os.open, os.fsync, os.rename, {}
def open_no_folder(path, flags, *args, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    descriptor = os_open(path, flags, *args, **options)
    flags_of[descriptor] = flags
    return descriptor
def fsync(descriptor):
    if flags_of.get(descriptor, os.O_RDWR) & (os.O_RDWR | os.O_WRONLY) == 0:
        raise OSError(9, "Bad file descriptor")
    os_fsync(descriptor)
def rename(old, new, **options):
    if os.path.exists(new):
        raise FileExistsError(17, "File exists", new)
    os_rename(old, new, **options)
os.open, os.fsync, os.rename = open_no_folder, fsync, rename
"""
ON_WINDOWS = """
import os, runpy, sys
{windows}
sys.path.insert(0, {root!r})
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_windows(tmp_path, script, *args):
    wrapper = tmp_path / "windows.py"
    wrapper.write_text(ON_WINDOWS.format(windows=WINDOWS, root=str(ROOT)))
    command = [sys.executable, str(wrapper), str(ROOT / script), *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.full
def test_windows_simulated(play, tmp_path):
    """One process trains, saves, resumes and samples."""
    run = SMALL | MOE | {"dataset": play, "decay_lr": False, "eval_interval": 2, "keep_last": 1}
    for max_iters in (3, 6):
        given = flags(**run | {"max_iters": max_iters, "out_dir": tmp_path / "run"})
        succeeded(on_windows(tmp_path, "train.py", *given, "--init_from=auto"))
    done = on_windows(tmp_path, "sample.py", f"--out_dir={tmp_path / 'run'}", "--num_samples=1")
    succeeded(done)
    succeeded(train(**run | {"max_iters": 6, "out_dir": tmp_path / "alone", "eval_interval": 2}))
    assert load(tmp_path / "run").step == 6
    a, b = (load(tmp_path / name).weights for name in ("run", "alone"))
    assert all(a[name].equal(b[name]) for name in a)


def test_nothing_imports_what_windows_lacks():
    """fcntl, resource and the like, at least not at the top of a file."""
    lacking = {"fcntl", "resource", "pty", "termios", "pwd", "grp"}
    paths = [*ROOT.glob("*.py"), *(ROOT / "nanomoe").glob("*.py"), *(ROOT / "tools").glob("*.py")]
    for path in [*paths, *(ROOT / "data").rglob("*.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                assert lacking.isdisjoint(alias.name for alias in node.names), path
