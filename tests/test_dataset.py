"""The order of training windows, the validation windows, and the tokenizers."""

import os

import numpy as np
import pytest
from common import BYTE_META, GPT2_META
from writing import write_dataset

from configurator import InputError
from nanomoe import dataset as dataset_module
from nanomoe.dataset import BatchReader, Dataset
from nanomoe.tokenizer import Tokenizer, load_meta
from tests.helpers import MACBETH, TEXTS, needs_gpt2_tokenizer


def write(folder, ids, meta=BYTE_META):
    """A dataset whose two files hold the same ids."""
    write_dataset(folder, meta, [(split, ids, len(ids)) for split in ("train", "val")], "t")
    return folder


def char_meta(vocab_size):
    return {"tokenizer": "char", "vocab_size": vocab_size, "chars": []}


def test_windows_are_the_text(play):
    data = Dataset(play, 64)
    tokenizer = Tokenizer(data.meta)
    assert tokenizer.decode(data.train.tolist()) == TEXTS["train"]
    x, y = data.read_windows("train", [0, 100])
    assert x.flags.c_contiguous and y.flags.c_contiguous  # a GPU gets them without a detour
    assert x.shape == y.shape == (2, 64) and x.dtype == np.int64
    assert tokenizer.decode(x[1].tolist()) == TEXTS["train"][100:164]
    assert tokenizer.decode(y[1].tolist()) == TEXTS["train"][101:165]


def test_ranks_take_turns(play):
    data = Dataset(play, 64)
    for rank in (0, 1):
        with BatchReader(data, 3, first=60 + 3 * rank, ranks=2) as reader:
            for i in range(4):
                first, (x, _) = reader.next()
                assert first == 60 + 3 * rank + 6 * i and reader.last[0] == first
                expected = data.read_windows("train", data.train_offsets(first, 3))[0]
                assert (x == expected).all()


@pytest.mark.parametrize("block_size", [32, 64, 777])
def test_an_epoch_is_without_replacement(play, block_size):
    data = Dataset(play, block_size, seed=3)
    n = data.windows_per_epoch
    assert n == (80_000 - block_size) // block_size
    phases = set()
    for epoch in range(4):
        starts = sorted(data.train_offsets(epoch * n, n))
        phases.add(starts[0])
        assert 0 <= starts[0] < block_size and starts[-1] + block_size + 1 <= 80_000
        assert set(np.diff(starts)) == {block_size}  # disjoint and without gaps
    assert len(phases) > 1
    assert data.train_offsets(0, n) != data.train_offsets(n, n)


def test_order_depends_on_seed_and_number_alone(play):
    data = Dataset(play, 64, seed=3)
    n = data.windows_per_epoch
    all_at_once = data.train_offsets(n - 10, 40)
    np.random.seed(0)
    again = Dataset(play, 64, seed=3)
    again.val_offsets(5)
    assert [again.train_offsets(n - 10 + i, 1)[0] for i in reversed(range(40))][::-1] == all_at_once
    assert Dataset(play, 64, seed=4).train_offsets(n - 10, 40) != all_at_once
    # the same in each version of nanoMoE, so that a run can be resumed with a later one
    assert Dataset(play, 64).train_offsets(n - 2, 4) == [49858, 39170, 6846, 14974]


def test_every_phase_and_order_occur(play):
    """First windows of many epochs are spread over the whole text."""
    data = Dataset(play, 1000)
    first = [data.train_offsets(epoch * data.windows_per_epoch, 1)[0] for epoch in range(300)]
    assert len({start % 1000 for start in first}) > 200
    assert len({start // 1000 for start in first}) > 60


def test_validation_windows(play):
    data = Dataset(play, 64)
    some = data.val_offsets(10)
    assert len(some) == 10 and some[0] == 0 and some[-1] == len(data.val) - 65
    assert max(np.diff(some)) - min(np.diff(some)) <= 1
    everything = data.val_offsets(10**9)
    assert len(everything) == (len(data.val) - 1) // 64 and min(np.diff(everything)) >= 64
    assert data.val_offsets(1) == [0]
    assert data.bits_per_byte(2 * np.log(2)) == pytest.approx(2.0)


def test_a_text_of_one_window(tmp_path):
    data = Dataset(write(tmp_path, [1, 2, 3, 4, 5]), 4)
    assert data.train_offsets(0, 3) == [0, 0, 0] and data.val_offsets(7) == [0]
    with pytest.raises(InputError, match=r"5 tokens, fewer than one window of block_size \(5\)"):
        Dataset(tmp_path, 5)


def test_uint32_vocabularies(tmp_path):
    ids = [0, 70_000, 3, 69_999]
    write(tmp_path, ids, char_meta(70_001))
    assert Dataset(tmp_path, 2).train.tolist() == ids and load_meta(tmp_path)["dtype"] == "uint32"


def test_char_tokenizer(play):
    tokenizer = Tokenizer(load_meta(play))
    assert tokenizer.decode(tokenizer.encode(MACBETH).tolist()) == MACBETH
    with pytest.raises(InputError, match="characters outside the vocabulary: 'ß' '€'"):
        tokenizer.encode("Straße €")
    mixed = Tokenizer(char_meta(3) | {"chars": ["c", "a", "b"]})  # not in code order
    assert mixed.encode("abc").tolist() == [1, 2, 0]


def test_byte_tokenizer():
    tokenizer = Tokenizer(BYTE_META)
    assert tokenizer.decode(tokenizer.encode("Straße €").tolist()) == "Straße €"
    assert tokenizer.decode([255, 65]) == "�A"


def test_gpt2_tokenizer():
    needs_gpt2_tokenizer()
    tokenizer = Tokenizer(GPT2_META)
    assert tokenizer.encode("Hello<|endoftext|>").tolist() == [15496, 50256]
    document = tokenizer.encode_document("Hello<|endoftext|>").tolist()
    assert document[-1] == 50256 and 50256 not in document[:-1]  # in a document it is just text
    assert tokenizer.decode(tokenizer.encode("Straße €").tolist()) == "Straße €"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: (d / "train.bin").unlink(), "is not prepared.*--name"),
        (lambda d: (d / "meta.json").write_text("{"), "is damaged"),
        (lambda d: (d / "meta.json").write_text("{}"), "is damaged"),
        (
            lambda d: np.array([1, 2, 77, 4, 5], np.uint16).tofile(d / "val.bin"),
            "token id 77, beyond the vocabulary of 10",
        ),
    ],
)
def test_bad_folders(tmp_path, change, message):
    change(write(tmp_path, [1, 2, 3, 4, 5], char_meta(10)))
    with pytest.raises(InputError, match=message):
        Dataset(tmp_path, 2)


def test_ids_beyond_the_vocabulary_are_found_wherever_they_are(monkeypatch, tmp_path):
    ids = np.zeros(5000, int)
    ids[4000] = 200
    write(tmp_path, ids, char_meta(100))
    with pytest.raises(InputError, match="token id 200"):
        Dataset(tmp_path, 8)
    # as in a file that is too large to check at the start
    monkeypatch.setattr(dataset_module, "LOOK_AHEAD", 1000)
    data = Dataset(tmp_path, 8)
    with pytest.raises(InputError, match="token id 200"):
        data.read_windows("train", [3995])


def test_truncated(tmp_path):
    write(tmp_path, range(100))
    for size in (199, 100, 0):
        os.truncate(tmp_path / "train.bin", size)
        with pytest.raises(OSError, match=f"truncated: {size} bytes, expected 200"):
            Dataset(tmp_path, 8)
