"""
How fast data/text/prepare.py is beside tiktoken alone, how much memory it takes, and whether its
files are the same after ten kills.

    python -m tests.big_text --mb=2000

It needs the disk for that text and half as much again, nothing else running, and tiktoken's table
(from the network, or in TIKTOKEN_CACHE_DIR). Not a test: times depend on the machine.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

import tiktoken

from tests.helpers import MACBETH
from tests.preparing import copy_scripts, digest, start

KILLS = 10


def write_lines(path, size):
    """JSON lines of `size` bytes, with documents of 100 to 8,000 characters."""
    rng, written = random.Random(0), 0
    with open(path, "w") as file:
        while written < size:
            begin = rng.randrange(len(MACBETH) - 8000)
            text = MACBETH[begin : begin + rng.randrange(100, 8000)]
            written += file.write(json.dumps({"id": written, "text": text}) + "\n")


def encode_half(path, half):
    """The seconds of tiktoken on every other document, all of them in memory."""
    tokenizer = tiktoken.get_encoding("gpt2")
    with open(path) as file:
        texts = [json.loads(line)["text"] for i, line in enumerate(file) if i % 2 == half]
    begin = time.perf_counter()
    for text in texts:
        tokenizer.encode_ordinary(text)
    return time.perf_counter() - begin


def time_tiktoken(path):
    with multiprocessing.Pool(2) as pool:
        seconds = max(pool.starmap(encode_half, [(path, 0), (path, 1)]))
    print(f"tiktoken alone, two processes: {seconds:.1f} s", flush=True)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mb", type=int, default=2000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder, path = copy_scripts(Path(tmp), "text"), Path(tmp) / "big.jsonl"
        flags = ["--input", str(path), "--tokenizer=gpt2", "--name=big", "--processes=2"]
        big = folder.parent / "big"
        write_lines(path, args.mb * 10**6)
        print(f"{os.path.getsize(path) / 1e6:,.0f} MB of JSON lines", flush=True)
        time_tiktoken(path)
        begin, most = time.perf_counter(), 0
        process = start(folder, *flags, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - begin
        assert process.returncode == 0
        print(f"prepare.py: {seconds:.1f} s, at most {most / 1e6:.0f} MB", flush=True)
        time_tiktoken(path)
        expected = digest(big)
        for name in ("meta.json", "train.bin", "val.bin"):
            (big / name).unlink()
        for kill in range(KILLS + 1):
            process = start(folder, *flags, stderr=subprocess.DEVNULL)
            if kill < KILLS:
                time.sleep(random.uniform(0.1, 2 * seconds / KILLS))
                process.kill()
            print(process.communicate()[0].strip() or "killed", flush=True)
            if process.returncode == 0:
                break
        same = "the same files" if digest(big) == expected else "OTHER FILES"
        print(f"after {kill} kills: {same}", flush=True)


if __name__ == "__main__":
    main()
