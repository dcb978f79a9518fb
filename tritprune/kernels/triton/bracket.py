"""A bracket around the threshold, from a sample; one read of all scores leaves only what lies inside it to search.

1. Sample: about one score of 1024, one from every stretch of equal length in elements, at a place in it that a hash
   chooses: the same on every run, and no period of the scores is met at one phase only. torch sorts it.
2. low, high = sample at ranks m q -+ 5 sqrt(m q (1 - q)), q = budget / elements.
3. One read of all scores (4 bytes a unit). Each program adds up the elements of its units below low, at low and at
   high, and appends the scores strictly between to a segment of its own, whose counter no other program touches: a
   set, whose order nobody reads. Tiles are dealt to programs in turn, so that segments fill evenly whatever layer the
   candidates are in.
4. Decide, on the device: the threshold is low or high (many equal scores), or among the candidates, or, where a
   sample misled or a segment overflowed, among all scores; the passes of kth.py then read what is left.

The sample decides how much is read, never what is found. Scratch: the sample and its order (at most 40 MiB while it is
sorted, 4 after that) and then at most 56 MiB of candidates.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.sampling import Sampling
from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.multi_tensor import find_tile, load_pointer
from tritprune.kernels.triton.order import BITS, NONE, Order, load_bounds, load_mask, standing
from tritprune.kernels.units import UnitGrid

LANES, ROWS = tl.constexpr(128), tl.constexpr(8)
"""Threads of a program, and scores that each holds at once."""

SAMPLE_FIELDS = tl.constexpr(8)
FIELDS = tl.constexpr(14)
MARGIN = tl.constexpr(4)
"""Infinities before and after the sorted sample: a rank beyond its ends is one of them."""

EVERYTHING, CANDIDATES, ANSWERED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Where the threshold is looked for."""

SLACK = 1.2
_SAMPLE_BLOCK = 1024


class Launch(NamedTuple):
    """Layers that one launch serves: tables, tiles, programs and scores in a segment, constants of its kernels."""

    table: Tensor
    owners: Tensor
    tiles: int
    programs: int
    capacity: int
    constants: dict[str, int | bool]


@triton.jit
def unit_sizes(row_ptr, unit, n_units, RAGGED: tl.constexpr):
    """Elements of each unit (a number if all are equal), and which units lie at a ragged edge."""
    size = tl.load(row_ptr + 6) * tl.load(row_ptr + 8)
    edge = unit < 0
    if RAGGED:
        n_cols = tl.load(row_ptr + 5)
        row = unit // n_cols
        in_last_row = row == (n_units // n_cols) - 1
        in_last_col = unit - row * n_cols == n_cols - 1
        height = tl.where(in_last_row, tl.load(row_ptr + 7), tl.load(row_ptr + 6))
        size = height * tl.where(in_last_col, tl.load(row_ptr + 9), tl.load(row_ptr + 8))
        edge = in_last_row | in_last_col
    return size, edge


@triton.jit
def _sample_kernel(
    sample_ptr,  # [MARGIN + samples + MARGIN] fp32
    table_ptr,  # [T, SAMPLE_FIELDS]: first tile, first sample, score, samples, units // samples, units % samples,
    owners_ptr,  # [tiles]                                                                      kept, layer
    bound_scores_ptr,  # [T, 2] fp32 if BOUNDED
    bound_places_ptr,  # [T, 2] int64 if BOUNDED
    KEPT: tl.constexpr,
    BOUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, SAMPLE_FIELDS)
    first = tl.load(row_ptr + 1)
    score_ptr = load_pointer(row_ptr + 2, tl.float32, False)
    samples = tl.load(row_ptr + 3)
    stride = tl.load(row_ptr + 4)
    rest = tl.load(row_ptr + 5)
    number = tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
    drawn = number < samples
    hashed = (number * 2654435761) & 4294967295
    unit = number * stride + (number * rest) // samples + ((hashed * stride) >> 32)
    score = tl.load(score_ptr + unit, mask=drawn, other=0.0)
    marks = drawn
    if KEPT != NONE:
        marks = load_mask(load_pointer(row_ptr + 6, tl.int8, False), unit, drawn, KEPT == BITS)
    bounds = load_bounds(bound_scores_ptr, bound_places_ptr, tl.load(row_ptr + 7), BOUNDED)
    score = standing(score, unit, marks, bounds, KEPT, BOUNDED)
    tl.store(sample_ptr + MARGIN + first + number, score, mask=drawn)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        infinite = tl.full([MARGIN], float("inf"), tl.float32)
        tl.store(sample_ptr + tl.arange(0, MARGIN), -infinite)
        tl.store(sample_ptr + MARGIN + first + samples + tl.arange(0, MARGIN), infinite)


@triton.jit
def _look(
    tally,
    row,
    score_ptr,
    kept_ptr,
    row_ptr,
    start,
    n_units,
    low,
    high,
    apart,
    bounds,
    KEPT: tl.constexpr,
    BOUNDED: tl.constexpr,
    SIZED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """One score a lane: where it stands, its unit's size, whether it is inside, and the tally with it added."""
    below, at_low, at_high, between, count = tally
    unit = start + row * LANES + tl.arange(0, LANES)  # [LANES] int64
    score = tl.load(score_ptr + unit, mask=unit < n_units, other=float("nan"))  # NaN is nowhere
    marks = unit
    if KEPT != NONE:
        marks = load_mask(kept_ptr, unit, unit < n_units, KEPT == BITS)
    score = standing(score, unit, marks, bounds, KEPT, BOUNDED)
    size = 1
    if SIZED:
        size, _ = unit_sizes(row_ptr, unit, n_units, RAGGED)
    inside = (score > low) & (score < high)
    below += tl.where(score < low, size, 0)
    at_low += tl.where(score == low, size, 0)
    at_high += tl.where(score == apart, size, 0)
    if SIZED:
        between += tl.where(inside, size, 0)
    return score, size, inside, (below, at_low, at_high, between, count + inside.to(tl.int32))


@triton.jit
def _append(place, score, size, inside, candidates_ptr, sizes_ptr, capacity, SIZED: tl.constexpr):
    """Store what is inside at the lane's next place; the place after it."""
    stored = inside & (place < capacity)
    tl.store(candidates_ptr + place, score, mask=stored)
    if SIZED:
        tl.store(sizes_ptr + place, tl.zeros([LANES], tl.int64) + size, mask=stored)
    return place + inside.to(tl.int32)


@triton.jit
def _collect_kernel(
    tally_ptr,  # [5, programs] int64
    candidates_ptr,  # [programs, capacity] fp32
    sizes_ptr,  # [programs, capacity] int64 if SIZED
    low_ptr,  # [1] fp32
    high_ptr,  # [1] fp32
    table_ptr,  # [T, FIELDS]: first tile, tiles of all, usual size, score, units, cols, row, last row, col, last col,
    owners_ptr,  # [tiles]                                               programs, capacity of a segment, kept, layer
    bound_scores_ptr,  # [T, 2] fp32 if BOUNDED
    bound_places_ptr,  # [T, 2] int64 if BOUNDED
    KEPT: tl.constexpr,
    BOUNDED: tl.constexpr,
    SIZED: tl.constexpr,
    RAGGED: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n_programs = tl.num_programs(0)
    low = tl.load(low_ptr)
    high = tl.load(high_ptr)
    apart = tl.where(low < high, high, float("nan"))  # a score that is both is counted at low only
    COUNT: tl.constexpr = tl.int64 if SIZED else tl.int32
    zeros = tl.zeros([LANES], COUNT)
    none = tl.zeros([LANES], tl.int32)
    tally = (zeros, zeros, zeros, zeros, none)
    capacity = tl.load(table_ptr + 11).to(tl.int32)
    own_candidates_ptr = candidates_ptr + program * capacity
    own_sizes_ptr = sizes_ptr + program * capacity
    filled_ptr = tally_ptr + 4 * n_programs + program
    n_tiles = tl.load(table_ptr + 1)
    number = program
    while number < n_tiles:
        row_ptr = table_ptr + tl.load(owners_ptr + number).to(tl.int64) * FIELDS
        score_ptr = load_pointer(row_ptr + 3, tl.float32, False)
        kept_ptr = load_pointer(row_ptr + 12, tl.int8, False)
        bounds = load_bounds(bound_scores_ptr, bound_places_ptr, tl.load(row_ptr + 13), BOUNDED)
        n_units = tl.load(row_ptr + 4)
        start = (number - tl.load(row_ptr)) * TILE
        stop = tl.minimum(start + TILE, n_units)
        while start < stop:
            # Eight loads before the one atomic operation of a lane, whose answer all its stores wait for.
            where = (score_ptr, kept_ptr, row_ptr, start, n_units, low, high, apart, bounds)
            score0, size0, inside0, tally = _look(tally, 0, *where, KEPT, BOUNDED, SIZED, RAGGED)
            score1, size1, inside1, tally = _look(tally, 1, *where, KEPT, BOUNDED, SIZED, RAGGED)
            score2, size2, inside2, tally = _look(tally, 2, *where, KEPT, BOUNDED, SIZED, RAGGED)
            score3, size3, inside3, tally = _look(tally, 3, *where, KEPT, BOUNDED, SIZED, RAGGED)
            score4, size4, inside4, tally = _look(tally, 4, *where, KEPT, BOUNDED, SIZED, RAGGED)
            score5, size5, inside5, tally = _look(tally, 5, *where, KEPT, BOUNDED, SIZED, RAGGED)
            score6, size6, inside6, tally = _look(tally, 6, *where, KEPT, BOUNDED, SIZED, RAGGED)
            score7, size7, inside7, tally = _look(tally, 7, *where, KEPT, BOUNDED, SIZED, RAGGED)
            count = tally[4]
            place = tl.atomic_add(filled_ptr + none, count.to(tl.int64), mask=count > 0, sem="relaxed").to(tl.int32)
            into = (own_candidates_ptr, own_sizes_ptr, capacity, SIZED)
            place = _append(place, score0, size0, inside0, *into)
            place = _append(place, score1, size1, inside1, *into)
            place = _append(place, score2, size2, inside2, *into)
            place = _append(place, score3, size3, inside3, *into)
            place = _append(place, score4, size4, inside4, *into)
            place = _append(place, score5, size5, inside5, *into)
            place = _append(place, score6, size6, inside6, *into)
            place = _append(place, score7, size7, inside7, *into)
            tally = (tally[0], tally[1], tally[2], tally[3], none)
            start += ROWS * LANES
        number += n_programs

    below, at_low, at_high, between, _ = tally
    usual = tl.full([], 1, tl.int64)
    if not SIZED:
        usual = tl.load(table_ptr + 2)
    own_ptr = tally_ptr + program
    tl.store(own_ptr, tl.load(own_ptr) + tl.sum(below).to(tl.int64) * usual)
    own_ptr += n_programs
    tl.store(own_ptr, tl.load(own_ptr) + tl.sum(at_low).to(tl.int64) * usual)
    own_ptr += n_programs
    tl.store(own_ptr, tl.load(own_ptr) + tl.sum(at_high).to(tl.int64) * usual)
    if SIZED:
        own_ptr += n_programs
        tl.store(own_ptr, tl.load(own_ptr) + tl.sum(between))


@triton.jit
def _decide_kernel(
    state_ptr,  # prefix and elements left, as kth.py reads them
    verdict_ptr,  # [3] int64: where to look, number of the answer in (low, high), elements left there
    tally_ptr,  # [5, programs] int64
    table_ptr,  # as above
    SIZED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    below = tl.full([], 0, tl.int64)
    at_low = tl.full([], 0, tl.int64)
    at_high = tl.full([], 0, tl.int64)
    between = tl.full([], 0, tl.int64)
    longest = tl.full([], 0, tl.int64)
    programs = tl.load(table_ptr + 10)
    start = tl.full([], 0, tl.int64)
    while start < programs:
        program = start + tl.arange(0, BLOCK)  # [BLOCK]
        own_ptrs = tally_ptr + program
        there = program < programs
        filled = tl.load(own_ptrs + 4 * programs, mask=there, other=0)
        longest = tl.maximum(longest, tl.max(filled))
        below += tl.sum(tl.load(own_ptrs, mask=there, other=0))
        at_low += tl.sum(tl.load(own_ptrs + programs, mask=there, other=0))
        at_high += tl.sum(tl.load(own_ptrs + 2 * programs, mask=there, other=0))
        if SIZED:
            between += tl.sum(tl.load(own_ptrs + 3 * programs, mask=there, other=0))
        else:
            between += tl.sum(filled) * tl.load(table_ptr + 2)
        start += BLOCK
    left = tl.load(state_ptr + 1) - below
    after_low = left - at_low
    after_between = after_low - between
    if left >= 0:
        if after_low < 0:
            tl.store(verdict_ptr, ANSWERED)
            tl.store(verdict_ptr + 2, left)
        elif after_between < 0:
            if longest <= tl.load(table_ptr + 11):
                tl.store(verdict_ptr, CANDIDATES)
                tl.store(state_ptr + 1, after_low)
        elif after_between < at_high:
            tl.store(verdict_ptr, ANSWERED)
            tl.store(verdict_ptr + 1, 1)
            tl.store(verdict_ptr + 2, after_between)


def bracket(order: Order, budget: int, room: int, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Two scores between which the threshold almost surely lies: fp32 ``[1]`` each.

    Args:
        order: the layers, none empty.
        budget: elements that may go, less than there are.
        room: scores that fit into all segments.
        sampling: sizes.
    """
    device = order.layers[0].score.device
    grids = [layer.grid for layer in order.layers]
    units, elements = sum(grid.units for grid in grids), sum(grid.elements for grid in grids)
    wanted = min(max(units // sampling.units_per_sample, sampling.smallest), sampling.largest)
    counts = [max(1, grid.elements * wanted // elements) for grid in grids]
    drawn = sum(counts)
    fields: list[tuple[int, ...]] = []
    first = 0
    for layer, count in zip(order.layers, counts, strict=True):
        drawn_from = (layer.score.data_ptr(), count, layer.grid.units // count, layer.grid.units % count)
        fields.append((first, *drawn_from, *layer.marks))
        first += count
    sample = torch.empty(drawn + 2 * MARGIN.value, dtype=torch.float32, device=device)
    table, owners, tiles = multi_tensor.tables(fields, counts, _SAMPLE_BLOCK, device)
    tensors = (sample, table, owners, *order.bounds)
    multi_tensor.launch(_sample_kernel, tiles, *tensors, **order.constants, BLOCK=_SAMPLE_BLOCK)
    ordered = torch.sort(sample).values
    share = budget / elements
    spread = sampling.deviations * math.sqrt(drawn * share * (1 - share)) + 5
    spread = min(spread, room * drawn / (2 * SLACK * units))
    # Multiples of 4 are addresses of one alignment: one compiled kernel serves all ranks.
    low = max(0, MARGIN.value + math.floor(share * drawn - spread)) // 4 * 4
    high = -(-min(MARGIN.value + math.ceil(share * drawn + spread), drawn + MARGIN.value) // 4) * 4
    return ordered[low : low + 1], ordered[high : high + 1]


def collect(
    launches: Sequence[Launch],
    order: Order,
    low: Tensor,
    high: Tensor,
    state: Tensor,
    verdict: Tensor,
    tally: Tensor,
    *,
    sized: bool,
) -> tuple[Tensor, Tensor]:
    """Tally the scores outside a bracket, keep those inside, and decide where the threshold is looked for.

    Args:
        launches: the layers.
        order: where their units stand.
        low: lower end, fp32 ``[1]``.
        high: upper end, fp32 ``[1]``.
        state: as kth.py reads it; the elements left for the candidates are written to it.
        verdict: int64 ``[3]`` of zeros, written.
        tally: int64 ``[5, programs]`` of zeros, written: elements below low, at low, at high and between, and scores
            in the segment.
        sized: whether units have several sizes.

    Returns:
        the scores strictly inside, fp32 ``[programs, capacity]``, and their sizes in elements, int64 (one unused
        number if all units have one size).
    """
    programs, capacity = launches[0].programs, launches[0].capacity
    scores = torch.empty(programs, capacity, dtype=torch.float32, device=tally.device)
    sizes = torch.empty(scores.shape if sized else (1,), dtype=torch.int64, device=tally.device)
    for launch in launches:
        multi_tensor.launch(
            _collect_kernel,
            programs,
            *(tally, scores, sizes, low, high, launch.table, launch.owners, *order.bounds),
            **order.constants,
            SIZED=sized,
            RAGGED=launch.constants["RAGGED"],
            TILE=launch.constants["BLOCK"] * launch.constants["ROUNDS"],
        )
    multi_tensor.launch(_decide_kernel, 1, state, verdict, tally, launches[0].table, SIZED=sized, BLOCK=1024)
    return scores, sizes


def segment_capacity(units: int, programs: int, sized: bool, sampling: Sampling) -> int:
    """Scores that a segment holds: twice the widest bracket's share, within the room. It depends on the model alone,
    so that one compiled kernel serves all budgets.
    """
    drawn = min(max(units // sampling.units_per_sample, sampling.smallest), sampling.largest)
    expected = 2 * units * sampling.deviations / math.sqrt(drawn)
    entries = min(expected, sampling.room // (12 if sized else 4))
    return max(16, int(entries / programs) // 16 * 16)


def one_size(grids: Sequence[UnitGrid]) -> bool:
    """Whether all units of all layers have the same size."""
    sizes = {grid.uniform_size for grid in grids}
    return len(sizes) == 1 and None not in sizes
