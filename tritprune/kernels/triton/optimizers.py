"""Optimizer steps that end with the mask: one pass over weights, gradients and moments for all layers of a kind.

    AdamW   w, m, v <- step(w, g, m, v);   w <- 0 where the unit is pruned
    SGD     w, b    <- step(w, g, b);      w <- 0 where the unit is pruned

28 bytes an element for AdamW, 20 for SGD with momentum, and a byte or a bit a unit for the mask, where an optimizer
and a mask apart read and write the weights once more. The bits are those of the reference with ``rounding="cuda"``,
which is how torch rounds on CUDA; in Triton's interpreter, too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from tritprune.kernels.optimizer_reference import Rounding
from tritprune.kernels.packing import is_packed
from tritprune.kernels.reference import SMALL_UNIT, Block
from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.multi_tensor import at, find_tile, load_pointer, load_size, load_stride, walk_grid
from tritprune.kernels.triton.order import load_mask

FIELDS = tl.constexpr(16)
INTERPRETED = tl.constexpr(isinstance(walk_grid, InterpretedFunction))
_BLOCK = 512
_SMALL = tl.constexpr(2.0**-96)


@triton.jit
def _fma(a, b, c):
    """``a b + c`` rounded once. Triton's interpreter rounds twice: there it is done as in the reference."""
    if INTERPRETED:
        product = a.to(tl.float64) * b.to(tl.float64)
        addend = c.to(tl.float64)
        total = product + addend
        back = total - product
        rest = (product - (total - back)) + (addend - back)
        bits = total.to(tl.int64, bitcast=True)
        short = ((rest > 0) | (rest < 0)) & (bits & 1 == 0)
        bits += tl.where(short, tl.where((rest > 0) == (total > 0), 1, -1), 0)
        return bits.to(tl.float64, bitcast=True).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def _root(v):
    """The correctly rounded root; that of a small number through one that no compiler flushes to zero."""
    small = v < _SMALL
    root = tl.sqrt_rn(tl.where(small, v * 2.0**48, v))
    return tl.where(small, root * 2.0**-24, root)


@triton.jit
def _places(row_ptr, tile, MASK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, ALIGNED: tl.constexpr, BLOCK):
    """Offsets of a tile's elements in the weight and in the gradient, which exist, and which are pruned."""
    n_rows = tl.load(row_ptr + 6)
    n_cols = load_size(row_ptr + 7, ALIGNED)
    rows, cols, inside = walk_grid(tile, n_rows, n_cols, BLOCK, ALIGNED)
    own = at(rows, cols, load_size(row_ptr + 8, ALIGNED), load_stride(row_ptr + 9, ALIGNED))
    of_gradient = at(rows, cols, load_size(row_ptr + 10, ALIGNED), load_stride(row_ptr + 11, ALIGNED))
    gone = rows < 0
    if MASK != "none":
        if N > 0:
            unit_rows = rows // N
            unit_cols = cols // M
        else:
            unit_rows = rows // tl.load(row_ptr + 14).to(tl.int32)
            unit_cols = cols // tl.load(row_ptr + 15).to(tl.int32)
        unit = at(unit_rows, unit_cols, tl.load(row_ptr + 12), tl.load(row_ptr + 13))
        mask_ptr = load_pointer(row_ptr + 5, tl.int8, False)
        gone = load_mask(mask_ptr, unit, inside, MASK == "packed") == 0
    return own, of_gradient, inside, gone


@triton.jit
def _adamw_kernel(
    table_ptr,  # [T, FIELDS]: first tile, w, g, m, v, mask, R, C, strides of w, g and mask, n, m
    owners_ptr,  # [tiles]
    decay,  # 1 - lr * weight decay
    share1,  # 1 - beta1
    beta2,
    share2,  # 1 - beta2
    root,  # sqrt(1 - beta2^step)
    eps,
    size,  # -lr / (1 - beta1^step)
    DECAYS: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool" or "packed"
    RESET: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    w_ptr = load_pointer(row_ptr + 1, tl.float32, ALIGNED)
    g_ptr = load_pointer(row_ptr + 2, tl.float32, ALIGNED)
    m_ptr = load_pointer(row_ptr + 3, tl.float32, ALIGNED)
    v_ptr = load_pointer(row_ptr + 4, tl.float32, ALIGNED)
    own, of_gradient, inside, gone = _places(row_ptr, tile, MASK, N, M, ALIGNED, BLOCK)
    w = tl.load(w_ptr + own, mask=inside, other=0.0)
    g = tl.load(g_ptr + of_gradient, mask=inside, other=0.0)
    m = tl.load(m_ptr + own, mask=inside, other=0.0)
    v = tl.load(v_ptr + own, mask=inside, other=0.0)
    if DECAYS:
        w = w * decay
    near = share1 < 0.5
    m = _fma(tl.zeros_like(m) + tl.where(near, share1, share1 - 1.0), g - m, tl.where(near, m, g))
    v = _fma(tl.zeros_like(v) + share2, g * g, v * beta2)
    denominator = tl.div_rn(_root(v), tl.zeros_like(v) + root) + eps
    w = _fma(tl.zeros_like(w) + size, tl.div_rn(m, denominator), w)
    tl.store(w_ptr + own, tl.where(gone, 0.0, w), mask=inside)
    tl.store(m_ptr + own, tl.where(gone, 0.0, m) if RESET else m, mask=inside)
    tl.store(v_ptr + own, tl.where(gone, 0.0, v) if RESET else v, mask=inside)


@triton.jit
def _sgd_kernel(
    table_ptr,  # [T, FIELDS]: first tile, w, g, b, b, mask, R, C, strides of w, g and mask, n, m
    owners_ptr,  # [tiles]
    minus_lr,
    momentum,
    share,  # 1 - dampening
    weight_decay,
    MOMENTUM: tl.constexpr,  # "none", "first" or "next"
    DECAYS: tl.constexpr,
    NESTEROV: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool" or "packed"
    RESET: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row_ptr, tile = find_tile(table_ptr, owners_ptr, FIELDS)
    w_ptr = load_pointer(row_ptr + 1, tl.float32, ALIGNED)
    g_ptr = load_pointer(row_ptr + 2, tl.float32, ALIGNED)
    b_ptr = load_pointer(row_ptr + 3, tl.float32, ALIGNED)
    own, of_gradient, inside, gone = _places(row_ptr, tile, MASK, N, M, ALIGNED, BLOCK)
    w = tl.load(w_ptr + own, mask=inside, other=0.0)
    d = tl.load(g_ptr + of_gradient, mask=inside, other=0.0)
    if DECAYS:
        d = _fma(tl.zeros_like(w) + weight_decay, w, d)
    if MOMENTUM != "none":
        b = d
        if MOMENTUM == "next":
            b = tl.load(b_ptr + own, mask=inside, other=0.0) * momentum
            b = _fma(tl.zeros_like(d) + share, d, b)
        tl.store(b_ptr + own, tl.where(gone, 0.0, b) if RESET else b, mask=inside)
        d = _fma(tl.zeros_like(b) + momentum, b, d) if NESTEROV else b
    w = _fma(tl.zeros_like(d) + minus_lr, d, w)
    tl.store(w_ptr + own, tl.where(gone, 0.0, w), mask=inside)


class _Layer(NamedTuple):
    """A weight with its gradient, moments and mask, columns adjacent in memory where they can be."""

    weight: Tensor
    gradient: Tensor
    states: tuple[Tensor, Tensor]
    mask: Tensor | None
    mask_strides: tuple[int, ...]
    block: Block

    @classmethod
    def of(cls, weight: Tensor, gradient: Tensor, states: tuple[Tensor, Tensor], mask: Tensor | None, block: Block):
        strides = (0, 0) if mask is None else mask.stride()
        if mask is not None and is_packed(mask):
            strides = (-(-weight.shape[1] // block[1]), 1)
        if weight.stride(0) < weight.stride(1):
            weight, gradient, block = weight.t(), gradient.t(), (block[1], block[0])
            states, strides = (states[0].t(), states[1].t()), strides[::-1]
        return cls(weight, gradient, states, mask, strides, block)

    @property
    def fields(self) -> tuple[int, ...]:
        tensors = (self.weight, self.gradient, *self.states, self.weight if self.mask is None else self.mask)
        strides = (*self.weight.stride(), *self.gradient.stride(), *self.mask_strides)
        return (*(tensor.data_ptr() for tensor in tensors), *self.weight.shape, *strides, *self.block)

    @property
    def variant(self) -> tuple[str, int, int, bool]:
        """(kind of mask, n, m, aligned): what a launch has in common; n = m = 0: read from the table."""
        if self.mask is None:
            return ("none", 0, 0, self._aligned)
        block = self.block if self.block[0] * self.block[1] <= SMALL_UNIT else (0, 0)
        return ("packed" if is_packed(self.mask) else "bool", *block, self._aligned)

    @property
    def _aligned(self) -> bool:
        tensors = (self.weight, self.gradient, *self.states)
        return all(tensor.stride(1) == 1 for tensor in tensors[:2]) and multi_tensor.is_aligned(
            *(tensor.data_ptr() for tensor in tensors),
            self.weight.stride(0),
            self.gradient.stride(0),
            self.weight.shape[1],
        )


def masked_adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    blocks: Sequence[tuple[int, int]],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    reset: bool = False,
    rounding: Rounding = "own",
) -> None:
    """See :func:`tritprune.kernels.reference.masked_adamw_`; one launch per kind of mask and alignment.

    It rounds as on CUDA whatever ``rounding`` says: where it runs, that is its own.
    """
    del rounding
    scalars = (
        *(1.0 - lr * weight_decay, 1.0 - beta1, float(beta2), 1.0 - beta2),
        *((1.0 - beta2**step) ** 0.5, float(eps), -lr / (1.0 - beta1**step)),
    )
    states = zip(firsts, seconds, strict=True)
    for table, owners, tiles, constants in _launches(weights, gradients, states, masks, blocks):
        options = constants | {"DECAYS": weight_decay != 0, "RESET": reset}
        multi_tensor.launch(_adamw_kernel, tiles, table, owners, *scalars, **options)


def masked_sgd_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    masks: Sequence[Tensor | None],
    blocks: Sequence[tuple[int, int]],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    first: bool,
    reset: bool = False,
    rounding: Rounding = "own",
) -> None:
    """See :func:`tritprune.kernels.reference.masked_sgd_`; one launch per kind of mask and alignment."""
    del rounding
    scalars = (-float(lr), float(momentum), 1.0 - dampening, float(weight_decay))
    kind = "none" if momenta is None else "first" if first else "next"
    shared = {"MOMENTUM": kind, "DECAYS": weight_decay != 0, "NESTEROV": nesterov, "RESET": reset}
    states = ((state, state) for state in (weights if momenta is None else momenta))
    for table, owners, tiles, constants in _launches(weights, gradients, states, masks, blocks):
        multi_tensor.launch(_sgd_kernel, tiles, table, owners, *scalars, **shared, **constants)


def _launches(weights, gradients, states, masks, blocks):
    """Table, owners, tiles and constants of every launch."""
    layers = [_Layer.of(*layer) for layer in zip(weights, gradients, states, masks, blocks, strict=True)]
    for (mask, n, m, aligned), members in multi_tensor.group_by(layers, lambda layer: layer.variant).items():
        table, owners, tiles = multi_tensor.tables(
            [layer.fields for layer in members],
            [layer.weight.numel() for layer in members],
            _BLOCK,
            weights[0].device,
        )
        yield table, owners, tiles, {"MASK": mask, "N": n, "M": m, "ALIGNED": aligned, "BLOCK": _BLOCK}
