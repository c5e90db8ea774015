"""Folders of runs for the tests of tools/report.py: logs, sweep.json, and the report of them."""

import json
import math
import re
import sys

from tools import report

E, LAYERS = 4, 2
LOSSES = {"dense": (2.10, 2.00, 2.06), "moe": (2.00, 1.93, 1.97)}


def log_lines(
    seed=1, loss=1.5, steps=20, use_moe=True, vio=0.5, ended=True, interval=5, **settings
):
    """The lines of a log as train.py writes it. Of a MoE the first layer's MaxVio is `vio`, the
    second's is 2 * vio. loss: the last one."""
    settings = {
        "seed": seed,
        "max_iters": 20,
        "max_seconds": 0.0,
        "use_moe": use_moe,
        "num_experts": E,
        "init_from": "scratch",
        "out_dir": f"out/{seed}",
        "learning_rate": 1e-3,
        "min_lr": 0.0,
        "warmup_iters": 0,
    } | settings
    start = {
        "start": "2026-11-24 18:00:00",
        "torch": "2.13.0",
        "params": 2_000_000,
        "active_params": 1_000_000,
        "flops_per_token": 6_000_000,
        "tokens_per_step": 2048,
        "settings": settings,
    }
    routing = {
        "balance_loss": 1.0,
        "z_loss": 4.0,
        "max_vio": 2 * vio,
        "max_vio_mean": 1.5 * vio,
        "dead_experts": 1,
        "collapsed_layers": [],
        "router_entropy": [math.log(E) / 2] * LAYERS,
        "first_gate": [0.5] * LAYERS,
        "logit_norm": [1.0, 3.0],
        "dropped": [0.0, 0.25],
        "expert_load": [
            [(1 + v) / E] + [(1 - (1 + v) / E) / (E - 1)] * (E - 1) for v in (vio, 2 * vio)
        ],
    }
    lines = [start]
    for step in range(1, steps + 1):
        entry = {"step": step, "seconds": step * 0.5, "lr": 1e-3, "loss": loss + 0.1 + 1 / step}
        entry |= routing if use_moe else {}
        lines.append(entry | {"ms": 500.0, "tokens_per_s": 1000.0, "mfu": None})
        if step % interval == 0:
            val_loss = {"val_loss": loss + (steps - step) / 10, "val_bits_per_byte": 2}
            lines.append({"step": step, "seconds": step * 0.5} | val_loss)
    return lines + [{"end": "2026-11-24 19:00:00", "steps": steps}] * ended


def write(folder, lines, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def make(folder, groups, findings=(), match=""):
    """Write runs and their sweep.json.

    groups: {name: {seed: settings for log_lines, or None for a run that has not started}}."""
    runs = {}
    for name, seeds in groups.items():
        folders = [f"{name},seed={seed}" for seed in seeds]
        runs[name] = {"folders": folders, "match": match and name + match}
        for seed, settings in seeds.items():
            if settings is not None:
                write(folder / f"{name},seed={seed}", log_lines(seed, **settings))
    index = {"title": "A sweep", "command": "python -m tools.sweep config/sweeps/a.py"}
    index |= {"baseline": "dense", "runs": runs, "findings": list(findings)}
    (folder / "sweep.json").write_text(json.dumps(index))


def three_seeds():
    groups = {}
    for name, losses in LOSSES.items():
        seeds = zip((1, 2, 3), losses, strict=True)
        groups[name] = {seed: {"loss": loss, "use_moe": name == "moe"} for seed, loss in seeds}
    return groups


def claim(text, runs, metric="val_loss", expect="lower"):
    source = {"source": "A paper", "theirs": "so much"}
    return source | {"claim": text, "runs": runs, "metric": metric, "expect": expect}


def rows_in(page):
    """{first cell: other cells} of all of a page's tables."""
    rows = {}
    for line in page.splitlines():
        if line.startswith("|"):
            first, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            rows.setdefault(first, []).append(cells)
    return rows


def made(monkeypatch, capsys, *args, draw=True):
    """tools.report in this process: its page, rows_in() it, and stderr. draw: its pictures too."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["report", *map(str, args)])
        for name in ("folder", "out", "panels"):  # main() writes the flags into them
            patch.setattr(report, name, "")
        if not draw:
            patch.setattr(report, "draw_all", lambda *args: "")
        report.main()
    out, errors = capsys.readouterr()
    folder = next((arg[6:] for arg in map(str, args) if arg.startswith("--out=")), args[0])
    page = (report.Path(folder) / "report.md").read_text()
    assert "\n".join(out.splitlines()[:-2]) in page
    return page, rows_in(page), errors
