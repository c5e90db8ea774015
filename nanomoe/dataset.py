"""
Token files, the order in which training reads them, and the fixed validation windows.

A dataset is a folder, `data/NAME/`, which its prepare.py fills: train.bin and val.bin (flat token
ids, uint16, or uint32 if the vocabulary needs it) and meta.json (see tokenizer.Meta). A nanoGPT
folder, which has no meta.json, works as well.
"""

import functools
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from configurator import InputError
from nanomoe.tokenizer import Meta, dataset_dir, load_meta, make_again

LOOK_AHEAD = 2**26  # tokens of a file that are checked before a run starts


class Dataset:
    """A prepared dataset, read in windows of block_size tokens and the tokens that follow them.

    name: a folder of data/, or a path. Raises InputError if the dataset is not prepared, is shorter
    than a window, or holds ids beyond its vocabulary; OSError if a file is truncated."""

    def __init__(self, name: str | Path, block_size: int, seed: int = 0):
        self.path = dataset_dir(name)
        self.block_size = block_size
        self.seed = seed
        self.meta = load_meta(name)
        self.vocab_size = self.meta["vocab_size"]
        self.train = self.open_tokens("train")
        self.val = self.open_tokens("val")
        # As many windows as fit after any phase (see epoch_order). Neighbours share one token: it
        # is the last target of one and the first input of the next. So in each epoch every token is
        # a target once, except a few at the ends.
        self.windows_per_epoch = max(1, (len(self.train) - block_size) // block_size)

    def open_tokens(self, split):
        path = self.path / f"{split}.bin"
        dtype = np.dtype(self.meta["dtype"])
        size = os.path.getsize(path)
        # in a nanoGPT folder only half a token is a sign of damage
        num_tokens = self.meta.get(split, {}).get("tokens", -(-size // dtype.itemsize))
        expected = num_tokens * dtype.itemsize
        if size != expected:
            raise OSError(
                f"{path} is truncated: {size} bytes, expected {expected}; {make_again(self.path)}"
            )
        if num_tokens < self.block_size + 1:
            raise InputError(
                f"{path} holds {num_tokens} tokens, fewer than one window of block_size "
                f"({self.block_size}) and its next token: use a smaller block_size or a longer text"
            )
        tokens = np.memmap(path, dtype, mode="r")
        # the start of the file is checked now, so that an error comes before any work;
        # read_windows() checks all that is used
        start = tokens[:LOOK_AHEAD]
        if "train" not in self.meta:
            from nanomoe import nanogpt  # late: only for nanoGPT's folders

            if nanogpt.looks_like_32_bits(start, self.meta):
                raise InputError(
                    f"{path} holds ids of 32 or 64 bits, but without a meta.json they are read as "
                    f"16 bits; {make_again(self.path)}"
                )
        self.check_ids(start, path)
        return tokens

    def check_ids(self, tokens, path):
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise InputError(
                f"{path} holds token id {largest}, beyond the vocabulary of {self.vocab_size}; "
                f"{make_again(self.path)}"
            )

    def tokenizer_meta(self) -> Meta:
        """What a checkpoint says of its tokenizer, in the form of a meta.json."""
        keys = ("tokenizer", "vocab_size", "dtype", "chars", "tokenizer_json")
        return {key: self.meta[key] for key in keys if key in self.meta}

    @functools.lru_cache(maxsize=1)  # every step's facts hold it
    def fingerprint(self) -> dict[str, str]:
        """What tells this text from another one: for both files, their sha256. Without a meta.json
        that of their size and first megabyte."""
        prints = {}
        for split, tokens in (("train", self.train), ("val", self.val)):
            start = tokens[: 2**20 // tokens.itemsize].tobytes()
            own = hashlib.sha256(f"{len(tokens)} ".encode() + start).hexdigest()
            prints[split] = self.meta.get(split, {}).get("sha256", own)
        return prints

    def read_windows(self, split: str, offsets: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """The windows at these offsets: inputs, targets, both (len(offsets), block_size) int64."""
        tokens = self.train if split == "train" else self.val
        windows = np.stack([tokens[at : at + self.block_size + 1] for at in offsets])
        self.check_ids(windows, self.path / f"{split}.bin")
        # two arrays and not two views: rows with gaps would not reach a GPU from pinned memory
        return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)

    @functools.lru_cache(maxsize=2)
    def epoch_order(self, epoch):
        """The phase of an epoch (the offset of its first window), and the order of its windows.
        Both are random; the order is a permutation, so no window comes twice in an epoch."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        n = self.windows_per_epoch
        phase = rng.integers(min(self.block_size, len(self.train) - n * self.block_size))
        return phase, rng.permutation(n)

    def train_offsets(self, first: int, count: int) -> list[int]:
        """The offsets of `count` training windows, starting with the run's window number `first`.
        They depend on the seed and these numbers alone: not on evaluations, the number of processes
        or the micro-batch size. So a resumed run only needs to know its step."""
        offsets = []
        for i in range(first, first + count):
            epoch, position = divmod(i, self.windows_per_epoch)
            phase, order = self.epoch_order(epoch)
            offsets.append(int(phase + order[position] * self.block_size))
        return offsets

    def val_offsets(self, count: int) -> list[int]:
        """The offsets of at most `count` validation windows, the same every time: spread evenly
        over val.bin, without overlap."""
        count = min(count, (len(self.val) - 1) // self.block_size)
        last = len(self.val) - 1 - self.block_size
        return np.linspace(0, last, count).astype(int).tolist()

    def bits_per_byte(self, nats_per_token: float) -> float | None:
        """A cross-entropy as bits per byte of text; None if meta.json has no number of bytes."""
        num_bytes = self.meta.get("val", {}).get("bytes")
        return nats_per_token / np.log(2).item() * len(self.val) / num_bytes if num_bytes else None


class BatchReader:
    """Training micro-batches in order, each read by a thread while the one before it trains.

    first: the run's number of this rank's first window. The ranks take turns, a micro-batch of
    batch_size windows each."""

    def __init__(self, data: Dataset, batch_size: int, first: int, ranks: int):
        self.data, self.batch_size = data, batch_size
        self.stride = ranks * batch_size
        self.last = None
        self.thread = ThreadPoolExecutor(1)
        self.upcoming = self.thread.submit(self.read, first)

    def read(self, first):
        offsets = self.data.train_offsets(first, self.batch_size)
        return first, self.data.read_windows("train", offsets)

    def next(self) -> tuple[int, tuple[np.ndarray, np.ndarray]]:
        """The number of the next micro-batch's first window, and its windows as
        Dataset.read_windows returns them."""
        self.last = self.upcoming.result()
        self.upcoming = self.thread.submit(self.read, self.last[0] + self.stride)
        return self.last

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.thread.shutdown()


def pad_vocab_size(vocab_size: int) -> int:
    """The number of rows in the embedding of a model with this many token ids. A large vocabulary
    is padded to a multiple of 64, because GPUs multiply round sizes faster."""
    return vocab_size if vocab_size <= 256 else 64 * -(-vocab_size // 64)
