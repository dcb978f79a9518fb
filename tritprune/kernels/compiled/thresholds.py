"""Exact thresholds, compiled: the scores are read once, a piece at a time, and few of them are looked at again.

A sample gives two pivots; one pass weighs what stands below, at and above them and gathers what stands between. Where
that does not hold the threshold, or is too much to gather, two more passes add up elements by the digits of a key. So
memory is bounded whatever the scores are: a few megabytes a thread.
"""

# pyright: basic

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tritprune.kernels import threshold_reference
from tritprune.kernels.compiled.work import compiled, plain, run, runs
from tritprune.kernels.packing import is_packed, packed_length
from tritprune.kernels.threshold_reference import AFTER_ALL, BEFORE_ALL, Bounds, search_each
from tritprune.kernels.units import UnitGrid

_LEAST_SAMPLE, _LARGEST_SAMPLE, _UNITS_PER_SAMPLE = 1 << 16, 1 << 20, 1 << 9
_DEVIATIONS = 4.0
_ROOM = 1 << 21
_WAVE = 16
_DIGITS = 1 << 16
_LOOK = 1 << 12
_NONE, _BYTES, _BITS = 0, 1, 2


class _Layer(NamedTuple):
    """A layer as the loops see it: where its units stand, and their sizes.

    Args:
        score: fp32 ``[units]``.
        kept: uint8, a byte or a bit a unit, by ``kind``.
        bounded: whether the four numbers after it count: score and index at the floor and at the cap.
        cols: units of a row; in a grid of one row or column only the last size counts.
    """

    score: np.ndarray
    kept: np.ndarray
    kind: int
    bounded: bool
    floor: np.float32
    floor_at: int
    cap: np.float32
    cap_at: int
    cols: int
    row_size: int
    last_row_size: int
    col_size: int
    last_col_size: int

    @property
    def uniform(self) -> bool:
        """Whether all units have one size."""
        return self.row_size == self.last_row_size and self.col_size == self.last_col_size


def _layers(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], kept: Sequence[Tensor] | None, bounds: Bounds | None
) -> list[_Layer]:
    nothing = np.empty(0, np.uint8)
    found: list[_Layer] = []
    for number, (score, grid) in enumerate(zip(scores, grids, strict=True)):
        marks, kind = nothing, _NONE
        if kept is not None:
            kind = _BITS if is_packed(kept[number]) else _BYTES
            marks = kept[number].contiguous().view(-1).view(torch.uint8).numpy()
        floor, cap, floor_at, cap_at = 0.0, 0.0, 0, 0
        if bounds is not None:
            (floor, cap), (floor_at, cap_at) = bounds[0][number].tolist(), bounds[1][number].tolist()
        where = (bounds is not None, np.float32(floor), floor_at, np.float32(cap), cap_at)
        row_size = grid.row_size if grid.rows > 1 else grid.last_row_size
        col_size = grid.col_size if grid.cols > 1 else grid.last_col_size
        sizes = (max(grid.cols, 1), row_size, grid.last_row_size, col_size, grid.last_col_size)
        found.append(_Layer(plain(score).reshape(-1), marks, kind, *where, *sizes))
    return found


def _jobs(layers: Sequence[_Layer]) -> list[tuple[_Layer, int, int]]:
    return [(layer, first, last) for layer in layers for first, last in runs(layer.score.size)]


@compiled
def _stands(layer, unit):
    """Where a unit stands in the order."""
    score = layer.score[unit]
    stands = score
    if layer.bounded:
        if score > layer.cap or (score == layer.cap and unit <= layer.cap_at):
            stands = np.float32(np.inf)
        if score < layer.floor or (score == layer.floor and unit >= layer.floor_at):
            stands = np.float32(-np.inf)
    if layer.kind == 1:
        stands = stands if layer.kept[unit] else np.float32(-np.inf)
    elif layer.kind == 2:
        stands = stands if (layer.kept[unit >> 3] >> (7 - (unit & 7))) & 1 else np.float32(-np.inf)
    return stands


@compiled
def _standing(layer, first, last):
    """Where the units of a piece stand; the scores themselves where nothing is forced."""
    if layer.kind == 0 and not layer.bounded:
        return layer.score[first:last]
    stands = np.empty(last - first, np.float32)
    if layer.kind == 1 and not layer.bounded:
        score, kept = layer.score[first:last], layer.kept[first:last]
        for u in range(stands.size):
            stands[u] = score[u] if kept[u] else np.float32(-np.inf)
        return stands
    for u in range(stands.size):
        stands[u] = _stands(layer, first + u)
    return stands


@compiled
def _size_of(layer, unit):
    height = layer.last_row_size if unit >= layer.score.size - layer.cols else layer.row_size
    return height * (layer.last_col_size if unit % layer.cols == layer.cols - 1 else layer.col_size)


# --- the threshold


def kth_score(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    budget: int | Sequence[int],
    *,
    kept: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`tritprune.kernels.reference.kth_score`."""
    if not isinstance(budget, int):
        return search_each(kth_score, scores, grids, budget, kept, bounds)
    elements = sum(grid.elements for grid in grids)
    if not 0 <= budget < elements:
        return threshold_reference.kth_score(scores, grids, budget)
    layers = _layers(scores, grids, kept, bounds)
    found = _between(layers, budget, *_bracket(layers, budget / elements))
    threshold, remainder = _by_digits(layers, budget) if found is None else found
    if not threshold < math.inf:
        threshold, remainder = math.inf, 0
    return torch.tensor(threshold + 0.0), torch.tensor(remainder)


def _bracket(layers: Sequence[_Layer], share: float) -> tuple[float, float]:
    """Two scores between which the threshold almost surely lies, some standard deviations of a sample's rank apart."""
    units = sum(layer.score.size for layer in layers)
    if units <= 2 * _LEAST_SAMPLE:
        return -math.inf, math.inf
    wanted = min(max(units // _UNITS_PER_SAMPLE, _LEAST_SAMPLE), _LARGEST_SAMPLE)
    stride = -(-units // wanted) | 1  # odd: regular structure in the scores is not met at one phase only
    sample = np.concatenate(run(_draw, [(layer, stride) for layer in layers]))
    spread = _DEVIATIONS * math.sqrt(sample.size * share * (1 - share)) + _DEVIATIONS
    first, last = math.floor(share * sample.size - spread), math.ceil(share * sample.size + spread)
    sample.sort()
    low = -math.inf if first < 0 else float(sample[first])
    return low, math.inf if last >= sample.size else float(sample[last])


@compiled
def _draw(layer, stride):
    drawn = np.empty((layer.score.size + stride - 1) // stride, np.float32)
    for i in range(drawn.size):
        drawn[i] = _stands(layer, i * stride)
    return drawn


def _waves(jobs: Sequence[tuple[Any, ...]]) -> Iterator[Sequence[tuple[Any, ...]]]:
    """Jobs a few at a time, so that what they return is never much."""
    return (jobs[first : first + _WAVE] for first in range(0, len(jobs), _WAVE))


def _between(layers: Sequence[_Layer], budget: int, low: float, high: float) -> tuple[float, int] | None:
    """The threshold and what is left there, if it stands in ``[low, high]`` and few units stand strictly inside."""
    below = at_low = at_high = inside = gathered = 0
    values: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    one_size = {(layer.row_size, layer.col_size) for layer in layers if layer.score.size}
    uniform = len(one_size) == 1 and all(layer.uniform for layer in layers if layer.score.size)
    for wave in _waves([(*job, np.float32(low), np.float32(high), uniform) for job in _jobs(layers)]):
        for masses, own, own_sizes in run(_collect, wave):
            below, at_low, at_high, inside = (
                total + int(mass) for total, mass in zip((below, at_low, at_high, inside), masses, strict=True)
            )
            gathered += own.size
            values.append(own)
            sizes.append(own_sizes)
        if gathered > _ROOM:
            return None
    left = budget - below
    if left < 0:
        return None
    if left < at_low:
        return low, left
    left -= at_low
    if left < inside:
        candidates = np.concatenate(values)
        if uniform:
            size = inside // candidates.size
            candidates.partition(left // size)
            threshold = candidates[left // size]
            return float(threshold), left - size * int(np.count_nonzero(candidates < threshold))
        order = np.argsort(candidates)
        candidates, spent = candidates[order], np.cumsum(np.concatenate(sizes)[order])
        threshold = candidates[np.searchsorted(spent, left, side="right")]
        first_equal = int(np.searchsorted(candidates, threshold))
        return float(threshold), left - (int(spent[first_equal - 1]) if first_equal else 0)
    left -= inside
    return (high, left) if left < at_high and low < high else None


@compiled
def _collect(layer, first, last, low, high, uniform):
    """Elements below low, at low, at high and strictly between; scores of these, and their sizes if they differ."""
    standing = _standing(layer, first, last)
    values = np.empty(standing.size + 1, np.float32)
    sizes = np.empty(1 if uniform else standing.size + 1, np.int64)
    below = at_low = at_high = inside = filled = 0
    if uniform:
        near = np.zeros(_LOOK, np.uint8)
        eights = near.view(np.uint64)
        for start in range(0, standing.size, _LOOK):
            part = standing[start : min(start + _LOOK, standing.size)]
            for u in range(part.size):
                near[u] = (part[u] >= low) & (part[u] <= high)
            here = np.int32(0)
            for u in range(part.size):
                here += part[u] < low
            below += here
            near[part.size :] = 0
            for eight in range((part.size + 7) // 8):
                if eights[eight]:  # few of them: the loops above are the work, and they are vector code
                    for u in range(8 * eight, min(8 * eight + 8, part.size)):
                        values[filled] = part[u]
                        filled += near[u]
        found, filled = filled, 0
        for i in range(found):
            at_low += values[i] == low
            at_high += values[i] == high
            values[filled] = values[i]
            filled += (values[i] > low) & (values[i] < high)
        size = layer.row_size * layer.col_size
        return (below * size, at_low * size, at_high * size, filled * size), values[:filled].copy(), sizes[:0].copy()
    for u in range(standing.size):
        size = _size_of(layer, first + u)
        stands = standing[u]
        below += size if stands < low else 0
        at_low += size if stands == low else 0
        at_high += size if stands == high else 0
        if stands > low and stands < high:
            inside += size
            values[filled] = stands
            sizes[filled] = size
            filled += 1
    return (below, at_low, at_high, inside), values[:filled].copy(), sizes[:filled].copy()


def _by_digits(layers: Sequence[_Layer], budget: int) -> tuple[float, int]:
    """The same for any scores: the elements of every value of the upper half of a key, then of the lower half."""
    prefix, left = 0, budget
    for upper in (True, False):
        mass = np.zeros(_DIGITS, np.int64)
        for wave in _waves([(*job, upper, prefix) for job in _jobs(layers)]):
            for own in run(_digit_masses, wave):
                mass += own
        spent = np.cumsum(mass)
        digit = int(np.searchsorted(spent, left, side="right"))
        left -= int(spent[digit - 1]) if digit else 0
        prefix = prefix * _DIGITS + digit
    bits = prefix - (1 << 31) if prefix >> 31 else 0xFFFFFFFF - prefix
    return float(np.uint32(bits).view(np.float32)), left


@compiled
def _digit_masses(layer, first, last, upper, prefix):
    """Elements by the digit of the key (fp32 as uint32 of the same order, -0 = +0), among those of the prefix."""
    mass = np.zeros(65536, np.int64)
    standing = _standing(layer, first, last) + np.float32(0)
    bits = standing.view(np.int32)
    for u in range(bits.size):
        key = -1 - np.int64(bits[u]) if bits[u] < 0 else np.int64(bits[u]) + 2147483648
        if upper:
            mass[key >> 16] += _size_of(layer, first + u)
        elif key >> 16 == prefix:
            mass[key & 65535] += _size_of(layer, first + u)
    return mass


# --- what a threshold gives


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
    """See :func:`tritprune.kernels.reference.masks_from_threshold`."""
    masks = [
        torch.empty(packed_length(grid.units), dtype=torch.uint8)
        if packed
        else torch.empty(grid.shape, dtype=torch.bool)
        for grid in grids
    ]
    bytes_of = [mask.view(-1).view(torch.uint8).numpy() for mask in masks]
    at, left = (each.expand(len(scores)).tolist() for each in (threshold, remainder))
    after, layer_after = 0, len(scores)
    jobs = [
        (number, *job) for number, layer in enumerate(_layers(scores, grids, kept, bounds)) for job in _jobs([layer])
    ]
    for wave in _waves(jobs[::-1]):  # among equals the higher index goes first
        pieces = [
            np.empty(last - first, np.uint8) if packed else bytes_of[number][first:last]
            for number, _, first, last in wave
        ]
        ties = run(_above, [(keep, *job[1:], np.float32(at[job[0]])) for keep, job in zip(pieces, wave, strict=True)])
        for keep, tied, (number, layer, first, last) in zip(pieces, ties, wave, strict=True):
            if threshold.ndim and number != layer_after:
                after, layer_after = 0, number
            if tied and at[number] > -math.inf:
                after = _keep_ties(keep, layer, first, last, np.float32(at[number]), after, left[number])
            if packed:
                bytes_of[number][first // 8 : packed_length(last)] = np.packbits(keep)
    return masks


@compiled
def _above(keep, layer, first, last, bound):
    """Write what stands above the threshold; whether anything is at it."""
    tied = False
    standing = _standing(layer, first, last)
    for u in range(standing.size):
        keep[u] = standing[u] > bound
        tied |= standing[u] == bound
    return tied


@compiled
def _keep_ties(keep, layer, first, last, bound, after, remainder):
    """Write which of a piece's equals stay; elements in all of them so far."""
    for unit in range(last - 1, first - 1, -1):
        if _stands(layer, unit) == bound:
            after += _size_of(layer, unit)
            keep[unit - first] = after > remainder
    return after


def crossing_units(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], budgets: Sequence[int], *, kept: Sequence[Tensor] | None = None
) -> Bounds:
    """See :func:`tritprune.kernels.reference.crossing_units`."""
    found: list[tuple[float, int]] = []
    for number, (score, grid, budget) in enumerate(zip(scores, grids, budgets, strict=True)):
        if not 0 <= budget < grid.elements:
            found.append(BEFORE_ALL if budget < 0 else AFTER_ALL)
            continue
        own = None if kept is None else [kept[number]]
        threshold, remainder = (each.item() for each in kth_score([score], [grid], budget, kept=own))
        after, place = 0, -1
        for job in reversed(_jobs(_layers([score], [grid], own, None))):
            after, place = _find_crossing(*job, np.float32(threshold), after, remainder)
            if place >= 0:
                break
        found.append((threshold, place))
    return (
        torch.tensor([score for score, _ in found], dtype=torch.float32),
        torch.tensor([place for _, place in found], dtype=torch.int64),
    )


@compiled
def _find_crossing(layer, first, last, bound, after, remainder):
    """Elements in all equals so far, and the one of this piece with which they pass the remainder, or -1."""
    for unit in range(last - 1, first - 1, -1):
        if _stands(layer, unit) == bound:
            after += _size_of(layer, unit)
            if after > remainder:
                return after, unit
    return after, -1
