"""Operations that ``torch.compile`` sees as they are: score accumulation and mask apply, registered with torch.

Under tracing, :class:`tritprune.kernels.Op` calls the functions below: the graph holds one node, and the backend is
chosen when that runs. Both write in place and return nothing, so that a fake run has nothing to do. Without tracing
nothing goes through here.
"""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from tritprune.kernels.reference import Block, Finish, Form, Reduce

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
    import_module("tritprune.kernels").accumulate_unit_scores_(
        scores, skipped, weights, read, _pairs(blocks), **numbers
    )


@torch.library.custom_op("tritprune::apply_masks_", mutates_args=("tensors",), tags=_TAGS)
def _apply(tensors: list[Tensor], masks: list[Tensor], blocks: list[int]) -> None:
    import_module("tritprune.kernels").apply_masks_(tensors, masks, _pairs(blocks))


def _fake(*arguments: object, **options: object) -> None:
    """Writes in place and returns nothing: nothing to know before it runs."""


_accumulate.register_fake(_fake)  # pyright: ignore[reportUnknownMemberType]  (torch leaves its decorator untyped)
_apply.register_fake(_fake)  # pyright: ignore[reportUnknownMemberType]


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


def _pairs(numbers: list[int]) -> list[Block]:
    return list(zip(numbers[::2], numbers[1::2], strict=True))
