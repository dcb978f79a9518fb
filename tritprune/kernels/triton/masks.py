"""From a threshold to masks, and from masks to zeros.

    keep = s > t or (s = t and e > remainder)      e: elements in tied units from this one to the very last

Two passes over the scores: the first leaves the tied elements of every tile (8 bytes for 1024 units), a scan over
tiles turns them into what comes after each tile, and the second writes the masks, counting within a tile only where
it has ties. 8 bytes a unit read, 1 written; nothing depends on the order of programs.

Counting violations reads every weight once and adds up, per tile, what should be zero and is not.

Applying a mask stores zeros where a unit is gone and reads no weight: 1 byte a unit (from the cache after its first
element) and the pruned share of the weights written.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.packing import is_packed, packed_length
from tritprune.kernels.reference import SMALL_UNIT, Block
from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.multi_tensor import at, find_tile, load_pointer, load_size, walk_grid
from tritprune.kernels.units import UnitGrid

FIELDS = tl.constexpr(10)
APPLY_FIELDS = tl.constexpr(11)
_BLOCK = 1024


@triton.jit
def load_mask(mask_ptr, unit, inside, PACKED: tl.constexpr):
    """1 where a unit stays, and where there is none, else 0: of a byte or of a bit a unit."""
    if PACKED:
        byte = tl.load(mask_ptr + (unit >> 3), mask=inside, other=-1)
        return ((byte.to(tl.int32) >> (7 - (unit & 7).to(tl.int32))) & 1).to(tl.int8)
    return tl.load(mask_ptr + unit, mask=inside, other=1)


@triton.jit
def pack_bits(keep, BLOCK: tl.constexpr):
    """Eight neighbours to a byte, the first in the highest bit: int1 [BLOCK] -> int8 [BLOCK // 8]."""
    places = 7 - tl.arange(0, 8)[None, :]  # [1, 8]
    return tl.sum(tl.reshape(keep.to(tl.int32), [BLOCK // 8, 8]) << places, 1).to(tl.int8)


@triton.jit
def _tied_elements(row_ptr, tile, threshold, n_units, score_ptr, RAGGED: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of a tile, which of its units exist, and the sizes of those that equal the threshold (else 0)."""
    unit = tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
    inside = unit < n_units
    score = tl.load(score_ptr + unit, mask=inside, other=0.0)
    row_size = tl.load(row_ptr + 6)
    col_size = tl.load(row_ptr + 8)
    if RAGGED:
        n_cols = tl.load(row_ptr + 5)
        row = unit // n_cols
        in_last_row = row == (n_units // n_cols) - 1
        in_last_col = unit - row * n_cols == n_cols - 1
        row_size = tl.where(in_last_row, tl.load(row_ptr + 7), row_size)
        col_size = tl.where(in_last_col, tl.load(row_ptr + 9), col_size)
    tied = tl.where(inside & (score == threshold), row_size * col_size, 0)
    return score, unit, inside, tied


@triton.jit
def _ties_kernel(
    ties_ptr,  # [tiles of all layers] int64
    table_ptr,  # [T, FIELDS]: first tile, first of all tiles, mask, score, units, cols, row, last row, col, last col
    owners_ptr,  # [tiles]
    threshold_ptr,  # [] fp32
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    score_ptr = load_pointer(row_ptr + 3, tl.float32, ALIGNED)
    n_units = load_size(row_ptr + 4, ALIGNED)
    threshold = tl.load(threshold_ptr)
    _, _, _, tied = _tied_elements(row_ptr, tile, threshold, n_units, score_ptr, RAGGED, BLOCK)
    tl.store(ties_ptr + tl.load(row_ptr + 1) + tile, tl.sum(tied))


@triton.jit
def _masks_kernel(
    ties_ptr,  # [tiles of all layers] int64
    up_to_here_ptr,  # [tiles of all layers] int64: tied elements from the first tile to this one
    total_ptr,  # [1] int64: tied elements of all tiles
    table_ptr,  # [T, FIELDS]: as above
    owners_ptr,  # [tiles]
    threshold_ptr,  # [] fp32
    remainder_ptr,  # [] int64
    PACKED: tl.constexpr,
    RAGGED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    mask_ptr = load_pointer(row_ptr + 2, tl.int8, ALIGNED)
    score_ptr = load_pointer(row_ptr + 3, tl.float32, ALIGNED)
    n_units = load_size(row_ptr + 4, ALIGNED)
    threshold = tl.load(threshold_ptr)
    score, unit, inside, tied = _tied_elements(row_ptr, tile, threshold, n_units, score_ptr, RAGGED, BLOCK)
    keep = score > threshold
    number = tl.load(row_ptr + 1) + tile
    own = tl.load(ties_ptr + number)
    if own > 0:
        before = tl.cumsum(tied, 0) - tied  # [BLOCK]
        elements = tl.load(total_ptr) - tl.load(up_to_here_ptr + number) + own - before
        keep = keep | ((tied > 0) & (elements > tl.load(remainder_ptr)))
    if PACKED:
        byte = tile * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # [BLOCK // 8] int64
        tl.store(mask_ptr + byte, pack_bits(keep & inside, BLOCK), mask=byte < tl.cdiv(n_units, 8))
    else:
        tl.store(mask_ptr + unit, keep.to(tl.int8), mask=inside)


@triton.jit
def _apply_kernel(
    table_ptr,  # [T, APPLY_FIELDS]: first tile, tensor, mask, R, C, tensor strides, mask strides, n, m
    owners_ptr,  # [tiles]
    TYPE: tl.constexpr,
    PACKED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, APPLY_FIELDS)
    tensor_ptr = load_pointer(row_ptr + 1, TYPE, False)
    mask_ptr = load_pointer(row_ptr + 2, tl.int8, False)
    stride_r = tl.load(row_ptr + 5)
    stride_c = tl.load(row_ptr + 6)
    mask_stride_r = tl.load(row_ptr + 7)
    mask_stride_c = tl.load(row_ptr + 8)
    rows, cols, inside = walk_grid(tile, tl.load(row_ptr + 3), tl.load(row_ptr + 4), BLOCK, False)
    if N > 0:
        unit_rows = rows // N  # [BLOCK]
        unit_cols = cols // M
    else:
        unit_rows = rows // tl.load(row_ptr + 9).to(tl.int32)
        unit_cols = cols // tl.load(row_ptr + 10).to(tl.int32)
    keep = load_mask(mask_ptr, at(unit_rows, unit_cols, mask_stride_r, mask_stride_c), inside, PACKED)
    zero = tl.zeros([BLOCK], TYPE)
    tl.store(tensor_ptr + at(rows, cols, stride_r, stride_c), zero, mask=inside & (keep == 0))


@triton.jit
def _violations_kernel(
    counts_ptr,  # [T] int64
    table_ptr,  # [T, APPLY_FIELDS + 1]: first tile, tensor, mask, R, C, tensor strides, mask strides, n, m, layer
    owners_ptr,  # [tiles]
    TYPE: tl.constexpr,
    PACKED: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, APPLY_FIELDS + 1)
    tensor_ptr = load_pointer(row_ptr + 1, TYPE, False)
    mask_ptr = load_pointer(row_ptr + 2, tl.int8, False)
    stride_r = tl.load(row_ptr + 5)
    stride_c = tl.load(row_ptr + 6)
    mask_stride_r = tl.load(row_ptr + 7)
    mask_stride_c = tl.load(row_ptr + 8)
    layer = tl.load(row_ptr + 11)
    rows, cols, inside = walk_grid(tile, tl.load(row_ptr + 3), tl.load(row_ptr + 4), BLOCK, False)
    if N > 0:
        unit_rows = rows // N  # [BLOCK]
        unit_cols = cols // M
    else:
        unit_rows = rows // tl.load(row_ptr + 9).to(tl.int32)
        unit_cols = cols // tl.load(row_ptr + 10).to(tl.int32)
    keep = load_mask(mask_ptr, at(unit_rows, unit_cols, mask_stride_r, mask_stride_c), inside, PACKED)
    bits = tl.load(tensor_ptr + at(rows, cols, stride_r, stride_c), mask=inside & (keep == 0), other=0)
    found = tl.sum((bits + bits != 0).to(tl.int32))  # twice the bits: the sign falls out, -0 is zero
    if found > 0:
        tl.atomic_add(counts_ptr + layer, found.to(tl.int64), sem="relaxed")


def masks_from_threshold(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], threshold: Tensor, remainder: Tensor, *, packed: bool = False
) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.masks_from_threshold`; no synchronisation."""
    masks = [empty_mask(score, packed) for score in scores]
    layers: list[_ThresholdLayer] = []
    tiles = 0
    for mask, score, grid in zip(masks, scores, grids, strict=True):
        layers.append(_ThresholdLayer(tiles, mask, score.contiguous(), grid))
        tiles += -(-grid.units // _BLOCK)
    ties = torch.empty(tiles, dtype=torch.int64, device=threshold.device)
    launches = [
        (
            {"RAGGED": ragged, "ALIGNED": aligned, "BLOCK": _BLOCK},
            multi_tensor.tables(
                [layer.fields for layer in members], [layer.grid.units for layer in members], _BLOCK, threshold.device
            ),
        )
        for (ragged, aligned), members in multi_tensor.group_by(layers, lambda layer: layer.variant).items()
    ]
    for constants, (table, owners, programs) in launches:
        multi_tensor.launch(_ties_kernel, programs, ties, table, owners, threshold, **constants)
    up_to_here = ties.cumsum(0)
    for constants, (table, owners, programs) in launches:
        arguments = (ties, up_to_here, up_to_here[-1:], table, owners, threshold, remainder)
        multi_tensor.launch(_masks_kernel, programs, *arguments, PACKED=packed, **constants)
    return masks


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> None:
    """See :func:`tritprune.kernels.reference.apply_masks_`; one launch per width of element and size of small block."""
    layers = [_MaskedLayer.of(*layer) for layer in zip(tensors, masks, blocks, strict=True)]
    for (width, packed, n, m), members in multi_tensor.group_by(layers, lambda layer: layer.variant).items():
        table, owners, tiles = multi_tensor.tables(
            [layer.fields for layer in members],
            [layer.tensor.numel() for layer in members],
            _BLOCK,
            tensors[0].device,
        )
        zero_type = tl.int32 if width == 4 else tl.int16  # zero has the same bits in every type of that width
        constants = {"TYPE": zero_type, "PACKED": packed, "N": n, "M": m, "BLOCK": _BLOCK}
        multi_tensor.launch(_apply_kernel, tiles, table, owners, **constants)


def count_violations(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> Tensor:
    """See :func:`tritprune.kernels.reference.count_violations`; launches as for :func:`apply_masks_`."""
    device = masks[0].device if masks else torch.device("cpu")
    counts = torch.zeros(len(masks), dtype=torch.int64, device=device)
    layers = [(_MaskedLayer.of(*layer), index) for index, layer in enumerate(zip(tensors, masks, blocks, strict=True))]
    for (width, packed, n, m), members in multi_tensor.group_by(layers, lambda layer: layer[0].variant).items():
        table, owners, tiles = multi_tensor.tables(
            [(*layer.fields, index) for layer, index in members],
            [layer.tensor.numel() for layer, _ in members],
            _BLOCK,
            device,
        )
        bits = tl.int32 if width == 4 else tl.int16
        constants = {"TYPE": bits, "PACKED": packed, "N": n, "M": m, "BLOCK": _BLOCK}
        multi_tensor.launch(_violations_kernel, tiles, counts, table, owners, **constants)
    return counts


class _ThresholdLayer:
    """A layer of :func:`masks_from_threshold`: which tiles of all are its own, mask, contiguous score, unit sizes."""

    def __init__(self, first_of_all: int, mask: Tensor, score: Tensor, grid: UnitGrid) -> None:
        self.first_of_all, self.mask, self.score, self.grid = first_of_all, mask, score, grid

    @property
    def fields(self) -> tuple[int, ...]:
        grid = self.grid
        row_size, col_size = grid.row_size, grid.col_size
        if grid.uniform_size is not None and grid.units:
            row_size, col_size = grid.last_row_size, grid.last_col_size
        sizes = (row_size, grid.last_row_size, col_size, grid.last_col_size)
        return (self.first_of_all, self.mask.data_ptr(), self.score.data_ptr(), grid.units, max(grid.cols, 1), *sizes)

    @property
    def variant(self) -> tuple[bool, bool]:
        """(ragged, aligned): what a launch has in common."""
        aligned = multi_tensor.is_aligned(self.mask.data_ptr(), self.score.data_ptr(), self.grid.units)
        return self.grid.uniform_size is None, aligned


class _MaskedLayer(NamedTuple):
    """A tensor with its mask, columns adjacent in memory where they can be."""

    tensor: Tensor
    mask: Tensor
    mask_strides: tuple[int, ...]  # from unit to unit, in bytes or, of a packed mask, in bits
    block: Block

    @classmethod
    def of(cls, tensor: Tensor, mask: Tensor, block: Block) -> "_MaskedLayer":
        packed_strides = (-(-tensor.shape[1] // block[1]), 1)
        strides = packed_strides if is_packed(mask) else mask.stride()
        if tensor.stride(0) < tensor.stride(1):
            return cls(tensor.t(), mask, strides[::-1], (block[1], block[0]))
        return cls(tensor, mask, strides, block)

    @property
    def fields(self) -> tuple[int, ...]:
        tensor = self.tensor
        addresses = (tensor.data_ptr(), self.mask.data_ptr())
        return (*addresses, *tensor.shape, *tensor.stride(), *self.mask_strides, *self.block)

    @property
    def variant(self) -> tuple[int, bool, int, int]:
        """(bytes of an element, packed, n, m): what a launch has in common; n = m = 0: read from the table."""
        small = self.block[0] * self.block[1] <= SMALL_UNIT
        return (self.tensor.element_size(), is_packed(self.mask), *(self.block if small else (0, 0)))


def empty_mask(score: Tensor, packed: bool) -> Tensor:
    """Room for the mask of a score: of its shape, or packed."""
    if packed:
        return torch.empty(packed_length(score.numel()), dtype=torch.uint8, device=score.device)
    return torch.empty(score.shape, dtype=torch.bool, device=score.device)
