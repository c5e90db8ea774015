"""
Watch a run in the terminal: its experts' load and its last lines.

$ python -m tools.watch out/plays-char-moe

It reads the run's log.jsonl again and again, until Ctrl-C. Into a file or a pipe it prints what
there is now, once.
"""

import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from configurator import InputError, configure
from nanomoe.errors import run_main
from nanomoe.log import LOG, time_left
from nanomoe.run_dir import is_locked
from nanomoe.schedule import Schedule
from tools.run_logs import LoggedRun

# -----------------------------------------------------------------------------
# settings
out_dir = ""  # the run's folder; can be given without --out_dir=
# -----------------------------------------------------------------------------
COLUMNS = {"step": ",", "loss": ".4f", "grad_norm": ".2f", "lr": ".2e", "ms": ",.0f"}
COLUMNS |= {"tokens_per_s": ",.0f", "max_vio": ".2f", "dead_experts": ",", "balance_loss": ".3f"}


def look(folder, running, width, height=100):
    """What there is to see of a run, for rich; less of it in a low terminal. running: whether a
    process trains it."""
    if not (folder / LOG).exists():
        return Text(f"{folder} has no log.jsonl yet")
    run = LoggedRun(folder / LOG)
    if not run.start:
        return Text(f"{folder / LOG}: no start line yet")
    ended = run.state in ("finished", "diverged")
    parts = [headline(run, run.state if ended else "running" if running else "stopped")]
    lines = run.newest if height >= 30 else run.newest[-4:]
    with_load = [line for line in [*run.lines, *run.newest] if "expert_load" in line]
    if with_load:
        rows = max(1, height - len(lines) - 6)
        parts += [Text(), *load_map(with_load[-1], width, rows)]
    return Group(*parts, Text(), last_lines(lines)) if lines else parts[0]


def headline(run, state):
    words = [run.progress, state]
    if run.newest and state == "running":
        last, schedule = run.newest[-1], Schedule.of(run.settings)
        left = schedule.seconds_left(last["step"], last["seconds"], last["ms"] / 1e3)
        words.append(time_left(max(0, left)))
    if run.evals:
        lowest = min(entry["val_loss"] for entry in run.evals.values())
        words.append(f"validation loss {run.last_eval['val_loss']:.4f}, the lowest {lowest:.4f}")
    return Text(" | ".join(words), style="bold", no_wrap=True, overflow="ellipsis")


def load_map(line, width, height):
    """For each MoE layer the load of its experts; of many layers the first ones."""
    load = np.array(line["expert_load"])[:height]
    E = load.shape[1]
    size = max(1, min(4, (width - 20) // E))  # characters for an expert
    shown = f"of {len(load)} of {len(line['expert_load'])} layers at step {line['step']:,}"
    rows = [Text.assemble(f"load {shown}: ", ("dead ", "blue"), "even ", ("overloaded", "red"))]
    for layer, loads in enumerate(load * E):
        rows.append(Text(f"layer {layer:2d}, max {loads.max():4.1f}  "))
        for share in loads:
            rows[-1].append("█" * size, style=color(share))
    for row in rows:
        row.no_wrap, row.overflow = True, "crop"
    return rows


def color(share):
    """From blue (no load) over grey (the mean) to red (twice the mean and more)."""
    end = (60, 90, 255) if share < 1 else (240, 50, 40)
    mixed = [round(130 + (part - 130) * abs(min(share, 2) - 1)) for part in end]
    return f"rgb({','.join(map(str, mixed))})"


def last_lines(lines):
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    names = [name for name in COLUMNS if name in lines[-1]]
    for name in names:
        table.add_column(name, justify="right")
    for line in lines:  # an older version's lack some columns
        table.add_row(*(format(line[n], COLUMNS[n]) if n in line else "" for n in names))
    return table


def main():
    configure(globals(), positional=("out_dir",))
    folder, console = Path(out_dir), Console()
    if not out_dir or not folder.is_dir():
        raise InputError(f"'{out_dir}' is not a folder; give a run's out_dir")
    if not sys.stdout.isatty():
        console.print(look(folder, is_locked(folder), console.width))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            begin = time.monotonic()
            live.update(look(folder, is_locked(folder), *console.size), refresh=True)
            time.sleep(2 + 10 * (time.monotonic() - begin))  # a long log takes a while


if __name__ == "__main__":
    run_main(main)
