"""Writes the tables of README.md and figure.png from the JSON lines of run.sh:  python analyse.py outputs/kernels."""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- written by analyse.py -->", "<!-- end -->"

GOALS = [
    # operation, problem, goal on a GPU, goals on the CPU {rival: times as fast}
    ("SNIP-momentum, elements", "score 1x1", "<= 1.25x floor; >= 2.4x NC, 2x foreach", {"neural_compressor": 2}),
    ("SNIP-momentum, 4x1 units", "score 4x1", "<= 1.25x floor; >= 3x NC", {"neural_compressor": 2}),
    ("2:4 masks", "2:4 masks", "<= 1.4x floor; >= 8x ASP and NC", {"neural_compressor": 4, "asp": 4}),
    ("global k-th, elements", "k-th of elements", "<= 2.5x; >= 5x topk, 15x sort, 200x kthvalue", {"kthvalue": 15}),
    ("global k-th, 4x1 units", "k-th of 4x1 units", "<= 2.5x floor, 0 syncs", {"kthvalue": 15}),
    ("threshold to 4x1 masks", "threshold to 4x1 masks", "", {}),
    ("mask apply, 4x1", "apply 4x1 masks", "<= 1.25x floor; >= 1.05x mul_(bool)", {}),
    ("plain step: score, apply", "plain step", "", {"neural_compressor 2.6": 2}),
    ("whole 4x1 global update", "mask update", "<= 0.5 ms, 12 launches; >= 100x NC", {"neural_compressor 2.6": 80}),
]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def milliseconds(times):
    def short(value):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    return f"{short(times['median'])} ({short(times['p10'])} to {short(times['p90'])})"


def main(folder):
    rows = lines(folder / "peers_cpu_fp32.jsonl") + lines(folder / "steps_cpu_fp32.jsonl")
    about = rows[0]
    problems = {}
    for row in rows:
        problems.setdefault(row["problem"], {})[row["contender"]] = row
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    copies = sorted({round(row["copy_bytes_per_second"] / 1e9, 1) for row in rows})
    loads = sorted({round(row["load"], 1) for row in rows})
    sizes = list(dict.fromkeys(f"{row['layers']} layers of {row['set']} ({row['weights'] / 1e6:.1f}M)" for row in rows))
    text = [
        f"{about['device']}; {versions}; {about['date']}. Copy {' and '.join(map(str, copies))} GB/s,",
        f"load average at the start {' and '.join(map(str, loads))}. {' / '.join(sizes)}, fp32.",
        "Milliseconds are medians (p10 to p90); a ratio is rival / ours, of medians. **NC**: Neural Compressor.",
        "",
        "| operation | goal, GPU | GPU | ours, CPU ms | again | x floor | rivals: times our time | goal, CPU | met |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, problem, gpu, goals in GOALS:
        found = problems[problem]
        own = found["tritprune"]["times"]
        again = found["tritprune again"]["times"]["median"] / own["median"]
        others = {
            name: row["times"]["median"] / own["median"]
            for name, row in found.items()
            if not name.startswith("tritprune")
        }
        shown = ", ".join(f"{name} {ratio:.3g}" for name, ratio in others.items())
        met = all(others[rival] >= goal for rival, goal in goals.items() if rival in others) if goals else None
        text.append(
            f"| {label} ({found['tritprune']['set']}) | {gpu or '-'} | not run | {milliseconds(own)} | {again:.2f} | "
            f"{own['median'] / found['tritprune']['floor_ms']:.2f} | {shown} | "
            + (", ".join(f">= {goal}x {rival}" for rival, goal in goals.items()) or "-")
            + f" | {'-' if met is None else 'yes' if met else '**no**'} |"
        )
    text += ["", "| one | by | torch ops | host reads | Triton launches | allocated MB |", "|---|---|---|---|---|---|"]
    text += [
        f"| {row['problem']} | {row['contender']} | {row['ops']:,} | {row['host_reads']:,} | {row['launches']:,} | "
        f"{row['allocated'] / 1e6:,.1f} |"
        for row in lines(folder / "counts_cpu.jsonl")
    ]
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text("\n".join([before + BEGIN, *text, END + rest.partition(END)[2]]))
    print("\n".join(text))
    figure(problems, f"{about['device']}, {about['date']}; {' / '.join(sizes)}")


def figure(problems, title):
    import matplotlib.pyplot as plt

    named = [(label, problems[problem]) for label, problem, _, _ in GOALS]
    canvas, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    for place, (_, found) in enumerate(reversed(named)):
        members = sorted(
            (row["times"]["median"] / row["floor_ms"], name)
            for name, row in found.items()
            if not name.endswith("again")
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
    axes.axvline(1.0, color="#0f766e", lw=1.5, zorder=2)
    axes.set(xscale="log", yticks=range(len(named)), yticklabels=[label for label, _ in reversed(named)])
    axes.set_ylim(-0.7, len(named) - 0.3)
    axes.set_xlabel(
        "times the floor: bytes that the job must move / copy bandwidth measured in the run; left is better"
    )
    axes.set_title(title, fontsize=9, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    canvas.savefig(HERE / "figure.png", dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
