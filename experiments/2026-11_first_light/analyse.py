"""Means and 95% intervals over seeds from a sweep's results: table.md, results.csv, figure.svg and figure.png."""

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from scipy import stats

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ORDER = ("snip_momentum", "magnitude", "random")
COLOURS = {"snip_momentum": "#0072B2", "magnitude": "#D55E00", "random": "#7F7F7F"}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95% t-interval."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(half)


results = [json.loads(path.read_text()) for path in sorted(Path(sys.argv[1]).glob("*/*/result.json"))]
assert all(result["status"] == "finished" for result in results)
rows, dense = [], {}
for result in results:
    models = {row["model"]: row for row in result["rows"]}
    counts = models["pruned"]["sparsity"]["prunable"]
    dense[result["seed"]] = models["dense"]["metrics"]["accuracy"]
    rows.append(
        {
            "criterion": result["config"]["criterion"]["name"],
            "target": result["config"]["pruner"]["target_sparsity"],
            "seed": result["seed"],
            "accuracy": models["pruned"]["metrics"]["accuracy"],
            "dense": models["dense"]["metrics"]["accuracy"],
            "zeros": counts["zeros"],
            "elements": counts["total"],
        }
    )
with (HERE / "results.csv").open("w", newline="") as file:
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(sorted(rows, key=lambda r: (r["target"], ORDER.index(r["criterion"]), r["seed"])))

groups = defaultdict(list)
for row in rows:
    groups[row["target"], row["criterion"]].append(row)
base, base_half = interval(list(dense.values()))
lines = [
    "| target | criterion | accuracy, mean ± 95% | minus dense, paired ± 95% | each seed |",
    "|---|---|---|---|---|",
]
lines.append(
    f"| 0 | dense | {base:.3f} ± {base_half:.3f} | | {', '.join(f'{v:.3f}' for _, v in sorted(dense.items()))} |"
)
figure, axes = plt.subplots(figsize=(6.4, 3.8))
axes.axhline(base, color="black", linewidth=1)
axes.annotate("dense", (0.755, base), textcoords="offset points", xytext=(0, 4), fontsize=9)
for offset, criterion in zip((-0.006, 0, 0.006), ORDER, strict=True):
    xs, means, halves = [], [], []
    for target in sorted({t for t, _ in groups}):
        found = sorted(groups[target, criterion], key=lambda r: r["seed"])
        mean, half = interval([r["accuracy"] for r in found])
        gap, gap_half = interval([r["accuracy"] - r["dense"] for r in found])
        seeds = ", ".join(f"{r['accuracy']:.3f}" for r in found)
        lines.append(f"| {target} | {criterion} | {mean:.3f} ± {half:.3f} | {gap:+.3f} ± {gap_half:.3f} | {seeds} |")
        axes.scatter([target + offset] * len(found), [r["accuracy"] for r in found], s=14, color=COLOURS[criterion])
        xs, means, halves = [*xs, target + offset], [*means, mean], [*halves, half]
    axes.errorbar(xs, means, halves, color=COLOURS[criterion], capsize=3, linewidth=1.4, alpha=0.8)
    axes.annotate(
        criterion, (xs[-1], means[-1]), textcoords="offset points", xytext=(12, -12), color=COLOURS[criterion]
    )
axes.set(xlim=(0.75, 1.0), xticks=(0.8, 0.9), xlabel="sparsity of the encoder's linear weights, 4x1 blocks")
axes.set_ylabel("held-out accuracy")
axes.set_title("pydocs, MiniLM-L6: points are seeds, bars 95% t-intervals", fontsize=10, loc="left")
axes.spines[["top", "right"]].set_visible(False)
figure.tight_layout()
figure.savefig(HERE / "figure.png", dpi=150)
(HERE / "table.md").write_text("\n".join(lines) + "\n")
print("\n".join(lines))
