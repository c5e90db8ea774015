"""A path means what its user means, and a printed command can be pasted back."""

import os
import shlex

import pytest

from nanomoe.load import load
from tests.helpers import MOE, ROOT, full, run_module, run_script, succeeded, train


def test_home(play, tmp_path):
    """--out_dir=~/run: a shell leaves the ~ of such a flag."""
    env = {"HOME": str(tmp_path)}
    (tmp_path / "run.py").write_text("out_dir = '~/from config'\nmax_iters = 1\n")
    (tmp_path / "play").symlink_to(play)
    (tmp_path / "prompt.txt").write_text("MACBETH")
    succeeded(train("~/run.py", dataset="~/play", env=env))
    assert load(tmp_path / "from config").step == 2
    done = run_script(
        "sample.py", out_dir="~/from config", start="FILE:~/prompt.txt", env=env, num_samples=1
    )
    assert "MACBETH" in succeeded(done)
    done = train(init_from="~/from config", dataset=play, out_dir="~/b", max_iters=4, env=env)
    assert "after step 2" in succeeded(done) and load(tmp_path / "b").step == 4
    assert not (ROOT / "~").exists()


@pytest.mark.parametrize("name", ["my runs/a", "räuber & söhne", full("it's"), full("$HOME;ls")])
def test_printed_commands_can_be_pasted(name, play, tmp_path):
    out = succeeded(train(dataset=play, out_dir=tmp_path / name))
    command = out.rpartition("more: ")[2].strip()
    assert shlex.split(command)[:2] == ["python", "sample.py"]
    done = run_script(*shlex.split(command)[1:], num_samples=1, max_new_tokens=3)
    succeeded(done)


def test_relative_paths_and_links(play, tmp_path):
    """A run is the same run by each of its names."""
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    succeeded(train(dataset=os.path.relpath(play, ROOT), out_dir=tmp_path / "link"))
    relative = os.path.relpath(tmp_path / "run", ROOT)
    out = succeeded(train(dataset=play, out_dir=relative, init_from="resume", max_iters=4))
    assert "after step 2" in out and "resumed with max_iters 4 instead of 2" in out
    assert "dataset" not in out.split("resumed with")[1].splitlines()[0]
    assert not list((tmp_path / "run").glob("earlier-*"))


@pytest.mark.full
def test_home_in_tools(play, tmp_path):
    succeeded(train(dataset=play, out_dir=tmp_path / "runs" / "a", **MOE))
    os.environ["HOME"], home = str(tmp_path), os.environ.get("HOME", "")
    try:
        succeeded(run_module("tools.report", "~/runs", out="~/report"))
        succeeded(run_module("tools.xray", "~/runs/a", html="~/page.html"))
    finally:
        os.environ["HOME"] = home
    assert (tmp_path / "report" / "report.md").exists() and (tmp_path / "page.html").exists()
