"""Resuming with something changed: the data goes on after the last sequence, and a line says what
is another."""

import json
import random

import pytest

from tests.helpers import altered_train, full, killed_at, succeeded, train

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
    assert out.count("resumed with") == 1
    for key, value in changed.items():
        old = {"batch_size": 4, "gradient_accumulation_steps": 2}[key]
        assert f"{key} {value} instead of {old}" in out
    new = {"batch_size": 4, "gradient_accumulation_steps": 2} | changed
    count = 40 + 3 * new["batch_size"] * new["gradient_accumulation_steps"]
    assert seen(tmp_path) == list(range(count))
    succeeded(train(**run, batch_size=5, max_iters=10))
    last = count + 2 * 5 * 2
    assert seen(tmp_path) == list(range(last))


@pytest.mark.full
@pytest.mark.repeat(2)
def test_another_batch_size(seed, play, tmp_path):
    """Through four starts of any sizes, two of them killed: no window twice, none left out."""
    rng = random.Random(seed)
    script = altered_train(tmp_path / "recording.py", RECORDING.format(path=f"{tmp_path}/windows"))
    run = {"dataset": play, "out_dir": tmp_path / "run", "init_from": "auto", "script": script}
    expected, step = 0, 0
    for start in range(4):
        sizes = {"batch_size": rng.randrange(1, 9)}
        sizes["gradient_accumulation_steps"] = rng.randrange(1, 4)
        steps = rng.randrange(1, 6)
        if start % 2:  # a start that is killed: what it did after the last save is done again
            before = {path: path.read_text() for path in tmp_path.glob("windows*")}
            killed_at(f"step {step + 3}/", **run, **sizes, max_iters=10**6, eval_interval=10**6)
            for path in tmp_path.glob("windows*"):
                path.write_text(before.get(path, ""))
        step += steps
        expected += steps * sizes["batch_size"] * sizes["gradient_accumulation_steps"]
        succeeded(train(**run, **sizes, max_iters=step))
        assert seen(tmp_path) == list(range(expected))
