"""The score at which a budget of elements is spent: a bracket from a sample, and a radix select of what is in it.

A score becomes an unsigned 32-bit key of the same order (:func:`_key`). Four passes, one for each byte of the key,
most significant first, add up the elements per byte value among the units that share the bytes found so far:

    H[d] = sum of size(u) over {u: key(u) starts with the prefix, next byte is d}
    next byte = the first d with H[0] + ... + H[d] > left;    left <- left - (H[0] + ... + H[d - 1])

Many units are first narrowed to the few candidates of bracket.py: the scores are read once (4 bytes a unit), and the
passes read candidates. Whether the bracket holds is known on the device only, so the passes are always launched, and
look there: at the candidates, or at all scores where it does not hold, or at nothing where it has the answer already.
Few units are read by the four passes alone, out of the cache.

The state between passes is 8 KiB on the device, nothing is read back, and sums of integers do not depend on the order
of programs. Each pass first takes the step that the pass before it left open.

Units of the usual size are counted per program and weighed at its end; the others (at ragged edges) are added one by
one.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.sampling import Sampling, get_sampling
from tritprune.kernels.threshold_reference import Bounds
from tritprune.kernels.triton import bracket, multi_tensor
from tritprune.kernels.triton.bracket import ANSWERED, EVERYTHING, FIELDS, Launch, unit_sizes
from tritprune.kernels.triton.multi_tensor import load_pointer, load_size
from tritprune.kernels.triton.order import BITS, Order, load_bounds, load_standing
from tritprune.kernels.units import UnitGrid

PASSES = 4
BINS = tl.constexpr(256)
KEY_OF_INFINITY = tl.constexpr(0xFF800000)
_TILE = 8192


@triton.jit
def _key(score):
    """fp32 -> uint32 of the same order, with -0 = +0: the sign bit flipped, all bits flipped where it was set."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def narrow(
    state_ptr,  # [PASSES + 1, 2] int64: prefix, elements left
    histogram_ptr,  # [PASSES, BINS] int64
    PASS: tl.constexpr,
):
    """Prefix and elements left once PASS bytes are known."""
    if PASS == 0:
        return tl.load(state_ptr), tl.load(state_ptr + 1)
    prefix = tl.load(state_ptr + 2 * PASS - 2)
    left = tl.load(state_ptr + 2 * PASS - 1)
    bins = tl.arange(0, BINS)
    elements = tl.load(histogram_ptr + (PASS - 1) * BINS + bins)  # [BINS]
    spent = tl.cumsum(elements, 0)
    byte = tl.minimum(tl.sum((spent <= left).to(tl.int32)), BINS - 1)  # all fit: the highest key there is
    return prefix * BINS + byte, left - tl.sum(tl.where(bins < byte, elements, 0))


@triton.jit
def byte_of(score, chosen, prefix, PASS: tl.constexpr):
    """The byte that a pass looks at, and which of the chosen scores share the bytes before it."""
    key = _key(score)
    if PASS > 0:
        chosen = chosen & ((key >> (32 - 8 * PASS)).to(tl.int64) == prefix)
    return ((key >> (24 - 8 * PASS)) & 255).to(tl.int32), chosen


@triton.jit
def store_answer(threshold_ptr, remainder_ptr, key, left):
    """A key as the threshold that it stands for; at infinity nothing is left for its equals, which are protected."""
    if key >= KEY_OF_INFINITY:
        key = (key * 0) + KEY_OF_INFINITY
        left = left * 0
    bits = tl.where(key >= 2147483648, key - 2147483648, 4294967295 - key)  # undo _key
    tl.store(threshold_ptr, bits.to(tl.uint32).to(tl.float32, bitcast=True))
    tl.store(remainder_ptr, left)


@triton.jit
def _histogram_kernel(
    state_ptr,  # [PASSES + 1, 2] int64
    histogram_ptr,  # [PASSES, BINS] int64
    verdict_ptr,  # [3] int64: where to look, ...
    tally_ptr,  # [5, programs] int64; the last row: candidates of each program
    candidates_ptr,  # [programs, capacity] fp32
    sizes_ptr,  # [programs, capacity] int64 if SIZED
    table_ptr,  # [T, FIELDS]: first tile, tiles of all, usual size, score, units, cols, row, last row, col, last col,
    owners_ptr,  # [tiles]                                               programs, capacity of a segment, kept, layer
    bound_scores_ptr,  # [T, 2] fp32 if BOUNDED
    bound_places_ptr,  # [T, 2] int64 if BOUNDED
    KEPT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PASS: tl.constexpr,
    SIZED: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BRACKETED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    where = tl.load(verdict_ptr)
    if where != ANSWERED:
        prefix, left = narrow(state_ptr, histogram_ptr, PASS)
        if program == 0:
            tl.store(state_ptr + 2 * PASS, prefix)
            tl.store(state_ptr + 2 * PASS + 1, left)
        bin_ptr = histogram_ptr + PASS * BINS
        masses = tl.zeros([BINS], tl.int64)
        if where == EVERYTHING:
            n_tiles = tl.load(table_ptr + 1)
            number = program
            while number < n_tiles:
                row_ptr = table_ptr + tl.load(owners_ptr + number).to(tl.int64) * FIELDS
                score_ptr = load_pointer(row_ptr + 3, tl.float32, ALIGNED)
                n_units = load_size(row_ptr + 4, ALIGNED)
                bounds = load_bounds(bound_scores_ptr, bound_places_ptr, tl.load(row_ptr + 13), BOUNDED)
                size = tl.load(row_ptr + 6) * tl.load(row_ptr + 8)
                counts = tl.zeros([BINS], tl.int32)
                start = (number - tl.load(row_ptr)) * (ROUNDS * BLOCK)
                stop = tl.minimum(start + ROUNDS * BLOCK, n_units)
                while start < stop:
                    of = (row_ptr + 12, start, n_units, score_ptr, bounds)
                    score, unit, inside = load_standing(*of, KEPT, BOUNDED, ALIGNED, BLOCK)
                    byte, chosen = byte_of(score, inside, prefix, PASS)
                    if RAGGED:
                        own_size, edge = unit_sizes(row_ptr, unit, n_units, RAGGED)
                        tl.atomic_add(bin_ptr + byte, own_size, mask=chosen & edge, sem="relaxed")
                        chosen = chosen & (edge == 0)
                    counts += tl.histogram(byte, BINS, mask=chosen)
                    start += BLOCK
                masses += counts.to(tl.int64) * size
                number += tl.num_programs(0)
        elif BRACKETED:
            first = program * tl.load(table_ptr + 11)
            length = tl.load(tally_ptr + 4 * tl.num_programs(0) + program)
            usual = tl.load(table_ptr + 2)
            counts = tl.zeros([BINS], tl.int32)
            start = length * 0
            while start < length:
                place = start + tl.arange(0, BLOCK)  # [BLOCK] int64
                inside = place < length
                score = tl.load(candidates_ptr + first + place, mask=inside, other=0.0)
                byte, chosen = byte_of(score, inside, prefix, PASS)
                if SIZED:
                    own_size = tl.load(sizes_ptr + first + place, mask=chosen, other=0)
                    unusual = own_size != usual
                    tl.atomic_add(bin_ptr + byte, own_size, mask=chosen & unusual, sem="relaxed")
                    chosen = chosen & (own_size == usual)
                counts += tl.histogram(byte, BINS, mask=chosen)
                start += BLOCK
            masses += counts.to(tl.int64) * usual
        tl.atomic_add(bin_ptr + tl.arange(0, BINS), masses, mask=masses > 0, sem="relaxed")


@triton.jit
def _finish_kernel(
    threshold_ptr,  # [] fp32
    remainder_ptr,  # [] int64
    state_ptr,  # [PASSES + 1, 2] int64
    histogram_ptr,  # [PASSES, BINS] int64
    verdict_ptr,  # [3] int64: where to look, number of the answer in (low, high), elements left there
    low_ptr,  # [1] fp32
    high_ptr,  # [1] fp32
):
    if tl.load(verdict_ptr) == ANSWERED:
        score = tl.load(low_ptr)
        if tl.load(verdict_ptr + 1) == 1:
            score = tl.load(high_ptr)
        key = _key(score).to(tl.int64)
        left = tl.load(verdict_ptr + 2)
    else:
        key, left = narrow(state_ptr, histogram_ptr, 4)
    store_answer(threshold_ptr, remainder_ptr, key, left)


def kth_score_of_all(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    budget: int,
    kept: Sequence[Tensor] | None,
    bounds: Bounds | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`tritprune.kernels.reference.kth_score`; no synchronisation, no copy of the scores."""
    device = scores[0].device if scores else torch.device("cpu")
    threshold = torch.full((), math.inf, dtype=torch.float32, device=device)
    remainder = torch.zeros((), dtype=torch.int64, device=device)
    if budget >= sum(grid.elements for grid in grids):
        return threshold, remainder
    order = Order.of(scores, grids, kept, bounds, device)
    order = replace(order, layers=[layer for layer in order.layers if layer.grid.units])
    grids = [layer.grid for layer in order.layers]
    units, sized = sum(grid.units for grid in grids), not bracket.one_size(grids)
    sampling = get_sampling()
    sampled = units >= sampling.least
    launches = _launches(order, sampling, device)
    programs = launches[0].programs
    parts = [2 * (PASSES + 1), 4, PASSES * BINS.value, 5 * programs]  # each but the last of whole 16 bytes
    state, verdict, histogram, tally = torch.zeros(sum(parts), dtype=torch.int64, device=device).split(parts)
    state[1:2].fill_(budget)
    low = high = candidates = threshold.view(1)
    sizes = remainder.view(1)
    if sampled:
        low, high = bracket.bracket(order, budget, programs * launches[0].capacity, sampling)
        candidates, sizes = bracket.collect(launches, order, low, high, state, verdict, tally, sized=sized)
    for number in range(PASSES):
        for place, launch in enumerate(launches):
            multi_tensor.launch(
                _histogram_kernel,
                programs if sampled else min(programs, launch.tiles),
                *(state, histogram, verdict, tally, candidates, sizes, launch.table, launch.owners, *order.bounds),
                **order.constants,
                PASS=number,
                BRACKETED=sampled and place == 0,  # the first launch looks at the candidates of all layers
                SIZED=sized and sampled and place == 0,
                **launch.constants,
            )
    multi_tensor.launch(_finish_kernel, 1, threshold, remainder, state, histogram, verdict, low, high)
    return threshold, remainder


def _launches(order: Order, sampling: Sampling, device: torch.device) -> list[Launch]:
    """A launch for every kind of layer: ragged or not, aligned or not."""
    layers, packed = order.layers, order.constants["KEPT"] == BITS.value
    grids = [layer.grid for layer in layers]
    groups = multi_tensor.group_by(layers, lambda layer: layer.variant)
    tiles = {variant: sum(-(-one.grid.units // _TILE) for one in members) for variant, members in groups.items()}
    programs = min(sampling.programs, max(tiles.values()))
    units, sized, usual = sum(grid.units for grid in grids), not bracket.one_size(grids), _usual_size(grids)
    capacity = bracket.segment_capacity(units, programs, sized, sampling)
    launches: list[Launch] = []
    for (ragged, aligned), members in groups.items():
        shared = tiles[ragged, aligned], usual
        fields = [(*shared, *layer.fields, programs, capacity, *layer.marks) for layer in members]
        counts = [layer.grid.units for layer in members]
        table, owners, _ = multi_tensor.tables(fields, counts, _TILE, device)
        block = 512 if ragged or sized or packed else 1024  # 1024 would need more registers than there are
        constants = {"RAGGED": ragged, "ALIGNED": aligned, "BLOCK": block, "ROUNDS": _TILE // block}
        launches.append(Launch(table, owners, tiles[ragged, aligned], programs, capacity, constants))
    return launches


def _usual_size(grids: Sequence[UnitGrid]) -> int:
    """The size that most units have, as far as whole layers and their inner units tell."""
    units: dict[int, int] = {}
    for grid in grids:
        size = grid.uniform_size or grid.row_size * grid.col_size
        units[size] = units.get(size, 0) + grid.units
    return max(units, key=lambda size: units[size])
