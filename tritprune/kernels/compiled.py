"""The operations for the CPU, compiled by numba: the same results as ``reference.py``, several times as fast.

Layers are cut into pieces of rows that fit the cache; a pool of as many threads as torch uses works through them, and
the compiled loops release the interpreter lock. Rows are read once and nothing of the size of a layer is allocated,
except that a weight whose rows are not contiguous is copied for scoring.

Sums of units of up to ``SMALL_UNIT`` elements follow the reference's order and round to fp32 at each step: the same
bits. Larger units are summed in fp64 and rounded once.
"""

# pyright: basic

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from tritprune.kernels import reference
from tritprune.kernels.compiled_optimizers import masked_adamw_, masked_sgd_
from tritprune.kernels.loops import compiled as _compiled
from tritprune.kernels.loops import run as _run
from tritprune.kernels.packing import is_packed, pack_mask, unpack_mask
from tritprune.kernels.reference import SMALL_UNIT, Block, Finish, Form, Reduce
from tritprune.kernels.units import UnitGrid

__all__ = ["masked_adamw_", "masked_sgd_"]  # the rest is defined here

_PIECE = 1 << 18
_SAMPLE = 1 << 17
_MAGNITUDE_BITS, _INFINITY_BITS = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_MINUS_ZERO = {4: np.int32(-(1 << 31)), 2: np.int16(-(1 << 15))}  # by bytes of an element
_FORMS = {"magnitude": 0, "gradient": 1, "snip": 2, "product": 3}
_REDUCTIONS = {"sum": 0, "mean": 1, "max": 2, "l2": 3}
_FINISHES = {"none": 0, "abs": 1, "square": 2}


# --- scores


def accumulate_unit_scores_(
    scores: Sequence[Tensor],
    skipped: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    blocks: Sequence[Block],
    *,
    form: Form,
    reduce: Reduce,
    alpha: float,
    beta: float,
    finish: Finish = "none",
) -> None:
    """See :func:`tritprune.kernels.reference.accumulate_unit_scores_`."""
    jobs: list[tuple[Any, ...]] = []
    layers: list[int] = []
    how = (_FORMS[form], _REDUCTIONS[reduce], _FINISHES[finish], np.float32(alpha), np.float32(beta))
    for layer, (score, weight, (n, m)) in enumerate(zip(scores, weights, blocks, strict=True)):
        own = _plain(weight)
        gradient = own if gradients is None or form == "magnitude" else _plain(gradients[layer])
        for first, last in _pieces(score.shape[0], n * weight.shape[1]):
            jobs.append((_bits(score), own, gradient, first, last, n, m, n * m <= SMALL_UNIT, *how))
            layers.append(layer)
    for layer, bad in zip(layers, _run(_score_rows, jobs), strict=True):
        if bad:
            skipped[layer] += bad


@_compiled
def _score_rows(score, weight, gradient, first, last, n, m, small, form, reduce, finish, alpha, beta):
    """Rows ``first`` to ``last`` of units; returns the elements with a non-finite gradient."""
    n_rows, n_cols = weight.shape
    values = np.empty(n_cols, np.float32)
    w_row, g_row = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    units = np.empty(score.shape[1], np.float32)
    sums = np.empty(score.shape[1], np.float64)
    old = np.empty(score.shape[1], np.float32)
    mean, largest, l2 = reduce == 1, reduce == 2, reduce == 3
    in_fp64 = not (small or largest)
    bad = 0
    for unit_row in range(first, last):
        top, bottom = unit_row * n, min((unit_row + 1) * n, n_rows)
        for row in range(top, bottom):
            w = _as_fp32(weight[row], w_row)
            g = w if form == 0 else _as_fp32(gradient[row], g_row)
            bad += _element_scores(values, w, g, form)
            if l2:
                for c in range(n_cols):
                    values[c] = values[c] * values[c]
            if m == 1:
                _add_row(units, sums, values, row == top, largest, in_fp64)
            else:
                _add_blocks(units, sums, values, m, row == top, largest, in_fp64)
        if in_fp64:
            for c in range(units.size):
                units[c] = np.float32(sums[c])
        if mean:
            height = np.float32(bottom - top)
            whole, rest = n_cols // m, n_cols % m
            size = height * np.float32(m)
            for c in range(whole):
                units[c] = units[c] / size
            if rest:
                units[whole] = units[whole] / (height * np.float32(rest))
        if l2:
            for c in range(units.size):
                units[c] = np.sqrt(units[c])
        if finish == 1:
            for c in range(units.size):
                units[c] = abs(units[c])
        elif finish == 2:
            for c in range(units.size):
                units[c] = units[c] * units[c]
        out = score[unit_row]
        if alpha == 0:
            for c in range(units.size):
                units[c] = units[c] * beta
        else:
            past = _as_fp32(out, old)
            for c in range(units.size):
                units[c] = past[c] * alpha + units[c] * beta
        _store(out, units)
    return bad


@_compiled
def _add_row(units, sums, values, begins, largest, in_fp64):
    """Fold a row of element scores into units of one column each."""
    if in_fp64:
        for c in range(values.size):
            sums[c] = values[c] if begins else sums[c] + values[c]
    elif begins:
        for c in range(values.size):
            units[c] = values[c] + np.float32(0)  # a sum that starts from +0: it is never -0
    elif largest:
        for c in range(values.size):
            units[c] = values[c] if values[c] > units[c] or values[c] != values[c] else units[c]
    else:
        for c in range(values.size):
            units[c] += values[c]


@_compiled
def _add_blocks(units, sums, values, m, begins, largest, in_fp64):
    """Fold a row of element scores into units of ``m`` columns."""
    for c in range(units.size):
        first, last = c * m, min((c + 1) * m, values.size)
        if in_fp64:
            total = 0.0 if begins else sums[c]
            for i in range(first, last):
                total += values[i]
            sums[c] = total
            continue
        unit = values[first] + np.float32(0) if begins else units[c]
        first += 1 if begins else 0
        if largest:
            for i in range(first, last):
                unit = values[i] if values[i] > unit or values[i] != values[i] else unit
        else:
            for i in range(first, last):
                unit += values[i]
        units[c] = unit


def _as_fp32(row, room):
    """A row of fp32 as it is; one of bf16, given as int16, as fp32 in ``room``. Chosen by type when compiled."""
    raise NotImplementedError(f"only compiled code calls this, with {row} and {room}")


@overload(_as_fp32)
def _as_fp32_by_type(row, room):
    def same(row, room):
        return row

    def widened(row, room):
        bits = room.view(np.int32)
        for c in range(row.size):
            bits[c] = np.int32(row[c]) << 16
        return room

    return same if row.dtype == numba.float32 else widened


def _store(out, values):
    """fp32 values as they are, or rounded to the nearest bf16 (ties to even) where ``out`` holds bf16 as int16."""
    raise NotImplementedError(f"only compiled code calls this, with {out} and {values}")


@overload(_store)
def _store_by_type(out, values):
    def same(out, values):
        for c in range(values.size):
            out[c] = values[c]

    def rounded(out, values):
        bits = values.view(np.uint32)
        for c in range(values.size):
            if values[c] != values[c]:
                out[c] = np.int16((bits[c] >> np.uint32(16)) | np.uint32(0x40))
            else:
                to_even = np.uint32(0x7FFF) + ((bits[c] >> np.uint32(16)) & np.uint32(1))
                out[c] = np.int16(np.uint16((bits[c] + to_even) >> np.uint32(16)))

    return same if out.dtype == numba.float32 else rounded


@_compiled
def _element_scores(values, w, g, form):
    """``f(w, g)`` of a row; 0 where the gradient is not finite; returns how many those are."""
    if form == 0:
        for c in range(values.size):
            values[c] = abs(w[c])
        return 0
    bits = g.view(np.int32)
    largest = np.int32(0)  # as integers the absolute values of floats keep their order, with infinity and NaN on top
    if form == 1:
        for c in range(values.size):
            values[c] = abs(g[c])
            largest = max(largest, np.int32(bits[c] & _MAGNITUDE_BITS))
    elif form == 2:
        for c in range(values.size):
            values[c] = abs(w[c] * g[c])
            largest = max(largest, np.int32(bits[c] & _MAGNITUDE_BITS))
    else:
        for c in range(values.size):
            values[c] = w[c] * g[c]
            largest = max(largest, np.int32(bits[c] & _MAGNITUDE_BITS))
    bad = 0
    if largest >= _INFINITY_BITS:
        for c in range(values.size):
            if (bits[c] & _MAGNITUDE_BITS) >= _INFINITY_BITS:
                values[c] = np.float32(0)
                bad += 1
    return bad


# --- N:M


def n_in_m_masks(scores: Sequence[Tensor], n: int, m: int, *, packed: bool = False) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_masks`."""
    masks = [torch.empty(score.shape, dtype=torch.bool) for score in scores]
    _run(
        _mask_groups,
        (
            (mask.numpy(), _plain(score), first, last, n, m)
            for score, mask in zip(scores, masks, strict=True)
            for first, last in _pieces(*score.shape)
        ),
    )
    return [pack_mask(mask) for mask in masks] if packed else masks


def n_in_m_group_scores(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_group_scores`."""
    costs = [torch.empty(score.shape[0], -(-score.shape[1] // m)) for score in scores]
    _run(
        _cost_groups,
        (
            (cost.numpy(), _plain(score), first, last, n, m)
            for score, cost in zip(scores, costs, strict=True)
            for first, last in _pieces(*score.shape)
        ),
    )
    return costs


@_compiled
def _mask_groups(mask, score, first, last, n, m):
    n_cols = score.shape[1]
    whole = n_cols - n_cols % m
    for row in range(first, last):
        start = 0
        if m == 4:
            for start in range(0, whole, 4):
                a, b, c, d = score[row, start], score[row, start + 1], score[row, start + 2], score[row, start + 3]
                ab, ac, ad, bc, bd, cd = b <= a, c <= a, d <= a, c <= b, d <= b, d <= c  # the later one goes first
                mask[row, start] = ab + ac + ad >= n
                mask[row, start + 1] = (not ab) + bc + bd >= n
                mask[row, start + 2] = (not ac) + (not bc) + cd >= n
                mask[row, start + 3] = (not ad) + (not bd) + (not cd) >= n
            start = whole
        while start < n_cols:
            length = min(m, n_cols - start)
            quota = length * n // m
            for j in range(length):
                mask[row, start + j] = _rank(score[row], start, j, length) >= quota
            start += length


@_compiled
def _cost_groups(cost, score, first, last, n, m):
    n_cols = score.shape[1]
    for row in range(first, last):
        for group in range(cost.shape[1]):
            start = group * m
            length = min(m, n_cols - start)
            quota = length * n // m
            total = np.float32(0)
            for j in range(length):
                total += score[row, start + j] if _rank(score[row], start, j, length) < quota else np.float32(0)
            cost[row, group] = total


@_compiled
def _rank(row, start, j, length):
    """How many of the group go before its place j: lower ones, and equal ones after it."""
    rank = 0
    for i in range(j):
        rank += row[start + i] < row[start + j]
    for i in range(j + 1, length):
        rank += row[start + i] <= row[start + j]
    return rank


# --- thresholds


def kth_score(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], budget: int | Sequence[int]
) -> tuple[Tensor, Tensor]:
    """See :func:`tritprune.kernels.reference.kth_score`."""
    if not isinstance(budget, int):
        return reference.search_each(kth_score, scores, grids, budget)
    flat = [_plain(score).reshape(-1) for score in scores]
    elements = sum(grid.elements for grid in grids)
    if not 0 <= budget < elements:
        return reference.kth_score(scores, grids, budget)
    low, high = _bracket(flat, budget / elements)
    for bounds in ((low, high), (-math.inf, math.inf)):
        below, values, sizes = _between(flat, grids, *bounds)
        if below <= budget < below + int(sizes.sum()):
            break
    else:
        return torch.tensor(math.inf), torch.zeros((), dtype=torch.int64)
    left = budget - below
    if (sizes == sizes[0]).all():
        values.sort()
        spent = sizes[0] * np.arange(1, values.size + 1)
    else:
        order = np.argsort(values)
        values, spent = values[order], np.cumsum(sizes[order])
    threshold = values[np.searchsorted(spent, left, side="right")]
    first_equal = int(np.searchsorted(values, threshold))
    if threshold == math.inf:
        return torch.tensor(math.inf), torch.zeros((), dtype=torch.int64)
    smaller = int(spent[first_equal - 1]) if first_equal else 0
    return torch.tensor(float(threshold) + 0.0), torch.tensor(left - smaller)


def _bracket(flat: Sequence[np.ndarray], share: float) -> tuple[float, float]:
    """Two scores between which the threshold almost surely lies, five standard deviations of a sample's rank apart."""
    units = sum(score.size for score in flat)
    if units <= _SAMPLE:
        return -math.inf, math.inf
    stride = -(-units // _SAMPLE) | 1
    sample = np.concatenate([score[::stride] for score in flat])
    spread = 5 * math.sqrt(sample.size * share * (1 - share)) + 5
    first, last = math.floor(share * sample.size - spread), math.ceil(share * sample.size + spread)
    inside = [place for place in (first, last) if 0 <= place < sample.size]
    sample.partition(inside)
    low = -math.inf if first < 0 else float(sample[first])
    return low, math.inf if last >= sample.size else float(sample[last])


def _between(
    flat: Sequence[np.ndarray], grids: Sequence[UnitGrid], low: float, high: float
) -> tuple[int, np.ndarray, np.ndarray]:
    """Elements of the units below ``low``, and scores and sizes of those in ``[low, high]``, in index order."""
    pieces = [
        (score, first, last, grid) for score, grid in zip(flat, grids, strict=True) for first, last in _runs(score.size)
    ]
    jobs = (
        (score, first, last, np.float32(low), np.float32(high), *_sizes(grid)) for score, first, last, grid in pieces
    )
    found = _run(_collect, jobs)
    if not found:
        return 0, np.empty(0, np.float32), np.empty(0, np.int64)
    return (
        sum(below for below, _, _ in found),
        np.concatenate([values for _, values, _ in found]),
        np.concatenate([sizes for _, _, sizes in found]),
    )


@_compiled
def _collect(score, first, last, low, high, cols, row_size, last_row_size, col_size, last_col_size):
    uniform = row_size == last_row_size and col_size == last_col_size
    values = np.empty(last - first + 1, np.float32)
    places = np.empty(last - first + 1, np.int64)
    below = filled = 0
    for start in range(first, last, 32):
        part = score[start : min(start + 32, last)]
        inside = 0
        for u in range(part.size):
            below += part[u] < low
            inside += (part[u] >= low) & (part[u] <= high)
        if inside:
            for u in range(part.size):  # written always, kept where it is inside: no branch to mispredict
                values[filled] = part[u]
                places[filled] = start + u
                filled += (part[u] >= low) & (part[u] <= high)
    size = row_size * col_size
    sizes = np.full(filled, size)
    if not uniform:
        below = 0
        for u in range(first, last):
            if score[u] < low:
                below += _size_of(u, score.size, cols, row_size, last_row_size, col_size, last_col_size)
        for i in range(filled):
            sizes[i] = _size_of(places[i], score.size, cols, row_size, last_row_size, col_size, last_col_size)
        size = 1
    return below * size, values[:filled].copy(), sizes


@_compiled
def _size_of(unit, units, cols, row_size, last_row_size, col_size, last_col_size):
    height = last_row_size if unit >= units - cols else row_size
    return height * (last_col_size if unit % cols == cols - 1 else col_size)


def masks_from_threshold(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], threshold: Tensor, remainder: Tensor, *, packed: bool = False
) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.masks_from_threshold`."""
    if threshold.ndim:
        each = zip(scores, grids, threshold, remainder, strict=True)
        return [masks_from_threshold([s], [g], t, r, packed=packed)[0] for s, g, t, r in each]
    masks = [torch.empty(grid.shape, dtype=torch.bool) for grid in grids]
    flat = [_plain(score).reshape(-1) for score in scores]
    bound = np.float32(threshold.item())
    jobs: list[tuple[Any, ...]] = []
    layers: list[int] = []
    for layer, (score, mask) in enumerate(zip(flat, masks, strict=True)):
        for first, last in _runs(score.size):
            jobs.append((mask.view(-1).numpy(), score, first, last, bound))
            layers.append(layer)
    tied = {layer for layer, ties in zip(layers, _run(_above, jobs), strict=True) if ties}
    after = 0
    for layer in sorted(tied, reverse=True):  # among equals the higher index goes first
        mask = masks[layer].view(-1).numpy()
        after = _keep_ties(mask, flat[layer], bound, after, int(remainder), *_sizes(grids[layer]))
    return [pack_mask(mask) for mask in masks] if packed else masks


@_compiled
def _above(mask, score, first, last, bound):
    tied = False
    mask, score = mask[first:last], score[first:last]
    for u in range(score.size):
        mask[u] = score[u] > bound
        tied |= score[u] == bound
    return tied


@_compiled
def _keep_ties(mask, score, bound, after, remainder, cols, row_size, last_row_size, col_size, last_col_size):
    for unit in range(score.size - 1, -1, -1):
        if score[unit] == bound:
            after += _size_of(unit, score.size, cols, row_size, last_row_size, col_size, last_col_size)
            mask[unit] = after > remainder
    return after


# --- masks


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> None:
    """See :func:`tritprune.kernels.reference.apply_masks_`."""
    jobs: list[tuple[Any, ...]] = []
    for tensor, mask, block in zip(tensors, masks, blocks, strict=True):
        bits, kept, block = _stored(tensor, mask, block)
        jobs += [(bits, kept, first, last, *block) for first, last in _pieces(kept.shape[0], block[0] * bits.shape[1])]
    _run(_zero, jobs)


@_compiled
def _zero(bits, mask, first, last, n, m):
    n_rows, n_cols = bits.shape
    for unit_row in range(first, last):
        kept = mask[unit_row]
        for row in range(unit_row * n, min((unit_row + 1) * n, n_rows)):
            own = bits[row]
            if m == 1:
                for c in range(n_cols):
                    own[c] = own[c] if kept[c] else 0
            else:
                for unit in range(kept.size):
                    if not kept[unit]:
                        own[unit * m : min((unit + 1) * m, n_cols)] = 0


def count_violations(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> Tensor:
    """See :func:`tritprune.kernels.reference.count_violations`."""
    counts = torch.zeros(len(masks), dtype=torch.int64)
    jobs: list[tuple[Any, ...]] = []
    layers: list[int] = []
    for layer, (tensor, mask, block) in enumerate(zip(tensors, masks, blocks, strict=True)):
        bits, kept, block = _stored(tensor, mask, block)
        for first, last in _pieces(kept.shape[0], block[0] * bits.shape[1]):
            jobs.append((bits, kept, first, last, *block, _MINUS_ZERO[bits.itemsize]))
            layers.append(layer)
    for layer, found in zip(layers, _run(_count_set, jobs), strict=True):
        if found:
            counts[layer] += found
    return counts


@_compiled
def _count_set(bits, mask, first, last, n, m, minus_zero):
    n_rows, n_cols = bits.shape
    found = 0
    for unit_row in range(first, last):
        kept = mask[unit_row]
        for row in range(unit_row * n, min((unit_row + 1) * n, n_rows)):
            own = bits[row]
            if m == 1:
                clean = True
                for c in range(n_cols):
                    clean &= kept[c] | (own[c] == 0) | (own[c] == minus_zero)
                if not clean:
                    for c in range(n_cols):
                        found += not (kept[c] or own[c] == 0 or own[c] == minus_zero)
            else:
                for c in range(n_cols):
                    found += not (kept[c // m] or own[c] == 0 or own[c] == minus_zero)
    return found


def mask_statistics(masks: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    """See :func:`tritprune.kernels.reference.mask_statistics`."""
    counts = np.zeros((len(masks), 2), np.int64)
    jobs: list[tuple[Any, ...]] = []
    layers: list[int] = []
    for layer, (mask, old) in enumerate(zip(masks, previous, strict=True)):
        pair = [unpack_mask(each, (8 * each.numel(),)) if is_packed(each) else each for each in (mask, old)]
        own, before = (each.contiguous().view(-1).numpy() for each in pair)
        for first, last in _runs(own.size):
            jobs.append((own, before, first, last))
            layers.append(layer)
    for layer, (kept, changed) in zip(layers, _run(_count_changes, jobs), strict=True):
        counts[layer] += (kept, changed)
    return torch.from_numpy(counts)


@_compiled
def _count_changes(mask, old, first, last):
    kept = changed = 0
    for u in range(first, last):
        kept += mask[u]
        changed += mask[u] != old[u]
    return kept, changed


# --- how work is shared out


def _pieces(rows: int, elements_per_row: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about ``_PIECE`` elements."""
    step = max(1, _PIECE // max(1, elements_per_row))
    return ((first, min(first + step, rows)) for first in range(0, rows, step)) if elements_per_row else iter(())


def _runs(length: int) -> Iterator[tuple[int, int]]:
    """Ranges of ``_PIECE`` positions."""
    return ((first, min(first + _PIECE, length)) for first in range(0, length, _PIECE))


def _plain(tensor: Tensor) -> np.ndarray:
    """A contiguous array: fp32 as it is, bf16 as its bits in int16, fp16 as fp32."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    return tensor.float().numpy()


def _stored(tensor: Tensor, mask: Tensor, block: Block) -> tuple[np.ndarray, np.ndarray, Block]:
    """A tensor's own memory as integers of its width, its mask and its block, columns adjacent where they can be."""
    if is_packed(mask):
        mask = unpack_mask(mask, UnitGrid.of_blocks((tensor.shape[0], tensor.shape[1]), block).shape)
    if not tensor.is_contiguous() and tensor.t().is_contiguous():
        tensor, mask, block = tensor.t(), mask.t(), (block[1], block[0])
    bits = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy()
    return bits, mask.contiguous().numpy(), block


def _bits(score: Tensor) -> np.ndarray:
    """Contiguous scores in their own memory: fp32, or bf16 as int16."""
    return (score.view(torch.int16) if score.dtype == torch.bfloat16 else score).numpy()


def _sizes(grid: UnitGrid) -> tuple[int, int, int, int, int]:
    """Columns, and the sizes of units; in a grid of one row or column only the last size counts."""
    row_size = grid.row_size if grid.rows > 1 else grid.last_row_size
    col_size = grid.col_size if grid.cols > 1 else grid.last_col_size
    return max(grid.cols, 1), row_size, grid.last_row_size, col_size, grid.last_col_size
