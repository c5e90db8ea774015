"""
Figures for reports and READMEs: readable at 800 pixels, on light and dark pages, and by people who
are colour-blind. The name of a line stands at its end.
"""

import itertools
import math
import textwrap

import numpy as np

from nanomoe.trackers import add_load_bar, load_colors

GREY = "#808080"  # text and axes: readable on light and dark pages
# Okabe and Ito's colours for the colour-blind, without black and yellow
BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"
COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#d55e00", "#56b4e9")
MOST_LINES = len(COLOURS) + 1  # more cannot be told apart
AXES = ("tokens", "FLOPs", "seconds")  # of draw_loss()
DASHES = (0, (4, 1.5))
NAME_WIDTH = 26  # letters in a line of a name
COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
STYLE = dict.fromkeys(COLOURED, GREY) | {"font.size": 9, "axes.labelsize": 9, "axes.titlesize": 9}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
STYLE |= {"axes.grid": True, "grid.color": GREY, "grid.alpha": 0.25, "grid.linewidth": 0.6}
STYLE |= {"savefig.dpi": 150, "savefig.transparent": True, "legend.frameon": False}


def new_figure(rows, columns, height, **options):
    """A figure as wide as a page, and its axes (rows, columns)."""
    import matplotlib  # late: only where something is drawn
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def set_ticks(axis):
    """Few numbers on an axis, 1.5M for 1,500,000."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(EngFormatter(sep=""))


def styles_of(names, baseline=""):
    """{name: style}: a colour each, and grey dashes for the baseline."""
    others = [name for name in dict.fromkeys(names) if name != baseline]
    found = {name: {"color": c} for name, c in zip(others, itertools.cycle(COLOURS), strict=False)}
    return found | {baseline: {"color": GREY, "linestyle": DASHES}}


def draw_lines(path, panels, styles, ylim=None):
    """Lines with bands from low to high, and their names. panels: [(x label, y label, {name: (x, y,
    low, high)})]. Several panels with a `ylim` share the y axis; of three only the last has names.
    """
    figure, axes = new_figure(1, len(panels), 3.6, sharey=ylim is not None)
    for ax, (x_label, y_label, lines) in zip(axes[0], panels, strict=True):
        for name, (x, y, low, high) in lines.items():
            ax.plot(x, y, **styles[name], marker="" if len(x) > 1 else "o")
            ax.fill_between(x, low, high, alpha=0.2, linewidth=0, color=styles[name]["color"])
        ax.set(xlabel=x_label, ylabel=y_label)
        set_ticks(ax.xaxis)
        if ylim:
            ax.set_ylim(ylim)
        if len(panels) < 3 or lines is panels[-1][2]:
            label_ends(ax, lines, styles)
    figure.savefig(path)


def label_ends(ax, lines, styles):
    """Write names right of a panel, each joined to its line's end. The y axis must be final."""
    low, high = ax.get_ylim()
    names = sorted(lines, key=lambda name: lines[name][1][-1])
    texts = [textwrap.fill(name, NAME_WIDTH) for name in names]
    # as shares of the panel's height: the texts' heights, and their middles in a stack
    tall = 0.056 * np.array([len(text.splitlines()) for text in texts])
    stacked = np.cumsum(tall) - tall / 2
    wanted = np.array([(lines[name][1][-1] - low) / (high - low) for name in names])
    # apart: each at least as high above its place in the stack as the one below it, up to the top
    lift = np.minimum(np.maximum.accumulate(wanted - stacked), 1 - tall.sum())
    options = {"textcoords": "axes fraction", "va": "center", "annotation_clip": False}
    for name, text, height in zip(names, texts, stacked + lift, strict=True):
        x, y, *_ = lines[name]
        arrow = {"arrowstyle": "-", "color": styles[name]["color"], "relpos": (0, 0.5)}
        ax.annotate(text, (x[-1], y[-1]), (1.06, height), arrowprops=arrow, **options)


def curve(runs):
    """The validation loss of runs that differ in their seed only, at the evaluations they share.

    Returns {"tokens", "FLOPs", "seconds"}, means over seeds (points,), and losses (seeds, points).
    Each seed's last evaluation is the last point: seeds trained for a time end at different steps.
    """
    last = [max(run.evals) for run in runs]
    common = sorted(set.intersection(*(set(run.evals) for run in runs)) - set(last))
    found = {"step": [], "seconds": [], "val_loss": []}
    for run, end in zip(runs, last, strict=True):
        for key, rows in found.items():
            rows.append([run.evals[step][key] for step in [*common, end]])
    tokens = np.mean(found["step"], axis=0) * runs[0].start["tokens_per_step"]
    flops = tokens * runs[0].start["flops_per_token"]
    xs = {"tokens": tokens, "FLOPs": flops, "seconds": np.mean(found["seconds"], axis=0)}
    return xs, np.array(found["val_loss"])


def draw_loss(path, panels, styles):
    """Validation loss, means over seeds in bands from the lowest to the highest seed.

    panels: {one of AXES: {name: runs}}."""
    drawn, shown = [], []  # shown: the losses that the y axis must hold
    for key, curves in panels.items():
        lines = {}
        for name, runs in curves.items():
            xs, losses = curve(runs)
            first = min(1, losses.shape[1] - 1)  # the first evaluation says little
            x, losses = xs[key][first:], losses[:, first:]
            mean = losses.mean(axis=0)
            lines[name] = (x, mean, losses.min(axis=0), losses.max(axis=0))
            shown += [*mean[len(x) // 3 :], losses[:, -1].min()]
        y_label = "" if drawn else "validation loss, nats per token"
        drawn.append((f"training {key}", y_label, lines))
    shown = [loss for loss in shown if math.isfinite(loss)]
    margin = 0.05 * (max(shown) - min(shown)) or 0.01
    draw_lines(path, drawn, styles, (min(shown) - margin, max(shown) + margin))


def draw_differences(path, differences, baseline):
    """A forest plot: how far each run's loss is from the baseline's, the lowest first, with the
    interval if there is one. Coloured where the interval leaves 0 out.

    differences: {name: (mean, half of the interval, or None)}."""
    rows = sorted(differences.items(), key=lambda row: row[1][0])
    figure, axes = new_figure(1, 1, 0.9 + 0.22 * len(rows))
    ax = axes[0, 0]
    for y, (_, (mean, half)) in enumerate(rows):
        colour = BLUE if mean < 0 else ORANGE
        if half is None or abs(mean) <= half:
            colour = GREY
        ax.errorbar(mean, y, xerr=half, fmt="o", capsize=3, color=colour)
    ax.axvline(0, color=GREY, linestyle=DASHES)
    ax.set(yticks=range(len(rows)), yticklabels=[name for name, _ in rows])
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"validation loss minus that of '{baseline}'")
    ax.grid(False, axis="y")
    figure.savefig(path)


def draw_balance(path, moe, styles):
    """MaxVio and router entropy during training, means over layers and seeds. moe: {name: runs}."""
    panels = []
    for key, label in (("max_vio_mean", "MaxVio"), ("entropy", "router entropy / ln E")):
        lines = {}
        for name, runs in moe.items():
            end = min(run.lines[-1]["step"] for run in runs)  # up to where all seeds are
            # only some lines have the entropy, see load_interval
            logged = [line for run in runs for line in run.lines if key in line]
            points = sorted((line["step"], line[key]) for line in logged if line["step"] <= end)
            # single steps are noisy: average them in 60 parts
            parts = np.array_split(points, max(1, min(60, len(points) // len(runs))))
            step, value = np.array([part.mean(axis=0) for part in parts]).T
            lines[name] = (step * runs[0].start["tokens_per_step"], value, value, value)
        panels.append(("training tokens", label, lines))
    draw_lines(path, panels, styles)


def draw_load(path, run):
    """A heat map for each MoE layer: each expert's load over the mean load, during training."""
    load = run.relative_load()
    layers, E = load.shape[1:]
    parts = np.array_split(load, min(150, len(load)))
    image = np.array([part.mean(axis=0) for part in parts]).clip(1e-3)
    rows, columns = math.ceil(layers / 4), min(4, layers)
    figure, axes = new_figure(rows, columns, 0.9 + 1.5 * rows, sharex=True, sharey=True)
    tokens = run.lines[-1]["step"] * run.start["tokens_per_step"]
    options = load_colors() | {"interpolation": "nearest", "aspect": "auto"}
    options |= {"extent": (0, tokens, E - 0.5, -0.5)}
    for ax in axes.flat[layers:]:
        ax.set_visible(False)
    for layer, ax in enumerate(axes.flat[:layers]):
        drawn = ax.imshow(image[:, layer].T, **options)
        ax.set_title(f"MoE layer {layer}")  # counted from 0, as everywhere
        ax.grid(False)
        set_ticks(ax.xaxis)
        ax.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    add_load_bar(figure, drawn, axes)
    figure.supxlabel("training tokens", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.savefig(path)
