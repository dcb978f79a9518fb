"""What is dead but stays, and why: so that the report is honest and short."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from tritprune.slimming.attention import Attention
from tritprune.slimming.forms import distinct
from tritprune.slimming.linears import is_linear
from tritprune.slimming.places import Place, count_heads, first_atoms, is_empty
from tritprune.slimming.rules_sums import GROUPED
from tritprune.slimming.units import Units
from tritprune.slimming.walk import Walk

COMPUTED = "its weight is computed while it runs"


@dataclass(frozen=True)
class Refusal:
    """Something dead that was not cut.

    Args:
        kind: "units", "heads", "rows" or "columns".
        where: dotted name of the module.
        reason: how much, and why it stays.
    """

    kind: str
    where: str
    reason: str


def explain_leftovers(units: Units, places: list[Place]) -> list[Refusal]:
    """The dead heads, and the rows and columns of zeros that stay, with the reasons; each dead thing once."""
    walk = units.last_walk
    _, why = units.dead(walk)
    told = np.zeros(units.weights.size, bool)
    refusals = [*_kept_units(units, places, told), *_dead_heads(units, places, told)]
    heads = {place.family for place in places if place.attentions}
    attentions = [attention for place in places for attention in place.attentions]
    empty = {name for attention in attentions if is_empty(units, attention) for name in attention.feeding}
    for name, module in units.model.named_modules():
        if name in empty:
            continue
        if is_linear(module) or isinstance(module, nn.modules.conv._ConvNd):
            refusals += _of_layer(units, walk, name, module, why, told, heads)
    return refusals + [entry for name in _stacked(walk) for entry in _of_experts(units, name)]


def _kept_units(units: Units, places: list[Place], told: np.ndarray) -> list[Refusal]:
    """One entry for each place where a unit stays although all are dead, or to round a width."""
    refusals: list[Refusal] = []
    for place in places:
        members = units.members(place.family)
        reasons: dict[str, int] = {}
        for unit in members:
            if unit in units.kept and not units.weights.gone[unit]:
                reasons[units.kept[unit]] = reasons.get(units.kept[unit], 0) + 1
                told |= units.unit == unit
        for reason, count in reasons.items():
            if place.attentions:
                text = reason.replace("units", "heads")
                left = count_heads(units, place.attentions[0]).after
                if left > 1:  # of grouped queries, those of one key
                    text = text.replace("one stays", f"{left} stay, which share a key")
                kind, where = "heads", place.attentions[0].where
            else:
                kind, where, text = "units", place.readers[0], reason
            if "multiples" in reason:
                text = f"{count} of {len(members)} {kind} are dead but stay: {reason}"
            refusals.append(Refusal(kind, where, text))
    return refusals


def _dead_heads(units: Units, places: list[Place], told: np.ndarray) -> list[Refusal]:
    """One entry for each attention that has heads which its output linear can do without, and keeps them."""
    refusals: list[Refusal] = []
    for place in places:
        for attention in place.attentions:
            heads = _staying(units, attention, told)
            reasons: dict[str, int] = {}
            for atoms in heads:
                atom = int(atoms[0])
                reason = units.reason(atom) or units.tie(atom) or _held_beside(units, attention)
                reason = reason or "other heads need the keys and values that they share"
                reasons[reason] = reasons.get(reason, 0) + 1
                told[atoms] = True
                if units.reason(atom):
                    told |= units.unit == units.unit[atom]
            total = count_heads(units, attention).before
            refusals += [
                Refusal("heads", attention.where, f"{count} of {total} heads are dead but stay: {reason}")
                for reason, count in reasons.items()
            ]
    return refusals


def _held_beside(units: Units, attention: Attention) -> str | None:
    """Why rows of query, key or value must stay, where the heads are no units of their own."""
    for layer in attention.feeding:
        for (name, dim), atoms in units.dims.items():
            if dim == 0 and name.rpartition(".")[0] == layer:
                held = [unit for unit in distinct(units.unit[atoms]).tolist() if unit in units.pinned]
                if held:
                    return units.pinned[held[0]]
    return None


def _staying(units: Units, attention: Attention, told: np.ndarray) -> list[np.ndarray]:
    """The atoms that the output linear reads, head by head, of the heads that it can do without and that stay."""
    atoms, fine = units.can_do_without(str(attention.output), units.last_walk)
    queries = first_atoms(units, attention.queries)
    if not len(atoms) or queries is None or len(atoms) % len(queries):
        return []
    heads, dead = atoms.reshape(len(queries), -1), fine.reshape(len(queries), -1).all(axis=1)
    return [head for head in heads[dead] if not units.weights.gone[head].any() and not told[head[0]]]


def _of_layer(
    units: Units, walk: Walk, name: str, module: nn.Module, why: dict[int, str], told: np.ndarray, heads: set[int]
) -> list[Refusal]:
    refusals: list[Refusal] = []
    parameter = units.parameter_name(module.weight)  # type: ignore[arg-type]
    if parameter is None or not units.graph.readers_of_parameter(parameter):
        for kind, dim in (("rows", 0), ("columns", 1)):
            weight: Tensor = module.weight.detach()  # type: ignore[operator]
            zero = ~(weight != 0).transpose(0, dim).flatten(1).any(1)
            if zero.any():
                count = f"{int(zero.sum())} of {len(zero)} {kind} are dead but stay"
                refusals.append(Refusal(kind, name, f"{count}: {_aside(units, name, module)}"))
        return refusals
    turned = type(module).__name__ == "Conv1D" or getattr(module, "transposed", False)
    for kind, dim in (("rows", int(turned)), ("columns", 1 - int(turned))):
        atoms = units.dims[parameter, dim]
        gone = units.weights.gone[atoms]
        if units.weights.gone_of(parameter, 1 - dim).all():  # nothing is left of the weight
            continue
        zero = units.weights.zeros(parameter, dim) & ~gone
        reasons: dict[str, int] = {}
        for atom in atoms[zero].tolist():
            if told[atom]:
                continue
            reason = _shared(units, atom) or units.tie(atom)
            reason = reason or ("a width of 1 is not followed" if len(atoms) == 1 else None)
            reason = reason or _of_living(units, kind, atom, why, heads)
            reasons[reason] = reasons.get(reason, 0) + 1
        left = int((~gone).sum())
        refusals += [
            Refusal(kind, name, f"{count} of {left} {kind} are dead but stay: {reason}")
            for reason, count in reasons.items()
        ]
    return refusals


def _aside(units: Units, name: str, module: nn.Module) -> str:
    """Why the graph does not read a layer's weight as a parameter."""
    own = (f"{name}.{key}" for key, _ in module.named_parameters())
    if any(units.graph.readers_of_parameter(key) for key in own if not key.endswith(".bias")):
        return COMPUTED
    return "it does not run on the example inputs"


def _stacked(walk: Walk) -> list[str]:
    """The weights of all experts in one tensor [experts, .., ..], each once."""
    return list(dict.fromkeys(reader.weight for reader in walk.readers if reader.node.kind in GROUPED))


def _of_experts(units: Units, name: str) -> list[Refusal]:
    """Units that single experts can do without: a tensor of all experts has one width."""
    (reader, *_) = (r for r in units.walk.readers if r.weight == name)
    weight = units.weights.tensors[name]
    zero = ~(weight != 0).any(dim=3 - reader.dim).cpu().numpy()  # [experts, units]
    gone = units.weights.gone_of(name, reader.dim)
    count = int(zero[:, ~zero.all(0)].sum())
    where, refusals = name.rpartition(".")[0], []
    if count:
        reason = "all experts are one tensor, and a unit goes only where it is dead in each of them"
        refusals.append(Refusal("columns", where, f"{count} of {zero.size} columns are dead but stay: {reason}"))
    reasons: dict[str, int] = {}
    for atom in units.dims[name, reader.dim][zero.all(0) & ~gone].tolist():
        reason = units.reason(atom) or "their units are alive"
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, number in reasons.items():
        text = f"{number} of {zero.shape[1]} columns are dead but stay: {reason}"
        refusals.append(Refusal("columns", where, text))
    return refusals


def _shared(units: Units, atom: int) -> str | None:
    """Why the unit of an atom must stay, and how many layers have its width if these are many."""
    reason = units.reason(atom)
    if reason is None or int(units.unit[atom]) not in units.pinned:
        return reason
    family = int(units.family[atom])
    layers = {name for (name, _), atoms in units.dims.items() if len(atoms) and (units.family[atoms] == family).any()}
    count = len({name.rpartition(".")[0] for name in layers if units.weights.tensors[name].dim() > 1})
    return f"{reason}; {count} layers share their width" if count > 2 else reason


def _of_living(units: Units, kind: str, atom: int, why: dict[int, str], heads: set[int]) -> str:
    """Why a row or column of zeros is part of a unit that is needed."""
    unit = int(units.unit[atom])
    if int(units.family[atom]) in heads:
        return "they belong to heads that stay, and all heads have the same size"
    if unit not in why:
        return "nothing reads them on the example inputs"
    return f"their units are alive: {why[unit]}"


def idle_readers(units: Units) -> dict[int, str]:
    """Widths that a layer may read which does not run on the example inputs: family -> why it stays.

    Such a layer keeps its size, so whatever has that size may be what it reads; unless a neighbour that does not run
    either makes it.
    """
    idle: list[tuple[str, int, int]] = []
    for name, module in units.model.named_modules():
        if not (is_linear(module) or isinstance(module, nn.modules.conv._ConvNd)):
            continue
        parameter = units.parameter_name(module.weight)  # type: ignore[arg-type]
        unread = parameter is None or not units.graph.readers_of_parameter(parameter)
        if unread and _aside(units, name, module) != COMPUTED:
            turned = type(module).__name__ == "Conv1D" or getattr(module, "transposed", False)
            shape = tuple(module.weight.shape)  # type: ignore[arg-type]
            idle.append((name, shape[int(not turned)], shape[int(turned)]))
    held: dict[int, str] = {}
    for name, reads, _ in idle:
        parent = name.rpartition(".")[0]
        if any(makes == reads and other.rpartition(".")[0] == parent for other, _, makes in idle):
            continue
        for atoms in units.dims.values():
            for family in distinct(units.family[atoms]).tolist() if len(atoms) == reads else ():
                held.setdefault(family, f"{name} does not run on the example inputs and may read them")
    return held
