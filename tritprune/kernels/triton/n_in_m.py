"""N:M masks: of every M consecutive columns the N lowest go; among equals the lower index stays.

    rank_j = #{i in the group: s_i < s_j or (s_i = s_j and i > j)}      keep_j = rank_j >= N

A lane owns an element (masks) or a group (costs) and compares it with its group, whose scores all lanes of the group
read from the same cache line. Memory traffic: the scores once, and one byte an element or 4 bytes a group.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.multi_tensor import at, find_tile, load_pointer, load_size, load_stride, walk_grid

FIELDS = tl.constexpr(7)
_GROUPS = 256
_UNROLL_UP_TO = 8


@triton.jit
def _goes_before(ptrs, i, j, own, inside):
    """1 where element i of the group goes before element j: int32 of the shape of ``own``."""
    other = tl.load(ptrs, mask=inside, other=0.0)
    return (inside & ((other < own) | ((other == own) & (i > j)))).to(tl.int32)


@triton.jit
def _masks_kernel(
    table_ptr,  # [T, FIELDS]: first tile, mask [R, C] contiguous, score, R, C, score strides
    owners_ptr,  # [tiles]
    N: tl.constexpr,
    M: tl.constexpr,
    UNROLL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    mask_ptr = load_pointer(row_ptr + 1, tl.int8, ALIGNED)
    score_ptr = load_pointer(row_ptr + 2, tl.float32, ALIGNED)
    n_rows = tl.load(row_ptr + 3)
    n_cols = load_size(row_ptr + 4, ALIGNED)
    stride_r = load_size(row_ptr + 5, ALIGNED)
    stride_c = load_stride(row_ptr + 6, ALIGNED)
    rows, cols, inside = walk_grid(tile, n_rows, n_cols, BLOCK, ALIGNED)

    place = cols % M  # [BLOCK]
    group = cols - place
    length = tl.minimum(n_cols.to(tl.int32) - group, M)
    group_ptrs = score_ptr + at(rows, group, stride_r, stride_c)
    own = tl.load(score_ptr + at(rows, cols, stride_r, stride_c), mask=inside, other=0.0)
    rank = tl.zeros([BLOCK], tl.int32)
    if UNROLL:
        for i in tl.static_range(M):
            rank += _goes_before(group_ptrs + i * stride_c, i, place, own, inside & (i < length))
    else:
        for i in range(M):
            rank += _goes_before(group_ptrs + i * stride_c, i, place, own, inside & (i < length))
    keep = rank >= length * N // M
    tl.store(mask_ptr + at(rows, cols, n_cols, 1), keep.to(tl.int8), mask=inside)


@triton.jit
def _cost_of_place(group_ptrs, j, stride_c, length, quota, inside, BLOCK: tl.constexpr, M: tl.constexpr):
    """The score at place j of each group if it would go, else 0: fp32 [BLOCK]."""
    present = inside & (j < length)
    own = tl.load(group_ptrs + j * stride_c, mask=present, other=0.0)
    rank = tl.zeros([BLOCK], tl.int32)
    for i in range(M):
        rank += _goes_before(group_ptrs + i * stride_c, i, j, own, inside & (i < length))
    return tl.where(present & (rank < quota), own, 0.0)


@triton.jit
def _group_scores_kernel(
    table_ptr,  # [T, FIELDS]: first tile, cost [R, ceil(C / M)] contiguous, score, R, C, score strides
    owners_ptr,  # [tiles]
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    cost_ptr = load_pointer(row_ptr + 1, tl.float32, False)
    score_ptr = load_pointer(row_ptr + 2, tl.float32, False)
    n_rows = tl.load(row_ptr + 3)
    n_cols = tl.load(row_ptr + 4)
    stride_r = tl.load(row_ptr + 5)
    stride_c = tl.load(row_ptr + 6)
    n_groups = tl.cdiv(n_cols, M)
    rows, groups, inside = walk_grid(tile, n_rows, n_groups, BLOCK, False)

    length = tl.minimum(n_cols.to(tl.int32) - groups * M, M)  # [BLOCK]
    quota = length * N // M
    group_ptrs = score_ptr + at(rows, groups * M, stride_r, stride_c)
    cost = tl.zeros([BLOCK], tl.float32)
    for j in range(M):
        cost += _cost_of_place(group_ptrs, j, stride_c, length, quota, inside, BLOCK, M)
    tl.store(cost_ptr + at(rows, groups, n_groups, 1), cost, mask=inside)


def n_in_m_masks(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_masks`; a launch for aligned layers, one for others."""
    masks = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    pairs = zip(masks, scores, strict=True)
    for aligned, members in multi_tensor.group_by(pairs, lambda pair: _aligned(*pair)).items():
        block = 512 if aligned else 256  # single addresses take more registers than wide loads
        table, owners, tiles = multi_tensor.tables(
            [_fields(mask, score) for mask, score in members],
            [mask.numel() for mask, _ in members],
            block,
            scores[0].device,
        )
        constants = {"N": n, "M": m, "UNROLL": m <= _UNROLL_UP_TO, "ALIGNED": aligned, "BLOCK": block}
        multi_tensor.launch(_masks_kernel, tiles, table, owners, **constants)
    return masks


def n_in_m_group_scores(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_group_scores`; one launch."""
    costs = [
        torch.empty(score.shape[0], -(-score.shape[1] // m), dtype=torch.float32, device=score.device)
        for score in scores
    ]
    if not scores:
        return costs
    table, owners, tiles = multi_tensor.tables(
        [_fields(cost, score) for cost, score in zip(costs, scores, strict=True)],
        [cost.numel() for cost in costs],
        _GROUPS,
        scores[0].device,
    )
    multi_tensor.launch(_group_scores_kernel, tiles, table, owners, N=n, M=m, BLOCK=_GROUPS)
    return costs


def _fields(out: Tensor, score: Tensor) -> tuple[int, ...]:
    return (out.data_ptr(), score.data_ptr(), *score.shape, *score.stride())


def _aligned(mask: Tensor, score: Tensor) -> bool:
    return score.stride(1) == 1 and multi_tensor.is_aligned(
        mask.data_ptr(), score.data_ptr(), score.shape[1], score.stride(0)
    )
