"""Checkpoints that were written before the modules moved to nanomoe/ load, resume and sample.

tests/old_checkpoints/ holds, for each of three models, the checkpoint after step 4 of 8, and in
expected.json what that code went on to: the losses of steps 5 to 8, and a sample."""

import json
import shutil

import pytest

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
    assert out == EXPECTED[name]["sample"]
    resume = {"init_from": "resume", "out_dir": run, "dataset": play}
    # async_save is gone: a line says so, and the run resumes
    done = run_script("train.py", **resume, compile=False, device="cpu", async_save=False)
    assert "resuming from" in succeeded(done) and done.stderr.count("\n") == 1
    assert "async_save" in done.stderr
    found = losses(run)
    for step, loss in EXPECTED[name]["losses"].items():
        assert found[int(step)]["loss"] == pytest.approx(loss, rel=1e-6)
    assert found[8]["val_loss"] == pytest.approx(EXPECTED[name]["val_loss"], rel=1e-6)


def test_the_balancing_bias_is_in_an_old_checkpoint():
    weights = load(OLD / "moe").weights
    assert weights["transformer.h.1.mlp.router.bias"].abs().max() > 0


def test_an_old_export_is_the_run_it_came_from(play):
    run, exported = load(OLD / "swiglu"), load(OLD / "exported")
    assert exported.config == run.config
    for name, p in exported.weights.items():
        if not name.endswith("router.load"):
            assert p.equal(run.weights[name])
    done = run_script("sample.py", init_from=OLD / "exported", **SAMPLE, dtype="float32")
    assert succeeded(done) == EXPECTED["swiglu"]["sample"]  # with the tokenizer that it brought
