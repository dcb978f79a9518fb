"""From thresholds to masks, and to the units at which budgets are crossed.

    keep = s > t or (s = t and e > remainder)      e: elements in tied units from this one to the very last
    crossed at the unit with e - own elements <= remainder < e

where ``s`` is where a unit stands (order.py). Two passes over the scores: the first leaves the tied elements of every
tile (8 bytes for 1024 units, or for as many as keep that below 16 MiB), a scan over tiles turns them into what comes
after each tile, and the second writes the masks, or finds the crossing unit, counting within a tile only where it has
ties. 8 bytes a unit read, 1 written; nothing depends on the order of programs.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.sampling import get_sampling
from tritprune.kernels.threshold_reference import AFTER_ALL, BEFORE_ALL, Bounds
from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.kth_layers import kth_score_of_each
from tritprune.kernels.triton.masks import empty_mask, pack_bits
from tritprune.kernels.triton.multi_tensor import find_tile, is_aligned, load_pointer, load_size
from tritprune.kernels.triton.order import Order, SearchLayer, load_bounds, load_standing
from tritprune.kernels.units import UnitGrid

FIELDS = tl.constexpr(14)
NO_PLACE = tl.constexpr(BEFORE_ALL[1])
_BLOCK = 1024


@triton.jit
def _tied_elements(
    row_ptr,
    start,
    threshold,
    n_units,
    score_ptr,
    bounds,
    KEPT: tl.constexpr,
    BOUNDED: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where a block's units stand, which of them exist, and the sizes of those that are at the threshold (else 0)."""
    of = (row_ptr + 12, start, n_units, score_ptr, bounds)
    stands, unit, inside = load_standing(*of, KEPT, BOUNDED, ALIGNED, BLOCK)
    row_size = tl.load(row_ptr + 6)
    col_size = tl.load(row_ptr + 8)
    if RAGGED:
        n_cols = tl.load(row_ptr + 5)
        row = unit // n_cols
        in_last_row = row == (n_units // n_cols) - 1
        in_last_col = unit - row * n_cols == n_cols - 1
        row_size = tl.where(in_last_row, tl.load(row_ptr + 7), row_size)
        col_size = tl.where(in_last_col, tl.load(row_ptr + 9), col_size)
    tied = tl.where(inside & (stands == threshold), row_size * col_size, 0)
    return stands, unit, inside, tied


@triton.jit
def _ties_kernel(
    ties_ptr,  # [tiles of all layers] int64
    table_ptr,  # [T, FIELDS]: first tile, first of all tiles, mask, score, units, cols, row, last row, col, last col,
    owners_ptr,  # [tiles]               number of its threshold, last tile that shares it, kept, layer
    bound_scores_ptr,  # [T, 2] fp32 if BOUNDED
    bound_places_ptr,  # [T, 2] int64 if BOUNDED
    threshold_ptr,  # [] or [T] fp32
    KEPT: tl.constexpr,
    BOUNDED: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    score_ptr = load_pointer(row_ptr + 3, tl.float32, ALIGNED)
    n_units = load_size(row_ptr + 4, ALIGNED)
    threshold = tl.load(threshold_ptr + tl.load(row_ptr + 10))
    bounds = load_bounds(bound_scores_ptr, bound_places_ptr, tl.load(row_ptr + 13), BOUNDED)
    of = (threshold, n_units, score_ptr, bounds)
    found = tl.full([], 0, tl.int64)
    for number in range(ROUNDS):
        start = (tile * ROUNDS + number) * BLOCK
        _, _, _, tied = _tied_elements(row_ptr, start, *of, KEPT, BOUNDED, RAGGED, ALIGNED, BLOCK)
        found += tl.sum(tied)
    tl.store(ties_ptr + tl.load(row_ptr + 1) + tile, found)


@triton.jit
def _masks_kernel(
    ties_ptr,  # [tiles of all layers] int64
    up_to_here_ptr,  # [tiles of all layers] int64: tied elements from the first tile to this one
    table_ptr,  # [T, FIELDS]: as above
    owners_ptr,  # [tiles]
    bound_scores_ptr,  # [T, 2] fp32 if BOUNDED
    bound_places_ptr,  # [T, 2] int64 if BOUNDED
    threshold_ptr,  # [] or [T] fp32
    remainder_ptr,  # [] or [T] int64
    PACKED: tl.constexpr,
    KEPT: tl.constexpr,
    BOUNDED: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    mask_ptr = load_pointer(row_ptr + 2, tl.int8, ALIGNED)
    score_ptr = load_pointer(row_ptr + 3, tl.float32, ALIGNED)
    n_units = load_size(row_ptr + 4, ALIGNED)
    threshold = tl.load(threshold_ptr + tl.load(row_ptr + 10))
    bounds = load_bounds(bound_scores_ptr, bound_places_ptr, tl.load(row_ptr + 13), BOUNDED)
    of = (threshold, n_units, score_ptr, bounds)
    here = tl.load(row_ptr + 1) + tile
    own = tl.load(ties_ptr + here)
    passed = tl.full([], 0, tl.int64)
    for number in range(ROUNDS):
        start = (tile * ROUNDS + number) * BLOCK
        stands, unit, inside, tied = _tied_elements(row_ptr, start, *of, KEPT, BOUNDED, RAGGED, ALIGNED, BLOCK)
        keep = stands > threshold
        if own > 0:
            before = passed + tl.cumsum(tied, 0) - tied  # [BLOCK]
            up_to_last = tl.load(up_to_here_ptr + tl.load(row_ptr + 11))
            elements = up_to_last - tl.load(up_to_here_ptr + here) + own - before
            left = tl.load(remainder_ptr + tl.load(row_ptr + 10))
            left = tl.where(threshold > float("-inf"), left, NO_PLACE)  # what stands there never stays
            keep = keep | ((tied > 0) & (elements > left))
            passed += tl.sum(tied)
        if PACKED:
            byte = start // 8 + tl.arange(0, BLOCK // 8)  # [BLOCK // 8] int64
            tl.store(mask_ptr + byte, pack_bits(keep & inside, BLOCK), mask=byte < tl.cdiv(n_units, 8))
        else:
            tl.store(mask_ptr + unit, keep.to(tl.int8), mask=inside)


@triton.jit
def _crossing_kernel(
    bound_scores_ptr,  # [T] fp32
    bound_places_ptr,  # [T] int64
    ties_ptr,  # [tiles of all layers] int64
    up_to_here_ptr,  # [tiles of all layers] int64: tied elements from the first tile to this one
    table_ptr,  # [T, FIELDS]: as above; no mask, and -1 for the last tile of a budget below 0
    owners_ptr,  # [tiles]
    threshold_ptr,  # [T] fp32
    remainder_ptr,  # [T] int64
    KEPT: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    layer = tl.load(row_ptr + 10)
    last = tl.load(row_ptr + 11)
    if last < 0:
        tl.store(bound_scores_ptr + layer, float("-inf"))
        tl.store(bound_places_ptr + layer, NO_PLACE)
    else:
        score_ptr = load_pointer(row_ptr + 3, tl.float32, ALIGNED)
        n_units = load_size(row_ptr + 4, ALIGNED)
        threshold = tl.load(threshold_ptr + layer)
        left = tl.load(remainder_ptr + layer)
        here = tl.load(row_ptr + 1) + tile
        own = tl.load(ties_ptr + here)
        after = tl.load(up_to_here_ptr + last) - tl.load(up_to_here_ptr + here)
        if (after <= left) & (left < after + own):
            of = (threshold, n_units, score_ptr, (0.0, 0, 0.0, 0))
            passed = tl.full([], 0, tl.int64)
            for number in range(ROUNDS):
                start = (tile * ROUNDS + number) * BLOCK
                _, unit, _, tied = _tied_elements(row_ptr, start, *of, KEPT, False, RAGGED, ALIGNED, BLOCK)
                elements = after + own - (passed + tl.cumsum(tied, 0) - tied)  # [BLOCK]
                crossed = (tied > 0) & (elements - tied <= left) & (left < elements)
                if tl.sum(crossed.to(tl.int32)) > 0:
                    tl.store(bound_scores_ptr + layer, threshold)
                    tl.store(bound_places_ptr + layer, tl.sum(tl.where(crossed, unit, 0)))
                passed += tl.sum(tied)


class _TiedLayer(NamedTuple):
    """A layer that is walked tile by tile.

    Args:
        search: where its units stand.
        mask: what is written; None: nothing.
        first_of_all: which tile of all is its first.
        units: how many of its units are walked.
        shares: number of its threshold, and the last tile of all that shares it.
    """

    search: SearchLayer
    mask: Tensor | None
    first_of_all: int
    units: int
    shares: tuple[int, int]

    @property
    def fields(self) -> tuple[int, ...]:
        """What the kernels read, but for the first tile."""
        mask = 0 if self.mask is None else self.mask.data_ptr()
        return (self.first_of_all, mask, *self.search.fields, *self.shares, *self.search.marks)

    @property
    def variant(self) -> tuple[bool, bool]:
        """(ragged, aligned): what a launch has in common."""
        ragged, aligned = self.search.variant
        return ragged, aligned and (self.mask is None or is_aligned(self.mask.data_ptr()))


def _rounds(grids: Sequence[UnitGrid]) -> int:
    """Blocks of a tile: one, or of very many units a power of two that keeps the number of tiles bounded."""
    units, rounds, tiles = sum(grid.units for grid in grids), 1, get_sampling().tiles
    while units // (rounds * _BLOCK) > tiles:
        rounds *= 2
    return rounds


def _launches(layers: Sequence[_TiedLayer], tile: int, device: torch.device) -> list[tuple[dict[str, Any], Any]]:
    """A launch for every kind of layer: constants, and tables with the number of programs."""
    constants = {"BLOCK": _BLOCK, "ROUNDS": tile // _BLOCK}
    groups = multi_tensor.group_by(layers, lambda layer: layer.variant)
    return [
        (
            {"RAGGED": ragged, "ALIGNED": aligned, **constants},
            multi_tensor.tables([layer.fields for layer in members], [layer.units for layer in members], tile, device),
        )
        for (ragged, aligned), members in groups.items()
    ]


def _count_ties(
    launches: Sequence[tuple[dict[str, Any], Any]], tiles: int, order: Order, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Tied elements of every tile, and from the first tile to each: int64 ``[tiles]``."""
    ties = torch.empty(tiles, dtype=torch.int64, device=threshold.device)
    for constants, (table, owners, programs) in launches:
        tensors = (ties, table, owners, *order.bounds, threshold)
        multi_tensor.launch(_ties_kernel, programs, *tensors, **order.constants, **constants)
    return ties, ties.cumsum(0)


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
    """See :func:`tritprune.kernels.reference.masks_from_threshold`; no synchronisation."""
    masks = [empty_mask(score, packed) for score in scores]
    order = Order.of(scores, grids, kept, bounds, threshold.device)
    tile = _BLOCK * _rounds(grids)
    layers: list[_TiedLayer] = []
    tiles = 0
    everything = sum(-(-grid.units // tile) for grid in grids) - 1
    for mask, layer in zip(masks, order.layers, strict=True):
        own = -(-layer.grid.units // tile)
        shares = (layer.number, tiles + own - 1) if threshold.ndim else (0, everything)
        layers.append(_TiedLayer(layer, mask, tiles, layer.grid.units, shares))
        tiles += own
    launches = _launches(layers, tile, threshold.device)
    tied = _count_ties(launches, tiles, order, threshold)
    for constants, (table, owners, programs) in launches:
        tensors = (*tied, table, owners, *order.bounds, threshold, remainder)
        multi_tensor.launch(_masks_kernel, programs, *tensors, PACKED=packed, **order.constants, **constants)
    return masks


def crossing_units(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], budgets: Sequence[int], *, kept: Sequence[Tensor] | None = None
) -> Bounds:
    """See :func:`tritprune.kernels.reference.crossing_units`; no synchronisation."""
    device = scores[0].device if scores else torch.device("cpu")
    found = torch.full((len(scores),), AFTER_ALL[0], dtype=torch.float32, device=device)
    places = torch.full((len(scores),), AFTER_ALL[1], dtype=torch.int64, device=device)
    threshold, remainder = kth_score_of_each(scores, grids, budgets, kept, None)
    order = Order.of(scores, grids, kept, None, device)
    tile = _BLOCK * _rounds(grids)
    layers: list[_TiedLayer] = []
    tiles = 0
    for layer, budget in zip(order.layers, budgets, strict=True):
        if budget >= layer.grid.elements:
            continue
        units = layer.grid.units if budget >= 0 else 1  # one program writes that there is no such unit
        own = -(-units // tile)
        layers.append(_TiedLayer(layer, None, tiles, units, (layer.number, tiles + own - 1 if budget >= 0 else -1)))
        tiles += own
    launches = _launches(layers, tile, device)
    tied = _count_ties(launches, tiles, order, threshold)
    constants_of_all = {"KEPT": order.constants["KEPT"]}
    for constants, (table, owners, programs) in launches:
        tensors = (found, places, *tied, table, owners, threshold, remainder)
        multi_tensor.launch(_crossing_kernel, programs, *tensors, **constants_of_all, **constants)
    return found, places
