"""log.jsonl: what it keeps when a run resumes, and a step's numbers in it and on the console."""

import io
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import train
from moe_model import Routing
from nanomoe import log as log_module
from nanomoe.device import speed
from nanomoe.log import RunLog, console_line, last_start, lines_from_end, parse, summarize
from tests.helpers import MOE, log, succeeded
from tests.helpers import train as train_small


def write(path, *entries, end=""):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)


@pytest.mark.parametrize("end", ["", '{"step": 4, "lo', '{"step": 2}', "\n"])
def test_resuming_drops_later_steps_and_half_lines(end, tmp_path):
    first, ended, again = {"start": "a", "n": 1}, {"end": "a"}, {"start": "b", "n": 2}
    steps = [{"step": 1}, {"step": 2}, {"step": 3}]
    write(tmp_path / "log.jsonl", first, *steps, ended, again, {"step": 4}, end=end)
    RunLog(tmp_path, 2).write(step=3, loss=1.5)
    assert log(tmp_path) == [first, *steps[:2], ended, again, {"step": 3, "loss": 1.5}]
    assert last_start(tmp_path) == again and last_start("no\0path") == {}


@pytest.mark.parametrize("text", ["", "{", '{"start": 1}\n', '{"step": 5}\n{"step": 6}\n'])
def test_logs_without_a_step_to_keep(text, tmp_path):
    (tmp_path / "log.jsonl").write_text(text)
    RunLog(tmp_path, 2).write(step=3)
    kept = [{"start": 1}] if "start" in text else []
    assert log(tmp_path) == [*kept, {"step": 3}]


def test_what_is_no_entry():
    assert parse(b'{"start": 1}') == {"start": 1}
    assert parse(b'{"sta') == parse(b"5") == parse(b"[1]") == parse(b"\xff") == {}


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLog(None) as run_log:
        run_log.write(step=1, loss=1.0)
    assert not [*tmp_path.iterdir()]


def test_lines_from_the_end(tmp_path):
    """For blocks of any size."""
    rng = random.Random(0)
    for _ in range(300):
        lines = [b"x" * rng.randrange(6) for _ in range(rng.randrange(9))]
        (tmp_path / "file").write_bytes(b"\n".join(lines))
        found = list(lines_from_end(tmp_path / "file", block=rng.randrange(1, 12)))
        assert found[::-1] == (lines or [b""])


def test_a_long_log_is_not_read_as_a_whole(tmp_path, monkeypatch):
    path, sizes = tmp_path / "log.jsonl", []
    write(path, {"start": "a"}, *({"step": step, "loss": 1.0} for step in range(200_000)))

    class Counting(io.FileIO):
        def read(self, size):
            sizes.append(size)
            return super().read(size)

    def counting_open(path, mode, **options):
        return Counting(path) if mode == "rb" else open(path, mode, **options)

    monkeypatch.setattr(log_module, "open", counting_open, raising=False)
    RunLog(tmp_path, 199_990)
    assert 0 < sum(sizes) <= 2**20 < path.stat().st_size


def test_what_is_not_finite_is_null(tmp_path):
    entry = {"step": 1, "loss": math.nan, "lr": math.inf, "load": [[0.5, math.nan]], "mfu": None}
    RunLog(tmp_path).write(**entry, best=2.0)
    line = (tmp_path / "log.jsonl").read_text()
    assert "NaN" not in line and "Infinity" not in line
    null = {"step": 1, "loss": None, "lr": None, "load": [[0.5, None]], "mfu": None}
    assert json.loads(line) == null | {"best": 2.0}


def test_details_are_left_out_and_losses_are_exact(tmp_path):
    run_log = RunLog(tmp_path)
    entry = {"step": 123_456_789, "loss": 1.4887697696685791, "seconds": 1234.56789, "ms": 1 / 3}
    entry |= {"dead_experts": 3, "mfu": None}
    lists = {"expert_load": [[1 / 3, 2 / 3]], "collapsed_layers": [0]}
    start = {"start": "now", "launchers": ["a"], "settings": {"learning_rate": 1 / 3}}
    run_log.write(**start)
    run_log.write(**entry, **lists)
    run_log.write(details=False, **entry, **lists)
    losses = {"val_loss": 0.1 + 0.2, "val_bits_per_byte": 1 / 3}
    run_log.write(step=2, seconds=0.1 + 0.2, **losses)
    begin, first, second, evaluation = log(tmp_path)
    assert begin == start  # tools.sweep compares its settings
    assert second == entry | {"seconds": 1234.57, "ms": 0.333333}
    assert first == second | {"expert_load": [[0.3333, 0.6667]], "collapsed_layers": [0]}
    assert evaluation == {"step": 2, "seconds": 0.3, **losses}


def test_a_long_run_of_many_experts_has_a_short_log(tmp_path):
    """12 layers x 64 experts x 600,000 steps stay under 250 MB, with a line for each step."""
    layers, experts, steps = 12, 64, 600_000
    torch.manual_seed(0)
    run_log, sizes = RunLog(tmp_path), {}
    for details in (True, False):
        before = (tmp_path / "log.jsonl").stat().st_size
        for step in range(1, 101):
            stats = {name: torch.rand(layers) for name in Routing._fields}
            stats["expert_count"] = torch.randint(5000, 20_000, (layers, experts)).float()
            numbers = {"seconds": 1e5 + step / 7, "lr": 6e-4 * step / 97, "grad_norm": step / 97}
            numbers |= speed(0.3 + step / 997, 2**19, 1e9, torch.device("cpu"), 8, "bfloat16")
            numbers |= summarize({"cross_entropy": torch.rand(()) * 3, **stats})
            numbers["mfu"] = 0.4 + step / 1e6
            run_log.write(details=details, step=300_000 + step, **numbers)
        sizes[details] = ((tmp_path / "log.jsonl").stat().st_size - before) / 100
    detailed = steps // train.load_interval
    assert detailed * sizes[True] + (steps - detailed) * sizes[False] < 250e6, sizes


def test_an_evaluation_is_not_written_twice(tmp_path):
    """A run that is killed before its checkpoint has the loss evaluates again."""
    RunLog(tmp_path).write(step=2, seconds=1.0, val_loss=1.5)
    run_log = RunLog(tmp_path, 2)
    run_log.write(step=2, seconds=1.0, val_loss=1.5)
    assert len(log(tmp_path)) == 1
    run_log.write(step=2, seconds=1.0, val_loss=1.25)  # on other text, say
    assert [line["val_loss"] for line in log(tmp_path)] == [1.5, 1.25]


def stats_of(load):
    layers = dict.fromkeys(Routing._fields, torch.tensor([1.0, 3.0][: len(load)]))
    layers["expert_count"] = 1000 * torch.tensor(load)
    return {"cross_entropy": torch.tensor(2.0), **layers}


@pytest.mark.parametrize("batches", [1, 5])
def test_summary(batches):
    """Sums over micro-batches give the same means."""
    even, uneven = [0.25] * 4, [0.7, 0.3, 0.0, 0.0]
    sums = {name: value * batches for name, value in stats_of([even, uneven]).items()}
    summary = summarize(sums, batches)
    numbers = {"loss": 2.0, "balance_loss": 2.0, "z_loss": 2.0, "max_vio": 1.8, "dead_experts": 2}
    for name, value in (numbers | {"max_vio_mean": 0.9}).items():
        assert summary[name] == pytest.approx(value, rel=1e-5), name
    assert summary["collapsed_layers"] == [1] and summary["router_entropy"] == [1.0, 3.0]
    assert summary["expert_load"] == [even, pytest.approx(uneven)]
    summary = summarize(stats_of([even, even]))
    assert summary["max_vio"] == summary["dead_experts"] == 0 and not summary["collapsed_layers"]
    nearly = [[0.97, *[0.03 / 7] * 7]]  # no expert is dead, and yet
    assert summarize(stats_of(nearly))["collapsed_layers"] == [0]
    assert summarize({"cross_entropy": torch.tensor(2.0)}) == {"loss": 2.0}


def test_console_line():
    entry = {"step": 7, "loss": 1.25, "grad_norm": 0.834, "lr": 1e-3, "ms": 1234.5}
    entry |= {"tokens_per_s": 1e5, "mfu": None}
    line = "step 7/9 | loss 1.2500 | grad 0.83 | lr 1.00e-03 | 1,234 ms | 100,000 tokens/s"
    assert console_line(entry, 9, 65) == line + " | 1m05s left"
    entry |= {"mfu": 0.4, "balance_loss": 1.01, "max_vio": 0.5, "dead_experts": 2}
    line += " | mfu 40.0% | balance 1.010, maxvio 0.50, dead 2 | 1m05s left"
    assert console_line(entry, 9, 65) == line


def test_log_has_every_layer_and_expert(play, tmp_path):
    settings = {"n_layer": 3, "moe_stride": 2, "num_dense_layers": 1, "capacity_factor": 0.5}
    settings |= {"router_bias_update_rate": 1e-2, "max_iters": 3}
    succeeded(train_small(dataset=play, out_dir=tmp_path, **settings, **MOE))
    entries = [SimpleNamespace(**entry) for entry in log(tmp_path) if "loss" in entry]
    assert len(entries) == 3
    for e in entries:
        load = torch.tensor(e.expert_load)
        assert load.shape == (1, 4) and abs(load.sum() - 1) < 1e-3
        assert abs(e.max_vio - (load.max() * 4 - 1)) < 1e-3 and e.max_vio == e.max_vio_mean
        assert 0 < e.router_entropy[0] <= math.log(4) and 0.5 <= e.first_gate[0] < 1
        assert e.logit_norm[0] > 0 and 0 < e.dropped[0] < 1
        assert e.dead_experts == 0 and e.z_loss > 0 and e.grad_norm > 0
