"""Optimizer steps that end with the mask, in plain torch: part of the specification in ``reference.py``.

``fma(a, b, c)`` is ``a b + c`` rounded once; everything else is rounded to fp32 by itself. torch has two arithmetics
for AdamW, one on the CPU and one on CUDA, which differ in three places:

| | CPU: ``foreach=False`` (the default there) and True | CUDA: ``foreach=True`` (the default there) |
|---|---|---|
| second moment | ``fma((1 - beta2) g, g, beta2 v)`` | ``fma(1 - beta2, g g, beta2 v)`` |
| root | MKL's, up to 0.75 units in the last place off | correctly rounded |
| weight | ``w + (size m) / d`` | ``fma(size, m / d, w)`` |

``rounding="own"`` is the arithmetic of torch on the device of the weights, made of the operations that torch.optim
calls: the same bits as its step and a mask after it. ``rounding="cuda"`` is that of CUDA on any device, spelled out; it
is what the Triton kernels compute. SGD has one arithmetic. A CPU without fused multiply-adds has neither: there "own"
is what torch does on it.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tritprune.kernels.packing import is_packed, unpack_mask
from tritprune.kernels.units import UnitGrid

Rounding = Literal["own", "cuda"]


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
    """One AdamW step, then the mask, in place (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2).

        w <- w (1 - lr weight_decay)
        m <- fma(1 - beta1, g - m, m), or fma(-beta1, g - m, g) if beta1 <= 1/2
        v <- v beta2 + (1 - beta2) g^2
        d <- sqrt(v) / sqrt(1 - beta2^step) + eps
        w <- w - lr / (1 - beta1^step) m / d
        w <- 0 where the unit is pruned; with ``reset`` also m and v

    The lines of v and of the last w are rounded as the table above says. Numbers of the step are computed in fp64 and
    rounded to fp32.

    Bytes to move: 28 an element (w, m, v read and written, g read), and one (packed: an eighth) a unit.

    Args:
        weights: fp32 ``[R, C]`` each, any strides.
        gradients: fp32 ``[R, C]`` each, any strides.
        firsts: ``m``, fp32 ``[R, C]``, of the strides of the weight.
        seconds: ``v``, likewise.
        masks: bool ``[rows, cols]`` each, True = keep, or packed; None: nothing is pruned.
        blocks: ``(n, m)`` each.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root.
        weight_decay: decoupled.
        step: number of this step, from 1.
        reset: whether the moments of pruned elements are zeroed, too.
        rounding: ``own`` or ``cuda``.
    """
    size, root = -lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    for w, g, m, v, mask, block in zip(weights, gradients, firsts, seconds, masks, blocks, strict=True):
        if weight_decay != 0:
            w.mul_(1 - lr * weight_decay)
        divisor = v.new_full((), root)  # a tensor: CUDA would multiply by the reciprocal of a number
        if rounding == "own":
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            w.addcdiv_(m, v.sqrt().div_(divisor).add_(eps), value=size)
        else:
            share = _fp32(1 - beta1)
            m.copy_(_fma(share, g - m, m) if share < 0.5 else _fma(share - 1, g - m, g))
            v.copy_(_fma(1 - beta2, g * g, v * beta2))
            denominator = v.double().sqrt_().float().div_(divisor).add_(eps)  # a root as IEEE 754 asks
            w.copy_(_fma(size, m / denominator, w))
        if mask is not None:
            gone = _gone(mask, w, block)
            for tensor in (w, m, v) if reset else (w,):
                tensor.masked_fill_(gone, 0.0)


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
    """One SGD step, then the mask, in place (torch's form of momentum).

        d <- fma(weight_decay, w, g)
        b <- d at the first step, else fma(1 - dampening, d, b momentum)
        d <- fma(momentum, b, d) with ``nesterov``, else b
        w <- fma(-lr, d, w)
        w <- 0 where the unit is pruned; with ``reset`` also b

    Bytes to move: 20 an element (w and b read and written, g read; 12 without momentum), and one (packed: an eighth)
    a unit.

    Args:
        weights: fp32 ``[R, C]`` each, any strides.
        gradients: fp32 ``[R, C]`` each, any strides.
        momenta: ``b``, fp32 ``[R, C]``, of the strides of the weight; None without momentum.
        masks: bool ``[rows, cols]`` each, True = keep, or packed; None: nothing is pruned.
        blocks: ``(n, m)`` each.
        lr: learning rate.
        momentum: share of ``b`` that stays; 0: none is kept.
        dampening: of the new gradient in ``b``.
        weight_decay: added to the gradient.
        nesterov: look ahead.
        first: whether ``b`` is made by this step.
        reset: whether the momenta of pruned elements are zeroed, too.
        rounding: ``own`` or ``cuda``: the same where there are fused multiply-adds.
    """
    add = torch.add if rounding == "own" else _add
    for layer, (w, g, mask, block) in enumerate(zip(weights, gradients, masks, blocks, strict=True)):
        d = add(g, w, alpha=weight_decay) if weight_decay != 0 else g
        if momenta is not None:
            b = momenta[layer]
            if first:
                b.copy_(d)
            else:
                b.copy_(add(b.mul_(momentum), d, alpha=1 - dampening))
            d = add(d, b, alpha=momentum) if nesterov else b
        w.copy_(add(w, d, alpha=-lr))
        if mask is not None:
            gone = _gone(mask, w, block)
            w.masked_fill_(gone, 0.0)
            if reset and momenta is not None:
                momenta[layer].masked_fill_(gone, 0.0)


def _add(base: Tensor, other: Tensor, *, alpha: float) -> Tensor:
    """``base + alpha other``, rounded once."""
    return _fma(alpha, other, base)


def _fma(a: float, b: Tensor, c: Tensor) -> Tensor:
    """``a b + c`` rounded to fp32 once: the sum in fp64 is rounded to odd, so that to round it again does no harm."""
    product, addend = b.double() * _fp32(a), c.double()  # the product is exact
    total = product + addend
    back = total - product
    rest = (product - (total - back)) + (addend - back)  # what rounding took away
    bits = total.view(torch.int64)
    short = ((rest > 0) | (rest < 0)) & (bits & 1 == 0)
    towards = torch.where((rest > 0) == (total > 0), 1, -1)
    return (bits + towards * short).view(torch.float64).float()


def _fp32(number: float) -> float:
    """The nearest fp32 number."""
    return float(torch.tensor(number, dtype=torch.float32))


def _gone(mask: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Where a unit is pruned: bool ``[R, C]``."""
    grid = UnitGrid.of_blocks((weight.shape[0], weight.shape[1]), block)
    keep = unpack_mask(mask, grid.shape) if is_packed(mask) else mask
    rows = torch.arange(weight.shape[0], device=weight.device) // block[0]
    cols = torch.arange(weight.shape[1], device=weight.device) // block[1]
    return ~keep[rows][:, cols]
