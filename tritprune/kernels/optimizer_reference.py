"""Optimizer steps that end with the mask, in plain torch: part of the specification in ``reference.py``.

Every product, quotient, root and sum is rounded to fp32 by itself, in the order of the formula, so that all backends
give the same bits; torch's own optimizers contract some of them into fused multiply-adds, one unit in the last place
away.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritprune.kernels.packing import is_packed, unpack_mask
from tritprune.kernels.units import UnitGrid


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
) -> None:
    """One AdamW step, then the mask, in place (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2).

        w <- w (1 - lr weight_decay)
        m <- m + (g - m) (1 - beta1)
        v <- v beta2 + (g (1 - beta2)) g
        w <- w + (-lr / (1 - beta1^step) m) / (sqrt(v) / sqrt(1 - beta2^step) + eps)
        w <- 0 where the unit is pruned; with ``reset`` also m and v

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
    """
    size, root = -lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    for w, g, m, v, mask, block in zip(weights, gradients, firsts, seconds, masks, blocks, strict=True):
        w.mul_(1 - lr * weight_decay)
        m.add_((g - m).mul_(1 - beta1))
        v.mul_(beta2).add_((g * (1 - beta2)).mul_(g))
        denominator = v.double().sqrt_().float().div_(torch.full_like(v, root)).add_(eps)  # rounded as IEEE 754 asks
        w.add_((m * size).div_(denominator))
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
) -> None:
    """One SGD step, then the mask, in place (torch's form of momentum).

        d <- g + w weight_decay
        b <- d at the first step, else b momentum + d (1 - dampening)
        d <- d + b momentum with ``nesterov``, else b
        w <- w + d (-lr)
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
    """
    for layer, (w, g, mask, block) in enumerate(zip(weights, gradients, masks, blocks, strict=True)):
        d = g + w * weight_decay if weight_decay != 0 else g
        if momenta is not None:
            b = momenta[layer]
            if first:
                b.copy_(d)
            else:
                b.mul_(momentum).add_(d * (1 - dampening))
            d = d + b * momentum if nesterov else b
        w.add_(d * -lr)
        if mask is not None:
            gone = _gone(mask, w, block)
            w.masked_fill_(gone, 0.0)
            if reset and momenta is not None:
                momenta[layer].masked_fill_(gone, 0.0)


def _gone(mask: Tensor, weight: Tensor, block: tuple[int, int]) -> Tensor:
    """Where a unit is pruned: bool ``[R, C]``."""
    grid = UnitGrid.of_blocks((weight.shape[0], weight.shape[1]), block)
    keep = unpack_mask(mask, grid.shape) if is_packed(mask) else mask
    rows = torch.arange(weight.shape[0], device=weight.device) // block[0]
    cols = torch.arange(weight.shape[1], device=weight.device) // block[1]
    return ~keep[rows][:, cols]
