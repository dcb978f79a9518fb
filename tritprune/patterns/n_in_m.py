"""N of every M consecutive inputs are pruned."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid, n_in_m_group_scores, n_in_m_masks
from tritprune.kernels.checks import LARGEST_GROUP
from tritprune.patterns.base import Block, Pattern, Reduce, Site, count
from tritprune.patterns.views import WeightView


class NInMPattern(Pattern):
    """``N:M``: of every M consecutive inputs, N are **pruned** (1:4 prunes one of four).

    The unit is the group of M inputs of one output: it is dense, or exactly N of it are pruned. A schedule below n/m
    prunes a growing set of groups. The group's score is what pruning it costs, the N lowest scores of it; among equal
    scores the lower index stays. A shorter last group of length L prunes ``floor(L N / M)``.

    Args:
        n: how many of a group are pruned.
        m: inputs per group.

    Raises:
        ConfigError: not ``0 < N < M <= 32``.
    """

    reductions: ClassVar[tuple[Reduce, ...]] = ("mean", "sum")

    def __init__(self, n: int = 2, m: int = 4) -> None:
        config = f"{n}:{m}"
        if not (type(n) is int and type(m) is int and 0 < n < m):
            raise ConfigError(f"N:M needs 0 < N < M, got {config} (N of every M consecutive inputs are pruned)")
        if m > LARGEST_GROUP:
            raise ConfigError(f"N:M needs M of at most {LARGEST_GROUP}, got {config}")
        self.n, self.m = count("n", n, config), count("m", m, config)

    @property
    def N(self) -> int:  # noqa: N802 (as Neural Compressor calls it)
        """How many of a group are pruned."""
        return self.n

    @property
    def M(self) -> int:  # noqa: N802
        """Inputs per group."""
        return self.m

    @property
    def label(self) -> str:
        """``2:4``."""
        return f"{self.n}:{self.m}"

    def unit_name(self, site: Site) -> str:
        """``group of 4``."""
        del site
        return f"group of {self.m}"

    @property
    def max_sparsity(self) -> float:
        """``n / m``."""
        return self.n / self.m

    def sites(self, views: Sequence[WeightView], model: nn.Module) -> list[Site]:
        """One site a layer; its units are groups, as large as what is pruned of them. None for a layer without any."""
        del model
        sites = [Site(view.name, (view,), ((1, 1),), self._grid(view.shape)) for view in views]
        return [site for site in sites if site.grid.units]

    def unit_scores(self, site: Site, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """What pruning each group costs: ``[R, groups]``."""
        return self.all_unit_scores([site], [scores], [masks])[0]

    def layer_masks(self, site: Site, keep: Tensor, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Groups that have gone keep their mask; those that go now lose their N lowest: bool ``[R, C]``."""
        return self.all_layer_masks([site], [keep], [scores], [masks])[0]

    def all_unit_scores(
        self, sites: Sequence[Site], scores: Sequence[Sequence[Tensor]], masks: Sequence[Sequence[Tensor]]
    ) -> list[Tensor]:
        """As :meth:`unit_scores`, in one launch."""
        del masks
        costs = n_in_m_group_scores([score.float() for (score,) in scores], self.n, self.m)
        costs = [cost[:, : site.grid.cols] for cost, site in zip(costs, sites, strict=True)]
        if self.reduce == "sum":
            return costs
        return [cost / site.grid.col_widths(cost.device) for cost, site in zip(costs, sites, strict=True)]

    def all_layer_masks(
        self,
        sites: Sequence[Site],
        keep: Sequence[Tensor],
        scores: Sequence[Sequence[Tensor]],
        masks: Sequence[Sequence[Tensor]],
    ) -> list[list[Tensor]]:
        """As :meth:`layer_masks`, in one launch."""
        fresh = n_in_m_masks([score.float() for (score,) in scores], self.n, self.m)
        new: list[list[Tensor]] = []
        for site, kept, lowest_gone, old in zip(sites, keep, fresh, masks, strict=True):
            stays = self._spread(kept, site)
            went = ~self._spread(self.kept_units(site, old), site)
            new.append([torch.where(went & ~stays, old[0], stays | lowest_gone)])
        return new

    def lasso_blocks(self, site: Site) -> tuple[Block, ...]:
        """The group of M inputs of one output."""
        del site
        return ((1, self.m),)

    def broken_units(self, site: Site, masks: Sequence[Tensor]) -> Tensor:
        """Groups of which something else than nothing or exactly N is pruned."""
        gone = nn.functional.pad(~masks[0], (0, -masks[0].shape[1] % self.m))
        per_group = gone.reshape(gone.shape[0], -1, self.m).sum(2)  # [R, groups]
        quota = torch.full_like(per_group, self.n)
        tail = masks[0].shape[1] % self.m
        if tail:
            quota[:, -1] = tail * self.n // self.m
        del site
        return ((per_group != 0) & (per_group != quota)).sum()

    def kept_units(self, site: Site, masks: Sequence[Tensor]) -> Tensor:
        """Groups of which nothing is pruned: bool ``[R, groups]``."""
        mask = masks[0]
        columns = min(site.grid.cols * self.m, mask.shape[1])
        short = site.grid.cols * self.m - columns
        mask = nn.functional.pad(mask[:, :columns], (0, short), value=True)
        return mask.reshape(mask.shape[0], site.grid.cols, self.m).all(2)

    def _grid(self, shape: tuple[int, int]) -> UnitGrid:
        rows, columns = shape
        groups, tail = divmod(columns, self.m)
        tail_size = tail * self.n // self.m
        if tail_size:
            return UnitGrid(rows, groups + 1, 1, 1, self.n, tail_size)
        return UnitGrid(rows, groups, 1, 1, self.n, self.n)

    def _spread(self, units: Tensor, site: Site) -> Tensor:
        """A value per group as one per element; a last group too short to lose anything is True: ``[R, C]``."""
        columns = site.views[0].shape[1]
        spread = units.repeat_interleave(self.m, 1)[:, :columns]
        return nn.functional.pad(spread, (0, columns - spread.shape[1]), value=True)
