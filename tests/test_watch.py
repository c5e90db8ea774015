"""tools.watch: a run that trains, one that has ended, and what is not a run."""

import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from tests.helpers import MOE, ROOT, full, one_line, start_train, succeeded, train
from tools import watch
from tools.run_logs import read_log


def run_watch(folder, **options):
    command = [sys.executable, "-m", "tools.watch", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def shown(path, width=80):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(watch.draw(watch.read_run(path), "running", width))
    return console.export_text()


@pytest.mark.parametrize("moe", [full({}), MOE])
def test_a_run_that_has_ended(moe, play, tmp_path):
    succeeded(train(dataset=play, out_dir=tmp_path, max_iters=6, eval_interval=3, **moe))
    done = run_watch(tmp_path)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    losses = [e["val_loss"] for e in read_log(tmp_path / "log.jsonl")["evals"].values()]
    assert first == (
        f"step 6/6 | finished | validation loss {losses[-1]:.4f}, the lowest {min(losses):.4f}"
    )
    assert sum("●" in line[9:] for line in lines[2:15]) in (1, 2)  # two, perhaps in one line
    assert sum(line.startswith("layer ") for line in lines) == (2 if moe else 0)
    steps = [line.split()[0] for line in lines if line[:6].strip().isdigit() and "." in line]
    assert steps == ["1", "2", "3", "4", "5", "6"] and all(len(line) <= 80 for line in lines)


@pytest.mark.full
def test_a_run_under_way_is_followed(play, tmp_path):
    """In a terminal: the picture changes while the run trains, and Ctrl-C ends it."""
    run = start_train(dataset=play, out_dir=tmp_path, max_iters=100_000, **MOE)
    terminal, end = pty.openpty()
    log = tmp_path / "log.jsonl"
    while not log.exists() or b'"loss"' not in log.read_bytes():
        time.sleep(0.1)
        assert run.poll() is None
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
    done = run_watch(tmp_path)
    assert "| stopped" in done.stdout


def test_what_is_not_a_run(tmp_path):
    one_line(run_watch(tmp_path / "nowhere"), 2, "nowhere' is not a folder; give a run's out_dir")
    assert str(watch.look(tmp_path, False, 80)) == f"{tmp_path} has no log.jsonl yet"
    (tmp_path / "log.jsonl").write_text('{"sta')
    assert "no start line" in str(watch.look(tmp_path, False, 80))


def entries(steps, E=64, layers=2, **settings):
    settings = {"max_iters": 1000, "max_seconds": 0, "seed": 1, "num_experts": E} | settings
    numbers = dict.fromkeys(("params", "active_params", "flops_per_token", "tokens_per_step"), 1)
    load = [[2 / E] + [0] + [1 / E] * (E - 2)] * layers
    line = {"lr": 1e-3, "ms": 250.0, "tokens_per_s": 1e5, "max_vio": 1.0, "dead_experts": 1}
    yield {"start": "now", "settings": settings, **numbers}
    for step in steps:
        yield {"step": step, "loss": 9 / step**0.5, **line, "expert_load": load}


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("width", [40, 80, 200])
def test_many_experts_and_lines(width, tmp_path):
    text = shown(write(tmp_path / "log.jsonl", entries(range(1, 900))), width)
    assert "step 899/1000 | running | 0m25s left" in text.replace("\n", " ")
    assert max(map(len, text.splitlines())) <= width
    steps = [line.split()[0] for line in text.splitlines() if line[:4].strip().isdigit()]
    assert steps[-8:] == [str(step) for step in range(892, 900)]
    rows = [line for line in text.splitlines() if line.startswith("layer ")]
    experts = min(64, width - 12) * max(1, min(4, (width - 12) // 64))
    assert [row.count("█") for row in rows] == [experts] * 2


def test_numbers_that_are_not_finite(tmp_path):
    lines = list(entries(range(1, 20)))
    lines[10]["loss"] = lines[11]["loss"] = None
    lines.append({"step": 19, "seconds": 1.0, "val_loss": None})
    text = shown(write(tmp_path / "log.jsonl", lines))
    assert "validation loss nan" in text
    for line in lines[1:-1]:
        line["loss"] = None
    shown(write(tmp_path / "log.jsonl", lines))
    shown(write(tmp_path / "log.jsonl", lines[:2]))


def test_a_skipped_step_leaves_the_curve_as_it_is(tmp_path):
    lines = list(entries(range(1, 901)))
    whole = shown(write(tmp_path / "log.jsonl", lines))
    lines[300]["loss"] = None
    assert shown(write(tmp_path / "log.jsonl", lines)).splitlines()[3] == whole.splitlines()[3]
    assert shown(write(tmp_path / "log.jsonl", lines)).splitlines()[14] == whole.splitlines()[14]


@pytest.mark.parametrize("height", [10, 24, 30, 60])
@pytest.mark.parametrize("layers", [0, 3, 12, 40])
def test_a_low_terminal_shows_the_last_lines(layers, height, tmp_path):
    lines = list(entries(range(1, 100), layers=layers or 1))
    if not layers:
        lines = [{k: v for k, v in line.items() if k != "expert_load"} for line in lines]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    run = watch.read_run(write(tmp_path / "log.jsonl", lines))
    console.print(watch.draw(run, "running", 80, height))
    text = console.export_text().splitlines()
    assert text[0].startswith("step 99/1000") and text[-1].split()[0] == "99"
    assert len(text) <= max(height, 18)
    rows = sum(line.startswith("layer ") for line in text)
    assert rows == layers or (rows < layers and f" of {rows} of {layers} layers" in "".join(text))


def test_a_run_of_some_seconds(tmp_path):
    lines = list(entries(range(1, 100), max_seconds=60.0))
    for line in lines[1:]:
        line["seconds"] = line["step"] / 2
    text = shown(write(tmp_path / "log.jsonl", lines))
    assert text.startswith("50/60 s | running | 0m10s left") or "49" in text[:9]


@pytest.mark.parametrize("width", [1, 5, 9, 12])
def test_a_narrow_terminal(width, tmp_path):
    shown(write(tmp_path / "log.jsonl", entries(range(1, 50))), width)


def test_the_curve_is_where_the_losses_are(tmp_path):
    """A loss that falls by steps: high on the left, low on the right."""
    lines = list(entries(range(1, 101)))
    for line in lines[1:]:
        line["loss"] = 4.0 if line["step"] <= 50 else 2.0
    chart = shown(write(tmp_path / "log.jsonl", lines)).splitlines()[3:15]
    assert chart[0].startswith("  4.000 ┤") and chart[-1].startswith("  2.000 ┤")
    top, bottom = chart[0][9:], chart[-1][9:]
    half = len(top) // 2
    blank = {chr(0x2800), " "}
    assert not blank & set(top[: half - 2]) and set(top[half + 2 :]) <= blank
    assert not blank & set(bottom[half + 2 :]) and set(bottom[: half - 2]) <= blank


def test_colors():
    assert watch.color(0) == "rgb(60,90,255)" and watch.color(1) == "rgb(130,130,130)"
    assert watch.color(2) == watch.color(9) == "rgb(240,50,40)"
    assert math.isclose(int(watch.color(1.5)[4:7]), 185, abs_tol=1)
