"""A checkpoint depends on nothing that lies elsewhere: it has its tokenizer, and knows its text."""

import json
import shutil

import pytest
from common import char_meta
from writing import write_texts

from nanomoe import checkpoint
from nanomoe.load import load
from tests.helpers import MACBETH, fit_manifest, one_line, run_module, run_script, succeeded, train

GREEK = "".join(chr(945 + ord(c) % 24) if c.isalpha() else c for c in MACBETH)
OTHER_TEXT = MACBETH[50_000:] + MACBETH[:50_000]


def prepare(folder, text):
    texts = {"train": text[:80_000], "val": text[80_000:]}
    write_texts(folder, char_meta(text), texts, "tests")
    return folder


def sample(out_dir):
    done = run_script("sample.py", out_dir=out_dir, num_samples=1, max_new_tokens=60, seed=1)
    return succeeded(done)


def forget(out_dir, *facts):
    """Make the newest checkpoint one of an earlier commit, without these facts."""
    path = checkpoint.latest_good(out_dir)
    config = json.loads((path / "config.json").read_text())
    for fact in facts:
        del config[fact]
    (path / "config.json").write_text(json.dumps(config))
    fit_manifest(path)


@pytest.fixture
def run(tmp_path):
    mine = prepare(tmp_path / "mine", MACBETH)
    settings = {"dataset": mine, "out_dir": tmp_path / "run"}
    succeeded(train(**settings))
    return settings | {"init_from": "resume", "max_iters": 4}


def test_sampling_needs_no_dataset(run):
    before = sample(run["out_dir"])
    prepare(run["dataset"], GREEK)
    assert sample(run["out_dir"]) == before
    shutil.rmtree(run["dataset"])
    assert sample(run["out_dir"]) == before


def test_another_alphabet_is_refused(run):
    prepare(run["dataset"], GREEK)
    one_line(train(**run), 2, "mine", "another tokenizer")
    prepare(run["dataset"], MACBETH.replace("z", "ž"))  # as many characters
    one_line(train(**run), 2, "mine", "another tokenizer")


def test_another_text_of_the_same_alphabet_gets_a_note(run):
    assert "is not the one" not in succeeded(train(**run))
    prepare(run["dataset"], OTHER_TEXT)
    out = succeeded(train(**run | {"max_iters": 6}))
    assert out.count("is not the one") == 1
    assert "is not the one" not in succeeded(train(**run | {"max_iters": 8}))  # it is now


def test_a_checkpoint_of_an_earlier_commit(run):
    """It has the check that it can have: how many characters there are."""
    forget(run["out_dir"], "tokenizer", "data", "sequences")
    out = succeeded(train(**run))
    assert "is not the one" not in out and "resumed with max_iters 4 instead of 2" in out
    forget(run["out_dir"], "tokenizer", "data", "sequences")
    prepare(run["dataset"], GREEK)
    one_line(train(**run | {"max_iters": 6}), 2, "mine", "another tokenizer")
    done = run_script("sample.py", out_dir=run["out_dir"], num_samples=1, max_new_tokens=5)
    one_line(done, 2, "trained on another dataset")


@pytest.mark.full
def test_exporting_needs_no_dataset(run, tmp_path):
    shutil.rmtree(run["dataset"])
    succeeded(run_module("tools.export_hf", run["out_dir"], tmp_path / "exported"))
    assert load(tmp_path / "exported").tokenizer["chars"] == sorted(set(MACBETH))
