"""From a model and settings to layer groups: every layer is in one group or has a reason why not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tritprune.errors import ConfigError
from tritprune.pruners.group import LayerGroup
from tritprune.pruners.layers import Exclusion, Inventory, choose, take_inventory
from tritprune.pruners.reports import PrunedLayer
from tritprune.pruners.settings import GroupSettings, check_groups, resolve_groups


@dataclass(frozen=True)
class Grouping:
    """A model's layers, as they will be pruned.

    Args:
        groups: the layer groups.
        layers: every layer that is pruned, in registration order.
        excluded: every layer that is not, with the reason.
    """

    groups: tuple[LayerGroup, ...]
    layers: tuple[PrunedLayer, ...]
    excluded: tuple[Exclusion, ...]


def group_layers(
    model: nn.Module, defaults: Mapping[str, Any], groups: Sequence[Mapping[str, Any]] | None, seed: int
) -> Grouping:
    """Build the groups.

    Args:
        model: whose layers are grouped.
        defaults: settings, by the names of :class:`GroupSettings`.
        groups: settings per group over the defaults; None: one group.
        seed: for criteria that draw random numbers.

    Raises:
        ConfigError: a setting, a glob or a layer in two groups.
        BudgetError: caps or floors that contradict a target.
    """
    check_groups(groups)
    inventory = take_inventory(model)
    built: list[LayerGroup] = []
    excluded = list(inventory.excluded)
    for settings in resolve_groups(GroupSettings(**_with_shared_end(defaults, groups)), groups):
        views, left_out = choose(
            inventory, settings.include, settings.exclude, exclude_head=settings.exclude_head, group=settings.name
        )
        group = LayerGroup(settings, views, model, seed)
        built.append(group)
        excluded = left_out + group.excluded + excluded
    layers = _pruned_layers(built)
    return Grouping(
        tuple(built),
        tuple(layers[view.name] for view in inventory.views if view.name in layers),
        _exclusions(inventory, excluded, layers),
    )


def _with_shared_end(defaults: Mapping[str, Any], groups: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """Where every group has its own ``end_step`` the shared one may be missing."""
    ends = [dict(group).get("end_step") for group in groups or ()]
    given = [end for end in ends if end is not None]
    if defaults["end_step"] is None and ends and len(given) == len(ends):
        return {**defaults, "end_step": max(given)}
    return dict(defaults)


def _pruned_layers(groups: Sequence[LayerGroup]) -> dict[str, PrunedLayer]:
    layers: dict[str, PrunedLayer] = {}
    for group in groups:
        for site in group.sites:
            for view in site.views:
                if view.name in layers:
                    raise ConfigError(
                        f"{view.name} is in two pruner groups, '{layers[view.name].group}' and '{group.name}'"
                    )
                unit = group.pattern.unit_name(site)
                layers[view.name] = PrunedLayer(
                    view.name, group.name, group.pattern.label, view.elements, unit, site.grid.units
                )
    return layers


def _exclusions(
    inventory: Inventory, excluded: Sequence[Exclusion], pruned: Mapping[str, PrunedLayer]
) -> tuple[Exclusion, ...]:
    """One reason for every layer that no group prunes, in registration order."""
    reasons: dict[str, Exclusion] = {}
    for exclusion in excluded:
        reasons.setdefault(exclusion.name, exclusion)
    for view in inventory.views:
        reasons.setdefault(view.name, Exclusion(view.name, "not included"))
    order = {name: i for i, name in enumerate(inventory.order)}
    return tuple(sorted((e for e in reasons.values() if e.name not in pruned), key=lambda e: order[e.name]))
