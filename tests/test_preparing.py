"""data/text/prepare.py as a user runs it, on files of many kinds, and what ends it early."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import writing
from common import BYTE_META, char_meta

from configurator import InputError
from nanomoe.dataset import Dataset
from tests.helpers import MACBETH, full, succeeded, until
from tests.preparing import decode, digest, half_an_answer, prepare_text, recorded, start

# runs a script, and prints the most memory that it and its processes had, in MB
MEMORY = """
import re, resource, runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
most = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print("kB", most, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def write_lines(path, number):
    """A file of JSON lines, with a document of each length up to 2,000 characters."""
    rows = ({"text": MACBETH[i % 77_000 :][: i * 37 % 2000 + 1], "i": i} for i in range(number))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def children(pid):
    found = subprocess.run(["ps", "-wwo", "pid=,args=", "--ppid", str(pid)], capture_output=True)
    lines = [line.split(None, 1) for line in found.stdout.decode().splitlines()]
    return [int(pid) for pid, args in lines if "spawn_main" in args]


def test_folders_and_formats_together(tmp_path, capsys):
    """Documents keep the order of the files, whatever the number of processes."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("Story 0\n<|endoftext|>\nStory 1\n")
    (tmp_path / "in" / "b.csv").write_text("body,n\nStory 2,1\nStory 3,1\n")
    rows = "".join(json.dumps({"body": f"Story {i}"}) + "\n" for i in range(4, 10_000))
    (tmp_path / "in" / "sub" / "c.jsonl").write_text(rows)
    (tmp_path / "in" / "picture.png").touch()
    flags = ["--input", tmp_path / "in", "--column=body", "--separator=<|endoftext|>"]
    found = []
    for processes in (1, 3):  # for three batches
        mine = prepare_text(tmp_path, *flags, "--tokenizer=byte", f"--processes={processes}")
        out = capsys.readouterr().out
        assert "in: 3 files, and 1 of other kinds" in out and "has <|endoftext|>" not in out
        found.append(digest(mine))
    assert found[0] == found[1]
    train = "".join(f"Story {i}\n" for i in range(10_000) if i % 10 != 9)
    assert decode(mine, "train") == train
    assert decode(mine, "val") == "".join(f"Story {i}\n" for i in range(9, 10_000, 10))
    assert Dataset(mine, 8).meta["train"]["bytes"] == len(train) - 9000


def test_a_separator_in_the_text_is_told(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text(("Story. " * 30 + "\n<|endoftext|>\n") * 100)
    prepare_text(tmp_path, "--input", path)
    hint = f"{path} has <|endoftext|> in its text: --separator '<|endoftext|>' makes"
    assert capsys.readouterr().out.count(hint) == 1


@pytest.mark.parametrize("name, size", [("a.txt", 3), full("a.jsonl", 20), full("a.txt", 150)])
def test_one_line_of_many_megabytes(name, size, copy_of, tmp_path):
    """Its last tenth is for validation, and no process holds it whole."""
    folder = copy_of("text", changed=True)
    text = ("word " * 20 + "x" * 300_000) * (size * 10**6 // 300_100)
    path = tmp_path / name
    path.write_text(text if name == "a.txt" else json.dumps({"text": text}))
    flags = ["--input", str(path), "--tokenizer=char", "--name=mine", "--processes=1"]
    command = [sys.executable, "-c", MEMORY, str(folder / "prepare.py"), *flags]
    out = succeeded(subprocess.run(command, capture_output=True, text=True))
    mine = folder.parent / "mine"
    assert decode(mine, "train")[:-1] + decode(mine, "val")[:-1] == text
    assert 0.09 < len(decode(mine, "val")) / len(text) < 0.11
    if name == "a.txt":
        most = re.search(r"kB (\d+) (\d+)", out).groups()
        assert max(map(int, most)) < 150_000, most


def test_whatever_ends_it_it_goes_on(copy_of, tmp_path, capsys):
    """In the end the files are those of a preparation that ran through, with one process."""
    path = write_lines(tmp_path / "a.jsonl", 700)
    flags = ["--input", path, "--tokenizer=bpe", "--vocab_size=300"]
    whole = prepare_text(tmp_path, *flags)
    folder = copy_of("text", changed=True)
    mine = folder.parent / "mine"
    before = 0

    def under_way():
        process = start(folder, *flags, "--name=mine", "--processes=2", env={"SLOW": "0.05"})
        until(lambda: recorded(mine) > before)
        workers = children(process.pid)
        assert len(workers) == 2
        return process, workers

    def ended(process, workers):
        """Its exit code and its errors. Its workers, also one that hangs, end with it."""
        out, error = process.communicate(timeout=20)
        assert not before or f"continuing after {before:,} documents" in out
        assert "Traceback" not in error and not (mine / "meta.json").exists()
        # without /exe it has ended, and waits for whoever has to collect it
        until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in workers), 5)
        return process.returncode, error

    process, workers = under_way()
    os.kill(workers[0], signal.SIGSTOP)
    os.kill(workers[1], signal.SIGKILL)
    code, error = ended(process, workers)
    words = "error: a tokenizing process was killed, perhaps because memory ran out"
    assert code == 1 and error.splitlines()[-1].startswith(words)
    before = recorded(mine)

    process, workers = under_way()
    for worker in workers:  # Ctrl-C is for their parent alone
        os.kill(worker, signal.SIGINT)
    time.sleep(0.1)
    os.kill(workers[0], signal.SIGSTOP)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    assert ended(process, workers)[0] == 130
    before = recorded(mine)

    process, workers = under_way()
    process.kill()
    assert ended(process, workers)[0] == -signal.SIGKILL
    before = recorded(mine)

    # other settings, with which there is no text: what is done stays
    with pytest.raises(InputError, match="cannot be read, more than 1%"):
        prepare_text(mine.parent, "--input", path, "--column=i")
    assert recorded(mine) == before
    lacks = shutil.copytree(mine.parent, tmp_path / "lacks")
    other = shutil.copytree(mine.parent, tmp_path / "other")
    unfinished = lacks / "mine" / "unfinished"
    progress = json.loads((unfinished / "progress.json").read_text())
    os.truncate(unfinished / "train.bin", progress["totals"]["train"]["size"] - 1)

    for data, words in ((mine.parent, f"continuing after {before:,}"), (lacks, "starting over")):
        capsys.readouterr()
        prepare_text(data, *flags)
        assert words in capsys.readouterr().out
        assert digest(data / "mine") == digest(whole)
    write_lines(tmp_path / "a.jsonl", 100)  # another text
    prepare_text(other, *flags)
    words = f"starting over: what {other / 'mine' / 'unfinished'} holds is of other input"
    assert words in capsys.readouterr().out
    assert len(Dataset(other / "mine", 8).train) < len(Dataset(whole, 8).train)


def test_two_at_a_time(tmp_path):
    with (
        writing.Unfinished(tmp_path / "mine", {}),
        pytest.raises(InputError, match=f"another process is preparing {tmp_path / 'mine'}"),
    ):
        prepare_text(tmp_path, "--input", write_lines(tmp_path / "a.jsonl", 50))


def test_a_worker_that_fails(monkeypatch):
    """That it was killed in the middle of its answer is told; or its own error."""
    batches = [(0, [("train", "é", True)])]
    with pytest.raises(InputError, match="characters outside the vocabulary: 'é'"):
        list(writing.tokenize(batches, char_meta("ab\n"), 1))
    monkeypatch.setattr(writing, "encode_all", half_an_answer)
    with pytest.raises(OSError, match="a tokenizing process was killed, perhaps because memory"):
        list(writing.tokenize(batches, BYTE_META, 1))


def test_a_slow_process_holds_the_reading_back():
    """The answers of the others wait for it in memory, so there is a limit to them."""
    read = 0

    def batches():
        nonlocal read
        for read in range(300):
            yield read, [("train", "text", True)]

    ahead = []
    for index, _ in writing.tokenize(batches(), BYTE_META, 2):
        if index == 0:
            slow = writing.multiprocessing.active_children()[0].pid
            os.kill(slow, signal.SIGSTOP)
            wake = threading.Timer(0.5, os.kill, (slow, signal.SIGCONT))
            wake.start()
        ahead.append(read - index)
    wake.join()
    assert len(ahead) == 300 and 0 < max(ahead) <= 2 * writing.AHEAD


def test_a_full_disk(copy_of, tmp_path):
    """Here the system refuses to write more than 300 kB into a file."""
    flags = ["--input", write_lines(tmp_path / "a.jsonl", 800), "--tokenizer=byte"]
    folder = copy_of("text", changed=True)
    process = start(folder, *flags, "--name=mine", "--processes=1")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
    error = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in error, error
    last = error.splitlines()[-1]  # a progress bar may come before
    assert last.startswith("error: could not write into ") and "File too large; the same" in last
    assert recorded(folder.parent / "mine")
    mine = prepare_text(folder.parent, *flags)
    rows = [json.loads(line)["text"] for line in Path(flags[1]).read_text().splitlines()]
    texts = [text + "\n" * (not text.endswith("\n")) for text in rows if text.strip()]
    assert decode(mine, "val") == "".join(texts[9::10])
    del texts[9::10]
    assert decode(mine, "train") == "".join(texts)


# that it is not good enough is known only at the end
MOSTLY_GOOD = '{"text": "good"}\n' * 960 + '{"text": null}\n' * 40


@pytest.mark.parametrize(
    "content, flags, words",
    [
        ({"a.txt": " \n", "b.jsonl": "\n"}, [], "there is no text in"),
        ({"a.jsonl": '{"a": 1}\n' * 9}, [], "9 of 9 documents cannot be read, more than 1%"),
        ({"a.jsonl": MOSTLY_GOOD}, [], "40 of 1,000 documents cannot be read, more than 1%"),
        ({"a.txt": "x" * 99}, ["--processes=0"], "--processes is 0, expected at least 1"),
        ({"a.txt": "x" * 99}, ["--separator="], "--separator is empty"),
        ({"a.txt": "x" * 99}, ["--val_fraction=1"], "--val_fraction is 1.0, expected between 0"),
        ({"a.txt": "x" * 99}, ["--name=../x"], "--name '../x' is not a plain folder name"),
        ({"a.txt": "x"}, [], "the train split is empty: there is not enough text"),
        ({"a.txt": MACBETH}, ["--vocab_size=300"], "--vocab_size is for --tokenizer bpe"),
        ({"a.txt": MACBETH}, ["--tokenizer=gpt3"], "expected char, byte, gpt2, bpe or a tokenizer"),
        ({"a.txt": MACBETH}, ["--tokenizer=no/tokenizer.json"], "json cannot be read"),
        ({"a.txt": MACBETH}, ["--tokenizer=bpe", "--vocab_size=200"], "expected at least 257"),
        ({"a.txt": MACBETH}, ["--tokenizer=bpe", "--vocab_size=90000"], "pairs to merge: it fills"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_input(content, flags, words, tmp_path):
    """Nothing stays of it."""
    (tmp_path / "in").mkdir()
    for name, text in content.items():
        (tmp_path / "in" / name).write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        prepare_text(tmp_path, "--input", tmp_path / "in", *flags)
    assert not (tmp_path / "mine").exists()
