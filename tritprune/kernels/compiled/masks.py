"""Masks at work, compiled: zeros where units are pruned, in place; what is not zero; what changed."""

# pyright: basic

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritprune.kernels.compiled.work import compiled, pieces, run, runs
from tritprune.kernels.packing import is_packed, unpack_mask
from tritprune.kernels.reference import Block
from tritprune.kernels.units import UnitGrid

_MINUS_ZERO = {4: np.int32(-(1 << 31)), 2: np.int16(-(1 << 15))}  # by bytes of an element
_EXPONENT = {4: np.int32(0x7F800000), 2: np.int16(0x7F80)}


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> None:
    """See :func:`tritprune.kernels.reference.apply_masks_`."""
    jobs: list[tuple[Any, ...]] = []
    for tensor, mask, block in zip(tensors, masks, blocks, strict=True):
        bits, kept, block = _stored(tensor, mask, block)
        jobs += [(bits, kept, first, last, *block) for first, last in pieces(kept.shape[0], block[0] * bits.shape[1])]
    run(_zero, jobs)


@compiled
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
        for first, last in pieces(kept.shape[0], block[0] * bits.shape[1]):
            jobs.append((bits, kept, first, last, *block, _MINUS_ZERO[bits.itemsize]))
            layers.append(layer)
    for layer, found in zip(layers, run(_count_set, jobs), strict=True):
        if found:
            counts[layer] += found
    return counts


@compiled
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
        for first, last in runs(own.size):
            jobs.append((own, before, first, last))
            layers.append(layer)
    for layer, (kept, changed) in zip(layers, run(_count_changes, jobs), strict=True):
        counts[layer] += (kept, changed)
    return torch.from_numpy(counts)


@compiled
def _count_changes(mask, old, first, last):
    kept = changed = 0
    for u in range(first, last):
        kept += mask[u]
        changed += mask[u] != old[u]
    return kept, changed


def _stored(tensor: Tensor, mask: Tensor, block: Block) -> tuple[np.ndarray, np.ndarray, Block]:
    """A tensor's own memory as integers of its width, its mask and its block, columns adjacent where they can be."""
    if is_packed(mask):
        mask = unpack_mask(mask, UnitGrid.of_blocks((tensor.shape[0], tensor.shape[1]), block).shape)
    if not tensor.is_contiguous() and tensor.t().is_contiguous():
        tensor, mask, block = tensor.t(), mask.t(), (block[1], block[0])
    bits = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy()
    return bits, mask.contiguous().numpy(), block


def count_non_finite(scores: Sequence[Tensor]) -> Tensor:
    """See :func:`tritprune.kernels.reference.count_non_finite`."""
    counts = np.zeros(len(scores), np.int64)
    jobs: list[tuple[Any, ...]] = []
    layers: list[int] = []
    for layer, score in enumerate(scores):
        wide = score.element_size() == 4
        bits = score.contiguous().view(-1).view(torch.int32 if wide else torch.int16).numpy()
        for first, last in runs(bits.size):
            jobs.append((bits, first, last, _EXPONENT[bits.itemsize]))
            layers.append(layer)
    for layer, found in zip(layers, run(_count_exponents, jobs), strict=True):
        counts[layer] += found
    return torch.from_numpy(counts)


@compiled
def _count_exponents(bits, first, last, exponent):
    found = np.int32(0)
    for u in range(first, last):
        found += np.int32((bits[u] & exponent) == exponent)
    return found
