"""The pattern: which weights stay or go together.

Scores are kept in blocks of each weight view. A pattern says where units compete (:class:`Site`), makes the score of a
unit from the scores of blocks, and the masks of layers from the units that stay. Equal scores: the lower index stays.

A pattern of your own that keeps or prunes blocks overrides :meth:`Pattern.block` alone:

    @register_pattern("half_row")
    class HalfRow(Pattern):
        def block(self, view):
            return 1, max(1, view.shape[1] // 2)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid
from tritprune.patterns.views import WeightView
from tritprune.registry import did_you_mean

Reduce = Literal["mean", "sum", "max", "l2"]
Block = tuple[int, int]

REDUCTIONS: tuple[Reduce, ...] = ("mean", "sum", "max", "l2")


@dataclass(frozen=True, eq=False)
class Site:
    """Where units compete: a layer, or for heads the four linears of one attention.

    Args:
        name: of the layer, or of the attention.
        views: the weight views whose elements the units are made of.
        blocks: ``(n, m)`` of each view: the block of its scores and of its mask.
        grid: the selectable units; the size of a unit is the number of elements that go with it.
        unit_of_block: per view, the row-major unit that each of its row-major blocks belongs to; None: block i is of
            unit i.
        group: for heads, how many query heads are in a unit.
    """

    name: str
    views: tuple[WeightView, ...]
    blocks: tuple[Block, ...]
    grid: UnitGrid
    unit_of_block: tuple[tuple[int, ...] | None, ...] = (None,)
    group: int = 1

    @property
    def elements(self) -> int:
        """Elements of all views: the denominator of sparsity."""
        return sum(view.elements for view in self.views)


class Pattern:
    """Cuts weight views into units.

    Attributes:
        reduce: how the scores of elements become the score of a unit: mean (comparable across sizes), sum, max or
            l2 (the root of the sum of squares).
        reductions: the values of ``reduce`` that the pattern can honour.
    """

    reduce: Reduce = "mean"
    reductions: ClassVar[tuple[Reduce, ...]] = REDUCTIONS

    @property
    def label(self) -> str:
        """What a unit is called in reports: ``4x1``, ``2:4``, ``head``."""
        return type(self).__name__

    @property
    def max_sparsity(self) -> float:
        """The most that the pattern can prune, as a fraction of zeros."""
        return 1.0

    def unit_name(self, site: Site) -> str:
        """What one unit of a site is, in a word for reports: ``4x1``."""
        (rows, columns), (n, m) = site.views[0].shape, site.blocks[0]
        return f"{min(n, rows)}x{min(m, columns)}"

    def block(self, view: WeightView) -> Block:
        """``(n, m)`` of a view's units; more than the view has means all of it.

        Raises:
            ConfigError: the pattern defines neither this nor :meth:`sites`.
        """
        raise ConfigError(f"pattern {type(self).__name__} must override block(view) for {view.name}")

    def sites(self, views: Sequence[WeightView], model: nn.Module) -> list[Site]:
        """Where units compete; a view that is in no site is not pruned.

        Args:
            views: the layers of a group, in registration order.
            model: for patterns that need to know how layers belong together.

        Raises:
            ConfigError: the layers cannot be cut this way; the message has names and numbers.
        """
        del model
        blocks = [(view, self.block(view)) for view in views]
        return [Site(view.name, (view,), (block,), UnitGrid.of_blocks(view.shape, block)) for view, block in blocks]

    def unit_scores(self, site: Site, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """The score of every unit.

        Args:
            site: where.
            scores: fp32, one per view, in the grid of that view's blocks.
            masks: bool, like ``scores``: what has gone already.

        Returns:
            fp32 of the grid's shape.
        """
        del site, masks
        return scores[0]

    def layer_masks(self, site: Site, keep: Tensor, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """The mask of every view from the units that stay.

        Args:
            site: where.
            keep: bool of the grid's shape, True = keep.
            scores: as for :meth:`unit_scores`.
            masks: as for :meth:`unit_scores`.

        Returns:
            bool, one per view, in the grid of that view's blocks.
        """
        del site, scores, masks
        return [keep]

    def all_unit_scores(
        self, sites: Sequence[Site], scores: Sequence[Sequence[Tensor]], masks: Sequence[Sequence[Tensor]]
    ) -> list[Tensor]:
        """:meth:`unit_scores` of many sites; a pattern with a kernel for many layers overrides it."""
        return [self.unit_scores(*each) for each in zip(sites, scores, masks, strict=True)]

    def all_layer_masks(
        self,
        sites: Sequence[Site],
        keep: Sequence[Tensor],
        scores: Sequence[Sequence[Tensor]],
        masks: Sequence[Sequence[Tensor]],
    ) -> list[list[Tensor]]:
        """:meth:`layer_masks` of many sites; a pattern with a kernel for many layers overrides it."""
        return [self.layer_masks(*each) for each in zip(sites, keep, scores, masks, strict=True)]

    def mask_view(self, site: Site) -> int | None:
        """The view whose blocks are the units, so that ``sum_block w g`` is the gradient of a unit's mask.

        Returns:
            Its position in ``site.views``; None where no view has a block per unit (N:M).
        """
        (view, *others), (block, *_) = site.views, site.blocks
        return 0 if not others and UnitGrid.of_blocks(view.shape, block) == site.grid else None

    def alive_units(self, site: Site, alive: Sequence[Tensor]) -> Tensor:
        """Units with anything in them: bool of the grid's shape.

        Args:
            site: where.
            alive: bool, one per view, in the grid of that view's blocks: blocks with anything in them.
        """
        del site
        return alive[0]

    def lasso_blocks(self, site: Site) -> tuple[Block, ...]:
        """``(n, m)`` per view of what a group lasso shrinks together: the blocks, unless a unit is larger."""
        return site.blocks

    def broken_units(self, site: Site, masks: Sequence[Tensor]) -> Tensor:
        """How many units are neither whole nor pruned as the pattern says: int64 ``[]``; blocks cannot be."""
        del site
        return torch.zeros((), dtype=torch.int64, device=masks[0].device)

    def kept_units(self, site: Site, masks: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`layer_masks`: bool of the grid's shape."""
        del site
        return masks[0]


def set_reduction(pattern: Pattern, reduce: str) -> None:
    """Choose how a pattern reduces scores.

    Raises:
        ConfigError: unknown, or the pattern cannot honour it.
    """
    if reduce not in pattern.reductions:
        known = did_you_mean(str(reduce), pattern.reductions)
        raise ConfigError(f"pattern {pattern.label} cannot reduce scores by '{reduce}'; {known}")
    pattern.reduce = reduce


def count(what: str, value: object, config: object) -> int:
    """A number of rows, columns or inputs.

    Raises:
        ConfigError: not a whole number of at least 1.
    """
    if type(value) is not int or value < 1:
        raise ConfigError(f"{what} must be a whole number of at least 1, got {value!r} in {config}")
    return value


Config = str | Mapping[str, Any] | Pattern
