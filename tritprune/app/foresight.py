"""What the slimmer will be able to cut out, read from the traced model before anything is trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tritprune.errors import TritpruneError
from tritprune.pruners import PlannedGroup, PlannedLayer, PruningPlan
from tritprune.slimming import JitBasicSearcher
from tritprune.slimming.attention import Attention, find_attention
from tritprune.slimming.feed_forward import FeedForward, find_feed_forward


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
        graph = JitBasicSearcher(model, example_inputs=example_inputs).static_graph
        blocks, attentions = find_feed_forward(graph, model), find_attention(graph, model)
    except TritpruneError as error:
        reason = " ".join(str(error).split())
        return [
            Foresight(group.name, f"{group.removable} (the model could not be traced before the run: {reason})", 0, ())
            for group in plan.groups
        ]
    return [_of_group(group, plan, blocks, attentions, model) for group in plan.groups]


def _of_group(
    group: PlannedGroup,
    plan: PruningPlan,
    blocks: Sequence[FeedForward],
    attentions: Sequence[Attention],
    model: nn.Module,
) -> Foresight:
    layers = {layer.name: layer for layer in plan.layers if layer.group == group.name}
    places = list(_places(layers, blocks, attentions, model))
    if not places:
        able = [b.root for b in blocks if b.obstacle is None], [a for a in attentions if a.obstacle is None]
        return Foresight(
            group.name,
            f"nothing for certain; of {len(able[0])} feed-forward blocks and {len(able[1])} attentions it cuts the "
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


def _places(
    layers: dict[str, PlannedLayer], blocks: Sequence[FeedForward], attentions: Sequence[Attention], model: nn.Module
) -> Iterator[_Place]:
    """Where a group prunes whole columns, whole rows or heads; nothing where its units are smaller than that."""
    ends = {block.root: block for block in blocks}
    starts = {name: block for block in blocks for name in block.frontier}
    heads = {attention.output: attention for attention in attentions}
    for layer in layers.values():
        rows, columns = layer.shape
        if layer.pattern == "head":
            attention = heads.get(layer.name)
            if attention is not None:
                names = list(dict.fromkeys([*attention.query, *attention.key, *attention.value]))
                going = sum(_size(model, name) for name in names) + rows * columns
                yield _Place(attention.output or layer.name, layer.units, going // layer.units, attention.obstacle)
            elif all(layer.name not in (*a.query, *a.key, *a.value) for a in attentions):
                yield _Place(layer.name, 0, 0, "the traced graph shows no attention around it")
        elif layer.unit.startswith(f"{rows}x"):
            block = ends.get(layer.name)
            missing = "what it reads is no output of linears alone (a residual stream, a mixing of positions)"
            yield _whole(layer, block, missing, model)
        elif layer.unit.endswith(f"x{columns}"):
            block = starts.get(layer.name)
            missing = "what it makes is not read by one linear alone (a residual stream, a head, the model's output)"
            yield _whole(layer, block, missing, model)


def _whole(layer: PlannedLayer, block: FeedForward | None, missing: str, model: nn.Module) -> _Place:
    if block is None:
        return _Place(layer.name, layer.units, 0, missing)
    root = model.get_submodule(block.root)
    assert isinstance(root, nn.Linear)
    going = root.weight.numel() + sum(_size(model, name) for name in block.frontier)
    return _Place(layer.name, layer.units, going // layer.units, block.obstacle)


def _size(model: nn.Module, layer: str) -> int:
    return sum(parameter.numel() for parameter in model.get_submodule(layer).parameters())
