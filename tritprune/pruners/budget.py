"""How many elements of a group go, in all and per site: target, scope, floors and caps."""

from collections.abc import Sequence

from torch import Tensor

from tritprune.patterns import Site
from tritprune.pruners.settings import GroupSettings
from tritprune.selection import Demand, at_least, check_feasible, exact_budget, largest_unit, select


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
        whole = settings.scope == "global"
        competitions = [list(sites)] if whole else [[site] for site in sites]
        self._rivals = [sum(site.elements for site in members) for members in competitions]
        target = settings.target_sparsity
        for members, elements in zip(competitions, self._rivals, strict=True):
            demands = [
                Demand(site.name, site.elements, site.grid, self._floor(site, target), self._cap(site))
                for site in members
            ]
            check_feasible(demands, exact_budget(target, elements), target)

    def select(
        self, target: float, scores: Sequence[Tensor], kept: Sequence[Tensor] | None, held: Sequence[bool]
    ) -> list[Tensor]:
        """The units that stay at a sparsity of ``target``; one search, whatever the scope.

        Args:
            target: fraction of zeros of the whole group.
            scores: fp32 of the grid's shape, per site.
            kept: bool per site, or packed: what has not gone for good; None: all.
            held: sites that may not lose more now, whatever floors say.

        Returns:
            bool per site, True = keep.
        """
        budgets = [exact_budget(target, elements) for elements in self._rivals]
        floors = [self._floor(site, target) for site in self._sites]
        caps = [self._cap(site) for site in self._sites]
        return select(
            scores,
            [site.grid for site in self._sites],
            budgets[0] if self._settings.scope == "global" else budgets,
            kept=kept,
            floors=[None if stays else floor for stays, floor in zip(held, floors, strict=True)],
            caps=[0 if stays else cap for stays, cap in zip(held, caps, strict=True)],
            check=False,
        )

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
