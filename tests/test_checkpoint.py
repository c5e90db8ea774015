"""Checkpoints: what is written comes back, and nothing that is read is executed."""

import contextlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from configurator import InputError
from nanomoe import checkpoint
from nanomoe.load import find, load
from nanomoe.optim import build_optimizer
from nanomoe.run_dir import check_disk_space
from tests.helpers import (
    MOE,
    ROOT,
    Bomb,
    fit_manifest,
    nanogpt_file,
    save_step,
    saver_for,
    stepped,
    tokens,
)

IN_A_CHECKPOINT = [*checkpoint.FILES, "manifest.json"]


def save(out_dir, step=2, val_loss=1.5, settings=None, **model_settings):
    model, optimizer = stepped(**model_settings)
    out_dir.mkdir(exist_ok=True)
    run = settings or {"dataset": "play"}
    facts = {"run": run, "seconds": 60.0, "best_val_loss": 1.25}
    with saver_for(out_dir, model, optimizer, **facts) as saver:
        save_step(saver, step, val_loss)
    return out_dir / f"step-{step:08d}", model, optimizer


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_weights": False, "position": "rope"}, MOE, MOE | {"bias": False}],
    ids=str,
)
def test_round_trip(tmp_path, settings):
    path, model, optimizer = save(tmp_path, **settings)
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
        "training.pt",
    ]
    assert path.name == "step-00000002" and list(tmp_path.iterdir()) == [
        path
    ]  # no temporary folder is left
    loaded = load(tmp_path)
    assert (loaded.step, loaded.val_loss, loaded.best_val_loss, loaded.settings) == (
        2,
        1.5,
        1.25,
        {"dataset": "play"},
    )
    assert loaded.config == model.config and type(loaded.config) is type(model.config)
    again = loaded.build_model()
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, p in model.state_dict().items():
        assert (again.state_dict()[name] == p).all(), name
    assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tie_weights
    # one more step of both gives the same weights, so the optimizer's state came back, too
    optimizer2 = build_optimizer(again, "adamw", 1e-2, 0.1, (0.9, 0.95), "cpu")
    optimizer2.load_state_dict(loaded.training_state()["optimizer"])
    for m, o in ((model, optimizer), (again, optimizer2)):
        m(tokens(2, 16), tokens(2, 16))[1].backward()
        o.step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert (a == b).all()


def test_find_and_prune(tmp_path):
    for step, loss in ((10, 3.0), (20, 1.0), (9, 4.0), (30, 2.0), (100, 2.5)):
        save(tmp_path, step, loss)
    assert checkpoint.latest_good(tmp_path).name == "step-00000100"
    assert find(tmp_path / "step-00000009").name == "step-00000009"
    checkpoint.prune(tmp_path, 0)
    assert len(checkpoint.list_steps(tmp_path)) == 5
    checkpoint.prune(tmp_path, 2)  # the two newest, and the best
    assert [p.name for p in checkpoint.list_steps(tmp_path)] == [
        "step-00000020",
        "step-00000030",
        "step-00000100",
    ]
    save(tmp_path, 5, float("nan"))
    checkpoint.prune(tmp_path, 3)  # a NaN loss is never the best
    assert [p.name for p in checkpoint.list_steps(tmp_path)] == [
        "step-00000020",
        "step-00000030",
        "step-00000100",
    ]
    (tmp_path / "step-00000001").mkdir()  # a damaged one is not the best, and is no reason to fail
    (tmp_path / "step-00000020" / "config.json").write_text("")
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.list_steps(tmp_path)] == ["step-00000030", "step-00000100"]
    (tmp_path / "step-00000200.tmp-1").mkdir()  # what a killed save leaves does not count
    assert checkpoint.latest_good(tmp_path).name == "step-00000100"


def test_a_router_without_its_balance_is_refused(tmp_path):
    """Its bias and load are state of the run: without them a resumed run would differ."""
    path = save(tmp_path, use_moe=True)[0]
    weights = load_file(path / "model.safetensors")
    save_file(
        {
            name: w
            for name, w in weights.items()
            if not name.endswith(("router.bias", "router.load"))
        },
        path / "model.safetensors",
    )
    fit_manifest(path)
    with pytest.raises(
        InputError, match=r"mlp\.router\.bias: expected \(4,\), found None; .*router\.load"
    ):
        load(tmp_path).build_model()


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", '"x"'),
        ("config.json", '{"step": "x", "model": {}, "run": {}}'),
        ("config.json", '{"step": 3, "model": "x"}'),
    ],
)
def test_nonsense_is_damaged(tmp_path, name, text):
    path, _, _ = save(tmp_path)
    (path / name).write_text(text)
    fit_manifest(path)  # a manifest that fits, over bad contents
    with pytest.raises(OSError, match="is damaged"):
        load(tmp_path)


def test_what_is_gone_from_the_settings_does_not_matter(tmp_path):
    """An implementation and keys of earlier versions, in the model's config and the run's."""
    path, model, _ = save(tmp_path, **MOE)
    facts = json.loads((path / "config.json").read_text())
    for part in ("model", "run"):
        facts[part] |= {"expert_impl": "split", "upcycle_noise": 0.5, "no_such_key": [1]}
    (path / "config.json").write_text(json.dumps(facts))
    fit_manifest(path)
    loaded = checkpoint.read(path)
    assert loaded.config.expert_impl == loaded.settings["expert_impl"] == "auto"
    assert loaded.config == model.config and loaded.has_training_state
    loaded.build_model()(tokens(2, 16))
    # what exists stays as it is
    facts["model"]["expert_impl"] = facts["run"]["expert_impl"] = "loop"
    (path / "config.json").write_text(json.dumps(facts))
    fit_manifest(path)
    loaded = checkpoint.read(path)
    assert loaded.config.expert_impl == loaded.settings["expert_impl"] == "loop"


def test_training_state_without_an_optimizer_is_damaged(tmp_path):
    path, _, _ = save(tmp_path)
    torch.save({}, path / "training.pt")
    fit_manifest(path)
    with pytest.raises(OSError, match="no state of an optimizer"):
        load(tmp_path).training_state()


def test_training_from_scratch_does_not_load_the_reader_of_transformers_models(tmp_path):
    code = (
        "import sys, train; from nanomoe.init_from import choose_start\n"
        f"settings = vars(train) | {{'out_dir': {str(tmp_path)!r}}}\n"
        "choose_start(settings, {})\n"
        "print(sorted(name for name in sys.modules if name.startswith('nanomoe.hf')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def test_a_place_without_a_checkpoint(tmp_path):
    with pytest.raises(InputError, match="no checkpoint in"):
        load(tmp_path)
    with pytest.raises(InputError, match="no checkpoint at"):
        load(tmp_path / "nowhere")


def test_nanogpt_checkpoint(tmp_path):
    model, optimizer = stepped()
    nanogpt_file(tmp_path / "ckpt.pt", model, optimizer)
    loaded = load(tmp_path)
    assert (loaded.step, loaded.best_val_loss, loaded.settings["dataset"]) == (
        2,
        1.5,
        "shakespeare_char",
    )
    idx = tokens(2, 16)
    assert torch.equal(loaded.build_model()(idx, idx)[0], model(idx, idx)[0])
    again = build_optimizer(loaded.build_model(), "adamw", 1e-2, 0.1, (0.9, 0.95), "cpu")
    again.load_state_dict(loaded.training_state()["optimizer"])
    assert len(again.state) == len(optimizer.state)
    torch.save({"model": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="is not a nanoGPT checkpoint: KeyError: 'model_args'"):
        load(tmp_path)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: torch.save({"model": Bomb()}, p),
        lambda p: torch.save({"model": Bomb()}, p, _use_new_zipfile_serialization=False),
        lambda p: p.write_bytes(pickle.dumps(Bomb(), protocol=2)),
        lambda p: p.write_bytes(b"cos\nsystem\n(S'echo a pickle was executed'\ntR."),
    ],
)
@pytest.mark.parametrize("name", ["ckpt.pt", "training.pt"])
def test_pickles_that_run_code_are_refused(tmp_path, write, name, capfd):
    if name == "ckpt.pt":
        write(tmp_path / name)
        with pytest.raises(
            InputError, match=r"ckpt.pt is refused: it is damaged, or a pickle that would run code"
        ):
            load(tmp_path)
    else:
        path, _, _ = save(tmp_path)
        write(path / name)
        with pytest.raises(OSError, match=r"training\.pt is not as it was written"):
            load(tmp_path)
        fit_manifest(path)
        with pytest.raises(
            InputError,
            match=r"training.pt is refused: it is damaged, or a pickle that would run code",
        ):
            load(tmp_path).training_state()
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.pt"])
def test_truncated_files_are_damaged(tmp_path, name):
    path, _, _ = save(tmp_path / "whole")
    size = (path / name).stat().st_size
    for cut in (0, 5, size // 2, size - 1):
        folder = tmp_path / f"cut-{cut}"
        shutil.copytree(path, folder)
        with open(folder / name, "r+b") as file:
            file.truncate(cut)
        with pytest.raises(OSError, match=f"{name} is not as it was written"):
            load(folder)
        fit_manifest(folder)
        with pytest.raises((OSError, InputError), match="damaged"):
            load(folder).training_state()


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run with checkpoints of steps 1 and 2."""
    out_dir = tmp_path_factory.mktemp("two_steps")
    save(out_dir, 1)
    save(out_dir, 2, **MOE)
    return out_dir


def assert_damage_is_seen(out_dir, name, content, capfd):
    """Damage a file of step 2 (content None: delete it). One line says so and step 1 is loaded."""
    path = out_dir / "step-00000002"
    good = (path / name).read_bytes()
    capfd.readouterr()
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    try:
        assert load(out_dir).step == 1, name
        out = capfd.readouterr().out
        assert out.count("\n") == 1 and f"{path} is damaged: " in out, out
        assert out.endswith("; taking step-00000001\n"), out
        with pytest.raises(OSError, match="is damaged"):  # asked for by name: no other is taken
            load(path)
    finally:
        (path / name).write_bytes(good)
    assert load(out_dir).step == 2 and not capfd.readouterr().out


@pytest.mark.repeat(50)
def test_flipped_bits_are_seen(seed, two_steps, capfd):
    rng = random.Random(seed)
    name = rng.choice(IN_A_CHECKPOINT)
    content = bytearray((two_steps / "step-00000002" / name).read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    assert_damage_is_seen(two_steps, name, content, capfd)


@pytest.mark.repeat(50)
def test_truncations_are_seen(seed, two_steps, capfd):
    rng = random.Random(seed)
    name = rng.choice(IN_A_CHECKPOINT)
    content = (two_steps / "step-00000002" / name).read_bytes()
    assert_damage_is_seen(two_steps, name, content[: rng.randrange(len(content))], capfd)


@pytest.mark.parametrize("name", IN_A_CHECKPOINT)
def test_missing_files_are_seen(name, two_steps, capfd):
    assert_damage_is_seen(two_steps, name, None, capfd)


def test_a_step_is_found_by_its_number(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    assert load(tmp_path / "1").step == 1 and load(tmp_path / "step-00000001").step == 1
    with pytest.raises(InputError, match="no checkpoint at"):
        load(tmp_path / "3")


def test_pruning_waits_for_a_good_newest(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000003" / "training.pt").write_bytes(b"")
    with pytest.raises(OSError, match=r"training\.pt is not as it was written"):
        checkpoint.prune(tmp_path, 1)
    assert len(checkpoint.list_steps(tmp_path)) == 3


def test_too_little_disk_space_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    _, model, _ = save(tmp_path)
    needed = 12 * sum(p.numel() for p in model.parameters())
    usage = shutil.disk_usage(tmp_path)
    for free in (needed - 1, needed):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if free < needed:
            with pytest.raises(OSError, match="a checkpoint takes"):
                check_disk_space(tmp_path, model, "adamw")
            check_disk_space(tmp_path, model, "muon")  # one moment for each matrix, not two
        else:
            check_disk_space(tmp_path, model, "adamw")
    written = sum(p.stat().st_size for p in (tmp_path / "step-00000002").iterdir())
    assert needed < written < 1.3 * needed + 10_000  # the estimate fits


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    from safetensors.torch import load_file, save_file

    path, _, _ = save(tmp_path, **MOE)
    weights = load_file(path / "model.safetensors")
    weights["extra"] = torch.zeros(2)
    weights["transformer.ln_f.weight"] = torch.zeros(3)
    del weights["transformer.wpe.weight"]
    save_file(weights, path / "model.safetensors")
    fit_manifest(path)
    with pytest.raises(InputError) as error:
        load(tmp_path).build_model()
    for words in (
        "extra: expected None, found (2,)",
        "transformer.ln_f.weight: expected (32,), found (3,)",
        "transformer.wpe.weight: expected (16, 32), found None",
    ):
        assert words in str(error.value)


def test_a_failed_save_leaves_no_trace(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("killed_at", range(1, 5))
def test_a_kill_while_a_loss_is_added(killed_at, tmp_path, monkeypatch):
    """Before each thing that add_val_loss() does to the disk: the checkpoint is whole."""
    path, *_ = save(tmp_path / "run", val_loss=None)
    calls = 0

    def killed(function):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise KeyboardInterrupt
            return function(*args)

        return call

    for name in ("replace", "fsync"):
        monkeypatch.setattr(checkpoint.os, name, killed(getattr(os, name)))
    with contextlib.suppress(KeyboardInterrupt):
        checkpoint.add_evaluation(path, 2.5, 2.25)
    monkeypatch.undo()
    loaded = load(tmp_path / "run")
    assert (loaded.val_loss, loaded.best_val_loss) in ((None, 1.25), (2.5, 2.25))
    checkpoint.add_evaluation(path, 3.5, 3.25)
    assert load(tmp_path / "run").val_loss == 3.5
    assert list(json.loads((path / "manifest.json").read_text())) == list(checkpoint.FILES)
    assert calls == 3 or killed_at < 4
