"""SNIP, of one batch and with momentum."""

from typing import ClassVar

from tritprune.criteria.base import Criterion, Form, register_criterion
from tritprune.errors import ConfigError


@register_criterion("snip")
class Snip(Criterion):
    """``|w g|``, to first order the change of the loss when the weight goes (Lee et al. 2019, arXiv:1810.02340, eq. 5).

    ``g`` is the gradient of the prune step's batch; the paper's normalisation by the sum changes no order.
    """

    form: ClassVar[Form | None] = "snip"


@register_criterion("snip_momentum")
class SnipMomentum(Criterion):
    """``S <- alpha S + beta |w g|`` at every optimizer step, kept per unit of a block pattern.

    Args:
        alpha: how much of the past is kept, in [0, 1).
        beta: weight of the present step, above 0.

    Raises:
        ConfigError: alpha or beta out of range.
    """

    form: ClassVar[Form | None] = "snip"
    every_step = True

    def __init__(self, alpha: float = 0.9, beta: float = 1.0) -> None:
        if not 0 <= alpha < 1:
            raise ConfigError(f"snip_momentum: alpha must be in [0, 1), got {alpha}")
        if not 0 < beta < float("inf"):
            raise ConfigError(f"snip_momentum: beta must be above 0, got {beta}")
        self.alpha, self.beta = alpha, beta
