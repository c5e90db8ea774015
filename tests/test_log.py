"""log.jsonl: what it keeps when a run resumes, and numbers that are not finite."""

import json
import math
import random

import pytest
import torch

import train
from moe_model import Routing
from nanomoe.device import speed
from nanomoe.log import RunLog, last_start, lines_from_end, summarize


def write(path, *entries, end=""):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("end", ["", '{"step": 4, "lo', "\n"])
def test_resuming_drops_later_steps_and_half_lines(end, tmp_path):
    path = tmp_path / "log.jsonl"
    first, again = {"start": "a", "n": 1}, {"start": "b", "n": 2}
    write(path, first, {"step": 1}, {"step": 2}, {"step": 3}, again, {"step": 4}, end=end)
    log = RunLog(tmp_path, 2)
    log.write(step=3, loss=1.5)
    assert read(path) == [first, {"step": 1}, {"step": 2}, again, {"step": 3, "loss": 1.5}]
    assert last_start(tmp_path) == again


@pytest.mark.parametrize("text", ["", "{", '{"start": 1}\n', '{"step": 5}\n{"step": 6}\n'])
def test_logs_without_a_step_to_keep(text, tmp_path):
    (tmp_path / "log.jsonl").write_text(text)
    RunLog(tmp_path, 2).write(step=3)
    kept = [{"start": 1}] if "start" in text else []
    assert read(tmp_path / "log.jsonl") == [*kept, {"step": 3}]


def test_lines_from_the_end(tmp_path):
    """For blocks of any size they are the lines and their places."""
    rng = random.Random(0)
    for _ in range(300):
        lines = [b"x" * rng.randrange(6) for _ in range(rng.randrange(9))]
        (tmp_path / "file").write_bytes(b"\n".join(lines))
        found = list(lines_from_end(tmp_path / "file", block=rng.randrange(1, 12)))
        assert [line for _, line in reversed(found)] == (lines or [b""])
        data = b"\n".join(lines)
        assert all(data[offset : offset + len(line)] == line for offset, line in found)


def test_a_long_log_is_not_read_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    write(path, {"start": "a"}, *({"step": step, "loss": 1.0} for step in range(200_000)))
    most = 0

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, *args):
            return self.file.seek(*args)

        def read(self, size):
            nonlocal most
            most += size
            return self.file.read(size)

    import builtins

    real = open
    monkeypatch.setattr(
        builtins,
        "open",
        lambda p, mode="r", **k: Counting(real(p, mode)) if mode == "rb" else real(p, mode, **k),
    )
    RunLog(tmp_path, 199_990)
    assert 0 < most <= 2**20 < path.stat().st_size


def test_what_is_not_finite_is_null(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(step=1, loss=math.nan, lr=math.inf, load=[[0.5, math.nan]], mfu=None, best=2.0)
    line = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    expected = {"step": 1, "loss": None, "lr": None, "load": [[0.5, None]], "mfu": None}
    assert json.loads(line) == expected | {"best": 2.0}


def test_details_are_left_out_and_losses_are_exact(tmp_path):
    log = RunLog(tmp_path, 0)
    entry = {"step": 123_456_789, "loss": 1.4887697696685791, "seconds": 1234.56789, "ms": 1 / 3}
    entry |= {"dead_experts": 3, "mfu": None}
    lists = {"expert_load": [[1 / 3, 2 / 3]], "collapsed_layers": [0]}
    log.write(**entry, **lists)
    log.write(details=False, **entry, **lists)
    losses = {"val_loss": 0.1 + 0.2, "val_bits_per_byte": 1 / 3}
    log.write(step=2, seconds=0.1 + 0.2, **losses)
    first, second, evaluation = read(tmp_path / "log.jsonl")
    assert second == entry | {"seconds": 1234.57, "ms": 0.333333}
    assert first == second | {"expert_load": [[0.3333, 0.6667]], "collapsed_layers": [0]}
    assert evaluation == {"step": 2, "seconds": 0.3, **losses}


def test_a_long_run_of_many_experts_has_a_short_log(tmp_path):
    """12 layers x 64 experts x 600,000 steps stay under 200 MB, with a line for each step."""
    layers, experts, steps = 12, 64, 600_000
    torch.manual_seed(0)
    log, sizes = RunLog(tmp_path, 0), {}
    for details in (True, False):
        before = (tmp_path / "log.jsonl").stat().st_size
        for step in range(1, 101):
            stats = {name: torch.rand(layers) for name in Routing._fields}
            stats["expert_count"] = torch.randint(5000, 20_000, (layers, experts)).float()
            numbers = {"seconds": 1e5 + step / 7, "lr": 6e-4 * step / 97}
            numbers |= speed(0.3 + step / 997, 2**19, 1e9, torch.device("cpu"), 8, "bfloat16")
            numbers |= summarize({"cross_entropy": torch.rand(()) * 3, **stats})
            numbers["mfu"] = 0.4 + step / 1e6
            log.write(details=details, step=300_000 + step, **numbers)
        sizes[details] = ((tmp_path / "log.jsonl").stat().st_size - before) / 100
    detailed = steps // train.load_interval
    assert detailed * sizes[True] + (steps - detailed) * sizes[False] < 200e6, sizes


def test_an_evaluation_is_not_written_twice(tmp_path):
    """A run that is killed before its checkpoint has the loss evaluates again."""
    RunLog(tmp_path, 0).write(step=2, seconds=1.0, val_loss=1.5)
    log = RunLog(tmp_path, 2)
    log.write(step=2, seconds=1.0, val_loss=1.5)
    assert len(read(tmp_path / "log.jsonl")) == 1
    log.write(step=2, seconds=1.0, val_loss=1.25)  # on other text, say
    assert [line["val_loss"] for line in read(tmp_path / "log.jsonl")] == [1.5, 1.25]
