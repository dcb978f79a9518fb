"""Regularizers: what pulls units to zero before they go, so that less is lost when they do.

One class with a registered name makes one more; :func:`get_regularizer` finds it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from tritprune.criteria import reduce_units
from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid
from tritprune.patterns import Block, WeightView
from tritprune.registry import Registry


class Regularizer(Protocol):
    """Changes weights after the optimizer's step, in place."""

    def shrink_(self, views: Sequence[WeightView], blocks: Sequence[Block], rates: Sequence[float | Tensor]) -> None:
        """Pull units towards zero.

        Args:
            views: the layers.
            blocks: ``(n, m)`` of each, the unit that goes as a whole.
            rates: the optimizer's learning rate of each layer.
        """
        ...


R = TypeVar("R", bound=type[Any])

regularizers: Registry[Any] = Registry("regularizer")
"""Regularizers by name."""


def register_regularizer(name: str) -> Callable[[R], R]:
    """Class decorator: files a regularizer under ``name``.

    Raises:
        ConfigError: the name is taken.
    """
    return regularizers.register(name)


def get_regularizer(config: str | Mapping[str, Any] | Regularizer | None) -> Regularizer | None:
    """The regularizer that ``config`` names: ``"group_lasso"``, ``{"name": "group_lasso", "coeff": 1e-3}``, or none.

    Raises:
        UnknownNameError: unknown name; the message lists the known ones.
        ConfigError: unknown argument, or one out of range.
    """
    if config is None or hasattr(config, "shrink_"):
        return config  # pyright: ignore[reportReturnType]
    return regularizers.build(config)  # pyright: ignore[reportArgumentType]


@register_regularizer("group_lasso")
class GroupLasso:
    """``w_u <- w_u max(0, 1 - lr coeff sqrt(size_u) / ||w_u||_2)``: the proximal step of the group lasso.

    It belongs to the penalty ``coeff sum_u sqrt(size_u) ||w_u||_2`` (Yuan and Lin 2006, "Model selection and
    estimation in regression with grouped variables", eq. 2.1; proximal operator as in Parikh and Boyd 2014, section
    6.5.1). The norm is that of the weights; ``lr`` is the learning rate of the weight's parameter group. A unit whose
    norm is at most ``lr coeff sqrt(size_u)`` becomes exactly zero, and a zero unit stays zero.

    Args:
        coeff: strength of the penalty, at least 0.

    Raises:
        ConfigError: coeff is negative or not finite.
    """

    def __init__(self, coeff: float = 1e-3) -> None:
        if not 0 <= coeff < float("inf"):
            raise ConfigError(f"group_lasso: coeff must be at least 0 and finite, got {coeff}")
        self.coeff = coeff

    @torch.no_grad()
    def shrink_(self, views: Sequence[WeightView], blocks: Sequence[Block], rates: Sequence[float | Tensor]) -> None:
        """One proximal step of every unit."""
        for view, block, rate in zip(views, blocks, rates, strict=True):
            flat = view.to_2d(view.parameter)
            (rows, columns), (n, m) = view.shape, block
            norms = reduce_units(flat.float(), block, "l2")
            bound = rate * self.coeff * UnitGrid.of_blocks(view.shape, block).sizes(norms.device).float().sqrt()
            share = torch.where(norms > bound, 1 - bound / norms.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
            spread = share.repeat_interleave(min(n, rows), 0)[:rows].repeat_interleave(min(m, columns), 1)[:, :columns]
            view.parameter.mul_(view.from_2d(spread).to(view.parameter.dtype))
