"""
The README's figure: validation loss against tokens and against seconds, from the logs of a sweep.
$ python -m tools.readme_figure out/sweeps/dense_vs_moe
"""

import json
from pathlib import Path

import numpy as np

from configurator import configure, run_main

folder = "out/sweeps/dense_vs_moe"  # of the sweep's runs
path = "assets/dense_vs_moe.png"  # the figure
GREY = "#808080"  # readable on light and on dark pages
BLUE, ORANGE, GREEN = "#2a7fbf", "#d55e00", "#009e73"  # apart for the colour-blind (Okabe, Ito)
AXES = ("million training tokens", "training seconds")
# the axis, the run, its label and colour, and by how many points the label is moved up
CURVES = [
    (0, "dense,-as-many-parameters", "dense, as many\nparameters", GREEN, 9),
    (0, "dense", "dense", BLUE, -9),
    (0, "8-experts-top-2", "MoE", ORANGE, 0),
    (1, "8-experts-top-2,-by-time", "MoE", ORANGE, 5),
    (1, "dense,-by-time", "dense", BLUE, -5),
]


def read_curve(log, axis):
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    evals = [entry for entry in entries if "val_loss" in entry]
    tokens = entries[0]["tokens_per_step"] / 1e6
    x = [e["seconds"] if axis == 1 else e["step"] * tokens for e in evals]
    return x, [e["val_loss"] for e in evals]


def main():
    from matplotlib import pyplot  # late: only where something is drawn

    configure(globals(), positional=("folder", "path"))
    grey = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    pyplot.rcParams.update({key: GREY for key in grey})
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
    for axis, name, label, colour, up in CURVES:
        seeds = [read_curve(log, axis) for log in Path(folder).glob(f"{name},seed=*/log.jsonl")]
        grid = np.linspace(max(x[0] for x, _ in seeds), min(x[-1] for x, _ in seeds), 200)
        losses = np.array([np.interp(grid, x, loss) for x, loss in seeds])
        axes[axis].plot(grid, losses.mean(axis=0), color=colour, linewidth=2)
        low, high = losses.min(axis=0), losses.max(axis=0)
        axes[axis].fill_between(grid, low, high, color=colour, alpha=0.2)
        at = {"xytext": (6, up), "textcoords": "offset points", "va": "center"}
        axes[axis].annotate(label, (grid[-1], losses[:, -1].mean()), color=colour, **at)
        axes[axis].set(xlim=(0, grid[-1] * 1.5), xlabel=AXES[axis])  # room for the labels
        axes[axis].grid(True, alpha=0.25)
        axes[axis].spines[["top", "right"]].set_visible(False)
    axes[0].set(ylim=(1.8, 2.25), ylabel="validation loss, nats per character")
    figure.savefig(path, dpi=200, transparent=True)


if __name__ == "__main__":
    run_main(main)
