"""From masks to zeros, and whether the zeros are there.

Applying a mask stores zeros where a unit is gone and reads no weight: 1 byte a unit (from the cache after its first
element) and the pruned share of the weights written.

Counting violations reads every weight once and adds up, per tile, what should be zero and is not.
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
from tritprune.kernels.triton.multi_tensor import at, find_tile, load_pointer, walk_grid
from tritprune.kernels.triton.order import load_mask

APPLY_FIELDS = tl.constexpr(11)
_BLOCK = 1024


@triton.jit
def pack_bits(keep, BLOCK: tl.constexpr):
    """Eight neighbours to a byte, the first in the highest bit: int1 [BLOCK] -> int8 [BLOCK // 8]."""
    places = 7 - tl.arange(0, 8)[None, :]  # [1, 8]
    return tl.sum(tl.reshape(keep.to(tl.int32), [BLOCK // 8, 8]) << places, 1).to(tl.int8)


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
