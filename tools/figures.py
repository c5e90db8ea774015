"""
Figures for reports and READMEs: readable at 800 pixels, on light and dark pages, and by people who
are colour-blind. The name of a line stands at its end.
"""

import itertools
import math
import re
import statistics
import textwrap

import numpy as np

from nanomoe.trackers import add_load_bar, load_colors
from tools.run_logs import last_eval, relative_load

GREY = "#808080"  # text and axes: readable on light and dark pages
# Okabe and Ito's colours for the colour-blind, without black and yellow
BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"
COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#d55e00", "#56b4e9")
COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
NAME_WIDTH = 26  # letters in a line of a name
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


def set_ticks(axis, log=False, form=None):
    """Few numbers on an axis, 1.5M for 1,500,000; on a logarithmic one also within a decade."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if log else MaxNLocator(5))
    axis.set_major_formatter(form or EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def styles_of(groups, baseline):
    """{name: style}. Used up, the colours come again with another line and marker."""
    kinds = []
    for line, marker in (("-", "o"), ("--", "s"), (":", "^"), ("-.", "v")):
        kinds += [{"color": c, "linestyle": line, "marker": marker} for c in COLOURS]
    others = [group.name for group in groups if group is not baseline]
    found = {name: kinds[i % len(kinds)] for i, name in enumerate(others)}
    if baseline:
        found[baseline.name] = {"color": GREY, "linestyle": (0, (4, 1.5)), "marker": "D"}
    return found


def draw_lines(panels, styles, **options):
    """Draw {name: (x, y, low, high)}, four arrays, in each panel: lines with bands, or a point with
    its error bar. Returns the figure and its axes for label_ends()."""
    most = max(panels, key=len)
    lines = sum(len(textwrap.wrap(name, NAME_WIDTH)) for name in most)
    figure, axes = new_figure(1, len(panels), max(3.6, 1 + 0.17 * lines), **options)
    for ax, panel in zip(axes[0], panels, strict=True):
        for name, (x, y, low, high) in panel.items():
            style = styles[name]
            if len(x) > 1:
                ax.plot(x, y, **style | {"marker": None})
                ax.fill_between(x, low, high, alpha=0.2, linewidth=0, color=style["color"])
            else:
                ax.errorbar(x, y, (high - low) / 2, capsize=3, **style)
        set_ticks(ax.xaxis)
    return figure, axes


def label_ends(ax, panel, styles):
    """Write names right of a panel, each joined to its line's end. The y axis must be final."""
    ax.get_ylim()  # scales the axes to the lines
    to_axes = ax.transData + ax.transAxes.inverted()
    labels = []
    for name, (x, y, *_) in panel.items():
        end = (x[-1], y[-1])
        lines = textwrap.wrap(name, NAME_WIDTH)
        # half of the text's height, as a share of the panel's, which is most of the figure's
        half = 0.1 * len(lines) / ax.figure.get_figheight()
        label = {"text": "\n".join(lines), "colour": styles[name]["color"], "half": half}
        labels.append(label | {"end": end, "y": to_axes.transform(end)[1]})
    labels.sort(key=lambda label: label["y"])
    # move overlapping labels apart: first upwards, then those above the top down again
    for below, label in itertools.pairwise(labels):
        label["y"] = max(label["y"], below["y"] + below["half"] + label["half"])
    top = 1.0
    for label in reversed(labels):
        label["y"] = min(label["y"], top - label["half"])
        top = label["y"] - label["half"]
    options = {"textcoords": "axes fraction", "va": "center", "annotation_clip": False}
    for label in labels:
        arrow = {"arrowstyle": "-", "color": label["colour"], "relpos": (0, 0.5)}
        ax.annotate(label["text"], label["end"], (1.06, label["y"]), arrowprops=arrow, **options)


def curve(runs):
    """The validation loss of runs that differ in their seed only, at the evaluations they share.

    Returns {"tokens", "FLOPs", "seconds"}, means over seeds (points,), and losses (seeds, points).
    Each seed's last evaluation is the last point: seeds trained for a time end at different steps.
    """
    last = [max(run["evals"]) for run in runs]
    common = sorted(set.intersection(*(set(run["evals"]) for run in runs)) - set(last))
    found = {"step": [], "seconds": [], "val_loss": []}
    for run, end in zip(runs, last, strict=True):
        for key, rows in found.items():
            rows.append([run["evals"][step][key] for step in [*common, end]])
    tokens = np.mean(found["step"], axis=0) * runs[0]["start"]["tokens_per_step"]
    flops = tokens * runs[0]["start"]["flops_per_token"]
    xs = {"tokens": tokens, "FLOPs": flops, "seconds": np.mean(found["seconds"], axis=0)}
    return xs, np.array(found["val_loss"])


def draw_loss(path, panels, styles):
    """Validation loss, means over seeds in bands from the lowest to the highest seed.

    panels: {"tokens", "FLOPs" or "seconds": {name: runs}}. Names stand at the last panel's lines,
    and at every panel's if there are at most two.
    """
    drawn, shown = [], []  # shown: the losses that the y axis must hold
    for key, curves in panels.items():
        lines = {}
        for name, runs in curves.items():
            xs, losses = curve(runs)
            first = min(1, losses.shape[1] - 1)  # the first evaluation says little
            x, losses = xs[key][first:], losses[:, first:]
            lines[name] = (x, losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0))
            shown += [*losses.mean(axis=0)[len(x) // 3 :], losses[:, -1].min()]
        drawn.append(lines)
    figure, axes = draw_lines(drawn, styles, sharey=True)
    shown = [loss for loss in shown if math.isfinite(loss)]
    margin = 0.05 * (max(shown) - min(shown)) or 0.01
    axes[0, 0].set(ylim=(min(shown) - margin, max(shown) + margin))
    axes[0, 0].set_ylabel("validation loss, nats per token")
    for i, key in enumerate(panels):
        axes[0, i].set_xlabel(f"training {key}")
        if i == len(panels) - 1 or len(panels) <= 2:
            label_ends(axes[0, i], drawn[i], styles)
    figure.savefig(path)


def draw_params(path, groups, styles):
    """The last validation loss against parameters: mean and standard deviation over seeds."""
    panels = {"active_params": {}, "params": {}}
    for group in groups:
        losses = [last_eval(run)["val_loss"] for run in group.shown]
        mean = np.array([statistics.mean(losses)])
        deviation = statistics.stdev(losses) if len(losses) > 1 else 0
        for key, panel in panels.items():
            size = [group.shown[0]["start"][key]]
            panel[group.name] = (size, mean, mean - deviation, mean + deviation)
    figure, axes = draw_lines(list(panels.values()), styles, sharey=True)
    for ax, key in zip(axes[0], panels, strict=True):
        sizes = [x[0] for x, *_ in panels[key].values()]
        # equal sizes, as in a matched sweep, still need an axis with numbers
        middle = math.sqrt(min(sizes) * max(sizes))
        width = math.sqrt(max(5, 1.4 * max(sizes) / min(sizes)))
        label = "active parameters" if key == "active_params" else "all parameters"
        ax.set(xscale="log", xlim=(middle / width, middle * width), xlabel=label)
        set_ticks(ax.xaxis, log=True)
    axes[0, 0].set_ylabel("last validation loss, nats per token")
    label_ends(axes[0, 1], panels["params"], styles)
    figure.savefig(path)


def draw_balance(path, groups, styles):
    """MaxVio and router entropy during training, means over layers and seeds."""
    panels = [{}, {}]
    for group in groups:
        end = min(run["lines"][-1]["step"] for run in group.moe)  # up to where all seeds are
        for panel, key in zip(panels, ("max_vio_mean", "entropy"), strict=True):
            points = []  # only some lines have the entropy, see load_interval
            for run in group.moe:
                for line in run["lines"]:
                    if line["step"] <= end and key in line:
                        points.append((line["step"], line[key]))
            # single steps are noisy: average them in 60 parts
            count = max(1, len(points) // len(group.moe))
            parts = np.array_split(sorted(points), min(60, count))
            step, value = np.array([part.mean(axis=0) for part in parts]).T
            tokens = step * group.moe[0]["start"]["tokens_per_step"]
            panel[group.name] = (tokens, value, value, value)
    figure, axes = draw_lines(panels, styles)
    axes[0, 0].set(xlabel="training tokens", ylabel="MaxVio", yscale="log")
    axes[0, 1].set(xlabel="training tokens", ylabel="router entropy / ln E")
    set_ticks(axes[0, 0].yaxis, log=True, form="{x:g}")
    label_ends(axes[0, 1], panels[1], styles)
    figure.savefig(path)


def draw_load(path, run):
    """A heat map for each MoE layer: each expert's load over the mean load, during training."""
    load = relative_load(run)
    layers, E = load.shape[1:]
    parts = np.array_split(load, min(150, len(load)))
    image = np.array([part.mean(axis=0) for part in parts]).clip(1e-3)
    rows, columns = math.ceil(layers / 4), min(4, layers)
    figure, axes = new_figure(rows, columns, 0.9 + 1.5 * rows, sharex=True, sharey=True)
    tokens = run["lines"][-1]["step"] * run["start"]["tokens_per_step"]
    options = load_colors() | {"interpolation": "nearest", "aspect": "auto"}
    options |= {"extent": (0, tokens, E - 0.5, -0.5)}
    for layer, ax in enumerate(axes.flat):
        if layer >= layers:
            ax.set_visible(False)
            continue
        drawn = ax.imshow(image[:, layer].T, **options)
        ax.set_title(f"MoE layer {layer + 1}")
        ax.grid(False)
        set_ticks(ax.xaxis)
        ax.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    add_load_bar(figure, drawn, axes)
    figure.supxlabel("training tokens", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.savefig(path)


def draw_all(out, groups, baseline):
    """Draw what there is to draw. Returns Markdown that shows it."""
    styles = styles_of(groups, baseline)
    shown = [group for group in groups if group.shown]
    moe = [group for group in groups if group.moe]
    captions = {}
    if shown:
        curves = {group.name: group.shown for group in shown}
        panels = dict.fromkeys(("tokens", "FLOPs", "seconds"), curves)
        draw_loss(out / "loss.png", panels, styles)
        captions["loss.png"] = "Validation loss, means over seeds; bands: lowest to highest seed"
        draw_params(out / "params.png", shown, styles)
        captions["params.png"] = "Last validation loss, means and standard deviations over seeds"
    if moe:
        draw_balance(out / "balance.png", moe, styles)
        captions["balance.png"] = (
            "How even the routing is, means over layers and seeds. MaxVio: the busiest expert's "
            "load over the mean load, minus 1. Entropy: 1 is a router without a preference"
        )
    for group in moe:
        name = f"load-{re.sub(r'[^a-z0-9]+', '-', group.name.lower()).strip('-')}.png"
        if name in captions:
            name = f"load-{len(captions)}.png"
        draw_load(out / name, group.moe[0])
        captions[name] = (
            f"{group.name}, seed {group.moe[0]['settings']['seed']}: load of each expert over the "
            "mean load. Grey is even, red overloaded, blue underused or dead"
        )
    parts = [f"![{words}]({name})\n\n{words}." for name, words in captions.items()]
    return "\n\n".join(parts)
