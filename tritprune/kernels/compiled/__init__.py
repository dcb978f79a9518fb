"""The operations for the CPU, compiled by numba: the same results as ``reference.py``, several times as fast.

Layers are cut into pieces that fit the cache; a pool of as many threads as torch uses works through them. Rows are read
once and nothing of the size of a layer is allocated, except that a weight whose rows are not contiguous is copied for
scoring, and a packed mask is unpacked to be applied or counted. Same names and signatures as the reference.
"""

from tritprune.kernels.compiled.masks import apply_masks_, count_non_finite, count_violations, mask_statistics
from tritprune.kernels.compiled.n_in_m import n_in_m_group_scores, n_in_m_masks
from tritprune.kernels.compiled.optimizers import masked_adamw_, masked_sgd_
from tritprune.kernels.compiled.scores import accumulate_unit_scores_
from tritprune.kernels.compiled.thresholds import crossing_units, kth_score, masks_from_threshold
from tritprune.kernels.reference import restore_masks_  # torch's own copy already

__all__ = [
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
