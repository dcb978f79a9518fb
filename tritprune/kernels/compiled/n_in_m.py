"""N of every M consecutive columns, compiled: comparisons give ranks, the later one of two equals goes first."""

# pyright: basic

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tritprune.kernels.compiled.work import compiled, pieces, plain, run
from tritprune.kernels.packing import pack_mask


def n_in_m_masks(scores: Sequence[Tensor], n: int, m: int, *, packed: bool = False) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_masks`."""
    masks = [torch.empty(score.shape, dtype=torch.bool) for score in scores]
    run(
        _mask_groups,
        (
            (mask.numpy(), plain(score), first, last, n, m)
            for score, mask in zip(scores, masks, strict=True)
            for first, last in pieces(*score.shape)
        ),
    )
    return [pack_mask(mask) for mask in masks] if packed else masks


def n_in_m_group_scores(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_group_scores`."""
    costs = [torch.empty(score.shape[0], -(-score.shape[1] // m)) for score in scores]
    run(
        _cost_groups,
        (
            (cost.numpy(), plain(score), first, last, n, m)
            for score, cost in zip(scores, costs, strict=True)
            for first, last in pieces(*score.shape)
        ),
    )
    return costs


@compiled
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


@compiled
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


@compiled
def _rank(row, start, j, length):
    """How many of the group go before its place j: lower ones, and equal ones after it."""
    rank = 0
    for i in range(j):
        rank += row[start + i] < row[start + j]
    for i in range(j + 1, length):
        rank += row[start + i] <= row[start + j]
    return rank
