"""Reading documents: every format gives the same ones, and nothing of a long one is lost."""

import csv
import gzip
import io
import json
import re
import shlex

import documents
import pyarrow as pa
import pyarrow.parquet
import pytest
from common import GPT2_META, train_bpe
from documents import FileReader, Reader, cut, ending, find_files
from hub import HubReader
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configurator import InputError
from nanomoe.tokenizer import Tokenizer
from tests.helpers import MACBETH, ROOT, needs_gpt2_tokenizer
from tests.preparing import decode, prepare_text

TEXTS = ['Erste "Zeile",\nzweite', "naïve 🙂 \u2028 文字", "x\r\ny", "  a\tb; c\\n\n", "0"]


def as_rows(texts, column="text"):
    return [{"id": i, column: text, "more": [1.5, None]} for i, text in enumerate(texts)]


def as_json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([rows[0].keys(), *(row.values() for row in rows)])
    return file.getvalue()


FORMATS = {
    ".jsonl": as_json_lines,
    ".ndjson": lambda rows: as_json_lines(rows).replace("\n", "\r\n\r\n"),
    ".json": lambda rows: json.dumps(rows, indent=2),
    ".csv": as_csv,
}


def write(path, data):
    data = data if isinstance(data, bytes) else data.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path, columns, **options):
    pa.parquet.write_table(pa.table(columns), path, **options)
    return path


def read(*paths, **options):
    """The documents of files, put together again, and the Reader."""
    reader = FileReader(find_files(map(str, paths)), **options)
    found = {}
    for piece in reader:
        assert piece.start == len(found.get(piece.document, ""))
        found[piece.document] = found.get(piece.document, "") + piece.text
    assert list(found) == list(range(reader.documents))
    assert reader.progress() == sum(path.stat().st_size for path in find_files(map(str, paths)))
    return list(found.values()), reader


@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_format_gives_the_same_documents(kind, zipped, mark, tmp_path):
    content = FORMATS[kind](as_rows(TEXTS))
    path = write(tmp_path / f"a file{kind}{zipped}", mark + content)
    assert read(path)[0] == TEXTS
    command = r"gzip -dc .* \| iconv -f UTF-16" if zipped else "iconv -f UTF-16"
    with pytest.raises(InputError, match="is UTF-16, expected UTF-8; convert it: " + command):
        read(write(path, content.encode("utf-16")))
    with pytest.raises(InputError, match=r"is UTF-16BE, expected UTF-8; convert it: .*iconv"):
        read(write(path, content.encode("utf-16-be")))


def test_parquet(tmp_path):
    columns = {"text": TEXTS * 300, "id": range(1500)}
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=400)
    assert read(path)[0] == TEXTS * 300
    with pytest.raises(InputError, match=r"a.parquet has no column 'body', only 'text', 'id'$"):
        read(path, column="body")
    broken = pa.array([b"good", b"\xff bad", None], pa.binary()).view(pa.string())
    texts, reader = read(write_parquet(path, {"text": broken}))
    assert texts == ["good"] and reader.examples == [
        f"{path}, row 2: byte 0xff is not UTF-8",
        f"{path}, row 3: 'text' is null, not a string",
    ]
    _, reader = read(write_parquet(path, {"text": [b"bytes", b"more"]}))
    assert reader.examples[0].endswith("row 1: 'text' is \"b'bytes'\", not a string")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OSError, match=r"a.parquet cannot be read as parquet: "):
        read(path)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "A.TXT", "a.txt.gz"])
def test_text_files(name, tmp_path):
    path = write(tmp_path / name, "\ufeffOne\r\ntwo\rthree\n")
    assert read(path)[0] == ["One\ntwo\nthree\n"]
    write(path, "One\n<|endoftext|>\nTwo\n\n<|endoftext|>\n \n<|endoftext|>\nThree")
    texts, reader = read(path)
    assert len(texts) == 1 and reader.spelled_out == path
    texts, reader = read(path, separator="<|endoftext|>")
    assert texts == ["One", "Two", "Three"] and not reader.spelled_out


@pytest.mark.full
def test_the_readmes_examples(tmp_path, monkeypatch):
    """Each line of the table of files in data/README.md."""
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "data" / "README.md").read_text().replace("\\|", "|")
    examples = re.findall(r"\| `(--input [^`]+)` \|$", readme, re.M)
    assert len(examples) == 6
    texts = [f"Example text number {i}" for i in range(100)]
    for line in examples:
        flags = shlex.split(line)
        column = flags[flags.index("--column") + 1] if "--column" in flags else "text"
        for flag in flags[1:]:
            path = tmp_path / flag.replace("*", "all")
            path.parent.mkdir(exist_ok=True)
            kind = ending(path)
            if kind in FORMATS:
                write(path, FORMATS[kind](as_rows(texts, column)))
            elif kind == ".txt":
                write(path, "<|endoftext|>".join(texts))
            elif kind == ".parquet":
                write_parquet(path, {column: texts})
        val = decode(prepare_text(tmp_path, *flags), "val").splitlines()
        assert val[:10] == texts[9::10], line


def test_only_the_column_counts(tmp_path):
    """Other columns come, go and change their type, between files and rows."""
    lines = ['{"body": "a", "n": 1}', '{"n": "x", "body": "b"}', '{"body": "c", "new": {"d": []}}']
    a = write(tmp_path / "a.jsonl", "\n".join(lines))
    b = write(tmp_path / "b.csv", "x,body\n1,d\n2,e,3\n")
    c = write_parquet(tmp_path / "c.parquet", {"body": ["f"], "z": [1]})
    assert read(a, b, c, column="body")[0] == list("abcdef")
    with pytest.raises(InputError, match=r"b.csv has no column 'text', only 'x', 'body'$"):
        read(b)


def test_what_cannot_be_read_is_left_out_and_counted(tmp_path, capsys):
    reasons = {
        b'{"body": "x"}': "no 'text', only 'body'",
        b'{"text": null}': "'text' is null, not a string",
        b'{"text": 3}': "'text' is 3, not a string",
        b'{"text": "\\ud800"}': r"lone surrogate \ud800",
        b"[1]": "not an object with fields",
        b'{"te': "not JSON (Unterminated string starting at)",
        b'{"text": "\xff"}': "byte 0xff is not UTF-8",
    }
    good = [json.dumps({"text": f"{i}"}).encode() for i in range(700)]
    path = write(tmp_path / "a.jsonl", b"\n".join([*good[:500], *reasons, *good[500:], b""]))
    texts, reader = read(path)
    assert texts == [f"{i}" for i in range(700)] and reader.unreadable == 7
    reader.refuse_unreadable()
    told = [f"{path}, line {501 + i}: {why}" for i, why in enumerate(reasons.values())]
    words = "7 of 707 documents cannot be read and are left out: "
    assert capsys.readouterr().out == words + "; ".join(told[:3]) + "\n"
    for line, reason in reasons.items():
        path.write_bytes(line)
        _, reader = read(path)
        assert reader.examples == [f"{path}, line 1: {reason}"]
        with pytest.raises(InputError, match=r"1 of 1 documents cannot be read, more than 1%: "):
            reader.refuse_unreadable()
    path = write(tmp_path / "b.csv", b"id,text\n1,a\n2\n3,\xff\n4,b\n")
    texts, reader = read(path)
    assert texts == ["a", "b"] and reader.examples == [
        f"{path}, line 3: no 'text', only 1 of 2 columns",
        f"{path}, line 4: byte 0xff is not UTF-8",
    ]
    path = write(tmp_path / "c.jsonl", '{"a": 1}\n' * 30_000)
    with pytest.raises(InputError, match=r"10,000 of 10,000 documents cannot be read"):
        read(path)  # ends early


def test_a_text_with_a_byte_that_is_not_utf8(tmp_path):
    """The piece that has it is left out. What is before and after it stays, as two documents."""
    lines = b"A line of words.\n" * 10_000
    path = write(tmp_path / "a.txt", lines + b"\xff" + lines)
    texts, reader = read(path, write(tmp_path / "b.txt", "Another."))
    assert len(texts) == 3 and texts[2] == "Another." and reader.unreadable == 1
    assert lines.decode().startswith(texts[0]) and lines.decode().endswith(texts[1])
    assert sum(map(len, texts)) > 2 * len(lines) - documents.PIECE


def test_a_stray_quote_swallows_no_rows(tmp_path):
    lines = [f"{i},text {i}" for i in range(1000)]
    lines[199] = '"' + lines[199]
    path = write(tmp_path / "a.csv", "\n".join(["id,text", *lines, ""]))
    with pytest.raises(InputError, match=r"a.csv, line \d+: unexpected end of data$"):
        read(path)


ROW = '{"text": "a"}'


@pytest.mark.parametrize(
    "text, words",
    [
        (f"[{ROW}, {ROW[:-3]}", "is not JSON after item 1: Unterminated string"),
        (f"[{ROW}, oops]", "is not JSON after item 1: Expecting value"),
        (f'[{ROW}, {{"text": oops' + "x" * 10**6, "is not JSON after item 1: Expecting value"),
        (f"[{ROW}, {ROW}", "is not JSON after item 2: it ends within an array"),
        (f"[{ROW}, {ROW},\n", "is not JSON after item 2: it ends within an array"),
        (f'{ROW} {{"text": {"1" * 5000}}}', "is not JSON after item 1: Exceeds the limit"),
        (f'{ROW} {{"text": {"[" * 10**5}', "is not JSON after item 1: maximum recursion depth"),
    ],
    ids=range(7),
)
def test_json_that_is_not(text, words, tmp_path):
    with pytest.raises(InputError, match="a.json " + words):
        read(write(tmp_path / "a.json", text))


def test_json_in_many_forms(tmp_path):
    path = tmp_path / "a.json"
    for text in (f"{ROW}\n{ROW}", f"[{ROW}]\n[{ROW}]", f"[]{ROW} [{ROW}]"):
        assert read(write(path, text))[0] == ["a", "a"]
    _, reader = read(write(path, f" [ {ROW} , 12345]"))
    assert reader.examples[0].endswith("item 2: not an object with fields")
    long = [{"text": "word " * 50_000}, {"text": "é" * 200_000}]
    for indent in (None, 1):
        write(path, json.dumps(long, indent=indent))
        assert read(path)[0] == [row["text"] for row in long]


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_a_damaged_gz(kind, tmp_path):
    path = write(tmp_path / f"a{kind}.gz", FORMATS.get(kind, as_csv)(as_rows(TEXTS * 1000)))
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(OSError, match=r"a\.\w+\.gz is damaged: Compressed file ended before"):
        read(path)
    path.write_bytes(b"plain text")
    with pytest.raises(OSError, match=r"a\.\w+\.gz is damaged: Not a gzipped file"):
        read(path)


def test_find_files(tmp_path, capsys):
    inside = ["b.txt", "sub/a.JSONL", "sub/deep/c.csv.gz", ".hidden/d.txt", ".e.md"]
    for name in [*inside, "notes.pdf", "pdfs/a.pdf"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*inputs):
        return [str(p.relative_to(tmp_path)) for p in find_files(f"{tmp_path}/{i}" for i in inputs)]

    assert names("") == inside[:3]
    assert "3 files, and 2 of other kinds" in capsys.readouterr().out
    assert names("", "../" + tmp_path.name, "b.txt") == names("")
    assert names("sub/**/*.gz", "b.txt", "*.txt") == ["sub/deep/c.csv.gz", "b.txt"]
    endings = r"\.txt \.md \.jsonl \.ndjson \.json \.csv \(each also with \.gz\) \.parquet$"
    with pytest.raises(InputError, match="pdfs has no file that ends in " + endings):
        names("pdfs")
    with pytest.raises(InputError, match="notes.pdf has an unknown ending, expected " + endings):
        names("notes.pdf")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*\*\.md$"):
        names("*.md")


WORDS = st.lists(st.sampled_from([*"ab \n\tée.1字🙂<|>", "\n\n", "<|>", "abcdefg"]), max_size=150)


@example("abcdefg<|>end", 1, "<|>")  # a piece would end within the separator
@example("aa" + 10 * "\n", 1, "<|>")  # newlines that fill a piece
@given(WORDS.map("".join), st.integers(1, 60), st.sampled_from([None, "<|>", "\n\n"]))
@settings(deadline=None, max_examples=300)
def test_cut_loses_nothing(text, size, separator):
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", 8)
        pieces = list(cut(blocks, separator))
    assert all(len(part) <= 8 + len(separator or "") for part, _ in pieces) and pieces[-1][1]
    found = [""]
    for part, ends in pieces:
        found[-1] += part
        found += [""] * ends
    if separator == "\n\n":  # the newlines around it go, in any number
        assert [p.strip("\n") for p in found if p.strip()] == [
            p.strip("\n") for p in text.split("\n\n") if p.strip()
        ]
    else:
        expected = text.split(separator) if separator else [text]
        if separator:
            expected = [part.strip("\n") for part in expected]
        if separator and "\n" * 8 in text:  # so many fill a piece, and may stay
            found = [part.strip("\n") for part in found]
        assert found == [*expected, ""]


def pieces_and_ids(tokenizer, text, size):
    """A text in pieces of that size at most, and the ids of all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        pieces = [part for part, _ in cut([text])]
    return pieces, [i for part in pieces for i in tokenizer.encode(part).tolist()]


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer(train_bpe([MACBETH], 400))


@given(st.lists(st.sampled_from(["word", " ", "\n", "\n\n", "a b", "é1", ".", "\t"]), max_size=200))
@settings(deadline=None, max_examples=200)
def test_pieces_have_the_tokens_of_the_whole(bpe, words):
    """Wherever there is a newline or a space between two other characters."""
    text = "".join(words)
    pieces, ids = pieces_and_ids(bpe, text, 64)
    same_by_luck = any(len(part) == 64 for part in pieces)  # was cut anywhere
    assert same_by_luck or ids == bpe.encode(text).tolist()


def test_pieces_of_the_plays_have_gpt2s_tokens():
    needs_gpt2_tokenizer()
    tokenizer = Tokenizer(GPT2_META)
    pieces, ids = pieces_and_ids(tokenizer, MACBETH, 500)
    assert len(pieces) > 200 and ids == tokenizer.encode(MACBETH).tolist()


def open_hub_reader(paths):
    from datasets import load_dataset

    files = [str(path) for path in paths]
    return HubReader(load_dataset("parquet", data_files=files, split="train", streaming=True))


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_reader_goes_on_from_any_state(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 30)
    texts = [*TEXTS, "", None, "A long text with many words in it. " * 5, "b \ud800", " ", "end"]
    parquet = [text and text.replace("\ud800", "") for text in texts]
    paths = [write_parquet(tmp_path / f"{i}.parquet", {"text": parquet}) for i in range(2)]
    if kind == "files":
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        paths += [write(tmp_path / "b.jsonl", lines), write(tmp_path / "c.txt", "Word\n" * 50)]
        paths += [write(tmp_path / "d.txt", b"Word\n" * 50 + b"\xff" + b"word\n" * 20)]
        paths += [write(tmp_path / "e.json", json.dumps(as_rows(["e", "f"])))]

    def reader():
        return FileReader(paths) if kind == "files" else open_hub_reader(paths)

    states, pieces = [], []
    whole = reader()
    for piece in whole:
        pieces.append(piece)
        states.append(json.loads(json.dumps(whole.state())))
    assert len(pieces) > (50 if kind == "files" else 15)
    for i, state in enumerate(states):
        rest = reader()
        rest.continue_from(state)
        assert list(rest) == pieces[i + 1 :], state
        same = [name for name in Reader.STATE if kind == "files" or name != "position"]
        assert all(getattr(rest, name) == getattr(whole, name) for name in same)


def test_a_stream_that_breaks_is_taken_up_again(monkeypatch, capsys):
    from datasets import IterableDataset

    waits, broken = [], []
    monkeypatch.setattr("hub.time.sleep", waits.append)

    def rows(shards, times):
        for shard in shards:
            for i in range(10):
                if i == 5 and broken.count(shard) < times:
                    broken.append(shard)
                    raise ConnectionError("the line is dead")
                yield {"text": f"{shard} {i}"}

    def read_rows(**options):
        return [p.text for p in HubReader(IterableDataset.from_generator(rows, gen_kwargs=options))]

    texts = read_rows(shards=[0, 1, 2], times=3)
    assert texts == [f"{shard} {i}" for shard in range(3) for i in range(10)]
    assert broken == [0] * 3 + [1] * 3 + [2] * 3 and waits == [2, 4, 8] * 3
    told = "the stream broke: ConnectionError: the line is dead; next try in 2 s"
    assert told in capsys.readouterr().out
    waits.clear()
    with pytest.raises(OSError, match=r"^the stream broke: ConnectionError: the line is dead$"):
        read_rows(shards=[3], times=100)
    assert waits == [2, 4, 8, 16, 32]
