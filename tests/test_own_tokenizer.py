"""A checkpoint depends on nothing that lies elsewhere: it has its tokenizer, and knows its text."""

import json
import shutil

import pytest
from common import char_meta

from configurator import InputError
from nanomoe import checkpoint
from nanomoe.load import load
from nanomoe.tokenizer import load_meta
from tests.helpers import MACBETH, fit_manifest, one_line, run_script, succeeded, train
from tests.preparing import write_halves

GREEK = "".join(chr(945 + ord(c) % 24) if c.isalpha() else c for c in MACBETH)
OTHER_TEXT = MACBETH[50_000:] + MACBETH[:50_000]


def prepare(folder, text):
    write_halves(folder, char_meta(text), text)


def forget(out_dir, *facts):
    """Make the newest checkpoint one of an earlier commit, without these facts."""
    path = checkpoint.latest_good(out_dir)
    config = json.loads((path / "config.json").read_text())
    for fact in facts:
        del config[fact]
    (path / "config.json").write_text(json.dumps(config))
    fit_manifest(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dataset, and a run that was trained on it."""
    folder = tmp_path_factory.mktemp("trained")
    prepare(folder / "mine", MACBETH)
    succeeded(train(dataset=folder / "mine", out_dir=folder / "run"))
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """Settings that resume a copy of the run, with a copy of its dataset."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    settings = {"dataset": tmp_path / "mine", "out_dir": tmp_path / "run"}
    return settings | {"init_from": "resume", "max_iters": 4}


def test_sampling_and_exporting_need_no_dataset(run, tmp_path):
    checkpoint.latest_good(run["out_dir"]).rename(tmp_path / "moved")
    shutil.rmtree(run["dataset"])
    assert load(tmp_path / "moved").tokenizer_meta()["chars"] == sorted(set(MACBETH))
    done = run_script("sample.py", out_dir=tmp_path / "moved", num_samples=1, max_new_tokens=60)
    assert set(succeeded(done)) <= set(MACBETH) | {"-"}


def test_another_alphabet_is_refused(run):
    loaded = load(run["out_dir"])
    assert loaded.same_tokenizer(load_meta(run["dataset"]))
    prepare(run["dataset"], MACBETH.replace("z", "ž"))  # as many characters
    assert not loaded.same_tokenizer(load_meta(run["dataset"]))
    prepare(run["dataset"], GREEK)
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
    loaded = load(run["out_dir"])
    assert loaded.same_tokenizer(load_meta(run["dataset"]))
    assert loaded.tokenizer_meta()["chars"] == sorted(set(MACBETH))  # the dataset's
    out = succeeded(train(**run))
    assert "is not the one" not in out and "resumed with max_iters 4 instead of 2" in out
    prepare(run["dataset"], GREEK)
    assert not loaded.same_tokenizer(load_meta(run["dataset"]))
    with pytest.raises(InputError, match="trained on another dataset"):
        loaded.tokenizer_meta(run["dataset"])
