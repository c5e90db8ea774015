"""
The README's figure: validation loss against tokens and against seconds, from the runs of a sweep.

$ python -m tools.readme_figure out/sweeps/dense_vs_moe
"""

from pathlib import Path

from configurator import configure, run_main
from tools.figures import BLUE, GREEN, ORANGE, draw_loss
from tools.run_logs import read_runs

folder = "out/sweeps/dense_vs_moe"  # of the sweep's runs
path = "assets/dense_vs_moe.png"  # the figure
COLOURS = {"MoE": ORANGE, "dense": BLUE, "dense, as many parameters": GREEN}
MORE = "dense, as many parameters"
# the x axis, and the runs of each line
PANELS = {
    "tokens": {"MoE": "8-experts-top-2", "dense": "dense", MORE: "dense,-as-many-parameters"},
    "seconds": {"MoE": "8-experts-top-2,-by-time", "dense": "dense,-by-time"},
}


def main():
    configure(globals(), positional=("folder", "path"))
    runs = read_runs(Path(folder))
    panels = []
    for axis, names in PANELS.items():
        curves = {}
        for label, name in names.items():
            curves[label] = [run for key, run in runs.items() if key.startswith(f"{name},seed=")]
        panels.append((axis, curves))
    draw_loss(path, panels, {label: {"color": colour} for label, colour in COLOURS.items()})


if __name__ == "__main__":
    run_main(main)
