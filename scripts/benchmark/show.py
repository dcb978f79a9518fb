"""The table for a person, the plot for a page, the JSON lines for a machine."""

import json
import os
import platform
import subprocess
import sys
import time
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
        counts: operations, host reads, bytes allocated and Triton launches of one run, where they were counted.
    """

    problem: str
    contender: str
    times: Times
    floor_ms: float
    bytes: int
    note: str = ""
    counts: dict[str, int] | None = None


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


class Progress:
    """A bar on stderr: the problem, its rounds, and the time that is left for all.

    Args:
        problems: how many there are.
        seconds: what each may take, the guess until one is done.
    """

    def __init__(self, problems: int, seconds: float) -> None:
        self._problems, self._guess = problems, seconds
        self._done, self._start = 0, time.perf_counter()

    def begin(self, name: str, rounds: int) -> None:
        """A problem of at most ``rounds`` rounds."""
        self._name, self._rounds, self._round = name, rounds, 0
        self._began = time.perf_counter()
        self._show()

    def tick(self) -> None:
        """One more round is done."""
        self._round += 1
        self._show()

    def end(self, result: str) -> None:
        """The problem is done."""
        self._done += 1
        print(f"\r  {self._name:<26} {result:<72}", file=sys.stderr, flush=True)

    def left(self) -> float:
        """Seconds: problems to come take as long as those before, this one as long as it is allowed."""
        now = time.perf_counter()
        usual = (self._began - self._start) / self._done if self._done else self._guess
        return max(0.0, usual - (now - self._began)) + usual * (self._problems - self._done - 1)

    def _show(self, width: int = 24) -> None:
        filled = round(width * self._round / max(self._rounds, 1))
        minutes, seconds = divmod(round(self.left()), 60)
        print(
            f"\r  {self._name:<26} {'█' * filled}{'·' * (width - filled)} {self._round:>3} of {self._rounds}, "
            f"problem {self._done + 1} of {self._problems}, {minutes}:{seconds:02} left ",
            end="", file=sys.stderr, flush=True,
        )  # fmt: skip


def table(rows: Sequence[Row], bandwidth: float, about: dict[str, Any], title: str) -> str:
    """Plain text, 107 columns and a note."""
    lines = [
        title,
        f"{about['device']}; " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()) + f"; {about['date']}",
        f"copy {bandwidth / 1e9:,.1f} GB/s; floor = bytes that the job must move / copy; ms are medians (p10 to p90)",
        "",
        f"{'':<24}{'':<27}{'ms':>10}{'p10 to p90':>21}{'x floor':>9}{'x ours':>8}{'ops':>8}",
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
            + f"{row.counts['ops'] if row.counts else '':>8}"
            + (f"  {row.note}" if row.note else "")
        )
    return "\n".join(lines)


def save(rows: Sequence[Row], bandwidth: float, about: dict[str, Any], path: Path) -> None:
    """One JSON line a row, in one move."""
    lines = [json.dumps({**asdict(row), "copy_bytes_per_second": bandwidth, **about}) for row in rows]
    write_whole(path, "\n".join(lines) + "\n")


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
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
