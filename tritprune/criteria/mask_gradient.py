"""Criteria of a unit's mask: what the loss says of the whole unit, signs included.

Multiply the weights of a unit by a mask ``m``, one number a unit. At ``m = 1`` the gradient of the loss with respect
to it is ``dL/dm = sum_unit w g``: no mask parameter and no changed forward pass is needed to know it. Elements that
pull in opposite directions cancel, which ``snip_momentum`` (the sum of absolute values) does not see.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tritprune.criteria.base import Criterion, Finish, Form, Reduce, register_criterion
from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid, accumulate_unit_scores_


class MaskGradient(Criterion):
    """``S <- alpha S + beta finish(reduce_unit w g)`` at every optimizer step.

    Args:
        alpha: how much of the past is kept, in [0, 1].
        beta: weight of the present step, above 0.

    Raises:
        ConfigError: alpha or beta out of range.
    """

    form: ClassVar[Form | None] = "product"
    reductions: ClassVar[tuple[Reduce, ...]] = ("mean", "sum")
    every_step = True

    def __init__(self, alpha: float = 0.9, beta: float = 1.0) -> None:
        if not 0 <= alpha <= 1:
            raise ConfigError(f"{type(self).__name__}: alpha must be in [0, 1], got {alpha}")
        if not 0 < beta < float("inf"):
            raise ConfigError(f"{type(self).__name__}: beta must be above 0, got {beta}")
        self.alpha, self.beta = alpha, beta


@register_criterion("snip_momentum_block")
class SnipMomentumBlock(MaskGradient):
    """``S <- alpha S + beta |sum_unit w g|``: SNIP of the unit's mask, with momentum.

    The absolute value of the sum, where ``snip_momentum`` sums absolute values (Lee et al. 2019, arXiv:1810.02340,
    eq. 5, of a mask per block). With ``reduce=mean`` the sum is divided by the unit's size.
    """

    finish: ClassVar[Finish] = "abs"


@register_criterion("taylor")
class Taylor(MaskGradient):
    """``S <- alpha S + beta (sum_unit w g)^2`` (Molchanov et al. 2019, arXiv:1906.10771, eq. 8, averaged over steps).

    To first order the squared change of the loss when the whole unit goes.
    """

    finish: ClassVar[Finish] = "square"


@register_criterion("retrain_free")
class RetrainFree(MaskGradient):
    """``S <- S + (sum_unit w g)^2``: the diagonal of the mask's empirical Fisher information over batches.

    Kwon et al. 2022, arXiv:2204.09656, eq. 8. Nothing is forgotten (alpha = 1): what counts is the sum over calibration
    batches. Pruner ``retrain_free`` keeps the mask gradients of every batch and looks beyond the diagonal.
    """

    finish: ClassVar[Finish] = "square"

    def __init__(self) -> None:
        super().__init__(alpha=1.0, beta=1.0)

    def mask_gradients(
        self,
        skipped: Tensor,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        blocks: Sequence[tuple[int, int]],
        reduce: Reduce = "sum",
    ) -> list[Tensor]:
        """``dL/dm = sum_unit w g`` of one batch, signs included.

        Args:
            skipped: int64 ``[T]``; grows by each layer's elements with a non-finite gradient, which count as 0.
            weights: ``[R, C]`` each.
            gradients: like ``weights``.
            blocks: ``(n, m)`` each.
            reduce: ``sum``, or ``mean`` for the sum over the unit's size.

        Returns:
            fp32 ``[ceil(R / n), ceil(C / m)]`` each.
        """
        found = [
            torch.zeros(
                UnitGrid.of_blocks((weight.shape[0], weight.shape[1]), block).shape,
                dtype=torch.float32,
                device=weight.device,
            )
            for weight, block in zip(weights, blocks, strict=True)
        ]
        accumulate_unit_scores_(
            found,
            skipped,
            list(weights),
            list(gradients),
            list(blocks),
            form="product",
            reduce=reduce,
            alpha=0.0,
            beta=1.0,
            finish="none",
        )
        return found


@register_criterion("movement")
class Movement(Criterion):
    """``S <- S - reduce_unit w g``: what the updates push away from zero stays, what they push towards it goes.

    Sanh et al. 2020, arXiv:2005.07683, section 4: ``S_i = -sum_t w_i g_i``, with the gradient of the pruned model and
    without a learning rate, which changes no order. Scores have a sign; a unit that never moves scores 0.
    """

    form: ClassVar[Form | None] = "product"
    reductions: ClassVar[tuple[Reduce, ...]] = ("mean", "sum")
    every_step = True
    alpha = 1.0
    beta = -1.0
