"""Documents from files, read in pieces, so that no file has to fit into memory."""

import codecs
import csv
import glob
import gzip
import io
import itertools
import json
import os
import shlex
import zlib
from pathlib import Path
from typing import NamedTuple

from configurator import InputError

TEXT = (".txt", ".md")
ENDINGS = (*TEXT, ".jsonl", ".ndjson", ".json", ".csv")  # each also with .gz
ALL_ENDINGS = f"{' '.join(ENDINGS)} (each also with .gz) .parquet"
PIECE = 2**16  # characters at most
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
    ending or if a folder has nothing else, FileNotFoundError.
    """
    files = []
    for name in map(os.path.expanduser, inputs):
        path = Path(name)
        if not name:
            raise FileNotFoundError("an input is empty")
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not is_hidden(p, path))
            known = [p for p in inside if ending(p)]
            if not known:
                raise InputError(f"{path} has no file that ends in {ALL_ENDINGS}")
            if len(known) < len(inside):
                print(f"{path}: {len(known)} files, and {len(inside) - len(known)} of other kinds")
            files += known
        else:
            paths = [path] if path.exists() else map(Path, sorted(glob.glob(name, recursive=True)))
            found = [p for p in paths if not p.is_dir()]
            if not found:
                raise FileNotFoundError(f"there is no file {name}")
            files += found
    for path in files:
        if not ending(path):
            raise InputError(f"{path} has an unknown ending, expected {ALL_ENDINGS}")
    unique = {}
    for path in files:
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def is_hidden(path, folder):
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def ending(path):
    """The ending in lower case, without .gz, or None if we do not read such files."""
    name = path.name.lower()
    if name.endswith(".parquet"):
        return ".parquet"
    suffix = Path(name.removesuffix(".gz")).suffix
    return suffix if suffix in ENDINGS else None


def file_states(files):
    """What tells whether files have changed, for json."""
    states = ((path.resolve(), path.stat()) for path in files)
    return [[str(path), state.st_size, state.st_mtime_ns] for path, state in states]


class Reader:
    """The pieces of all documents, with a state from which another Reader continues.

    A subclass has read(), which yields (where, text or Unreadable, whether a document ends here),
    and keeps `position`, a dict for json, up to date with what it has yielded.

    An empty document is left out. What cannot be read is left out and counted; refuse_unreadable()
    says when that is too much.
    """

    STATE = ("position", "documents", "start", "broken", "unreadable", "examples")

    def __init__(self, limit=None):
        self.limit = limit  # on the number of documents
        self.position = {}
        self.documents = 0  # that are read
        self.start = 0  # of the next piece, in its document
        self.broken = False  # whether the next piece is in a document that could not be read
        self.unreadable = 0
        self.examples = []  # of unreadable documents, the first three

    def state(self):
        return {name: getattr(self, name) for name in self.STATE}

    def continue_from(self, state):
        vars(self).update(state)

    def __iter__(self):
        for where, text, ends in self.read() if self.documents != self.limit else ():
            if self.broken:
                self.broken = not ends
                continue
            problem = text.reason if isinstance(text, Unreadable) else what_is_wrong(text)
            if problem:
                self.unreadable += 1
                self.examples = [*self.examples, f"{where}: {problem}"][:3]
                self.broken = not ends
                if not self.start:
                    if self.unreadable == 10_000 and not self.documents:
                        self.refuse_unreadable()
                    continue
                text, ends = "", True  # what came before stays
            if ends and not self.start and (not text or text.isspace()):
                continue
            piece = Piece(text, ends, self.documents, self.start)
            self.documents += ends
            self.start = 0 if ends else self.start + len(text)
            yield piece
            if self.documents == self.limit:
                return

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


def what_is_wrong(text):
    """Why a text cannot be written as UTF-8, or None."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # how Python reads a byte that is not UTF-8
            return f"byte 0x{code - 0xDC00:02x} is not UTF-8"
        return f"lone surrogate \\u{code:04x}"


class FileReader(Reader):
    """The documents of files, one file after another. Reading raises InputError, OSError.

    column: where a row's text is. separator: what stands between the documents of a text file; by
    default each file is one document.
    """

    def __init__(self, files, column="text", separator=None, limit=None):
        super().__init__(limit)
        self.files, self.column, self.separator = files, column, separator
        self.position = {"file": 0, "pieces": 0}
        self.sizes = [os.path.getsize(path) for path in files]
        self.raw, self.done = None, 0  # the open file, and the bytes of those before it
        self.spelled_out = None  # a text file with <|endoftext|> in its text

    def progress(self):
        """The bytes that are read."""
        return self.done + (0 if self.raw is None or self.raw.closed else self.raw.tell())

    def read(self):
        self.done = sum(self.sizes[: self.position["file"]])
        for index in range(self.position["file"], len(self.files)):
            path = self.files[index]
            skip = self.position["pieces"] if index == self.position["file"] else 0
            try:
                # in Python's 8 kB at a time, reading long lines takes three times as long
                with open(path, "rb", buffering=2**18) as self.raw:
                    pieces = self.read_file(path)
                    for count, piece in enumerate(itertools.islice(pieces, skip, None), skip + 1):
                        self.position = {"file": index, "pieces": count}
                        yield piece
                self.done += self.sizes[index]
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise OSError(f"{path} is damaged: {error}") from None
        self.position = {"file": len(self.files), "pieces": 0}

    def read_file(self, path):
        kind = ending(path)
        if kind == ".parquet":
            rows, unit = read_parquet(self.raw, path, self.column), "row"
        else:
            zipped = path.name.lower().endswith(".gz")
            file = gzip.open(self.raw) if zipped else self.raw  # noqa: SIM115 (closed with raw)
            skip_byte_order_mark(file, path)
            if kind in TEXT:
                for text, ends in cut(text_blocks(file), self.separator):
                    if END in text:
                        self.spelled_out = path
                    yield path, text, ends
                return
            read = {".csv": read_csv, ".json": read_json}.get(kind, read_json_lines)
            rows, unit = read(file, path, self.column), "item" if kind == ".json" else "line"
        for number, text in rows:
            where = f"{path}, {unit} {number}"
            if isinstance(text, Unreadable) or len(text) <= PIECE:
                yield where, text, True
            elif problem := what_is_wrong(text):
                yield where, Unreadable(problem), True
            else:
                for part, ends in cut([text]):
                    yield where, part, ends


def skip_byte_order_mark(file, path):
    head = file.peek(4)[:4]
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        known = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
        name = known.get(head, "UTF-16")
        if name == "UTF-16" and b"\xff" not in head:
            name += "BE" if head.startswith(b"\0") else "LE"
        path, iconv = shlex.quote(str(path)), f"iconv -f {name} -t UTF-8"
        command = f"gzip -dc {path} | {iconv}" if path.endswith("gz") else f"{iconv} {path}"
        raise InputError(f"{path} is {name}, expected UTF-8; convert it: {command} > NEW")


def text_blocks(file):
    """The text of a file, in blocks. Line ends become \\n; a byte that is not UTF-8 becomes a lone
    surrogate."""
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape")
    return iter(lambda: text.read(4 * PIECE), "")


def cut(blocks, separator=None):
    """Cut a text at each separator, and what is longer than PIECE into pieces.

    blocks: the text, in strings of any length. Yields (text, whether a document ends here). The
    newlines around a separator are dropped.
    """

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
    whole. If there is no such place in half a piece, anywhere.
    """
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
        return text
    if column not in row:
        return Unreadable(f"no '{column}', only {names(row)}")
    return Unreadable(f"'{column}' is {json.dumps(text, default=str)[:20]}, not a string")


def names(columns):
    return ", ".join(f"'{name}'" for name in list(columns)[:20]) or "no columns"


def read_json_lines(file, path, column):
    for number, line in enumerate(file, 1):
        if line.isspace():
            continue
        try:
            row = json.loads(line.decode(errors="surrogateescape"))
        except (ValueError, RecursionError) as error:
            yield number, Unreadable(f"not JSON ({error.args[0].split(':')[0]})")
        else:
            yield number, text_of(row, column)


def read_json(file, path, column):
    """The objects of an array, or one after another, of which only one is held in memory."""
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape")
    decode = json.JSONDecoder().raw_decode
    rest, at, number, depth = "", 0, 0, 0  # depth: 1 in an array
    while True:
        while at < len(rest) and (rest[at].isspace() or rest[at] in ",[]"):
            depth += {"[": 1, "]": -1}.get(rest[at], 0)
            at += 1
        if at == len(rest):
            rest, at = text.read(PIECE), 0
            if not rest:
                break
            continue
        try:
            row, end = decode(rest, at)
        except json.JSONDecodeError as error:
            cut_off = error.msg.startswith("Unterminated") or error.pos > len(rest) - 10
            more = text.read(max(PIECE, len(rest))) if cut_off else ""
            if not more:
                raise InputError(f"{path} is not JSON after item {number}: {error.msg}") from None
            rest, at = rest[at:] + more, 0
            continue
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, deep nesting
            raise InputError(f"{path}, item {number + 1} cannot be read: {error}") from None
        if end == len(rest) and (more := text.read(PIECE)):  # a number may go on
            rest += more
            continue
        at, number = end, number + 1
        yield number, text_of(row, column)
    if depth:
        raise InputError(f"{path} is not JSON after item {number}: it ends within an array")


def read_csv(file, path, column):
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
    rows = csv.reader(text, strict=True)  # else a stray quote swallows rows
    try:
        header = next(rows, [])
        if column not in header:
            raise InputError(f"{path} has no column '{column}', only {names(header)}")
        index = header.index(column)
        for row in rows:
            if row:
                short = Unreadable(f"no '{column}', only {len(row)} of {len(header)} columns")
                yield rows.line_num, row[index] if index < len(row) else short
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: {error}") from None


def read_parquet(file, path, column):
    import pyarrow as pa  # late: slow to import, and comes with datasets
    import pyarrow.parquet

    try:
        table = pa.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
        if column not in table.schema_arrow.names:
            raise InputError(
                f"{path} has no column '{column}', only {names(table.schema_arrow.names)}"
            )
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
