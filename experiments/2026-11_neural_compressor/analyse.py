"""Tables, figure and compact records from what compare.py measured: results.csv, steps.csv, table.md, figure.png."""

import csv
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy import stats

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE, RAW = Path(__file__).parent, Path(sys.argv[1])
THEIRS, OURS, TORCH, CUBIC, PLAIN = "neural_compressor", "tritprune", "tritprune_torch", "tritprune_cubic", "plain"
LABELS = {
    PLAIN: "no pruning",
    THEIRS: "Neural Compressor 2.6",
    OURS: "tritprune, same config",
    CUBIC: "tritprune, schedule: cubic",
    TORCH: "tritprune without numba",
}
COLOURS = {PLAIN: "#7F7F7F", THEIRS: "#D55E00", OURS: "#0072B2", CUBIC: "#56B4E9", TORCH: "#009E73"}
SYSTEMS = (PLAIN, THEIRS, OURS, TORCH)
WORK = ("a step while pruning", "a mask update", "a step after the last update")


def read(mode: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RAW / f"{mode}.jsonl").read_text().splitlines()]


def interval(values: list[float]) -> str:
    """Mean, and the half-width of the 95% t-interval where there are three values or more."""
    if len(values) < 3:
        return f"{np.mean(values):.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"


def work_of(record: dict[str, Any], system: str) -> dict[str, list[float]]:
    """CPU milliseconds in a system's own functions; the first update (it compiles or loads) is left out."""
    due = range(record["frequency"], record["end"] + 1, record["frequency"])
    shift = system == THEIRS  # their masks change in the forward pass of the next step
    found: dict[str, list[float]] = {kind: [] for kind in WORK}
    for row in record["rows"]:
        if row["system"] != system or row["step"] <= record["frequency"] + 1:
            continue
        if row["step"] - shift in due:
            found[WORK[1]].append(row["begin"] if shift else row["after"])
        elif row["step"] <= record["end"]:
            found[WORK[0]].append(row["begin"] + row["before"] + row["after"])
        elif row["step"] > record["end"] + 1:
            found[WORK[2]].append(row["begin"] + row["before"] + row["after"])
    return found


def spread(values: list[float]) -> str:
    low, middle, high = np.percentile(values, (10, 50, 90))
    digits = 1 if middle >= 10 else 2
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def accuracy_table(records: list[dict[str, Any]]) -> list[str]:
    groups = defaultdict(list)
    for record in records:
        groups[record["task"], record["pattern"], record["system"]].append(record)
    lines = ["| task, pattern | system | accuracy, mean ± 95% | each seed | zeros | mask elements unlike |"]
    lines.append("|---|---|---|---|---|---|")
    for (task, pattern, system), found in groups.items():
        each = ", ".join(f"{record['accuracy']:.4f}" for record in found)
        zeros = ", ".join(str(n) for n in sorted({record["zeros"] for record in found}))
        unlike = ", ".join(str(record["mask_elements_that_differ"]) for record in found) if system == OURS else ""
        of = f"{zeros} of {found[0]['elements']}" if system != PLAIN else ""
        mean = interval([record["accuracy"] for record in found])
        lines.append(f"| {task}, {pattern} | {LABELS[system]} | {mean} | {each} | {of} | {unlike} |")
    return lines


def time_table(records: list[dict[str, Any]]) -> list[str]:
    lines = ["| task, pattern | CPU milliseconds | Neural Compressor | tritprune | theirs / ours | without numba |"]
    lines.append("|---|---|---|---|---|---|")
    for record in records:
        name = f"{record['task']}, {record['pattern']}"
        work = {system: work_of(record, system) for system in (THEIRS, OURS, TORCH)}
        for kind in WORK:
            theirs, ours, plain_torch = (work[system][kind] for system in (THEIRS, OURS, TORCH))
            ratio = statistics.median(theirs) / statistics.median(ours)
            cells = (name, f"pruner's work, {kind}", spread(theirs), spread(ours), f"{ratio:.1f}", spread(plain_torch))
            lines.append(f"| {' | '.join(cells)} |")
        for clock, kind in (("cpu_ms", "CPU"), ("wall_ms", "wall")):
            steps: dict[int, dict[str, float]] = defaultdict(dict)
            for row in record["rows"]:
                if record["frequency"] + 1 < row["step"] <= record["end"] + 1:
                    steps[row["step"]][row["system"]] = row[clock]
            quiet = [row for step, row in steps.items() if step % record["frequency"] > 1]
            over = [spread([row[system] / row[PLAIN] for row in quiet]) for system in (THEIRS, OURS, TORCH)]
            pairs = statistics.median(row[THEIRS] / row[OURS] for row in quiet)
            plain = spread([row[PLAIN] for row in quiet])
            cells = (name, f"{kind}, step without update / plain step of {plain}", *over[:2], f"{pairs:.2f}", over[2])
            lines.append(f"| {' | '.join(cells)} |")
            total = {system: sum(row[system] for row in steps.values()) for system in SYSTEMS}
            over = [f"{total[system] / total[PLAIN]:.2f}" for system in (THEIRS, OURS, TORCH)]
            what = f"{kind}, all steps while pruning, a mask update every {record['frequency']} / plain steps"
            cells = (name, what, *over[:2], f"{total[THEIRS] / total[OURS]:.2f}", over[2])
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_table(records: list[dict[str, Any]]) -> list[str]:
    groups = peaks(records)
    lines = ["| pydocs | system | peak resident MB | over the plain loop |", "|---|---|---|---|"]
    lines.append(f"| | {LABELS[PLAIN]} | {groups['', PLAIN]:.0f} | |")
    for (pattern, system), peak in groups.items():
        if system != PLAIN:
            lines.append(f"| {pattern} | {LABELS[system]} | {peak:.0f} | {peak - groups['', PLAIN]:+.0f} |")
    return lines


def peaks(records: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """Mean peak of the processes of a pattern and system; the plain loop has no pattern."""
    groups = defaultdict(list)
    for record in records:
        groups["" if record["system"] == PLAIN else record["pattern"], record["system"]].append(record["peak_mb"])
    return {key: float(np.mean(found)) for key, found in groups.items()}


def update_table(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| task, pattern | after step | zeros, theirs | zeros, ours | mask elements unlike |",
        "|---|---|---|---|---|",
    ]
    for r in records:
        values = (f"{r['task']}, {r['pattern']}", r["after_step"], r["zeros_theirs"], r["zeros_ours"], r["unlike"])
        lines.append(f"| {' | '.join(map(str, values))} |")
    return lines


def draw(accuracy: list[dict[str, Any]], timed: list[dict[str, Any]], memory: list[dict[str, Any]]) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.3), width_ratios=(1.25, 1.4, 0.9))
    cells = list(dict.fromkeys((record["task"], record["pattern"]) for record in accuracy))
    for place, cell in enumerate(cells):
        for slot, system in enumerate((PLAIN, THEIRS, OURS, CUBIC)):
            found = [r["accuracy"] for r in accuracy if (r["task"], r["pattern"]) == cell and r["system"] == system]
            x = place + 0.2 * (slot - 1.5)
            left.scatter([x] * len(found), found, s=26, color=COLOURS[system], zorder=3)
            if found:
                left.plot([x - 0.07, x + 0.07], [np.mean(found)] * 2, color=COLOURS[system], linewidth=2)
    left.set_xticks(range(len(cells)), [f"{task}\n{pattern}" for task, pattern in cells])
    left.set_title("Held-out accuracy: points are seeds, lines means", loc="left", fontsize=10)

    shown = [record for record in timed if record["task"] == "pydocs"]
    for place, (record, kind) in enumerate((record, kind) for kind in WORK for record in shown):
        for slot, system in enumerate((THEIRS, OURS, TORCH)):
            low, mid, high = np.percentile(work_of(record, system)[kind], (10, 50, 90))
            x = place + 0.26 * (slot - 1)
            middle.bar(x, mid, 0.24, color=COLOURS[system])
            middle.errorbar(x, mid, [[mid - low], [high - mid]], color="black", linewidth=1)
            text = f"{mid:,.0f}" if mid >= 10 else f"{mid:.1f}"
            middle.annotate(text, (x, high), ha="center", va="bottom", fontsize=7)
    middle.set_xticks(range(len(WORK) * len(shown)), [record["pattern"] for _ in WORK for record in shown])
    for place, kind in enumerate(WORK):
        centre = len(shown) * (place + 0.5) - 0.5
        middle.annotate(
            kind.replace(" after", "\nafter").replace(" while", "\nwhile"),
            (centre, 0), xycoords=("data", "axes fraction"), xytext=(0, -22), textcoords="offset points",
            ha="center", va="top", fontsize=9,
        )  # fmt: skip
    middle.set_yscale("log")
    middle.set_title("pydocs: CPU ms in the pruner, median, p10 to p90 (log)", loc="left", fontsize=10)

    peak, patterns = peaks(memory), ("4x1", "2:4")
    for place, pattern in enumerate(patterns):
        shown_here = [system for system in (THEIRS, OURS, TORCH) if (pattern, system) in peak]
        for slot, system in enumerate(shown_here):
            more, x = peak[pattern, system] - peak["", PLAIN], place + 0.26 * (slot - (len(shown_here) - 1) / 2)
            right.bar(x, more, 0.24, color=COLOURS[system])
            right.annotate(f"{more:.0f}", (x, more), ha="center", va="bottom", fontsize=8)
    right.set_xticks(range(len(patterns)), patterns)
    right.set_title("pydocs: peak MB over the plain loop", loc="left", fontsize=10)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    marks = [mpl.patches.Patch(color=COLOURS[system], label=LABELS[system]) for system in COLOURS]
    figure.legend(handles=marks, loc="lower center", ncols=len(marks), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(HERE / "figure.png", dpi=130)


def main() -> None:
    accuracy, timed, memory = read("accuracy"), read("time"), read("memory")
    lines = [*accuracy_table(accuracy), "", *update_table(read("masks")), ""]
    lines += [*time_table(timed), "", *memory_table(memory)]
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    with (HERE / "results.csv").open("w", newline="") as file:
        keys = ("task", "pattern", "system", "seed", "accuracy", "loss", "start", "zeros", "elements")
        fields = ["measure", *keys, "mask_elements_that_differ", "cpu_seconds", "before_mb", "peak_mb"]
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(
            {"measure": name, **r} for name, found in (("accuracy", accuracy), ("memory", memory)) for r in found
        )
    with (HERE / "steps.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        clocks = ("wall_ms", "cpu_ms", "begin", "before", "after")
        writer.writerow(("task", "pattern", "step", "system", *clocks))
        for record in timed:
            for row in record["rows"]:
                values = [f"{row[clock]:.3f}" for clock in clocks]
                writer.writerow((record["task"], record["pattern"], row["step"], row["system"], *values))
    draw(accuracy, timed, memory)


main()
