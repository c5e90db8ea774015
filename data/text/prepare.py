"""Your own text as a dataset, from text, JSON, CSV and parquet files. See readme.md.

$ python data/text/prepare.py --input texts/ b.jsonl --tokenizer bpe --vocab_size=4096 --name mine
"""

import argparse
import functools
import re
import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import BYTE_META, GPT2_META, bpe_meta, char_meta, parse_arguments, run_main, train_bpe
from documents import END, FileReader, file_states, find_files
from tqdm import tqdm
from writing import Unfinished, write_documents

from configurator import InputError
from nanomoe.tokenizer import DATA, NAME

SAMPLE = 50_000_000  # bytes of text that a tokenizer is learned from
say_once = functools.cache(tqdm.write)


def read(reader, what):
    """Yield the pieces of a reader, with a progress bar. Raises InputError if there are none."""
    for piece in reader.with_bar(what):
        yield piece
        if reader.spelled_out:
            hint = f"--separator '{END}' makes a document of each part"
            say_once(f"{reader.spelled_out} has {END} in its text: {hint}")
    if not reader.documents:
        reader.refuse_unreadable()
        raise InputError(f"there is no text in {' '.join(map(str, reader.files))}")


def lengths_of_few(reader, val_fraction):
    """The length of each document, in characters, if there are few; or None if there are enough to
    take whole ones for validation."""
    lengths = []
    for piece in read(reader, "lengths"):
        if piece.document + 1 >= 2 / val_fraction:
            return None
        lengths[piece.document :] = [piece.start + len(piece.text)]
    return lengths


def divider(lengths, val_fraction):
    """The function that divides a Piece into [(split, text, whether a document ends here)]."""
    share = Fraction(str(val_fraction))
    some, of = share.as_integer_ratio()

    def by_document(piece):
        held_out = (piece.document + 1) * some // of > piece.document * some // of
        return [("val" if held_out else "train", *piece[:2])]

    def within_document(piece):
        text, length = piece.text, lengths[piece.document]
        cut = int(length * (1 - share)) - piece.start
        if cut < 0:
            return [("val", text, piece.ends)]
        if cut >= len(text) and not piece.ends:
            return [("train", text, False)]
        cut = place_between_lines(text, cut, piece.ends, at_most=length * share)
        parts = [("train", text[:cut], True)] if cut + piece.start else []
        return [*parts, ("val", text[cut:], piece.ends)] if cut < len(text) else parts

    return by_document if lengths is None else within_document


def place_between_lines(text, cut, ends, at_most):
    """`cut` if it is one, or the next one; the one before if there is none or if then nothing is
    left, and if that is not farther than at_most; else `cut`."""
    after = text.find("\n", max(0, cut - 1)) + 1
    if after and not (ends and after == len(text)):
        return after
    before = text.rfind("\n", 0, cut) + 1
    return before if before and cut - before <= at_most else cut


def sample(pieces):
    """Pieces that are evenly spread over the text, of SAMPLE to 2 * SAMPLE bytes, or all."""
    chosen, every, size = [], 1, 0
    for i, piece in enumerate(pieces):
        if i % every == 0:
            chosen.append(piece.text.encode())
            size += len(chosen[-1])
        if size > 2 * SAMPLE:
            chosen, every = chosen[::2], 2 * every
            size = sum(map(len, chosen))
    return map(bytes.decode, chosen)


def make_meta(tokenizer, vocab_size, pieces):
    """The meta that --tokenizer asks for. Raises InputError, OSError."""
    if vocab_size is not None and tokenizer != "bpe":
        raise InputError(f"--vocab_size is for --tokenizer bpe, not {tokenizer}")
    if tokenizer == "char":
        chars = {"\n"}  # ends each document
        for piece in pieces:
            chars.update(piece.text)
        return char_meta(chars)
    if tokenizer == "bpe":
        return train_bpe(sample(pieces), 4096 if vocab_size is None else vocab_size)
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


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--input", nargs="+", required=True, help="files, folders and globs")
    add("--column", default="text", help="where a row's text is, default text")
    add("--separator", help=f"what stands between the documents of a text file, as {END}")
    add("--tokenizer", default="char", help="char, byte, gpt2, bpe, or a tokenizer.json's path")
    add("--vocab_size", type=int, help="of --tokenizer bpe, default 4096")
    add("--name", required=True, help="name of the dataset, a new folder of data/")
    add("--val_fraction", type=float, default=0.1, help="part of the text for validation, 0 to 1")
    args = parse_arguments(parser)
    if not 0 < args.val_fraction < 1:
        raise InputError(f"--val_fraction is {args.val_fraction}, expected between 0 and 1")
    if not re.fullmatch(NAME, args.name):
        raise InputError(f"--name '{args.name}' is not a plain folder name: use letters and digits")
    if (DATA / args.name / "prepare.py").exists():
        raise InputError(f"--name '{args.name}' is taken by a dataset that comes with nanoMoE")
    if args.separator == "":
        raise InputError("--separator is empty")
    return args


def main():
    args = read_arguments()
    files = find_files(args.input)
    reader = functools.partial(FileReader, files, args.column, args.separator)
    tokenizer_file = Path(args.tokenizer).expanduser()
    read_files = [*files, tokenizer_file] if tokenizer_file.is_file() else files
    settings = vars(args) | {"files": file_states(read_files), "processes": None}
    with Unfinished(DATA / args.name, settings) as unfinished:
        if not unfinished.progress:
            meta = make_meta(args.tokenizer, args.vocab_size, read(reader(), "vocabulary"))
            lengths = lengths_of_few(reader(), args.val_fraction)
            unfinished.record_progress({"meta": meta, "lengths": lengths})
        meta, lengths = unfinished.progress["meta"], unfinished.progress["lengths"]
        text = reader()
        source = f"{' '.join(args.input)}: {len(files):,} files, {text.total:,} bytes"
        divide = divider(lengths, args.val_fraction)
        write_documents(unfinished, meta, source, text, divide, args.processes)
    print(f"train on it with --dataset={args.name}")


if __name__ == "__main__":
    run_main(main)
