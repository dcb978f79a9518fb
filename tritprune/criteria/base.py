"""The criterion: weight, gradient and state -> score. High score = keep.

A criterion of your own overrides :meth:`Criterion.element_scores`, and that is all:

    @register_criterion("cautious")
    class Cautious(Criterion):
        def element_scores(self, weight, gradient):
            return weight.abs() * (1 + gradient.abs())
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid, accumulate_unit_scores_
from tritprune.registry import Registry

Form = Literal["magnitude", "gradient", "snip", "product"]
Reduce = Literal["mean", "sum", "max", "l2"]
Finish = Literal["none", "abs", "square"]
C = TypeVar("C", bound="type[Criterion]")


class Criterion:
    """Scores of units: ``S <- alpha * S + beta * finish(reduce_unit(element score))``, computed in fp32.

    Attributes:
        form: the kernel's formula for the element score; None: :meth:`element_scores` computes it.
        finish: what becomes of the number of a unit: nothing, its absolute value or its square.
        reductions: the values of ``reduce`` that mean something; a signed sum has no maximum.
        needs_gradient: whether the element score uses the gradient.
        every_step: whether ``S`` is updated at every optimizer step until the last prune step, or only when a mask
            update is due.
        alpha: share of the old ``S`` that stays; 0: ``S`` has no memory.
        beta: weight of the new score.
    """

    form: ClassVar[Form | None] = None
    finish: ClassVar[Finish] = "none"
    reductions: ClassVar[tuple[Reduce, ...]] = ("mean", "sum", "max", "l2")
    needs_gradient: bool = True
    every_step: bool = False
    alpha: float = 0.0
    beta: float = 1.0

    def element_scores(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """The score of every weight of a layer.

        Args:
            weight: fp32 ``[R, C]``, the weight view of the forward pass, before the optimizer's update.
            gradient: fp32 ``[R, C]``, non-finite elements set to 0 (their score is too); None without
                ``needs_gradient``.

        Returns:
            ``[R, C]``, high = keep.

        Raises:
            ConfigError: the criterion defines neither this nor ``form``.
        """
        raise ConfigError(f"criterion {type(self).__name__} must override element_scores(weight, gradient)")

    def initial_scores(self, layer: str, grid: UnitGrid, device: torch.device, seed: int) -> Tensor:
        """``S`` before the first update: fp32 ``[rows, cols]``.

        Args:
            layer: the layer's dotted name.
            grid: its units.
            device: where the weight is.
            seed: the pruner's, for criteria that draw random numbers.
        """
        del layer, seed
        return torch.zeros(grid.shape, dtype=torch.float32, device=device)

    def accumulate_(
        self,
        scores: Sequence[Tensor],
        skipped: Tensor,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor] | None,
        blocks: Sequence[tuple[int, int]],
        reduce: Reduce,
    ) -> None:
        """Fold the present weights and gradients of many layers into their scores, in place, without a host read.

        Args:
            scores: fp32 or bf16 ``[rows, cols]`` each, the ``S`` of the layers.
            skipped: int64 ``[T]``; grows by each layer's elements with a non-finite gradient.
            weights: ``[R, C]`` each.
            gradients: like ``weights``; None without ``needs_gradient``.
            blocks: ``(n, m)`` each, the unit of the score.
            reduce: elements of a unit -> one number.
        """
        if self.form is not None:
            accumulate_unit_scores_(
                list(scores),
                skipped,
                list(weights),
                None if gradients is None else list(gradients),
                list(blocks),
                form=self.form,
                reduce=reduce,
                alpha=self.alpha,
                beta=self.beta,
                finish=self.finish,
            )
            return
        for layer, (score, weight, block) in enumerate(zip(scores, weights, blocks, strict=True)):
            gradient = None if gradients is None else gradients[layer].float()
            finite = None if gradient is None else torch.isfinite(gradient)
            if gradient is not None and finite is not None:
                gradient = gradient.masked_fill(~finite, 0.0)
                skipped[layer] += (~finite).sum()
            fresh = self.element_scores(weight.float(), gradient)
            if fresh.shape != weight.shape:
                raise ConfigError(
                    f"criterion {type(self).__name__} gave scores of shape {list(fresh.shape)} "
                    f"for a weight view of shape {list(weight.shape)}"
                )
            if finite is not None:
                fresh = fresh.masked_fill(~finite, 0.0)
            units = reduce_units(fresh.float(), block, reduce)
            units = {"none": units, "abs": units.abs(), "square": units.square()}[self.finish].mul_(self.beta)
            score.copy_(units if self.alpha == 0 else score.float().mul(self.alpha).add_(units))

    def state_dict(self) -> dict[str, Any]:
        """State beside ``S`` that a resumed run needs: tensors and plain Python only."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        del state


def reduce_units(values: Tensor, block: tuple[int, int], reduce: Reduce) -> Tensor:
    """One number per unit from one per element; signs stay. Ragged edge units count their true elements.

    Args:
        values: fp32 ``[R, C]``.
        block: ``(n, m)``.
        reduce: ``mean``, ``sum``, ``max`` or ``l2`` (the root of the sum of squares) over a unit's elements.

    Returns:
        fp32 ``[ceil(R / n), ceil(C / m)]``.
    """
    grid = UnitGrid.of_blocks((values.shape[0], values.shape[1]), block)
    n, m = min(block[0], values.shape[0]), min(block[1], values.shape[1])
    missing = (0, grid.cols * m - values.shape[1], 0, grid.rows * n - values.shape[0])
    padded = torch.nn.functional.pad(values, missing, value=float("-inf") if reduce == "max" else 0.0)
    blocked = padded.reshape(grid.rows, n, grid.cols, m)
    if reduce == "max":
        return blocked.amax((1, 3))
    if reduce == "l2":
        return blocked.square().sum((1, 3)).sqrt()
    total = blocked.sum((1, 3))
    return total / grid.sizes(values.device) if reduce == "mean" else total


criteria: Registry[Criterion] = Registry("criterion")
"""Criteria by name."""


def register_criterion(name: str) -> Callable[[C], C]:
    """Class decorator: files a criterion under ``name``.

    Raises:
        ConfigError: the name is taken.
    """
    return criteria.register(name)


def get_criterion(config: str | Mapping[str, Any] | Criterion, modules: object = None) -> Criterion:
    """The criterion that ``config`` names: ``"snip"``, ``{"name": "snip_momentum", "alpha": 0.95}``, or one as it is.

    Args:
        config: a name, a mapping with ``name`` and arguments, or a criterion.
        modules: taken for callers that pass them, and not needed: a criterion is given weights when it is called, and
            the scores by layer name are :attr:`tritprune.Pruner.scores`.

    Raises:
        UnknownNameError: unknown name; the message lists the known ones.
        ConfigError: unknown argument, or one out of range.
    """
    del modules
    return config if isinstance(config, Criterion) else criteria.build(config)
