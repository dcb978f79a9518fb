"""The plan on the screen: what would happen, before data is read or a step is trained."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tritprune.app.foresight import Foresight
from tritprune.pruners import PlannedGroup, PlannedLayer, PlannedStep, PruningPlan

_SHOWN_STEPS = 8
_SHOWN_ROWS = 40


def plan_view(
    plan: PruningPlan, foresights: Sequence[Foresight], parameters: int, command: str
) -> Iterator[RenderableType]:
    """What to print, from top to bottom.

    Args:
        plan: the plan.
        foresights: what the slimmer can cut, one a group; none if there is no slimmer.
        parameters: of the dense model.
        command: how to run it.
    """
    yield Text(f"{plan}\n", style="bold")
    for group in plan.groups:
        layers = [layer for layer in plan.layers if layer.group == group.name]
        yield _layers(group.name, layers)
        if group.steps:
            yield _steps(group, _unit_size(layers))
        yield Text(f"  memory: scores {_bytes(group.score_bytes)}, masks {_bytes(group.mask_bytes)}")
        for foresight in foresights:
            if foresight.group == group.name:
                yield Text(f"  the slimmer can cut: {foresight.text}")
                yield from _refused(foresight)
        yield Text()
    going = sum(foresight.parameters for foresight in foresights)
    if going:
        yield Text(f"{_count(parameters)} parameters now, about {_count(parameters - going)} after slimming\n")
    if plan.excluded:
        yield _excluded(plan)
    yield Text(f"nothing was trained; go:  {command}", style="green")


def _layers(group: str, layers: Sequence[PlannedLayer]) -> Table:
    """One row for layers that differ in a number of their name alone; what all names begin with is in the title."""
    bounded = any(layer.floor > 0 or layer.capped for layer in layers)
    locked = any(layer.locked for layer in layers)
    rows = list(_alike(layers))
    prefix = _common([name for name, *_ in rows])
    table = _table(f"layers of {group}" + (f", in {prefix}" if prefix else ""))
    table.add_column("layer", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    units = "units that may go" if bounded else "units"
    for name in ("shape", "unit", units, "weights", *(["zero now"] if locked else [])):
        table.add_column(name, justify="left" if name == "unit" else "right", no_wrap=True)
    for name, layer, times in rows[:_SHOWN_ROWS]:
        row = [name.removeprefix(f"{prefix}."), f"{times} x" if times > 1 else "", "x".join(map(str, layer.shape))]
        row += [layer.unit, _bounds(layer) if bounded else f"{layer.units:,}", f"{layer.elements:,}"]
        table.add_row(*row, *([f"{layer.locked:,}"] if locked else []))
    _rest(table, len(rows) - _SHOWN_ROWS, "rows of layers")
    return table


def _common(names: Sequence[str]) -> str:
    """The parts with which all dotted names begin; at least the last part of each is left."""
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".")[:-1] for name in names), strict=False))
    return ".".join(parts[0] for parts in shared)


def _alike(layers: Sequence[PlannedLayer]) -> Iterator[tuple[str, PlannedLayer, int]]:
    """Layers that differ only in numbers of their names: the name with ``*`` for these, one of them, how many."""
    together: dict[tuple[str, PlannedLayer], list[PlannedLayer]] = {}
    for layer in layers:
        starred = _starred(layer.name)
        together.setdefault((starred, replace(layer, name=starred)), []).append(layer)
    for (starred, _), found in together.items():
        yield found[0].name if len(found) == 1 else starred, found[0], len(found)


def _starred(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _bounds(layer: PlannedLayer) -> str:
    """How many units of a layer may go, of how many, and the share that the user set."""
    share = f"{layer.floor:.0%} to {layer.cap:.0%}" if layer.floor else f"to {layer.cap:.0%}"
    if layer.least_units is None or layer.most_units is None:
        return f"{share} of {layer.units:,}"
    least = f"{layer.least_units:,} to " if layer.floor else ""
    return f"{least}{layer.most_units:,} of {layer.units:,} ({share})"


def _steps(group: PlannedGroup, unit: int | None) -> Table:
    table = _table(f"mask updates of {group.name}: {len(group.steps)}")
    for column in ("after step", "target", "may go", "go", *(["units"] if unit else []), "sparsity"):
        table.add_column(column, justify="right")
    for step in _spaced(group.steps):
        exact = step.least == step.most
        go = f"{step.most:,}" if exact else f"{step.least:,} to {step.most:,}"
        reached = f"{step.most / group.elements:.4%}" if exact else f"to {step.most / group.elements:.4%}"
        units = [f"{step.most // unit:,}"] if unit else []
        table.add_row(f"{step.step:,}", f"{step.target:.4f}", f"{step.budget:,}", go, *units, reached)
    return table


def _unit_size(layers: Sequence[PlannedLayer]) -> int | None:
    """The weights that go with a unit, if that is more than one and the same for all."""
    sizes = {layer.unit_size for layer in layers}
    size = sizes.pop() if len(sizes) == 1 else None
    return size if size != 1 else None


def _spaced(steps: Sequence[PlannedStep]) -> list[PlannedStep]:
    """At most eight, the first and the last among them."""
    if len(steps) <= _SHOWN_STEPS:
        return list(steps)
    places = {round(i * (len(steps) - 1) / (_SHOWN_STEPS - 1)) for i in range(_SHOWN_STEPS)}
    return [steps[place] for place in sorted(places)]


def _refused(foresight: Foresight) -> Iterator[RenderableType]:
    """What stays as zeros, and why: each reason once, layers that differ in a number alone once."""
    told: dict[str, dict[str, int]] = {}
    for name, reason in foresight.refused:
        names = told.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", reason), {})
        names[_starred(name)] = names.get(_starred(name), 0) + 1
    for reason, names in told.items():
        listed = ", ".join(f"{name} ({times} x)" if times > 1 else name for name, times in names.items())
        yield Text(f"    not {listed}: {reason}")


def _excluded(plan: PruningPlan) -> Table:
    table = _table("left out", header=False)
    table.add_column(overflow="fold")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    together: dict[tuple[str, str], list[str]] = {}
    for exclusion in plan.excluded:
        together.setdefault((_starred(exclusion.name), exclusion.reason), []).append(exclusion.name)
    for (starred, reason), names in list(together.items())[:_SHOWN_ROWS]:
        several = len(names) > 1
        table.add_row(starred if several else names[0], f"{len(names)} x" if several else "", reason)
    _rest(table, len(together) - _SHOWN_ROWS, "rows")
    return table


def _table(title: str, *, header: bool = True) -> Table:
    return Table(
        title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim", show_header=header
    )


def _rest(table: Table, rest: int, what: str) -> None:
    if rest > 0:
        table.add_row(f"and {rest} more {what}; plan=json has all")


def _count(number: int) -> str:
    return f"{number / 1e6:,.1f}M" if number >= 1e6 else f"{number / 1e3:,.1f}k"


def _bytes(count: int) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"
