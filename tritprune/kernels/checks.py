"""The shapes and types that every backend may rely on; one function per operation, with its signature."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from tritprune.kernels.optimizer_reference import Rounding
from tritprune.kernels.packing import is_packed, packed_length
from tritprune.kernels.reference import Block, Finish, Form, Reduce
from tritprune.kernels.threshold_reference import Bounds
from tritprune.kernels.units import UnitGrid

LARGEST_GROUP = 32
"""The largest M of N:M."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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
    """Raise ValueError where the arguments of the operation do not fit together."""
    del alpha, beta
    op = "accumulate_unit_scores_"
    _one_of(op, "form", form, get_args(Form))
    _one_of(op, "reduce", reduce, get_args(Reduce))
    _one_of(op, "finish", finish, get_args(Finish))
    if form == "product" and reduce == "max":
        raise ValueError(f"{op}: form 'product' has a sign, and its maximum says nothing; reduce by mean, sum or l2")
    _same_length(op, scores=scores, weights=weights, blocks=blocks)
    if form != "magnitude":
        if gradients is None:
            raise ValueError(f"{op}: form '{form}' needs gradients")
        _same_length(op, weights=weights, gradients=gradients)
        for weight, gradient in zip(weights, gradients, strict=True):
            _float(op, "gradient", gradient)
            _shape(op, "gradient", gradient, tuple(weight.shape))
    if skipped.dtype != torch.int64 or skipped.shape != (len(weights),) or not skipped.is_contiguous():
        raise ValueError(f"{op}: skipped must be contiguous int64 [{len(weights)}], got {_show(skipped)}")
    for score, weight, block in zip(scores, weights, blocks, strict=True):
        _float(op, "weight", weight)
        _two_dimensions(op, "weight", weight)
        grid = UnitGrid.of_blocks((weight.shape[0], weight.shape[1]), block)
        _score(op, score, grid.shape, (torch.float32, torch.bfloat16))
        if not score.is_contiguous():
            raise ValueError(f"{op}: scores must be contiguous, got strides {score.stride()}")


def n_in_m_masks(scores: Sequence[Tensor], n: int, m: int, *, packed: bool = False) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    del packed
    _n_in_m("n_in_m_masks", scores, n, m)


def n_in_m_group_scores(scores: Sequence[Tensor], n: int, m: int) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    _n_in_m("n_in_m_group_scores", scores, n, m)


def kth_score(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    budget: int | Sequence[int],
    *,
    kept: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    op = "kth_score"
    _search(op, scores, grids, kept, bounds)
    budgets = [budget] if isinstance(budget, int) else budget
    if budgets is budget:
        _same_length(op, scores=scores, budgets=budgets)
    for each in budgets:
        if each < 0:
            raise ValueError(f"{op}: the budget is a number of elements, got {each}")


def masks_from_threshold(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    threshold: Tensor,
    remainder: Tensor,
    *,
    kept: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
    packed: bool = False,
) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    del packed
    op = "masks_from_threshold"
    _search(op, scores, grids, kept, bounds)
    for name, tensor, dtype in (("threshold", threshold, torch.float32), ("remainder", remainder, torch.int64)):
        if tensor.dtype != dtype or tensor.shape not in ((), (len(scores),)):
            raise ValueError(f"{op}: {name} must be one {dtype} number, or one a layer, got {_show(tensor)}")
    if threshold.ndim != remainder.ndim:
        raise ValueError(f"{op}: one threshold and one remainder, or one of both a layer")


def crossing_units(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], budgets: Sequence[int], *, kept: Sequence[Tensor] | None = None
) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    _search("crossing_units", scores, grids, kept, None)
    _same_length("crossing_units", scores=scores, budgets=budgets)


def count_non_finite(scores: Sequence[Tensor]) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    for score in scores:
        _score("count_non_finite", score, tuple(score.shape), (torch.float32, torch.bfloat16))


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    op = "apply_masks_"
    _same_length(op, tensors=tensors, masks=masks, blocks=blocks)
    for tensor, mask, block in zip(tensors, masks, blocks, strict=True):
        _float(op, "tensor", tensor)
        _two_dimensions(op, "tensor", tensor)
        _mask(op, mask, UnitGrid.of_blocks((tensor.shape[0], tensor.shape[1]), block))


def count_violations(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    op = "count_violations"
    _same_length(op, tensors=tensors, masks=masks, blocks=blocks)
    for tensor, mask, block in zip(tensors, masks, blocks, strict=True):
        _float(op, "tensor", tensor)
        _two_dimensions(op, "tensor", tensor)
        _mask(op, mask, UnitGrid.of_blocks((tensor.shape[0], tensor.shape[1]), block))


def mask_statistics(masks: Sequence[Tensor], previous: Sequence[Tensor]) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    _masks_and_previous("mask_statistics", masks, previous)


def restore_masks_(masks: Sequence[Tensor], previous: Sequence[Tensor], condition: Tensor) -> None:
    """Raise ValueError where the arguments of the operation do not fit together."""
    op = "restore_masks_"
    _masks_and_previous(op, masks, previous)
    if condition.dtype != torch.int64 or condition.ndim:
        raise ValueError(f"{op}: the condition is one int64 number, got {_show(condition)}")
    for mask in masks:
        if not mask.is_contiguous():
            raise ValueError(f"{op}: masks must be contiguous, got strides {mask.stride()}")


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
    """Raise ValueError where the arguments of the operation do not fit together."""
    del lr, beta1, beta2, eps, weight_decay, reset
    op = "masked_adamw_"
    _one_of(op, "rounding", rounding, get_args(Rounding))
    if step < 1:
        raise ValueError(f"{op}: steps count from 1, got {step}")
    _same_length(op, weights=weights, firsts=firsts, seconds=seconds)
    _step(op, weights, gradients, [*firsts, *seconds], masks, blocks)


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
    """Raise ValueError where the arguments of the operation do not fit together."""
    del lr, dampening, weight_decay, first, reset
    op = "masked_sgd_"
    _one_of(op, "rounding", rounding, get_args(Rounding))
    if (momentum != 0) != (momenta is not None):
        raise ValueError(f"{op}: momentum {momentum:g} {'needs' if momentum else 'has no use for'} momenta")
    if nesterov and momentum == 0:
        raise ValueError(f"{op}: nesterov needs momentum")
    _same_length(op, weights=weights, momenta=weights if momenta is None else momenta)
    _step(op, weights, gradients, [] if momenta is None else momenta, masks, blocks)


def _step(
    op: str,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    blocks: Sequence[Block],
) -> None:
    _same_length(op, weights=weights, gradients=gradients, masks=masks, blocks=blocks)
    for weight, gradient, mask, block in zip(weights, gradients, masks, blocks, strict=True):
        _two_dimensions(op, "weight", weight)
        for name, tensor in (("weight", weight), ("gradient", gradient)):
            if tensor.dtype != torch.float32:
                raise ValueError(f"{op}: a {name} is float32, got {_show(tensor)}")
        _shape(op, "gradient", gradient, tuple(weight.shape))
        if mask is not None:
            _mask(op, mask, UnitGrid.of_blocks((weight.shape[0], weight.shape[1]), block))
    for number, state in enumerate(states):
        weight = weights[number % len(weights)]
        if state.dtype != torch.float32 or state.shape != weight.shape or state.stride() != weight.stride():
            raise ValueError(
                f"{op}: moments are float32 {list(weight.shape)} with strides {weight.stride()} like their weight, "
                f"got {_show(state)} with strides {state.stride()}"
            )


def _n_in_m(op: str, scores: Sequence[Tensor], n: int, m: int) -> None:
    if not 0 < n < m <= LARGEST_GROUP:
        raise ValueError(f"{op}: N:M needs 0 < N < M <= {LARGEST_GROUP}, got {n}:{m}")
    for score in scores:
        _two_dimensions(op, "score", score)
        _score(op, score, tuple(score.shape))


def _masks_and_previous(op: str, masks: Sequence[Tensor], previous: Sequence[Tensor]) -> None:
    _same_length(op, masks=masks, previous=previous)
    for mask, old in zip(masks, previous, strict=True):
        for name, each in (("mask", mask), ("previous mask", old)):
            if each.dtype not in (torch.bool, torch.uint8):
                raise ValueError(f"{op}: a {name} is bool or packed in uint8, got {_show(each)}")
        _shape(op, "previous mask", old, tuple(mask.shape))
        if old.dtype != mask.dtype:
            raise ValueError(f"{op}: both masks are bool or both packed, got {_show(mask)} and {_show(old)}")


def _search(
    op: str, scores: Sequence[Tensor], grids: Sequence[UnitGrid], kept: Sequence[Tensor] | None, bounds: Bounds | None
) -> None:
    _same_length(op, scores=scores, grids=grids)
    for score, grid in zip(scores, grids, strict=True):
        _score(op, score, grid.shape)
    if kept is not None:
        _same_length(op, scores=scores, kept=kept)
        for mask, grid in zip(kept, grids, strict=True):
            _mask(op, mask, grid)
        if len({is_packed(mask) for mask in kept}) > 1:
            raise ValueError(f"{op}: masks of kept units are all bool or all packed")
    for tensor, dtype in zip(bounds or (), (torch.float32, torch.int64), strict=False):
        if tensor.dtype != dtype or tensor.shape != (len(scores), 2) or not tensor.is_contiguous():
            raise ValueError(f"{op}: bounds are float32 and int64, contiguous [{len(scores)}, 2], got {_show(tensor)}")


def _score(op: str, score: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    if score.dtype not in dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: scores are {known}, got {_show(score)}")
    _shape(op, "score", score, shape)


def _shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{op}: expected a {name} of shape {list(shape)}, got {_show(tensor)}")


def _two_dimensions(op: str, name: str, tensor: Tensor) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{op}: expected a {name} of shape [R, C], got {_show(tensor)}")


def _float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{op}: a {name} is float32, bfloat16 or float16, got {_show(tensor)}")


def _mask(op: str, mask: Tensor, grid: UnitGrid) -> None:
    if is_packed(mask):
        _shape(op, f"packed mask of {grid.units} units", mask, (packed_length(grid.units),))
        if not mask.is_contiguous():
            raise ValueError(f"{op}: packed masks must be contiguous, got strides {mask.stride()}")
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: a mask is bool or packed in uint8, got {_show(mask)}")
    _shape(op, "mask", mask, grid.shape)


def _one_of(op: str, name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{op}: unknown {name} '{value}'; known: {', '.join(known)}")


def _same_length(op: str, **lists: Sequence[object]) -> None:
    if len({len(entries) for entries in lists.values()}) > 1:
        counts = ", ".join(f"{len(entries)} {name}" for name, entries in lists.items())
        raise ValueError(f"{op}: one entry a layer in every list, got {counts}")


def _show(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")
