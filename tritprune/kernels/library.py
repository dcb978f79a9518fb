"""Operations that ``torch.compile`` sees as they are, registered with torch: all but the optimizer steps.

Under tracing, :class:`tritprune.kernels.Op` calls the functions below: the graph holds one node, and the backend is
chosen when that runs. Those that write in place return nothing, so that a fake run has nothing to do; the others have
fakes that say the shapes. Grids and blocks are lists of numbers there. Without tracing nothing goes through here. An
optimizer's step has Python numbers that change with every step, and a graph would be made anew for each.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from tritprune.kernels.packing import packed_length
from tritprune.kernels.reference import Block, Finish, Form, Reduce
from tritprune.kernels.threshold_reference import Bounds
from tritprune.kernels.units import UnitGrid

_TAGS = (torch.Tag.cudagraph_unsafe,)
"""Tables that are cached between calls must not come from the pool of a graph that inductor records."""


@torch.library.custom_op("tritprune::accumulate_unit_scores_", mutates_args=("scores", "skipped"), tags=_TAGS)
def _accumulate(
    scores: list[Tensor],
    skipped: Tensor,
    weights: list[Tensor],
    gradients: list[Tensor],
    blocks: list[int],
    form: str,
    reduce: str,
    alpha: float,
    beta: float,
    finish: str,
) -> None:
    numbers = {"form": form, "reduce": reduce, "alpha": alpha, "beta": beta, "finish": finish}
    read = None if form == "magnitude" else gradients
    _op("accumulate_unit_scores_")(scores, skipped, weights, read, _pairs(blocks), **numbers)


@torch.library.custom_op("tritprune::apply_masks_", mutates_args=("tensors",), tags=_TAGS)
def _apply(tensors: list[Tensor], masks: list[Tensor], blocks: list[int]) -> None:
    _op("apply_masks_")(tensors, masks, _pairs(blocks))


@torch.library.custom_op("tritprune::restore_masks_", mutates_args=("masks",), tags=_TAGS)
def _restore(masks: list[Tensor], previous: list[Tensor], condition: Tensor) -> None:
    _op("restore_masks_")(masks, previous, condition)


def _fake(*arguments: object, **options: object) -> None:
    """Writes in place and returns nothing: nothing to know before it runs."""


_accumulate.register_fake(_fake)  # pyright: ignore[reportUnknownMemberType]  (torch leaves its decorator untyped)
_apply.register_fake(_fake)  # pyright: ignore[reportUnknownMemberType]
_restore.register_fake(_fake)  # pyright: ignore[reportUnknownMemberType]


@torch.library.custom_op("tritprune::kth_score", mutates_args=(), tags=_TAGS)
def _kth(
    scores: list[Tensor], grids: list[int], budgets: list[int], a_layer: bool, kept: list[Tensor], bounds: list[Tensor]
) -> tuple[Tensor, Tensor]:
    return _op("kth_score")(scores, _grids(grids), budgets if a_layer else budgets[0], **_stand(kept, bounds))


@torch.library.custom_op("tritprune::crossing_units", mutates_args=(), tags=_TAGS)
def _crossing(scores: list[Tensor], grids: list[int], budgets: list[int], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _op("crossing_units")(scores, _grids(grids), budgets, kept=kept or None)


@torch.library.custom_op("tritprune::count_non_finite", mutates_args=(), tags=_TAGS)
def _non_finite(scores: list[Tensor]) -> Tensor:
    return _op("count_non_finite")(scores)


@torch.library.custom_op("tritprune::masks_from_threshold", mutates_args=(), tags=_TAGS)
def _masks(
    scores: list[Tensor],
    grids: list[int],
    threshold: Tensor,
    remainder: Tensor,
    kept: list[Tensor],
    bounds: list[Tensor],
    packed: bool,
) -> list[Tensor]:
    stand = _stand(kept, bounds)
    return _op("masks_from_threshold")(scores, _grids(grids), threshold, remainder, packed=packed, **stand)


@torch.library.custom_op("tritprune::n_in_m_masks", mutates_args=(), tags=_TAGS)
def _n_in_m(scores: list[Tensor], n: int, m: int, packed: bool) -> list[Tensor]:
    return _op("n_in_m_masks")(scores, n, m, packed=packed)


@torch.library.custom_op("tritprune::n_in_m_group_scores", mutates_args=(), tags=_TAGS)
def _costs(scores: list[Tensor], n: int, m: int) -> list[Tensor]:
    return _op("n_in_m_group_scores")(scores, n, m)


@torch.library.custom_op("tritprune::count_violations", mutates_args=(), tags=_TAGS)
def _violations(tensors: list[Tensor], masks: list[Tensor], blocks: list[int]) -> Tensor:
    return _op("count_violations")(tensors, masks, _pairs(blocks))


@torch.library.custom_op("tritprune::mask_statistics", mutates_args=(), tags=_TAGS)
def _statistics(masks: list[Tensor], previous: list[Tensor]) -> Tensor:
    return _op("mask_statistics")(masks, previous)


@_kth.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    scores: list[Tensor], grids: list[int], budgets: list[int], a_layer: bool, kept: list[Tensor], bounds: list[Tensor]
) -> tuple[Tensor, Tensor]:
    del grids, budgets, kept, bounds
    shape, device = ([len(scores)] if a_layer else []), _device(scores)
    return torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int64, device=device)


@_masks.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(
    scores: list[Tensor],
    grids: list[int],
    threshold: Tensor,
    remainder: Tensor,
    kept: list[Tensor],
    bounds: list[Tensor],
    packed: bool,
) -> list[Tensor]:
    del threshold, remainder, kept, bounds
    return [_empty_mask(score, grid.shape, packed) for score, grid in zip(scores, _grids(grids), strict=True)]


@_n_in_m.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(scores: list[Tensor], n: int, m: int, packed: bool) -> list[Tensor]:
    del n, m
    return [_empty_mask(score, tuple(score.shape), packed) for score in scores]


@_costs.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(scores: list[Tensor], n: int, m: int) -> list[Tensor]:
    del n
    return [score.new_empty(score.shape[0], -(-score.shape[1] // m)) for score in scores]


@_crossing.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(scores: list[Tensor], grids: list[int], budgets: list[int], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
    del grids, budgets, kept
    shape, device = [len(scores)], _device(scores)
    return torch.empty(shape, device=device), torch.empty(shape, dtype=torch.int64, device=device)


@_non_finite.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(scores: list[Tensor]) -> Tensor:
    return torch.empty(len(scores), dtype=torch.int64, device=_device(scores))


@_violations.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(tensors: list[Tensor], masks: list[Tensor], blocks: list[int]) -> Tensor:
    del blocks
    return torch.empty(len(masks), dtype=torch.int64, device=_device(tensors))


@_statistics.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(masks: list[Tensor], previous: list[Tensor]) -> Tensor:
    del previous
    return torch.empty(len(masks), 2, dtype=torch.int64, device=_device(masks))


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
    """See :func:`tritprune.kernels.reference.accumulate_unit_scores_`; a node of the graph that is being traced."""
    read = [] if gradients is None or form == "magnitude" else list(gradients)
    flat = [size for block in blocks for size in block]
    numbers = (form, reduce, float(alpha), float(beta), finish)
    torch.ops.tritprune.accumulate_unit_scores_(list(scores), skipped, list(weights), read, flat, *numbers)


def apply_masks_(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> None:
    """See :func:`tritprune.kernels.reference.apply_masks_`; a node of the graph that is being traced."""
    torch.ops.tritprune.apply_masks_(list(tensors), list(masks), [size for block in blocks for size in block])


def kth_score(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    budget: int | Sequence[int],
    *,
    kept: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`tritprune.kernels.reference.kth_score`; a node of the graph that is being traced."""
    a_layer = not isinstance(budget, int)
    budgets = list(budget) if a_layer else [budget]
    return torch.ops.tritprune.kth_score(
        list(scores), _flat(grids), budgets, a_layer, list(kept or ()), list(bounds or ())
    )


def crossing_units(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], budgets: Sequence[int], *, kept: Sequence[Tensor] | None = None
) -> Bounds:
    """See :func:`tritprune.kernels.reference.crossing_units`; a node of the graph that is being traced."""
    return torch.ops.tritprune.crossing_units(list(scores), _flat(grids), list(budgets), list(kept or ()))


def count_non_finite(scores: Sequence[Tensor]) -> Tensor:
    """See :func:`tritprune.kernels.reference.count_non_finite`; a node of the graph that is being traced."""
    return torch.ops.tritprune.count_non_finite(list(scores))


def masks_from_threshold(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    threshold: Tensor,
    remainder: Tensor,
    *,
    kept: Sequence[Tensor] | None = None,
    bounds: Bounds | None = None,
    packed: bool = False,
) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.masks_from_threshold`; a node of the graph that is being traced."""
    stand = (list(kept or ()), list(bounds or ()))
    return torch.ops.tritprune.masks_from_threshold(list(scores), _flat(grids), threshold, remainder, *stand, packed)


def n_in_m_masks(scores: Sequence[Tensor], n: int, m: int, *, packed: bool = False) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_masks`; a node of the graph that is being traced."""
    return torch.ops.tritprune.n_in_m_masks(list(scores), n, m, packed)


def n_in_m_group_scores(scores: Sequence[Tensor], n: int, m: int) -> list[Tensor]:
    """See :func:`tritprune.kernels.reference.n_in_m_group_scores`; a node of the graph that is being traced."""
    return torch.ops.tritprune.n_in_m_group_scores(list(scores), n, m)


def count_violations(tensors: Sequence[Tensor], masks: Sequence[Tensor], blocks: Sequence[Block]) -> Tensor:
    """See :func:`tritprune.kernels.reference.count_violations`; a node of the graph that is being traced."""
    flat = [size for block in blocks for size in block]
    return torch.ops.tritprune.count_violations(list(tensors), list(masks), flat)


def mask_statistics(masks: Sequence[Tensor], previous: Sequence[Tensor]) -> Tensor:
    """See :func:`tritprune.kernels.reference.mask_statistics`; a node of the graph that is being traced."""
    return torch.ops.tritprune.mask_statistics(list(masks), list(previous))


def restore_masks_(masks: Sequence[Tensor], previous: Sequence[Tensor], condition: Tensor) -> None:
    """See :func:`tritprune.kernels.reference.restore_masks_`; a node of the graph that is being traced."""
    torch.ops.tritprune.restore_masks_(list(masks), list(previous), condition)


def _op(name: str) -> Any:
    """The operation itself, checked and dispatched when the node runs."""
    return getattr(import_module("tritprune.kernels"), name)


def _stand(kept: list[Tensor], bounds: list[Tensor]) -> dict[str, Any]:
    return {"kept": kept or None, "bounds": (bounds[0], bounds[1]) if bounds else None}


def _device(tensors: list[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def _empty_mask(score: Tensor, shape: tuple[int, ...], packed: bool) -> Tensor:
    if packed:
        return score.new_empty(packed_length(shape[0] * shape[1]), dtype=torch.uint8)
    return score.new_empty(shape, dtype=torch.bool)


def _flat(grids: Sequence[UnitGrid]) -> list[int]:
    names = ("rows", "cols", "row_size", "last_row_size", "col_size", "last_col_size")
    return [getattr(grid, name) for grid in grids for name in names]


def _grids(numbers: list[int]) -> list[UnitGrid]:
    return [UnitGrid(*numbers[start : start + 6]) for start in range(0, len(numbers), 6)]


def _pairs(numbers: list[int]) -> list[Block]:
    return list(zip(numbers[::2], numbers[1::2], strict=True))
