"""Two runs in one folder: the first one keeps it, whatever the second does. Readers may look."""

import json
import os
import shutil
import subprocess
import threading

import pytest

from configurator import InputError
from nanomoe import checkpoint, run_dir
from nanomoe.distributed import process_id
from nanomoe.load import load
from nanomoe.run_dir import claim, lock_run_dir, prepare_run_dir
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


@pytest.mark.parametrize("processes, again", [(1, 1), full(2, 1), full(1, 2)])
def test_a_run_keeps_its_folder(processes, again, play, tmp_path):
    """A second start is refused, readers are not, and after a kill -9 the folder is free."""
    run = {"dataset": play, "out_dir": tmp_path / "run", "eval_interval": 5, "keep_last": 1}
    first = start_train(**run, max_iters=10**6, processes=processes)
    read_until(first, "saved ")
    for init_from in ("auto", "scratch"):
        second = train(**run, max_iters=9, init_from=init_from)
        holder = json.loads((run["out_dir"] / "run.lock.json").read_text())
        assert processes > 1 or holder["pid"] == first.pid
        words = str(holder["pid"]), os.uname().nodename, holder["since"]
        one_line(second, 2, "is in use by process", *words)
    sampling = {"num_samples": 1, "max_new_tokens": 5}
    succeeded(run_script("sample.py", out_dir=run["out_dir"], **sampling))
    done = train(**run, init_from="resume", eval_only=True)
    assert "validation loss" in succeeded(done)
    read_until(first, "saved ")  # so it is alive and still saves
    assert first.poll() is None and not list(run["out_dir"].glob("earlier-*"))
    if processes > 1:
        first.terminate()  # torchrun, which ends its processes
    else:
        first.kill()
    out, _ = first.communicate(timeout=60)
    assert "error: " not in out
    settings = {"init_from": "auto", "max_iters": 10**4, "max_seconds": 1, "processes": again}
    assert "resuming" in succeeded(train(**run, **settings))


@pytest.mark.full
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


@pytest.fixture
def another_process(monkeypatch):
    """From now on this process sees its locks as another one's."""
    return lambda: monkeypatch.setattr(run_dir, "held_locks", {})


def test_the_lock_of_a_dead_machine_does_not_block(tmp_path):
    (tmp_path / "run.lock").write_text("4711\nanother-machine\n")
    holder = {"host": "another-machine", "pid": 4711, "since": "2026-01-01 00:00:00"}
    (tmp_path / "run.lock.json").write_text(json.dumps(holder))
    lock_run_dir(tmp_path)
    assert json.loads((tmp_path / "run.lock.json").read_text())["pid"] == os.getpid()


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


def test_a_torchrun_between_two_attempts_has_the_folder(play, tmp_path):
    """Its processes are dead, so nobody holds the lock, and it is about to start new ones."""
    settings = {"max_iters": 2, "max_seconds": 0}
    torchrun = subprocess.Popen(["sleep", "600"])
    ids = [process_id(torchrun.pid)]
    lines = [{"start": "now", "launchers": ids}, {"step": 1, "loss": 4.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    try:
        claim(tmp_path, ids, settings)  # its own processes
        done = train(dataset=play, out_dir=tmp_path, init_from="auto")
        one_line(done, 2, "is in use by torchrun", str(torchrun.pid), os.uname().nodename)
        with open(tmp_path / "log.jsonl", "a") as file:
            file.write('{"end":"later","steps":2}\n')
        claim(tmp_path, [], settings)  # it has nothing left to do
    finally:
        torchrun.kill()
        torchrun.wait()


def test_a_folder_with_checkpoints_is_claimed(tmp_path, another_process):
    """Before one is chosen: nobody removes what this start finds."""
    claim(tmp_path / "new", [], {})
    claim(tmp_path, [], {})
    assert not list(tmp_path.iterdir())  # nothing to lose, so nothing is made
    (tmp_path / "step-00000005").mkdir()
    claim(tmp_path, [], {})
    another_process()
    with pytest.raises(InputError, match="is in use by process"):
        claim(tmp_path, [], {})


def test_checkpoints_that_came_since_the_choice(tmp_path):
    """'auto' found none, and meanwhile another run has trained: it is not moved away."""
    (tmp_path / "step-00000005").mkdir()
    with pytest.raises(InputError, match="while this one was starting"):
        prepare_run_dir(tmp_path, None, auto=True)
    assert (tmp_path / "step-00000005").exists()


def test_a_refused_start_has_tried_nothing(tmp_path, monkeypatch, another_process):
    """What it makes to try the folder, the run that holds it would remove as a leftover."""
    lock_run_dir(tmp_path)
    another_process()
    monkeypatch.setattr(run_dir, "try_writing", lambda folder: pytest.fail("before the lock"))
    with pytest.raises(InputError, match="is in use by process"):
        prepare_run_dir(tmp_path, None, auto=True)


def test_a_folder_is_locked_by_its_real_path(tmp_path, another_process):
    """Through a link, too, and against a lock of this same process."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    lock_run_dir(tmp_path / "run")
    assert (tmp_path / "run" / "run.lock").stat().st_mode & 0o777 == 0o666  # others may open it
    another_process()
    with pytest.raises(InputError, match="is in use by process"):
        lock_run_dir(tmp_path / "link")
    lock_run_dir(tmp_path / "missing")  # nothing to lock, and nothing is made
    assert not (tmp_path / "missing").exists()


def test_reading_while_a_run_prunes(tmp_path):
    """Whoever asks for the newest checkpoint gets one, however fast the run removes them."""
    model, optimizer = stepped()
    stop = threading.Event()

    def run():
        with saver_for(tmp_path, model, optimizer, keep_last=1) as saver:
            while not stop.is_set():
                save_step(saver, saver.now["step"] + 1)
                saver.add_evaluation(9.0, 9.0)

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
