"""wandb and TensorBoard: one run over all its starts, and neither of them ends a run."""

import math
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanomoe import trackers
from nanomoe.log import WANDB_ID, RunLog
from nanomoe.run_dir import prepare_run_dir
from nanomoe.trackers import TensorBoard, scalars
from tests.helpers import MOE, full, log, one_line, read_until, start_train, succeeded, train


def test_scalars():
    entry = {"step": 3, "loss": 1.5, "mfu": None, "router_entropy": [0.5, 0.25]}
    entry |= {"expert_load": [[0.5, 0.5, 0.0, 0.0], [0.25] * 4], "collapsed_layers": [0]}
    assert scalars(entry) == {
        "loss": 1.5,
        "router_entropy/layer_0": 0.5,
        "router_entropy/layer_1": 0.25,
        "max_vio/layer_0": 1.0,
        "max_vio/layer_1": 0.0,
        "dead_experts/layer_0": 2,
        "dead_experts/layer_1": 0,
        "collapsed_layers": 1,
    }


@pytest.mark.parametrize("mode", ["disabled", full("offline")])
def test_wandb_is_one_run_over_all_starts(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", mode)
    settings = {"wandb_log": True, "tensorboard_log": False}
    settings |= {"wandb_project": "a", "wandb_run_name": "b"}
    routing = {"expert_load": [[0.5, 0.5], [0.25, 0.75]], "collapsed_layers": []}
    ids, lines = [], []
    (tmp_path / WANDB_ID).touch()  # an empty file, as a kill may leave it, is no id
    for first in (0, 2):
        with RunLog(tmp_path, first, settings) as run_log:
            run = run_log.trackers.open["wandb_log"].run
            assert run.settings.resume == "allow"  # with this id the server continues the run
            ids.append(run.id)
            send = run.log

            def record(line, send=send):
                lines.append(line)
                send(line)

            monkeypatch.setattr(run, "log", record)
            for step in (first + 1, first + 2):
                run_log.write(step=step, loss=1 / step, **routing)
            run_log.write(step=step, seconds=1.0, val_loss=2.0)
        assert not run_log.trackers.open  # they are closed
    assert ids[0] == ids[1] == (tmp_path / WANDB_ID).read_text() and len(ids[0]) == 8
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert steps == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert {"max_vio/layer_0", "dead_experts/layer_1"} <= lines[0].keys()
    assert not any(isinstance(value, list) for line in lines for value in line.values())
    pictures = {line["step"]: line["expert_load"] for line in lines if "expert_load" in line}
    assert [*pictures] == [2, 4] and pictures[2].image.height > 100
    # another run in the same folder is another run of wandb
    prepare_run_dir(str(tmp_path), None, auto=False)
    assert (tmp_path / "earlier-1" / WANDB_ID).read_text() == ids[0]
    assert not (tmp_path / WANDB_ID).exists()


def test_wandb_without_login_is_one_line(play, tmp_path, monkeypatch):
    for key in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    start = time.monotonic()
    done = train(out_dir=tmp_path, dataset=play, wandb_log=True)
    one_line(done, 2, "wandb_log is on, but there is no login")
    assert time.monotonic() - start < 60  # and no prompt that waits


@pytest.fixture
def refusing():
    """The address of a server that refuses every key."""

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_error(401)

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("ranks, why", [full(1, "network"), full(2, "network"), full(1, "key")])
def test_without_wandb_the_run_goes_on(ranks, why, refusing, play, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", refusing if why == "key" else "http://127.0.0.1:9")
    start = time.monotonic()
    done = train(out_dir=tmp_path, dataset=play, wandb_log=True, processes=ranks)
    lines = succeeded(done).replace(str(tmp_path), "").splitlines()  # its path has the word, too
    notes = [line for line in lines if "wandb" in line.split(" is ")[0]]
    assert len(notes) == 1 and notes[0].startswith("note: wandb_log is off from here on (")
    assert "Traceback" not in done.stderr and "wandb" not in done.stderr, done.stderr
    assert log(tmp_path)[-1]["steps"] == 2 and time.monotonic() - start < 120


class Failing:
    def __init__(self, *args):
        pass

    def write(self, step, numbers):
        raise RuntimeError("wandb has lost its server")

    def close(self):
        raise RuntimeError("it is closed already")


def test_trackers_that_fail_or_are_not_there(tmp_path, monkeypatch, capsys):
    """Each says so in one line, and log.jsonl has everything."""
    monkeypatch.setattr(trackers, "WandB", Failing)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path, 0, {"wandb_log": True, "tensorboard_log": True}) as run_log:
        for step in (1, 2, 3):
            run_log.write(step=step, loss=1.5)
    failing, missing = sorted(
        capsys.readouterr().out.splitlines(), key=lambda line: "wandb" not in line
    )
    assert failing == (
        "note: wandb_log is off from here on (RuntimeError: wandb has lost its server); log.jsonl "
        "has everything"
    )
    assert missing.startswith("note: tensorboard_log is off from here on (")
    assert "pip install tensorboard" in missing
    assert [entry["step"] for entry in log(tmp_path)] == [1, 2, 3]
    quiet = RunLog(tmp_path, 3, {"wandb_log": False, "tensorboard_log": False})
    assert quiet.trackers is None  # so nothing of them is loaded


def events_in(folder):
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_tensorboard(play, tmp_path):
    pytest.importorskip("tensorboard")
    run = {"dataset": play, "out_dir": tmp_path, "tensorboard_log": True, "eval_interval": 2, **MOE}
    succeeded(train(**run, max_iters=3))
    succeeded(train(**run, max_iters=4, init_from="resume"))
    events = events_in(tmp_path / "tensorboard")
    losses = {event.step: event.value for event in events.Scalars("loss")}
    logged = {entry["step"]: entry["loss"] for entry in log(tmp_path) if "loss" in entry}
    assert losses.keys() == logged.keys() == {1, 2, 3, 4}
    assert all(math.isclose(losses[step], logged[step], rel_tol=1e-6) for step in losses)
    assert {"val_loss", "router_entropy/layer_0", "max_vio/layer_1"} <= {*events.Tags()["scalars"]}
    assert [event.step for event in events.Images("expert_load")] == [2, 3, 4]


def test_tensorboard_shows_no_step_twice(tmp_path):
    """Steps 3 and 4 were lost with a killed process; the next one resumes after step 2."""
    pytest.importorskip("tensorboard")
    for first, last, value in ((0, 4, 1.0), (2, 5, 2.0)):
        tensorboard = TensorBoard(tmp_path, first, {})
        for step in range(first + 1, last + 1):
            tensorboard.write(step, {"loss": value})
        tensorboard.close()
    found = [(event.step, event.value) for event in events_in(tmp_path).Scalars("loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


@pytest.mark.full
def test_wandb_that_answers_no_more_holds_no_run_up(play, tmp_path, monkeypatch):
    """Its own process is stopped. The run ends well, after a time limit, and says so."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = start_train(
        dataset=play, out_dir=tmp_path, wandb_log=True, max_iters=300, log_interval=50, **MOE
    )
    out = read_until(run, "| loss")
    found = subprocess.run(["pgrep", "-P", str(run.pid), "wandb-core"], capture_output=True)
    core = int(found.stdout)
    os.kill(core, signal.SIGSTOP)
    try:
        assert run.wait(90) == 0
    finally:
        os.kill(core, signal.SIGKILL)
    out += run.communicate()[0]
    assert out.count("note: wandb_log is off from here on (TimeoutError: not all is uploaded") == 1
    assert "Traceback" not in out and log(tmp_path)[-1]["steps"] == 300
