"""Resuming with something changed: the data goes on after the last sequence, and a line says what
is another."""

import json
import random

import pytest

from tests.helpers import (
    altered_train,
    assert_same_run,
    full,
    log,
    read_until,
    run_script,
    start_train,
    succeeded,
    train,
)

# train.py that writes down which windows it trains on
RECORDING = """
import json
next_batch = train.BatchReader.next
def recorded(self):
    first, windows = next_batch(self)
    with open({path!r} + str(rank), "a") as file:
        print(json.dumps(list(range(first, first + self.batch_size))), file=file)
    return first, windows
train.BatchReader.next = recorded
"""


def seen(folder):
    """The numbers of all windows that were trained on, in order."""
    numbers = []
    for path in folder.glob("windows*"):
        for line in path.read_text().splitlines():
            numbers += json.loads(line)
    return sorted(numbers)


@pytest.mark.parametrize(
    "changed, processes",
    [
        ({"batch_size": 2}, 1),
        ({"batch_size": 3}, 1),
        ({"batch_size": 8, "gradient_accumulation_steps": 1}, 1),
        full({"gradient_accumulation_steps": 6}, 1),
        full({"batch_size": 1, "gradient_accumulation_steps": 4}, 2),
    ],
)
def test_no_window_twice_and_none_left_out(changed, processes, play, tmp_path):
    """Also after a second change."""
    script = altered_train(tmp_path / "recording.py", RECORDING.format(path=f"{tmp_path}/windows"))
    run = {"dataset": play, "out_dir": tmp_path / "run", "init_from": "auto", "script": script}
    succeeded(train(**run, max_iters=5))
    assert seen(tmp_path) == list(range(5 * 2 * 4))
    out = succeeded(train(**run, **changed, ranks=processes, max_iters=8))
    for key, value in changed.items():
        old = {"batch_size": 4, "gradient_accumulation_steps": 2}[key]
        assert f"{key} {value} instead of {old}" in out
    new = {"batch_size": 4, "gradient_accumulation_steps": 2} | changed
    count = 40 + 3 * new["batch_size"] * new["gradient_accumulation_steps"]
    assert seen(tmp_path) == list(range(count))
    succeeded(train(**run, batch_size=5, max_iters=10))
    last = count + 2 * 5 * 2
    assert seen(tmp_path) == list(range(last))


def test_every_change_of_what_is_learned_is_said(play, tmp_path):
    run = {"dataset": play, "out_dir": tmp_path}
    succeeded(train(**run))
    changes = {
        "learning_rate": (6e-4, 1e-3),
        "seed": (1337, 7),
        "weight_decay": (0.1, 0.2),
        "grad_clip": (1.0, 0.5),
        "beta2": (0.95, 0.99),
        "lr_schedule": ("cosine", "wsd"),
    }
    new = {key: values[1] for key, values in changes.items()}
    out = succeeded(train(**run, **new, max_iters=4, log_interval=2, init_from="resume"))
    lines = [line for line in out.splitlines() if line.startswith("resumed with ")]
    assert len(lines) == 1
    for key, (old, value) in changes.items():
        assert f"{key} {value} instead of {old}" in lines[0]
    assert "log_interval" not in lines[0]


def test_nothing_changed_says_nothing(play, tmp_path):
    """And the run is that of one start, to the last bit."""
    run = {"dataset": play, "dropout": 0.2, "decay_lr": False, "eval_interval": 3}
    process = start_train(**run, out_dir=tmp_path / "run", max_iters=6)
    process.communicate(timeout=60)
    succeeded(train(**run, out_dir=tmp_path / "alone", max_iters=6))
    out = succeeded(train(**run, out_dir=tmp_path / "run", max_iters=6, init_from="resume"))
    assert "resumed with" not in out
    assert_same_run(tmp_path / "run", tmp_path / "alone")


def test_dtype_is_what_is_computed_in(play, tmp_path):
    """'auto' keeps what the run had, so it is no change."""
    succeeded(train(dataset=play, out_dir=tmp_path))
    script = ["train.py", f"--out_dir={tmp_path}", "--device=cpu", "--init_from=resume"]
    done = run_script(*script, max_iters=4, dtype="auto", sample_tokens=0)
    assert "resumed with max_iters 4 instead of 2\n" in succeeded(done)


def test_an_evaluation_of_a_resumed_run_says_nothing_of_sequences(play, tmp_path):
    succeeded(train(dataset=play, out_dir=tmp_path))
    done = run_script("train.py", out_dir=tmp_path, init_from="resume", eval_only=True)
    assert "validation loss" in succeeded(done)
    assert "end" in log(tmp_path)[-1]


@pytest.mark.full
@pytest.mark.repeat(2)
def test_another_batch_size(seed, play, tmp_path):
    """Through four starts of any sizes, two of them killed: no window twice, none left out."""
    rng = random.Random(seed)
    script = altered_train(tmp_path / "recording.py", RECORDING.format(path=f"{tmp_path}/windows"))
    run = {"dataset": play, "out_dir": tmp_path / "run", "init_from": "auto", "script": script}
    expected, step = 0, 0
    for start in range(4):
        sizes = {
            "batch_size": rng.randrange(1, 9),
            "gradient_accumulation_steps": rng.randrange(1, 4),
        }
        steps = rng.randrange(1, 6)
        if start % 2:  # a start that is killed: what it did after the last save is done again
            before = {path: path.read_text() for path in tmp_path.glob("windows*")}
            process = start_train(**run, **sizes, max_iters=10**6, eval_interval=10**6)
            read_until(process, f"step {step + 3}/")
            process.kill()
            process.communicate()
            for path in tmp_path.glob("windows*"):
                path.write_text(before.get(path, ""))
        step += steps
        expected += steps * sizes["batch_size"] * sizes["gradient_accumulation_steps"]
        succeeded(train(**run, **sizes, max_iters=step))
        assert seen(tmp_path) == list(range(expected))
