"""Masks handed to an optimizer that can end its own step with them, so that they need no pass of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritprune.optim import MaskedOptimizer
from tritprune.pruners.group import LayerGroup


class HandOver:
    """Gives the masks in force to a masked optimizer before each step; any other optimizer is left alone.

    Args:
        groups: whose masks.
    """

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        self._groups = groups
        self._applied: dict[str, list[list[Tensor]]] = {}

    def begin(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Let the step that comes end with the masks in force; note for which groups that is all there is to do."""
        if not isinstance(optimizer, MaskedOptimizer):
            return
        masks = {group.name: group.step_masks() for group in self._groups}
        given = {weight: mask for own in masks.values() for weight, mask in own.items()}
        optimizer.use_masks(given, instead_of=self._parameters())
        stepped = {p for held in optimizer.param_groups for p in held["params"] if p.grad is not None}
        self._applied = {
            group.name: group.masks
            for group in self._groups
            if len(masks[group.name]) == len(group.views) and stepped.issuperset(masks[group.name])
        }

    def has_applied(self, group: LayerGroup) -> bool:
        """Whether the step has left nothing to do for the masks that are in force now."""
        return self._applied.get(group.name) is group.masks

    def end(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Take the masks back."""
        if isinstance(optimizer, MaskedOptimizer):
            optimizer.use_masks({}, instead_of=self._parameters())
        self._applied = {}

    def _parameters(self) -> list[Tensor]:
        return [view.parameter for group in self._groups for view in group.views]
