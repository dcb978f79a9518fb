"""Optimizer steps that end with the mask, for the CPU: the bits of ``torch.optim`` and a mask in fewer passes.

A chunk of a weight, its gradient and its moments stays in the cache from the first line of the formula to the mask.
The loops are numba's, with fused multiply-adds where torch has them; the root is torch's own, MKL's, which is not
rounded as IEEE 754 asks and which no loop can repeat. A probe holds the loops against torch once a process: on a CPU
where they differ (one without fused multiply-adds), and for a weight or gradient with gaps in memory, the operations of
the reference run instead.
"""

# pyright: basic

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from tritprune.kernels import optimizer_reference
from tritprune.kernels.compiled.work import compiled, run
from tritprune.kernels.optimizer_reference import Rounding
from tritprune.kernels.packing import is_packed, unpack_mask
from tritprune.kernels.units import UnitGrid

_ALONE, _TOGETHER = 1 << 17, 1 << 19
"""Elements of a chunk, for one thread and for several: what a cache holds and is worth the calls, or waking the others.

On one thread 2^12 to 2^15 took 1.2 to 3 times as long as 2^17: there are three calls a chunk.
"""

_UNMASKED = np.empty((0, 0), np.bool_)
_reference: Any = optimizer_reference


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
    """See :func:`tritprune.kernels.reference.masked_adamw_`."""
    numbers = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay, "step": step}
    roots = torch.empty(min(_chunk(), max((weight.numel() for weight in weights), default=0)))
    layers: Iterable[Any] = zip(weights, gradients, firsts, seconds, masks, blocks, strict=True)
    for layer in layers:
        if rounding == "own" and _dense(*layer[:2]) and _as_torch():
            _adamw(roots, *layer, **numbers, reset=reset)
        else:
            _reference.masked_adamw_(*([part] for part in layer), **numbers, reset=reset, rounding=rounding)


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
    """See :func:`tritprune.kernels.reference.masked_sgd_`."""
    numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    options = {"nesterov": nesterov, "first": first, "reset": reset}
    kept = [None] * len(weights) if momenta is None else momenta
    layers: Iterable[Any] = zip(weights, gradients, kept, masks, blocks, strict=True)
    for layer in layers:
        if rounding == "own" and _dense(*layer[:2]) and _as_torch():
            _sgd(*layer, **numbers, **options)
        else:
            listed = [None if number == 2 and part is None else [part] for number, part in enumerate(layer)]
            _reference.masked_sgd_(*listed, **numbers, **options, rounding=rounding)


def _adamw(roots, w, g, m, v, mask, block, *, lr, beta1, beta2, eps, weight_decay, step, reset):
    """A step of one layer whose tensors have the same strides and no gaps; ``roots`` is room for those of a chunk."""
    decay, root = 1 - lr * weight_decay if weight_decay else 1.0, (1 - beta2**step) ** 0.5
    shares = np.float32(1 - beta1), np.float32(beta2), np.float32(1 - beta2)
    rest = np.float32(decay), np.float32(root), np.float32(eps), np.float32(-lr / (1 - beta1**step))
    keep = _kept(mask, w, block)
    flat, gradient, first, second = (_flat(tensor) for tensor in (w, g, m, v))
    seconds = torch.from_numpy(second)
    read = roots.numpy()
    for start, stop in _chunks(0, len(flat), _chunk()):
        pieces = list(_shares(start, stop))
        run(_adamw_moments, [(first, second, gradient, *piece, *shares) for piece in pieces])
        torch.sqrt(seconds[start:stop], out=roots[: stop - start])
        run(_adamw_weights, [(flat, first, read, start, *piece, *rest, *keep) for piece in pieces])
        if reset and mask is not None:
            run(_zero, [(moment, *piece, *keep) for piece in pieces for moment in (first, second)])


def _sgd(w, g, b, mask, block, *, lr, momentum, dampening, weight_decay, nesterov, first, reset):
    """A step of one layer whose tensors have the same strides and no gaps."""
    kind = 0 if b is None else 1 if first else 2
    keep = _kept(mask, w, block)
    flat, gradient = _flat(w), _flat(g)
    state = flat if b is None else _flat(b)
    numbers = (np.float32(x) for x in (-lr, momentum, 1 - dampening, weight_decay))
    how = (*numbers, kind, nesterov, weight_decay != 0)
    pieces = list(_chunks(0, len(flat), _ALONE))
    run(_sgd_piece, [(flat, gradient, state, *piece, *how, *keep) for piece in pieces])
    if reset and mask is not None and b is not None:
        run(_zero, [(state, *piece, *keep) for piece in pieces])


def _fma_code(typing_context, a, b, c):
    """Type and machine code of ``a b + c``, rounded once."""
    del typing_context, a, b, c

    def generate(context, builder, signature, arguments):
        del context, signature
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


_fma: Any = intrinsic(_fma_code)


@compiled
def _adamw_moments(m, v, g, first, last, share1, beta2, share2):
    m, v, g = m[first:last], v[first:last], g[first:last]  # an index that cannot be negative lets a loop be vectors
    if share1 < np.float32(0.5):
        for i in range(m.size):
            m[i] = _fma(share1, g[i] - m[i], m[i])
    else:
        share1 -= np.float32(1)
        for i in range(m.size):
            m[i] = _fma(share1, g[i] - m[i], g[i])
    for i in range(v.size):
        v[i] = _fma(share2 * g[i], g[i], v[i] * beta2)


@compiled
def _adamw_weights(w, m, roots, offset, first, last, decay, root, eps, size, keep, cols, n, block_cols):
    own, m, roots = w[first:last], m[first:last], roots[first - offset : last - offset]
    for i in range(own.size):
        own[i] = own[i] * decay + (size * m[i]) / (roots[i] / root + eps)
    if keep.size:
        _zero(w, first, last, keep, cols, n, block_cols)


@compiled
def _sgd_piece(
    w, g, b, first, last, minus_lr, momentum, share, decay, kind, nesterov, decays, keep, cols, n, block_cols
):
    own, g, b = w[first:last], g[first:last], b[first:last]
    if decays:
        d = np.empty(own.size, np.float32)
        for i in range(own.size):
            d[i] = _fma(decay, own[i], g[i])
        g = d
    if kind == 1:
        b[:] = g
    elif kind == 2:
        for i in range(own.size):
            b[i] = _fma(share, g[i], b[i] * momentum)
    if nesterov:
        for i in range(own.size):
            own[i] = _fma(minus_lr, _fma(momentum, b[i], g[i]), own[i])
    else:
        step = b if kind else g
        for i in range(own.size):
            own[i] = _fma(minus_lr, step[i], own[i])
    if keep.size:
        _zero(w, first, last, keep, cols, n, block_cols)


@compiled
def _zero(values, first, last, keep, cols, n, m):
    """Zeros in places ``first`` to ``last`` of a flat ``[R, C]`` where the unit is pruned."""
    at = first
    while at < last:
        row = at // cols
        begin = row * cols
        end = min(last, begin + cols)
        own, kept = values[at:end], keep[row // n]
        if m == 1:
            here = kept[at - begin : end - begin]
            for i in range(own.size):
                own[i] = own[i] if here[i] else np.float32(0)
        else:
            for i in range(own.size):
                if not kept[(i + at - begin) // m]:
                    own[i] = 0
        at = end


@functools.cache
def _as_torch() -> bool:
    """Whether the loops give the bits of torch's operations on this CPU."""
    generator = torch.Generator().manual_seed(0)
    size, options = (1, 515), {"lr": 0.1, "weight_decay": 0.1, "reset": False}
    adamw: dict[str, Any] = options | {"beta1": 0.9, "beta2": 0.98, "eps": 1e-3, "step": 2}
    sgd: dict[str, Any] = options | {"momentum": 0.9, "dampening": 0.1, "nesterov": True, "first": False}
    w, g, m, v = (torch.randn(size, generator=generator) for _ in range(4))
    mine, theirs = ([tensor.clone() for tensor in (w, g, m, v.abs())] for _ in range(2))
    unmasked: tuple[Any, ...] = (None, (1, 1))
    _adamw(*(torch.empty(size[1]), *mine, *unmasked), **adamw)
    _sgd(*(*mine[:3], *unmasked), **sgd)
    _reference.masked_adamw_(*([part] for part in (*theirs, *unmasked)), **adamw)
    _reference.masked_sgd_(*([part] for part in (*theirs[:3], *unmasked)), **sgd)
    return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def _dense(weight: Tensor, gradient: Tensor) -> bool:
    """Whether both have the same strides and no gaps, so that they can be read from end to end."""
    return weight.stride() == gradient.stride() and (weight.is_contiguous() or weight.t().is_contiguous())


def _flat(tensor: Tensor) -> np.ndarray:
    """Memory in its order, ``[R C]``."""
    return (tensor if tensor.is_contiguous() else tensor.t()).detach().view(-1).numpy()


def _kept(mask: Tensor | None, weight: Tensor, block: tuple[int, int]) -> tuple[np.ndarray, int, int, int]:
    """The mask in the order of the weight's memory (empty: none), the columns there, and the block."""
    n, m = block
    transposed = not weight.is_contiguous()
    cols = weight.shape[0] if transposed else weight.shape[1]
    if mask is None:
        return _UNMASKED, cols, 1, 1
    if is_packed(mask):
        mask = unpack_mask(mask, UnitGrid.of_blocks((weight.shape[0], weight.shape[1]), block).shape)
    if transposed:
        return mask.t().contiguous().numpy(), cols, m, n
    return mask.contiguous().numpy(), cols, n, m


def _chunk() -> int:
    return _ALONE if torch.get_num_threads() < 2 else _TOGETHER


def _chunks(start: int, stop: int, size: int):
    return ((first, min(first + size, stop)) for first in range(start, stop, size))


def _shares(start: int, stop: int):
    """One range a thread."""
    return _chunks(start, stop, max(1, -(-(stop - start) // torch.get_num_threads())))
