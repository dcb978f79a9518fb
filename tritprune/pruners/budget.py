"""How many elements of a group go, in all and per site: target, scope, floors and caps."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tritprune.patterns import Site
from tritprune.pruners.settings import GroupSettings
from tritprune.selection import Demand, at_least, check_feasible, exact_budget, largest_unit, select


class Rivals(NamedTuple):
    """Sites (by position) that compete for one budget."""

    members: tuple[int, ...]
    elements: int


class GroupBudget:
    """The budget of one layer group.

    Args:
        settings: target, scope, floor and cap.
        sites: where units compete.

    Raises:
        BudgetError: floors or caps that contradict the target.
    """

    def __init__(self, settings: GroupSettings, sites: Sequence[Site]) -> None:
        self._settings, self._sites = settings, sites
        everyone = tuple(range(len(sites)))
        self._competitions = [
            Rivals(members, sum(sites[i].elements for i in members))
            for members in ([everyone] if settings.scope == "global" else [(i,) for i in everyone])
        ]
        target = settings.target_sparsity
        for members, elements in self._competitions:
            demands = [
                Demand(
                    sites[i].name, sites[i].elements, sites[i].grid, self._floor(sites[i], target), self._cap(sites[i])
                )
                for i in members
            ]
            check_feasible(demands, exact_budget(target, elements), target)

    def select(
        self, target: float, scores: Sequence[Tensor], pruned: Sequence[Tensor] | None, held: Sequence[bool]
    ) -> list[Tensor]:
        """The units that stay at a sparsity of ``target``.

        Args:
            target: fraction of zeros of the whole group.
            scores: fp32 of the grid's shape, per site.
            pruned: bool per site, what has gone for good; None: nothing.
            held: sites that may not lose more now, whatever floors say.

        Returns:
            bool per site, True = keep.
        """
        keep: dict[int, Tensor] = {}
        for members, elements in self._competitions:
            chosen = select(
                [scores[i] for i in members],
                [self._sites[i].grid for i in members],
                exact_budget(target, elements),
                pruned=None if pruned is None else [pruned[i] for i in members],
                floors=[None if held[i] else self._floor(self._sites[i], target) for i in members],
                caps=[0 if held[i] else self._cap(self._sites[i]) for i in members],
                check=False,
            )
            keep.update(zip(members, chosen, strict=True))
        return [keep[i] for i in range(len(self._sites))]

    def _floor(self, site: Site, target: float) -> int | None:
        """The floor in elements. Until the target is reached it grows with it, rounded down to whole units."""
        share, final = self._settings.min_layer_sparsity, self._settings.target_sparsity
        if not share:
            return None
        if target >= final:
            return at_least(share, site.elements)
        growing = exact_budget(share * target / final, site.elements)
        return max(0, growing - (largest_unit(site.grid) - 1)) or None

    def _cap(self, site: Site) -> int | None:
        share = self._settings.max_layer_sparsity
        return None if share >= 1 else exact_budget(share, site.elements)
