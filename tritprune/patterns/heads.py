"""Whole attention heads: rows of query, key and value, columns of the output, all together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid
from tritprune.patterns.attentions import RECIPES, find_attentions, heads_apart, heads_fused
from tritprune.patterns.base import Pattern, Site
from tritprune.patterns.views import WeightView


class HeadsPattern(Pattern):
    """A unit is one head of one attention: its rows of query, key and value and its columns of output.

    Where query heads share a key/value head (grouped-query and multi-query attention) a unit is the key/value head with
    all query heads that read it. Attentions are found by the names of their linears, their number of heads by an
    attribute of a module around them or of its config, and the order of rows in a fused query_key_value by the config's
    ``model_type`` (:mod:`tritprune.patterns.attentions`). The score of a head is the mean (sum, maximum, l2 norm) over
    all its elements. Biases stay; slimming folds them.
    """

    @property
    def label(self) -> str:
        """``head``."""
        return "head"

    def unit_name(self, site: Site) -> str:
        """``head``, or ``head group of 4``: a key/value head and its four query heads."""
        return "head" if site.group == 1 else f"head group of {site.group}"

    def sites(self, views: Sequence[WeightView], model: nn.Module) -> list[Site]:
        """One site an attention.

        Raises:
            ConfigError: no attention among the layers, one that is incomplete, or one whose heads are not known or do
                not fit its shapes.
        """
        by_name = {view.name: view for view in views}
        sites: list[Site] = []
        for attention, parts in find_attentions(model):
            found = [by_name[part] for part in parts if part in by_name]
            if len(found) == len(parts):
                sites.append(_site(attention, found, model))
            elif found:
                missing = ", ".join(part for part in parts if part not in by_name)
                raise ConfigError(
                    f"a head of '{attention}' needs its query, key, value and output linears in the same group; "
                    f"not among its prunable layers: {missing}"
                )
        if not sites:
            known = "; ".join(", ".join(recipe) for recipe in RECIPES)
            raise ConfigError(f"pattern heads found no attention among {len(views)} layers; known names: {known}")
        return sites

    def unit_scores(self, site: Site, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        """The score of each head: ``[1, heads]``. Added one by one, so that every device gives the same bits."""
        del masks
        total: Tensor | None = None
        for view, score in zip(range(len(site.views)), scores, strict=True):
            n, m = site.blocks[view]
            for part in _by_unit(site, view, score.float()).unbind(1):  # [heads]
                if self.reduce == "max":
                    total = part if total is None else torch.maximum(total, part)
                    continue
                part = {"sum": part, "l2": part.square(), "mean": part * (n * m)}[self.reduce]
                total = part if total is None else total + part
        assert total is not None
        if self.reduce == "mean":
            total = total / (site.elements // site.grid.cols)
        return (total.sqrt() if self.reduce == "l2" else total).reshape(site.grid.shape)

    def layer_masks(self, site: Site, keep: Tensor, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """Rows of query, key and value as blocks ``[rows, 1]``, columns of the output as ``[1, heads]``."""
        units = keep.reshape(-1)
        spread = [
            units.clone() if of is None else units[torch.tensor(of, device=keep.device)] for of in site.unit_of_block
        ]
        return [*(rows.reshape(-1, 1) for rows in spread[:-1]), keep]

    def mask_view(self, site: Site) -> int:
        """The output's: its columns read what a head gives, as a mask on the head does (arXiv:2204.09656)."""
        return len(site.views) - 1

    def alive_units(self, site: Site, alive: Sequence[Tensor]) -> Tensor:
        """Heads of which any part is."""
        parts = [_by_unit(site, view, part).any(1) for view, part in enumerate(alive)]
        return torch.stack(parts).any(0).reshape(site.grid.shape)

    def broken_units(self, site: Site, masks: Sequence[Tensor]) -> Tensor:
        """Heads of which a part is pruned and a part is not."""
        parts = torch.cat([_by_unit(site, view, mask) for view, mask in enumerate(masks)], 1)  # [heads, parts]
        return (parts.any(1) & ~parts.all(1)).sum()

    def kept_units(self, site: Site, masks: Sequence[Tensor]) -> Tensor:
        """``[1, heads]``."""
        return masks[-1]


def _by_unit(site: Site, view: int, blocks: Tensor) -> Tensor:
    """The blocks of a view by the head that they belong to: ``[rows, cols] -> [heads, blocks per head]``."""
    flat, of = blocks.reshape(-1), site.unit_of_block[view]
    if of is None:
        return flat.reshape(-1, 1)
    return flat[torch.tensor(of, device=flat.device).argsort(stable=True)].reshape(site.grid.cols, -1)


def _site(attention: str, views: Sequence[WeightView], model: nn.Module) -> Site:
    output = views[-1]
    of: tuple[int, ...] | None = None
    if len(views) == 2:
        fused = views[0]
        heads, layout = heads_fused(attention, fused, output, model)
        rows = [(heads.group + 2) * heads.width]
        if (
            layout == "sections"
        ):  # blocks of one head's rows: those of the queries, then of the keys, then of the values
            rows = [heads.width]
            of = (*(query // heads.group for query in range(heads.queries)), *2 * tuple(range(heads.keys)))
    else:
        heads = heads_apart(attention, (views[0], views[1], views[2], output), model)
        rows = [heads.group * heads.width, heads.width, heads.value_width]
    blocks = [(n, view.shape[1]) for n, view in zip(rows, views, strict=False)]
    size = sum(view.elements for view in views) // heads.keys
    return Site(
        attention,
        tuple(views),
        (*blocks, (output.shape[0], heads.group * heads.value_width)),
        UnitGrid(1, heads.keys, size, size, 1, 1),
        unit_of_block=(of, *[None] * (len(views) - 1)),
        group=heads.group,
    )
