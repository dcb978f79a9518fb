"""Every operation in plain torch and einops: the specification that the Triton kernels must meet.

Shapes: ``R x C`` is a weight view, ``n x m`` a block, ``rows x cols`` the grid of units (``rows = ceil(R / n)``,
``cols = ceil(C / m)``). Lists run over layers. Nothing here needs a GPU; on one, these functions may synchronise.
The shapes that the docstrings name are checked once, in ``checks.py``, for every backend. A mask is bool of the shape
of its grid, or packed (``packing.py``): uint8 ``[ceil(units / 8)]``.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from einops import reduce as einops_reduce  # pyright: ignore[reportUnknownVariableType]  (einops names an untyped callable)
from torch import Tensor

from tritprune.kernels.optimizer_reference import masked_adamw_, masked_sgd_
from tritprune.kernels.packing import is_packed, pack_mask, unpack_mask
from tritprune.kernels.threshold_reference import count_non_finite, crossing_units, kth_score, masks_from_threshold
from tritprune.kernels.units import UnitGrid

__all__ = [
    "accumulate_unit_scores_",
    "apply_masks_",
    "count_non_finite",
    "count_violations",
    "crossing_units",
    "kth_score",
    "mask_statistics",
    "masked_adamw_",
    "masked_sgd_",
    "masks_from_threshold",
    "n_in_m_group_scores",
    "n_in_m_masks",
    "restore_masks_",
]

Form = Literal["magnitude", "gradient", "snip", "product"]
Reduce = Literal["mean", "sum", "max", "l2"]
Finish = Literal["none", "abs", "square"]
Block = tuple[int, int]

SMALL_UNIT = 16
"""Units of up to this many elements are summed one element after the other, row-major, on every backend: the same
bits everywhere. Larger units are summed in an order that the backend chooses."""

_STRIP_ELEMENTS = 1 << 18


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
    """Score units, fold into the running score, in place: ``S <- alpha * S + beta * finish(reduce_unit f(w, g))``.

    ``f`` is ``|w|`` (magnitude), ``|g|`` (gradient), ``|w * g|`` (snip) or ``w * g`` with its sign (product), in fp32
    whatever the inputs are. An element whose gradient is not finite has ``f = 0`` and is counted. ``mean`` divides by
    the unit's true size, smaller at ragged edges; ``l2`` is ``sqrt(sum f^2)``; ``max`` is for forms without a sign.
    With ``alpha = 0`` the old ``S`` is not read. Products and sum are rounded one by one (no fused multiply-add):
    ``round(round(alpha * S) + round(beta * r))``. Scores in bf16 are computed in fp32 and rounded to nearest even.

    Bytes to move: the weights and the gradients that ``f`` uses once, ``S`` twice (once if ``alpha = 0``).

    Args:
        scores: fp32 or bf16 ``[rows, cols]`` each, contiguous, updated in place.
        skipped: int64 ``[T]``; ``skipped[t]`` grows by the number of elements of layer t with a non-finite gradient.
        weights: fp32, bf16 or fp16 ``[R, C]`` each, any strides.
        gradients: like ``weights``; None if ``form`` is magnitude.
        blocks: ``(n, m)`` each.
        form: what an element is worth.
        reduce: how a unit's elements become one number.
        alpha: share of the old score that stays.
        beta: weight of the new one.
        finish: what becomes of the unit's number before it is folded in.
    """
    for layer, (score, weight, block) in enumerate(zip(scores, weights, blocks, strict=True)):
        gradient = None if gradients is None or form == "magnitude" else gradients[layer]
        for units, elements in _strips(score, weight, block):
            w = weight[elements]
            g = None if gradient is None else gradient[elements]
            fresh = _reduce_units(_element_scores(form, w, g), block, reduce)
            if g is not None and not bool(torch.isfinite(fresh).all()):
                # Only a non-finite gradient (or an overflow) can do this: look closer, which the usual case need not.
                finite = torch.isfinite(g)
                skipped[layer] += finite.numel() - torch.count_nonzero(finite)
                fresh = _reduce_units(_element_scores(form, w, g).masked_fill_(~finite, 0.0), block, reduce)
            if reduce == "mean":
                grid = UnitGrid.of_blocks((w.shape[0], w.shape[1]), block)
                fresh.div_(grid.row_heights(w.device)[:, None].float() * grid.col_widths(w.device)[None, :].float())
            if reduce == "l2":
                fresh = fresh.double().sqrt().float()  # rounded as IEEE 754 asks, which torch's fp32 root is not
            if finish != "none":
                fresh = fresh.abs_() if finish == "abs" else fresh.square_()
            fresh.mul_(beta)
            if alpha != 0:
                fresh = score[units].float().mul(alpha).add_(fresh)
            score[units] = fresh


def n_in_m_masks(scores: Sequence[Tensor], n: int, m: int, *, packed: bool = False) -> list[Tensor]:
    """Prune the ``n`` lowest of every ``m`` consecutive columns; among equals the lower index stays.

    A shorter group of length L at the end of a row prunes ``floor(L * n / m)``.
    Bytes to move: the scores once, one byte (packed: one bit) a mask element.

    Args:
        scores: fp32 ``[R, C]`` each.
        n: how many go, ``0 < n < m``.
        m: length of a group.
        packed: whether masks are made packed.

    Returns:
        bool ``[R, C]`` each, True = keep; or packed.
    """
    masks = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    for score, mask in zip(scores, masks, strict=True):
        for columns, length in _groups(score.shape[1], m):
            quota = length * n // m
            for j, rank in enumerate(_ranks(score[:, columns], length)):
                mask[:, columns][:, j::length] = rank >= quota
    return [pack_mask(mask) for mask in masks] if packed else masks


def n_in_m_group_scores(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    """What pruning a group costs: the sum of the scores that :func:`n_in_m_masks` would prune, lower index first.

    Bytes to move: the scores once, 4 bytes a group.

    Args:
        scores: fp32 ``[R, C]`` each.
        n: how many would go, ``0 < n < m``.
        m: length of a group.

    Returns:
        fp32 ``[R, ceil(C / m)]`` each.
    """
    costs = [
        torch.zeros(score.shape[0], -(-score.shape[1] // m), dtype=torch.float32, device=score.device)
        for score in scores
    ]
    for score, cost in zip(scores, costs, strict=True):
        for columns, length in _groups(score.shape[1], m):
            quota = length * n // m
            part = cost[:, columns.start // m : -(-columns.stop // m)]
            for j, rank in enumerate(_ranks(score[:, columns], length)):
                part += torch.where(rank < quota, score[:, columns][:, j::length], 0.0)
    return costs


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> None:
    """Zero every element of the pruned units, in place and in the same storage; also NaN, infinity and -0 become 0.

    Bytes to move: one (packed: an eighth) a unit, and the pruned elements once (they are written, never read).

    Args:
        tensors: fp32, bf16 or fp16 ``[R, C]`` each, any strides.
        masks: bool ``[rows, cols]`` each, True = keep; or packed.
        blocks: ``(n, m)`` each.
    """
    for tensor, mask, (n, m) in zip(tensors, masks, blocks, strict=True):
        gone = ~_unpacked(mask, tensor, (n, m))
        for height in _pieces(tensor.shape[0], n):
            for width in _pieces(tensor.shape[1], m):
                part = tensor[height[1], width[1]]
                part_gone = gone[height[0], width[0]]
                if min(part.shape) == 0:
                    continue
                unit_rows, unit_cols = part_gone.shape
                blocked = part.view(unit_rows, part.shape[0] // unit_rows, unit_cols, part.shape[1] // unit_cols)
                blocked.masked_fill_(part_gone[:, None, :, None], 0.0)


def count_violations(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> Tensor:
    """How many elements of pruned units are not zero; NaN is not, -0 is.

    Bytes to move: one (packed: an eighth) a unit, and the tensors once.

    Args:
        tensors: fp32, bf16 or fp16 ``[R, C]`` each, any strides.
        masks: bool ``[rows, cols]`` each, True = keep; or packed.
        blocks: ``(n, m)`` each.

    Returns:
        int64 ``[T]``.
    """
    device = masks[0].device if masks else torch.device("cpu")
    counts = torch.zeros(len(masks), dtype=torch.int64, device=device)
    for layer, (tensor, mask, (n, m)) in enumerate(zip(tensors, masks, blocks, strict=True)):
        mask = _unpacked(mask, tensor, (n, m))
        for height in _pieces(tensor.shape[0], n):
            for width in _pieces(tensor.shape[1], m):
                part, gone = tensor[height[1], width[1]], ~mask[height[0], width[0]]
                if min(part.shape) == 0:
                    continue
                unit_rows, unit_cols = gone.shape
                blocked = part.view(unit_rows, part.shape[0] // unit_rows, unit_cols, part.shape[1] // unit_cols)
                counts[layer] += torch.count_nonzero((blocked != 0) & gone[:, None, :, None])
    return counts


def mask_statistics(masks: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    """How many units stay, and how many changed since the previous masks.

    Bytes to move: both masks once.

    Args:
        masks: bool, any shape; or packed.
        previous: of the same types and shapes.

    Returns:
        int64 ``[T, 2]``: kept and changed units of each layer.
    """
    device = masks[0].device if masks else torch.device("cpu")
    rows = [
        torch.stack([torch.count_nonzero(each) for each in (_all_bits(mask), _all_bits(mask ^ old))])
        for mask, old in zip(masks, previous, strict=True)
    ]
    return torch.stack(rows) if rows else torch.zeros(0, 2, dtype=torch.int64, device=device)


def restore_masks_(masks: Sequence[Tensor], previous: Sequence[Tensor], condition: Tensor) -> None:
    """``mask <- previous`` in place, if the condition is not 0; the host need not know.

    Bytes to move: none, or both masks once.

    Args:
        masks: bool, any shape; or packed.
        previous: of the same types and shapes.
        condition: int64 ``[]``.
    """
    for mask, old in zip(masks, previous, strict=True):
        if bool(condition):
            mask.copy_(old)


def _unpacked(mask: Tensor, tensor: Tensor, block: Block) -> Tensor:
    """Bool ``[rows, cols]`` of a mask, whatever it is."""
    if not is_packed(mask):
        return mask
    return unpack_mask(mask, UnitGrid.of_blocks((tensor.shape[0], tensor.shape[1]), block).shape)


def _all_bits(mask: Tensor) -> Tensor:
    """Bool of every unit (and of spare bits, which are False)."""
    return unpack_mask(mask, (8 * mask.numel(),)) if is_packed(mask) else mask


def _element_scores(form: Form, weight: Tensor, gradient: Tensor | None) -> Tensor:
    """``f(w, g)`` in fp32, in memory of its own: ``[R, C] -> [R, C]``."""
    if form == "magnitude" or gradient is None:
        return weight.float().abs()
    if form == "gradient":
        return gradient.float().abs()
    product = weight.float() * gradient.float()
    return product if form == "product" else product.abs_()


def _strips(score: Tensor, weight: Tensor, block: Block) -> Iterator[tuple[slice, slice]]:
    """Rows of units and the rows of elements below them, cut so that temporaries stay in the cache."""
    n = block[0]
    units = max(1, _STRIP_ELEMENTS // max(1, n * weight.shape[1]))
    for start in range(0, score.shape[0], units):
        yield slice(start, start + units), slice(start * n, (start + units) * n)


def _reduce_units(values: Tensor, block: Block, reduce: Reduce) -> Tensor:
    """The sum of every unit (``max``: its maximum; ``l2``: of squares): ``[R, C] -> [rows, cols]``."""
    n, m = block
    values = values.square() if reduce == "l2" else values
    operation = "max" if reduce == "max" else "sum"
    if n * m <= SMALL_UNIT:
        return _reduce_in_order(values, block, operation)
    rows, cols = -(-values.shape[0] // n), -(-values.shape[1] // m)
    out = values.new_empty(rows, cols)
    for height in _pieces(values.shape[0], n):
        for width in _pieces(values.shape[1], m):
            part, target = values[height[1], width[1]], out[height[0], width[0]]
            if part.numel():
                row_units, col_units = target.shape
                pattern = "(rows n) (cols m) -> rows cols"
                target.copy_(einops_reduce(part, pattern, operation, rows=row_units, cols=col_units))
    return out


def _reduce_in_order(values: Tensor, block: Block, operation: Literal["sum", "max"]) -> Tensor:
    """As :func:`_reduce_units`, one element of each unit after the other, row-major."""
    n, m = block
    out = values[::n, ::m] + 0.0  # a sum that starts from +0: it is never -0
    for i in range(n):
        for j in range(m):
            part = values[i::n, j::m]
            target = out[: part.shape[0], : part.shape[1]]
            if (i, j) == (0, 0):
                continue
            if operation == "sum":
                target.add_(part)
            else:
                torch.maximum(target, part, out=target)
    return out


def _pieces(length: int, size: int) -> list[tuple[slice, slice]]:
    """``(units, elements)`` of the whole pieces of a dimension and of the shorter one at its end."""
    whole = length // size
    return [(slice(0, whole), slice(0, whole * size)), (slice(whole, None), slice(whole * size, length))]


def _groups(columns: int, m: int) -> Iterator[tuple[slice, int]]:
    """Column ranges that hold groups of one length, and that length: the whole groups, then the shorter one."""
    whole = columns - columns % m
    if whole:
        yield slice(0, whole), m
    if whole < columns:
        yield slice(whole, columns), columns - whole


def _ranks(scores: Tensor, length: int) -> Iterator[Tensor]:
    """For each place j of a group, how many of its group go before it: ``[R, C] -> length times [R, C / length]``.

    i goes before j if its score is lower, or equal and i > j.
    """
    places = [scores[:, j::length] for j in range(length)]
    for j, own in enumerate(places):
        rank = torch.zeros(own.shape, dtype=torch.int32, device=own.device)
        for i, other in enumerate(places):
            if i != j:
                rank += (other < own) if i < j else (other <= own)
        yield rank
