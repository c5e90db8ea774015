"""Text to token ids and back; and a dataset's meta.json, which says how."""

import json
import re
import shlex
from pathlib import Path
from typing import TypedDict

import numpy as np

from configurator import InputError, short_path

DATA = Path(__file__).parent.parent / "data"
NAME = r"\w[\w.-]*"  # of a folder in data/
GPT2_VOCAB = 50257
FILE = "tokenizer.json"  # the file of a 'bpe' tokenizer, in the format of Hugging Face


class Meta(TypedDict, total=False):
    """A dataset's meta.json, or the part of it that describes a tokenizer."""

    tokenizer: str  # 'char', 'byte', 'gpt2', 'bpe' or 'unknown'
    vocab_size: int
    dtype: str  # of a token id in the .bin files
    chars: list[str]  # of 'char': the characters of the ids 0, 1, ...
    tokenizer_json: str  # of 'bpe': what is in FILE; never in a JSON file
    source: str  # of the text, and how it was prepared
    splits: list[str]  # 'train' and 'val', or what other .bin files there are
    train: dict  # of train.bin: number of "tokens", "bytes" of text, "sha256"
    val: dict


class Tokenizer:
    """Text to token ids and back, as a meta.json describes: 'char', 'byte', 'gpt2' (by tiktoken) or
    'bpe' (a tokenizer.json). Raises InputError, and OSError if GPT-2's tokens cannot be fetched."""

    def __init__(self, meta: Meta):
        self.kind = meta["tokenizer"]
        self.vocab_size = meta["vocab_size"]
        self.bpe = None  # a tiktoken.Encoding, or a BytePairs, which has the same methods
        if self.kind == "char":
            self.chars = meta["chars"]
            self.ids = {char: i for i, char in enumerate(self.chars)}
        elif self.kind in ("gpt2", "bpe"):
            from nanomoe import bpe  # late: only for these two

            own = self.kind == "bpe"
            self.bpe = bpe.BytePairs(meta["tokenizer_json"]) if own else bpe.load_gpt2()
        elif self.kind == "unknown":
            raise InputError("the dataset says nothing of its tokenizer, only how many ids it has")
        elif self.kind != "byte":
            raise InputError(f"unknown tokenizer '{self.kind}', expected char, byte, gpt2 or bpe")

    def encode(self, text: str) -> np.ndarray:
        """Raises InputError naming characters that have no id."""
        if self.bpe:
            return self.bpe.encode_to_numpy(text, allowed_special="all")
        if self.kind == "byte":
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        if unknown := sorted(set(text) - self.ids.keys()):
            raise InputError(f"characters outside the vocabulary: {' '.join(map(repr, unknown))}")
        return np.fromiter(map(self.ids.get, text), np.uint32, len(text))

    def encode_document(self, text: str, ends: bool = True) -> np.ndarray:
        """One document of many to ids, with a separator at its end.

        The separator is <|endoftext|> or the like, or else a newline. A special token that is
        spelled out in the text is plain text. ends: False for a part of a document that goes on."""
        if ends and self.eot_token is None and not text.endswith("\n"):
            text += "\n"
        if not self.bpe:
            return self.encode(text)
        ids = self.bpe.encode_to_numpy(text, disallowed_special=())
        if ends and self.eot_token is not None:
            ids = np.append(ids, np.uint32(self.eot_token))
        return ids

    @property
    def eot_token(self) -> int | None:
        """The id that ends a document; None if there is none."""
        return self.bpe.eot_token if self.bpe else None

    def to_bytes(self, ids: list[int]) -> bytes:
        """Ids to UTF-8. A token may be part of a character."""
        if self.bpe:
            return self.bpe.decode_bytes(ids)
        if self.kind == "byte":
            return bytes(ids)
        return "".join(self.chars[i] for i in ids).encode()

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 become the replacement character."""
        return self.to_bytes(ids).decode(errors="replace")


def dtype_for(vocab_size: int) -> np.dtype:
    """The type of a token id in a dataset's files."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def with_file(meta: Meta | None, folder: Path) -> Meta | None:
    """A tokenizer's description, as "tokenizer_json" with what is in its file if it has one. Raises
    OSError."""
    if not meta or meta["tokenizer"] != "bpe":
        return meta
    return meta | {"tokenizer_json": (folder / FILE).read_text(encoding="utf-8")}


def without_file(meta: Meta | None) -> tuple[Meta, str | None]:
    """A tokenizer's description as JSON files hold it, and what goes into its file, or None."""
    meta = dict(meta or {})
    return meta, meta.pop("tokenizer_json", None)


# -----------------------------------------------------------------------------
# the meta.json of a dataset


def prepare_command(path: Path) -> str:
    """The command that makes a dataset folder, for messages."""
    if (path / "prepare.py").exists():
        return shlex.join(["python", short_path(path / "prepare.py")])
    name = path.name if path.parent == DATA and re.fullmatch(NAME, path.name) else "NAME"
    script = short_path(DATA / "text" / "prepare.py")
    return shlex.join(["python", script, "--input", "YOUR_FILES", "--name", name])


def make_again(path: Path) -> str:
    return f"make it again: {prepare_command(path)}"


def dataset_dir(name: str | Path) -> Path:
    """The folder of a dataset: data/NAME, or a path. What begins with a dot is a path."""
    path = Path(name)
    is_path = str(name).startswith(".") or not (DATA / name).is_dir()
    return path if is_path and path.is_dir() else DATA / name


def load_meta(name: str | Path, need_tokens: bool = True) -> Meta:
    """The meta.json of a dataset, or the same facts about a nanoGPT folder. Raises InputError if it
    is not prepared. need_tokens=False: meta.json is enough, for the tokenizer alone."""
    path = dataset_dir(name)
    has_meta = (path / "meta.json").exists()
    has_tokens = (path / "train.bin").exists() and (path / "val.bin").exists()
    if not name or not (has_tokens or (has_meta and not need_tokens)):
        if path.is_dir():
            missing = f"(no train.bin and val.bin in {path}): run {prepare_command(path)}"
            raise InputError(f"dataset '{name}' is not prepared {missing}")
        known = ", ".join(sorted(p.parent.name for p in DATA.glob("*/prepare.py")))
        known += f" (for your own text: {prepare_command(path)})"
        raise InputError(f"there is no dataset '{name}' at {path}, known: {known}")
    if has_meta:
        try:
            meta = json.loads((path / "meta.json").read_text())
            meta |= {"vocab_size": int(meta["vocab_size"]), "dtype": np.dtype(meta["dtype"]).name}
            return with_file(meta, path)
        except FileNotFoundError as error:
            problem = f"dataset '{name}' has lost {error.filename}"
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{path / 'meta.json'} is damaged ({error})"
        raise InputError(f"{problem}; {make_again(path)}")
    if (path / "meta.pkl").exists():
        from nanomoe import nanogpt  # late: only for nanoGPT's folders

        return nanogpt.read_meta(path / "meta.pkl")
    return {"vocab_size": GPT2_VOCAB, "dtype": "uint16", "tokenizer": "gpt2"}
