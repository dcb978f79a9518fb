"""What a run left behind: ``result.json`` and ``curves.jsonl``, read with patience for what is missing.

A run that failed, was stopped or was killed in the middle of a line still has a report. So nothing in here insists:
what is absent or malformed reads as None or as an empty series.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritprune.errors import RunFolderError

Result = Mapping[str, Any]

LARGEST = 1e100
"""A curve's value beyond this is as good as infinite, and no axis could show it."""

CONTROL = "control"
"""The stage in which the random-mask control trains: its curves are shown beside the run's own, never mixed in."""


@dataclass(frozen=True)
class Series:
    """One curve: values at ascending optimizer steps, finite only."""

    steps: tuple[int, ...] = ()
    values: tuple[float, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True)
class Curves:
    """All lines of ``curves.jsonl``.

    Attributes:
        lines: the readable lines, in the order of the file.
        unreadable: how many lines could not be read (the last one of a killed run may be cut in half).
    """

    lines: tuple[Mapping[str, Any], ...] = ()
    unreadable: int = 0
    _kept: dict[tuple[str, bool], tuple[Series, int]] = field(default_factory=dict, repr=False, compare=False)

    def series(self, key: str, *, control: bool = False) -> Series:
        """The curve of ``key``; a step that a resumed run repeated counts with its last value."""
        return self._collect(key, control)[0]

    def non_finite(self, key: str) -> int:
        """At how many lines ``key`` was NaN, infinite or null (as JSON has to write them): the report has to say so."""
        return self._collect(key, False)[1]

    def keys(self) -> tuple[str, ...]:
        """Every key that occurs, in order of first appearance."""
        return tuple(dict.fromkeys(key for line in self.lines for key in line))

    def stages(self) -> list[tuple[str, int, int]]:
        """The stages as (name, first step, last step), by first appearance."""
        spans: dict[str, tuple[int, int]] = {}
        for line in self.lines:
            name, step = str(line.get("stage") or ""), line["step"]
            first, last = spans.get(name, (step, step))
            spans[name] = (min(first, step), max(last, step))
        return [(name, *span) for name, span in spans.items() if name]

    def mean_by_stage(self, key: str, among: str) -> dict[str, float]:
        """The mean of ``key`` over each stage's lines that have ``among``; a line without ``key`` counts as 0.

        A stage in which ``key`` never occurs is left out.
        """
        sums: dict[str, float] = {}
        lines: dict[str, int] = {}
        for line in self.lines:
            stage, value = str(line.get("stage") or ""), number(line.get(key))
            if number(line.get(among)) is not None:
                lines[stage] = lines.get(stage, 0) + 1
                if value is not None:
                    sums[stage] = sums.get(stage, 0.0) + value
        return {stage: total / lines[stage] for stage, total in sums.items()}

    def _collect(self, key: str, control: bool) -> tuple[Series, int]:
        if (key, control) not in self._kept:
            points: dict[int, float] = {}
            lost = 0
            for line in self.lines:
                if key in line and (line.get("stage") == CONTROL) == control:
                    value = number(line[key])
                    if value is not None and abs(value) < LARGEST:
                        points[line["step"]] = value
                    else:
                        lost += 1
            steps = tuple(sorted(points))
            self._kept[key, control] = (Series(steps, tuple(points[step] for step in steps)), lost)
        return self._kept[key, control]


def read_run(run_folder: str | os.PathLike[str]) -> tuple[Result, Curves]:
    """The result and the curves of a run folder.

    Raises:
        RunFolderError: the folder has neither file, so it is no run folder.
    """
    folder = Path(run_folder)
    result_file, curves_file = folder / "result.json", folder / "curves.jsonl"
    if not result_file.is_file() and not curves_file.is_file():
        raise RunFolderError(f"{folder} is no run folder: it has neither result.json nor curves.jsonl")
    result: Any = {}
    if result_file.is_file():
        try:
            result = json.loads(result_file.read_text(encoding="utf-8", errors="replace"))
        except json.JSONDecodeError as error:
            result = {"status": "failed", "error": f"result.json is damaged: {error}"}
    if not isinstance(result, dict):
        result = {"status": "failed", "error": f"result.json holds {type(result).__name__}, not an object"}
    return result, _read_curves(curves_file)


def _read_curves(file: Path) -> Curves:
    if not file.is_file():
        return Curves()
    lines: list[Mapping[str, Any]] = []
    unreadable = 0
    with file.open(encoding="utf-8", errors="replace") as stream:
        for text in filter(None, map(str.strip, stream)):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                line = None
            step = number(line.get("step")) if isinstance(line, dict) else None
            if line is None or step is None or not 0 <= step < 2**53:
                unreadable += 1
            else:
                lines.append({**line, "step": int(step)})
    return Curves(tuple(lines), unreadable)


def number(value: Any) -> float | None:
    """``value`` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def part(record: Any, *keys: str) -> Any:
    """``record[key][key]...``, or None where a level is missing or is no mapping."""
    for key in keys:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record


def names(record: Any, *keys: str) -> tuple[str, ...]:
    """The keys of the mapping at ``record[key]...``; none where there is no mapping."""
    found = part(record, *keys)
    return tuple(map(str, found)) if isinstance(found, Mapping) else ()


def items(record: Any, *keys: str) -> list[Mapping[str, Any]]:
    """The list of mappings at ``record[key]...``; whatever else is in there is left out."""
    found = part(record, *keys)
    if not isinstance(found, Sequence) or isinstance(found, str):
        return []
    return [item for item in found if isinstance(item, Mapping)]


def row_of(result: Result, model: str) -> Mapping[str, Any] | None:
    """The row of the main table for ``model`` ("dense", "pruned", "slim", "random control")."""
    return next((row for row in items(result, "rows") if row.get("model") == model), None)


def final_row(result: Result) -> Mapping[str, Any] | None:
    """The row that the run was made for: the slim model, trained on if it was, else the pruned one."""
    return row_of(result, "tuned") or row_of(result, "slim") or row_of(result, "pruned")


def primary_metric(result: Result) -> str:
    """The metric that the headline speaks of: accuracy where there is one, else the first that is no loss."""
    rows = items(result, "rows")
    known = dict.fromkeys(name for row in rows for name in names(row, "metrics"))
    return "accuracy" if "accuracy" in known else next((name for name in known if name != "loss"), "accuracy")


def metric_of(result: Result, row: Mapping[str, Any] | None) -> float | None:
    """The primary metric of a row."""
    return number(part(row, "metrics", primary_metric(result)))


def layer_series(result: Result, curves: Curves) -> Iterator[tuple[str, Series]]:
    """The sparsity curve of each layer that has one, in the order of the result's layer list."""
    known = [str(layer.get("name")) for layer in items(result, "layers")]
    general = {"global", "target"}
    found = [key.removeprefix("sparsity/") for key in curves.keys() if key.startswith("sparsity/")]  # noqa: SIM118
    for name in dict.fromkeys([*known, *found]):
        if name not in general and (series := curves.series(f"sparsity/{name}")):
            yield name, series
