"""The operations of pruning: tensors in, tensors out. This is the table of them.

Each has a reference in torch (``reference.py``, the specification) and twins of the same name and signature: loops for
the CPU (``compiled/``, numba) and Triton launchers (``triton/``), imported when needed; ``dispatch.py`` chooses.

| operation | what it does |
|---|---|
| accumulate_unit_scores_ | ``S <- alpha * S + beta * reduce_unit f(w, g)`` |
| n_in_m_masks, n_in_m_group_scores | N of every M consecutive inputs go; what that costs |
| kth_score, masks_from_threshold | the exact threshold for a budget of elements; the masks it gives |
| crossing_units | the unit of each layer at which its floor or its cap is |
| count_non_finite | NaNs and infinities |
| apply_masks_ | zeros where a unit is pruned |
| count_violations | elements of pruned units that are not zero |
| mask_statistics | kept and changed units |
| restore_masks_ | masks back to what they were, if a number on the device says so |
| masked_adamw_, masked_sgd_ | an optimizer step that ends with the mask |

A mask is a bool a unit, or packed: a bit a unit (``packing.py``), which every operation on masks takes and makes.
"""

from tritprune.kernels import checks, library, reference
from tritprune.kernels.dispatch import BACKENDS, Op, get_backend, set_backend, use_backend
from tritprune.kernels.packing import pack_mask, unpack_mask
from tritprune.kernels.units import UnitGrid

accumulate_unit_scores_ = Op(
    reference.accumulate_unit_scores_, checks.accumulate_unit_scores_, library.accumulate_unit_scores_
)
n_in_m_masks = Op(reference.n_in_m_masks, checks.n_in_m_masks, library.n_in_m_masks)
n_in_m_group_scores = Op(reference.n_in_m_group_scores, checks.n_in_m_group_scores, library.n_in_m_group_scores)
kth_score = Op(reference.kth_score, checks.kth_score, library.kth_score)
masks_from_threshold = Op(reference.masks_from_threshold, checks.masks_from_threshold, library.masks_from_threshold)
crossing_units = Op(reference.crossing_units, checks.crossing_units, library.crossing_units)
count_non_finite = Op(reference.count_non_finite, checks.count_non_finite, library.count_non_finite)
apply_masks_ = Op(reference.apply_masks_, checks.apply_masks_, library.apply_masks_)
count_violations = Op(reference.count_violations, checks.count_violations, library.count_violations)
masked_adamw_ = Op(reference.masked_adamw_, checks.masked_adamw_)
masked_sgd_ = Op(reference.masked_sgd_, checks.masked_sgd_)
mask_statistics = Op(reference.mask_statistics, checks.mask_statistics, library.mask_statistics)
restore_masks_ = Op(reference.restore_masks_, checks.restore_masks_, library.restore_masks_)

__all__ = [
    "BACKENDS",
    "Op",
    "UnitGrid",
    "accumulate_unit_scores_",
    "apply_masks_",
    "count_non_finite",
    "count_violations",
    "crossing_units",
    "get_backend",
    "kth_score",
    "mask_statistics",
    "masked_adamw_",
    "masked_sgd_",
    "masks_from_threshold",
    "n_in_m_group_scores",
    "n_in_m_masks",
    "pack_mask",
    "restore_masks_",
    "set_backend",
    "unpack_mask",
    "use_backend",
]
