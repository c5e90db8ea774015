"""
Token files, the order in which they are read, and the fixed validation windows.

A dataset is a folder, `data/NAME/`, that its prepare.py fills: train.bin and val.bin (flat token ids, uint16, or uint32
where the vocabulary needs it) and meta.json (vocabulary size, dtype, tokenizer, source, and for both files the number of
tokens, of bytes of text, and the sha256). A nanoGPT folder, without meta.json, is read too.
"""

import functools
import io
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from configurator import InputError
from nanomoe.tokenizer import GPT2_VOCAB

DATA = Path(__file__).parent.parent / "data"
LOOK_AHEAD = 2**26  # tokens of a file that are checked before a run starts


class Dataset:
    """A prepared dataset, read by windows of block_size tokens and their successors.

    name: a folder of data/, or the path of a folder elsewhere. Raises InputError for one that is not prepared, is
    shorter than a window, or holds ids beyond its vocabulary, and OSError for a truncated file.
    """

    def __init__(self, name, block_size, seed=0):
        self.path, self.block_size, self.seed = dataset_dir(name), block_size, seed
        self.meta = load_meta(name)
        self.vocab_size = self.meta["vocab_size"]
        self.train, self.val = self.open_tokens("train"), self.open_tokens("val")
        # Training windows: as many whole ones as fit behind any phase. Neighbours share one token, which is the last
        # target of one and the first input of the next, so every token but a few at the ends is a target once an epoch.
        self.windows_per_epoch = max(1, (len(self.train) - block_size) // block_size)

    def open_tokens(self, split):
        path = self.path / f"{split}.bin"
        dtype = np.dtype(self.meta["dtype"])
        size = os.path.getsize(path)
        expected = (
            self.meta.get(split, {}).get("tokens", -(-size // dtype.itemsize)) * dtype.itemsize
        )
        if size != expected:
            raise OSError(
                f"{path} is truncated: {size} bytes, expected {expected}; make it again: "
                f"{prepare_command(self.path)}"
            )
        if size // dtype.itemsize < self.block_size + 1:
            raise InputError(
                f"{path} holds {size // dtype.itemsize} tokens, fewer than one window of block_size "
                f"({self.block_size}) and its next token: use a smaller block_size or a longer text"
            )
        tokens = np.memmap(path, dtype, mode="r")
        # a look at the beginning now, for one clear line before any work; windows() looks at everything that is used
        self.check_ids(tokens[:LOOK_AHEAD], path)
        return tokens

    def check_ids(self, tokens, path):
        if (largest := int(tokens.max())) >= self.vocab_size:
            raise InputError(
                f"{path} holds token id {largest}, beyond the vocabulary of {self.vocab_size}"
            )

    def read_windows(self, split, starts):
        """Windows that start at these offsets: inputs and targets, both (len(starts), block_size) int64."""
        tokens = self.train if split == "train" else self.val
        both = np.stack([tokens[s : s + self.block_size + 1] for s in starts])
        self.check_ids(both, self.path / f"{split}.bin")
        both = both.astype(np.int64)
        return both[:, :-1], both[:, 1:]

    @functools.lru_cache(maxsize=2)
    def epoch_order(self, epoch):
        """Start offsets of one epoch's windows, without replacement: a random permutation behind a random phase."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        n = self.windows_per_epoch
        phase = rng.integers(min(self.block_size, len(self.train) - n * self.block_size))
        return phase, rng.permutation(n)

    def train_offsets(self, first, count):
        """Start offsets of `count` training windows from the `first`-th of the run on, a pure function of the seed and
        that number: the same whatever the evaluations, the ranks or the size of a micro-batch."""
        starts = []
        for i in range(first, first + count):
            epoch, j = divmod(i, self.windows_per_epoch)
            phase, order = self.epoch_order(epoch)
            starts.append(int(phase) + int(order[j]) * self.block_size)
        return starts

    def val_offsets(self, count):
        """Start offsets of at most `count` windows, spread evenly over val.bin without overlap, always the same."""
        count = min(count, (len(self.val) - 1) // self.block_size)
        return np.linspace(0, len(self.val) - 1 - self.block_size, count).astype(int).tolist()

    def bits_per_byte(self, nats_per_token):
        """Cross-entropy as bits per byte of text; None where meta.json does not know the bytes of val.bin."""
        num_bytes = self.meta.get("val", {}).get("bytes")
        return nats_per_token / np.log(2).item() * len(self.val) / num_bytes if num_bytes else None


class BatchReader:
    """Training micro-batches in order, each read by a thread while the one before it trains.

    first: the number of the first micro-batch of batch_size windows. stride: how many numbers lie
    between one rank's micro-batches, which is the number of ranks."""

    def __init__(self, data, batch_size, first, stride):
        self.data = data
        self.batch_size = batch_size
        self.stride = stride
        self.last = None
        self.thread = ThreadPoolExecutor(1)
        self.submit(first)

    def submit(self, index):
        self.index = index
        self.upcoming = self.thread.submit(self.read, index)

    def read(self, index):
        offsets = self.data.train_offsets(index * self.batch_size, self.batch_size)
        return self.data.read_windows("train", offsets)

    def next(self):
        """The next micro-batch's number in the run, and its windows as Dataset.read_windows
        returns them."""
        self.last = self.index, self.upcoming.result()
        self.submit(self.index + self.stride)
        return self.last

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.thread.shutdown()


def pad_vocab_size(vocab_size):
    """The rows of a model's embedding for so many token ids: a large vocabulary is padded, because GPUs multiply round sizes
    faster."""
    return vocab_size if vocab_size <= 256 else 64 * -(-vocab_size // 64)


def prepare_command(path):
    """The command that (re)makes a dataset folder, for messages."""
    if (path / "prepare.py").exists():
        return f"python {os.path.relpath(path / 'prepare.py')}"
    return f"python {os.path.relpath(DATA / 'text' / 'prepare.py')} --input YOUR_FILES --name {path.name}"


def dataset_dir(name):
    """The folder of a dataset: of data/, or a path, relative to the current folder or absolute."""
    return Path(name) if not (DATA / name).is_dir() and Path(name).is_dir() else DATA / name


def load_meta(name, need_tokens=True):
    """The meta.json of a dataset, or what nanoGPT's folder says in its place. Raises InputError if it is not prepared;
    without need_tokens, for the tokenizer alone, a folder with meta.json is enough."""
    path = dataset_dir(name)
    ready = all((path / f"{split}.bin").exists() for split in ("train", "val"))
    if not name or not (ready or (not need_tokens and (path / "meta.json").exists())):
        known = sorted(p.parent.name for p in DATA.glob("*/prepare.py"))
        if not path.is_dir():
            raise InputError(
                f"there is no dataset '{name}' at {path}, known: {', '.join(known)} (your own text: "
                f"{prepare_command(path)})"
            )
        raise InputError(
            f"dataset '{name}' is not prepared (no train.bin and val.bin in {path}): run {prepare_command(path)}"
        )
    if (path / "meta.json").exists():
        try:
            meta = json.loads((path / "meta.json").read_text())
            return meta | {
                "vocab_size": int(meta["vocab_size"]),
                "dtype": np.dtype(meta["dtype"]).name,
            }
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path / 'meta.json'} is damaged ({error}); make it again: {prepare_command(path)}"
            ) from None
    if (path / "meta.pkl").exists():
        meta = load_meta_pkl(path / "meta.pkl")
        chars = [meta["itos"][i] for i in range(meta["vocab_size"])]
        return {"vocab_size": len(chars), "dtype": "uint16", "tokenizer": "char", "chars": chars}
    return {"vocab_size": GPT2_VOCAB, "dtype": "uint16", "tokenizer": "gpt2"}


def load_meta_pkl(path):
    """nanoGPT's meta.pkl, read without executing anything: plain containers, str and int need no import, and every
    import that a pickle asks for is refused. Raises InputError for a pickle of another kind."""

    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"it asks to import {module}.{name}")

    try:
        meta = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        return {"vocab_size": int(meta["vocab_size"]), "itos": dict(meta["itos"])}
    except Exception as error:
        raise InputError(
            f"{path} is refused, it is not a plain nanoGPT meta.pkl: {error}"
        ) from None
