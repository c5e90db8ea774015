"""
What came out: tables and pictures of a folder of runs, from their log.jsonl alone; also while they are still going.

$ python -m tools.report out/sweeps/expert_count

Writes report.md and its PNGs into the folder, and prints the main table. Beside the runs, sweep.json (by tools/sweep) says
which are seeds of one another, which the others are compared with, and what is claimed of them. Without it, folders whose
names differ in seed=N alone are seeds, and the dense ones are compared with, if they are one group. Of a log, every
evaluation is read, and of its training lines at most 500, evenly spaced, the last one included.
  --out=FOLDER      write there instead
"""

import argparse
import json
import math
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configurator
from configurator import InputError
from tools.figures import pictures
from tools.run_logs import METRICS, last_of, read_runs

# 97.5% quantiles of Student's t for 1, 2, ... 30 degrees of freedom (NIST/SEMATECH e-Handbook, sec. 1.3.6.7.2), then 1.96
T = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
    2.086,
    2.080,
    2.074,
    2.069,
    2.064,
    2.060,
    2.056,
    2.052,
    2.048,
    2.045,
    2.042,
    1.960,
)
DIGITS = {"val_loss": 4, "seconds": 0, "tokens_per_s": 0}


def read_sweep(folder, runs):
    """sweep.json, or in its place what the names of the runs tell."""
    sweep, path = (
        {"title": folder.resolve().name, "command": "", "baseline": None, "findings": []},
        folder / "sweep.json",
    )
    if path.exists():
        try:
            sweep |= json.loads(path.read_text())
            if all(isinstance(group["folders"], list) for group in sweep["runs"].values()):
                return sweep
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        raise InputError(
            f"{path}: expected JSON as tools/sweep writes it, with runs: {{NAME: {{folders: [FOLDER, ...]}}}}"
        )
    groups = {}
    for name in runs:
        groups.setdefault(re.sub(r"[,_ -]*seed=\d+", "", name).strip(",_ -") or name, []).append(
            name
        )
    dense = [
        name
        for name, folders in groups.items()
        if not any(runs[f]["settings"].get("use_moe", True) for f in folders)
    ]
    order = sorted(
        groups,
        key=lambda name: (
            name not in dense,
            [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)],
        ),
    )  # 2 before 16
    return sweep | {
        "baseline": dense[0] if len(dense) == 1 else None,
        "runs": {name: {"folders": groups[name]} for name in order},
    }


def make_group(name, folders, runs, problems):
    """A row of the tables: its finished runs, or if there is none the furthest one, with how far it is (partial)."""
    readable = [runs[folder] for folder in folders if folder in runs and runs[folder]["start"]]
    usable = [run for run in readable if run["state"] in ("finished", "under way")]
    shown = [run for run in usable if run["state"] == "finished"] or sorted(
        usable, key=lambda run: max(run["evals"])
    )[-1:]
    free = {
        "seed",
        "out_dir",
        "init_from",
        "wandb_run_name",
    }  # what it is called, and how this start of it began
    differ = sorted(
        key
        for key in set().union(*(run["settings"] for run in readable)) - free
        if any(run["settings"].get(key) != readable[0]["settings"].get(key) for run in readable)
    )
    if (
        len({run["start"].get("dtype") for run in readable} - {None}) > 1
    ):  # logs of older versions do not tell
        differ.append("the precision that dtype 'auto' came to")
    if differ:
        problems.append(f"{name}: its runs differ in more than their seeds, in {', '.join(differ)}")
    if len({run["settings"]["seed"] for run in shown}) < len(shown):
        problems.append(f"{name}: has a seed twice, of which the last run is compared with others")
    routing = {"expert_load", "max_vio_mean", "router_entropy"}
    return {
        "name": name,
        "shown": shown,
        "moe": [run for run in shown if run["lines"] and routing <= run["lines"][0].keys()],
        "partial": shown[0]["progress"] if shown and shown[0]["state"] != "finished" else "",
    }


def values(group, metric):
    """{seed: value} of a row's runs."""
    found = {run["settings"]["seed"]: METRICS[metric](run) for run in group["shown"]}
    return {seed: value for seed, value in found.items() if value is not None}


def compare(a, b):
    """a - b, each {seed: value}, over the seeds that both have: the mean, half the width of its 95% interval by Student's t
    for paired differences (None for a single seed), and their number. None without a common seed."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    n = len(differences)
    half = (
        T[min(n - 1, len(T)) - 1] * statistics.stdev(differences) / math.sqrt(n) if n > 1 else None
    )
    return (statistics.mean(differences), half, n) if n else None


def judge(finding, groups):
    """A finding's two metrics, the two means, their comparison (None where there is none), and the verdict. Raises InputError
    for a finding that cannot be read."""
    names, metrics, expect = (finding.get(key) for key in ("runs", "metric", "expect"))
    metrics = [metrics] * 2 if isinstance(metrics, str) else metrics
    for what, found, known in (("run", names, groups), ("metric", metrics, METRICS)):
        if not isinstance(found, list) or len(found) != 2:
            raise InputError(f"expected two {what}s")
        for name in found:
            if name not in known:
                raise InputError(f"unknown {what} '{name}'")
    if expect not in ("lower", "higher"):
        raise InputError(f"expect is '{expect}', expected 'lower' or 'higher'")
    pair = [groups[name] for name in names]
    if any(group["partial"] or not group["shown"] for group in pair):
        return metrics, (None, None), None, "not run yet"
    a, b = (values(group, metric) for group, metric in zip(pair, metrics, strict=True))
    found = compare(a, b)
    if not found:
        verdict = "no seed in common" if a and b else "not logged"
    elif found[1] is None:
        verdict = "undecided: one seed"
    elif abs(found[0]) <= found[1]:
        verdict = "not seen: within the noise"
    else:
        verdict = "holds" if (found[0] < 0) == (expect == "lower") else "opposite"
    return metrics, [statistics.mean(x.values()) if x else None for x in (a, b)], found, verdict


def table(header, rows):
    """Markdown. Numbers are aligned right: all columns but the first and those whose header begins with a blank."""
    align = [":--" if i == 0 or name.startswith(" ") else "--:" for i, name in enumerate(header)]
    return "\n".join(
        "| " + " | ".join(str(cell).strip().replace("|", "\\|") for cell in row) + " |"
        for row in (header, align, *rows)
    )


def text(value, digits):
    return "" if value is None else f"{value:,.{digits}f}"


def difference(found, digits):
    """What compare() found, as text."""
    mean, half, n = found
    return f"{mean:+,.{digits}f}" + (f" ± {half:,.{digits}f}" if n > 1 else "") + f" (n = {n})"


def main_row(group, baseline):
    runs = group["shown"]
    if not runs:
        return [group["name"], 0, *[""] * 8]
    start, ends = runs[0]["start"], [last_of(run) for run in runs]
    tokens = statistics.mean(
        end["step"] * run["start"]["tokens_per_step"] for end, run in zip(ends, runs, strict=True)
    )
    losses = [end["val_loss"] for end in ends]
    loss = text(statistics.mean(losses), 4) + (
        f" ({statistics.stdev(losses):.4f})" if len(losses) > 1 else ""
    )
    against = ""
    if baseline and baseline["shown"] and not group["partial"] and not baseline["partial"]:
        found = compare(values(group, "val_loss"), values(baseline, "val_loss"))
        against = (
            "baseline"
            if group is baseline
            else difference(found, 4)
            if found
            else "no seed in common"
        )
    return [
        group["name"],
        len(runs),
        f"{start['params'] / 1e6:,.2f}M",
        f"{start['active_params'] / 1e6:,.2f}M",
        text(start["flops_per_token"] / 1e6, 2),
        f"{tokens / 1e6:,.2f}M",
        f"{tokens * start['flops_per_token']:.2e}",
        text(statistics.mean(end["seconds"] for end in ends), 0),
        loss + (f", {group['partial']}" if group["partial"] else ""),
        against,
    ]


def balance_part(moe):
    metrics = {
        "MaxVio": "max_vio",
        "of the worst layer": "max_vio_worst",
        "dead experts": "dead_experts",
        "router entropy / ln E": "entropy",
        "dropped": "dropped",
    }
    rows = [
        [
            group["name"],
            *(
                text(statistics.mean(x), 3) if (x := values(group, metric).values()) else ""
                for metric in metrics.values()
            ),
        ]
        for group in moe
    ]
    return (
        "## Balance\n\n"
        + table(["", *metrics], rows)
        + "\n\nMeans over layers, over the last fifth of training and over "
        "seeds; dead experts: without a token in a step, of all layers together; dropped: share of assignments."
    )


def findings_part(findings, groups, problems):
    rows, verdicts = [], []
    for finding in findings:
        try:
            metrics, means, found, verdict = judge(finding, groups)
        except InputError as error:
            problems.append(f"finding '{finding.get('claim')}': {error}")
            metrics, means, found, verdict = (
                [str(finding.get("metric"))],
                (None, None),
                None,
                f"unreadable: {error}",
            )
        digits = DIGITS.get(metrics[0], 3)
        verdicts.append(verdict.split(":")[0])
        rows.append(
            [
                finding.get("claim"),
                f"{finding.get('source')}: {finding.get('theirs')}",
                " against ".join(map(str, finding.get("runs") or ())),
                " against ".join(dict.fromkeys(metrics)),
                *(text(mean, digits) for mean in means),
                difference(found, digits) if found else "",
                f"**{verdict}**",
            ]
        )
    counts = [
        f"{verdicts.count(verdict)} {verdict}"
        for verdict in dict.fromkeys(verdicts)
        if verdict != "holds"
    ]
    return (
        "## Findings\n\n"
        + ", ".join([f"{verdicts.count('holds')} of {len(verdicts)} hold", *counts])
        + ".\n\n"
        + table(
            [
                "claim",
                " what others found",
                " ours",
                " metric",
                "first",
                "second",
                "difference",
                " verdict",
            ],
            rows,
        )
        + "\n\nDifference: the first minus the second, paired by seed, ± half of its 95% interval (Student's t); n seeds."
    )


def about(sweep, runs, folders):
    """What ran, and how far it is."""
    states = {"finished": []}
    for name in folders:
        run = runs.get(name, {"state": "not begun"})
        states.setdefault(run["state"], []).append(
            f"{name} ({run['progress']})" if run["state"] == "under way" else name
        )
    count = f"{len(states.pop('finished'))} of {len(folders)} runs are finished"
    others = [f"{state}: {', '.join(names)}" for state, names in states.items()]
    versions = sorted(
        {run["start"].get("torch", "unknown") for run in runs.values() if run["start"]}
    )
    return (
        f"# {sweep['title']}\n\n"
        + (f"- runs: `{sweep['command']}`\n" if sweep["command"] else "")
        + (
            f"- report: `python -m tools.report {shlex.join(sys.argv[1:])}`, {time.strftime('%Y-%m-%d %H:%M')}\n"
            f"- torch {', '.join(versions)}\n- {'; '.join([count, *others])}"
        )
    )


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tools.report",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
    )
    parser.add_argument("folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    own = parser.parse_args()
    out, runs = own.out or own.folder, read_runs(own.folder)
    sweep = read_sweep(own.folder, runs)
    folders = [folder for group in sweep["runs"].values() for folder in group["folders"]]
    problems = [f"{name}: {problem}" for name, run in runs.items() for problem in run["problems"]]
    problems += [f"{name}: not in sweep.json, left out" for name in runs if name not in folders]
    problems += [f"{name}: not begun" for name in folders if name not in runs]
    groups = {
        name: make_group(name, group["folders"], runs, problems)
        for name, group in sweep["runs"].items()
    }
    baseline = groups.get(sweep["baseline"])
    if sweep["baseline"] and not baseline:
        problems.append(f"sweep.json: its baseline '{sweep['baseline']}' is none of its runs")
    results = table(
        [
            "",
            "seeds",
            "parameters",
            "active",
            "MFLOPs/token",
            "tokens",
            "FLOPs",
            "seconds",
            "validation loss",
            f"difference to {baseline['name']}" if baseline else "difference",
        ],
        [main_row(group, baseline) for group in groups.values()],
    )
    parts = [
        about(sweep, runs, folders),
        results,
        "Validation loss: the last one, in nats per token, mean over seeds (standard deviation). Difference: paired by "
        "seed, ± half of its 95% interval (Student's t); n seeds. FLOPs: those of matrix products, forward and backward, "
        "in active parameters. Seconds: training alone.",
        "\n".join(
            f"- {name}: {group['match']}"
            for name, group in sweep["runs"].items()
            if group.get("match")
        ),
    ]
    moe = [group for group in groups.values() if group["moe"]]
    parts += [balance_part(moe)] if moe else []
    parts += [findings_part(sweep["findings"], groups, problems)] if sweep["findings"] else []
    out.mkdir(parents=True, exist_ok=True)
    parts.append(pictures(out, list(groups.values()), baseline))
    if problems:
        parts.append("## Notes\n\n" + "\n".join(f"- {problem}" for problem in problems))
        print("\n".join(problems), file=sys.stderr)
    (out / "report.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    print(f"{results}\n\nwrote {out / 'report.md'}")


if __name__ == "__main__":
    configurator.run_main(main)
