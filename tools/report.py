"""
Report on a folder of runs: tables and figures from their log.jsonl, also while they are running.

$ python -m tools.report out/sweeps/expert_count

Writes report.md and its figures into the folder and prints the main table. sweep.json, which
tools.sweep wrote there, says which runs are seeds of one another, which is the baseline, and which
findings to judge. Without it, runs whose names differ only in seed=N are seeds of one another, and
the dense runs are the baseline.
"""

import json
import math
import re
import shlex
import statistics
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from configurator import InputError, configure
from nanomoe.errors import run_main
from tools.figures import draw_all
from tools.run_logs import METRICS, last_eval, read_runs

# -----------------------------------------------------------------------------
# settings
folder = ""  # the folder of runs; can be given without --folder=
out = ""  # write the report to this folder instead
# -----------------------------------------------------------------------------

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom, and of the normal distribution
# (NIST/SEMATECH e-Handbook, sec. 1.3.6.7.2)
T = """
12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 2.120
2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042 1.960
"""
T = [float(word) for word in T.split()]
DIGITS = {"val_loss": 4, "seconds": 0, "tokens_per_s": 0}
BALANCE = {  # heading: metric
    "MaxVio": "max_vio",
    "MaxVio of the worst layer": "max_vio_worst",
    "dead experts": "dead_experts",
    "router entropy / ln E": "entropy",
    "dropped": "dropped",
}
RESULTS_NOTE = """Validation loss: the last one, in nats per token, mean over seeds (standard
deviation). Difference: paired by seed, ± half of its 95% interval (Student's t); n seeds. FLOPs:
matrix products of the active parameters, forward and backward. Seconds: training alone."""
BALANCE_NOTE = """Means over layers, seeds and the last fifth of training. Dead experts: without a
token in a step, summed over layers. Dropped: share of the assignments."""
FINDINGS_NOTE = "Difference: the first minus the second, paired by seed, as above."


@dataclass
class Group:
    """Runs that differ in their seed only: a row of the tables."""

    name: str
    shown: list  # the finished runs; if there are none, the run that is furthest
    moe: list  # those of them that log their routing
    partial: str  # how far the run is that is shown unfinished, else ""

    def values(self, metric):
        """{seed: value}, without the runs that do not log it."""
        found = {run["settings"]["seed"]: METRICS[metric](run) for run in self.shown}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, metric):
        values = self.values(metric).values()
        return f"{statistics.mean(values):,.{DIGITS.get(metric, 3)}f}" if values else ""


def read_sweep(path, runs):
    """sweep.json, or in its place what the names of the runs tell."""
    sweep = {"title": path.resolve().parent.name, "command": "", "baseline": "", "findings": []}
    if path.exists():
        try:
            sweep |= json.loads(path.read_text())
            if all(isinstance(group["folders"], list) for group in sweep["runs"].values()):
                return sweep
        except (ValueError, TypeError, KeyError, AttributeError):
            pass
        expected = "{NAME: {folders: [FOLDER, ...]}}"
        raise InputError(f"{path}: expected JSON as tools.sweep writes it, with runs: {expected}")
    groups, dense = {}, set()
    for name, run in runs.items():
        group = re.sub(r"[,_ -]*seed=\d+", "", name).strip(",_ -") or name
        groups.setdefault(group, {"folders": []})["folders"].append(name)
        if not run["settings"].get("use_moe", True):
            dense.add(group)
    return sweep | {"runs": groups, "baseline": dense.pop() if len(dense) == 1 else ""}


def make_group(name, folders, runs, problems):
    readable = [runs[folder] for folder in folders if folder in runs and runs[folder]["start"]]
    shown = [run for run in readable if run["state"] == "finished"]
    partial = ""
    under_way = [run for run in readable if run["state"] == "under way"]
    if under_way and not shown:
        shown = [max(under_way, key=lambda run: max(run["evals"]))]
        partial = shown[0]["progress"]
    found = defaultdict(set)  # {setting: its values}
    for run in readable:
        # the log says what dtype 'auto' came to
        settings = run["settings"] | {"dtype": run["start"].get("dtype")}
        for key, value in settings.items():
            found[key].add(str(value))
    own = ("seed", "out_dir", "init_from", "wandb_run_name")  # may differ
    differ = sorted(key for key in found if len(found[key]) > 1 and key not in own)
    if differ:
        problems.append(f"{name}: its runs differ not only in their seeds: {', '.join(differ)}")
    if len({run["settings"]["seed"] for run in shown}) < len(shown):
        problems.append(f"{name}: two runs have the same seed; the last one is compared")
    routing = {"expert_load", "max_vio_mean", "router_entropy"}
    moe = [run for run in shown if any(routing <= line.keys() for line in run["lines"])]
    return Group(name, shown, moe, partial)


def compare(a, b):
    """a - b, each {seed: value}, paired by seed: (mean, half of its 95% interval by Student's t,
    number of seeds). The interval is None for one seed; the result is None without common seeds."""
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    n = len(differences)
    if n < 2:
        return (differences[0], None, 1) if n else None
    half = T[min(n - 1, len(T)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences), half, n


def difference(found, digits):
    """The result of compare() as text."""
    mean, half, n = found
    interval = f" ± {half:,.{digits}f}" if n > 1 else ""
    return f"{mean:+,.{digits}f}{interval} (n = {n})"


def table(header, rows):
    """A Markdown table. The first column and those whose heading begins with a blank are texts."""
    align = [":--" if name.startswith(" ") else "--:" for name in header[1:]]
    lines = []
    for row in (header, [":--", *align], *rows):
        cells = [str(cell).strip().replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main_row(group, baseline):
    runs = group.shown
    if not runs:
        return [group.name, 0, *[""] * 8]
    start, evals = runs[0]["start"], [last_eval(run) for run in runs]
    tokens = statistics.mean(entry["step"] for entry in evals) * start["tokens_per_step"]
    loss = group.mean("val_loss")
    if len(runs) > 1:
        loss += f" ({statistics.stdev(entry['val_loss'] for entry in evals):.4f})"
    if group.partial:
        loss += f", {group.partial}"
    compared = ""
    if group is baseline:
        compared = "baseline"
    elif baseline and baseline.shown and not group.partial and not baseline.partial:
        found = compare(group.values("val_loss"), baseline.values("val_loss"))
        compared = difference(found, 4) if found else "no seed in common"
    sizes = [f"{start[key] / 1e6:,.2f}M" for key in ("params", "active_params")]
    flops = start["flops_per_token"]
    costs = [f"{flops / 1e6:,.2f}", f"{tokens / 1e6:,.2f}M", f"{tokens * flops:.2e}"]
    return [group.name, len(runs), *sizes, *costs, group.mean("seconds"), loss, compared]


def judge(finding, groups):
    """(both means, difference, verdict) of a finding, as texts. InputError: it cannot be read."""
    names, metrics, expect = (finding.get(key) for key in ("runs", "metric", "expect"))
    if isinstance(metrics, str):
        metrics = [metrics, metrics]
    for what, found, known in (("run", names, groups), ("metric", metrics, METRICS)):
        if not isinstance(found, list) or len(found) != 2:
            raise InputError(f"expected two {what}s")
        if unknown := [name for name in found if name not in known]:
            raise InputError(f"unknown {what} '{unknown[0]}'")
    if expect not in ("lower", "higher"):
        raise InputError(f"expect is '{expect}', expected 'lower' or 'higher'")
    pair = [groups[name] for name in names]
    if any(group.partial or not group.shown for group in pair):
        return ["", ""], "", "not run yet"
    means = [group.mean(metric) for group, metric in zip(pair, metrics, strict=True)]
    found = compare(pair[0].values(metrics[0]), pair[1].values(metrics[1]))
    if not found:
        return means, "", "no seed in common" if all(means) else "not logged"
    mean, half, _ = found
    if half is None:
        verdict = "undecided: one seed"
    elif abs(mean) <= half:
        verdict = "not seen: within the noise"
    else:
        verdict = "holds" if (mean < 0) == (expect == "lower") else "opposite"
    return means, difference(found, DIGITS.get(metrics[0], 3)), verdict


def findings_part(findings, groups, problems):
    rows, counts = [], Counter(holds=0)
    for finding in findings:
        try:
            means, found, verdict = judge(finding, groups)
        except InputError as error:
            problems.append(f"finding '{finding.get('claim')}': {error}")
            means, found, verdict = ["", ""], "", f"unreadable: {error}"
        counts[verdict.split(":")[0]] += 1
        source = f"{finding.get('source')}: {finding.get('theirs')}"
        ours = against(finding.get("runs") or [])
        row = [finding.get("claim"), source, ours, against(finding.get("metric")), *means]
        rows.append([*row, found, f"**{verdict}**"])
    summary = [f"{counts.pop('holds')} of {len(rows)} hold"]
    summary += [f"{count} {verdict}" for verdict, count in counts.items()]
    header = ["claim", " what others found", " ours", " metric", "first", "second", "difference"]
    parts = ["## Findings", ", ".join(summary) + ".", table([*header, " verdict"], rows)]
    return "\n\n".join([*parts, FINDINGS_NOTE])


def against(names):
    return " against ".join(map(str, names)) if isinstance(names, list) else names


def head(sweep, runs, folders):
    """The title, how the report was made, and how far the runs are."""
    states = defaultdict(list)
    for name in folders:
        state = runs[name]["state"] if name in runs else "not begun"
        entry = f"{name} ({runs[name]['progress']})" if state == "under way" else name
        states[state].append(entry)
    parts = [f"{len(states.pop('finished', []))} of {len(folders)} runs are finished"]
    parts += [f"{state}: {', '.join(names)}" for state, names in states.items()]
    versions = sorted({run["start"].get("torch", "?") for run in runs.values() if run["start"]})
    command = f"- runs: `{sweep['command']}`\n" if sweep["command"] else ""
    made = f"`python -m tools.report {shlex.join(sys.argv[1:])}`, {time.strftime('%Y-%m-%d %H:%M')}"
    about = f"{command}- report: {made}\n- torch {', '.join(versions)}\n- {'; '.join(parts)}"
    return f"# {sweep['title']}\n\n{about}"


def main():
    configure(globals(), positional=("folder",))
    if not folder:
        raise InputError("expected a folder of runs, like out/sweeps/expert_count")
    runs = read_runs(Path(folder))
    sweep = read_sweep(Path(folder) / "sweep.json", runs)
    folders = [name for group in sweep["runs"].values() for name in group["folders"]]
    problems = [f"{name}: {problem}" for name, run in runs.items() for problem in run["problems"]]
    unlisted = [name for name in runs if name not in folders]
    problems += [f"{name}: left out, it is not in sweep.json" for name in unlisted]
    problems += [f"{name}: not begun" for name in folders if name not in runs]
    groups = {}
    for name, group in sweep["runs"].items():
        groups[name] = make_group(name, group["folders"], runs, problems)
    baseline = groups.get(sweep["baseline"])
    if sweep["baseline"] and not baseline:
        problems.append(f"sweep.json: its baseline '{sweep['baseline']}' is not one of its runs")
    header = ["", "seeds", "parameters", "active", "MFLOPs/token", "tokens", "FLOPs", "seconds"]
    header += ["validation loss", f"difference to {baseline.name}" if baseline else "difference"]
    results = table(header, [main_row(group, baseline) for group in groups.values()])
    matches = [f"- {name}: {g['match']}" for name, g in sweep["runs"].items() if g.get("match")]
    parts = [head(sweep, runs, folders), results, RESULTS_NOTE, "\n".join(matches)]
    if moe := [group for group in groups.values() if group.moe]:
        rows = [[group.name, *map(group.mean, BALANCE.values())] for group in moe]
        parts += [f"## Balance\n\n{table(['', *BALANCE], rows)}", BALANCE_NOTE]
    if sweep["findings"]:
        parts.append(findings_part(sweep["findings"], groups, problems))
    to = Path(out or folder)
    to.mkdir(parents=True, exist_ok=True)
    parts.append(draw_all(to, list(groups.values()), baseline))
    if problems:
        parts.append("## Notes\n\n" + "\n".join(f"- {problem}" for problem in problems))
        print("\n".join(problems), file=sys.stderr)
    (to / "report.md").write_text(
        "\n\n".join(part for part in parts if part) + "\n", encoding="utf-8"
    )
    print(f"{results}\n\nwrote {to / 'report.md'}")


if __name__ == "__main__":
    run_main(main)
