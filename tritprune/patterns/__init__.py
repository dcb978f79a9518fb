"""Patterns: which weights stay or go together. ``base.py`` says how to add one.

| config | shorthand | unit |
|---|---|---|
| ``{"name": "block", "n": 4, "m": 1}`` | ``4x1``, ``1x1``, ``32x32`` | N outputs by M inputs |
| ``{"name": "block", "n": "channel", "m": 1}`` | ``channelx1``, ``1xchannel``, ``channelx2`` | whole columns or rows |
| ``{"name": "n_in_m", "n": 2, "m": 4}`` | ``2:4``, ``1:4``, ``4:8`` | N of every M consecutive inputs are **pruned** |
| ``{"name": "heads"}`` | ``heads`` | attention heads: rows of query, key, value and columns of output |
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tritprune.errors import UnknownNameError
from tritprune.patterns.attentions import RECIPES, find_attentions, head_count
from tritprune.patterns.base import Block, Pattern, Reduce, Site, set_reduction
from tritprune.patterns.block import BlockPattern
from tritprune.patterns.heads import HeadsPattern
from tritprune.patterns.n_in_m import NInMPattern
from tritprune.patterns.names import plain_modules, unwrapped
from tritprune.patterns.views import Kind, WeightView, from_2d, kind_of, own_weight, to_2d, view_shape
from tritprune.registry import Registry, did_you_mean

P = TypeVar("P", bound=type[Pattern])

patterns: Registry[Pattern] = Registry("pattern")
"""Patterns by name."""


def register_pattern(name: str) -> Callable[[P], P]:
    """Class decorator: files a pattern under ``name``.

    Raises:
        ConfigError: the name is taken.
    """
    return patterns.register(name)


register_pattern("block")(BlockPattern)
register_pattern("n_in_m")(NInMPattern)
register_pattern("heads")(HeadsPattern)


def get_pattern(config: str | Mapping[str, Any] | Pattern, modules: object = None) -> Pattern:
    """The pattern that ``config`` names.

    Args:
        config: a name, a shorthand (``4x1``, ``2:4``), a mapping with ``name`` and arguments, or a pattern as it is.
        modules: taken for callers that pass them, and not needed: a pattern is given layers when it cuts them.

    Raises:
        UnknownNameError: unknown name; the message lists names and shorthands.
        ConfigError: a size below 1, N:M without 0 < N < M, an unknown argument.
    """
    del modules
    if isinstance(config, Pattern):
        return config
    if isinstance(config, str) and config not in patterns:
        block = re.fullmatch(r"(\d+|channel)x(\d+|channel)", config)
        n_in_m = re.fullmatch(r"(\d+):(\d+)", config)
        if block:
            n, m = (part if part == "channel" else int(part) for part in block.groups())
            return patterns.build({"name": "block", "n": n, "m": m})
        if n_in_m:
            return patterns.build({"name": "n_in_m", "n": int(n_in_m[1]), "m": int(n_in_m[2])})
        shorthands = "4x1 (any NxM), channelx1, 1xchannel, 2:4 (any N:M)"
        raise UnknownNameError(f"unknown pattern '{config}'; {did_you_mean(config, patterns.names())}, {shorthands}")
    return patterns.build(config)


__all__ = [
    "RECIPES",
    "Block",
    "BlockPattern",
    "HeadsPattern",
    "Kind",
    "NInMPattern",
    "Pattern",
    "Reduce",
    "Site",
    "WeightView",
    "find_attentions",
    "from_2d",
    "get_pattern",
    "head_count",
    "kind_of",
    "own_weight",
    "patterns",
    "plain_modules",
    "register_pattern",
    "set_reduction",
    "to_2d",
    "unwrapped",
    "view_shape",
]
