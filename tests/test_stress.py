"""tests/stress.py: the table, and a few repetitions of the rows that are not tests elsewhere."""

import subprocess
import sys

import pytest

from configurator import InputError
from tests import stress
from tests.helpers import ROOT, succeeded


@pytest.mark.full
@pytest.mark.parametrize(
    "name, number", [("kills", 2), ("window", 2), ("disk", 3), ("elastic", 2), ("kills_muon", 2)]
)
def test_rows(name, number, play, tmp_path):
    row = stress.Row(name, number, tmp_path / name, play)
    stress.ROWS[name][-1](row)
    assert row.held == number


def test_every_test_of_a_row_is_there():
    for *_, how in stress.ROWS.values():
        if isinstance(how, str):
            file, name = how.split("::")
            text = (ROOT / "tests" / f"test_{file}.py").read_text()
            assert f"\ndef test_{name}(" in text, how


@pytest.mark.full
def test_the_table():
    command = [sys.executable, "-m", "tests.stress", "--only=flips,disk", "--share=0.02"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    *_, flips, disk = succeeded(done).splitlines()
    assert flips.startswith("| bit flips in checkpoint files | 20 |"), flips
    assert "| 20 of 20 held |" in flips and "| 1 of 1 held" in disk, done.stdout


def test_a_broken_promise_is_told(monkeypatch, tmp_path, capsys):
    def one_of_two_holds(row):
        row.count()
        raise AssertionError("a step was lost")

    *row, _ = stress.ROWS["kills"]
    monkeypatch.setitem(stress.ROWS, "kills", (*row, one_of_two_holds))
    assert not stress.run_row("kills", 2, tmp_path / "kills", "data")
    out, err = capsys.readouterr()
    assert "| BROKEN after 1 of 2 |" in out and "a step was lost" in err
    # a row that does not do all of its repetitions has not held either
    monkeypatch.setitem(stress.ROWS, "kills", (*row, lambda row: row.count()))
    assert not stress.run_row("kills", 2, tmp_path / "again", "data")


def test_unknown_row(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stress.py", "--only=kill"])
    monkeypatch.setattr(stress, "only", "")
    with pytest.raises(InputError, match="unknown row kill; known: kills, window"):
        stress.main()
