"""The score at which a budget of elements is spent: a radix select in which every unit weighs its size.

A score becomes an unsigned 32-bit key of the same order (:func:`_key`). Four passes, one for each byte of the key,
most significant first, add up the elements per byte value among the units that share the bytes found so far:

    H[d] = sum of size(u) over {u: key(u) starts with the prefix, next byte is d}
    next byte = the first d with H[0] + ... + H[d] > left;    left <- left - (H[0] + ... + H[d - 1])

The scores are read four times (16 bytes a unit); the state between passes is 8 KiB on the device, nothing is read
back, and sums of integers do not depend on the order of programs. Each pass first takes the step that the pass before
it left open, so that five launches (more if layers differ in kind) do it all.

Units of one size are counted per program and weighed once; the smaller ones at ragged edges are added one by one.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.multi_tensor import find_tile, load_pointer, load_size
from tritprune.kernels.units import UnitGrid

FIELDS = tl.constexpr(8)
PASSES = 4
BINS = tl.constexpr(256)
KEY_OF_INFINITY = tl.constexpr(0xFF800000)
_BLOCK = 1024
_ROUNDS = 8


@triton.jit
def _key(score):
    """fp32 -> uint32 of the same order, with -0 = +0: the sign bit flipped, all bits flipped where it was set."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _narrow(
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
def _histogram_kernel(
    state_ptr,  # [PASSES + 1, 2] int64
    histogram_ptr,  # [PASSES, BINS] int64
    table_ptr,  # [T, FIELDS]: first tile, score, units, cols, row size, last row size, col size, last col size
    owners_ptr,  # [tiles]
    PASS: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    prefix, left = _narrow(state_ptr, histogram_ptr, PASS)
    if tl.program_id(0) == 0:
        tl.store(state_ptr + 2 * PASS, prefix)
        tl.store(state_ptr + 2 * PASS + 1, left)
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    score_ptr = load_pointer(row_ptr + 1, tl.float32, ALIGNED)
    n_units = load_size(row_ptr + 2, ALIGNED)
    n_cols = tl.load(row_ptr + 3)
    row_size = tl.load(row_ptr + 4)
    last_row_size = tl.load(row_ptr + 5)
    col_size = tl.load(row_ptr + 6)
    last_col_size = tl.load(row_ptr + 7)

    bin_ptr = histogram_ptr + PASS * BINS
    counts = tl.zeros([BINS], tl.int32)
    for turn in tl.static_range(ROUNDS):
        unit = (tile * ROUNDS + turn) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
        chosen = unit < n_units
        key = _key(tl.load(score_ptr + unit, mask=chosen, other=0.0))
        if PASS > 0:
            chosen = chosen & ((key >> (32 - 8 * PASS)).to(tl.int64) == prefix)
        byte = ((key >> (24 - 8 * PASS)) & 255).to(tl.int32)
        if RAGGED:
            row = unit // n_cols
            in_last_row = row == (n_units // n_cols) - 1
            in_last_col = unit - row * n_cols == n_cols - 1
            size = tl.where(in_last_row, last_row_size, row_size) * tl.where(in_last_col, last_col_size, col_size)
            edge = in_last_row | in_last_col
            tl.atomic_add(bin_ptr + byte, size, mask=chosen & edge, sem="relaxed")
            chosen = chosen & ~edge
        counts += tl.histogram(byte, BINS, mask=chosen)
    tl.atomic_add(
        bin_ptr + tl.arange(0, BINS), counts.to(tl.int64) * (row_size * col_size), mask=counts > 0, sem="relaxed"
    )


@triton.jit
def _finish_kernel(
    threshold_ptr,  # [] fp32
    remainder_ptr,  # [] int64
    state_ptr,  # [PASSES + 1, 2] int64
    histogram_ptr,  # [PASSES, BINS] int64
):
    key, left = _narrow(state_ptr, histogram_ptr, 4)
    if key >= KEY_OF_INFINITY:
        key = (key * 0) + KEY_OF_INFINITY
        left = left * 0
    bits = tl.where(key >= 2147483648, key - 2147483648, 4294967295 - key)  # undo _key
    tl.store(threshold_ptr, bits.to(tl.uint32).to(tl.float32, bitcast=True))
    tl.store(remainder_ptr, left)


def kth_score(scores: Sequence[Tensor], grids: Sequence[UnitGrid], budget: int) -> tuple[Tensor, Tensor]:
    """See :func:`tritprune.kernels.reference.kth_score`; no synchronisation, no joined copy of the scores."""
    device = scores[0].device if scores else torch.device("cpu")
    threshold = torch.full((), math.inf, dtype=torch.float32, device=device)
    remainder = torch.zeros((), dtype=torch.int64, device=device)
    if not any(grid.units for grid in grids):
        return threshold, remainder
    state = torch.zeros(PASSES + 1, 2, dtype=torch.int64, device=device)
    state[0, 1].fill_(budget)
    histogram = torch.zeros(PASSES, BINS.value, dtype=torch.int64, device=device)
    layers = [(score.contiguous(), grid) for score, grid in zip(scores, grids, strict=True)]
    launches = [
        (
            variant,
            multi_tensor.tables(
                [_fields(*layer) for layer in members], [grid.units for _, grid in members], _BLOCK * _ROUNDS, device
            ),
        )
        for variant, members in multi_tensor.group_by(layers, lambda layer: _variant(*layer)).items()
    ]
    for number in range(PASSES):
        for (ragged, aligned), (table, owners, tiles) in launches:
            constants = {"PASS": number, "RAGGED": ragged, "ALIGNED": aligned, "BLOCK": _BLOCK, "ROUNDS": _ROUNDS}
            multi_tensor.launch(_histogram_kernel, tiles, state, histogram, table, owners, **constants)
    multi_tensor.launch(_finish_kernel, 1, threshold, remainder, state, histogram)
    return threshold, remainder


def _fields(score: Tensor, grid: UnitGrid) -> tuple[int, ...]:
    row_size, col_size = grid.row_size, grid.col_size
    if grid.uniform_size is not None and grid.units:
        row_size, col_size = grid.last_row_size, grid.last_col_size  # all that a grid of one row or column has
    sizes = (row_size, grid.last_row_size, col_size, grid.last_col_size)
    return (score.data_ptr(), grid.units, max(grid.cols, 1), *sizes)


def _variant(score: Tensor, grid: UnitGrid) -> tuple[bool, bool]:
    """(ragged, aligned): what a launch has in common."""
    return grid.uniform_size is None, multi_tensor.is_aligned(score.data_ptr(), grid.units)
