"""Saving while training goes on: it changes nothing, and a failed save ends the run."""

import os
import resource
import shutil
import tracemalloc
from functools import partial

import pytest
import torch

from nanomoe import checkpoint
from nanomoe.load import load
from nanomoe.optim import build_optimizer
from tests.helpers import (
    BACKGROUND,
    MOE,
    altered_train,
    assert_same_run,
    full,
    save_step,
    saver_for,
    small_model,
    start_train,
    stepped,
    succeeded,
    train,
)


def test_a_background_save_holds_the_state_at_its_call(tmp_path, capfd):
    """A change to weights and moments while the file is being written does not enter it."""
    model = small_model(n_embd=256, n_head=2)
    optimizer = build_optimizer(model, "adamw", 1e-2, 0.1, (0.9, 0.95), "cpu")
    for p in model.parameters():
        moments = {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p)}
        optimizer.state[p] = {"step": torch.tensor(1.0)} | moments
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with saver_for(tmp_path, model, optimizer, background=True) as saver:
        save_step(saver, 1)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
                optimizer.state[p]["exp_avg"].zero_()
    assert capfd.readouterr().out.count(f"saved {tmp_path}") == 1
    loaded = load(tmp_path)
    assert all(loaded.weights[name].equal(before[name]) for name in loaded.weights)
    moments = loaded.training_state()["optimizer"]["state"].values()
    assert all((entry["exp_avg"] == 1).all() for entry in moments)


def test_background_saves_change_nothing(play, tmp_path):
    run = {"dataset": play, "max_iters": 9, "eval_interval": 2, **MOE}
    background = altered_train(tmp_path / "background.py", BACKGROUND)
    for name, script in (("a", "train.py"), ("b", background)):
        out = succeeded(train(**run, out_dir=tmp_path / name, script=script))
        assert out.count("saved ") == 5
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_what_was_just_written_is_not_read_again(tmp_path, monkeypatch):
    """Neither by the save, which hashes it on its way, nor to prune, nor to add a loss."""
    monkeypatch.setattr(checkpoint.hashlib, "file_digest", lambda *_: pytest.fail("it is read"))
    model, optimizer = stepped()
    with saver_for(tmp_path, model, optimizer, keep_last=1) as saver:
        for step in (1, 2, 3):
            save_step(saver, step)
            saver.add_evaluation(1.0 + step, 2.0)
    monkeypatch.undo()
    assert [path.name[-1] for path in checkpoint.list_steps(tmp_path)] == ["1", "3"]
    for path in checkpoint.list_steps(tmp_path):
        checkpoint.verify(path)


def test_the_order_of_a_save(tmp_path, monkeypatch):
    """Every file is on the disk before the manifest is begun, and that before the folder gets its
    name. The name is on the disk before another checkpoint goes."""
    model, optimizer = stepped()
    done, fsync, rename = [], os.fsync, os.rename

    def name_of(path):
        return os.path.basename(path).split(".tmp")[0]

    def note_fsync(descriptor):
        done.append(name_of(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_rename(old, new):
        done.append(f"rename {name_of(old)}")
        rename(old, new)

    with saver_for(tmp_path, model, optimizer, keep_last=1) as saver:
        save_step(saver, 1)
        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "rename", note_rename)
        save_step(saver, 2)
        files = [*checkpoint.FILES, "manifest.json", "step-00000002"]
        assert done == [*files, "rename step-00000002", tmp_path.name, "rename step-00000001"]
        done.clear()
        saver.add_evaluation(1.0, 1.0)
        assert done == ["evaluation.json", "step-00000002"]


@pytest.mark.parametrize(
    "harm, background",
    [
        ("full", True),
        ("vanished", False),
        full("full", False),
        full("vanished", True),
        full("a file in its place", False),
        full("a file in its place", True),
    ],
)
def test_a_save_that_fails_ends_the_run(harm, background, play, tmp_path):
    """One line, exit code 1, and the checkpoint before stays whole. It is never silent."""
    out_dir, moved = tmp_path / "run", tmp_path / "moved"
    run = {"dataset": play, "out_dir": out_dir, "init_from": "auto"}
    script = altered_train(tmp_path / "background.py", BACKGROUND) if background else "train.py"
    succeeded(train(**run, max_iters=2))
    before = {p.name: p.read_bytes() for p in checkpoint.latest_good(out_dir).iterdir()}
    options = {}
    if harm == "full":
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
        options = {"preexec": limit}
    process = start_train(**run, eval_interval=100, max_iters=10**6, script=script, **options)
    for line in process.stdout:
        if "step 20/" in line:
            if harm != "full":
                shutil.move(out_dir, moved)
            if harm == "a file in its place":
                out_dir.write_text("")
            break
    rest, _ = process.communicate(timeout=120)
    errors = [line for line in rest.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and len(errors) == 1 and "Traceback" not in rest, rest
    assert "could not write checkpoint" in errors[0] and "step-00000100" in errors[0]
    kept = checkpoint.latest_good(out_dir if harm == "full" else moved)
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == before
    assert harm != "vanished" or not out_dir.exists()


def test_a_full_disk_is_one_line_that_names_the_file(play, tmp_path):
    """Also when it is the log; the last step, which is then saved, does not fit either."""
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (9000, 9000))
    process = start_train(dataset=play, out_dir=tmp_path, max_iters=1000, preexec=limit)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in out and "Exception" not in out, out
    assert f"note: the last step is not saved: could not write checkpoint {tmp_path}/step-" in out
    assert [line for line in out.splitlines() if line.startswith("error")] == [
        f"error: could not write {tmp_path / 'log.jsonl'}: File too large"
    ]


def test_the_best_is_known_once_its_loss_is(tmp_path):
    with saver_for(tmp_path, *stepped(), keep_last=1) as saver:
        save_step(saver, 1, val_loss=2.0)
        save_step(saver, 2)
        assert len(checkpoint.list_steps(tmp_path)) == 2  # the best so far is kept, too
        saver.add_evaluation(1.0, 1.0)
        assert [path.name for path in checkpoint.list_steps(tmp_path)] == ["step-00000002"]


def test_a_loss_for_a_save_that_has_failed(tmp_path, monkeypatch, capfd):
    """The save's error is told, and nothing else."""

    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(checkpoint, "write", fail)
    saver = saver_for(tmp_path, *stepped(), background=True)
    with pytest.raises(OSError, match="no room"), saver:
        save_step(saver, 1)
        saver.add_evaluation(1.0, 1.0)
        saver.pending[0].exception()  # waits
        with saver.changing():
            pytest.fail("it goes on")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("copied", [True, False])
def test_one_process_saves_a_cut_model_alone_if_it_has_a_copy(copied, tmp_path):
    """Without a copy the others are needed, and one of them may be dead."""
    model, optimizer = stepped()
    for p in model.parameters():
        p.full_tensor = None  # as FSDP's have it
    with pytest.raises(OSError, match="later"), saver_for(tmp_path, model, optimizer) as saver:
        with saver.changing():
            saver.now["step"] = 1
        if copied:
            saver.copy()
        raise OSError("later")
    assert len(checkpoint.list_steps(tmp_path)) == copied


def test_weights_are_not_copied_to_be_written(tmp_path):
    """nanomoe/README.md says how much memory a save takes: 12 bytes per parameter."""
    weights = {f"{i}": torch.zeros(2**20) for i in range(10)}  # 40 MB
    tracemalloc.start()
    checkpoint.write(tmp_path, 1, weights, {"optimizer": {"state": weights}}, {})
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4e6
