"""tests/stress.py: the table, and a few repetitions of the rows that are not tests elsewhere."""

import subprocess
import sys

import pytest

from tests import stress
from tests.helpers import ROOT, succeeded


def run_stress(*flags):
    command = [sys.executable, "-m", "tests.stress", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.full
@pytest.mark.parametrize(
    "name, number", [("kills", 2), ("window", 2), ("disk", 3), ("elastic", 2), ("kills_muon", 2)]
)
def test_rows(name, number, play, tmp_path):
    row = stress.Row(name, number, tmp_path / name, play)
    stress.FUNCTIONS[name](row)
    assert row.held == number


def test_every_row_is_a_function_or_a_test():
    assert stress.ROWS.keys() == stress.FUNCTIONS.keys() | stress.TESTS.keys()
    for test in stress.TESTS.values():
        file, name = test.split("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(), test


@pytest.mark.full
def test_the_table():
    done = run_stress("--only=flips,disk", "--share=0.02")
    *_, flips, disk = succeeded(done).splitlines()
    assert flips.startswith("| bit flips in checkpoint files | 20 |"), flips
    assert "| 20 of 20 held |" in flips and "| 1 of 1 held" in disk, done.stdout


def test_a_broken_promise_is_told(monkeypatch, tmp_path, capsys):
    def one_of_two_holds(row):
        row.count()
        raise AssertionError("a step was lost")

    monkeypatch.setitem(stress.FUNCTIONS, "kills", one_of_two_holds)
    assert not stress.run_row("kills", 2, tmp_path / "kills", "data")
    out, err = capsys.readouterr()
    assert "| BROKEN after 1 of 2 |" in out and "a step was lost" in err
    # a row that does not do all of its repetitions has not held either
    monkeypatch.setitem(stress.FUNCTIONS, "kills", lambda row: row.count())
    assert not stress.run_row("kills", 2, tmp_path / "again", "data")


def test_unknown_row():
    done = run_stress("--only=kill")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: unknown row kill; known: kills, window"), done.stderr
