"""Sparse fine-tuning: the zeros that a model has stay, whatever training does."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid
from tritprune.patterns import NInMPattern, Pattern, WeightView
from tritprune.pruners.base import Pruner, register_pruner
from tritprune.pruners.group import LayerGroup


@register_pruner("pattern_lock")
class PatternLockPruner(Pruner):
    """Keeps at zero what is zero when the pruner is made; masks never change and nothing is scored.

    With pattern ``1x1`` every zero stays. With blocks (``4x1``, ``channelx1``) units that are wholly zero stay so; with
    ``N:M`` the zeros of every group that has at least N of them. A model of exactly that pattern is locked exactly, and
    locking it again changes nothing. Zeros outside the pattern are free; :attr:`free_zeros` counts them.

    Args:
        model: with zeros, for example from ``tritprune.load("outputs/.../pruned")``.
        pattern: which zeros count.
        include: as for :class:`Pruner`.
        exclude: as for :class:`Pruner`.
        exclude_head: as for :class:`Pruner`.
        reset_state: as for :class:`Pruner`.
        guard: as for :class:`Pruner`.
        groups: as for :class:`Pruner`, of these settings.
        seed: not used; taken so that every pruner can be built alike.

    Raises:
        ConfigError: nothing of the layers is zero in that pattern, or anything that :class:`Pruner` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pattern: str | Mapping[str, Any] | Pattern = "1x1",
        include: Sequence[str] = ("**",),
        exclude: Sequence[str] = (),
        exclude_head: bool = True,
        reset_state: bool = False,
        guard: str = "off",
        groups: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            criterion="magnitude",
            schedule="one_shot",
            target_sparsity=0.0,
            end_step=0,
            pattern=pattern,
            include=include,
            exclude=exclude,
            exclude_head=exclude_head,
            reset_state=reset_state,
            guard=guard,
            groups=groups,
            seed=seed,
        )
        zeros = 0
        for group in self._groups:
            group.load_masks({view.name: mask for view, mask in _locked(group)})
            self._counts |= group.count()
            zeros += sum(int((view.parameter == 0).sum()) for view in group.views)
        locked = sum(count.zeros for count in self._counts.values())
        self.free_zeros = zeros - locked
        """Zeros that the pattern does not hold: training may change them."""
        if not locked:
            labels = ", ".join(dict.fromkeys(group.pattern.label for group in self._groups))
            raise ConfigError(
                f"there is nothing to lock: of {sum(layer.elements for layer in self.layers):,} weights {zeros:,} are "
                f"zero, and none of them fills a unit of pattern {labels}"
                + ("; pattern 1x1 locks single zeros" if zeros else "; load a pruned model first")
            )

    def target_at(self, step: int) -> float:
        """The locked sparsity, at every step."""
        del step
        return sum(count.zeros for count in self._counts.values()) / sum(layer.elements for layer in self.layers)


def _locked(group: LayerGroup) -> list[tuple[WeightView, Tensor]]:
    """Every view's mask of what is zero now."""
    masks: list[tuple[WeightView, Tensor]] = []
    for site in group.sites:
        present = [view.to_2d(view.parameter.detach()) != 0 for view in site.views]
        if isinstance(group.pattern, NInMPattern):
            masks.append((site.views[0], _in_full_groups(present[0], group.pattern)))
            continue
        alive = [_any_of(own, block) for own, block in zip(present, site.blocks, strict=True)]
        keep = group.pattern.alive_units(site, alive)  # a head goes only with all its parts
        blocks = [part.float() for part in alive]
        masks += zip(site.views, group.pattern.layer_masks(site, keep, blocks, alive), strict=True)
    return masks


def _any_of(present: Tensor, block: tuple[int, int]) -> Tensor:
    """Blocks with anything in them: bool ``[R, C] -> [rows, cols]``."""
    grid = UnitGrid.of_blocks((present.shape[0], present.shape[1]), block)
    alive = torch.zeros(grid.shape, dtype=torch.bool, device=present.device)
    rows, columns = present.nonzero(as_tuple=True)
    alive[rows // block[0], columns // block[1]] = True
    return alive


def _in_full_groups(present: Tensor, pattern: NInMPattern) -> Tensor:
    """The elements to keep: all that are not zero, and the zeros of groups that have fewer than the pattern asks."""
    mask = present.clone()
    for start in range(0, present.shape[1], pattern.m):
        group = present[:, start : start + pattern.m]
        quota = group.shape[1] * pattern.n // pattern.m
        short = (~group).sum(1) < max(1, quota)
        mask[short, start : start + pattern.m] = True
    return mask
