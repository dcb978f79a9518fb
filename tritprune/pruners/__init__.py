"""Pruners: when to prune, and the masks that result.

| name | when |
|---|---|
| iterative | along the schedule, from ``start_step`` to ``end_step`` |
| one_shot | everything at ``start_step`` |
| magnitude, snip, snip_momentum, block_mask | as ``iterative``, with that criterion |
| heads | as ``iterative``, with pattern ``heads`` |
"""

from tritprune.pruners.base import Pruner, get_pruner, pruners, register_pruner
from tritprune.pruners.layers import Exclusion, find_head
from tritprune.pruners.masks import LayerMask, MaskSet
from tritprune.pruners.named import BlockMaskPruner, HeadPruner, MagnitudePruner, SnipMomentumPruner, SnipPruner
from tritprune.pruners.one_shot import OneShotPruner
from tritprune.pruners.reports import (
    LayerCount,
    PrunedLayer,
    PruneEvent,
    SparsityCount,
    SparsityReport,
    sparsity_of,
)
from tritprune.pruners.settings import GroupSettings

__all__ = [
    "BlockMaskPruner",
    "Exclusion",
    "GroupSettings",
    "HeadPruner",
    "LayerCount",
    "LayerMask",
    "MagnitudePruner",
    "MaskSet",
    "OneShotPruner",
    "PruneEvent",
    "PrunedLayer",
    "Pruner",
    "SnipMomentumPruner",
    "SnipPruner",
    "SparsityCount",
    "SparsityReport",
    "find_head",
    "get_pruner",
    "pruners",
    "register_pruner",
    "sparsity_of",
]
