"""The Triton twins of ``tritprune.kernels.reference``: same names, same signatures, same results.

Import this module through :mod:`tritprune.kernels` only: it needs the package triton.
"""

from triton.runtime.interpreter import InterpretedFunction

from tritprune.kernels.triton.kth_layers import kth_score
from tritprune.kernels.triton.masks import apply_masks_, count_violations
from tritprune.kernels.triton.multi_tensor import find_tile
from tritprune.kernels.triton.n_in_m import n_in_m_group_scores, n_in_m_masks
from tritprune.kernels.triton.optimizers import masked_adamw_, masked_sgd_
from tritprune.kernels.triton.scores import accumulate_unit_scores_
from tritprune.kernels.triton.statistics import count_non_finite, mask_statistics, restore_masks_
from tritprune.kernels.triton.threshold_masks import crossing_units, masks_from_threshold

INTERPRETED = isinstance(find_tile, InterpretedFunction)
"""Whether the kernels were defined under TRITON_INTERPRET=1: they then run on CPU tensors, and only there."""

__all__ = [
    "INTERPRETED",
    "accumulate_unit_scores_",
    "apply_masks_",
    "count_non_finite",
    "count_violations",
    "crossing_units",
    "kth_score",
    "mask_statistics",
    "masked_adamw_",
    "masked_sgd_",
    "masks_from_threshold",
    "n_in_m_group_scores",
    "n_in_m_masks",
    "restore_masks_",
]
