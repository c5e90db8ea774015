"""
Sum up what tools/gpu_day.sh has left in a folder: targets and what was measured, on one screen.

$ python -m tools.gpu_day out/gpu_day
$ python -m tools.gpu_day out/gpu_day --speed_md=assets/speed.md   # also put the tables there

It writes gpu.md, the tables, and enwik8.png into the folder. What was not measured is called so.
"""

import json
import re
import shutil
from pathlib import Path

from configurator import InputError, configure
from nanomoe.errors import run_main
from tools.bench import COLUMNS, cells
from tools.figures import BLUE, ORANGE, draw_loss
from tools.report import table
from tools.run_logs import read_runs

folder = "out/gpu_day"  # of tools/gpu_day.sh
speed_md = ""  # put the tables into this file, in place of its part "## On GPUs"

MISSING = "not measured"
MOST_FAILURES = 5  # how many tests that fail are named
SAVED = r"saved \S+/save/step-\d+ \(copied in ([\d.]+) s, written in ([\d.]+) s\)"
# the beginnings of rows' names in bench's suites
E8, E16, E64 = "8 experts top-2, equal FLOPs", "16 experts top-2", "64 experts top-8, equal FLOPs"
STYLES = {
    "enwik8-adamw": {"color": BLUE, "linestyle": "--"},
    "enwik8-muon": {"color": BLUE},
    "enwik8_moe-adamw": {"color": ORANGE, "linestyle": "--"},
    "enwik8_moe-muon": {"color": ORANGE},
}


def read_json(path):
    return json.loads(path.read_text()) if path.exists() else {}


def read_text(path):
    return path.read_text(errors="replace") if path.exists() else ""


# -----------------------------------------------------------------------------
# what was measured


def steps_of(path):
    """Lines about the steps: which have ended, how, and after how many seconds."""
    lines = [read_text(end).strip() for end in sorted(path.glob("?-*.end"))]
    text = read_text(path / "1-tests.txt")
    lines += re.findall(r"^(?:FAILED|ERROR) .*$", text, re.M)[:MOST_FAILURES]
    tests = re.findall(r"^.*\d+ (?:passed|failed).* in .*$", text, re.M)
    return lines + [f"tests: {line.strip('= ')}" for line in tests[-1:]]


def bench_facts(rows, suffix):
    """{what: value} of one size of the suite, from bench's rows by name; values may be None."""
    dense, moe = rows.get(f"dense, {suffix}"), rows.get(f"{E8}, grouped, {suffix}")
    facts = dict.fromkeys(("time", "mfu", "memory"))
    if dense and moe:
        facts["time"] = moe["ms"] / dense["ms"]
        facts["mfu"] = moe["mfu"]
        if moe["memory_gb"]:
            extra = 16 * (moe["params"] - dense["params"]) / 1e9
            facts["memory"] = moe["memory_gb"] / (dense["memory_gb"] + extra)
    for experts in (E16, E64):
        loop, grouped = (rows.get(f"{experts}, {impl}, {suffix}") for impl in ("loop", "grouped"))
        facts[experts] = loop["ms"] / grouped["ms"] if loop and grouped else None
    return facts


def seconds_to(evaluations, loss):
    """The training seconds in which a run came down to this loss, in a straight line between its
    evaluations; or None."""
    before = None
    for now in evaluations:
        if now["val_loss"] <= loss:
            if before is None:
                return now["seconds"]
            share = (before["val_loss"] - loss) / (before["val_loss"] - now["val_loss"])
            return before["seconds"] + share * (now["seconds"] - before["seconds"])
        before = now
    return None


def enwik8_facts(runs):
    """{optimizer: (seconds of the dense run, seconds in which the MoE has its last loss or None)};
    only optimizers of which both runs are finished."""
    found = {}
    for optimizer in ("adamw", "muon"):
        dense, moe = (runs.get(f"{name}-{optimizer}") for name in ("enwik8", "enwik8_moe"))
        if not (dense and moe and dense.state == moe.state == "finished"):
            continue
        last = dense.last_eval
        found[optimizer] = (last["seconds"], seconds_to(moe.evals.values(), last["val_loss"]))
    return found


def bits_fact(text):
    """What step 7 has printed of the run that was resumed and the one that was not."""
    if "cmp: " in text or " differ: " in text:
        return "not equal"
    return "equal bits" if "equal bits" in text else MISSING


def save_fact(text):
    """Of the last save of the large model in step 7: the seconds of the copy that training waits
    for, and those of writing."""
    saves = re.findall(SAVED, text)
    return "copied in {} s, written in {} s".format(*saves[-1]) if saves else MISSING


# -----------------------------------------------------------------------------
# output


BENCH_TARGETS = [  # key of bench_facts, what, target, format
    ("time", "8 experts top-2 at equal FLOPs: time of a dense step", "at most 1.15", ".2f"),
    ("mfu", "its MFU", "at least 40%", ".1%"),
    ("memory", "its memory, of dense plus its extra weights' state", "at most 1.25", ".2f"),
    (E16, "16 experts top-2: loop / grouped", "at least 3", ".1f"),
    (E64, "64 experts top-8: loop / grouped", "at least 8", ".1f"),
]


def targets(path, rows, runs):
    """Rows of the table of targets: what, target, measured."""
    found = []
    for suffix in dict.fromkeys(name.rsplit(", ", 1)[-1] for name in rows):
        facts = bench_facts(rows, suffix)
        for key, what, target, form in BENCH_TARGETS:
            found.append((f"{what}, {suffix}", target, number(facts[key], form)))
    layers = read_json(path / "layer.json").get("rows", [{"of_floor": None}])
    value = number(layers[-1]["of_floor"], ".2f")
    found.append(("one MoE layer's time, of its floor", "at most 1.4", value))
    facts = enwik8_facts(runs)
    for optimizer in ("adamw", "muon"):
        what = f"enwik8, {optimizer}: seconds to the dense model's last loss, of its own"
        whole, part = facts.get(optimizer, (1.0, None))
        value = number(part and part / whole, ".2f")
        if optimizer in facts and not part:
            value = "more than 1: not reached"
        found.append((what, "at most 0.7", value))
    text = read_text(path / "7-resume_and_save.txt")
    found.append(("deterministic run, resumed", "equal bits", bits_fact(text)))
    found.append(("background save of 293M parameters", "waits for the copy", save_fact(text)))
    return found


def number(value, form):
    return MISSING if value is None else format(value, form)


def bench_table(rows):
    header = ["row", *(heading for _, heading, _ in COLUMNS)]
    return table(header, [(name, *cells(row, COLUMNS)) for name, row in rows.items()])


def enwik8_table(runs):
    lines = []
    for name, run in runs.items():
        if run.evals:
            last = run.last_eval
            bits = f"{last['val_bits_per_byte']:.4f}"
            lines.append((name, f"{last['seconds']:.0f}", f"{last['step']:,}", bits))
    return table(["run", "seconds", "steps", "bits per byte"], lines)


def markdown(about, rows, runs, target_table):
    """The part "On GPUs" of assets/speed.md."""
    parts = ["## On GPUs", f"`tools/gpu_day.sh`; {about}.", target_table]
    if rows:
        parts += ["Steps of GPT-2 (124M) and its MoE relatives:", bench_table(rows)]
        parts += ["![time per token, relative to the dense model](speed_gpu.png)"]
    if runs:
        parts += ["enwik8, each run with the same training time:", enwik8_table(runs)]
        parts += ["![validation loss against seconds](enwik8.png)"]
    return "\n\n".join(parts) + "\n"


def describe(path):
    """The date, the card, torch, and whether compile works there."""
    about = path / "about.txt"
    if not about.exists():
        raise InputError(f"'{path}' has no about.txt: it is no folder of tools/gpu_day.sh")
    return about.read_text().strip()


def put_into(target, text, pictures):
    """Replace the part "## On GPUs" of a Markdown file, and copy pictures into its folder."""
    before, heading, rest = target.read_text().partition("## On GPUs\n")
    if not heading:
        raise InputError(f"{target} has no part '## On GPUs'")
    after = re.search(r"^## ", rest, re.M)
    target.write_text(before + text + ("\n" + rest[after.start() :] if after else ""))
    for picture in pictures:
        if picture.exists():
            shutil.copy(picture, target.parent)


def main():
    configure(globals(), positional=("folder",))
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"'{folder}' is not a folder; tools/gpu_day.sh makes one")
    rows = {row["name"]: row for row in read_json(path / "bench.json").get("rows", [])}
    runs = read_runs(path / "enwik8") if (path / "enwik8").is_dir() else {}
    found = targets(path, rows, runs)
    text = markdown(describe(path), rows, runs, table(["", "target", "measured"], found))
    (path / "gpu.md").write_text(text)
    curves = {name: [run] for name, run in runs.items() if run.evals}
    if curves:
        draw_loss(path / "enwik8.png", {"seconds": curves}, STYLES)
    print(describe(path))
    print(*steps_of(path), sep="\n")
    for what, target, value in found:
        print(f"{what:72s} {target:>24s}   {value}")
    if speed_md:
        put_into(Path(speed_md), text, [path / "speed_gpu.png", path / "enwik8.png"])


if __name__ == "__main__":
    run_main(main)
