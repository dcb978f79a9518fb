"""Whole attention heads: rows of query, key and value, columns of the output, all together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid
from tritprune.patterns.base import Pattern, Site
from tritprune.patterns.names import plain_modules
from tritprune.patterns.views import WeightView

RECIPES: tuple[tuple[str, str, str, str], ...] = (
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa, ELECTRA
    ("attention.query", "attention.key", "attention.value", "output.dense"),  # ViT
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Qwen, Mistral
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, CLIP
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("query", "key", "value", "output"),
    ("q", "k", "v", "o"),  # T5
)
"""Names of query, key, value and output within an attention."""

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")


class HeadsPattern(Pattern):
    """A unit is one head of one attention: its rows of query, key and value and its columns of output.

    Attentions are found by the names of their four linears (:data:`RECIPES`), their number of heads by an attribute
    (:data:`HEAD_COUNTS`) of a module that holds them or of ``model.config``. The score of a head is the mean (sum,
    maximum, l2 norm) over all its elements. Biases stay; slimming folds them.
    """

    @property
    def label(self) -> str:
        """``head``."""
        return "head"

    def unit_name(self, site: Site) -> str:
        """``head``."""
        del site
        return "head"

    def sites(self, views: Sequence[WeightView], model: nn.Module) -> list[Site]:
        """One site an attention.

        Raises:
            ConfigError: no attention among the layers, one that is incomplete, of unknown number of heads, grouped, or
                whose rows the number of heads does not divide.
        """
        by_name = {view.name: view for view in views}
        sites: list[Site] = []
        for attention, parts in find_attentions(model):
            found = [by_name[part] for part in parts if part in by_name]
            if len(found) == 4:
                sites.append(_site(attention, (found[0], found[1], found[2], found[3]), model))
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
        """The score of each head: ``[1, heads]``."""
        del masks
        parts = torch.stack([score.reshape(1, -1).float() for score in scores])  # [4, 1, heads]
        if self.reduce == "max":
            return parts.amax(0)
        if self.reduce == "sum":
            return parts.sum(0)
        if self.reduce == "l2":
            return parts.square().sum(0).sqrt()
        heads = site.grid.cols
        total = sum(part * (view.elements // heads) for part, view in zip(parts, site.views, strict=True))
        assert isinstance(total, Tensor)
        return total / (site.elements // heads)

    def layer_masks(self, site: Site, keep: Tensor, scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
        """``[heads, 1]`` for query, key and value, ``[1, heads]`` for output."""
        rows = keep.reshape(-1, 1)
        return [rows, rows.clone(), rows.clone(), keep]

    def mask_view(self, site: Site) -> int:
        """The output's: its columns read what a head gives, as a mask on the head does (arXiv:2204.09656)."""
        return len(site.views) - 1

    def broken_units(self, site: Site, masks: Sequence[Tensor]) -> Tensor:
        """Heads of which a part is pruned and a part is not."""
        del site
        parts = torch.stack([mask.reshape(-1) for mask in masks])  # [4, heads]
        return (parts.any(0) & ~parts.all(0)).sum()

    def kept_units(self, site: Site, masks: Sequence[Tensor]) -> Tensor:
        """``[1, heads]``."""
        return masks[-1]


def find_attentions(model: nn.Module) -> list[tuple[str, tuple[str, str, str, str]]]:
    """Every attention of a model: its dotted name and those of its query, key, value and output linears."""
    names = [name for name, _ in plain_modules(model)]
    known = set(names)
    found: list[tuple[str, tuple[str, str, str, str]]] = []
    for name in names:
        for recipe in RECIPES:
            if name == recipe[0] or name.endswith("." + recipe[0]):
                prefix = name[: len(name) - len(recipe[0])]
                query, key, value, output = (prefix + part for part in recipe)
                if {key, value, output} <= known:
                    found.append((prefix.rstrip(".") or "attention", (query, key, value, output)))
                    break
    return found


def head_count(model: nn.Module, query: str) -> int | None:
    """The number of heads: from the nearest module that holds ``query`` and says it, else from ``model.config``."""
    parts = query.split(".")
    modules = dict(plain_modules(model, remove_duplicate=False))
    holders: list[object] = [modules[".".join(parts[:end])] for end in range(len(parts) - 1, -1, -1)]
    for holder in (*holders, getattr(modules[""], "config", None)):
        for attribute in HEAD_COUNTS:
            value = getattr(holder, attribute, None)
            if type(value) is int and value > 0:
                return value
    return None


def _site(attention: str, views: tuple[WeightView, WeightView, WeightView, WeightView], model: nn.Module) -> Site:
    query, key, value, output = views
    heads = head_count(model, query.name)
    if heads is None:
        raise ConfigError(
            f"'{attention}' does not say how many heads it has: no {', '.join(HEAD_COUNTS)} on it or on model.config"
        )
    for view, what, length in (
        (query, "rows", query.shape[0]),
        (value, "rows", value.shape[0]),
        (output, "columns", output.shape[1]),
    ):
        if length % heads:
            raise ConfigError(f"{view.name} has {length} {what}, which {heads} heads do not divide")
    if key.shape[0] != query.shape[0] or value.shape[0] != output.shape[1]:
        raise ConfigError(
            f"'{attention}' shares keys or values between heads: query has {query.shape[0]} rows, key {key.shape[0]}, "
            f"value {value.shape[0]}, output {output.shape[1]} columns; pattern heads needs one key and value per head"
        )
    rows = tuple((view.shape[0] // heads, view.shape[1]) for view in (query, key, value))
    size = sum(view.elements for view in views) // heads
    grid = UnitGrid(1, heads, size, size, 1, 1)
    return Site(attention, views, (*rows, (output.shape[0], output.shape[1] // heads)), grid)
