"""Writes the tables of README.md and figure.png from the JSON lines of run.sh:  python analyse.py [results].

``results`` has a folder for each set of layers (``minilm``, ``bert``) and, where a GPU ran ``scripts/gpu bench``, one
called ``gpu`` with what that left in outputs/gpu/bench. For another folder than the one beside this file the README is
left alone: the text goes to the screen and the figure into that folder.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- written by analyse.py -->", "<!-- end -->"
NC, PEER = "neural_compressor 2.6", "neural_compressor"

GOALS = [
    # operation, problem, goal on a GPU, goals on the CPU {rival: times as fast}
    ("SNIP-momentum, elements", "score 1x1", "<= 1.25x floor; >= 2.4x NC, 2x foreach", {PEER: 2}),
    ("SNIP-momentum, 4x1 units", "score 4x1", "<= 1.25x floor; >= 3x NC", {PEER: 2}),
    ("2:4 masks", "2:4 masks", "<= 1.4x floor; >= 8x ASP and NC", {PEER: 4, "asp": 4}),
    ("2:4 group scores", "2:4 group scores", "", {}),
    ("global k-th, elements", "k-th of elements", "<= 2.5x; >= 5x topk, 15x sort, 200x kthvalue", {"kthvalue": 15}),
    ("global k-th, 4x1 units", "k-th of 4x1 units", "<= 2.5x floor, 0 syncs", {"kthvalue": 15}),
    ("threshold to 4x1 masks", "threshold to 4x1 masks", "", {}),
    ("mask apply, 4x1", "apply 4x1 masks", "<= 1.25x floor; >= 1.05x mul_(bool)", {}),
    ("count violations, 4x1", "count violations, 4x1", "", {}),
    ("caps of layers, 4x1 units", "caps of layers, 4x1", "", {}),
    ("count non-finite scores", "count non-finite, 4x1", "", {}),
    ("restore masks, 4x1", "restore 4x1 masks", "", {}),
    ("AdamW step and mask", "AdamW step, 4x1 mask", "", {}),
    ("SGD step and mask", "SGD step, 4x1 mask", "", {}),
    ("plain step: score, apply", "plain step", "", {NC: 2}),
    ("whole 4x1 global update", "mask update", "<= 0.5 ms, 12 launches; >= 100x NC", {NC: 80}),
]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def load(folder, device="cpu"):
    """Problem -> contender -> its line."""
    problems = {}
    for what in ("peers", "steps"):
        for row in lines(folder / f"{what}_{device}_fp32.jsonl"):
            problems.setdefault(row["problem"], {})[row["contender"]] = row
    return problems


def own(found):
    return found["tritprune"]


def noise(found):
    """Ours against ours under another name, as a factor of at least 1."""
    ratio = found["tritprune again"]["times"]["median"] / own(found)["times"]["median"]
    return max(ratio, 1 / ratio)


def ratios(found):
    """Rival -> how many times our time it takes."""
    ours = own(found)["times"]["median"]
    return {name: row["times"]["median"] / ours for name, row in found.items() if not name.startswith("tritprune")}


def verdict(found, goals):
    """yes, no, or that the noise of this run is larger than the distance to the goal; "" without a goal."""
    others = ratios(found)
    said = []
    for rival, goal in goals.items():
        if rival not in others:
            continue
        sure, possible = others[rival] / noise(found) >= goal, others[rival] * noise(found) >= goal
        said.append("yes" if sure else "within noise" if possible else "**no**")
    return next((word for word in ("**no**", "within noise", "yes") if word in said), "")


def short(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def milliseconds(times):
    return f"{short(times['median'])} ({short(times['p10'])} to {short(times['p90'])})"


def about(problems):
    """One sentence on the machine and the layers of a set."""
    rows = [row for found in problems.values() for row in found.values()]
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    copies = sorted({round(row["copy_bytes_per_second"] / 1e9, 1) for row in rows})
    loads = sorted({round(row["load"], 1) for row in rows})
    dates = " and ".join(sorted({row["date"] for row in rows}))
    return (
        f"**{rows[0]['set']}**: {rows[0]['layers']} layers, {rows[0]['weights'] / 1e6:.1f}M weights, fp32. "
        f"{rows[0]['device']}; {versions}; {dates}. Copy {' and '.join(map(str, copies))} GB/s, "
        f"load average at the start {' and '.join(map(str, loads))}."
    )


def goals_table(sets, gpu):
    head = "".join(f" {name}: measured | met |" for name in sets)
    text = [f"| operation | goal, CPU |{head} goal, GPU | GPU |", "|---|---|" + "---|---|" * len(sets) + "---|---|"]
    for label, problem, on_gpu, goals in GOALS:
        cells = []
        for problems in sets.values():
            found = problems.get(problem)
            kept = {name: value for name, value in ratios(found).items() if name in goals} if found else {}
            cells.append(", ".join(f"{value:.3g}x {name}" for name, value in kept.items()) or "-")
            cells.append((verdict(found, goals) if found else "") or "-")
        wanted = ", ".join(f">= {goal}x {rival}" for rival, goal in goals.items()) or "-"
        seen = gpu.get(problem)
        measured = "not run"
        if seen:
            device = own(seen)["times"]["device"] or own(seen)["times"]["median"]
            others = ", ".join(f"{value:.3g}x {name}" for name, value in ratios(seen).items())
            measured = f"{device:.3g} ms, {device / own(seen)['floor_ms']:.2f}x floor; {others}"
        text.append(f"| {label} | {wanted} | {' | '.join(cells)} | {on_gpu or '-'} | {measured} |")
    return [line.replace("neural_compressor 2.6", "NC").replace("neural_compressor", "NC") for line in text]


def details(problems):
    text = [
        "| operation | ours, ms | again | x floor | MB to move | ops | launches on a GPU | rivals: times our time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, problem, _, _ in GOALS:
        found = problems.get(problem)
        if not found:
            continue
        row = own(found)
        counts = row.get("counts") or {}
        again = found["tritprune again"]["times"]["median"] / row["times"]["median"]
        shown = ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios(found).items())
        notes = "; ".join(f"{name}: {other['note']}" for name, other in found.items() if other["note"])
        text.append(
            f"| {label} | {milliseconds(row['times'])} | {again:.2f} | "
            f"{row['times']['median'] / row['floor_ms']:.2f} | "
            f"{row['bytes'] / 1e6:,.1f} | {counts.get('ops', '-')} | {counts.get('launches_on_a_gpu', '-')} | "
            f"{shown}{f' ({notes})' if notes else ''} |"
        )
    return text


def summary(sets):
    """Which goals are met and which are not, in words."""
    said = {"yes": [], "within noise": [], "**no**": []}
    for name, problems in sets.items():
        for label, problem, _, goals in GOALS:
            if problem not in problems or not goals:
                continue
            others = ratios(problems[problem])
            shown = ", ".join(f"{others[rival]:.3g} of {goal}" for rival, goal in goals.items() if rival in others)
            word = verdict(problems[problem], goals)
            if word:
                said[word].append(f"{label} ({name}: {shown})")
    titles = {"yes": "Met", "within noise": "Met or not within the noise of the run", "**no**": "Not met"}
    return [f"* {titles[word]}: {'; '.join(entries) or 'none'}." for word, entries in said.items()]


def counts_table(rows):
    text = ["| one | by | torch ops | host reads | Triton launches | allocated MB |", "|---|---|---|---|---|---|"]
    return text + [
        f"| {row['problem']} | {row['contender']} | {row['ops']:,} | {row['host_reads']:,} | {row['launches']:,} | "
        f"{row['allocated'] / 1e6:,.1f} |"
        for row in rows
    ]


def main(results):
    folders = sorted((path for path in results.iterdir() if path.is_dir() and path.name[0] != "."), reverse=True)
    sets = {path.name: load(path) for path in folders if path.name != "gpu"}
    sets = {name: problems for name, problems in sets.items() if problems}
    if not sets:
        sys.exit(f"no results in {results}: run.sh makes them")
    text = [
        "Milliseconds are medians (p10 to p90); a ratio is rival / ours, of medians, more is better. *again*: ours",
        "under a second name, over ours; a goal is *met* where the ratio reaches it even after that noise. **NC**:",
        "Neural Compressor.",
        "",
        *goals_table(sets, load(results / "gpu", "cuda")),
        "",
        *summary(sets),
    ]
    for problems in sets.values():
        text += ["", about(problems), "", *details(problems)]
    counted = next((rows for path in folders for rows in [lines(path / "counts_cpu.jsonl")] if rows), [])
    text += ["", "Counts of one step over 72 layers (sizes change only bytes):", "", *counts_table(counted)]
    print("\n".join(text))
    home = results.resolve() == (HERE / "results").resolve()
    figure(sets, (HERE if home else results) / "figure.png")
    if home:
        readme = HERE / "README.md"
        before, _, rest = readme.read_text().partition(BEGIN)
        whole = "\n".join([before + BEGIN, *text, END + rest.partition(END)[2]])
        temporary = readme.with_suffix(".tmp")
        temporary.write_text(whole)
        temporary.replace(readme)


def figure(sets, path):
    import matplotlib.pyplot as plt

    canvas, all_axes = plt.subplots(1, len(sets), figsize=(8.5 * len(sets), 7), layout="constrained", squeeze=False)
    for axes, (name, problems) in zip(all_axes[0], sets.items(), strict=True):
        named = [(label, problems[problem]) for label, problem, _, _ in GOALS if problem in problems]
        for place, (_, found) in enumerate(reversed(named)):
            draw(axes, place, found)
        axes.axvline(1.0, color="#0f766e", lw=1.5, zorder=2)
        axes.set(xscale="log", yticks=range(len(named)), yticklabels=[label for label, _ in reversed(named)])
        axes.set_ylim(-0.7, len(named) - 0.3)
        axes.set_xlabel("times the floor: bytes that must move / copy bandwidth of the run; left is better")
        row = own(named[0][1])
        axes.set_title(
            f"{name}, {row['weights'] / 1e6:.1f}M weights; {row['device']}, {row['date']}", fontsize=9, loc="left"
        )
        axes.spines[["top", "right", "left"]].set_visible(False)
    canvas.savefig(path, dpi=110)


def draw(axes, place, found):
    members = sorted(
        (row["times"]["median"] / row["floor_ms"], name) for name, row in found.items() if not name.endswith("again")
    )
    axes.hlines(place, members[0][0], members[-1][0], color="#e2e8f0", lw=2, zorder=1)
    for number, (at, name) in enumerate(members):
        ours = name == "tritprune"
        axes.plot(at, place, "o", ms=9 if ours else 6, color="#c2410c" if ours else "#64748b", zorder=3)
        axes.annotate(
            "ours" if ours else name.replace("neural_compressor", "NC"),
            (at, place),
            xytext=(0, 8 if number % 2 == 0 else -15),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color="#c2410c" if ours else "#475569",
            fontweight="bold" if ours else None,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results")
