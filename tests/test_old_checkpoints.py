"""Checkpoints of earlier commits load, resume and sample.

tests/old_checkpoints/ holds, for each of five models, the checkpoint after step 4 of 8, and in
expected.json what that code went on to: the losses of steps 5 to 8, and a sample. Three are older
than nanomoe/. Those of a033f06 have their loss in config.json; in the MoE's a kill has left a
manifest with two versions of that file."""

import json
import shutil

import pytest

from nanomoe import checkpoint
from nanomoe.load import load
from tests.helpers import ROOT, losses, run_script, succeeded

OLD = ROOT / "tests" / "old_checkpoints"
EXPECTED = json.loads((OLD / "expected.json").read_text())
SAMPLE = {"start": "MACBETH:", "num_samples": 1, "max_new_tokens": 60, "seed": 1}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_old_checkpoint_resumes_and_samples(name, play, tmp_path):
    run = shutil.copytree(OLD / name, tmp_path / name)
    sampling = {"dtype": "float32", "device": "cpu", "dataset": play}
    out = succeeded(run_script("sample.py", out_dir=run, **SAMPLE, **sampling))
    assert out == EXPECTED[name]["sample"] and 3 < load(run).val_loss < 5
    resume = {"init_from": "resume", "out_dir": run, "dataset": play}
    # async_save is gone: a line says so, and the run resumes
    done = run_script("train.py", **resume, compile=False, device="cpu", async_save=False)
    assert "resuming from" in succeeded(done) and done.stderr.count("\n") == 1
    assert "async_save" in done.stderr
    found = losses(run)
    for step, loss in EXPECTED[name]["losses"].items():
        assert found[int(step)]["loss"] == pytest.approx(loss, rel=1e-6)
    assert found[8]["val_loss"] == pytest.approx(EXPECTED[name]["val_loss"], rel=1e-6)


def test_a_loss_that_a_kill_left_half_added(tmp_path):
    """Both versions of config.json fit; the one that is there holds the loss."""
    run = shutil.copytree(OLD / "a033f06-moe", tmp_path / "run")
    path, *_ = checkpoint.list_steps(run)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["config.json"] != manifest["config.json before"]
    assert load(run).best_val_loss == load(run).val_loss + 0.5
    checkpoint.add_evaluation(path, 3.5, 3.25)
    assert (load(run).val_loss, load(run).best_val_loss) == (3.5, 3.25)
    facts = json.loads((path / "config.json").read_text())
    facts["best_val_loss"] -= 0.5
    (path / "config.json").write_text(json.dumps(facts, indent=1))
    load(run)  # the version before
    (path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(OSError, match=r"config\.json is not as it was written"):
        load(run)


def test_an_old_export_is_the_run_it_came_from(play):
    run, exported = load(OLD / "swiglu"), load(OLD / "exported")
    assert exported.config == run.config
    for name, p in exported.weights.items():
        if not name.endswith("router.load"):
            assert p.equal(run.weights[name])
    done = run_script("sample.py", init_from=OLD / "exported", **SAMPLE, dtype="float32")
    assert succeeded(done) == EXPECTED["swiglu"]["sample"]  # with the tokenizer that it brought
