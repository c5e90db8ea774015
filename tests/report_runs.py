"""Folders of runs for the tests of tools/report.py: logs, sweep.json, and the report of them."""

import json
import math
import re

from tests.helpers import ROOT, run_module

E, LAYERS = 4, 2


def log_lines(
    seed=1,
    loss=1.5,
    steps=20,
    use_moe=True,
    vio=0.5,
    max_iters=20,
    ended=True,
    interval=5,
    rate=1000.0,
    **settings,
):
    """The lines of a log as train.py writes it.

    The loss ends at `loss`. The first layer's MaxVio is `vio`, the second's is 2 * vio.
    """
    settings = {
        "seed": seed,
        "max_iters": max_iters,
        "max_seconds": 0.0,
        "use_moe": use_moe,
        "num_experts": E,
        "init_from": "scratch",
        "out_dir": f"out/{seed}",
        "learning_rate": 1e-3,
    } | settings
    lines = [
        {
            "start": "2026-11-24 18:00:00",
            "first_step": 0,
            "launchers": [],
            "torch": "2.13.0",
            "params": 2_000_000,
            "active_params": 1_000_000,
            "flops_per_token": 6_000_000,
            "tokens_per_step": 2048,
            "settings": settings,
        }
    ]
    for step in range(1, steps + 1):
        entry = {"step": step, "seconds": step * 0.5, "lr": 1e-3, "loss": loss + 0.1 + 1 / step}
        if use_moe:
            loads = [
                [(1 + v) / E] + [(1 - (1 + v) / E) / (E - 1)] * (E - 1) for v in (vio, 2 * vio)
            ]
            entry |= {
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
                "expert_load": loads,
            }
        lines.append(entry | {"ms": 500.0, "tokens_per_s": rate, "mfu": None})
        if step % interval == 0:
            lines.append(
                {
                    "step": step,
                    "seconds": step * 0.5,
                    "val_loss": loss + (steps - step) / 10,
                    "val_bits_per_byte": 2,
                }
            )
    return lines + [{"end": "2026-11-24 19:00:00", "steps": steps}] * ended


def write(folder, lines, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def make(tmp_path, groups, findings=(), match=""):
    """Write runs and their sweep.json.

    groups: {name: {seed: settings for log_lines, or None for a run that has not started}}.
    """
    for name, seeds in groups.items():
        for seed, settings in seeds.items():
            if settings is not None:
                write(tmp_path / f"{name},seed={seed}", log_lines(seed, **settings))
    (tmp_path / "sweep.json").write_text(
        json.dumps(
            {
                "title": "A sweep",
                "command": "python -m tools.sweep config/sweeps/a.py",
                "baseline": "dense",
                "runs": {
                    name: {
                        "folders": [f"{name},seed={seed}" for seed in seeds],
                        "match": match and name + match,
                    }
                    for name, seeds in groups.items()
                },
                "findings": list(findings),
            }
        )
    )


def call(*args):
    return run_module("tools.report", *args)


def made(*args):
    """The report's page, {first cell: other cells} of all its tables, and stderr."""
    done = call(*args)
    assert done.returncode == 0, done.stderr
    path = ROOT / done.stdout.splitlines()[-1].removeprefix("wrote ")
    page = path.read_text()
    assert "\n".join(done.stdout.splitlines()[:-2]) in page
    rows = {}
    for line in page.splitlines():
        if line.startswith("|"):
            first, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            rows.setdefault(first, []).append(cells)
    return page, rows, done.stderr


def claim(text, runs, metric="val_loss", expect="lower"):
    return {
        "claim": text,
        "source": "A paper",
        "theirs": "so much",
        "runs": runs,
        "metric": metric,
        "expect": expect,
    }


LOSSES = {"dense": (2.10, 2.00, 2.06), "moe": (2.00, 1.93, 1.97)}


def three_seeds():
    return {
        name: {
            seed: {"loss": loss, "use_moe": name == "moe"}
            for seed, loss in zip((1, 2, 3), losses, strict=True)
        }
        for name, losses in LOSSES.items()
    }
