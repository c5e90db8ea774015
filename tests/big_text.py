"""
How fast data/text/prepare.py is beside tiktoken alone, how much memory it takes, and whether its
files are the same after ten kills.

    python -m tests.big_text --mb=2000

It needs the disk for that text and half as much again, nothing else running, and tiktoken's table
(from the network, or in TIKTOKEN_CACHE_DIR). Not a test: times depend on the machine.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiktoken

from tests.helpers import MACBETH
from tests.preparing import copy_scripts

KILLS = 10


def write_lines(path, size):
    """JSON lines of `size` bytes, with documents of 100 to 8,000 characters."""
    rng, written = random.Random(0), 0
    with open(path, "w") as file:
        while written < size:
            begin = rng.randrange(len(MACBETH) - 8000)
            text = MACBETH[begin : begin + rng.randrange(100, 8000)]
            written += file.write(json.dumps({"id": written, "text": text}) + "\n")


def encode_half(tokenizer, path, half, barrier, seconds):
    """tiktoken on every other document, all of them in memory; puts the seconds into a queue."""
    with open(path) as file:
        texts = [json.loads(line)["text"] for i, line in enumerate(file) if i % 2 == half]
    barrier.wait()
    begin = time.perf_counter()
    for text in texts:
        tokenizer.encode_ordinary(text)
    seconds.put(time.perf_counter() - begin)


def time_tiktoken(path):
    tokenizer = tiktoken.get_encoding("gpt2")
    barrier, seconds = multiprocessing.Barrier(2), multiprocessing.Queue()
    halves = [
        multiprocessing.Process(target=encode_half, args=(tokenizer, path, half, barrier, seconds))
        for half in (0, 1)
    ]
    for half in halves:
        half.start()
    slowest = max(seconds.get() for _ in halves)
    for half in halves:
        half.join()
    return slowest


def memory_of(pid):
    """Bytes that a process and those that it has started hold, shared ones counted once (PSS)."""
    total, pids = 0, [pid]
    while pids:
        one = Path(f"/proc/{pids.pop()}")
        try:
            total += int((one / "smaps_rollup").read_text().split("Pss:")[1].split()[0]) * 1024
            pids += map(int, (one / "task" / one.name / "children").read_text().split())
        except OSError:  # it has ended
            continue
    return total


def start(folder, path):
    command = [sys.executable, str(folder / "prepare.py"), "--input", str(path)]
    command += ["--tokenizer=gpt2", "--name=big", "--processes=2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def digests(folder):
    found = []
    for split in ("train", "val"):
        with open(folder.parent / "big" / f"{split}.bin", "rb") as file:
            found.append(hashlib.file_digest(file, "sha256").hexdigest())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mb", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder, path = copy_scripts(Path(tmp), "text"), Path(tmp) / "big.jsonl"
        write_lines(path, args.mb * 10**6)
        print(f"{os.path.getsize(path) / 1e6:,.0f} MB of JSON lines", flush=True)
        print(f"tiktoken alone, two processes: {time_tiktoken(path):.1f} s", flush=True)
        begin, most = time.perf_counter(), 0
        process = start(folder, path)
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - begin
        assert process.returncode == 0
        print(f"prepare.py: {seconds:.1f} s, at most {most / 1e6:.0f} MB", flush=True)
        print(f"tiktoken alone, two processes: {time_tiktoken(path):.1f} s", flush=True)
        expected, kills = digests(folder), 0
        for name in ("meta.json", "train.bin", "val.bin"):
            (folder.parent / "big" / name).unlink()
        while True:
            process, wait = start(folder, path), random.uniform(0.1, 2 * seconds / KILLS)
            if kills == KILLS:
                wait = 100 * seconds
            try:
                process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            print(process.communicate()[0].strip() or "killed", flush=True)
        same = "the same files" if digests(folder) == expected else "OTHER FILES"
        print(f"after {kills} kills: {same}", flush=True)


if __name__ == "__main__":
    main()
