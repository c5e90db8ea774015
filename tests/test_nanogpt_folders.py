"""Dataset folders that others wrote: trained on, or refused with a reason before the first step."""

import pickle

import numpy as np
import pytest

from configurator import InputError
from nanomoe.dataset import Dataset
from nanomoe.load import load
from nanomoe.tokenizer import Tokenizer
from tests.helpers import Bomb, one_line, run_script, succeeded, train

CHARS = ["\n", *(chr(33 + i) for i in range(59))]
WORDS = [f"word{i}" for i in range(60)]


def write(folder, meta=None, dtype=np.uint16, vocab_size=60):
    """A folder of random ids. meta: what is in its meta.pkl, or its bytes; None: there is none."""
    folder.mkdir(exist_ok=True)
    ids = np.random.default_rng(0).integers(vocab_size, size=5000).astype(dtype)
    ids[99] = 0  # which a text has somewhere
    for split in ("train", "val"):
        ids.tofile(folder / f"{split}.bin")
    if meta is not None:
        meta = meta if isinstance(meta, bytes) else pickle.dumps(meta)
        (folder / "meta.pkl").write_bytes(meta)
    return folder


def test_a_meta_pkl_with_nothing_but_vocab_size(tmp_path):
    """All that nanoGPT's train.py needs. There is no sample, and a line says why."""
    data = write(tmp_path / "data", {"vocab_size": 60})
    out = succeeded(train(dataset=data, out_dir=tmp_path / "run"))
    assert "no sample: the dataset says nothing of its tokenizer" in out
    assert load(tmp_path / "run").config.vocab_size == 60
    resumed = {"out_dir": tmp_path / "run", "init_from": "resume", "max_iters": 4}
    succeeded(train(dataset=data, **resumed))
    done = run_script("sample.py", out_dir=tmp_path / "run")
    one_line(done, 2, "says nothing of its tokenizer")


@pytest.mark.parametrize("itos", [dict(enumerate(CHARS)), CHARS], ids=["dict", "list"])
def test_characters(itos, tmp_path):
    data = Dataset(write(tmp_path / "data", {"vocab_size": 60, "itos": itos}), 8)
    assert Tokenizer(data.meta).decode([0, 1, 59]) == "\n![" and data.vocab_size == 60


@pytest.mark.parametrize(
    "meta, words",
    [
        ({"vocab_size": 60, "itos": dict(enumerate(WORDS))}, "not single characters, like 'word0'"),
        ({"vocab_size": 60, "itos": dict(enumerate(range(60)))}, "not single characters, like 0"),
        ({"vocab_size": 60, "itos": [*CHARS[:59], ""]}, "not single characters, like ''"),
        ({"vocab_size": 60, "itos": [*CHARS[:59], CHARS[0]]}, "a character twice"),
        ({"vocab_size": 60, "itos": [*CHARS[:59], "\ud800"]}, "not single characters"),
        ({"vocab_size": 61, "itos": dict(enumerate(CHARS))}, "it has no 60"),
        ({"vocab_size": 61, "itos": CHARS}, "it has no 60"),
        ({"vocab_size": 60.9}, "is refused, .*float"),
        ({"vocab_size": -5}, "is refused, .* its vocab_size is -5"),
        ({"itos": dict(enumerate(CHARS))}, "it has no 'vocab_size'"),
        ([60], "is refused"),
        (b"", "is refused"),
        (b"\x80", "is refused"),
        (b"cos\nsystem\n(S'echo bang'\ntR.", "asks to import os.system"),
        (pickle.dumps(Bomb(), protocol=0), "asks to import __builtin__.print"),
        (pickle.dumps({"vocab_size": 2, "itos": Bomb()}), "asks to import builtins.print"),
        ({"vocab_size": 50}, "beyond the vocabulary of 50"),
    ],
    ids=str,
)
def test_refused(meta, words, tmp_path, capfd):
    """And nothing that a pickle asks for is executed."""
    with pytest.raises(InputError, match=words):
        Dataset(write(tmp_path / "data", meta), 8)
    assert capfd.readouterr().out == ""


def test_refused_before_the_first_step(tmp_path):
    done = train(dataset=write(tmp_path / "data", [60]), out_dir=tmp_path / "run")
    one_line(done, 2, "meta.pkl is refused, it is not a plain nanoGPT meta.pkl")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
@pytest.mark.parametrize(
    "vocab_size, meta",
    [
        *[(size, None) for size in (60, 50257, 60_000, 128_000)],
        *[(size, {"vocab_size": size}) for size in (2, 4, 60, 60_000)],
    ],
)
def test_longer_ids_than_16_bits(vocab_size, meta, dtype, tmp_path):
    with pytest.raises(InputError, match=r"train.bin holds ids of 32 or 64 bits"):
        Dataset(write(tmp_path / "data", meta, dtype, vocab_size), 8)


def test_ids_of_16_bits_are_no_ids_of_32(tmp_path):
    data = Dataset(write(tmp_path / "data", None, np.uint16, 50257), 8)
    assert data.vocab_size == 50257 and data.meta["tokenizer"] == "gpt2"
    assert data.bits_per_byte(1.0) is None  # nothing says how many bytes there are
    assert Dataset(write(tmp_path / "low", {"vocab_size": 3}, np.uint16, 3), 8).vocab_size == 3


@pytest.mark.parametrize("text", ["3 + 4\n1 + 2\n", "3 1 4 1 5\n", "a\nb\nc\n", " \n"])
def test_texts_with_a_blank_at_every_second_place(text, tmp_path):
    """nanoGPT sorts its characters, so a newline has the id 0 and a blank 1."""
    chars = sorted(set(text))
    ids = np.array([chars.index(char) for char in text * 600], np.uint16)
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}.bin")
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars))}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    assert Dataset(tmp_path, 8).train.tolist() == ids.tolist()


def test_a_vocabulary_that_needs_32_bits(tmp_path):
    write(tmp_path / "data", {"vocab_size": 300_000}, np.uint32, 300_000)
    data = Dataset(tmp_path / "data", 8)
    assert len(data.train) == 5000 and 2**16 < data.train.max() < 300_000
