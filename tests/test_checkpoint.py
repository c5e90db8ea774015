"""Checkpoints: what is written comes back, and what is damaged is not read."""

import contextlib
import json
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configurator import InputError
from nanomoe import checkpoint
from nanomoe.load import find, load
from nanomoe.optim import build_optimizer
from nanomoe.run_dir import check_disk_space
from tests.helpers import MOE, fit_manifest, nanogpt_file, save_step, saver_for, stepped, tokens

IN_A_CHECKPOINT = [*checkpoint.FILES, "manifest.json", "evaluation.json"]
FACTS = {"run": {"dataset": "play"}, "seconds": 60.0, "best_val_loss": 1.25}


def save(out_dir, step=2, val_loss=1.5, **model_settings):
    model, optimizer = stepped(**model_settings)
    out_dir.mkdir(exist_ok=True)
    with saver_for(out_dir, model, optimizer, **FACTS) as saver:
        save_step(saver, step, val_loss)
    return out_dir / f"step-{step:08d}", model, optimizer


def steps(out_dir):
    return [checkpoint.step_of(path) for path in checkpoint.list_steps(out_dir)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_weights": False, "position": "rope"}, MOE, MOE | {"bias": False}],
    ids=str,
)
def test_round_trip(tmp_path, settings):
    path, model, optimizer = save(tmp_path, **settings)
    files = ["config.json", "manifest.json", "model.safetensors", "training.pt"]
    assert sorted(p.name for p in path.iterdir()) == files
    assert list(tmp_path.iterdir()) == [path]  # no temporary folder is left
    loaded = load(tmp_path)
    assert (loaded.step, loaded.val_loss, loaded.best_val_loss) == (2, 1.5, 1.25)
    assert loaded.settings == {"dataset": "play"} and loaded.seconds == 60
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


def test_a_part_of_a_tensor_is_saved_alone(tmp_path):
    part = torch.arange(12.0).reshape(3, 4)[:, 1:3]
    path = checkpoint.write(tmp_path, 1, {"part": part}, {}, {})
    assert load_file(path / "model.safetensors")["part"].equal(part)


def test_find_and_prune(tmp_path):
    for step, loss in ((10, 3.0), (20, 1.0), (9, 4.0), (30, 2.0), (100, 2.5)):
        save(tmp_path, step, loss)
    assert checkpoint.latest_good(tmp_path).name == "step-00000100"
    for name in (tmp_path / "step-00000009", tmp_path / "9"):
        assert find(name).name == "step-00000009"
    with pytest.raises(InputError, match="no checkpoint at"):
        find(tmp_path / "3")
    checkpoint.prune(tmp_path, 0)
    assert len(steps(tmp_path)) == 5
    checkpoint.prune(tmp_path, 2)  # the two newest, and the best
    assert steps(tmp_path) == [20, 30, 100]
    save(tmp_path, 5, float("nan"))
    checkpoint.prune(tmp_path, 3)  # a NaN loss is never the best
    assert steps(tmp_path) == [20, 30, 100]
    checkpoint.add_evaluation(tmp_path / "step-00000030", 0.5, 0.5)  # now that one is the best
    checkpoint.prune(tmp_path, 1)
    assert steps(tmp_path) == [30, 100]
    (tmp_path / "step-00000001").mkdir()  # a damaged one is not the best, and is no reason to fail
    (tmp_path / "step-00000030" / "evaluation.json").write_text("{}")
    checkpoint.prune(tmp_path, 1)
    assert steps(tmp_path) == [100]
    (tmp_path / "step-00000200.tmp-1").mkdir()  # what a killed save leaves does not count
    assert checkpoint.latest_good(tmp_path).name == "step-00000100"


@pytest.mark.parametrize("harm", ["no manifest.json", "no training.pt", "half a training.pt"])
def test_pruning_waits_for_a_good_newest(harm, tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    file = tmp_path / "step-00000003" / harm.split()[-1]
    if harm.startswith("no"):
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match=file.name):
        checkpoint.prune(tmp_path, 1)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_checkpoint_that_is_there_is_verified(tmp_path):
    """A save does not write over it, and counts it as saved only if it is good."""
    path, *_ = save(tmp_path)
    before = (path / "training.pt").read_bytes()
    save(tmp_path, n_embd=16)
    assert (path / "training.pt").read_bytes() == before
    (path / "training.pt").write_bytes(before[::-1])
    with pytest.raises(OSError, match="is not as it was written"):
        save(tmp_path)


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", b'"x"'),
        ("config.json", b'{"step": "x", "model": {}, "run": {}}'),
        ("config.json", b'{"step": 3, "model": "x"}'),
        *((name, cut) for name in checkpoint.FILES for cut in (0, 5, 500, -1)),
        ("training.pt", None),
    ],
)
def test_nonsense_is_damaged(tmp_path, name, content):
    """Also if the manifest was made to fit it."""
    path, *_ = save(tmp_path)
    if content is None:
        torch.save({}, path / name)  # without an optimizer
    else:
        cut = (path / name).read_bytes()[:content] if isinstance(content, int) else content
        (path / name).write_bytes(cut)
    with pytest.raises(OSError, match=f"{name} is not as it was written"):
        load(path)
    fit_manifest(path)
    with pytest.raises((OSError, InputError), match="damaged"):
        load(path).training_state()


def test_what_is_gone_from_the_settings_does_not_matter(tmp_path):
    """An implementation and keys of earlier versions, in the model's config and the run's."""
    path, model, _ = save(tmp_path, **MOE)
    facts = json.loads((path / "config.json").read_text())
    # what exists stays as it is
    for impl, now in (("split", "auto"), ("loop", "loop")):
        for part in ("model", "run"):
            facts[part] |= {"expert_impl": impl, "upcycle_noise": 0.5, "no_such_key": [1]}
        (path / "config.json").write_text(json.dumps(facts))
        fit_manifest(path)
        found = checkpoint.read(path)
        assert found["config"].expert_impl == found["settings"]["expert_impl"] == now
    loaded = load(path)
    assert loaded.config == model.config and loaded.training_file
    loaded.build_model()(tokens(2, 16))


def test_nanogpt_checkpoint(tmp_path):
    model, optimizer = stepped()
    nanogpt_file(tmp_path / "ckpt.pt", model, optimizer)
    for name in (tmp_path, tmp_path / "ckpt.pt"):
        loaded = load(name)
        assert (loaded.step, loaded.best_val_loss) == (2, 1.5)
        assert loaded.settings["dataset"] == "shakespeare_char"
    idx = tokens(2, 16)
    assert torch.equal(loaded.build_model()(idx, idx)[0], model(idx, idx)[0])
    torch.save({"model": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match="is not a nanoGPT checkpoint: KeyError: 'model_args'"):
        load(tmp_path)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The folder of a run with checkpoints of steps 1 and 2; the second was evaluated later."""
    out_dir = tmp_path_factory.mktemp("two_steps")
    save(out_dir, 1)
    path, *_ = save(out_dir, 2, val_loss=None, **MOE)
    checkpoint.add_evaluation(path, 2.5, 1.25)
    assert sorted(p.name for p in path.iterdir()) == sorted(IN_A_CHECKPOINT)
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
    assert load(out_dir).val_loss == 2.5 and not capfd.readouterr().out


@pytest.mark.repeat(25)
def test_flipped_bits_are_seen(seed, two_steps, capfd):
    rng = random.Random(seed)
    name = rng.choice(IN_A_CHECKPOINT)
    content = bytearray((two_steps / "step-00000002" / name).read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    assert_damage_is_seen(two_steps, name, content, capfd)


@pytest.mark.repeat(25)
def test_truncations_are_seen(seed, two_steps, capfd):
    rng = random.Random(seed)
    name = rng.choice(IN_A_CHECKPOINT)
    content = (two_steps / "step-00000002" / name).read_bytes()
    assert_damage_is_seen(two_steps, name, content[: rng.randrange(len(content))], capfd)


@pytest.mark.parametrize("name", IN_A_CHECKPOINT[:-1])
def test_missing_files_are_seen(name, two_steps, capfd):
    assert_damage_is_seen(two_steps, name, None, capfd)


def test_an_evaluation_belongs_to_its_checkpoint(two_steps, tmp_path, capfd):
    """A loss is never taken for another checkpoint's; a missing one is one that is not known."""
    out_dir = shutil.copytree(two_steps, tmp_path / "run")
    of_another, *_ = save(tmp_path / "another", val_loss=None)
    checkpoint.add_evaluation(of_another, 0.5, 0.5)
    evaluation = out_dir / "step-00000002" / "evaluation.json"
    assert_damage_is_seen(
        out_dir, evaluation.name, (of_another / evaluation.name).read_bytes(), capfd
    )
    evaluation.write_text(evaluation.read_text().replace("2.5", "0.5"))
    checkpoint.prune(out_dir, 1)  # nor is it the best one
    assert steps(out_dir) == [1, 2]
    evaluation.unlink()
    assert load(out_dir).val_loss is None and load(out_dir).best_val_loss == 1.25


@pytest.mark.parametrize("killed_at", range(1, 5))
def test_a_kill_while_a_loss_is_added(killed_at, tmp_path, monkeypatch):
    """Before each thing that add_evaluation() does to the disk: the checkpoint is whole."""
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
    loaded = load(tmp_path / "run")
    assert (loaded.val_loss, loaded.best_val_loss) == (3.5, 3.25)
    assert calls == min(3, killed_at)


def test_too_little_disk_space_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    path, model, _ = save(tmp_path)
    needed = 12 * sum(p.numel() for p in model.parameters())
    written = sum(p.stat().st_size for p in path.iterdir())
    assert needed < written < 1.3 * needed + 10_000  # the estimate fits
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    check_disk_space(tmp_path, model, "adamw")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    check_disk_space(tmp_path, model, "muon")  # one moment for each matrix, not two
    with pytest.raises(OSError, match="a checkpoint takes"):
        check_disk_space(tmp_path, model, "adamw")


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    """Among them a router's bias and load: without them a resumed run would differ."""
    path, *_ = save(tmp_path, **MOE)
    weights = load_file(path / "model.safetensors")
    weights |= {"extra": torch.zeros(2), "transformer.ln_f.weight": torch.zeros(3)}
    router = "transformer.h.1.mlp.router."
    for name in ("transformer.wpe.weight", f"{router}bias", f"{router}load"):
        del weights[name]
    save_file(weights, path / "model.safetensors")
    fit_manifest(path)
    with pytest.raises(InputError) as error:
        load(tmp_path).build_model()
    for words in (
        "extra: expected None, found (2,)",
        "transformer.ln_f.weight: expected (32,), found (3,)",
        "transformer.wpe.weight: expected (16, 32), found None",
        "mlp.router.bias: expected (4,), found None",
        "mlp.router.load: expected (4,), found None",
    ):
        assert words in str(error.value)


def test_a_disk_that_is_full_while_torch_writes(tmp_path):
    """torch.save goes on, and then the system's own words are the error, also if there is room
    again."""
    with pytest.raises(OSError, match="No space left"), checkpoint.HashedFile("/dev/full") as file:
        torch.save(torch.zeros(100_000), file)
        file.flush_to_disk()
    with checkpoint.HashedFile(tmp_path / "file") as again:
        again.error = file.error
        with pytest.raises(OSError, match="No space left"):
            again.flush_to_disk()
