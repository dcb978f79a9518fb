"""The plan on the screen: what would happen, before data is read or a step is trained."""

from collections.abc import Iterator, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from tritprune.pruners import PlannedStep, PruningPlan

_SHOWN_STEPS = 12
_SHOWN_LAYERS = 60


def plan_view(plan: PruningPlan, command: str) -> Iterator[RenderableType]:
    """What to print, from top to bottom.

    Args:
        plan: the plan.
        command: how to run it.
    """
    yield Text(f"{plan}\n", style="bold")
    yield _layers(plan)
    for group in plan.groups:
        if group.steps:
            yield _steps(group.name, group.steps, group.elements)
        yield Text(
            f"  memory: scores {_bytes(group.score_bytes)}, masks {_bytes(group.mask_bytes)}\n"
            f"  the slimmer can cut: {group.removable}\n"
        )
    if plan.excluded:
        yield _excluded(plan)
    yield Text(f"nothing was trained; go:  {command}", style="green")


def _layers(plan: PruningPlan) -> Table:
    table = Table(title="layers", title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
    several = len(plan.groups) > 1
    capped = any(layer.floor > 0 or layer.cap < 1 for layer in plan.layers)
    locked = any(layer.locked for layer in plan.layers)
    table.add_column("layer", overflow="fold")
    for name, shown in (("group", several), ("shape", True), ("unit", True), ("units", True), ("weights", True)):
        if shown:
            table.add_column(name, justify="left" if name in ("group", "unit") else "right")
    if capped:
        table.add_column("floor to cap", justify="right")
    if locked:
        table.add_column("zero now", justify="right")
    for layer in plan.layers[:_SHOWN_LAYERS]:
        row = [layer.name, *([layer.group] if several else []), "x".join(map(str, layer.shape)), layer.unit]
        row += [f"{layer.units:,}", f"{layer.elements:,}"]
        row += [f"{layer.floor:.0%} to {layer.cap:.0%}"] if capped else []
        table.add_row(*row, *([f"{layer.locked:,}"] if locked else []))
    rest = len(plan.layers) - _SHOWN_LAYERS
    if rest > 0:
        table.add_row(f"and {rest} more layers; plan=json has all")
    return table


def _steps(name: str, steps: Sequence[PlannedStep], elements: int) -> Table:
    table = Table(
        title=f"mask updates of {name}: {len(steps)}", title_justify="left", box=None, padding=(0, 2, 0, 0),
        header_style="dim",
    )  # fmt: skip
    for column in ("after step", "target", "may go", "go", "sparsity"):
        table.add_column(column, justify="right")
    for step in _spaced(steps):
        exact = step.least == step.most
        go = f"{step.most:,}" if exact else f"{step.least:,} to {step.most:,}"
        reached = f"{step.most / elements:.4%}" if exact else f"within one unit of {step.most / elements:.4%}"
        table.add_row(f"{step.step:,}", f"{step.target:.4f}", f"{step.budget:,}", go, reached)
    return table


def _spaced(steps: Sequence[PlannedStep]) -> list[PlannedStep]:
    """At most twelve, the first and the last among them."""
    if len(steps) <= _SHOWN_STEPS:
        return list(steps)
    places = {round(i * (len(steps) - 1) / (_SHOWN_STEPS - 1)) for i in range(_SHOWN_STEPS)}
    return [steps[place] for place in sorted(places)]


def _excluded(plan: PruningPlan) -> Table:
    table = Table(title="left out", title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(overflow="fold")
    table.add_column(overflow="fold")
    for exclusion in plan.excluded[:_SHOWN_LAYERS]:
        table.add_row(exclusion.name, exclusion.reason)
    rest = len(plan.excluded) - _SHOWN_LAYERS
    if rest > 0:
        table.add_row(f"and {rest} more; plan=json has all", "")
    return table


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count:,} bytes"
