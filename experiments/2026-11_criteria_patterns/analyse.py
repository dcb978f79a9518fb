"""Means and 95% intervals over seeds from the sweeps' results: table.md, results.csv and figure.png."""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy import stats

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BASE = "snip_momentum"
SHAPES = {
    ("block", 1, 1): "1x1",
    ("block", 4, 1): "4x1",
    ("n_in_m", 2, 4): "2:4",
    ("block", "channel", 1): "channelx1",
    ("block", 1, "channel"): "1xchannel",
    ("block", 16, 16): "16x16",
}
SEEDS = 3
Row = dict[str, Any]
Groups = dict[tuple[str, str, str, str], list[Row]]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% t-interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


def variant_of(sweep: str, config: Row) -> str:
    """What a sweep changes against the baseline, in the words of the command line."""
    pruner, kind = config["pruner"], sweep.removesuffix("_16x16").partition("_")[2]
    if kind in ("reduce", "normalize", "scope", "regrow", "score_dtype"):
        return f"{kind}={str(pruner[kind]).lower()}"
    if kind == "lasso":
        return f"group_lasso, coeff={pruner['regularizer']['coeff']:g}"
    if kind == "progressive":
        return "pruner=progressive"
    return f"schedule={config['schedule']['name']}" if kind == "schedule" else ""


def read(folder: Path) -> list[Row]:
    rows = []
    for path in sorted(folder.glob("*/*/result.json")):
        result = json.loads(path.read_text())
        assert result["status"] == "finished", path
        config, models = result["config"], {row["model"]: row for row in result["rows"]}
        counts, pattern = models["pruned"]["sparsity"]["prunable"], config["pattern"]
        rows.append(
            {
                "task": result["data"]["task"],
                "criterion": config["criterion"]["name"],
                "pattern": SHAPES[pattern["name"], pattern["n"], pattern["m"]],
                "target": config["pruner"]["target_sparsity"],
                "variant": variant_of(path.parts[-3], config),
                "seed": result["seed"],
                "accuracy": models["pruned"]["metrics"]["accuracy"],
                "loss": models["pruned"]["metrics"]["loss"],
                "dense": models["dense"]["metrics"]["accuracy"],
                "zeros": counts["zeros"],
                "elements": counts["total"],
            }
        )
    return sorted(rows, key=lambda r: [str(r[k]) for k in ("task", "variant", "pattern", "criterion", "seed")])


def grouped(rows: list[Row]) -> Groups:
    groups = defaultdict(list)
    for row in rows:
        groups[row["task"], row["criterion"], row["pattern"], row["variant"]].append(row)
    return groups


def paired(found: list[Row], base: list[Row]) -> list[float]:
    """Differences of accuracy, seed by seed."""
    other = {row["seed"]: row["accuracy"] for row in base}
    return [row["accuracy"] - other[row["seed"]] for row in found]


def patterns_of(groups: Groups) -> list[str]:
    """The patterns for which every criterion ran on every seed."""
    criteria = {criterion for task, criterion, _, _ in groups if task == "digits"}
    return [p for p in SHAPES.values() if all(len(groups.get(("digits", c, p, ""), ())) == SEEDS for c in criteria)]


def ranked(groups: Groups) -> list[str]:
    """The criteria of the digits, best mean over the patterns first."""
    criteria, patterns = {c for task, c, _, _ in groups if task == "digits"}, patterns_of(groups)
    return sorted(
        criteria,
        key=lambda c: -float(np.mean([row["accuracy"] for p in patterns for row in groups["digits", c, p, ""]])),
    )


def tables(groups: Groups) -> list[str]:
    dense = {task: {r["seed"]: r["dense"] for key, found in groups.items() if key[0] == task for r in found}
             for task in ("digits", "pydocs")}  # fmt: skip
    patterns = patterns_of(groups)
    lines = ["| criterion (digits) | " + " | ".join(f"{p} at {0.5 if p == '2:4' else 0.9}" for p in patterns) + " |"]
    lines.append("|---|" + "---|" * len(patterns))
    for criterion in ranked(groups):
        cells = [interval([r["accuracy"] for r in groups["digits", criterion, p, ""]]) for p in patterns]
        lines.append(f"| {criterion} | " + " | ".join(f"{mean:.3f} ± {half:.3f}" for mean, half in cells) + " |")
    mean, half = interval(list(dense["digits"].values()))
    lines += ["", f"Dense: {mean:.3f} ± {half:.3f} on the digits."]
    if len(dense["pydocs"]) == SEEDS:
        mean, half = interval(list(dense["pydocs"].values()))
        lines[-1] += f" {mean:.3f} ± {half:.3f} on pydocs."
    lines += ["", "| digits, minus snip_momentum, paired ± 95% | " + " | ".join(patterns) + " |"]
    lines.append("|---|" + "---|" * len(patterns))
    for criterion in (c for c in ranked(groups) if c != BASE):
        gaps = [paired(groups["digits", criterion, p, ""], groups["digits", BASE, p, ""]) for p in patterns]
        cells = [interval(gap) for gap in gaps]
        lines.append(f"| {criterion} | " + " | ".join(f"{mean:+.3f} ± {half:.3f}" for mean, half in cells) + " |")
    lines += ["", "| against snip_momentum as it comes | accuracy | paired difference ± 95% | each seed |"]
    lines.append("|---|---|---|---|")
    for label, found, base in changes(groups, *SHAPES.values()):
        accuracy, (gap, half) = np.mean([r["accuracy"] for r in found]), interval(paired(found, base))
        seeds = ", ".join(f"{r['accuracy']:.3f}" for r in sorted(found, key=lambda r: r["seed"]))
        lines.append(f"| {label} | {accuracy:.3f} | {gap:+.3f} ± {half:.3f} | {seeds} |")
    return lines


def changes(groups: Groups, *patterns: str) -> list[tuple[str, list[Row], list[Row]]]:
    """One thing changed against snip_momentum with its defaults: label, its runs, the baseline's. Best first."""
    shown = []
    for (task, criterion, pattern, variant), found in groups.items():
        base = groups.get((task, BASE, pattern, ""), [])
        told = variant or (task == "pydocs" and criterion != BASE)  # the digits' criteria are in the heat map
        if told and pattern in patterns and len(found) == len(base) == SEEDS:
            shown.append((f"{task}, {pattern}: {variant or criterion}", found, base))
    return sorted(shown, key=lambda change: -float(np.mean(paired(change[1], change[2]))))


def heat_map(axes: Any, groups: Groups) -> None:
    criteria, patterns = ranked(groups), patterns_of(groups)
    means = np.array(
        [[np.mean([r["accuracy"] for r in groups["digits", c, p, ""]]) for p in patterns] for c in criteria]
    )
    axes.imshow(means, cmap="viridis", vmin=0.1, vmax=1.0, aspect="auto")
    for y, criterion in enumerate(criteria):
        for x, pattern in enumerate(patterns):
            mean, half = interval([r["accuracy"] for r in groups["digits", criterion, pattern, ""]])
            colour = "white" if mean < 0.6 else "black"
            axes.text(x, y - 0.1, f"{mean:.2f}", ha="center", va="center", color=colour, fontsize=11)
            axes.text(x, y + 0.27, f"± {half:.2f}", ha="center", va="center", color=colour, fontsize=7)
    axes.set_xticks(range(len(patterns)), [f"{p}\nat {0.5 if p == '2:4' else 0.9}" for p in patterns])
    axes.set_yticks(range(len(criteria)), criteria)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Digits: held-out accuracy, mean ± 95% over 3 seeds", loc="left", fontsize=10)


def forest(axes: Any, shown: list[tuple[str, list[Row], list[Row]]], title: str) -> None:
    """Paired differences against snip_momentum with its defaults."""
    for y, (label, found, base) in enumerate(shown):
        gap, half = interval(paired(found, base))
        axes.errorbar(
            100 * gap,
            y,
            xerr=100 * half,
            fmt="o",
            color="#D55E00" if "pydocs" in label else "#0072B2",
            markersize=4,
            capsize=2,
            linewidth=1,
        )
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(shown)), [label.removeprefix("digits, ") for label, _, _ in shown], fontsize=9)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    rows = read(Path(sys.argv[1]))
    groups = grouped(rows)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = tables(groups)
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    small, large = changes(groups, "4x1"), changes(groups, "16x16")
    figure = plt.figure(figsize=(14, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.3, 1), height_ratios=(len(small), len(large) + 0.5))
    heat_map(figure.add_subplot(grid[:, 0]), groups)
    upper, lower = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    forest(upper, small, "One change to snip_momentum: points, paired, ± 95%")
    forest(lower, large, "The same for large blocks (mind the scale)")
    figure.savefig(HERE / "figure.png", dpi=120)


main()
