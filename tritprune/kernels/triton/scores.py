"""Unit scores: element score, reduction over the unit and running average in one pass.

    f = |w|, |g|, |w * g| or w * g         in fp32; 0, and counted, where g is not finite
    r = sum f, sum f / size, max f or sqrt(sum f^2) over the unit; then r, |r| or r^2
    S <- alpha * S + beta * r              each product and the sum rounded by itself

S is fp32, or bf16 that is rounded to the nearest (ties to even) in integers, so that every backend rounds alike.

Weights and gradients are read once, unit scores read and written once; nothing else touches memory (10 bytes a weight
for 4x1 units of fp32 weights, 6 for bf16).

Small units: a lane owns a unit and takes its elements one after the other, row-major, so that its bits are the
reference's. Neighbouring lanes own neighbouring units: 4x1 is four row loads, without shared memory or barriers.
Large units: a program owns BLOCK_U units and strides through their elements BLOCK_E at a time; a tree sums the rest.

The launcher hands a transposed weight (rows adjacent in memory) over with rows and columns exchanged, so that a
kernel's columns are always the adjacent ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.reference import SMALL_UNIT, Block, Finish, Form, Reduce
from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.multi_tensor import TYPES, at, find_tile, load_pointer, load_size, load_stride, walk_grid

FIELDS = tl.constexpr(15)


@triton.jit
def _element_scores(w_ptrs, g_ptrs, inside, FORM: tl.constexpr):
    """``f`` in fp32, and 1 where the gradient is not finite; both of the shape of ``inside``."""
    if FORM == "magnitude":
        value = tl.abs(tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32))
        bad = tl.zeros_like(value).to(tl.int32)
    else:
        gradient = tl.load(g_ptrs, mask=inside, other=0.0).to(tl.float32)
        value = gradient
        if FORM != "gradient":
            value = tl.load(w_ptrs, mask=inside, other=0.0).to(tl.float32) * gradient
        finite = tl.abs(gradient) < float("inf")  # False for NaN
        value = tl.where(finite, value if FORM == "product" else tl.abs(value), 0.0)
        bad = tl.where(finite, 0, 1)
    return value, bad


@triton.jit
def _joined(value, f, REDUCE: tl.constexpr):
    """The reduction of a unit with one more element score."""
    if REDUCE == "max":
        # f >= 0: its bits are ordered as its values are, with NaN above all.
        value = tl.maximum(value.to(tl.int32, bitcast=True), f.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    else:
        value += f * f if REDUCE == "l2" else f
    return value


@triton.jit
def _fold(
    score_ptrs,
    inside,
    value,
    size,  # elements of each unit; not used if all have SIZE
    alpha,
    beta,
    SIZE: tl.constexpr,
    REDUCE: tl.constexpr,
    FINISH: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """``S <- alpha * S + beta * r``; without a state S is not read, for 0 * inf is NaN. bf16 is held as int16."""
    BF16: tl.constexpr = score_ptrs.dtype.element_ty == tl.int16
    if REDUCE == "mean" and SIZE != 1:
        # In fp64, once a unit: the same bits, also of denormals, which Triton 3.5 flushes in fp32. A product where that
        # is exact: a division takes some 40 instructions, and consumer cards do fp64 at a 64th of the rate.
        if SIZE > 0 and (SIZE & (SIZE - 1)) == 0:
            value = (value.to(tl.float64) * (1.0 / SIZE)).to(tl.float32)
        else:
            value = (value.to(tl.float64) / size.to(tl.float64)).to(tl.float32)
    if REDUCE == "l2":
        value = tl.sqrt(value.to(tl.float64)).to(tl.float32)
    if FINISH == "abs":
        value = tl.abs(value)
    if FINISH == "square":
        value = value * value
    fresh = value * beta
    if HAS_STATE:
        old = tl.load(score_ptrs, mask=inside, other=0)
        if BF16:
            old = (old.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        fresh = old * alpha + fresh
    if BF16:
        bits = fresh.to(tl.int32, bitcast=True)
        to_even = 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(fresh != fresh, (bits >> 16) | 0x40, (bits + to_even) >> 16)
        tl.store(score_ptrs, rounded.to(tl.int16), mask=inside)
    else:
        tl.store(score_ptrs, fresh, mask=inside)


@triton.jit
def _count_skipped(skipped_ptr, layer, bad):
    """Add to the layer's count; integers commute, so the order of programs does not show."""
    count = tl.sum(bad)
    if count > 0:
        tl.atomic_add(skipped_ptr + layer, count.to(tl.int64), sem="relaxed")


@triton.jit
def _small_units_kernel(
    skipped_ptr,  # [T] int64
    table_ptr,  # [T, FIELDS]: first tile, layer, score, w, g, R, C, score strides, w strides, g strides, n, m
    owners_ptr,  # [tiles]
    alpha,
    beta,
    S_TYPE: tl.constexpr,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    FORM: tl.constexpr,
    REDUCE: tl.constexpr,
    FINISH: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    HAS_STATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    layer = tl.load(row_ptr + 1)
    score_ptr = load_pointer(row_ptr + 2, S_TYPE, ALIGNED)
    w_ptr = load_pointer(row_ptr + 3, W_TYPE, ALIGNED)
    g_ptr = load_pointer(row_ptr + 4, G_TYPE, ALIGNED)
    n_rows = tl.load(row_ptr + 5).to(tl.int32)
    n_cols = load_size(row_ptr + 6, ALIGNED).to(tl.int32)
    score_stride_r = load_size(row_ptr + 7, ALIGNED and not TRANSPOSED)
    score_stride_c = load_stride(row_ptr + 8, ALIGNED and not TRANSPOSED)
    w_stride_r = load_size(row_ptr + 9, ALIGNED)
    w_stride_c = load_stride(row_ptr + 10, ALIGNED)
    g_stride_r = load_size(row_ptr + 11, ALIGNED)
    g_stride_c = load_stride(row_ptr + 12, ALIGNED)
    rows, cols, inside = walk_grid(tile, tl.cdiv(n_rows, N), tl.cdiv(n_cols, M), BLOCK, ALIGNED)

    value = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    if ALIGNED and WHOLE and M == 4 and not TRANSPOSED:  # a thread reads the four neighbours of a row at once
        four = cols[:, None] * 4 + tl.arange(0, 4)[None, :]  # [BLOCK, 4]
        for i in tl.static_range(N):
            r = (rows * N + i)[:, None]  # [BLOCK, 1]
            w_ptrs = w_ptr + at(r, four, w_stride_r, w_stride_c)
            g_ptrs = g_ptr + at(r, four, g_stride_r, g_stride_c)
            f, f_bad = _element_scores(w_ptrs, g_ptrs, inside[:, None], FORM)
            bad += tl.sum(f_bad, 1)
            even, odd = tl.split(tl.reshape(f, [BLOCK, 2, 2]))
            first, third = tl.split(even)
            second, fourth = tl.split(odd)
            value = _joined(
                _joined(_joined(_joined(value, first, REDUCE), second, REDUCE), third, REDUCE), fourth, REDUCE
            )
    else:
        for k in tl.static_range(N * M):
            # Row-major in the layer's own orientation, whatever the kernel's is.
            i = k % N if TRANSPOSED else k // M
            j = k // N if TRANSPOSED else k % M
            r = rows * N + i
            c = cols * M + j
            within = inside
            if not WHOLE:
                within = within & (r < n_rows) & (c < n_cols)
            w_ptrs = w_ptr + at(r, c, w_stride_r, w_stride_c)
            g_ptrs = g_ptr + at(r, c, g_stride_r, g_stride_c)
            f, f_bad = _element_scores(w_ptrs, g_ptrs, within, FORM)
            bad += f_bad
            value = _joined(value, f, REDUCE)

    size = tl.minimum(n_rows - rows * N, N) * tl.minimum(n_cols - cols * M, M)
    SIZE: tl.constexpr = N * M if WHOLE else 0
    score_ptrs = score_ptr + at(rows, cols, score_stride_r, score_stride_c)
    _fold(score_ptrs, inside, value, size, alpha, beta, SIZE, REDUCE, FINISH, HAS_STATE)
    if FORM != "magnitude":
        _count_skipped(skipped_ptr, layer, bad)


@triton.jit
def _large_units_kernel(
    skipped_ptr,  # [T] int64
    table_ptr,  # [T, FIELDS]: as above
    owners_ptr,  # [tiles]
    alpha,
    beta,
    S_TYPE: tl.constexpr,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    FORM: tl.constexpr,
    REDUCE: tl.constexpr,
    FINISH: tl.constexpr,
    HAS_STATE: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    layer = tl.load(row_ptr + 1)
    score_ptr = load_pointer(row_ptr + 2, S_TYPE, ALIGNED)
    w_ptr = load_pointer(row_ptr + 3, W_TYPE, ALIGNED)
    g_ptr = load_pointer(row_ptr + 4, G_TYPE, ALIGNED)
    n_rows = tl.load(row_ptr + 5).to(tl.int32)
    n_cols = load_size(row_ptr + 6, ALIGNED).to(tl.int32)
    score_stride_r = tl.load(row_ptr + 7)
    score_stride_c = tl.load(row_ptr + 8)
    w_stride_r = load_size(row_ptr + 9, ALIGNED)
    w_stride_c = load_stride(row_ptr + 10, ALIGNED)
    g_stride_r = load_size(row_ptr + 11, ALIGNED)
    g_stride_c = load_stride(row_ptr + 12, ALIGNED)
    n = tl.load(row_ptr + 13).to(tl.int32)
    m = load_size(row_ptr + 14, ALIGNED and not ONE_COLUMN).to(tl.int32)
    unit_cols = n_cols if ONE_COLUMN else tl.cdiv(n_cols, m)
    rows, cols, inside = walk_grid(tile, tl.cdiv(n_rows, n), unit_cols, BLOCK_U, ALIGNED and ONE_COLUMN)
    elements = n if ONE_COLUMN else n * m

    value = tl.zeros([BLOCK_U, BLOCK_E], tl.float32)
    bad = tl.zeros([BLOCK_U, BLOCK_E], tl.int32)
    start = tl.full([], 0, tl.int32)
    while start < elements:  # not range(): older interpreters cannot take its bound from a table
        e = start + tl.arange(0, BLOCK_E)[None, :]  # [1, BLOCK_E]
        if ONE_COLUMN:
            r = rows[:, None] * n + e  # [BLOCK_U, BLOCK_E]
            c = cols[:, None]  # [BLOCK_U, 1]
        else:
            r = rows[:, None] * n + e // m  # [BLOCK_U, BLOCK_E]
            c = cols[:, None] * m + e % m  # [BLOCK_U, BLOCK_E]
        within = inside[:, None] & (e < elements) & (r < n_rows) & (c < n_cols)
        w_ptrs = w_ptr + at(r, c, w_stride_r, w_stride_c)
        g_ptrs = g_ptr + at(r, c, g_stride_r, g_stride_c)
        f, f_bad = _element_scores(w_ptrs, g_ptrs, within, FORM)
        bad += f_bad
        value = _joined(value, f, REDUCE)
        start += BLOCK_E

    if REDUCE == "max":
        reduced = tl.max(value.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)  # [BLOCK_U]
    else:
        reduced = tl.sum(value, 1)  # [BLOCK_U]
    size = tl.minimum(n_rows - rows * n, n) * tl.minimum(n_cols - cols * m, m)
    score_ptrs = score_ptr + at(rows, cols, score_stride_r, score_stride_c)
    _fold(score_ptrs, inside, reduced, size, alpha, beta, 0, REDUCE, FINISH, HAS_STATE)
    if FORM != "magnitude":
        _count_skipped(skipped_ptr, layer, bad)


@dataclass(frozen=True)
class _Layer:
    """One layer in the kernel's orientation: columns are adjacent in memory where they can be."""

    index: int
    score: Tensor  # [rows, cols]
    weight: Tensor  # [R, C]
    gradient: Tensor  # [R, C]; the weight again if no gradient is read
    block: Block
    transposed: bool

    @property
    def positions(self) -> int:
        return self.score.numel()

    @property
    def fields(self) -> tuple[int, ...]:
        return (
            self.index,
            self.score.data_ptr(),
            self.weight.data_ptr(),
            self.gradient.data_ptr(),
            *self.weight.shape,
            *self.score.stride(),
            *self.weight.stride(),
            *self.gradient.stride(),
            *self.block,
        )

    @property
    def variant(self) -> tuple[object, ...]:
        """What a launch has in common."""
        n, m = self.block
        score_type = tl.int16 if self.score.dtype == torch.bfloat16 else tl.float32
        shared = (score_type, TYPES[self.weight.dtype], TYPES[self.gradient.dtype], self._aligned)
        if n * m <= SMALL_UNIT:
            whole = self.weight.shape[0] % n == 0 and self.weight.shape[1] % m == 0
            return (*shared, "small", n, m, self.transposed, whole)
        return (*shared, "large", m == 1, n * m <= 256)

    @property
    def _aligned(self) -> bool:
        m = self.block[1]
        adjacent = self.weight.stride(1) == 1 and self.gradient.stride(1) == 1
        small = self.block[0] * m <= SMALL_UNIT
        width = self.score.shape[1] if small else self.weight.shape[1]
        return adjacent and multi_tensor.is_aligned(
            self.score.data_ptr(),
            self.weight.data_ptr(),
            self.gradient.data_ptr(),
            self.weight.stride(0),
            self.gradient.stride(0),
            width,
            *(() if small or m == 1 else (m,)),
        )


def accumulate_unit_scores_(
    scores: Sequence[Tensor],
    skipped: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    blocks: Sequence[Block],
    *,
    form: Form,
    reduce: Reduce,
    alpha: float,
    beta: float,
    finish: Finish = "none",
) -> None:
    """See :func:`tritprune.kernels.reference.accumulate_unit_scores_`; one launch per kind of layer."""
    read = weights if gradients is None or form == "magnitude" else gradients
    layers = [_oriented(index, *layer) for index, layer in enumerate(zip(scores, weights, read, blocks, strict=True))]
    shared = {"FORM": form, "REDUCE": reduce, "FINISH": finish, "HAS_STATE": alpha != 0}
    for variant, members in multi_tensor.group_by(layers, lambda layer: layer.variant).items():
        s_type, w_type, g_type, aligned, kind, *rest = variant
        shape = (_small_shape if kind == "small" else _large_shape)(*rest, aligned)
        block = shape["BLOCK"] if kind == "small" else shape["BLOCK_U"]
        table, owners, tiles = multi_tensor.tables(
            [layer.fields for layer in members], [layer.positions for layer in members], block, skipped.device
        )
        multi_tensor.launch(
            _small_units_kernel if kind == "small" else _large_units_kernel,
            tiles,
            skipped,
            table,
            owners,
            float(alpha),
            float(beta),
            S_TYPE=s_type,
            W_TYPE=w_type,
            G_TYPE=g_type,
            ALIGNED=aligned,
            **shared,
            **shape,
        )


def _oriented(index: int, score: Tensor, weight: Tensor, gradient: Tensor, block: Block) -> _Layer:
    if weight.stride(0) < weight.stride(1):
        return _Layer(index, score.t(), weight.t(), gradient.t(), (block[1], block[0]), True)
    return _Layer(index, score, weight, gradient, block, False)


def _small_shape(n: int, m: int, transposed: bool, whole: bool, aligned: bool) -> dict[str, int | bool]:
    """Four units a thread, or two of the larger ones: all loads of a unit are in flight at once, in registers.

    Single addresses take more registers than wide loads, so half as many units where there is no alignment.
    """
    block = 512 if n * m <= 4 else 256
    return {"N": n, "M": m, "TRANSPOSED": transposed, "WHOLE": whole, "BLOCK": block if aligned else block // 2}


def _large_shape(one_column: bool, medium: bool, aligned: bool) -> dict[str, int | bool]:
    """Tiles of 512 elements, or 1024 with wide loads: across units that are columns, a unit a warp, or along a unit."""
    block_u, block_e = (32, 16) if one_column else (4, 128) if medium else (1, 512)
    return {"ONE_COLUMN": one_column, "BLOCK_U": block_u, "BLOCK_E": 2 * block_e if aligned and not medium else block_e}
