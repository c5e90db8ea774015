"""data/text/prepare.py as a user runs it, on files of many kinds, and what ends it early."""

import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time

import pyarrow.parquet
import pytest

import nanomoe.cores
from nanomoe.cores import num_cores
from nanomoe.dataset import Dataset
from tests.helpers import MACBETH, ROOT, full, one_line
from tests.preparing import decode, prepare

# runs a script, and prints the most memory that it and its processes had, in MB
MEMORY = """
import re, resource, runpy, sys
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
most = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]
print("kB", most, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
BATCH, CHECKPOINT, WRITTEN = "BATCH = 2**20", "CHECKPOINT = 2**26", "written += characters"


@pytest.fixture
def text_folder(copy_of):
    """A copy of data/text whose checkpoints are every 64 thousand characters, and which start()
    makes slow, so that it can be stopped on its way."""
    folder = copy_of("text")
    path = folder.parent / "writing.py"
    code = path.read_text()
    assert BATCH in code and CHECKPOINT in code
    code = code.replace(BATCH, "BATCH = 2**13").replace(CHECKPOINT, "CHECKPOINT = 2**16")
    assert code.count(WRITTEN) == 1
    code = code.replace(WRITTEN, f"time.sleep(float(os.environ.get('SLOW', 0))); {WRITTEN}")
    path.write_text("import time\n" + code)
    return folder


def digest(folder):
    return [
        hashlib.sha256((folder / f"{s}.bin").read_bytes()).hexdigest() for s in ("train", "val")
    ]


def write_lines(path, number):
    """A file of JSON lines, with a document of each length up to 2,000 characters."""
    rows = ({"text": MACBETH[i % 77_000 :][: i * 37 % 2000 + 1], "i": i} for i in range(number))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def start(folder, *args, **options):
    return subprocess.Popen(
        [sys.executable, str(folder / "prepare.py"), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SLOW": "0.05"},
        # whatever the shell that runs the tests ignores
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def children(pid):
    found = subprocess.run(["ps", "-wwo", "pid=,args=", "--ppid", str(pid)], capture_output=True)
    lines = [line.split(None, 1) for line in found.stdout.decode().splitlines()]
    return [int(pid) for pid, args in lines if "spawn_main" in args]


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not (value := condition()):
        assert time.time() < end, "it took too long"
        time.sleep(0.01)
    return value


def recorded(folder):
    """How many documents the last checkpoint holds."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        progress = json.loads((folder / "unfinished" / "progress.json").read_text())["progress"]
        return progress["reader"]["documents"]
    return 0


@pytest.fixture
def under_way(text_folder, tmp_path):
    """A function that starts a preparation and returns at its first checkpoint: the process, its
    flags, and the dataset's folder."""

    def begin(*more, **options):
        flags = ["--input", write_lines(tmp_path / "a.jsonl", 2000), "--tokenizer=byte"]
        flags += ["--name=mine", *more]
        process, mine = start(text_folder, *flags, **options), text_folder.parent / "mine"
        wait_for(lambda: recorded(mine))
        return process, flags, mine

    return begin


def test_folders_and_formats_together(text_folder, tmp_path):
    """Documents keep the order of the files, whatever the number of processes."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("Story 0\n<|endoftext|>\nStory 1\n")
    (tmp_path / "in" / "b.csv").write_text("body,n\nStory 2,1\nStory 3,1\n")
    rows = "".join(json.dumps({"body": f"Story {i}"}) + "\n" for i in range(4, 3000))
    (tmp_path / "in" / "sub" / "c.jsonl").write_text(rows)
    (tmp_path / "in" / "picture.png").touch()
    flags = ["--input", str(tmp_path / "in"), "--column=body", "--separator=<|endoftext|>"]
    found = []
    for processes in (1, 3):
        flags[-1:] = [flags[-1], f"--processes={processes}", "--name=mine", "--tokenizer=byte"]
        done = prepare(text_folder, *flags)
        assert done.returncode == 0, done.stderr
        assert "in: 3 files, and 1 of other kinds" in done.stdout
        found.append(digest(text_folder.parent / "mine"))
    mine = text_folder.parent / "mine"
    assert found[0] == found[1] and not (mine / "unfinished").exists()
    assert decode(mine, "train").split("\n") == [
        *(f"Story {i}" for i in range(3000) if i % 10 != 9),
        "",
    ]
    assert decode(mine, "val").split("\n") == [*(f"Story {i}" for i in range(9, 3000, 10)), ""]
    assert Dataset(mine, 8).meta["train"]["bytes"] == sum(
        len(f"Story {i}") for i in range(3000) if i % 10 != 9
    )


def test_a_separator_in_the_text_is_told(text_folder, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(("Story. " * 30 + "\n<|endoftext|>\n") * 100)
    done = prepare(text_folder, "--input", str(path), "--name=mine")
    assert done.returncode == 0
    hint = f"{path} has <|endoftext|> in its text: --separator '<|endoftext|>' makes"
    assert done.stdout.count(hint) == 1
    done = prepare(text_folder, "--input", str(path), "--name=mine", "--separator=<|endoftext|>")
    assert done.returncode == 0 and "has <|endoftext|>" not in done.stdout
    assert "<|" not in decode(text_folder.parent / "mine", "train")


@pytest.mark.parametrize("name, size", [("a.txt", 20), full("a.jsonl", 20), full("a.txt", 300)])
def test_one_line_of_many_megabytes(name, size, text_folder, tmp_path):
    """Its last tenth is for validation, and no process holds it whole."""
    text = ("word " * 20 + "x" * 300_000) * (size * 10**6 // 300_100)
    path = tmp_path / name
    path.write_text(text if name == "a.txt" else json.dumps({"text": text}))
    flags = ["--input", str(path), "--tokenizer=byte", "--name=mine", "--processes=1"]
    command = [sys.executable, "-c", MEMORY, str(text_folder / "prepare.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    mine = text_folder.parent / "mine"
    assert decode(mine, "train")[:-1] + decode(mine, "val")[:-1] == text
    assert 0.09 < len(decode(mine, "val")) / len(text) < 0.11
    if name == "a.txt" and size > 100:
        most = re.search(r"kB (\d+) (\d+)", done.stdout).groups()
        assert max(map(int, most)) < 150_000, most


def test_a_killed_preparation_goes_on(text_folder, tmp_path):
    """It is killed after each of some checkpoints; the files are those of one that ran through."""
    path = write_lines(tmp_path / "a.jsonl", 1200)
    flags = ["--input", path, "--tokenizer=bpe", "--vocab_size=300", "--processes=2"]
    assert prepare(text_folder, *flags, "--name=whole").returncode == 0
    expected = digest(text_folder.parent / "whole")
    mine = text_folder.parent / "mine"
    before = 0
    for _ in range(2):
        process = start(text_folder, *flags, "--name=mine")
        wait_for(lambda least=before: recorded(mine) > least)
        workers = children(process.pid)
        process.kill()
        out, _ = process.communicate(timeout=30)  # waits for its workers, too
        assert not before or f"continuing after {before:,} documents" in out
        before = recorded(mine)
        assert not (mine / "meta.json").exists() and len(workers) == 2
        wait_for(lambda pids=workers: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    done = prepare(text_folder, *flags, "--name=mine")
    assert done.returncode == 0 and f"continuing after {before:,} documents" in done.stdout
    assert digest(mine) == expected
    names = ["meta.json", "tokenizer.json", "train.bin", "val.bin"]
    assert sorted(p.name for p in mine.iterdir()) == names
    whole = json.loads((text_folder.parent / "whole" / "meta.json").read_text())
    assert json.loads((mine / "meta.json").read_text()) == whole


@pytest.mark.full
def test_another_text_starts_over(under_way, tmp_path):
    process, flags, mine = under_way()
    process.kill()
    process.communicate(timeout=20)
    lines = "".join(json.dumps({"text": f"new {i}"}) + "\n" for i in range(50))
    (tmp_path / "a.jsonl").write_text(lines)
    done = prepare(mine.parent / "text", *flags)
    assert done.returncode == 0 and "continuing" not in done.stdout
    assert f"starting over: what {mine / 'unfinished'} holds is of other input" in done.stdout
    assert decode(mine, "train").startswith("new 0\nnew 1\n") and "Witch" not in decode(mine, "val")


def test_another_command_in_between(text_folder, tmp_path):
    """A is killed; B, with other settings, is killed too; then A again."""
    path = write_lines(tmp_path / "a.jsonl", 2000)
    mine = text_folder.parent / "mine"
    flags = ["--input", path, "--tokenizer=byte"]
    assert prepare(text_folder, *flags, "--name=whole").returncode == 0
    for more in ([], ["--column=i", "--val_fraction=0.2"]):  # B finds no text, and says so
        process = start(text_folder, *flags, "--name=mine", *more)
        if not more:
            wait_for(lambda: recorded(mine))
            process.kill()
        process.communicate()
    documents = recorded(mine)
    assert documents  # B was wrong from the beginning, so A's work is still there
    progress = json.loads((mine / "unfinished" / "progress.json").read_text())
    os.truncate(mine / "unfinished" / "train.bin", progress["totals"]["train"]["size"] - 1)
    done = prepare(text_folder, *flags, "--name=mine")  # of files that lack something
    assert done.returncode == 0 and "continuing after" not in done.stdout
    assert digest(mine) == digest(text_folder.parent / "whole")


def test_too_many_documents_that_cannot_be_read(text_folder, tmp_path):
    """This is known only at the end. Nothing stays."""
    good, bad = ['{"text": "good"}\n'] * 960, ['{"text": null}\n'] * 40
    (tmp_path / "a.jsonl").write_text("".join(good + bad))
    done = prepare(text_folder, "--input", str(tmp_path / "a.jsonl"), "--name=mine")
    one_line(done, 2, "40 of 1,000 documents cannot be read, more than 1%", "line 961: 'text' is")
    assert not (text_folder.parent / "mine").exists()
    (tmp_path / "a.jsonl").write_text("".join(good + bad[:9]))
    done = prepare(text_folder, "--input", str(tmp_path / "a.jsonl"), "--name=mine")
    assert done.returncode == 0 and "9 of 969 documents cannot be read and are left" in done.stdout


@pytest.mark.full
def test_two_at_a_time(under_way):
    process, flags, mine = under_way()
    os.kill(process.pid, signal.SIGSTOP)
    done = prepare(mine.parent / "text", *flags)
    os.kill(process.pid, signal.SIGCONT)
    one_line(done, 2, f"another process is preparing {mine}")
    process.communicate(timeout=60)
    assert process.returncode == 0


def check_killed(code, error):
    """One line, after a progress bar if the run took more than a second."""
    assert code == 1 and "Traceback" not in error, error
    words = "error: a tokenizing process was killed, perhaps because memory ran out"
    assert error.splitlines()[-1].startswith(words)


def test_a_killed_worker_is_one_line(under_way):
    """Not a hang, and what is done stays done."""
    process, flags, mine = under_way("--processes=2")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, error = process.communicate(timeout=20)
    check_killed(process.returncode, error)
    done = prepare(mine.parent / "text", *flags)
    assert done.returncode == 0 and "continuing after" in done.stdout


def test_a_worker_that_is_killed_in_the_middle_of_its_answer(text_folder, tmp_path):
    path = text_folder.parent / "writing.py"
    code, answer = path.read_text(), "connection.send(answer)"
    assert code.count(answer) == 1
    part = "os.write(connection.fileno(), bytes([0, 1, 0, 0, 7]))"
    path.write_text(code.replace(answer, part + "; os.kill(os.getpid(), 9)"))
    done = prepare(text_folder, "--input", write_lines(tmp_path / "a.jsonl", 50), "--name=mine")
    check_killed(done.returncode, done.stderr)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, 1), (signal.SIGINT, 130)])
def test_a_worker_that_hangs(number, code, under_way):
    """It is ended, too, when another one is killed or when Ctrl-C comes."""
    process, *_ = under_way("--processes=2")
    one, other = children(process.pid)
    os.kill(one, signal.SIGSTOP)
    os.kill(process.pid if code == 130 else other, number)
    _, error = process.communicate(timeout=20)
    assert process.returncode == code and "Traceback" not in error, error
    assert not os.path.exists(f"/proc/{one}")


def test_a_worker_that_raises(text_folder, tmp_path):
    """Its error is told, and not that it was killed."""
    path = text_folder.parent / "writing.py"
    code, start = path.read_text(), "    encoded = {}\n"
    assert code.count(start) == 1
    path.write_text(code.replace(start, start + "    raise InputError('no such character')\n"))
    done = prepare(text_folder, "--input", write_lines(tmp_path / "a.jsonl", 50), "--name=mine")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (2, "error: no such character")


def test_ctrl_c(under_way):
    process, *_ = under_way(start_new_session=True)
    for worker in children(process.pid):  # it is for their parent alone
        os.kill(worker, signal.SIGINT)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130 and "Traceback" not in error, (process.returncode, error)


def test_a_full_disk(text_folder, tmp_path):
    """Here the system refuses to write more than 300 kB into a file."""
    flags = ["--input", write_lines(tmp_path / "a.jsonl", 1500), "--tokenizer=byte", "--name=mine"]
    command = [sys.executable, str(text_folder / "prepare.py"), *flags]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)),
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]  # a progress bar may come before
    assert last.startswith("error: could not write into ") and "File too large; the same" in last
    done = prepare(text_folder, *flags)
    assert done.returncode == 0 and "continuing after" in done.stdout
    text = decode(text_folder.parent / "mine", "train")
    assert text.count("\n") > 1000 and text.endswith("\n")


@pytest.mark.parametrize(
    "content, flags, words",
    [
        ({}, [], "in has no file that ends in .txt"),
        ({"a.pdf": "x"}, [], "in has no file that ends in .txt"),
        ({"a.txt": " \n", "b.jsonl": "\n"}, [], "there is no text in"),
        ({"a.csv": "id,body\n1,x\n"}, [], "a.csv has no column 'text', only 'id', 'body'"),
        ({"a.jsonl": '{"a": 1}\n' * 9}, [], "9 of 9 documents cannot be read, more than 1%"),
        ({"a.txt": "x" * 99}, ["--processes=0"], "--processes is 0, expected at least 1"),
        ({"a.txt": "x" * 99}, ["--separator="], "--separator is empty"),
    ],
    ids=str,
)
def test_bad_input(content, flags, words, text_folder, tmp_path):
    (tmp_path / "in").mkdir()
    for name, text in content.items():
        (tmp_path / "in" / name).write_text(text)
    done = prepare(text_folder, "--input", str(tmp_path / "in"), "--name=mine", *flags)
    one_line(done, 2, words)
    assert not (text_folder.parent / "mine").exists()


@pytest.mark.full
def test_the_readmes_examples(text_folder, tmp_path, monkeypatch):
    """Each line of the table of files in data/README.md."""
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "data" / "README.md").read_text().replace("\\|", "|")
    examples = re.findall(r"\| `(--input [^`]+)` \|$", readme, re.M)
    assert len(examples) == 6
    texts = [f"Example text number {i}" for i in range(100)]
    for example in examples:
        flags = shlex.split(example)
        column = flags[flags.index("--column") + 1] if "--column" in flags else "text"
        rows = [{"id": i, column: text} for i, text in enumerate(texts)]
        for flag in flags[1:]:
            path = tmp_path / flag.replace("*", "all")
            path.parent.mkdir(exist_ok=True)
            if flag.endswith(".txt"):
                path.write_text("<|endoftext|>".join(texts))
            elif flag.endswith(".jsonl"):
                path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            elif flag.endswith(".gz"):
                path.write_bytes(
                    gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode())
                )
            elif flag.endswith(".json"):
                path.write_text(json.dumps(rows))
            elif flag.endswith(".csv"):
                path.write_text("id," + column + "\n" + "".join(f"1,{t}\n" for t in texts))
            elif flag.endswith(".parquet"):
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        done = subprocess.run(
            [sys.executable, str(text_folder / "prepare.py"), *flags, "--name=mine"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (example, done.stderr)
        val = decode(text_folder.parent / "mine", "val").splitlines()
        assert val[:10] == texts[9::10], example


@pytest.mark.parametrize("container, cores", [(3, 3), (9, 7), (math.inf, 7)])
def test_a_containers_share_of_the_cores(container, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7), raising=False)
    monkeypatch.setattr(nanomoe.cores, "container_cores", lambda: container)
    assert num_cores() == cores
