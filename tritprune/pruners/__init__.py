"""Pruners: when to prune, and the masks that result.

| name | when |
|---|---|
| iterative | along the schedule, from ``start_step`` to ``end_step`` |
| one_shot | everything at ``start_step`` |
| progressive | along the schedule, units fading in between |
| retrain_free | after training: calibration batches choose, nothing is trained |
| pattern_lock | never: the zeros that are there stay |
| magnitude, snip, snip_momentum, block_mask | as ``iterative``, with that criterion |
| heads | as ``iterative``, with pattern ``heads`` |
"""

from tritprune.pruners.base import Pruner, get_pruner, pruners, register_pruner
from tritprune.pruners.guard import Verification
from tritprune.pruners.layers import Exclusion, find_head
from tritprune.pruners.masks import LayerMask, MaskSet
from tritprune.pruners.named import BlockMaskPruner, HeadPruner, MagnitudePruner, SnipMomentumPruner, SnipPruner
from tritprune.pruners.one_shot import OneShotPruner
from tritprune.pruners.pattern_lock import PatternLockPruner
from tritprune.pruners.plan import PlannedGroup, PlannedLayer, PlannedStep, PruningPlan
from tritprune.pruners.progressive import ProgressivePruner
from tritprune.pruners.regularizers import GroupLasso, get_regularizer, register_regularizer, regularizers
from tritprune.pruners.reports import (
    LayerCount,
    PrunedLayer,
    PruneEvent,
    SparsityCount,
    SparsityReport,
    sparsity_of,
)
from tritprune.pruners.retrain_free import RetrainFreePruner
from tritprune.pruners.settings import GroupSettings

__all__ = [
    "BlockMaskPruner",
    "Exclusion",
    "GroupLasso",
    "GroupSettings",
    "HeadPruner",
    "LayerCount",
    "LayerMask",
    "MagnitudePruner",
    "MaskSet",
    "OneShotPruner",
    "PatternLockPruner",
    "PlannedGroup",
    "PlannedLayer",
    "PlannedStep",
    "ProgressivePruner",
    "PruneEvent",
    "PrunedLayer",
    "Pruner",
    "PruningPlan",
    "RetrainFreePruner",
    "SnipMomentumPruner",
    "SnipPruner",
    "SparsityCount",
    "SparsityReport",
    "Verification",
    "find_head",
    "get_pruner",
    "get_regularizer",
    "pruners",
    "register_pruner",
    "register_regularizer",
    "regularizers",
    "sparsity_of",
]
