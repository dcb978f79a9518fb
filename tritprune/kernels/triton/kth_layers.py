"""A budget a layer: the search of kth.py for every layer by itself, all layers in the same launches.

The state and the histograms are those of kth.py, one set a layer (8 KiB), and each tile adds to its layer's. The scores
are read four times (16 bytes a unit); nothing is read back.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.threshold_reference import Bounds
from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.bracket import unit_sizes
from tritprune.kernels.triton.kth import (
    BINS,
    PASSES,
    byte_of,
    kth_score_of_all,
    narrow,
    store_answer,
)
from tritprune.kernels.triton.multi_tensor import find_tile, load_pointer, load_size
from tritprune.kernels.triton.order import Order, load_bounds, load_standing
from tritprune.kernels.units import UnitGrid

FIELDS = tl.constexpr(12)
STATE = tl.constexpr(2 * (PASSES + 1))
BYTES = tl.constexpr(PASSES)
_TILE = 4096


@triton.jit
def _layer_histogram_kernel(
    states_ptr,  # [T, PASSES + 1, 2] int64: prefix, elements left
    histograms_ptr,  # [T, PASSES, BINS] int64
    table_ptr,  # [T, FIELDS]: first tile, layer, budget, score, units, cols, row, last row, col, last col, kept, layer
    owners_ptr,  # [tiles]
    bound_scores_ptr,  # [T, 2] fp32 if BOUNDED
    bound_places_ptr,  # [T, 2] int64 if BOUNDED
    KEPT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PASS: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    layer = tl.load(row_ptr + 1)
    state_ptr = states_ptr + layer * STATE
    histogram_ptr = histograms_ptr + layer * (BYTES * BINS)
    if PASS == 0:
        prefix = layer * 0
        left = tl.load(row_ptr + 2)
    else:
        prefix, left = narrow(state_ptr, histogram_ptr, PASS)
    if tile == 0:
        tl.store(state_ptr + 2 * PASS, prefix)
        tl.store(state_ptr + 2 * PASS + 1, left)
    bin_ptr = histogram_ptr + PASS * BINS
    score_ptr = load_pointer(row_ptr + 3, tl.float32, ALIGNED)
    n_units = load_size(row_ptr + 4, ALIGNED)
    bounds = load_bounds(bound_scores_ptr, bound_places_ptr, layer, BOUNDED)
    counts = tl.zeros([BINS], tl.int32)
    start = tile * (ROUNDS * BLOCK)
    stop = tl.minimum(start + ROUNDS * BLOCK, n_units)
    while start < stop:
        of = (row_ptr + 10, start, n_units, score_ptr, bounds)
        score, unit, inside = load_standing(*of, KEPT, BOUNDED, ALIGNED, BLOCK)
        byte, chosen = byte_of(score, inside, prefix, PASS)
        if RAGGED:
            size, edge = unit_sizes(row_ptr, unit, n_units, RAGGED)
            tl.atomic_add(bin_ptr + byte, size, mask=chosen & edge, sem="relaxed")
            chosen = chosen & (edge == 0)
        counts += tl.histogram(byte, BINS, mask=chosen)
        start += BLOCK
    masses = counts.to(tl.int64) * (tl.load(row_ptr + 6) * tl.load(row_ptr + 8))
    tl.atomic_add(bin_ptr + tl.arange(0, BINS), masses, mask=masses > 0, sem="relaxed")


@triton.jit
def _layer_finish_kernel(
    thresholds_ptr,  # [T] fp32
    remainders_ptr,  # [T] int64
    states_ptr,  # [T, PASSES + 1, 2] int64
    histograms_ptr,  # [T, PASSES, BINS] int64
):
    layer = tl.program_id(0).to(tl.int64)
    histogram_ptr = histograms_ptr + layer * (BYTES * BINS)
    if tl.sum(tl.load(histogram_ptr + tl.arange(0, BINS))) > 0:  # a layer without units keeps the answer it has
        key, left = narrow(states_ptr + layer * STATE, histogram_ptr, BYTES)
        store_answer(thresholds_ptr + layer, remainders_ptr + layer, key, left)


def kth_score_of_each(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    budgets: Sequence[int],
    kept: Sequence[Tensor] | None,
    bounds: Bounds | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`tritprune.kernels.reference.kth_score`, with a budget a layer.

    A layer whose budget covers it, or is below 0, is not read and has ``(+inf, 0)``.
    """
    device = scores[0].device if scores else torch.device("cpu")
    thresholds = torch.full((len(scores),), float("inf"), dtype=torch.float32, device=device)
    remainders = torch.zeros(len(scores), dtype=torch.int64, device=device)
    parts = [len(scores) * STATE.value, len(scores) * PASSES * BINS.value]
    states, histograms = torch.zeros(sum(parts), dtype=torch.int64, device=device).split(parts)
    order = Order.of(scores, grids, kept, bounds, device)
    layers = [layer for layer in order.layers if 0 <= budgets[layer.number] < layer.grid.elements]
    launches = [
        (
            {"RAGGED": ragged, "ALIGNED": aligned, "BLOCK": 512 if ragged else 1024, "ROUNDS": 8 if ragged else 4},
            multi_tensor.tables(
                [(layer.number, budgets[layer.number], *layer.fields, *layer.marks) for layer in members],
                [layer.grid.units for layer in members],
                _TILE,
                device,
            ),
        )
        for (ragged, aligned), members in multi_tensor.group_by(layers, lambda layer: layer.variant).items()
    ]
    for number in range(PASSES):
        for constants, (table, owners, tiles) in launches:
            tensors = (states, histograms, table, owners, *order.bounds)
            constants = {**order.constants, "PASS": number, **constants}
            multi_tensor.launch(_layer_histogram_kernel, tiles, *tensors, **constants)
    multi_tensor.launch(_layer_finish_kernel, len(scores), thresholds, remainders, states, histograms)
    return thresholds, remainders


def kth_score(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    budget: int | Sequence[int],
    *,
    kept: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`tritprune.kernels.reference.kth_score`; no synchronisation, no copy of the scores."""
    if isinstance(budget, int):
        return kth_score_of_all(scores, grids, budget, kept, bounds)
    return kth_score_of_each(scores, grids, budget, kept, bounds)
