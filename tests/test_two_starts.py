"""Two runs in one folder: the first one keeps it, whatever the second does. Readers may look."""

import json
import os
import shutil
import signal
import subprocess
import threading

import pytest

from configurator import InputError
from nanomoe import checkpoint, run_dir
from nanomoe.distributed import process_id
from nanomoe.load import load
from nanomoe.run_dir import lock_run_dir
from tests.helpers import (
    assert_same_run,
    full,
    one_line,
    read_until,
    run_script,
    save_step,
    saver_for,
    start_train,
    stepped,
    succeeded,
    train,
)


def killed(process):
    process.kill()
    process.communicate()


@pytest.mark.parametrize(
    "init_from, processes", [("auto", 1), ("scratch", 1), full("resume", 1), full("auto", 2)]
)
def test_a_second_start_is_refused(init_from, processes, play, tmp_path):
    """It says who holds the folder. The first run goes on, and nothing of it is lost."""
    run = {"dataset": play, "out_dir": tmp_path / "run", "eval_interval": 5, "keep_last": 1}
    first = start_train(**run, max_iters=10**6, processes=processes)
    read_until(first, "saved ")
    second = train(**run, max_iters=9, init_from=init_from)
    holder = json.loads((run["out_dir"] / "run.lock.json").read_text())
    assert processes > 1 or holder["pid"] == first.pid
    words = str(holder["pid"]), os.uname().nodename, holder["since"]
    one_line(second, 2, "is in use by process", *words)
    read_until(first, "saved ")  # so it is alive and still saves
    first.terminate()
    out, _ = first.communicate(timeout=60)
    assert first.returncode == (143 if processes == 1 else 1) and "error: " not in out, out
    assert not list(run["out_dir"].glob("earlier-*")) and load(run["out_dir"])


@pytest.mark.repeat(2)
def test_two_starts_at_once(seed, play, tmp_path):
    """As of a job that was queued twice: one trains, the other ends with code 2."""
    run = {"dataset": play, "out_dir": tmp_path / "run", "init_from": "auto", "eval_interval": 5}
    run["decay_lr"] = False
    if seed:
        succeeded(train(**run, max_iters=5))
    both = [start_train(**run, max_iters=20) for _ in range(2)]
    outs = [process.communicate(timeout=120)[0] for process in both]
    codes = sorted(process.returncode for process in both)
    # they take a second to start, so one may also find that the other is done
    assert codes in ([0, 2], [0, 0]), outs
    if codes == [0, 2]:
        refused = outs[[process.returncode for process in both].index(2)]
        # in between, it may find that the other has made checkpoints since it looked for some
        words = ("is in use by", "while this one was starting")
        assert any(word in refused for word in words) and "Traceback" not in refused
    succeeded(train(**run | {"out_dir": tmp_path / "alone"}, max_iters=20))
    assert_same_run(run["out_dir"], tmp_path / "alone")


@pytest.mark.parametrize("processes", [1, full(2)])
def test_the_lock_of_a_killed_run_does_not_block(processes, play, tmp_path):
    run = {"dataset": play, "out_dir": tmp_path, "init_from": "auto", "eval_interval": 5}
    process = start_train(**run, max_iters=10**6)
    read_until(process, "saved ")
    killed(process)
    assert "resuming" in succeeded(
        train(**run, max_iters=10**4, max_seconds=1, processes=processes)
    )


def test_the_lock_of_a_dead_machine_does_not_block(play, tmp_path):
    (tmp_path / "run.lock").write_text("4711\nanother-machine\n")
    holder = {"host": "another-machine", "pid": 4711, "since": "2026-01-01 00:00:00"}
    (tmp_path / "run.lock.json").write_text(json.dumps(holder))
    succeeded(train(dataset=play, out_dir=tmp_path))


def test_without_locks_a_note_says_so(tmp_path, monkeypatch, capsys):
    """As on some network file systems."""

    def acquire(_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_dir.FileLock, "acquire", acquire)
    lock_run_dir(tmp_path)
    assert "has no locks" in capsys.readouterr().out
    lock_run_dir(tmp_path)  # said once
    assert capsys.readouterr().out == ""


def test_another_users_lock_is_no_missing_one(tmp_path, monkeypatch):
    def acquire(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_dir.FileLock, "acquire", acquire)
    with pytest.raises(OSError, match=r"run\.lock cannot be opened: Permission denied"):
        lock_run_dir(tmp_path)


def test_others_may_open_the_lock(tmp_path):
    lock_run_dir(tmp_path)
    assert (tmp_path / "run.lock").stat().st_mode & 0o777 == 0o666


def test_a_torchrun_between_two_attempts_has_the_folder(play, tmp_path):
    """Its processes are dead, so nobody holds the lock, and it is about to start new ones."""
    run = {"dataset": play, "out_dir": tmp_path}
    succeeded(train(**run, init_from="auto", eval_interval=1))
    torchrun = subprocess.Popen(["sleep", "600"])
    log = tmp_path / "log.jsonl"
    lines = log.read_text().splitlines()
    start = json.loads(lines[0]) | {"launchers": [process_id(torchrun.pid)]}
    log.write_text("\n".join([json.dumps(start), *lines[1:-1]]) + "\n")  # without its end
    try:
        done = train(**run, init_from="auto")
        one_line(done, 2, "is in use by torchrun", str(torchrun.pid), os.uname().nodename)
    finally:
        torchrun.kill()
        torchrun.wait()
    succeeded(train(**run, init_from="auto"))


def test_checkpoints_that_came_since_the_choice(tmp_path, monkeypatch):
    """'auto' found none, and meanwhile another run has trained: it is not moved away."""
    monkeypatch.setattr(run_dir, "held_locks", {})
    (tmp_path / "step-00000005").mkdir()
    with pytest.raises(InputError, match="while this one was starting"):
        run_dir.prepare_run_dir(tmp_path, None, auto=True)
    assert (tmp_path / "step-00000005").exists()


def test_a_refused_start_has_tried_nothing(tmp_path, monkeypatch):
    """What it makes to try the folder, the run that holds it would remove as a leftover."""
    lock_run_dir(tmp_path)
    monkeypatch.setattr(run_dir, "held_locks", {})  # as another process sees it
    monkeypatch.setattr(run_dir, "try_writing", lambda folder: pytest.fail("before the lock"))
    with pytest.raises(InputError, match="is in use by process"):
        run_dir.prepare_run_dir(tmp_path, None, auto=True)


def test_a_folder_is_locked_by_its_real_path(tmp_path, monkeypatch):
    """Through a link, too, and against a lock of this same process."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    lock_run_dir(tmp_path / "run")
    monkeypatch.setattr(run_dir, "held_locks", {})  # as another process sees it
    with pytest.raises(InputError, match="is in use by process"):
        lock_run_dir(tmp_path / "link")
    lock_run_dir(tmp_path / "missing")  # nothing to lock, and nothing is made
    assert not (tmp_path / "missing").exists()


def test_bad_settings_leave_no_lock(play, tmp_path):
    one_line(train(dataset=play, out_dir=tmp_path / "new", batch_size=0), 2, "batch_size")
    assert not (tmp_path / "new").exists()


def test_readers_need_no_lock(play, tmp_path):
    run = {"dataset": play, "out_dir": tmp_path}
    process = start_train(**run, max_iters=10**6, eval_interval=20)
    read_until(process, "saved ")
    succeeded(run_script("sample.py", out_dir=tmp_path, num_samples=1, max_new_tokens=5))
    assert "validation loss" in succeeded(train(**run, init_from="resume", eval_only=True))
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


def test_reading_while_a_run_prunes(tmp_path):
    """Whoever asks for the newest checkpoint gets one, however fast the run removes them."""
    model, optimizer = stepped()
    stop = threading.Event()

    def run():
        with saver_for(tmp_path, model, optimizer, keep_last=1) as saver:
            while not stop.is_set():
                save_step(saver, saver.now["step"] + 1)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not checkpoint.list_steps(tmp_path):
            pass
        steps = []
        while len(steps) < 40 or steps[-1] < 10:
            steps.append(load(tmp_path).step)
    finally:
        stop.set()
        thread.join()
    assert steps == sorted(steps)


def test_a_checkpoint_that_vanishes_between_two_files(tmp_path, monkeypatch):
    model, optimizer = stepped()
    with saver_for(tmp_path, model, optimizer) as saver:
        for step in (1, 2):
            save_step(saver, step)
    load_file = checkpoint.load_file

    def remove_first(path):
        if path.parent.name == "step-00000002":
            shutil.rmtree(path.parent)
        return load_file(path)

    monkeypatch.setattr(checkpoint, "load_file", remove_first)
    assert load(tmp_path).step == 1
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(InputError, match="no checkpoint in"):
        load(tmp_path)
