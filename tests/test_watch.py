"""tools.watch: a run that trains, one that has ended, and what is not a run."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from tests.helpers import MOE, ROOT, one_line, read_until, run_module, start_train, succeeded, train
from tests.report_runs import log_lines, write
from tools import watch
from tools.run_logs import LoggedRun


def shown(folder, width=80, height=100):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(watch.look(folder, True, width, height))
    return console.export_text()


def test_a_run_that_has_ended(play, tmp_path):
    succeeded(train(dataset=play, out_dir=tmp_path, max_iters=6, eval_interval=3, **MOE))
    first, *lines = succeeded(run_module("tools.watch", tmp_path)).splitlines()
    losses = [e["val_loss"] for e in LoggedRun(tmp_path / "log.jsonl").evals.values()]
    assert first == (
        f"step 6/6 | finished | validation loss {losses[-1]:.4f}, the lowest {min(losses):.4f}"
    )
    assert sum(line.startswith("layer ") for line in lines) == 2
    steps = [line.split()[0] for line in lines if line[:6].strip().isdigit() and "." in line]
    assert steps == ["1", "2", "3", "4", "5", "6"] and all(len(line) <= 80 for line in lines)


@pytest.mark.full
def test_a_run_under_way_is_followed(play, tmp_path):
    """In a terminal: the picture changes while the run trains, and Ctrl-C ends it."""
    run = start_train(dataset=play, out_dir=tmp_path, max_iters=100_000, **MOE)
    terminal, end = pty.openpty()
    read_until(run, "| loss")
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.watch", str(tmp_path)],
        stdout=end,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "90", "LINES": "40", "TERM": "xterm-256color"},
        # whatever the shell that runs the tests ignores
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    text, limit = "", time.monotonic() + 60
    while text.count("| running |") < 2:  # drawn twice
        assert time.monotonic() < limit, text
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 65536).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and process.stderr.read() == b""
    process.stderr.close()
    run.kill()
    run.communicate()
    assert "| stopped" in succeeded(run_module("tools.watch", tmp_path))


def test_what_is_not_a_run(tmp_path):
    done = run_module("tools.watch", tmp_path / "nowhere")
    one_line(done, 2, "nowhere' is not a folder; give a run's out_dir")
    assert str(watch.look(tmp_path, False, 80)) == f"{tmp_path} has no log.jsonl yet"
    (tmp_path / "log.jsonl").write_text('{"sta')
    assert "no start line" in str(watch.look(tmp_path, False, 80))


def entries(steps, E=64, layers=2, **settings):
    """A start and training lines, after half of which the log has a gradient norm."""
    lines = log_lines(steps=steps, max_iters=1000, interval=10**6, ended=False, **settings)
    for line in lines[1:]:
        line |= {"expert_load": [[2 / E] + [0] + [1 / E] * (E - 2)] * layers, "ms": 250.0}
        if line["step"] > steps // 2:
            line["grad_norm"] = 0.834
    return lines


@pytest.mark.parametrize("width", [1, 9, 40, 80, 200])
def test_many_experts_and_lines(width, tmp_path):
    write(tmp_path, entries(899))
    text = shown(tmp_path, width)
    assert max(map(len, text.splitlines())) <= width
    if width < 40:
        return
    assert "step 899/1000 | running | 0m25s left" in text
    rows = [line for line in text.splitlines() if line.startswith("layer ")]
    size = max(1, min(4, (width - 20) // 64))
    assert [row.count("█") for row in rows] == [min(64 * size, width - 20)] * 2
    assert all("max  2.0" in row for row in rows)
    if width >= 80:
        steps = [line.split()[0] for line in text.splitlines() if line[:4].strip().isdigit()]
        assert steps == [str(step) for step in range(892, 900)] and "0.83" in text


@pytest.mark.parametrize("height", [10, 30])
@pytest.mark.parametrize("layers", [0, 3, 40])
def test_a_low_terminal_shows_the_last_lines(layers, height, tmp_path):
    lines = entries(100, layers=layers or 1)
    for line in lines[1:-1]:
        line["loss"] = None  # it was not finite
        if not layers:
            del line["expert_load"]
    write(tmp_path, [*lines[:-1], {"step": 100, "seconds": 1.0, "val_loss": None}])
    text = shown(tmp_path, 80, height).splitlines()
    assert text[0].startswith("step 100/1000") and "validation loss nan" in text[0]
    assert text[-1].split()[:2] == ["99", "nan"] and len(text) <= max(height, 9)
    rows = sum(line.startswith("layer ") for line in text)
    assert rows == layers or (rows < layers and f"load of {rows} of {layers} layers" in text[2])


def test_seconds_and_colors(tmp_path):
    write(tmp_path, entries(100, max_seconds=60.0))
    assert shown(tmp_path).startswith("50/60 s | running | 0m10s left")
    assert watch.color(0) == "rgb(60,90,255)" and watch.color(1) == "rgb(130,130,130)"
    assert watch.color(2) == watch.color(9) == "rgb(240,50,40)"
    assert watch.color(1.5) == "rgb(185,90,85)"
