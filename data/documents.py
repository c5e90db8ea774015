"""Documents from files, read in pieces, so that no file has to fit into memory."""

import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import os
import re
import shlex
import zlib
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from configurator import InputError

TEXT = (".txt", ".md")
ROWS = (".jsonl", ".ndjson", ".json", ".csv")
KNOWN = f"{' '.join(TEXT + ROWS)} (each also with .gz) .parquet"
PIECE = 2**16  # characters at most
BETWEEN = re.compile(r"[\s,\[\]]*")  # the values of a JSON array
END = "<|endoftext|>"  # which some text files have between their documents


class Piece(NamedTuple):
    """A document or a part of one."""

    text: str
    ends: bool  # whether the document ends with it
    document: int  # the number of the document, from 0; what cannot be read has none
    start: int  # where in the document the piece begins, in characters


class Unreadable(NamedTuple):
    reason: str


def find_files(inputs):
    """The files that are named: files, folders with all that is below them, and globs. Each once.

    Prints how many files of a folder have an unknown ending. Raises InputError for an unknown
    ending or if a folder has nothing else, FileNotFoundError."""
    files = {}
    for name in map(os.path.expanduser, inputs):
        path = Path(name)
        if path.is_dir() and name:
            below = [p.relative_to(path) for p in path.rglob("*") if p.is_file()]
            inside = sorted(path / p for p in below if "/." not in f"/{p.as_posix()}")  # not hidden
            found = [p for p in inside if ending(p)]
            if not found:
                raise InputError(f"{path} has no file that ends in {KNOWN}")
            if len(found) < len(inside):
                print(f"{path}: {len(found)} files, and {len(inside) - len(found)} of other kinds")
        else:
            named = [path] if path.exists() else map(Path, sorted(glob.glob(name, recursive=True)))
            found = [p for p in named if not p.is_dir()]
            if not found:
                raise FileNotFoundError(f"there is no file {name or 'with an empty name'}")
        for path in found:
            if not ending(path):
                raise InputError(f"{path} has an unknown ending, expected {KNOWN}")
            files.setdefault(path.resolve(), path)
    return list(files.values())


def ending(path):
    """The ending in lower case, without .gz, or None if we do not read such files."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in TEXT + ROWS or name.endswith(".parquet") else None


def file_states(files):
    """What tells whether files have changed, for json."""
    states = ((path.resolve(), path.stat()) for path in files)
    return [[str(path), state.st_size, state.st_mtime_ns] for path, state in states]


class Reader:
    """The pieces of all documents, with a state from which another Reader continues.

    A subclass has read(), which yields (where, text or Unreadable, whether a document ends here),
    and keeps `position`, a dict for json, up to date with what it has yielded; progress(), of
    `total` in a `unit`.

    An empty document is left out. What cannot be read is left out and counted (of a long text the
    piece; what is around it becomes two documents); refuse_unreadable() says when it is too much.
    """

    STATE = ("position", "documents", "start", "unreadable", "examples")

    def __init__(self, limit=None):
        self.limit = limit  # on the number of documents
        self.position = {}
        self.documents = 0  # that are read
        self.start = 0  # of the next piece, in its document
        self.unreadable = 0
        self.examples = []  # of unreadable documents, the first three

    def state(self):
        return {name: getattr(self, name) for name in self.STATE}

    def continue_from(self, state):
        vars(self).update(state)

    def __iter__(self):
        for where, text, ends in self.read():
            if self.documents == self.limit:
                return
            if isinstance(text, Unreadable):
                self.unreadable += 1
                self.examples = [*self.examples, f"{where}: {text.reason}"][:3]
                if self.unreadable == 10_000 and not self.documents:
                    self.refuse_unreadable()
                text, ends = "", True  # of a long document the pieces before and after it stay
            if ends and not self.start and (not text or text.isspace()):
                continue
            piece = Piece(text, ends, self.documents, self.start)
            self.documents += ends
            self.start = 0 if ends else self.start + len(text)
            yield piece

    def with_bar(self, what):
        """The pieces, with a progress bar."""
        with tqdm(desc=what, total=self.total, unit=self.unit, unit_scale=True, delay=1) as bar:
            for number, piece in enumerate(self):
                if number % 64 == 0:  # each time would be slow
                    bar.update(self.progress() - bar.n)
                yield piece
            bar.update(self.progress() - bar.n)

    def refuse_unreadable(self):
        """Raises InputError if more than 1% of the documents cannot be read; prints a line if some
        cannot."""
        if not self.unreadable:
            return
        total = self.documents + self.unreadable
        message = f"{self.unreadable:,} of {total:,} documents cannot be read"
        examples = "; ".join(self.examples)
        if self.unreadable > total / 100:
            raise InputError(f"{message}, more than 1%: {examples}")
        print(f"{message} and are left out: {examples}")


def readable(text):
    """The text, or Unreadable if it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python reads a byte that is not UTF-8
            return Unreadable(f"byte 0x{code - 0xDC00:02x} is not UTF-8")
        return Unreadable(f"lone surrogate \\u{code:04x}")
    return text


class FileReader(Reader):
    """The documents of files, one file after another. Reading raises InputError, OSError.

    column: where a row's text is. separator: what stands between the documents of a text file; by
    default each file is one document."""

    unit = "B"

    def __init__(self, files, column="text", separator=None, limit=None):
        super().__init__(limit)
        self.files, self.column, self.separator = files, column, separator
        self.position = {"file": 0, "pieces": 0}
        self.total = sum(map(os.path.getsize, files))
        self.raw, self.done = None, 0  # the open file, and the bytes of those before it
        self.spelled_out = None  # a text file with <|endoftext|> in its text

    def progress(self):
        """The bytes that are read."""
        return self.done + (0 if self.raw is None or self.raw.closed else self.raw.tell())

    def read(self):
        begin = self.position["file"]
        self.done = sum(map(os.path.getsize, self.files[:begin]))
        for index, path in enumerate(self.files[begin:], begin):
            skip = self.position["pieces"]
            try:
                # in Python's 8 kB at a time, reading long lines takes three times as long
                with open(path, "rb", buffering=2**18) as self.raw:
                    pieces = self.read_file(path)
                    for count, piece in enumerate(itertools.islice(pieces, skip, None), skip + 1):
                        self.position = {"file": index, "pieces": count}
                        yield piece
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise OSError(f"{path} is damaged: {error}") from None
            self.done += os.path.getsize(path)
            self.position = {"file": index + 1, "pieces": 0}

    def read_file(self, path):
        kind = ending(path)
        # closed with self.raw
        file = gzip.open(self.raw) if path.suffix.lower() == ".gz" else self.raw  # noqa: SIM115
        if kind != ".parquet":
            skip_byte_order_mark(file, path)
        if kind in TEXT:
            opened = decoded(file)  # line ends become \n
            blocks = iter(lambda: opened.read(4 * PIECE), "")
            for text, ends in cut(blocks, self.separator):
                if END in text:
                    self.spelled_out = path
                yield path, readable(text), ends
            return
        readers = {".parquet": read_parquet, ".csv": read_csv, ".json": read_json}
        unit = {".parquet": "row", ".json": "item"}.get(kind, "line")
        for number, text in readers.get(kind, read_json_lines)(file, path, self.column):
            # a row stays whole or not at all
            pieces = [(text, True)] if isinstance(text, Unreadable) else cut([text])
            for part, ends in pieces:
                yield f"{path}, {unit} {number}", part, ends


def skip_byte_order_mark(file, path):
    name = json.detect_encoding(file.peek(4)[:4]).upper()
    if name == "UTF-8-SIG":
        file.read(len(codecs.BOM_UTF8))
    elif name != "UTF-8":
        name = name.replace("-BE", "BE").replace("-LE", "LE")  # as iconv spells it
        quoted, iconv = shlex.quote(str(path)), f"iconv -f {name} -t UTF-8"
        zipped = path.suffix.lower() == ".gz"
        command = f"gzip -dc {quoted} | {iconv}" if zipped else f"{iconv} {quoted}"
        raise InputError(f"{path} is {name}, expected UTF-8; convert it: {command} > NEW")


def decoded(file, newline=None):
    """A file of bytes as one of text. A byte that is not UTF-8 becomes a lone surrogate."""
    return io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline=newline)


def cut(blocks, separator=None):
    """Cut a text at each separator, and what is longer than PIECE into pieces.

    blocks: the text, in strings of any length. Yields (text, whether a document ends here). The
    newlines around a separator are dropped."""

    def strip(text, begins, ends):
        text = text.lstrip("\n") if separator and begins else text
        return text.rstrip("\n") if separator and ends else text

    rest, inside = "", False  # inside: a part of this document has been given
    for block in blocks:
        rest += block
        documents = rest.split(separator) if separator else [rest]
        for i, text in enumerate(documents):
            last = i == len(documents) - 1  # not known to be complete
            start = 0
            while len(text) - start > PIECE + len(separator or ""):
                end = place_to_cut(text, start)
                yield strip(text[start:end], not inside, False), False
                start, inside = end, True
            rest = text[start:]
            if not last:
                yield strip(rest, not inside, True), True
                inside = False
    yield strip(rest, not inside, True), True


def place_to_cut(text, start):
    """Where to end the piece of a longer text that begins at `start`.

    After a newline or before a space, each between two other characters: there GPT-2's
    pre-tokenizer and its successors divide a text anyway, so a piece's tokens are those of the
    whole. If there is no such place in half a piece, anywhere."""
    end = start + PIECE
    for char, after in (("\n", 1), (" ", 0)):
        at = end
        while (at := text.rfind(char, start + PIECE // 2, at)) >= 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + after
    return end


def text_of(row, column):
    """The text of a row that JSON describes, or Unreadable."""
    if not isinstance(row, dict):
        return Unreadable("not an object with fields")
    text = row.get(column)
    if isinstance(text, str):
        return readable(text)
    if column not in row:
        return Unreadable(f"no '{column}', only {names(row)}")
    return Unreadable(f"'{column}' is {json.dumps(text, default=str)[:20]}, not a string")


def names(columns):
    return ", ".join(f"'{name}'" for name in list(columns)[:20]) or "no columns"


def check_column(path, column, columns):
    if column not in columns:
        raise InputError(f"{path} has no column '{column}', only {names(columns)}")


def read_json_lines(file, path, column):
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line.decode(errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            yield number, Unreadable(f"not JSON ({reason(error)})")
        else:
            yield number, text_of(row, column)


def reason(error):
    """Why something is not JSON, without a place in the part of it that was in memory."""
    return error.args[0].split(":")[0]


def read_json(file, path, column):
    """The objects of an array, or one after another, of which only one is held in memory."""
    text, decoder = decoded(file), json.JSONDecoder()
    rest, number, depth = "", 0, 0  # depth: 1 in an array
    while more := text.read(max(PIECE, len(rest))):  # twice as much for what was cut off
        rest, at = rest + more, 0
        while True:
            between = BETWEEN.match(rest, at)[0]
            depth += between.count("[") - between.count("]")
            at += len(between)
            try:
                row, at = decoder.raw_decode(rest, at)
            except (ValueError, RecursionError) as error:
                problem, place = reason(error), getattr(error, "pos", 0)
                break
            number += 1
            yield number, text_of(row, column)
        cut_off = problem.startswith("Unterminated") or place > len(rest) - 10
        if not cut_off:
            raise InputError(f"{path} is not JSON after item {number}: {problem}")
        rest = rest[at:]
    if rest or depth:
        problem = problem if rest else "it ends within an array"
        raise InputError(f"{path} is not JSON after item {number}: {problem}")


def read_csv(file, path, column):
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(decoded(file, newline=""), strict=True)  # else a stray quote swallows rows
    try:
        header = next(rows, [])
        check_column(path, column, header)
        index = header.index(column)
        for row in rows:
            if row:
                short = Unreadable(f"no '{column}', only {len(row)} of {len(header)} columns")
                yield rows.line_num, readable(row[index]) if index < len(row) else short
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}") from None


def read_parquet(file, path, column):
    import pyarrow as pa  # late: slow to import, and comes with datasets
    import pyarrow.parquet

    try:
        table = pa.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        check_column(path, column, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(64, columns=[column]):
            try:
                values = batch.column(0).to_pylist()
            except UnicodeDecodeError:
                values = batch.column(0).cast(pa.binary()).to_pylist()
                values = [value and value.decode(errors="surrogateescape") for value in values]
            for value in values:
                number += 1
                yield number, text_of({column: value}, column)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None
