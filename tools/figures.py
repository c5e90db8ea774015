"""
The pictures of tools/report: readable as wide as a README, on light and dark pages.
"""

import math
import re
import statistics
import sys

import numpy as np

from tools.run_logs import last_of, load_of, log_e

GREY = "#808080"  # readable on light and dark pages
# so are these, and apart also to the colour-blind: Okabe and Ito's, less black and yellow, and a purple of Paul Tol's
COLOURS = ("#2a7fbf", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#aa3377", "#56b4e9")


def axes_of(rows, columns, height, **options):
    """A figure as wide as a page, and its axes."""
    import matplotlib  # late: only where something is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(9, height), squeeze=False, layout="constrained", **options
    )
    for ax in axes.flat:
        ax.tick_params(which="both", colors=GREY, labelsize=9)
        ax.spines[:].set_color(GREY)
    return figure, axes


def ticks(axis, log=False, form=None):
    """Few numbers on an axis, 1.5M for 1,500,000; on one that is logarithmic also within a decade."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if log else MaxNLocator(5))
    axis.set_major_formatter(form or EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def finish(figure, axes, path, legend=True):
    for ax in axes.flat:
        for label in (ax.xaxis.label, ax.yaxis.label, ax.title):
            label.set(color=GREY, fontsize=9)
        if legend:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(color=GREY, alpha=0.25, linewidth=0.6)
    if legend:
        handles, names = axes[0, 0].get_legend_handles_labels()
        columns = (
            2 if max(map(len, names)) > 24 else 3 if len(names) in (3, 5, 6) else 4
        )  # as many as fit, in even rows
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            labelcolor=GREY,
            fontsize=9,
        )
    figure.savefig(path, dpi=150, transparent=True)
    sys.modules["matplotlib.pyplot"].close(figure)


def styles_of(groups, baseline):
    """{name: how its lines and points look}: when the colours are used up, again with another line and marker."""
    others = [group["name"] for group in groups if group is not baseline]
    kinds = [
        {"color": colour, "linestyle": line, "marker": marker}
        for line, marker in (("-", "o"), (":", "s"), ("-.", "^"), ("--", "v"))
        for colour in COLOURS
    ]
    found = {name: kinds[i % len(kinds)] for i, name in enumerate(others)}
    return found | (
        {baseline["name"]: {"color": GREY, "linestyle": (0, (4, 1.5)), "marker": "D"}}
        if baseline
        else {}
    )


def curve(runs):
    """Tokens, FLOPs and seconds, means over seeds, and losses (seeds, points), at the evaluations that all seeds have, the last
    ones together: seeds that train for a time end at different steps."""
    common = set.intersection(*(set(run["evals"]) for run in runs)) - {
        max(run["evals"]) for run in runs
    }
    evals = [[run["evals"][step] for step in (*sorted(common), max(run["evals"]))] for run in runs]
    step, seconds, losses = (
        np.array([[e[key] for e in line] for line in evals])
        for key in ("step", "seconds", "val_loss")
    )
    tokens = step.mean(axis=0) * runs[0]["start"]["tokens_per_step"]
    return (tokens, tokens * runs[0]["start"]["flops_per_token"], seconds.mean(axis=0)), losses


def draw_loss(path, groups, styles):
    figure, axes = axes_of(1, 3, 3.6, sharey=True)
    ends = []
    for group in groups:
        xs, losses = curve(group["shown"])
        skip = min(1, losses.shape[1] - 1)  # the first evaluation tells little
        third = losses.mean(axis=0)[max(skip, losses.shape[1] // 3) :]
        ends += [third.min(), third.max(), losses[:, -1].min()]
        for ax, x in zip(axes[0], xs, strict=True):
            ax.plot(
                x[skip:],
                losses.mean(axis=0)[skip:],
                label=group["name"],
                **styles[group["name"]] | {"marker": None},
            )
            ax.fill_between(
                x[skip:],
                losses.min(axis=0)[skip:],
                losses.max(axis=0)[skip:],
                alpha=0.2,
                linewidth=0,
                color=styles[group["name"]]["color"],
            )
    ends = [loss for loss in ends if math.isfinite(loss)]
    margin = 0.05 * (max(ends) - min(ends)) or 0.01
    axes[0, 0].set(
        ylim=(min(ends) - margin, max(ends) + margin), ylabel="validation loss, nats per token"
    )
    for ax, label in zip(
        axes[0], ("training tokens", "training FLOPs", "training seconds"), strict=True
    ):
        ticks(ax.xaxis)
        ax.set_xlabel(label)
    finish(figure, axes, path)


def draw_params(path, groups, styles):
    figure, axes = axes_of(1, 2, 3.6, sharey=True)
    for ax, key, label in zip(
        axes[0], ("active_params", "params"), ("active parameters", "all parameters"), strict=True
    ):
        for group in groups:
            losses = [last_of(run)["val_loss"] for run in group["shown"]]
            ax.errorbar(
                group["shown"][0]["start"][key],
                statistics.mean(losses),
                capsize=3,
                label=group["name"],
                yerr=statistics.stdev(losses) if len(losses) > 1 else None,
                **styles[group["name"]] | {"linestyle": ""},
            )
        sizes = [group["shown"][0]["start"][key] for group in groups]
        # where sizes are equal, as they often are meant to be, the axis still needs numbers
        middle, wide = (
            math.sqrt(min(sizes) * max(sizes)),
            math.sqrt(max(5, 1.4 * max(sizes) / min(sizes))),
        )
        ax.set(xscale="log", xlim=(middle / wide, middle * wide), xlabel=label)
        ticks(ax.xaxis, log=True)
    axes[0, 0].set_ylabel("last validation loss, nats per token")
    finish(figure, axes, path)


def draw_balance(path, groups, styles):
    figure, axes = axes_of(1, 2, 3.3)
    for ax, key, label in zip(
        axes[0],
        ("max_vio_mean", "router_entropy"),
        ("MaxVio", "router entropy / ln E"),
        strict=True,
    ):
        for group in groups:
            courses = []
            for run in group["moe"]:
                scale = log_e(run) if key == "router_entropy" else 1
                points = [
                    (line["step"] * run["start"]["tokens_per_step"], np.mean(line[key]) / scale)
                    for line in run["lines"]
                    if key in line
                ]
                # single steps are noisy: means of sixtieths
                courses.append(
                    np.array(
                        [part.mean(axis=0) for part in np.array_split(points, min(60, len(points)))]
                    ).T
                )
            x = min(
                (course[0] for course in courses), key=lambda x: x[-1]
            )  # as far as all seeds are
            ax.plot(
                x,
                np.mean([np.interp(x, *course) for course in courses], axis=0),
                label=group["name"],
                **styles[group["name"]] | {"marker": None},
            )
        ticks(ax.xaxis)
        ax.set(xlabel="training tokens", ylabel=label)
    axes[0, 0].set_yscale("log")  # from even to collapsed
    ticks(axes[0, 0].yaxis, log=True, form="{x:g}")
    finish(figure, axes, path)


def draw_load(path, run):
    from matplotlib.colors import LogNorm

    load = load_of(run)
    layers, columns = load.shape[1], min(4, load.shape[1])
    image = np.array([part.mean(axis=0) for part in np.array_split(load, min(150, len(load)))])
    figure, axes = axes_of(
        math.ceil(layers / columns),
        columns,
        0.9 + 1.5 * math.ceil(layers / columns),
        sharex=True,
        sharey=True,
    )
    for ax in axes.flat[layers:]:
        ax.set_visible(False)
    for layer, ax in enumerate(axes.flat[:layers]):
        drawn = ax.imshow(
            image[:, layer].T.clip(1e-3),
            norm=LogNorm(0.25, 4),
            cmap="coolwarm",
            aspect="auto",
            interpolation="nearest",
            extent=(
                0,
                run["lines"][-1]["step"] * run["start"]["tokens_per_step"],
                load.shape[2] - 0.5,
                -0.5,
            ),
        )
        ax.set_title(f"MoE layer {layer + 1}")
        ticks(ax.xaxis)
        ax.yaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    bar = figure.colorbar(
        drawn, ax=axes, extend="both", ticks=[0.25, 0.5, 1, 2, 4], format="{x:g}", pad=0.02
    )
    bar.minorticks_off()
    bar.ax.tick_params(colors=GREY, labelsize=9)
    bar.outline.set_color(GREY)
    bar.set_label("load / mean load", color=GREY, fontsize=9)
    figure.supxlabel("training tokens", color=GREY, fontsize=9)
    figure.supylabel("expert", color=GREY, fontsize=9)
    finish(figure, axes, path, legend=False)


def pictures(out, groups, baseline):
    """Draw what there is to draw; Markdown that shows it."""
    styles, shown, moe = (
        styles_of(groups, baseline),
        [g for g in groups if g["shown"]],
        [g for g in groups if g["moe"]],
    )
    found = []
    if shown:
        draw_loss(out / "loss.png", shown, styles)
        draw_params(out / "params.png", shown, styles)
        found += [
            (
                "loss.png",
                "Validation loss against training tokens, training FLOPs and training seconds",
                "Validation loss per token, per FLOP and per second of training: means over seeds, in bands from the lowest "
                "to the highest seed. What lies above the picture is the start.",
            ),
            (
                "params.png",
                "Last validation loss against active and against all parameters",
                "The last validation loss against the parameters that a token meets, and against all: means over seeds, "
                "with their standard deviations.",
            ),
        ]
    if moe:
        draw_balance(out / "balance.png", moe, styles)
        found.append(
            (
                "balance.png",
                "MaxVio and router entropy against training tokens",
                "How even the routing is. MaxVio: how far the busiest expert's load lies above the mean load, over the "
                "mean; 0 is even. Router entropy: 1 is a router without a preference. Means over layers and seeds.",
            )
        )
    for group in moe:
        name = f"load-{re.sub(r'[^a-z0-9]+', '-', group['name'].lower()).strip('-')}.png"
        if name in (other for other, *_ in found):
            name = f"load-{len(found)}.png"
        draw_load(out / name, group["moe"][0])
        found.append(
            (
                name,
                f"Load of each expert during training, {group['name']}",
                f"{group['name']}, seed {group['moe'][0]['settings']['seed']}: each expert's load over the mean load. "
                "Grey is even, red a crowded expert, blue one that starves or is dead.",
            )
        )
    return "\n\n".join(f"![{alt}]({name})\n\n{sentence}" for name, alt, sentence in found)
