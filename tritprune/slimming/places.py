"""Where the units of a model are: its feed-forward blocks, attentions, channels and streams, by the names of layers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from tritprune.slimming.attention import Attention, common_parent, find_attention
from tritprune.slimming.forms import Array, distinct
from tritprune.slimming.nodes import Value
from tritprune.slimming.surgery import set_counts
from tritprune.slimming.units import Units
from tritprune.slimming.walk import Reader


@dataclass(frozen=True)
class Cut:
    """What was cut at one place.

    Args:
        kind: "feed-forward units", "channels" or "heads".
        where: dotted name: of the layer that reads the units, of the convolution that makes the channels, or of the
            attention module.
        before: number of units before.
        after: number of units after; 0 where nothing is left of the block but a bias.
        unit: "unit", "channel" or "head".
    """

    kind: str
    where: str
    before: int
    after: int
    unit: str


@dataclass
class Place:
    """Units that share a width: one family.

    Args:
        family: its number in :class:`Units`.
        makers: layers whose rows make the units, in order of execution.
        readers: layers whose columns read them.
        dims: the dimensions of parameters that they live in.
        attentions: the attention blocks whose heads they are.
        convolutions: whether a layer among them is a convolution.
        held: whether none of the units can go.
    """

    family: int
    makers: list[str]
    readers: list[str]
    dims: list[tuple[str, int]]
    attentions: list[Attention] = field(default_factory=list)
    convolutions: bool = False
    held: bool = False

    @property
    def kind(self) -> str:
        """attention, channels, feed-forward, or stream: a width that more than one layer reads."""
        if self.attentions:
            return "attention"
        if self.held and len(self.makers) + len(self.readers) > 2:
            return "stream"
        if self.convolutions:
            return "channels"
        return "feed-forward" if len(self.readers) == 1 else "stream"


def find_places(units: Units) -> list[Place]:
    """Every width between two layers, in the order in which the units are first read."""
    model, walk = units.model, units.walk
    dims: dict[int, list[tuple[str, int]]] = {}
    for key, atoms in units.dims.items():
        for family in distinct(units.family[atoms]).tolist():
            dims.setdefault(family, []).append(key)
    read: dict[int, list[tuple[str, int]]] = {}
    for reader in walk.readers:
        for family in distinct(units.family[reader.group.atoms]).tolist():
            read.setdefault(family, []).append((reader.weight, reader.dim))
    places: list[Place] = []
    for family, readers in read.items():
        made = [key for key in dims[family] if key not in readers and units.weights.tensors[key[0]].dim() > 1]
        made = made or [key for key in dims[family] if key not in readers]
        if not made:
            continue
        names = [_layer(name) for name, _ in dict.fromkeys(readers)]
        place = Place(family, [_layer(name) for name, _ in made], names, dims[family])
        layers = [model.get_submodule(name) for name in (*place.makers, *place.readers)]
        place.held = units.obstacle(family) is not None
        place.convolutions = any(isinstance(layer, nn.modules.conv._ConvNd) for layer in layers)
        places.append(place)
    by_reader = {(name, family): place for place in places for name in place.readers for family in (place.family,)}
    for attention in find_attention(units.graph, model):
        for family in _families(units, attention):
            if (attention.output, family) in by_reader:
                by_reader[attention.output, family].attentions.append(attention)  # type: ignore[index]
    return places


def _families(units: Units, attention: Attention) -> list[int]:
    """The families of what the output linear of an attention reads."""
    atoms = [reader.group.atoms for reader in _output_readers(units, attention)]
    return distinct(units.family[np.concatenate(atoms)]).tolist() if atoms else []


def _output_readers(units: Units, attention: Attention) -> list[Reader]:
    return [reader for reader in units.walk.readers if _layer(reader.weight) == attention.output]


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


@dataclass(frozen=True)
class Heads:
    """The heads of an attention before and after.

    Args:
        before, after: number of query heads.
        keys_before, keys_after: number of key and value heads.
        size: size of a head.
    """

    before: int
    after: int
    keys_before: int
    keys_after: int
    size: int


def count_heads(units: Units, attention: Attention) -> Heads:
    """The heads of ``attention`` as traced, and those that are left."""
    queries = first_atoms(units, attention.queries)
    keys = first_atoms(units, attention.keys)
    gone = units.weights.gone
    size = (attention.queries.shape or (1,))[-1]
    before = len(queries) if queries is not None else attention.heads
    after = int((~gone[queries]).sum()) if queries is not None else before
    shared = 1 if keys is None else len(keys)
    if is_empty(units, attention):
        return Heads(before, 0, shared, 0, size)
    return Heads(before, after, shared, shared if keys is None else int((~gone[keys]).sum()), size)


def is_empty(units: Units, attention: Attention) -> bool:
    """Whether nothing is left of what the output linear of an attention reads."""
    atoms = [reader.group.atoms for reader in _output_readers(units, attention)]
    return bool(atoms) and bool(units.weights.gone[np.concatenate(atoms)].all())


def first_atoms(units: Units, value: Value) -> Array | None:
    """One atom of each head of queries or keys, each head once; None if no dimension counts heads."""
    form = units.walk.forms[value.name]
    counted = [dim for dim in (form.rank - 3, form.rank - 2, *range(form.rank - 3)) if dim >= 0]
    dim = next((dim for dim in counted if form.group(dim) is not None), None) if form.rank >= 3 else None
    group = form.group(dim) if dim is not None else None
    if group is None or dim is None:
        return None
    axis = group.axis(dim)
    atoms = np.moveaxis(group.atoms, axis, 0).reshape(group.atoms.shape[axis], -1)[:, 0]
    return distinct(atoms)


def cuts_of(units: Units, places: list[Place]) -> list[Cut]:
    """What was taken away, place by place: feed-forward units, channels, heads."""
    made: list[Cut] = []
    for place in places:
        if place.attentions:
            for attention in place.attentions:
                heads = count_heads(units, attention)
                if heads.after != heads.before:
                    made.append(Cut("heads", attention.where, heads.before, heads.after, "head"))
            continue
        read = dict.fromkeys((reader.weight, reader.dim) for reader in units.walk.readers)
        key = next(k for k in read if k in place.dims and _layer(k[0]) == place.readers[0])
        key = place.dims[0] if place.convolutions else key
        atoms = units.dims[key]
        left = int((~units.weights.gone[atoms]).sum())
        if left != len(atoms):
            kind, unit = ("channels", "channel") if place.convolutions else ("feed-forward units", "unit")
            where = _layer(key[0]) if place.convolutions else place.readers[0]
            made.append(Cut(kind, where, len(atoms), left, unit))
    order = ["feed-forward units", "channels", "heads"]
    return sorted(made, key=lambda cut: order.index(cut.kind))


def found_of(units: Units, places: list[Place]) -> list[dict[str, Any]]:
    """Every place in plain values, with the reason if nothing can be cut there."""
    made: list[dict[str, Any]] = []
    for place in places:
        obstacle = units.obstacle(place.family)
        if place.attentions:
            for attention in place.attentions:
                heads = count_heads(units, attention)
                linears = {"qkv": attention.feeding, "ffn": [attention.output] if attention.output else []}
                counts = {"heads": heads.before, "key_value_heads": heads.keys_before}
                made.append({"kind": "attention", "where": attention.where, **linears, **counts, "obstacle": obstacle})
            continue
        count = len(units.members(place.family))
        item: dict[str, Any] = {"kind": place.kind, "where": place.readers[0]}
        if place.kind == "feed-forward":
            item |= {"root_linear": place.readers[0], "target_frontier_linears": list(dict.fromkeys(place.makers))}
        else:
            item |= {"where": place.makers[0], "makers": place.makers, "readers": place.readers}
        made.append({**item, "units": count, "obstacle": obstacle})
    order = ["feed-forward", "channels", "stream", "attention"]
    return sorted(made, key=lambda item: order.index(item["kind"]))


def recount(model: nn.Module, units: Units, places: list[Place], style: str) -> None:
    """Set the head counts of the attentions that lost heads."""
    for place in places:
        for attention in place.attentions:
            heads = count_heads(units, attention)
            if heads.after == heads.before:
                continue
            names = dict.fromkeys((attention.where, common_parent([*attention.feeding, str(attention.output)])))
            modules = [model.get_submodule(name) for name in names if name.count(",") == 0]
            changes = {"heads": (heads.before, heads.after), "keys": (heads.keys_before, heads.keys_after)}
            set_counts(modules, changes, heads.size, style)
