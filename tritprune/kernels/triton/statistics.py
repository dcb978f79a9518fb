"""Numbers of each layer, for the host to read when it likes; and masks that such a number takes back.

Kept and changed units: both masks are read once, 2 bytes a unit, or 2 bits of packed masks.

    kept_t = sum mask,    changed_t = sum mask xor previous

NaNs and infinities: the scores are read once, 4 bytes a unit, or 2 of bf16. A float is one of them if all bits of its
exponent are set.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.packing import is_packed
from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.multi_tensor import find_tile, load_pointer, load_size

FIELDS = tl.constexpr(5)
_BLOCK = 2048


@triton.jit
def _ones(byte):
    """How many bits of each byte are set: int8 -> int32."""
    bits = byte.to(tl.int32) & 255
    bits = bits - ((bits >> 1) & 0x55)
    bits = (bits & 0x33) + ((bits >> 2) & 0x33)
    return (bits + (bits >> 4)) & 0x0F


@triton.jit
def _statistics_kernel(
    counts_ptr,  # [T, 2] int64: kept, changed
    table_ptr,  # [T, FIELDS]: first tile, layer, mask, previous mask, bytes of a mask
    owners_ptr,  # [tiles]
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    layer = tl.load(row_ptr + 1)
    mask_ptr = load_pointer(row_ptr + 2, tl.int8, ALIGNED)
    previous_ptr = load_pointer(row_ptr + 3, tl.int8, ALIGNED)
    n_bytes = load_size(row_ptr + 4, ALIGNED)
    place = tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
    inside = place < n_bytes
    keep = tl.load(mask_ptr + place, mask=inside, other=0)
    kept_before = tl.load(previous_ptr + place, mask=inside, other=0)
    if PACKED:
        kept = _ones(keep)
        changed = _ones(keep ^ kept_before)
    else:
        kept = keep.to(tl.int32)
        changed = (keep != kept_before).to(tl.int32)
    tl.atomic_add(counts_ptr + 2 * layer, tl.sum(kept).to(tl.int64), sem="relaxed")
    tl.atomic_add(counts_ptr + 2 * layer + 1, tl.sum(changed).to(tl.int64), sem="relaxed")


def mask_statistics(masks: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    """See :func:`tritprune.kernels.reference.mask_statistics`; at most one launch for aligned masks, one for others."""
    device = masks[0].device if masks else torch.device("cpu")
    counts = torch.zeros(len(masks), 2, dtype=torch.int64, device=device)
    layers = [
        (index, mask.contiguous(), old.contiguous())
        for index, (mask, old) in enumerate(zip(masks, previous, strict=True))
    ]
    for (packed, aligned), members in multi_tensor.group_by(layers, lambda layer: _variant(*layer)).items():
        table, owners, tiles = _table_of(members, device)
        constants = {"PACKED": packed, "ALIGNED": aligned, "BLOCK": _BLOCK}
        multi_tensor.launch(_statistics_kernel, tiles, counts, table, owners, **constants)
    return counts


def _variant(index: int, mask: Tensor, previous: Tensor) -> tuple[bool, bool]:
    """(packed, aligned): what a launch has in common."""
    del index
    aligned = multi_tensor.is_aligned(mask.data_ptr(), previous.data_ptr(), mask.numel())
    return is_packed(mask), aligned


@triton.jit
def _restore_kernel(
    condition_ptr,  # [] int64
    table_ptr,  # [T, FIELDS]: first tile, layer, mask, previous mask, bytes of a mask
    owners_ptr,  # [tiles]
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(condition_ptr) != 0:
        row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
        mask_ptr = load_pointer(row_ptr + 2, tl.int8, ALIGNED)
        previous_ptr = load_pointer(row_ptr + 3, tl.int8, ALIGNED)
        n_bytes = load_size(row_ptr + 4, ALIGNED)
        place = tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
        inside = place < n_bytes
        tl.store(mask_ptr + place, tl.load(previous_ptr + place, mask=inside, other=0), mask=inside)


def restore_masks_(masks: Sequence[Tensor], previous: Sequence[Tensor], condition: Tensor) -> None:
    """See :func:`tritprune.kernels.reference.restore_masks_`; at most one launch for aligned masks, one for others."""
    layers = [(index, mask, old.contiguous()) for index, (mask, old) in enumerate(zip(masks, previous, strict=True))]
    for aligned, members in multi_tensor.group_by(layers, lambda layer: _variant(*layer)[1]).items():
        block = _BLOCK if aligned else _BLOCK // 2  # byte by byte it takes twice the registers
        table, owners, tiles = _table_of(members, condition.device, block)
        multi_tensor.launch(_restore_kernel, tiles, condition, table, owners, ALIGNED=aligned, BLOCK=block)


def _table_of(
    members: Sequence[tuple[int, Tensor, Tensor]], device: torch.device, block: int = _BLOCK
) -> tuple[Tensor, Tensor, int]:
    return multi_tensor.tables(
        [(index, mask.data_ptr(), old.data_ptr(), mask.numel()) for index, mask, old in members],
        [mask.numel() for _, mask, _ in members],
        block,
        device,
    )


@triton.jit
def _non_finite_kernel(
    counts_ptr,  # [T] int64
    table_ptr,  # [T, FIELDS - 1]: first tile, layer, score, units
    owners_ptr,  # [tiles]
    TYPE: tl.constexpr,
    EXPONENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS - 1)
    layer = tl.load(row_ptr + 1)
    score_ptr = load_pointer(row_ptr + 2, TYPE, ALIGNED)
    n_units = load_size(row_ptr + 3, ALIGNED)
    unit = tile * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int64
    bits = tl.load(score_ptr + unit, mask=unit < n_units, other=0).to(tl.int32)
    found = tl.sum(((bits & EXPONENT) == EXPONENT).to(tl.int32))
    if found > 0:
        tl.atomic_add(counts_ptr + layer, found.to(tl.int64), sem="relaxed")


def count_non_finite(scores: Sequence[Tensor]) -> Tensor:
    """See :func:`tritprune.kernels.reference.count_non_finite`; a launch a type, for aligned scores and for others."""
    device = scores[0].device if scores else torch.device("cpu")
    counts = torch.zeros(len(scores), dtype=torch.int64, device=device)
    layers = [(index, score.contiguous()) for index, score in enumerate(scores)]
    for (wide, aligned), members in multi_tensor.group_by(layers, lambda layer: _width(layer[1])).items():
        table, owners, tiles = multi_tensor.tables(
            [(index, score.data_ptr(), score.numel()) for index, score in members],
            [score.numel() for _, score in members],
            _BLOCK,
            device,
        )
        constants = {"TYPE": tl.int32 if wide else tl.int16, "EXPONENT": 0x7F800000 if wide else 0x7F80}
        multi_tensor.launch(
            _non_finite_kernel, tiles, counts, table, owners, **constants, ALIGNED=aligned, BLOCK=_BLOCK
        )
    return counts


def _width(score: Tensor) -> tuple[bool, bool]:
    """(fp32, aligned): what a launch has in common."""
    return score.element_size() == 4, multi_tensor.is_aligned(score.data_ptr(), score.numel())
