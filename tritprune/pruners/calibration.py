"""The mask gradients of a layer group over calibration batches, and what they say of its units."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tritprune.criteria import RetrainFree
from tritprune.errors import ConfigError
from tritprune.pruners.group import LayerGroup
from tritprune.pruners.rearrangement import fisher_loss, rearrange

LARGEST_SITE = 65_536
"""Units of a layer or attention; above it one number per unit and batch, and exchanges one by one, cost too much."""


class Calibration:
    """The mask gradients of one group.

    Args:
        group: the layers.

    Raises:
        ConfigError: the pattern has no block per unit, or more units than can be kept per batch.
    """

    def __init__(self, group: LayerGroup) -> None:
        self._group = group
        self._views = [_mask_view(group, number) for number in range(len(group.sites))]
        self._rows: list[list[Tensor]] = [[] for _ in group.sites]
        self._seen: set[str] = set()

    def mask_view(self, site: int) -> int:
        """The position of the view that a site's mask is on."""
        return self._views[site]

    def observe(self, scale: Tensor | None) -> None:
        """Keep the mask gradients of the gradients that the weights have now; a layer without one has zeros."""
        group = self._group
        views = [site.views[place] for site, place in zip(group.sites, self._views, strict=True)]
        blocks = [site.blocks[place] for site, place in zip(group.sites, self._views, strict=True)]
        present = [i for i, view in enumerate(views) if view.parameter.grad is not None]
        self._seen |= {views[i].name for i in present}
        group.without_gradient = {view.name for view in views if view.name not in self._seen}
        skipped = torch.zeros(len(present), dtype=torch.int64, device=group.device)
        criterion = group.criterion
        assert isinstance(criterion, RetrainFree)
        fresh = criterion.mask_gradients(
            skipped,
            [views[i].to_2d(views[i].parameter.detach()) for i in present],
            [group.gradient_of(views[i], scale) for i in present],
            [blocks[i] for i in present],
            group.pattern.reduce,
        ) if present else []  # fmt: skip
        group.note_skipped(skipped)
        found = dict(zip(present, fresh, strict=True))
        for i, site in enumerate(group.sites):
            row = found.get(i)
            empty = torch.zeros(site.grid.units, device=group.device)
            self._rows[i].append(empty if row is None else row.reshape(-1))

    def gradients(self, site: int) -> Tensor:
        """fp32 ``[batches, units]``."""
        return torch.stack([row.to(self._group.device) for row in self._rows[site]])

    def unit_scores(self) -> list[Tensor]:
        """``sqrt(sum_b g_b^2)``: the order of the Fisher information, in fp32 without underflow; per site."""
        return [
            self.gradients(i).double().square().sum(0).sqrt().float().reshape(site.grid.shape)
            for i, site in enumerate(self._group.sites)
        ]

    def block_scores(self) -> list[list[Tensor]]:
        """The unit scores for every view, in the shape of its blocks."""
        return [
            [unit.reshape(mask.shape) for mask in masks]
            for unit, masks in zip(self.unit_scores(), self._group.masks, strict=True)
        ]

    def diagonals(self) -> dict[str, Tensor]:
        """``sum_b g_b^2`` by the name of the layer that the mask is on; nothing before the first batch."""
        sites = self._group.sites
        return {
            site.views[place].name: self.gradients(i).double().square().sum(0).float().reshape(site.grid.shape)
            for i, (site, place) in enumerate(zip(sites, self._views, strict=True))
            if self._rows[i]
        }

    def rearranged(
        self, keep: list[Tensor], before: list[Tensor], losses: dict[str, tuple[float, float]]
    ) -> list[Tensor]:
        """Better sets of as many units in every site; ``losses`` gets what each was worth."""
        better: list[Tensor] = []
        for i, site in enumerate(self._group.sites):
            gradients, searched = self.gradients(i), keep[i].reshape(-1)
            fixed = ~before[i].reshape(-1)
            found = rearrange(searched, gradients, site.grid.sizes().reshape(-1), fixed)
            losses[site.name] = fisher_loss(searched, gradients), fisher_loss(found, gradients)
            better.append(found.reshape(site.grid.shape))
        return better

    def forget(self) -> None:
        """Free the gradients."""
        self._rows = [[] for _ in self._group.sites]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only."""
        gradients = {site.name: self.gradients(i) for i, site in enumerate(self._group.sites) if self._rows[i]}
        return {"gradients": gradients, "seen": sorted(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        kept = state["gradients"]
        self._rows = [list(kept[site.name].unbind(0)) if site.name in kept else [] for site in self._group.sites]
        self._seen = set(state["seen"])


def _mask_view(group: LayerGroup, number: int) -> int:
    site, label = group.sites[number], group.pattern.label
    place = group.pattern.mask_view(site)
    if place is None:
        raise ConfigError(
            f"pruner 'retrain_free' puts a mask on whole units, and pattern {label} has no block per unit; "
            "use channelx1, 1xchannel, another NxM or heads"
        )
    if site.grid.units > LARGEST_SITE:
        raise ConfigError(
            f"pruner 'retrain_free' keeps a number per unit and batch and exchanges units one by one: {site.name} has "
            f"{site.grid.units:,} units of pattern {label}, more than {LARGEST_SITE:,}; use channelx1 or heads"
        )
    return place
