"""N:M masks: of every M consecutive columns the N lowest go; among equals the lower index stays.

    rank_j = #{i in the group: s_i < s_j or (s_i = s_j and i > j)}      keep_j = rank_j >= N

Contiguous scores whose rows are whole groups of 2, 4, 8 or 16 need no rows: a lane takes a group into registers and
compares its pairs (6 comparisons for M = 4); the results are bits of one integer, stored as they are in a packed mask
(costs: groups of 2 and 4). Other scores: a lane owns an element (masks) or a group (costs) and compares it with its
group, whose scores all lanes of the group read from the same cache line.

Memory traffic: the scores once, and one byte or bit an element, or 4 bytes a group.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.masks import empty_mask, pack_bits
from tritprune.kernels.triton.multi_tensor import at, find_tile, load_pointer, load_size, load_stride, walk_grid

FIELDS = tl.constexpr(7)
WHOLE_FIELDS = tl.constexpr(4)
_GROUPS = 256
_UNROLL_UP_TO = 8
_WHOLE = (2, 4, 8, 16)
_WHOLE_ELEMENTS = 2048


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
    PACKED: tl.constexpr,
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
    if PACKED:
        byte = tile * (BLOCK // 8) + tl.arange(0, BLOCK // 8)  # [BLOCK // 8] int64
        tl.store(mask_ptr + byte, pack_bits(keep & inside, BLOCK), mask=byte < tl.cdiv(n_rows * n_cols, 8))
    else:
        tl.store(mask_ptr + at(rows, cols, n_cols, 1), keep.to(tl.int8), mask=inside)


@triton.jit
def _places_of_4(groups, BLOCK: tl.constexpr):
    """[BLOCK, 4] -> four [BLOCK], in order."""
    even, odd = tl.split(tl.reshape(groups, [BLOCK, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _places_of_8(groups, BLOCK: tl.constexpr):
    """[BLOCK, 8] -> eight [BLOCK], in order."""
    even, odd = tl.split(tl.reshape(groups, [BLOCK, 4, 2]))
    a, c, e, g = _places_of_4(even, BLOCK)
    b, d, f, h = _places_of_4(odd, BLOCK)
    return a, b, c, d, e, f, g, h


@triton.jit
def _places_of_16(groups, BLOCK: tl.constexpr):
    """[BLOCK, 16] -> sixteen [BLOCK], in order."""
    even, odd = tl.split(tl.reshape(groups, [BLOCK, 8, 2]))
    a, c, e, g, i, k, m, o = _places_of_8(even, BLOCK)
    b, d, f, h, j, l, n, p = _places_of_8(odd, BLOCK)  # noqa: E741
    return a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p


@triton.jit
def _load_2(ptrs, inside):
    """Two neighbours of each of [BLOCK] addresses."""
    return tl.load(ptrs, mask=inside, other=0.0), tl.load(ptrs + 1, mask=inside, other=0.0)


@triton.jit
def _load_4(ptrs, inside):
    """Four neighbours of each of [BLOCK] addresses."""
    a, b = _load_2(ptrs, inside)
    c, d = _load_2(ptrs + 2, inside)
    return a, b, c, d


@triton.jit
def _whole_groups_kernel(
    table_ptr,  # [T, WHOLE_FIELDS]: first tile, out (mask, packed mask or costs), score, groups
    owners_ptr,  # [tiles]
    N: tl.constexpr,
    M: tl.constexpr,
    OUT: tl.constexpr,  # "mask", "packed" or "cost"
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, WHOLE_FIELDS)
    score_ptr = load_pointer(row_ptr + 2, tl.float32, True)
    n_groups = load_size(row_ptr + 3, True)
    score_ptr += tile * (BLOCK * M)
    group = tl.arange(0, BLOCK)  # [BLOCK]
    here = tl.minimum(n_groups - tile * BLOCK, BLOCK).to(tl.int32)
    if M > 2:
        here = tl.multiple_of(here, 8)
    inside = group < here
    if OUT == "cost":  # sums are stored as they stand: loading places apart spares an exchange between threads
        ptrs = score_ptr + group * M  # [BLOCK]
        places = _load_2(ptrs, inside) if M == 2 else _load_4(ptrs, inside)
    else:
        ptrs = score_ptr + group[:, None] * M + tl.arange(0, M)[None, :]  # [BLOCK, M]
        scores = tl.load(ptrs, mask=inside[:, None], other=0.0)
        if M == 2:
            places = tl.split(scores)
        elif M == 4:
            places = _places_of_4(scores, BLOCK)
        elif M == 8:
            places = _places_of_8(scores, BLOCK)
        else:
            places = _places_of_16(scores, BLOCK)

    bits = tl.zeros([BLOCK], tl.int32)
    cost = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(M):
        rank = tl.zeros([BLOCK], tl.int32)
        for i in tl.static_range(M):
            if i < j:
                if SHARED:  # each pair is compared once: the later one goes first unless it is greater
                    rank += 1 - (places[j] <= places[i]).to(tl.int32)
                else:
                    rank += (places[i] < places[j]).to(tl.int32)
            if i > j:
                rank += (places[i] <= places[j]).to(tl.int32)
        if OUT == "cost":
            cost += tl.where(rank < N, places[j], 0.0)
        else:
            bits |= tl.where(rank >= N, 1 << (M - 1 - j), 0)

    if OUT == "cost":
        out_ptr = load_pointer(row_ptr + 1, tl.float32, True) + tile * BLOCK
        tl.store(out_ptr + group, cost, mask=inside)
    elif OUT == "mask":
        out_ptr = load_pointer(row_ptr + 1, tl.int8, True) + tile * (BLOCK * M)
        keep = (bits[:, None] >> (M - 1 - tl.arange(0, M))[None, :]) & 1  # [BLOCK, M]
        ptrs = out_ptr + group[:, None] * M + tl.arange(0, M)[None, :]
        tl.store(ptrs, keep.to(tl.int8), mask=inside[:, None])
    else:
        # Words of two bytes (four for M = 16), little-endian: within a byte the first place is highest.
        WORD: tl.constexpr = tl.int32 if M == 16 else tl.int16
        SHARE: tl.constexpr = 2 if M == 16 else 16 // M  # groups of a word
        number = tl.arange(0, SHARE)[None, :]
        shift = number * 16
        if M < 16:
            shift = number * M // 8 * 8 + (8 - M) - number * M % 8
        else:
            bits = (bits >> 8) | ((bits & 255) << 8)
        words = tl.sum(tl.reshape(bits, [BLOCK // SHARE, SHARE]) << shift, 1)
        word = tl.arange(0, BLOCK // SHARE)
        out_ptr = load_pointer(row_ptr + 1, WORD, True) + tile * (BLOCK // SHARE)
        tl.store(out_ptr + word, words.to(WORD), mask=word < here // SHARE)


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


def n_in_m_masks(scores: Sequence[Tensor], n: int, m: int, *, packed: bool = False) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_masks`; a launch for whole groups, two for others."""
    masks = [empty_mask(score, packed) for score in scores]
    rest = _launch_whole_groups(masks, scores, n, m, "packed" if packed else "mask")
    for aligned, members in multi_tensor.group_by(rest, lambda pair: _aligned(*pair)).items():
        block = 512 if aligned else 256  # single addresses take more registers than wide loads
        table, owners, tiles = multi_tensor.tables(
            [_fields(mask, score) for mask, score in members],
            [score.numel() for _, score in members],
            block,
            scores[0].device,
        )
        constants = {"N": n, "M": m, "UNROLL": m <= _UNROLL_UP_TO, "PACKED": packed, "ALIGNED": aligned, "BLOCK": block}
        multi_tensor.launch(_masks_kernel, tiles, table, owners, **constants)
    return masks


def n_in_m_group_scores(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_group_scores`; a launch for whole groups, one for others."""
    costs = [
        torch.empty(score.shape[0], -(-score.shape[1] // m), dtype=torch.float32, device=score.device)
        for score in scores
    ]
    rest = _launch_whole_groups(costs, scores, n, m, "cost")
    if not rest:
        return costs
    table, owners, tiles = multi_tensor.tables(
        [_fields(cost, score) for cost, score in rest],
        [cost.numel() for cost, _ in rest],
        _GROUPS,
        scores[0].device,
    )
    multi_tensor.launch(_group_scores_kernel, tiles, table, owners, N=n, M=m, BLOCK=_GROUPS)
    return costs


def _launch_whole_groups(
    outs: Sequence[Tensor], scores: Sequence[Tensor], n: int, m: int, kind: str
) -> list[tuple[Tensor, Tensor]]:
    """Do the layers that are whole groups in aligned memory; the pairs that are left."""
    pairs = list(zip(outs, scores, strict=True))
    if kind == "cost" and m > 4:
        return pairs
    whole = [pair for pair in pairs if _is_whole(*pair, m)]
    if whole:
        block = _WHOLE_ELEMENTS // m
        shared = m <= 4 or (m == 8 and kind == "mask")  # else so many bits live at once that ptxas sets up a stack
        groups = [score.numel() // m for _, score in whole]
        fields = [(out.data_ptr(), score.data_ptr(), count) for (out, score), count in zip(whole, groups, strict=True)]
        table, owners, tiles = multi_tensor.tables(fields, groups, block, scores[0].device)
        multi_tensor.launch(_whole_groups_kernel, tiles, table, owners, N=n, M=m, OUT=kind, SHARED=shared, BLOCK=block)
    return [pair for pair in pairs if not _is_whole(*pair, m)]


def _is_whole(out: Tensor, score: Tensor, m: int) -> bool:
    """Whether the scores are contiguous rows of whole groups, and tiles of them begin at aligned addresses."""
    return (
        m in _WHOLE
        and score.is_contiguous()
        and score.shape[1] % m == 0
        and multi_tensor.is_aligned(out.data_ptr(), score.data_ptr(), score.numel() // m)
    )


def _fields(out: Tensor, score: Tensor) -> tuple[int, ...]:
    return (out.data_ptr(), score.data_ptr(), *score.shape, *score.stride())


def _aligned(mask: Tensor, score: Tensor) -> bool:
    return score.stride(1) == 1 and multi_tensor.is_aligned(
        mask.data_ptr(), score.data_ptr(), score.shape[1], score.stride(0)
    )
