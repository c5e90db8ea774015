"""
Watch a run in the terminal: its loss, its experts' load, its last lines.

    python -m tools.watch out/plays-char-moe

It reads the run's log.jsonl, and again whenever that has grown, until Ctrl-C. Into a file or a pipe
it prints what there is now, once.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from configurator import InputError
from nanomoe.errors import run_main
from nanomoe.log import lines_from_end, time_left
from nanomoe.run_dir import is_locked
from tools.run_logs import last_eval, parse, read_log

SECONDS = 2  # between two looks at the log
HEIGHT = 12  # of the chart, in lines
LINES = 8  # of the log
# bits of a braille character's dots (Unicode, block 2800 to 28FF), four rows of two
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def read_run(path):
    """run_logs.read_log(), which leaves out lines of a long log, but with the last ones."""
    run, last = read_log(path), []
    for _, line in lines_from_end(path, 2**16):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
            entry, kind = parse(line)
            if kind == "loss":
                last.insert(0, entry)
        if len(last) == LINES:
            break
    if last:
        run["lines"] = [line for line in run["lines"] if line["step"] < last[0]["step"]] + last
    return run


def draw(run, state, width, height=100):
    """The picture of a run (see read_run) for rich. state: what it does now. A low terminal shows
    fewer lines of the log, fewer layers and a lower chart."""
    lines = LINES if height >= 30 else LINES // 2
    room = height - 2 - (lines + 2)  # for the chart and the map
    parts = [headline(run, state)]
    layers = next((line["expert_load"] for line in run["lines"][::-1] if "expert_load" in line), [])
    rows = min(len(layers), max(1, room - HEIGHT // 2 - 5))  # the chart gets half its height
    if run["lines"]:
        chart = max(3, min(HEIGHT, room - 3 - (rows + 2 if layers else 0)))
        parts += [Text(), *loss_chart(run, max(width, 20), chart)]
        if layers:
            parts += [Text(), *load_map(run, width, rows)]
        parts += [Text(), last_lines(run, lines)]
    return Group(*parts)


def headline(run, state):
    words, settings = [run["progress"], state], run["settings"]
    if run["lines"]:
        line, seconds = run["lines"][-1], settings["max_seconds"]
        words[0] = f"step {line['step']}/{settings['max_iters']}"
        left = (settings["max_iters"] - line["step"]) * line["ms"] / 1e3
        if seconds:
            words[0], left = f"{line['seconds']:.0f}/{seconds:.0f} s", seconds - line["seconds"]
        if state == "running":
            words.append(time_left(left))
    if run["evals"]:
        best = min(entry["val_loss"] for entry in run["evals"].values())
        words.append(f"validation loss {last_eval(run)['val_loss']:.4f}, the lowest {best:.4f}")
    return Text(" | ".join(words), style="bold", no_wrap=True, overflow="ellipsis")


def loss_chart(run, width, height):
    """Lines of Text: the training loss as a curve of braille dots, validation losses as circles."""
    columns = width - 9  # beside the numbers of the axis
    lines = [line for line in run["lines"] if np.isfinite(line["loss"])]
    if not lines:
        return [Text("no finite loss")]
    steps = np.array([line["step"] for line in lines])
    losses = np.array([line["loss"] for line in lines])
    last = max(run["lines"][-1]["step"], *run["evals"], 1)
    at = np.linspace(steps[0], steps[-1], max(1, round(2 * columns * steps[-1] / last)))
    curve = np.interp(at, steps, smooth(losses, len(at)))
    evals = {step: e["val_loss"] for step, e in run["evals"].items() if step > 0}
    evals = {step: value for step, value in evals.items() if np.isfinite(value)}
    values = [*curve[len(curve) // 20 :], *evals.values()]  # the first losses are far above
    low, high = min(values), max(values)
    span = max(high - low, 1e-6)

    def row(value):  # from the top, in dots
        scaled = np.round((high - value) / span * (4 * height - 1))
        return np.clip(scaled, 0, 4 * height - 1).astype(int)

    dots = np.zeros((4 * height, 2 * columns), bool)
    rows = row(curve)
    for x, (a, b) in enumerate(zip(rows, [rows[0], *rows], strict=False)):
        dots[min(a, b) : max(a, b) + 1, x] = True
    cells = dots.reshape(height, 4, columns, 2).transpose(0, 2, 1, 3)
    codes = 0x2800 + (cells * DOTS).sum(axis=(2, 3))
    drawn = [Text("".join(map(chr, line)), style="cyan") for line in codes]
    for step, value in evals.items():
        x, y = min(columns - 1, int(step / last * columns)), row(value) // 4
        drawn[y] = drawn[y][:x] + Text("●", style="yellow") + drawn[y][x + 1 :]
    axis = [f"{high:7.3f} ┤", *["        │"] * (height - 2), f"{low:7.3f} ┤"]
    end = f"step {last:,}"
    bottom = Text(f"{'':9}{steps[0]:,}".ljust(width - len(end)) + end, style="dim")
    legend = Text.assemble("loss: ", ("training", "cyan"), ", ", ("● validation", "yellow"))
    return [legend, *(Text(a) + line for a, line in zip(axis, drawn, strict=True)), bottom]


def smooth(losses, columns):
    """A running mean over as many lines as fall into a column."""
    size = max(1, len(losses) // columns)
    sums = np.cumsum([0.0, *losses])
    starts = np.maximum(np.arange(1, len(losses) + 1) - size, 0)
    ends = np.arange(1, len(losses) + 1)
    return (sums[ends] - sums[starts]) / (ends - starts)


def load_map(run, width, height):
    """Lines of Text: for each MoE layer the load of its experts in the last line that has it. If
    there are more than `height` layers, the first ones."""
    line = [line for line in run["lines"] if "expert_load" in line][-1]
    load = np.array(line["expert_load"])
    load = load * load.shape[1]
    E = load.shape[1]
    size = max(1, min(4, (width - 12) // E))  # characters for an expert
    which = "" if len(load) <= height else f" of {height} of {len(load)} layers"
    title = f"load of each of {E} experts{which} at step {line['step']:,}: "
    legend = Text.assemble(title, ("dead ", "blue"), "even ", ("overloaded", "red"))
    legend.no_wrap = True
    rows = [legend]
    for layer, loads in enumerate(load[:height]):
        row = Text(f"layer {layer:3d}  ")
        for share in loads[: max(1, (width - 12) // size)]:
            row.append("█" * size, style=color(share))
        row.append(f"  max {loads.max():.1f}" if len(row) < width - 10 else "")
        rows.append(row)
    return rows


def color(share):
    """From blue (no load) over grey (the mean) to red (twice the mean and more)."""
    x = np.clip(share, 0, 2) - 1
    grey, end = np.array([130, 130, 130]), np.array([60, 90, 255] if x < 0 else [240, 50, 40])
    r, g, b = np.round(grey + (end - grey) * abs(x)).astype(int)
    return f"rgb({r},{g},{b})"


def last_lines(run, number):
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    names = {"step": ",", "loss": ".4f", "lr": ".2e", "ms": ",.0f", "tokens_per_s": ",.0f"}
    names |= {"max_vio": ".2f", "dead_experts": ",", "balance_loss": ".3f"}
    names = {name: form for name, form in names.items() if name in run["lines"][-1]}
    for name in names:
        table.add_column(name, justify="right")
    for line in run["lines"][-number:]:
        table.add_row(*(format(line[name], form) for name, form in names.items()))
    return table


def look(out_dir, running, width, height=100):
    """What there is to see of a run. running: whether a process trains it."""
    path = out_dir / "log.jsonl"
    if not path.exists():
        return Text(f"{out_dir} has no log.jsonl yet")
    run = read_run(path)
    if not run["start"]:
        return Text(f"{path}: {'; '.join(run['problems']) or 'no start line yet'}")
    state = run["state"]
    if state not in ("finished", "diverged"):
        state = "running" if running else "stopped"
    return draw(run, state, width, height)


def main():
    parser = argparse.ArgumentParser(description="Watch a run in the terminal.")
    parser.add_argument("out_dir", type=Path, help="the run's folder")
    args = parser.parse_args()
    if not args.out_dir.is_dir():
        raise InputError(f"'{args.out_dir}' is not a folder; give a run's out_dir")
    console = Console()
    if not sys.stdout.isatty():
        console.print(look(args.out_dir, is_locked(args.out_dir), console.width))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        seen = None
        while True:
            begin = time.monotonic()
            path = args.out_dir / "log.jsonl"
            size = path.stat().st_size if path.exists() else 0
            now = size, is_locked(args.out_dir), *console.size
            if now != seen:
                live.update(look(args.out_dir, *now[1:]), refresh=True)
            seen = now
            time.sleep(SECONDS + 10 * (time.monotonic() - begin))  # a long log takes a while


if __name__ == "__main__":
    run_main(main)
