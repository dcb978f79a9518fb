"""Arguments that do not fit are refused with what was given, before any backend sees them."""

import pytest
import torch

from tritprune import kernels
from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid
from tritprune.patterns import get_pattern


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def accumulate(**changes):
    arguments = {
        "scores": [ones(2, 3)], "skipped": torch.zeros(1, dtype=torch.int64), "weights": [ones(8, 3)],
        "gradients": [ones(8, 3)], "blocks": [(4, 1)], "form": "snip", "reduce": "mean", "alpha": 0.9, "beta": 1.0,
    }  # fmt: skip
    kernels.accumulate_unit_scores_(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [ones(8, 3)]}, r"score of shape \[2, 3\], got float32 \[8, 3\]"),
        ({"scores": [ones(2, 3, dtype=torch.float64)]}, r"scores are float32 or bfloat16, got float64 \[2, 3\]"),
        ({"scores": [ones(3, 2).t()]}, r"contiguous, got strides \(1, 2\)"),
        ({"skipped": torch.zeros(2, dtype=torch.int64)}, r"int64 \[1\], got int64 \[2\]"),
        ({"weights": [ones(8, 3, dtype=torch.int32)]}, "weight is float32, bfloat16 or float16, got int32"),
        ({"weights": [ones(24)], "gradients": [ones(24)]}, r"weight of shape \[R, C\], got float32 \[24\]"),
        ({"gradients": [ones(8, 2)]}, r"gradient of shape \[8, 3\], got float32 \[8, 2\]"),
        ({"gradients": None}, "form 'snip' needs gradients"),
        ({"gradients": []}, "1 weights, 0 gradients"),
        ({"blocks": []}, "1 scores, 1 weights, 0 blocks"),
        ({"form": "snap"}, "unknown form 'snap'; known: magnitude, gradient, snip"),
        ({"reduce": "min"}, "unknown reduce 'min'; known: mean, sum, max"),
    ],
)
def test_accumulate_unit_scores(changes, message):
    accumulate()
    with pytest.raises(ValueError, match=message):
        accumulate(**changes)


@pytest.mark.parametrize("op", [kernels.n_in_m_masks, kernels.n_in_m_group_scores])
def test_n_in_m(op):
    for n, m in ((0, 4), (4, 4), (5, 4), (2, 33)):
        with pytest.raises(ValueError, match=f"0 < N < M <= 32, got {n}:{m}"):
            op([ones(2, 4)], n, m)
    with pytest.raises(ValueError, match=r"\[R, C\], got float32 \[4\]"):
        op([ones(4)], 2, 4)


def test_thresholds():
    grid = UnitGrid.of_blocks((4, 2), (4, 1))
    with pytest.raises(ValueError, match="number of elements, got -1"):
        kernels.kth_score([ones(1, 2)], [grid], -1)
    with pytest.raises(ValueError, match=r"score of shape \[1, 2\], got float32 \[4, 2\]"):
        kernels.kth_score([ones(4, 2)], [grid], 1)
    with pytest.raises(ValueError, match="1 scores, 0 grids"):
        kernels.kth_score([ones(1, 2)], [], 1)
    with pytest.raises(ValueError, match=r"remainder must be one torch\.int64 number, or one a layer, got float32"):
        kernels.masks_from_threshold([ones(1, 2)], [grid], torch.tensor(1.0), torch.tensor(1.0))


def test_masks():
    with pytest.raises(ValueError, match=r"mask of shape \[1, 2\], got bool \[2, 2\]"):
        kernels.apply_masks_([ones(4, 2)], [ones(2, 2, dtype=torch.bool)], [(4, 1)])
    with pytest.raises(ValueError, match="mask is bool or packed in uint8, got float32"):
        kernels.apply_masks_([ones(4, 2)], [ones(1, 2)], [(4, 1)])
    with pytest.raises(ValueError, match=r"packed mask of 18 units of shape \[3\], got uint8 \[2\]"):
        kernels.apply_masks_([ones(4, 18)], [ones(2, dtype=torch.uint8)], [(4, 1)])
    with pytest.raises(ValueError, match=r"packed masks must be contiguous, got strides \(2,\)"):
        kernels.apply_masks_([ones(4, 18)], [ones(6, dtype=torch.uint8)[::2]], [(4, 1)])
    with pytest.raises(ValueError, match=r"both masks are bool or both packed, got uint8 \[2\] and bool \[2\]"):
        kernels.mask_statistics([ones(2, dtype=torch.uint8)], [ones(2, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"previous mask of shape \[2\], got bool \[3\]"):
        kernels.mask_statistics([ones(2, dtype=torch.bool)], [ones(3, dtype=torch.bool)])


def test_the_pattern_refuses_the_group_that_the_kernels_refuse():
    with pytest.raises(ConfigError, match="M of at most 32, got 2:33"):
        get_pattern("2:33")
    assert get_pattern("31:32").label == "31:32"
