"""
Report on a folder of runs: tables and figures from their log.jsonl, also while they are running.

$ python -m tools.report out/sweeps/expert_count
$ python -m tools.report out/sweeps/dense_vs_moe --panels="tokens: dense | 8 experts top-2 as MoE"
$ python -m tools.report assets/findings/report.md    # draw its differences again

Writes report.md and its figures into the folder and prints the main table. sweep.json, which
tools.sweep wrote there, says which runs are seeds of one another, which is the baseline, and which
findings to judge. Without it, runs whose names differ only in seed=N are seeds of one another, and
the dense runs are the baseline.
"""

import contextlib
import itertools
import json
import math
import re
import shlex
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

from configurator import InputError, configure
from nanomoe.errors import run_main
from tools import figures
from tools.run_logs import read_runs

# -----------------------------------------------------------------------------
# settings
folder = ""  # the folder of runs; can be given without --folder=
out = ""  # write the report to this folder instead
panels = ""  # what loss.png shows: "AXIS: RUN | RUN as NAME; AXIS: ..."; tokens, FLOPs or seconds
# -----------------------------------------------------------------------------

# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom, and of the normal distribution
# (NIST/SEMATECH e-Handbook, sec. 1.3.6.7.2)
T = """
12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 2.120
2.110 2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045 2.042 1.960
"""
T = [float(word) for word in T.split()]
ROUTING = {"expert_load", "max_vio_mean", "router_entropy"}
MAY_DIFFER = ("seed", "out_dir", "init_from", "wandb_run_name")
DIGITS = {"val_loss": 4, "seconds": 0, "tokens_per_s": 0}
HEADER = ["", "seeds", "parameters", "active", "MFLOPs/token", "tokens", "FLOPs", "seconds"]
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


class Row:
    """Runs of sweep.json that differ in their seed only: a row of the tables.

    runs: the finished ones; if there are none, the one that is furthest. partial: how far that one
    is, else "". differ: other settings in which they differ."""

    def __init__(self, name, folders, logged):
        self.name, self.partial = name, ""
        started = [logged[f] for f in folders if f in logged and logged[f].start]
        self.runs = [run for run in started if run.state == "finished"]
        under_way = [run for run in started if run.state == "under way"]
        if under_way and not self.runs:
            self.runs = [max(under_way, key=lambda run: max(run.evals))]
            self.partial = self.runs[0].progress
        values = {(key, str(value)) for run in started for key, value in run.settings.items()}
        count = Counter(key for key, _ in values)
        self.differ = sorted(key for key in count if count[key] > 1 and key not in MAY_DIFFER)

    @property
    def moe(self):
        """The runs that log their routing."""
        return [run for run in self.runs if any(line.keys() >= ROUTING for line in run.lines)]

    def values(self, metric):
        """{seed: value}, without the runs that do not log it."""
        found = {run.settings["seed"]: run.metric(metric) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def mean(self, metric):
        values = self.values(metric).values()
        return f"{statistics.mean(values):,.{DIGITS.get(metric, 3)}f}" if values else ""


def read_sweep(path, runs):
    """sweep.json, or in its place what the names of the runs tell."""
    sweep = {"title": path.resolve().parent.name, "command": "", "baseline": "", "findings": []}
    if path.exists():
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            sweep |= json.loads(path.read_text())
            if all(isinstance(group["folders"], list) for group in sweep["runs"].values()):
                return sweep
        raise InputError(f"{path}: expected JSON as tools.sweep writes it")
    groups, dense = {}, set()
    for name, run in runs.items():
        group = re.sub(r"[,_ -]*seed=\d+", "", name).strip(",_ -") or name
        groups.setdefault(group, {"folders": []})["folders"].append(name)
        if not run.settings.get("use_moe", True):
            dense.add(group)
    return sweep | {"runs": groups, "baseline": dense.pop() if len(dense) == 1 else ""}


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


def cells_of(row, baseline):
    """The cells of a Row in the main table."""
    if not row.runs:
        return [row.name, 0, *[""] * 8]
    start, losses = row.runs[0].start, [run.last_eval["val_loss"] for run in row.runs]
    steps = statistics.mean(run.last_eval["step"] for run in row.runs)
    tokens, flops = steps * start["tokens_per_step"], start["flops_per_token"]
    loss = row.mean("val_loss")
    if len(losses) > 1:
        loss += f" ({statistics.stdev(losses):.4f})"
    if row.partial:
        loss += f", {row.partial}"
    compared = ""
    if row is baseline:
        compared = "baseline"
    elif baseline and baseline.runs and not row.partial and not baseline.partial:
        found = compare(row.values("val_loss"), baseline.values("val_loss"))
        compared = difference(found, 4) if found else "no seed in common"
    sizes = [f"{start[key] / 1e6:,.2f}M" for key in ("params", "active_params")]
    costs = [f"{flops / 1e6:,.2f}", f"{tokens / 1e6:,.2f}M", f"{tokens * flops:.2e}"]
    return [row.name, len(losses), *sizes, *costs, row.mean("seconds"), loss, compared]


def judge(finding, rows):
    """(first mean, second mean, difference, verdict) of a finding, as texts. Raises KeyError,
    TypeError or ValueError if it cannot be read."""
    pair, metrics = [rows[name] for name in finding["runs"]], finding["metric"]
    if isinstance(metrics, str):
        metrics = [metrics, metrics]
    expected_sign = {"lower": -1, "higher": 1}[finding["expect"]]
    first, second = (row.values(metric) for row, metric in zip(pair, metrics, strict=True))
    if any(row.partial or not row.runs for row in pair):
        return "", "", "", "not run yet"
    means = [row.mean(metric) for row, metric in zip(pair, metrics, strict=True)]
    found = compare(first, second)
    if not found:
        return *means, "", "no seed in common" if all(means) else "not logged"
    mean, half, _ = found
    verdict = "holds" if mean * expected_sign > 0 else "opposite"
    if half is None:
        verdict = "undecided with one seed"
    elif abs(mean) <= half:
        verdict = "within the noise"
    return *means, difference(found, DIGITS.get(metrics[0], 3)), verdict


def findings_part(findings, rows, problems):
    lines, counts = [], Counter(holds=0)
    for finding in findings:
        try:
            *cells, verdict = judge(finding, rows)
        except (KeyError, TypeError, ValueError) as error:
            *cells, verdict = "", "", "", "unreadable"
            expected = "two runs, known metrics, and expect 'lower' or 'higher'"
            problems.append(f"finding '{finding.get('claim')}': expected {expected}: {error}")
        counts[verdict] += 1
        texts = [finding.get("claim"), f"{finding.get('source')}: {finding.get('theirs')}"]
        for names in (finding.get("runs"), finding.get("metric")):
            texts.append(" against ".join(names) if isinstance(names, list) else names or "")
        lines.append([*texts, *cells, f"**{verdict}**"])
    summary = [f"{counts.pop('holds')} of {len(lines)} hold"]
    summary += [f"{count} {verdict}" for verdict, count in counts.items()]
    header = ["claim", " what others found", " ours", " metric", "first", "second", "difference"]
    parts = ["## Findings", ", ".join(summary) + ".", table([*header, " verdict"], lines)]
    return "\n\n".join([*parts, FINDINGS_NOTE])


def head(sweep, runs, folders):
    """The title, how the report was made, and how far the runs are."""
    states = Counter(runs[name].state if name in runs else "not begun" for name in folders)
    parts = [f"{states.pop('finished', 0)} of {len(folders)} runs are finished"]
    parts += [f"{count} {state}" for state, count in states.items()]
    versions = sorted({run.start.get("torch", "?") for run in runs.values() if run.start})
    made = f"`python -m tools.report {shlex.join(sys.argv[1:])}`, {time.strftime('%Y-%m-%d %H:%M')}"
    lines = [f"runs: `{sweep['command']}`"] if sweep["command"] else []
    lines += [f"report: {made}", f"torch {', '.join(versions)}", ", ".join(parts)]
    return f"# {sweep['title']}\n\n{bullets(lines)}"


def bullets(lines):
    return "\n".join(f"- {line}" for line in lines)


def problems_of(rows, runs, folders):
    found = [f"{name}: not begun" for name in folders if name not in runs]
    for name, run in runs.items():
        if run.unreadable:
            count, first = len(run.unreadable), run.unreadable[0]
            found.append(f"{name}: {count} unreadable lines left out, the first is line {first}")
        if name not in folders:
            found.append(f"{name}: left out, it is not in sweep.json")
        elif run.state != "finished":
            found.append(f"{name}: {run.state}, {run.progress}")
    for row in rows:
        if row.differ:
            differ = ", ".join(row.differ)
            found.append(f"{row.name}: its runs differ not only in their seeds: {differ}")
    return found


def read_panels(text, curves):
    """--panels as {axis: {name: runs}}. curves: {run: its runs with each seed}."""
    found = {}
    for panel in text.split(";"):
        axis, _, names = (part.strip() for part in panel.partition(":"))
        for part in names.split("|"):
            run, _, name = part.strip().partition(" as ")
            if axis not in figures.AXES or run not in curves:
                raise InputError(
                    f"panels has '{axis}: {run}', expected one of {', '.join(figures.AXES)} and "
                    f"one of the runs: {', '.join(curves)}"
                )
            found.setdefault(axis, {})[name or run] = curves[run]
    return found


def draw_all(to, rows, baseline, results):
    """Draw what there is to draw. Returns Markdown that shows it."""
    curves = {row.name: row.runs for row in rows if row.runs}
    moe = {row.name: row.moe for row in rows if row.moe}
    shown = read_panels(panels, curves) if panels else dict.fromkeys(figures.AXES, curves)
    styles = figures.styles_of([*itertools.chain(*shown.values()), *moe], baseline)
    captions = draw_differences(to, results)
    if curves and (panels or len(curves) <= figures.MOST_LINES):
        figures.draw_loss(to / "loss.png", shown, styles)
        captions["loss.png"] = "Validation loss, means over seeds; bands: lowest to highest seed"
    if 0 < len(moe) <= figures.MOST_LINES:
        figures.draw_balance(to / "balance.png", moe, styles)
        captions["balance.png"] = (
            "How even the routing is, means over layers and seeds. MaxVio: the busiest expert's "
            "load over the mean load, minus 1. Entropy: 1 is a router without a preference"
        )
    for name, runs in moe.items():
        file = f"load-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.png"
        if file in captions:
            file = f"load-{len(captions)}.png"
        figures.draw_load(to / file, runs[0])
        captions[file] = (
            f"{name}, seed {runs[0].settings['seed']}: load of each expert over the mean load. "
            "Grey is even, red overloaded, blue underused or dead"
        )
    return "\n\n".join(f"![{words}]({file})\n\n{words}." for file, words in captions.items())


def draw_differences(to, page):
    """Draw the last column of a page's main table. Returns {file: caption}, if it has numbers."""
    table, found = page[page.find("| seeds |") :].partition("\n\n")[0], {}
    row = r"^\| (.+?) \| \d.* \| (\S+)(?: ± (\S+))? \(n = \d+\) \|$"
    for name, *texts in re.findall(row, table, re.M):
        numbers = [float(text.replace(",", "")) if text else None for text in texts]
        found[name.replace("\\|", "|")] = numbers
    if not found:
        return {}
    baseline = re.search(r"difference to (.*?) \|\n", table)[1]
    figures.draw_differences(to / "differences.png", found, baseline)
    words = f"Last validation loss against that of '{baseline}', with the 95% interval"
    return {"differences.png": f"{words}, in colour where it does not hold 0"}


def main():
    configure(globals(), positional=("folder",))
    if not folder:
        raise InputError("expected a folder of runs, like out/sweeps/expert_count")
    path, to = Path(folder), Path(out or folder)
    if path.is_file():  # a report: of its runs there may be nothing else left
        print(*draw_differences(Path(out or path.parent), path.read_text(encoding="utf-8")))
        return
    runs = read_runs(path)
    sweep = read_sweep(path / "sweep.json", runs)
    rows = {name: Row(name, group["folders"], runs) for name, group in sweep["runs"].items()}
    folders = [name for group in sweep["runs"].values() for name in group["folders"]]
    problems = problems_of(rows.values(), runs, folders)
    baseline = rows.get(sweep["baseline"])
    if sweep["baseline"] and not baseline:
        problems.append(f"sweep.json: its baseline '{sweep['baseline']}' is not one of its runs")
    compared = f"difference to {baseline.name}" if baseline else "difference"
    cells = [cells_of(row, baseline) for row in rows.values()]
    results = table([*HEADER, "validation loss", compared], cells)
    matches = [f"{name}: {g['match']}" for name, g in sweep["runs"].items() if g.get("match")]
    parts = [head(sweep, runs, folders), results, RESULTS_NOTE, bullets(matches)]
    if moe := [row for row in rows.values() if row.moe]:
        cells = [[row.name, *map(row.mean, BALANCE.values())] for row in moe]
        parts += [f"## Balance\n\n{table(['', *BALANCE], cells)}", BALANCE_NOTE]
    if sweep["findings"]:
        parts.append(findings_part(sweep["findings"], rows, problems))
    to.mkdir(parents=True, exist_ok=True)
    parts.append(draw_all(to, rows.values(), sweep["baseline"], results))
    if problems:
        parts.append(f"## Notes\n\n{bullets(problems)}")
        print("\n".join(problems), file=sys.stderr)
    page = "\n\n".join(part for part in parts if part) + "\n"
    (to / "report.md").write_text(page, encoding="utf-8")
    print(f"{results}\n\nwrote {to / 'report.md'}")


if __name__ == "__main__":
    run_main(main)
