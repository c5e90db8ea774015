"""Saving while training goes on changes nothing, and a failed save ends the run. Whatever fails
after a step costs no step: the state is saved, then the error is told."""

import json
import os
import random
import shutil
import tracemalloc

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
    losses,
    save_step,
    saver_for,
    small_model,
    start_train,
    stepped,
    succeeded,
    train,
)

# for altered_train(): a file of more bytes does not fit on the disk
FILES_UP_TO = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


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
    change = BACKGROUND * background + FILES_UP_TO.format(100_000) * (harm == "full")
    script = altered_train(tmp_path / "altered.py", change)
    succeeded(train(**run, max_iters=2))
    before = {p.name: p.read_bytes() for p in checkpoint.latest_good(out_dir).iterdir()}
    process = start_train(**run, eval_interval=100, max_iters=10**6, script=script)
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
    assert list(kept.parent.glob("step-*")) == [kept]  # no half of another one
    assert harm != "vanished" or not out_dir.exists()


def test_a_full_disk_is_one_line_that_names_the_file(play, tmp_path):
    """Also when it is the log; the last step, which is then saved, does not fit either."""
    script = altered_train(tmp_path / "limited.py", FILES_UP_TO.format(9000))
    out_dir = tmp_path / "run"
    done = train(dataset=play, out_dir=out_dir, max_iters=1000, script=script)
    out = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in out and "Exception" not in out, out
    assert f"note: the last step is not saved: could not write checkpoint {out_dir}/step-" in out
    assert [line for line in out.splitlines() if line.startswith("error")] == [
        f"error: could not write {out_dir / 'log.jsonl'}: File too large"
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


# -----------------------------------------------------------------------------
# what fails after a step

# what fails: lines for altered_train(), which fail in the first start alone, at step 5
FAILS = """
def fail(*args, **options):
    raise {error}
"""
FAILURES = {
    "evaluation, a bug": FAILS.format(error="RuntimeError('a bug')") + "train.GPT.eval = fail",
    "evaluation, no memory": FAILS.format(error="MemoryError('full')") + "train.GPT.eval = fail",
    "evaluation, a file": FAILS.format(error="OSError('no val.bin')") + "train.GPT.eval = fail",
    "log": """
write = train.RunLog.write
def fail(self, **entry):
    if self.path and entry.get("step") == 5:
        file, self.file = self.file, open("/dev/full", "wb", buffering=0)
        write(self, **entry)
        self.file = file
    else:
        write(self, **entry)
train.RunLog.write = fail
""",
    "console": """
import builtins
say = print
def fail(*words, **options):
    if str(words[0]).startswith("step 5/") and "| loss" in words[0]:
        raise BrokenPipeError("whoever read our output has gone")
    say(*words, **options)
builtins.print = fail
""",
    "prune": FAILS.format(error="OSError('no permission')") + "checkpoint.prune = fail",
    "sample": FAILS.format(error="MemoryError('full')") + "train.GPT.generate = fail",
}
FAILURES = {what: "import model\ntrain.GPT = model.GPT" + lines for what, lines in FAILURES.items()}
FAST = ("evaluation, a bug", "log", "prune", "sample")


def run_settings(play, out_dir, **more):
    run = {"dataset": play, "out_dir": out_dir, "eval_interval": 5, "dropout": 0.1}
    return run | {"decay_lr": False} | more


@pytest.fixture(scope="module")
def undisturbed(play, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    succeeded(train(**run_settings(play, out_dir), max_iters=8))
    return out_dir


@pytest.mark.parametrize(
    "what, always_save",
    [
        *[(what, True) if what in FAST else full(what, True) for what in FAILURES],
        *[full(what, False) for what in FAILURES],
    ],
)
def test_a_failure_costs_no_step(what, always_save, undisturbed, play, tmp_path):
    script = altered_train(tmp_path / "altered.py", FAILURES[what])
    run = run_settings(play, tmp_path / "run", always_save_checkpoint=always_save)
    done = train(**run, max_iters=5 if what == "sample" else 8, script=script)
    # the console: like `train.py | head`
    assert done.returncode == (what != "console"), done.stdout + done.stderr
    path = checkpoint.latest_good(run["out_dir"])
    assert path.name == "step-00000005"
    if what == "evaluation, a bug":
        log_file = run["out_dir"] / "log.jsonl"
        before = {file: file.read_bytes() for file in [*path.iterdir(), log_file]}
        done = train(**run, max_iters=8, init_from="auto", eval_only=True)
        assert "step 5/8 | validation loss" in succeeded(done)
        # a reader changes nothing, also where the loss is missing
        assert before == {file: file.read_bytes() for file in [*path.iterdir(), log_file]}
        assert checkpoint.read_facts(path)["val_loss"] is None
    succeeded(train(**run, max_iters=8, init_from="auto"))
    if what == "log":  # only that line is missing
        with open(tmp_path / "run" / "log.jsonl", "a") as file:
            file.write(json.dumps(losses(undisturbed)[5]))
    assert_same_run(tmp_path / "run", undisturbed)
    assert val_losses(tmp_path / "run") == val_losses(undisturbed)


def val_losses(out_dir):
    """What the checkpoints say; the best one is found by it."""
    steps = checkpoint.list_steps(out_dir)
    return {path.name: checkpoint.read_facts(path)["val_loss"] for path in steps}


def test_a_step_that_is_half_done_is_not_saved(play, tmp_path):
    """If it fails after the optimizer, weights, moments and balance may not fit each other."""
    change = """
import model
update, calls = model.GPT.update_balance, []
def fail(self, *args, **options):
    calls.append(1)
    if len(calls) == 7:
        raise MemoryError("out of memory in the update")
    return update(self, *args, **options)
model.GPT.update_balance = fail
"""
    script = altered_train(tmp_path / "altered.py", change)
    done = train(**run_settings(play, tmp_path / "run"), max_iters=8, script=script)
    assert done.returncode == 1 and "error: out of memory" in done.stderr
    assert load(tmp_path / "run").step == 5


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    "error, saved",
    [(RuntimeError, 2), (MemoryError, 2), (KeyboardInterrupt, 1), (FloatingPointError, 1)],
)
def test_what_an_error_saves(error, saved, background, tmp_path):
    """The last whole state. But Ctrl-C wants to end now, and numbers that are not finite are not
    worth keeping."""
    model, optimizer = stepped()
    with pytest.raises(error), saver_for(tmp_path, model, optimizer, 0, background) as saver:
        save_step(saver, 1)
        with saver.changing():
            saver.now["step"] = 2
        assert not saver.is_saved
        raise error
    assert [checkpoint.step_of(path) for path in checkpoint.list_steps(tmp_path)][-1] == saved


def test_the_saver_cannot_be_used_in_the_wrong_order(tmp_path):
    model, optimizer = stepped()
    with saver_for(tmp_path, model, optimizer) as saver:
        saver.save()  # before the first step there is nothing to save
        assert saver.is_saved and not checkpoint.list_steps(tmp_path)
        save_step(saver, 1, val_loss=2.0)
        saver.save(), saver.copy()
        with pytest.raises(RuntimeError, match="its step is still 1"), saver.changing():
            pass
        with saver.changing():
            saver.now |= {"step": 2, "best_val_loss": 2.0}
        with pytest.raises(RuntimeError, match="is not saved yet"):
            saver.add_evaluation(1.0, 1.0)  # it would be step 1's
        saver.save()
        saver.add_evaluation(1.5, 1.5)
    with pytest.raises(MemoryError), saver_for(tmp_path, model, optimizer, 0, True) as saver:
        with saver.changing():
            saver.now["step"] = 3
        saver.copy()
        with saver.changing(), torch.no_grad():
            saver.now["step"] = 4
            model.transformer.ln_f.weight.fill_(4)
        saver.save()  # not the copy, which is of the state before
        with saver.changing():
            saver.now["step"] = 5
        saver.copy()
        with saver.changing():
            saver.now["step"] = 6
            raise MemoryError
    first, second, last = (load(path) for path in checkpoint.list_steps(tmp_path))
    assert (first.step, first.val_loss, first.best_val_loss) == (1, 2.0, 2.0)
    assert (second.step, second.val_loss, second.best_val_loss) == (2, 1.5, 1.5)
    assert last.step == 4 and (last.weights["transformer.ln_f.weight"] == 4).all()


def test_a_loss_that_is_not_the_best(tmp_path):
    model, optimizer = stepped()
    for step, loss in ((1, float("nan")), (2, 3.0), (3, 1.0)):
        with saver_for(tmp_path, model, optimizer, best_val_loss=2.0) as saver:
            save_step(saver, step, loss)
    assert [load(tmp_path / str(step)).best_val_loss for step in (1, 2, 3)] == [2.0, 2.0, 1.0]


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("failing", [0, 1, None])
def test_an_error_on_two_ranks_costs_no_step(failing, parallel, play, tmp_path):
    """In one rank's evaluation: FSDP's state is copied before, so rank 0 has it, whoever fails. In
    the log, which all ranks learn of after the next step: then they save together."""
    change, interval, saved = FAILURES["log"], 100, 6
    if failing is not None:
        failure = FAILURES["evaluation, no memory"]
        change, interval, saved = f"if rank == {failing}: exec({failure!r}, globals())", 5, 5
    script = altered_train(tmp_path / "altered.py", change)
    run = run_settings(play, tmp_path / "run", parallel=parallel, eval_interval=interval)
    run["log_interval"] = 5
    process = start_train(**run, processes=2, max_iters=8 if saved == 6 else 5, script=script)
    out, _ = process.communicate(timeout=120)
    assert process.returncode and "error: " in out, out
    assert load(run["out_dir"]).step == saved


@pytest.mark.full
@pytest.mark.repeat(2)
def test_an_error_in_an_evaluation(seed, play, tmp_path):
    """At a random step, of a random kind, with a random number of steps since the last save."""
    rng = random.Random(seed)
    every, number = rng.randrange(1, 9), rng.randrange(1, 5)
    kind = rng.choice(["MemoryError", "OSError", "RuntimeError", "ValueError", "InputError"])
    change = f"""
import model
from configurator import InputError
evaluate, calls = model.GPT.eval, []
def fail(self):
    calls.append(1)
    if len(calls) == {number}:
        raise {kind}("it fails")
    return evaluate(self)
model.GPT.eval = fail
"""
    script = altered_train(tmp_path / "altered.py", change)
    run = run_settings(play, tmp_path / "run", eval_interval=every, max_iters=40)
    run["always_save_checkpoint"] = rng.random() < 0.5
    done = train(**run, script=script)
    assert done.returncode == (2 if kind == "InputError" else 1), done.stdout + done.stderr
    assert load(run["out_dir"]).step == every * number
    succeeded(train(**run, init_from="auto"))
    succeeded(train(**run | {"out_dir": tmp_path / "undisturbed"}))
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")
