"""
nanoGPT's files: ckpt.pt, a checkpoint, and meta.pkl, which describes a dataset's characters.
"""

import io
import operator
import pickle
from pathlib import Path

import numpy as np

from configurator import InputError
from moe_model import build_config
from nanomoe.tokenizer import Meta, dtype_for


def read_checkpoint(path: Path, saved: dict) -> dict:
    """The fields of a Checkpoint from the contents of a ckpt.pt. Raises InputError."""
    try:
        config, weights = build_config(saved["model_args"]), {}
        for name, p in saved["model"].items():
            if not name.endswith(".attn.bias"):  # the causal mask of older versions
                weights[name.removeprefix("_orig_mod.")] = p  # the prefix of a compiled model
        return {
            "step": int(saved["iter_num"]),
            "config": config,
            "settings": dict(saved["config"]),
            "val_loss": float(saved["best_val_loss"]),
            "best_val_loss": float(saved["best_val_loss"]),
            "weights": weights,
        }
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not a nanoGPT checkpoint: {reason}") from None


class PlainUnpickler(pickle.Unpickler):
    """Plain containers, str and int need no import; every import that a pickle asks for is refused,
    so nothing is executed."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks to import {module}.{name}")


def read_meta(path: Path) -> dict:
    """A meta.pkl in the form of a meta.json. Its tokenizer is 'unknown' if it has no itos, which is
    enough to train. Raises InputError."""
    try:
        saved = PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        vocab_size, itos = operator.index(saved["vocab_size"]), saved.get("itos")
        if vocab_size < 1:
            raise ValueError(f"its vocab_size is {vocab_size}")
        meta = {"vocab_size": vocab_size, "dtype": dtype_for(vocab_size).name}
        if itos is None:
            return meta | {"tokenizer": "unknown"}
        itos = dict(enumerate(itos) if isinstance(itos, list) else itos)
        chars = [itos[i] for i in range(vocab_size)]
    except Exception as error:
        reason = f"it has no {error}" if isinstance(error, LookupError) else error
        raise InputError(
            f"{path} is refused, it is not a plain nanoGPT meta.pkl: {reason}"
        ) from None
    for char in chars:
        # of a character that has a place in UTF-8
        if not (isinstance(char, str) and len(char) == 1 and not "\ud800" <= char <= "\udfff"):
            raise InputError(
                f"{path} is refused: its itos has entries that are not single characters, like "
                f"{char!r}; leave itos out to train without a tokenizer"
            )
    if len(set(chars)) < vocab_size:
        raise InputError(f"{path} is refused: its itos has a character twice")
    return meta | {"tokenizer": "char", "chars": chars}


def looks_like_32_bits(tokens: np.ndarray, meta: Meta) -> bool:
    """Whether what is read as uint16 are longer numbers: then every second one is 0, or almost 0 if
    it is not known how large they are."""
    low, high = tokens[: len(tokens) // 2 * 2].reshape(-1, 2).T
    if tokens.dtype != np.uint16 or not len(high) or not low.any():
        return False
    if meta["tokenizer"] == "gpt2":  # nothing says so
        return high.max() < 4 <= low.max()
    # a text like "a\nb\nc\n" has 0 at every second place, and at no other
    return not high.any() and not low.all()
