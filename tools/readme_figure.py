"""
The README's figure: validation loss against tokens and against seconds, from the runs of a sweep.

$ python -m tools.readme_figure out/sweeps/dense_vs_moe
"""

from pathlib import Path

from configurator import configure
from nanomoe.errors import run_main
from tools.figures import BLUE, GREEN, ORANGE, draw_loss
from tools.run_logs import read_runs

folder = "out/sweeps/dense_vs_moe"  # of the sweep's runs
path = "assets/dense_vs_moe.png"  # the figure
STYLES = {"MoE": {"color": ORANGE}, "dense": {"color": BLUE}}
STYLES["dense, as many parameters"] = {"color": GREEN}
LINES = [  # x axis, name, runs
    ("tokens", "dense, as many parameters", "dense,-as-many-parameters"),
    ("tokens", "dense", "dense"),
    ("tokens", "MoE", "8-experts-top-2"),
    ("seconds", "MoE", "8-experts-top-2,-by-time"),
    ("seconds", "dense", "dense,-by-time"),
]


def main():
    configure(globals(), positional=("folder", "path"))
    runs = read_runs(Path(folder))
    panels = {"tokens": {}, "seconds": {}}
    for axis, name, prefix in LINES:
        panels[axis][name] = [run for key, run in runs.items() if key.startswith(f"{prefix},seed=")]
    draw_loss(path, panels, STYLES)


if __name__ == "__main__":
    run_main(main)
