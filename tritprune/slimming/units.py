"""Which units of a model are dead: what goes together, what must stay and why, and what can be taken away exactly.

A unit is a set of atoms that stay or go together. It can go if nothing pins it, and if every weight that reads it
either has only zeros for it or reads a constant, which its bias can hold instead. Taking units away can leave others
dead, so this is repeated until nothing changes; the model itself is not touched.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from tritprune.slimming.forms import Array, components, distinct
from tritprune.slimming.nodes import Graph
from tritprune.slimming.rules_einsum import EINSUM
from tritprune.slimming.rules_elementwise import POINTWISE
from tritprune.slimming.rules_joins import JOINS
from tritprune.slimming.rules_lookups import LOOKUPS
from tritprune.slimming.rules_norms import NORMS
from tritprune.slimming.rules_recurrent import RECURRENT
from tritprune.slimming.rules_sums import SUMS
from tritprune.slimming.rules_views import VIEWS
from tritprune.slimming.walk import Reader, Walk, describe
from tritprune.slimming.weights import Weights

RULES = {**POINTWISE, **VIEWS, **JOINS, **LOOKUPS, **SUMS, **NORMS, **EINSUM, **RECURRENT}
"""The rule of each operation."""

PASSING = frozenset((*POINTWISE, *VIEWS, *JOINS, *LOOKUPS, *NORMS))
"""The operations that make no new width."""


@dataclass
class Units:
    """The units of a traced model, and those that were taken away so far.

    Attributes:
        unit: for each atom, its unit: the unit's smallest atom.
        family: for each atom, its family: units that share a dimension of a parameter; its smallest atom.
        pinned: unit -> why it must stay.
        kept: unit -> why it stays although it is dead.
        forbidden: families that must stay as they are, with the reason.
        one_stays: families that keep a unit where all are dead, with the reason.
    """

    model: nn.Module
    graph: Graph
    round_to: int = 1
    forbidden: dict[int, str] = field(default_factory=dict)
    one_stays: dict[int, str] = field(default_factory=dict)
    kept: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = Weights(self.model, self.graph)
        self.walk = self._walked()
        self.unit = _units(self.weights.size, self.walk.edges, [group.atoms for group in self.walk.split])
        self.last_walk = self.walk
        self.dims = {key: self.weights.atoms(*key) for key in self.weights.first}
        self.family = self._families()
        self.pinned: dict[int, str] = {}
        for atoms, reason in self.walk.pins:
            for unit in distinct(self.unit[atoms]).tolist():
                self.pinned.setdefault(unit, reason)

    def _walked(self) -> Walk:
        return Walk(self.graph, self.weights, RULES, PASSING, frozenset(VIEWS)).run()

    def take_away_all(self) -> None:
        """Take dead units away until no unit is dead but those that must stay."""
        while len(going := self._to_go(self.last_walk)):
            self._fold(self.last_walk, going)
            self.weights.take_away(np.flatnonzero(self._those(going)[self.unit[: len(self.weights.gone)]]))
            self.last_walk = self._walked()

    def dead(self, walk: Walk | None = None) -> tuple[Array, dict[int, str]]:
        """For each atom, whether all readers of its unit can do without it; by unit, the first reader that cannot."""
        walk = walk or self.walk
        read = np.zeros(self.weights.size, bool)
        alive = np.zeros(self.weights.size, bool)
        why: dict[int, str] = {}
        for readers in _by_weight(walk.readers):
            units = self.unit[readers[0].group.atoms]
            read[units] = True
            fine, reason = self._can_do_without(readers)
            alive[units[~fine]] = True
            for unit in distinct(units[~fine]).tolist():
                why.setdefault(unit, reason)
        dead = (read & ~alive)[self.unit]
        return dead, why

    def emptied(self, family: int) -> bool:
        """Whether all units of a family were taken away."""
        return bool(self.weights.gone[self.members(family)].all())

    def members(self, family: int) -> list[int]:
        """The units of a family."""
        return distinct(self.unit[self.family == family]).tolist()

    def reason(self, atom: int) -> str | None:
        """Why the unit of an atom must stay, dead or not; None if nothing holds it."""
        unit = int(self.unit[atom])
        return self.pinned.get(unit) or self.kept.get(unit) or self.forbidden.get(int(self.family[atom]))

    def tie(self, atom: int) -> str | None:
        """What ties the atoms of a unit together that could otherwise go alone."""
        unit = self.unit[atom]
        return next((reason for atoms, reason in self.walk.ties if (self.unit[atoms] == unit).any()), None)

    def obstacle(self, family: int) -> str | None:
        """Why no unit of a family can go; None if one can."""
        reasons = [self.pinned.get(unit) or self.forbidden.get(family) for unit in self.members(family)]
        return reasons[0] if all(reasons) else None

    def parameter_name(self, tensor: torch.Tensor) -> str | None:
        """The name under which the graph reads a parameter; None if it does not."""
        return next((name for name, own in self.weights.tensors.items() if own.data_ptr() == tensor.data_ptr()), None)

    def can_do_without(self, layer: str, walk: Walk) -> tuple[Array, Array]:
        """The atoms of the dimension that a layer's weight reads, and for each whether the weight can do without it."""
        readers = [reader for reader in walk.readers if reader.weight.rpartition(".")[0] == layer]
        if not readers:
            return np.zeros(0, np.int64), np.zeros(0, bool)
        return self.dims[readers[0].weight, readers[0].dim], self._can_do_without(readers)[0]

    def _can_do_without(self, readers: Sequence[Reader]) -> tuple[Array, str]:
        """For each index that a weight reads, whether it may go; and in words what holds the others."""
        first = readers[0]
        unread = self.weights.zeros(first.weight, first.dim)
        known = np.logical_and.reduce([r.group.known for r in readers])
        constant = first.group.constant
        for other in readers[1:]:
            known = known & (other.group.constant == constant)
        exact = (constant == 0) | (not any(r.padded for r in readers))
        return unread | (
            known & exact & ((constant == 0) | self._has_bias(readers))
        ), f"{describe(first.node)} reads them"

    def _has_bias(self, readers: Sequence[Reader]) -> bool:
        """Whether there is a bias to hold a constant: one that only this weight's operations read."""
        bias = readers[0].bias
        if bias is None:
            return self.weights.bias_place(readers[0].weight) is not None
        own = {reader.node.index for reader in readers}
        return {node.index for node in self.graph.readers_of_parameter(bias)} <= own

    def _to_go(self, walk: Walk) -> Array:
        """The units to take away now, one kept in each dimension that would lose its last and must not."""
        size = len(self.weights.gone)
        dead, _ = self.dead(walk)
        stay = self._those((*self.pinned, *self.kept))[self.unit] | self._those(tuple(self.forbidden))[self.family]
        going = dead & ~stay
        going[:size] &= ~self.weights.gone
        going = going[:size]
        while True:
            changed = False
            for atoms in self._touched(going):
                left = ~self.weights.gone[atoms]
                if left.any() and not (left & ~going[atoms]).any():
                    last = int(self.unit[atoms[left]].min())
                    reason = self.one_stays.get(int(self.family[last]))
                    if reason is not None:
                        self.kept[last] = f"all units are dead; one stays: {reason}"
                        going &= self.unit[:size] != last
                        changed = True
            if not changed and not (self.round_to > 1 and self._round(going)):
                return distinct(self.unit[:size][going])

    def _those(self, numbers: Sequence[int] | Array) -> Array:
        """Bool per atom: whether it is one of ``numbers``, units or families."""
        chosen = np.zeros(self.weights.size, bool)
        chosen[np.asarray(numbers, np.int64)] = True
        return chosen

    def _touched(self, going: Array) -> Iterable[Array]:
        return [atoms for atoms in self.dims.values() if going[atoms].any()]

    def _round(self, going: Array) -> bool:
        """Keep the units with the largest weights until each width is a multiple; whether any was kept."""
        size = len(self.weights.gone)
        for (name, dim), atoms in self.dims.items():
            if not going[atoms].any() or self.weights.tensors[name].dim() < 2:
                continue
            left = int((~self.weights.gone[atoms] & ~going[atoms]).sum())
            target = -(-left // self.round_to) * self.round_to
            leaving = atoms[going[atoms]]
            if target == left:
                continue
            strength = self.weights.tensors[name].double().transpose(0, dim).flatten(1).norm(dim=1).cpu().numpy()
            order = np.lexsort((leaving, -strength[leaving - atoms[0]]))
            for atom in leaving[order]:
                if left >= min(target, left + len(leaving)):
                    break
                unit = int(self.unit[atom])
                if unit in self.kept:
                    continue
                self.kept[unit] = f"widths are multiples of {self.round_to}"
                going &= self.unit[:size] != unit
                left = int((~self.weights.gone[atoms] & ~going[atoms]).sum())
            return True
        return False

    def _fold(self, walk: Walk, going: Array) -> None:
        """Put the constants of the units that go into the biases of what reads them."""
        leaves = self._those(going)
        for readers in _by_weight(walk.readers):
            first = readers[0]
            leaving = leaves[self.unit[first.group.atoms]] & ~self.weights.zeros(first.weight, first.dim)
            leaving &= first.group.constant != 0
            if not leaving.any():
                continue
            weight = self.weights.tensors[first.weight]
            index = torch.from_numpy(np.flatnonzero(leaving)).to(weight.device)
            columns = weight.index_select(first.dim, index).double()
            columns = columns.movedim(first.dim, -1).reshape(-1, *_inner(columns, first.dim), len(index))
            amount = columns.sum(dim=tuple(range(1, columns.dim() - 1))) if columns.dim() > 2 else columns
            constant = torch.from_numpy(first.group.constant[leaving]).to(weight.device)
            bias = first.bias or self.weights.bias_place(first.weight)
            assert bias is not None
            self.weights.fold(bias, amount @ constant)

    def _families(self) -> Array:
        """Units that can go and share a dimension are one family, and so are units that cannot."""
        held = np.zeros(self.weights.size, bool)
        for atoms, _ in self.walk.pins:
            held[self.unit[atoms]] = True
        edges: list[tuple[Array, Array]] = []
        for atoms in self.dims.values():
            units = self.unit[atoms]
            for part in (units[held[units]], units[~held[units]]):
                if len(part):
                    edges.append((part, np.broadcast_to(part[:1], part.shape)))
        return components(self.weights.size, edges)[self.unit]


def _inner(columns: torch.Tensor, dim: int) -> tuple[int, ...]:
    """Sizes of the kernel's dimensions: all but the first two of a weight."""
    return tuple(columns.shape[2:]) if columns.dim() > 2 else ()


def _by_weight(readers: Sequence[Reader]) -> list[list[Reader]]:
    """The readers of each weight's dimension together: a weight that runs more than once reads more than once."""
    grouped: dict[tuple[str, int], list[Reader]] = {}
    for reader in readers:
        grouped.setdefault((reader.weight, reader.dim), []).append(reader)
    return list(grouped.values())


def _units(size: int, edges: list[tuple[Array, Array]], split: Sequence[Array]) -> Array:
    """The smallest atom of each atom's unit, so that whatever goes leaves every split dimension a block."""
    unit = components(size, edges)
    while True:
        more = [edge for atoms in split if (edge := _along_one_axis(unit[atoms])) is not None]
        if not more:
            return unit
        edges = [*edges, *more]
        unit = components(size, edges)


def _along_one_axis(units: Array) -> tuple[Array, Array] | None:
    """Pairs to join so that each unit is a union of slabs of one axis, that with most units; None if they are."""
    best: tuple[int, tuple[Array, Array]] | None = None
    names, flat = np.unique(units, return_inverse=True)
    flat = flat.reshape(units.shape)
    for axis in range(units.ndim):
        slabs = np.moveaxis(flat, axis, 0).reshape(units.shape[axis], -1)
        if (slabs == slabs[:, :1]).all():
            return None
        joined = (names[slabs].reshape(-1), names[np.broadcast_to(slabs[:, :1], slabs.shape)].reshape(-1))
        count = len(np.unique(components(len(names), [(slabs, np.broadcast_to(slabs[:, :1], slabs.shape))])))
        if best is None or count > best[0]:
            best = (count, joined)
    return None if best is None else best[1]
