"""Your own text or JSONL files as a dataset. See readme.md.

$ python data/text/prepare.py --input a.txt b.jsonl --tokenizer bpe --vocab_size=4096 --name mine
"""

import argparse
import hashlib
import itertools
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (
    BYTE_META,
    DATA,
    GPT2_META,
    NAME,
    InputError,
    Tokenizer,
    bpe_meta,
    char_meta,
    run_main,
    train_bpe,
    write_dataset,
)
from tqdm import tqdm


def read_documents(path):
    """The documents of a file: the `text` fields of a .jsonl file, or the whole text."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                documents.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{path}, line {number}: expected a JSON object with a 'text' field"
                ) from None
            if not isinstance(documents[-1], str):
                raise InputError(f"{path}, line {number}: the 'text' field is not a string")
    return documents


def split_documents(documents, val_fraction):
    """Yield (split, text). Of many documents every n-th is validation; of few, the end of each."""
    if len(documents) < 2 / val_fraction:
        for text in documents:
            cut = int(len(text) * (1 - val_fraction))
            cut = text.find("\n", cut) + 1 or cut  # between two lines, if there are any
            yield "train", text[:cut]
            yield "val", text[cut:]
    else:
        every = round(1 / val_fraction)
        for i, text in enumerate(documents, 1):
            yield ("train" if i % every else "val"), text


def sample(documents, size=50_000_000):
    """Pieces of the documents, evenly spread, of about `size` characters in all, for a tokenizer to
    learn from."""
    total, length = sum(map(len, documents)), 2**16
    every = max(1, round(total / size))
    starts = ((text, start) for text in documents for start in range(0, len(text), length))
    for text, start in itertools.islice(starts, 0, None, every):
        yield text[start : start + length]


def make_meta(tokenizer, vocab_size, documents):
    """The meta that --tokenizer asks for. Raises InputError, OSError."""
    if vocab_size and tokenizer != "bpe":
        raise InputError(f"--vocab_size is for --tokenizer bpe, not {tokenizer}")
    if tokenizer == "char":
        return char_meta("\n".join(["", *documents]))  # a newline ends each document
    if tokenizer == "bpe":
        return train_bpe(sample(documents), vocab_size or 4096)
    if tokenizer in ("byte", "gpt2"):
        return BYTE_META if tokenizer == "byte" else GPT2_META
    path = Path(tokenizer).expanduser()
    if path.suffix != ".json":
        raise InputError(
            f"--tokenizer is {tokenizer}, expected char, byte, gpt2, bpe or a tokenizer.json"
        )
    try:
        return bpe_meta(path.read_text(encoding="utf-8"))
    except InputError as error:
        raise InputError(f"--tokenizer {path}: {error}") from None
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise InputError(f"--tokenizer {path} cannot be read: {error}") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--input",
        nargs="+",
        type=lambda path: Path(path).expanduser(),
        required=True,
        help="text files, or .jsonl with a text field",
    )
    parser.add_argument(
        "--tokenizer", default="char", help="char, byte, gpt2, bpe, or the path of a tokenizer.json"
    )
    parser.add_argument("--vocab_size", type=int, help="of --tokenizer bpe, default 4096")
    parser.add_argument("--name", required=True, help="name of the dataset, a new folder of data/")
    parser.add_argument(
        "--val_fraction", type=float, default=0.1, help="part of the text for validation, 0 to 1"
    )
    args = parser.parse_args()
    if not 0 < args.val_fraction < 1:
        raise InputError(f"--val_fraction is {args.val_fraction}, expected between 0 and 1")
    if not re.fullmatch(NAME, args.name):
        raise InputError(f"--name '{args.name}' is not a plain folder name: use letters and digits")
    if (DATA / args.name / "prepare.py").exists():
        raise InputError(f"--name '{args.name}' is taken by a dataset that comes with nanoMoE")
    documents = []
    for path in args.input:
        documents += [text for text in read_documents(path) if text.strip()]
    if not documents:
        raise InputError(f"there is no text in {' '.join(map(str, args.input))}")
    meta = make_meta(args.tokenizer, args.vocab_size, documents)
    tokenizer = Tokenizer(meta)
    parts = [part for part in split_documents(documents, args.val_fraction) if part[1]]
    pieces = (
        (split, tokenizer.encode_document(text), len(text.encode()))
        for split, text in tqdm(parts, "documents", delay=1)
    )
    digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    source = f"{' '.join(path.name for path in args.input)} sha256:{digest}"
    write_dataset(DATA / args.name, meta, pieces, source)
    print(f"train on it with --dataset={args.name}")


if __name__ == "__main__":
    run_main(main)
