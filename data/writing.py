"""Writing a dataset folder: all of it or nothing, and after a kill from where it stopped."""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from multiprocessing.connection import wait

import numpy as np
from filelock import FileLock, Timeout

from configurator import InputError
from nanomoe.tokenizer import FILE, Tokenizer, dtype_for, without_file

BATCH = 2**20  # characters that a process tokenizes at a time
CHECKPOINT = 2**26  # bytes of text after which progress is recorded
KILLED = "a tokenizing process was killed, perhaps because memory ran out (--processes=N: fewer)"
AHEAD = 4  # batches per process that may be done before an earlier one is


@contextlib.contextmanager
def explained(problem):
    """Turn an error of the system into a line that says what the user can do."""
    try:
        yield
    except (EOFError, OSError) as error:
        reason = getattr(error, "strerror", None)
        problem = f"{problem}: {reason}" if reason else problem
        raise OSError(f"{problem}; the same command continues after the last checkpoint") from None


class Unfinished:
    """The files of a dataset while they are written, in FOLDER/unfinished/.

    folder: of the dataset. Only one process at a time can have it. `progress` is what
    record_progress() last recorded there for the same settings, or {}: what the files hold beyond
    that is dropped. finish() moves the files to their place. Raises InputError, OSError.

    settings: what the files are made from, for json. splits: the names of the token files."""

    def __init__(self, folder, settings, splits=("train", "val")):
        self.folder, self.place, self.splits = folder, folder / "unfinished", splits
        self.settings = json.loads(json.dumps(settings))
        self.progress = {}
        self.record = self.place / "progress.json"
        self.totals = {split: {"tokens": 0, "bytes": 0, "size": 0} for split in splits}

    def __enter__(self):
        self.place.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.place / "lock", timeout=0)
        try:
            self.lock.acquire()
        except Timeout:
            raise InputError(f"another process is preparing {self.folder}") from None
        with contextlib.suppress(OSError, ValueError, KeyError):
            recorded = json.loads(self.record.read_text())
            sizes = {split: recorded["totals"][split]["size"] for split in self.splits}
            whole = all((self.place / f"{s}.bin").stat().st_size >= sizes[s] for s in self.splits)
            if recorded["settings"] == self.settings and whole:
                self.progress, self.totals = recorded["progress"], recorded["totals"]
        return self

    @functools.cached_property
    def files(self):
        """{split: token file}, opened when first used. Before this nothing of an earlier start is
        touched, so an error in a command costs nothing."""
        if not self.progress and self.record.exists():
            print(f"starting over: what {self.place} holds is of other input or settings")
            self.record.unlink()  # before the files that it describes
        files = {}
        for split in self.splits:
            files[split] = open(self.place / f"{split}.bin", "ab")  # noqa: SIM115 (__exit__ closes)
            files[split].truncate(self.totals[split]["size"])  # what is recorded
        return files

    def write(self, split, ids, num_bytes):
        """Append token ids of the dataset's dtype; num_bytes: the UTF-8 text they stand for."""
        with explained(f"could not write into {self.place}"):
            self.files[split].write(ids)
        total = self.totals[split]
        total["tokens"] += len(ids)
        total["bytes"] += num_bytes
        total["size"] += ids.nbytes

    def record_progress(self, progress):
        """progress: for json. A kill or a power cut after this loses nothing before it."""
        recorded = {"settings": self.settings, "progress": progress, "totals": self.totals}
        temporary = self.place / "progress.json.tmp"
        with explained(f"could not write into {self.place}"):
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
            temporary.write_text(json.dumps(recorded))
            os.replace(temporary, self.record)
        self.progress = progress

    def finish(self, meta, source):
        """Complete the dataset: meta.json, and tokenizer.json if there is one."""
        meta, tokenizer_json = without_file(meta)
        for split, total in self.totals.items():
            with explained(f"could not write into {self.place}"):
                self.files[split].close()
            if not total.pop("size"):
                raise InputError(f"the {split} split is empty: there is not enough text")
            with open(self.place / f"{split}.bin", "rb") as file:
                total["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        meta["dtype"] = dtype_for(meta["vocab_size"]).name
        meta |= {"source": source, "splits": list(self.splits), **self.totals}
        names = ["meta.json", *(f"{split}.bin" for split in self.splits)]
        (self.place / "meta.json").write_text(json.dumps(meta, indent=1))
        if tokenizer_json:
            (self.place / FILE).write_text(tokenizer_json, encoding="utf-8")
            names.insert(1, FILE)
        # From here on a second start does all again. A folder with a meta file but without its .bin
        # files counts as not prepared; one without a meta file would look like nanoGPT's. So an
        # earlier dataset's .bin files go first, and the new ones come last.
        self.record.unlink(missing_ok=True)
        for split in self.splits:
            (self.folder / f"{split}.bin").unlink(missing_ok=True)
        for name in names:
            os.replace(self.place / name, self.folder / name)
        for split, total in self.totals.items():
            tokens, num_bytes = total["tokens"], total["bytes"]
            print(f"{self.folder / split}.bin: {tokens:,} tokens, {num_bytes:,} bytes of text")

    def __exit__(self, kind, error, _):
        opened = vars(self).get("files", {})
        for file in opened.values():
            with contextlib.suppress(OSError):  # a full disk
                file.close()
        # the next start continues, unless it would end in the same way
        would_fail = isinstance(error, InputError) and opened
        if would_fail or not self.record.exists():
            shutil.rmtree(self.place, ignore_errors=True)
            with contextlib.suppress(OSError):  # an earlier dataset is in it
                self.folder.rmdir()
        self.lock.release()


def is_prepared(folder, source):
    """Whether the folder holds complete files from this source. Prints so if it does."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        size = np.dtype(meta["dtype"]).itemsize
        complete = meta["source"] == source and all(
            os.path.getsize(folder / f"{split}.bin") == meta[split]["tokens"] * size
            for split in meta["splits"]
        )
    except (OSError, ValueError, KeyError):
        return False
    if complete:
        print(f"{folder} is prepared already; delete {folder / 'meta.json'} to make it again")
    return complete


def write_dataset(folder, meta, pieces, source, splits=("train", "val")):
    """Write SPLIT.bin for every split, meta.json, and tokenizer.json if there is one.

    meta: char_meta(text), BYTE_META, GPT2_META, bpe_meta() or train_bpe(). pieces: an iterable of
    (split, token ids, number of bytes of text they stand for), in the order in which the files
    hold them. Raises InputError if a split is empty, or if another process writes this folder."""
    with Unfinished(folder, {}, splits) as unfinished:
        dtype = dtype_for(meta["vocab_size"])
        for split, ids, num_bytes in pieces:
            unfinished.write(split, np.asarray(ids).astype(dtype), num_bytes)
        unfinished.finish(meta, source)


def write_texts(folder, meta, texts, source):
    """write_dataset() for texts in memory: {"train": str, "val": str}."""
    tokenizer = Tokenizer(meta)
    pieces = ((split, tokenizer.encode(text), len(text.encode())) for split, text in texts.items())
    write_dataset(folder, meta, pieces, source, tuple(texts))


def write_documents(unfinished, meta, source, reader, divide, processes):
    """write_dataset() for documents that are too large for memory.

    Each document ends with the tokenizer's separator. `processes` tokenize at the same time; the
    documents keep their order. A second start with the same `unfinished` continues after the last
    checkpoint, and ends with the same files.

    reader: a documents.Reader. divide: a function of a Piece that returns a list of (split, text,
    whether a document ends here). Raises InputError if too many documents cannot be read, OSError.
    """
    Tokenizer(meta)  # fails here rather than in each process
    progress = unfinished.progress
    if "reader" in progress:
        reader.continue_from(progress["reader"])
        print(f"continuing after {reader.documents:,} documents", flush=True)
    written = 0
    # closed before an error is printed, for the progress bar
    with contextlib.closing(read_batches(reader, divide)) as batches:
        for state, parts in tokenize(batches, meta, processes):
            for split, ids, num_bytes in parts:
                unfinished.write(split, ids, num_bytes)
                written += num_bytes
            if written >= CHECKPOINT:
                unfinished.record_progress(progress | {"reader": state})
                written = 0
    reader.refuse_unreadable()
    unfinished.finish(meta, source)


def read_batches(reader, divide):
    """Yield (state of the reader, [(split, text, whether a document ends here)])."""
    parts, characters = [], 0
    for piece in reader.with_bar("text"):
        parts += divide(piece)
        characters += len(piece.text)
        if characters >= BATCH or len(parts) >= 4096:
            yield reader.state(), parts
            parts, characters = [], 0
    yield reader.state(), parts


def tokenize(batches, meta, processes):
    """read_batches(), in their order, with [(split, ids, number of bytes)] for the parts, one for
    each split. Raises OSError if a process dies, and what one of them raises."""
    batches = enumerate(batches)
    with started_workers(meta, processes) as free:
        busy, results, number = {}, {}, 0  # number: of the batch that is yielded next
        batch = next(batches, None)
        while batch or busy:
            # the answers of fast processes wait in memory for a slow one, so there is a limit
            if batch and free and batch[0] < number + AHEAD * processes:
                connection = free.pop()
                index, (state, parts) = batch
                with explained(KILLED):
                    connection.send(parts)
                busy[connection] = index, state
                batch = next(batches, None)  # is read while the workers tokenize
                continue
            for connection in wait(list(busy)):
                index, state = busy.pop(connection)
                with explained(KILLED):
                    answer = connection.recv()
                if isinstance(answer, Exception):
                    raise answer
                results[index] = state, answer
                free.append(connection)
            while number in results:
                yield results.pop(number)
                number += 1


@contextlib.contextmanager
def started_workers(meta, processes):
    """A list of connections to new processes, which run encode_all().

    Each process has a pipe of its own, whose other end only this process holds. So each side sees
    at once that the other has died, whatever it was doing."""
    spawn = multiprocessing.get_context("spawn")  # it inherits no lock and no other pipe
    workers = {}
    # Ctrl-C is for this process. Those that it starts ignore it from the beginning.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for _ in range(processes):
            connection, other_end = spawn.Pipe()
            workers[connection] = spawn.Process(target=encode_all, args=(meta, other_end))
            workers[connection].start()
            other_end.close()
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        yield list(workers)
    finally:
        for connection, process in workers.items():
            connection.close()
            process.kill()  # it holds nothing that could be lost; even a stopped one ends by this
            process.join()


def encode_all(meta, connection):
    """Answer what comes with its encode_parts(), or with the exception that this raises, until the
    other end is closed."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            parts = connection.recv()
            try:
                tokenizer = tokenizer or Tokenizer(meta)
                answer = encode_parts(tokenizer, parts)
            except Exception as error:
                answer = error
            connection.send(answer)


def encode_parts(tokenizer, parts):
    dtype = dtype_for(tokenizer.vocab_size)
    encoded = {}
    for split, text, ends in parts:
        ids, num_bytes = encoded.setdefault(split, ([], []))
        ids.append(tokenizer.encode_document(text, ends).astype(dtype))
        num_bytes.append(len(text.encode()))
    return [(split, np.concatenate(ids), sum(sizes)) for split, (ids, sizes) in encoded.items()]
