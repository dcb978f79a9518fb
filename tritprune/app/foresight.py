"""What the slimmer will be able to cut out, read from the traced model before anything is trained."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tritprune.errors import TritpruneError
from tritprune.pruners import PlannedGroup, PlannedLayer, PruningPlan
from tritprune.slimming import JitBasicSearcher, survey

Found = dict[str, Any]
"""A place that the slimmer looks at, as in :attr:`tritprune.slimming.SlimResult.found`."""


@dataclass(frozen=True)
class Foresight:
    """What slimming can make of one group's masks.

    Args:
        group: its name.
        text: in a sentence.
        parameters: how many of the model's parameters will go, about.
        refused: layers or attentions whose units stay as zeros, and why.
    """

    group: str
    text: str
    parameters: int
    refused: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _Place:
    """A layer or an attention with whole units: what a unit is, how many, what each takes along, why it cannot go."""

    name: str
    units: int
    parameters: int
    obstacle: str | None


def foresee(model: nn.Module, plan: PruningPlan, example_inputs: Any = None) -> list[Foresight]:
    """One entry a group.

    Args:
        model: traced, in evaluation mode; where that fails the entries say so.
        plan: of its pruning.
        example_inputs: made-up inputs; None: what the model's configuration says.
    """
    try:
        found = survey(model, JitBasicSearcher(model, example_inputs=example_inputs).static_graph)
    except TritpruneError as error:
        reason = " ".join(str(error).split())
        return [
            Foresight(group.name, f"{group.removable} (the model could not be traced before the run: {reason})", 0, ())
            for group in plan.groups
        ]
    return [_of_group(group, plan, found, model) for group in plan.groups]


def _of_group(group: PlannedGroup, plan: PruningPlan, found: Sequence[Found], model: nn.Module) -> Foresight:
    layers = {layer.name: layer for layer in plan.layers if layer.group == group.name}
    places = list(_places(layers, found, model))
    if not places:
        kinds = [item["kind"] for item in found if item["obstacle"] is None]
        return Foresight(
            group.name,
            f"nothing for certain; of {kinds.count('feed-forward')} feed-forward blocks, "
            f"{kinds.count('attention')} attentions and {kinds.count('channels')} convolutions it cuts the "
            "units whose weights all happen to go, the rest stays as zeros",
            0,
            (),
        )
    word = "head" if any(layer.pattern == "head" for layer in layers.values()) else "unit"
    able = [place for place in places if place.obstacle is None]
    share = group.steps[-1].most / group.elements if group.steps else 0.0
    units, total = sum(place.units for place in able), sum(place.units for place in places)
    gone = round(share * units)
    parameters = round(share * sum(place.units * place.parameters for place in able))
    where = "attentions" if word == "head" else "layers"
    text = f"about {gone:,} of {total:,} {word}s, in {len(able)} of {len(places)} {where}, {parameters:,} parameters"
    if word == "head" and able:
        text += "; an attention that lost all keeps one"
    return Foresight(
        group.name, text, parameters, tuple((p.name, p.obstacle) for p in places if p.obstacle is not None)
    )


def _places(layers: dict[str, PlannedLayer], found: Sequence[Found], model: nn.Module) -> Iterator[_Place]:
    """Where a group prunes whole columns, whole rows or heads; nothing where its units are smaller than that."""
    ends = {name: item for item in found for name in _ends(item)}
    starts = {name: item for item in found for name in _starts(item)}
    attentions = [item for item in found if item["kind"] == "attention"]
    heads = {name: item for item in attentions for name in item["ffn"]}
    for layer in layers.values():
        rows, columns = layer.shape
        if layer.pattern == "head":
            attention = heads.get(layer.name)
            if attention is not None:
                going = sum(_size(model, name) for name in attention["qkv"]) + rows * columns
                yield _Place(layer.name, layer.units, going // layer.units, attention["obstacle"])
            elif all(layer.name not in item["qkv"] for item in attentions):
                yield _Place(layer.name, 0, 0, "the traced graph shows no attention around it")
        elif layer.unit.startswith(f"{rows}x"):
            missing = "what it reads is no output of layers alone (a mixing of positions)"
            yield _whole(layer, ends.get(layer.name), _ends, missing, model)
        elif layer.unit.endswith(f"x{columns}"):
            missing = "what it makes is not read by layers alone (a head, the model's output)"
            yield _whole(layer, starts.get(layer.name), _starts, missing, model)


def _ends(item: Found) -> list[str]:
    """The layers that read the units of a place that is no attention."""
    return [item["root_linear"]] if "root_linear" in item else item.get("readers", [])


def _starts(item: Found) -> list[str]:
    """The layers that make them."""
    return item.get("target_frontier_linears", item.get("makers", []))


def _whole(
    layer: PlannedLayer, item: Found | None, side: Callable[[Found], list[str]], missing: str, model: nn.Module
) -> _Place:
    """Units that one side of a place loses: they go if no other layer on that side keeps them."""
    if item is None:
        return _Place(layer.name, layer.units, 0, missing)
    read = sum(model.get_parameter(f"{name}.weight").numel() for name in dict.fromkeys(_ends(item)))
    going = read + sum(_size(model, name) for name in dict.fromkeys(_starts(item)))
    others = [name for name in side(item) if name != layer.name]
    kept = (
        f"{', '.join(others)} {'reads' if side is _ends else 'makes'} the same units and keeps them" if others else None
    )
    gated = side is _starts and item["kind"] == "feed-forward"
    return _Place(layer.name, layer.units, going // layer.units, item["obstacle"] or (None if gated else kept))


def _size(model: nn.Module, layer: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(layer).parameters())
