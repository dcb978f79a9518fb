"""The table for a person, the plot for a page, the JSON lines for a machine."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from clock import Times


@dataclass(frozen=True)
class Row:
    """One contender of one problem.

    Args:
        problem: name of the job.
        contender: who did it.
        times: milliseconds.
        floor_ms: the bytes of the job over the measured copy bandwidth.
        bytes: what the job must move.
        note: how a rival's result compares.
    """

    problem: str
    contender: str
    times: Times
    floor_ms: float
    bytes: int
    note: str = ""


def machine(device: torch.device) -> dict[str, Any]:
    """Device and versions: without them a figure is hearsay."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ModuleNotFoundError:
        pass
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {"device": name, "versions": versions, "date": date.today().isoformat(), "load": os.getloadavg()[0]}


def bar(label: str, done: int, total: int, width: int = 30) -> str:
    """One line that overwrites itself."""
    filled = round(width * done / max(total, 1))
    return f"\r  {label:<26} {'█' * filled}{'·' * (width - filled)} {done:>3} of {total}"


def table(rows: Sequence[Row], bandwidth: float, about: dict[str, Any], title: str) -> str:
    """Plain text, 100 columns at most."""
    lines = [
        title,
        f"{about['device']}; " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()) + f"; {about['date']}",
        f"copy {bandwidth / 1e9:,.1f} GB/s; floor = bytes that the job must move / copy; ms are medians (p10 to p90)",
        "",
        f"{'':<24}{'':<27}{'ms':>10}{'p10 to p90':>21}{'x floor':>9}{'x ours':>8}",
    ]
    own: dict[str, float] = {}
    last = ""
    for row in rows:
        first = row.problem != last
        own.setdefault(row.problem, row.times.median)
        if first and last:
            lines.append("")
        last = row.problem
        spread = f"{_ms(row.times.p10)} to {_ms(row.times.p90)}"
        lines.append(
            f"{row.problem if first else '':<24}{row.contender:<27}{_ms(row.times.median):>10}{spread:>21}"
            f"{row.times.median / row.floor_ms:>9.2f}{row.times.median / own[row.problem]:>8.2f}"
            + (f"  {row.note}" if row.note else "")
        )
    return "\n".join(lines)


def save(rows: Sequence[Row], bandwidth: float, about: dict[str, Any], path: Path) -> None:
    """One JSON line a row, in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    lines = [json.dumps({**asdict(row), "copy_bytes_per_second": bandwidth, **about}) for row in rows]
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)


def plot(rows: Sequence[Row], about: dict[str, Any], path: Path, title: str) -> None:
    """How far from the floor everybody is, a row of dots per job: left is better, 1 is the floor."""
    import matplotlib.pyplot as plt

    problems = list(dict.fromkeys(row.problem for row in rows))
    figure, axes = plt.subplots(figsize=(9, 0.62 * len(problems) + 1.7), layout="constrained")
    for place, problem in enumerate(reversed(problems)):
        members = [row for row in rows if row.problem == problem and not row.contender.endswith("again")]
        for number, row in enumerate(members):
            at = row.times.median / row.floor_ms
            ours = number == 0
            axes.plot(at, place, "o", ms=9 if ours else 6, color="#c2410c" if ours else "#64748b", zorder=3)
            axes.hlines(place, row.times.p10 / row.floor_ms, row.times.p90 / row.floor_ms, color="#94a3b8", lw=2)
            above = number % 2 == 0
            axes.annotate(
                row.contender, (at, place), xytext=(0, 7 if above else -14), textcoords="offset points",
                ha="center", fontsize=7, color="#c2410c" if ours else "#475569", fontweight="bold" if ours else None,
            )  # fmt: skip
    axes.axvline(1.0, color="#0f766e", lw=1.5)
    axes.text(1.0, len(problems) - 0.35, "floor", color="#0f766e", fontsize=8, ha="center")
    axes.set(xscale="log", yticks=range(len(problems)), yticklabels=list(reversed(problems)))
    axes.set_ylim(-0.6, len(problems) - 0.2)
    axes.set_xlabel("times the floor (bytes that must move / measured copy bandwidth); left is better")
    axes.set_title(f"{title}\n{about['device']}, {about['date']}", fontsize=9, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", which="major", color="#e2e8f0")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _cpu_name() -> str:
    try:
        shown = subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return platform.machine()
    return next((line.split(":")[1].strip() for line in shown.splitlines() if line.startswith("Model name")), "CPU")
