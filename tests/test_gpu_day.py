"""tools/gpu_day.sh, small and on a CPU; and what tools/gpu_day.py makes of its numbers."""

import contextlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT, one_line, run_module, succeeded
from tools import bench, gpu_day
from tools.run_logs import LoggedRun

NAMES = ["tests", "main_job", "bench", "kernels", "layer", "enwik8", "resume_and_save"]


def start_day(out, play, *numbers, script=ROOT / "tools" / "gpu_day.sh", **variables):
    command = [str(script), str(out), *map(str, numbers)]
    env = os.environ | {"TOY": str(play)} | variables
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    return succeeded(done)


@pytest.mark.full
def test_a_whole_day(play, tmp_path):
    out = start_day(tmp_path / "day", play, BENCH_ROWS="dense,8 experts top-2")
    for number, name in enumerate(NAMES, 1):
        text = (tmp_path / "day" / f"{number}-{name}.txt").read_text()
        assert f"{number} {name} ended with code 0 after" in out, text
    about, *_ = (line for line in out.splitlines() if "torch" in line)
    assert ", cpu (" in about and "equal bits" in out.splitlines()[-2]
    assert re.search(r"tests: \d+ passed, \d+ skipped", out) and "resuming" in text
    page = (tmp_path / "day" / "gpu.md").read_text()
    rows = json.loads((tmp_path / "day" / "bench.json").read_text())["rows"]
    assert all(row["name"] in page for row in rows) and len(rows) == 6
    assert re.search(r"time of a dense step, bfloat16 \| at most 1.15 \| \d", page)
    assert page.count("enwik8_moe-muon") == 1 and "not measured" in page  # as the MFU of a CPU
    for picture in ("speed_gpu.png", "enwik8.png"):
        assert (tmp_path / "day" / picture).stat().st_size > 5000
    assert len(out[out.index(about) :].splitlines()) <= 40  # one screen
    for name in ("trace.json.gz", "layer.json"):
        assert (tmp_path / "day" / name).stat().st_size


@pytest.mark.full
def test_a_step_that_takes_too_long(play, tmp_path):
    """It ends, with all that it has started, and the next one runs."""
    for path in ROOT.glob("*"):
        if path.name != "tools":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "tools").mkdir()
    for path in (ROOT / "tools").glob("*.*"):
        (tmp_path / "tools" / path.name).symlink_to(path)
    script = tmp_path / "tools" / "gpu_day.sh"
    text = script.read_text()
    script.unlink()
    for old, new in (("main_job 2", "main_job 0.2"), ("--max_iters=300", "--max_iters=1000000")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    script.write_text(text)
    script.chmod(0o755)
    out = start_day(tmp_path / "day", play, 2, 3, script=script, BENCH_ROWS="dense")
    assert "2 main_job ended with code 124" in out and "3 bench ended with code 0" in out
    assert not processes_with(str(tmp_path / "day"))


def processes_with(words):
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path.parent.name] * (words in path.read_text(errors="replace"))
    return found


@pytest.mark.full
def test_a_step_that_fails_and_one_again(play, tmp_path):
    """The next step runs, and a step can be repeated by its number."""
    out = start_day(tmp_path, play, 4, 5, BENCH_ROWS="", PYTHONPATH=str(broken_bench(tmp_path)))
    assert "4 kernels ended with code 1" in out and "5 layer ended with code 1" in out
    assert "broken on purpose" in (tmp_path / "5-layer.txt").read_text()
    assert "its floor" in out and "at most 1.4   not measured" in out
    out = start_day(tmp_path, play, 5, 5)
    assert "5 layer ended with code 0" in out and "not measured" not in layer_line(out)


def broken_bench(tmp_path):
    """A folder with a sitecustomize.py, by which bench fails."""
    (tmp_path / "broken").mkdir()
    lines = "import sys\nif 'tools.bench' in sys.orig_argv:\n    sys.exit('broken on purpose')\n"
    (tmp_path / "broken" / "sitecustomize.py").write_text(lines)
    return tmp_path / "broken"


def layer_line(out):
    return re.search(r"^one MoE layer's time.*$", out, re.M)[0]


def row(ms, memory_gb=10.0, params=1e8, mfu=0.45):
    return {"ms": ms, "memory_gb": memory_gb, "params": params, "mfu": mfu}


def test_the_rows_have_the_names_of_bench():
    rows = bench.suite_rows(bench.SUITES["gpt2"])
    for suffix in bench.SUITES["gpt2"]:
        assert f"dense, {suffix}" in rows
        for experts in (gpu_day.E8, gpu_day.E16, gpu_day.E64):
            assert {f"{experts}, {impl}, {suffix}" for impl in ("loop", "grouped")} <= rows.keys()


def test_facts_of_bench():
    """By hand: 115 / 100 ms; 12 GB of 10 + 16 * 0.1; loops of 300 and 900 ms."""
    rows = {
        "dense, 12 x 1024": row(100.0),
        "8 experts top-2, equal FLOPs, grouped, 12 x 1024": row(115.0, 12.0, 2e8, 0.41),
        "16 experts top-2, loop, 12 x 1024": row(300.0),
        "16 experts top-2, grouped, 12 x 1024": row(100.0),
        "64 experts top-8, equal FLOPs, loop, 12 x 1024": row(900.0),
    }
    assert gpu_day.bench_facts(rows, "12 x 1024") == {
        "time": 1.15,
        "mfu": 0.41,
        "memory": pytest.approx(12 / 11.6),
        "16 experts top-2": 3.0,
        "64 experts top-8, equal FLOPs": None,  # it did not fit
    }


def evaluations(*pairs, state="finished"):
    evals = {i: {"seconds": seconds, "val_loss": loss} for i, (seconds, loss) in enumerate(pairs)}
    return LoggedRun(evals=evals, state=state)


def test_facts_of_enwik8():
    dense = evaluations((30.0, 2.0), (60.0, 1.5), (120.0, 1.2))
    runs = {"enwik8-adamw": dense, "enwik8-muon": dense, "enwik8_moe-muon": evaluations((9.0, 1.3))}
    runs["enwik8_moe-adamw"] = evaluations((30.0, 1.4), (70.0, 1.0), (120.0, 0.9))
    assert gpu_day.enwik8_facts(runs) == {
        "adamw": (120.0, pytest.approx(50.0)),
        "muon": (120.0, None),
    }
    runs["enwik8_moe-muon"] = evaluations((9.0, 1.1), state="under way")  # it was cut
    assert gpu_day.enwik8_facts(runs).keys() == {"adamw"}


def test_facts_of_the_last_step():
    large = "saved /out/save/step-00000030 (copied in 0.25 s, written in 9.10 s)\n"
    small = "saved /out/parts/step-00000200 (copied in 0.01 s, written in 0.02 s)\n"
    assert gpu_day.save_fact(large + small) == "copied in 0.25 s, written in 9.10 s"
    assert gpu_day.save_fact(small) == gpu_day.bits_fact(small) == "not measured"
    assert gpu_day.bits_fact(small + "equal bits\n") == "equal bits"
    for line in ("a/model.safetensors b/model.safetensors differ: byte 9, line 1", "cmp: EOF on b"):
        assert gpu_day.bits_fact(line) == "not equal"


def test_the_part_of_speed_md_is_replaced(tmp_path):
    page, day = tmp_path / "speed.md", tmp_path / "day"
    day.mkdir()
    (day / "about.txt").write_text("NVIDIA H200, torch 2.13.0, compile works\n")
    (day / "enwik8.png").write_bytes(b"a picture")
    page.write_text("# Speed\n\nfirst\n\n## On GPUs\n\nold\n\n## Last\n\nkept\n")
    succeeded(run_module("tools.gpu_day", day, speed_md=page))
    text = page.read_text()
    assert text.startswith("# Speed\n\nfirst\n\n## On GPUs\n\n`tools/gpu_day.sh`; NVIDIA H200")
    assert "old" not in text and text.endswith("\n\n## Last\n\nkept\n")
    assert (tmp_path / "enwik8.png").read_bytes() == b"a picture"


def test_bad_input(tmp_path):
    one_line(run_module("tools.gpu_day", tmp_path / "nowhere"), 2, "is not a folder")
    one_line(run_module("tools.gpu_day", tmp_path), 2, "has no about.txt")
    (tmp_path / "about.txt").write_text("NVIDIA H200, torch 2.13.0, compile works\n")
    (tmp_path / "page.md").write_text("# Speed\n")
    done = run_module("tools.gpu_day", tmp_path, speed_md=tmp_path / "page.md")
    one_line(done, 2, "has no part '## On GPUs'")
    command = [str(ROOT / "tools" / "gpu_day.sh"), str(tmp_path), "two"]
    done = subprocess.run(command, capture_output=True, text=True)
    one_line(done, 2, "FIRST and LAST are 'two' and '7', expected numbers from 1 to 7")
