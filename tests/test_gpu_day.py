"""tools/gpu_day.sh, small and on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, one_line, succeeded

SCRIPT = ROOT / "tools" / "gpu_day.sh"


def start_day(out, play, *steps, script=SCRIPT, **variables):
    env = os.environ | {"TOY": str(play), "ENWIK8_SECONDS": "3"} | variables
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # the script says `python`
    command = [str(script), str(out), *map(str, steps)]
    return succeeded(subprocess.run(command, capture_output=True, text=True, env=env, timeout=300))


@pytest.mark.full
def test_a_whole_day(play, tmp_path):
    """All steps; then the fifth again."""
    out = start_day(tmp_path, play, *range(1, 8), BENCH_ROWS="dense,8 experts top-2")
    for step in range(1, 8):
        text = (tmp_path / f"{step}.txt").read_text()
        assert f"step {step} ended with code 0" in out, text
    assert "2 passed, 2 skipped" in out and "equal bits" in out and out.count("/save/step-") >= 2
    assert "resuming" in (tmp_path / "2.txt").read_text()
    assert (tmp_path / "trace.json").stat().st_size
    lines = [line for line in out.splitlines() if "one MoE layer" in line or "enwik8, muon" in line]
    assert len(lines) == 2 and not any("not measured" in line for line in lines)
    again = start_day(tmp_path, play, 5)
    assert again.startswith("step 5 ended with code 0") and "step 4" not in again


@pytest.mark.full
def test_steps_that_fail_or_take_too_long(play, tmp_path):
    """They end, with all that they have started, and the next one runs."""
    copy = tmp_path / "copy"
    (copy / "tools").mkdir(parents=True)
    for path in [*ROOT.glob("*"), *(ROOT / "tools").glob("*.*")]:
        if path.name not in ("tools", "gpu_day.sh"):
            (copy / path.relative_to(ROOT)).symlink_to(path)
    text = SCRIPT.read_text()
    for old, new in (("0 5 2 8", "0 5 0.2 8"), ("--max_iters=300", "--max_iters=1000000")):
        assert text.count(old) == 1
        text = text.replace(old, new)
    script = copy / "tools" / "gpu_day.sh"
    script.write_text(text.replace("--layer=True", "--layer=True --no_such_flag=1"))
    script.chmod(0o755)
    out = start_day(tmp_path / "day", play, 2, 5, 3, script=script, BENCH_ROWS="dense")
    for words in ("step 2 ended with code 124", "step 5 ended with code 2", "step 3 ended with co"):
        assert words in out
    assert "no_such_flag" in (tmp_path / "day" / "5.txt").read_text()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        assert str(tmp_path / "day") not in path.read_text(errors="replace")


@pytest.mark.parametrize("steps", [[], ["two"], ["8"], ["1", "0"]])
def test_bad_input(steps, tmp_path):
    command = [str(SCRIPT), str(tmp_path / "day"), *steps]
    done = subprocess.run(command, capture_output=True, text=True)
    one_line(done, 2, "expected OUT and steps, 1 to 7")
    assert not (tmp_path / "day").exists()
