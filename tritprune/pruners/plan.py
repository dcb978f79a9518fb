"""The plan: what a pruner will do, known before any step: units, budgets, exact counts, memory, what is left out."""

from collections.abc import Sequence
from dataclasses import dataclass

from tritprune.patterns import HeadsPattern, Site
from tritprune.pruners.group import LayerGroup
from tritprune.pruners.layers import Exclusion
from tritprune.pruners.reports import LayerCount
from tritprune.pruners.settings import SCORE_DTYPES
from tritprune.selection import at_least, exact_budget, largest_unit


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that will be pruned.

    Args:
        name: dotted name.
        group: its layer group.
        pattern: the group's pattern.
        shape: ``(R, C)`` of the weight view.
        unit: what a unit is.
        units: how many it has.
        elements: weights.
        floor: fraction of zeros that it has at least in the end.
        cap: fraction of zeros that it has at most.
        locked: zeros that are there from the start and stay.
        unit_size: weights that go with a unit, over all layers that it is in; None: units of several sizes.
        least_units: units that go at least in the end; None with units of several sizes.
        most_units: units that go at most; None with units of several sizes.
        capped: whether the cap is the user's, and not just the most that the pattern can prune.
    """

    name: str
    group: str
    pattern: str
    shape: tuple[int, int]
    unit: str
    units: int
    elements: int
    floor: float
    cap: float
    locked: int
    unit_size: int | None
    least_units: int | None
    most_units: int | None
    capped: bool


@dataclass(frozen=True)
class PlannedStep:
    """One mask update of a group.

    Args:
        step: optimizer step.
        target: sparsity asked for.
        budget: elements that may go.
        least: elements that go at least; with units of one size the same as ``most``.
        most: elements that go at most, in whole units.
    """

    step: int
    target: float
    budget: int
    least: int
    most: int


@dataclass(frozen=True)
class PlannedGroup:
    """A layer group.

    Args:
        name: of the group.
        words: criterion, pattern, scope and schedule in a line.
        elements: weights of all its layers.
        steps: its mask updates.
        score_bytes: memory of the running scores while there are any.
        mask_bytes: memory of the masks.
        removable: what the slimmer will be able to cut out.
    """

    name: str
    words: str
    elements: int
    steps: tuple[PlannedStep, ...]
    score_bytes: int
    mask_bytes: int
    removable: str


@dataclass(frozen=True)
class PruningPlan:
    """Everything that is known before the first step; ``vars()`` of its parts are plain Python.

    Args:
        layers: one row a layer, in registration order.
        groups: one entry a layer group.
        excluded: what is not pruned, and why.
    """

    layers: tuple[PlannedLayer, ...]
    groups: tuple[PlannedGroup, ...]
    excluded: tuple[Exclusion, ...]

    @property
    def total(self) -> int:
        """Weights of all layers that are pruned: the denominator of sparsity."""
        return sum(layer.elements for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers with {self.total:,} weights, {len(self.excluded)} left out"]
        for group in self.groups:
            last = group.steps[-1] if group.steps else None
            zeros = "nothing new is pruned" if last is None else f"{_between(last)} zeros at step {last.step}"
            updates = "1 mask update" if len(group.steps) == 1 else f"{len(group.steps)} mask updates"
            lines.append(f"{group.name}: {group.words}; {updates}, {zeros}")
        return "\n".join(lines)


def plan_of(
    groups: Sequence[LayerGroup], excluded: Sequence[Exclusion], counts: dict[str, LayerCount], order: Sequence[str]
) -> PruningPlan:
    """The plan of a pruner's groups.

    Args:
        groups: the layer groups.
        excluded: layers that are left out.
        counts: what the masks prune already.
        order: layer names in registration order.
    """
    rows = {row.name: row for group in groups for row in _layers(group, counts)}
    return PruningPlan(tuple(rows[name] for name in order), tuple(_group(group) for group in groups), tuple(excluded))


def achieved(group: LayerGroup, target: float) -> tuple[int, int, int]:
    """Elements that may go at a sparsity, and how many go at least and at most in whole units."""
    scopes = [group.sites] if group.settings.scope == "global" else [[site] for site in group.sites]
    budget = least = most = 0
    for sites in scopes:
        own = exact_budget(target, sum(site.elements for site in sites))
        reachable = min(own, sum(site.grid.elements for site in sites))
        sizes = {site.grid.uniform_size for site in sites}
        size = sizes.pop() if len(sizes) == 1 else None
        budget += own
        if size:
            least += reachable // size * size
            most += reachable // size * size
        else:
            least += max(0, reachable - max(largest_unit(site.grid) for site in sites) + 1)
            most += reachable
    return budget, least, most


def _layers(group: LayerGroup, counts: dict[str, LayerCount]) -> list[PlannedLayer]:
    settings = group.settings
    return [
        PlannedLayer(
            view.name,
            group.name,
            group.pattern.label,
            view.shape,
            group.pattern.unit_name(site),
            site.grid.units,
            view.elements,
            settings.min_layer_sparsity,
            min(settings.max_layer_sparsity, group.pattern.max_sparsity),
            counts[view.name].zeros,
            *_unit_bounds(group, site),
            settings.max_layer_sparsity < group.pattern.max_sparsity,
        )
        for site in group.sites
        for view in site.views
    ]


def _unit_bounds(group: LayerGroup, site: Site) -> tuple[int | None, int | None, int | None]:
    """The size of a unit, and how many units of a site go at least and at most in the end."""
    settings, size = group.settings, site.grid.uniform_size
    if size is None:
        return None, None, None
    least = -(-at_least(settings.min_layer_sparsity, site.elements) // size)
    most = min(exact_budget(settings.max_layer_sparsity, site.elements), site.grid.elements) // size
    return size, least, most


def _group(group: LayerGroup) -> PlannedGroup:
    settings, times = group.settings, group.times
    steps: list[PlannedStep] = []
    step: int | None = times.start
    while step is not None:
        target = group.target_at(step)
        if target > 0:
            steps.append(PlannedStep(step, target, *achieved(group, target)))
        step = times.next(step)
    blocks = sum(mask.numel() for mask in group.flat_masks)
    scored = blocks * SCORE_DTYPES[settings.score_dtype].itemsize if steps else 0
    words = f"criterion {type(group.criterion).__name__}, pattern {group.pattern.label}, {settings.scope} scope"
    return PlannedGroup(group.name, words, group.elements, tuple(steps), scored, blocks, _removable(group, steps[-1:]))


def _removable(group: LayerGroup, last: Sequence[PlannedStep]) -> str:
    """What slimming can make of the last masks."""
    pattern = group.pattern
    if isinstance(pattern, HeadsPattern):
        size = min(largest_unit(site.grid) for site in group.sites)
        heads = sum(site.grid.units for site in group.sites)
        gone = f"{last[0].least // size}" if last else "0"
        return f"whole heads: about {gone} of {heads}; an attention that lost all keeps one"
    if all(_is_channel(site) for site in group.sites):
        return "whole channels, where the layer before or behind can lose them too (residual streams cannot)"
    return "only feed-forward units and heads whose weights all happen to be pruned; the rest stays as zeros"


def _is_channel(site: Site) -> bool:
    (rows, columns), (n, m) = site.views[0].shape, site.blocks[0]
    return (n >= rows and m == 1) or (m >= columns and n == 1)


def _between(step: PlannedStep) -> str:
    return f"{step.most:,}" if step.least == step.most else f"{step.least:,} to {step.most:,}"
