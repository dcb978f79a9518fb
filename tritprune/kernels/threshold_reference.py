"""Exact thresholds and the masks they give, in plain torch: part of the specification in ``reference.py``.

Units stand in an order: score ascending; among equals the higher (layer, row-major index) first. Where a unit stands
can be forced without touching its score, so that nothing of the size of the scores is ever written for it:

    standing(u) = -inf   if the unit has gone already (``kept``), or stands up to its layer's floor (``bounds``)
                  +inf   else if it stands beyond its layer's cap (``bounds``)
                  score  else

A floor and a cap are two units of their layer, as :func:`crossing_units` finds them: up to the floor's all go, with it;
from the cap's on all stay, with it. Everything below walks over the units in chunks and allocates a few megabytes,
whatever the number of units.
"""

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritprune.kernels.packing import is_packed, pack_mask, packed_length
from tritprune.kernels.units import UnitGrid

Bounds = tuple[Tensor, Tensor]
"""Score fp32 ``[T, 2]`` and row-major index int64 ``[T, 2]`` of the units at each layer's floor and at its cap."""

BEFORE_ALL, AFTER_ALL = (-math.inf, 1 << 62), (math.inf, -1)
"""Score and index of no unit: what stands for a floor, or a cap, that there is not."""

_CHUNK = 1 << 18
_SAMPLE = 1 << 17
_ROOM = 1 << 20
_DIGITS = 1 << 16


def kth_score(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    budget: int | Sequence[int],
    *,
    kept: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """Where in the order a budget of elements is spent, if units go in ascending order.

    Among equal scores the higher (layer, row-major index) goes first. The pruned units are the longest prefix of that
    order whose elements do not exceed ``budget``; :func:`masks_from_threshold` turns the result into masks.
    ``+inf`` protects: such a unit never goes, and if everything else fits the result is ``(+inf, 0)``. With a budget a
    layer, every layer is searched by itself.

    Exact, without sorting or joining the scores: a deterministic sample gives two pivots, one pass weighs what lies
    below, at and above them and gathers what lies between, and only that is sorted. A sample that misleads costs two
    more passes, which add up the elements a digit of 16 bits.
    Bytes to move: the scores once, and one byte (packed: one bit) of ``kept`` a unit.

    Args:
        scores: fp32, each of the shape of its grid; ``-inf`` and ``+inf`` are allowed, NaN is not.
        grids: the unit sizes.
        budget: elements that may go, at least 0, of all layers together or of each.
        kept: bool of the grid's shape, or packed: the units that have not gone already; None: all.
        bounds: where each layer's floor and cap are; None: there are none.

    Returns:
        threshold fp32 ``[]``, where the first unit that may not go completely stands, and remainder int64 ``[]``,
        the elements left for the units that stand there; ``[T]`` each with a budget a layer.
    """
    if not isinstance(budget, int):
        return search_each(kth_score, scores, grids, budget, kept, bounds)
    device = scores[0].device if scores else torch.device("cpu")
    layers = _layers(scores, grids, kept, bounds)
    elements = sum(grid.elements for grid in grids)
    if not 0 <= budget < elements:
        return _result(math.inf, 0, device)
    found = _between(layers, budget, *_bracket(layers, budget / elements))
    return _result(*(_by_digits(layers, budget) if found is None else found), device)


def masks_from_threshold(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    threshold: Tensor,
    remainder: Tensor,
    *,
    kept: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
    packed: bool = False,
) -> list[Tensor]:
    """Which units stay: those that stand above the threshold, and of those at it what the remainder does not reach.

    ``keep = standing > threshold or (standing == threshold and e > remainder)``, where ``e`` is the number of elements
    in the tied units from this one to the last one of the last layer: the highest index goes first. What stands at
    ``-inf`` never stays. With a threshold a layer, ``e`` ends with the layer.
    Bytes to move: the scores once, one byte (packed: one bit) of ``kept`` and of the new mask a unit.

    Args:
        scores: fp32, each of the shape of its grid.
        grids: the unit sizes.
        threshold: fp32 ``[]`` or ``[T]`` of :func:`kth_score`.
        remainder: int64 ``[]`` or ``[T]`` of :func:`kth_score`.
        kept: as given to :func:`kth_score`.
        bounds: as given to :func:`kth_score`.
        packed: whether masks are made packed.

    Returns:
        bool, each of the shape of its grid, True = keep; or packed.
    """
    masks: list[Tensor] = []
    layers = _layers(scores, grids, kept, bounds)
    after = torch.zeros_like(remainder) if not threshold.ndim else remainder.new_zeros(())
    for number in reversed(range(len(layers))):
        layer = layers[number]
        at, left = (threshold[number], remainder[number]) if threshold.ndim else (threshold, remainder)
        after = after.new_zeros(()) if threshold.ndim else after
        units, device = layer.grid.units, layer.score.device
        mask = (
            torch.empty(packed_length(units), dtype=torch.uint8, device=device)
            if packed
            else torch.empty(units, dtype=torch.bool, device=device)
        )
        for first, standing in layer.chunks(backwards=True):
            keep = standing > at
            tied = (standing == at).nonzero().flatten()
            elements = after + layer.grid.sizes_at(first + tied).flip(0).cumsum(0).flip(0)
            keep[tied] = (elements > left) & (at > -math.inf)
            after = elements[0] if len(elements) else after
            if packed:
                mask[first // 8 : packed_length(first + len(keep))] = pack_mask(keep)
            else:
                mask[first : first + len(keep)] = keep
        masks.append(mask if packed else mask.view(layer.grid.shape))
    return masks[::-1]


def crossing_units(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], budgets: Sequence[int], *, kept: Sequence[Tensor] | None = None
) -> Bounds:
    """The unit of each layer at which its budget is crossed: the first that does not go completely within it.

    A cap keeps that unit and all after it. A floor of ``f`` elements takes the crossing unit of ``f - 1`` and all
    before it: the shortest prefix that reaches ``f``.
    Bytes to move: as for :func:`kth_score` with a budget a layer, and twice more.

    Args:
        scores: fp32, each of the shape of its grid; finite.
        grids: the unit sizes.
        budgets: elements, one a layer; below 0 it is crossed before the first unit, and never if it covers all.
        kept: as for :func:`kth_score`.

    Returns:
        score fp32 ``[T]`` and row-major index int64 ``[T]``; :data:`BEFORE_ALL` or :data:`AFTER_ALL` where there is no
        such unit.
    """
    device = scores[0].device if scores else torch.device("cpu")
    found: list[tuple[float, int]] = []
    for layer, budget in zip(_layers(scores, grids, kept, None), budgets, strict=True):
        if not 0 <= budget < layer.grid.elements:
            found.append(BEFORE_ALL if budget < 0 else AFTER_ALL)
            continue
        own = None if layer.kept is None else [layer.kept]
        threshold, remainder = kth_score([layer.score], [layer.grid], budget, kept=own)
        after, place = 0, -1
        for first, standing in layer.chunks(backwards=True):
            tied = (standing == threshold).nonzero().flatten()
            elements = after + layer.grid.sizes_at(first + tied).flip(0).cumsum(0)  # from the last one on
            beyond = elements > remainder
            if bool(beyond.any()):
                place = first + int(tied.flip(0)[beyond][0])
                break
            after = int(elements[-1]) if len(elements) else after
        found.append((float(threshold), place))
    return (
        torch.tensor([score for score, _ in found], dtype=torch.float32, device=device),
        torch.tensor([place for _, place in found], dtype=torch.int64, device=device),
    )


def count_non_finite(scores: Sequence[Tensor]) -> Tensor:
    """NaNs and infinities of every layer.

    Bytes to move: the scores once.

    Args:
        scores: fp32 or bf16 of any shape.

    Returns:
        int64 ``[T]``.
    """
    device = scores[0].device if scores else torch.device("cpu")
    counts = torch.zeros(len(scores), dtype=torch.int64, device=device)
    for layer, score in enumerate(scores):
        flat = score.reshape(-1)
        for first in range(0, len(flat), _CHUNK):
            part = flat[first : first + _CHUNK]
            counts[layer] += len(part) - torch.count_nonzero(torch.isfinite(part))
    return counts


def search_each(
    search: Callable[..., tuple[Tensor, Tensor]],
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    budgets: Sequence[int],
    kept: Sequence[Tensor] | None,
    bounds: Bounds | None,
) -> tuple[Tensor, Tensor]:
    """Thresholds and remainders ``[T]`` from one search a layer."""
    found: list[tuple[Tensor, Tensor]] = []
    for layer, (score, grid, budget) in enumerate(zip(scores, grids, budgets, strict=True)):
        own = None if kept is None else [kept[layer]]
        bound = None if bounds is None else (bounds[0][layer : layer + 1], bounds[1][layer : layer + 1])
        found.append(search([score], [grid], budget, kept=own, bounds=bound))
    if not found:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    return torch.stack([threshold for threshold, _ in found]), torch.stack([remainder for _, remainder in found])


@dataclass(frozen=True)
class _Layer:
    """A layer in a search: its units in row-major order, and where they stand."""

    score: Tensor
    grid: UnitGrid
    kept: Tensor | None
    bound: tuple[Tensor, Tensor] | None  # score, index: [2] each, of the floor and of the cap

    def chunks(self, *, backwards: bool = False) -> Iterator[tuple[int, Tensor]]:
        """First index of a chunk, and where its units stand: fp32 ``[at most _CHUNK]``."""
        starts = range(0, self.grid.units, _CHUNK)
        for first in reversed(starts) if backwards else starts:
            yield first, self.standing(slice(first, min(first + _CHUNK, self.grid.units)))

    def standing(self, which: slice) -> Tensor:
        """Where some units stand."""
        score = self.score.reshape(-1)[which]
        standing = score
        if self.bound is not None:
            index = torch.arange(*which.indices(self.grid.units), device=score.device)
            (floor, cap), (floor_at, cap_at) = self.bound
            standing = standing.masked_fill((score > cap) | ((score == cap) & (index <= cap_at)), math.inf)
            standing = standing.masked_fill((score < floor) | ((score == floor) & (index >= floor_at)), -math.inf)
        if self.kept is not None:
            standing = standing.masked_fill(~self._present(self.kept, which), -math.inf)
        return standing

    def _present(self, kept: Tensor, which: slice) -> Tensor:
        if not is_packed(kept):
            return kept.reshape(-1)[which]
        index = torch.arange(*which.indices(self.grid.units), device=kept.device)
        return (kept[index >> 3] >> (7 - (index & 7)).byte() & 1).bool()


def _layers(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], kept: Sequence[Tensor] | None, bounds: Bounds | None
) -> list[_Layer]:
    each = [None] * len(scores) if kept is None else kept
    bound: Sequence[Any] = [None] * len(scores) if bounds is None else list(zip(*bounds, strict=True))
    return [_Layer(*layer) for layer in zip(scores, grids, each, bound, strict=True)]


def _bracket(layers: Sequence[_Layer], share: float) -> tuple[float, float]:
    """Two scores between which the threshold almost surely lies: quantiles of a regular sample, 5 sigma apart."""
    units = sum(layer.grid.units for layer in layers)
    if units <= _SAMPLE:
        return -math.inf, math.inf
    stride = -(-units // _SAMPLE) | 1  # odd: regular structure in the scores is not met at one phase only
    sample = torch.cat([layer.standing(slice(0, layer.grid.units, stride)) for layer in layers])
    index = [torch.arange(0, layer.grid.units, stride, device=sample.device) for layer in layers]
    sizes = torch.cat([layer.grid.sizes_at(own) for layer, own in zip(layers, index, strict=True)])
    sample, order = sample.sort()
    spent = sizes[order].cumsum(0)
    centre = int(torch.searchsorted(spent, int(share * int(spent[-1]))))
    spread = 5 * math.sqrt(len(sample) * share * (1 - share)) + 5
    first, last = math.floor(centre - spread), math.ceil(centre + spread)
    low = -math.inf if first < 0 else float(sample[first])
    return low, math.inf if last >= len(sample) else float(sample[last])


def _between(layers: Sequence[_Layer], budget: int, low: float, high: float) -> tuple[float, int] | None:
    """The threshold and what is left there, if it lies in ``[low, high]`` and few units lie strictly inside."""
    below = at_low = at_high = inside = gathered = 0
    values: list[Tensor] = []
    sizes: list[Tensor] = []
    for layer in layers:
        for first, standing in layer.chunks():
            below += _mass(standing < low, layer.grid, first)
            at_low += _mass(standing == low, layer.grid, first)
            at_high += _mass(standing == high, layer.grid, first) if low < high else 0
            index = ((standing > low) & (standing < high)).nonzero().flatten()
            gathered += len(index)
            if gathered > _ROOM:
                return None
            values.append(standing[index])
            sizes.append(layer.grid.sizes_at(first + index))
            inside += int(sizes[-1].sum())
    left = budget - below
    if left < 0:
        return None
    if left < at_low:
        return low, left
    left -= at_low
    if left < inside:
        ordered, order = torch.cat(values).sort()
        spent = torch.cat(sizes)[order].cumsum(0)
        threshold = ordered[int(torch.searchsorted(spent, left, right=True))]
        first_equal = int(torch.searchsorted(ordered, threshold))
        return float(threshold), left - (int(spent[first_equal - 1]) if first_equal else 0)
    left -= inside
    return (high, left) if left < at_high else None


def _by_digits(layers: Sequence[_Layer], budget: int) -> tuple[float, int]:
    """The same for any data: the elements of every value of the upper half of a key, then of the lower half."""
    prefix, left = 0, budget
    for upper in (True, False):
        mass = torch.zeros(_DIGITS, dtype=torch.int64)
        for layer in layers:
            for first, standing in layer.chunks():
                key = _keys(standing)
                sizes = layer.grid.sizes_at(torch.arange(first, first + len(key), device=key.device))
                chosen = key >= 0 if upper else key >> 16 == prefix
                digit = (key >> 16 if upper else key & (_DIGITS - 1))[chosen]
                mass += torch.bincount(digit, sizes[chosen].double(), minlength=_DIGITS).long().cpu()
        spent = mass.cumsum(0)
        digit = int((spent <= left).sum())
        left -= int(spent[digit - 1]) if digit else 0
        prefix = prefix * _DIGITS + digit
    bits = prefix - (1 << 31) if prefix >> 31 else 0xFFFFFFFF - prefix
    return struct.unpack("<f", struct.pack("<I", bits))[0], left


def _keys(standing: Tensor) -> Tensor:
    """fp32 as integers from 0 to 2^32 - 1 of the same order, with -0 = +0: int64."""
    bits = (standing + 0.0).view(torch.int32).long()
    return torch.where(bits < 0, -1 - bits, bits + (1 << 31))


def _mass(chosen: Tensor, grid: UnitGrid, first: int) -> int:
    """How many elements the chosen units of a chunk have."""
    if grid.uniform_size is not None:
        return grid.uniform_size * int(torch.count_nonzero(chosen))
    return int(grid.sizes_at(first + chosen.nonzero().flatten()).sum())


def _result(threshold: float, remainder: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As tensors; at infinity nothing is left, for everything that may go does, and no equal is touched. -0 is 0."""
    if not threshold < math.inf:
        threshold, remainder = math.inf, 0
    return torch.tensor(threshold + 0.0, device=device), torch.tensor(remainder, dtype=torch.int64, device=device)
