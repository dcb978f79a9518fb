"""The specification against answers written by hand."""

import math

import pytest
import torch

from tritprune.kernels import (
    UnitGrid,
    accumulate_unit_scores_,
    apply_masks_,
    kth_score,
    mask_statistics,
    masks_from_threshold,
    n_in_m_group_scores,
    n_in_m_masks,
)

INF, NAN = math.inf, math.nan


def accumulate(weight, gradient, block, old=None, *, form="snip", reduce="sum", alpha=0.0, beta=1.0):
    weight = torch.tensor(weight)
    gradients = None if gradient is None else [torch.tensor(gradient)]
    shape = UnitGrid.of_blocks(tuple(weight.shape), block).shape
    score = torch.full(shape, NAN) if old is None else torch.tensor(old)
    skipped = torch.tensor([10])
    options = {"form": form, "reduce": reduce, "alpha": alpha, "beta": beta}
    accumulate_unit_scores_([score], skipped, [weight], gradients, [block], **options)
    return score.tolist(), skipped.item()


W = [[1.0, -2.0], [3.0, 4.0], [-5.0, 0.5]]
G = [[2.0, 1.0], [-1.0, 0.5], [1.0, 2.0]]


@pytest.mark.parametrize(
    ("form", "reduce", "block", "expected"),
    [
        ("snip", "sum", (2, 1), [[5.0, 4.0], [5.0, 1.0]]),
        ("snip", "mean", (2, 1), [[2.5, 2.0], [5.0, 1.0]]),
        ("snip", "max", (2, 1), [[3.0, 2.0], [5.0, 1.0]]),
        ("magnitude", "sum", (1, 2), [[3.0], [7.0], [5.5]]),
        ("gradient", "sum", (3, 1), [[4.0, 3.5]]),
        ("gradient", "max", (3, 2), [[2.0]]),
        ("magnitude", "mean", (1, 1), [[1.0, 2.0], [3.0, 4.0], [5.0, 0.5]]),
    ],
)
def test_scores(form, reduce, block, expected):
    assert accumulate(W, G, block, form=form, reduce=reduce) == (expected, 10)


def test_scores_need_no_gradient_for_magnitude():
    assert accumulate(W, None, (3, 2), form="magnitude") == ([[15.5]], 10)


def test_scores_run_on():
    assert accumulate(W, G, (3, 1), [[8.0, 16.0]], alpha=0.5, beta=2.0) == ([[24.0, 18.0]], 10)


def test_without_the_old_score_its_infinity_does_not_survive():
    assert accumulate(W, G, (3, 1), [[INF, NAN]], alpha=0.0) == ([[10.0, 5.0]], 10)


def test_non_finite_gradients_count_nothing_and_are_counted():
    gradient = [[NAN, 1.0], [INF, 0.5], [1.0, -INF]]
    assert accumulate(W, gradient, (3, 1)) == ([[5.0, 4.0]], 13)


def test_the_mean_divides_by_all_elements_of_the_unit_also_where_gradients_were_skipped():
    score, _ = accumulate([[1.0], [1.0], [1.0], [1.0]], [[4.0], [NAN], [4.0], [4.0]], (4, 1), reduce="mean")
    assert score == [[3.0]]


def test_an_overflow_with_finite_gradients_stays_infinite_and_is_not_counted():
    assert accumulate([[1e30]], [[1e30]], (1, 1)) == ([[INF]], 10)


def test_scores_of_a_bfloat16_weight_are_fp32():
    weight = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    score = torch.zeros(1, 1)
    accumulate_unit_scores_(
        [score], torch.zeros(1, dtype=torch.int64), [weight], [weight * 1.5], [(1, 2)],
        form="snip", reduce="sum", alpha=0.9, beta=1.0,
    )  # fmt: skip
    assert score.item() == 1.5 + 13.5


def test_scores_do_not_enter_autograd():
    weight = torch.ones(2, 2, requires_grad=True)
    score = torch.zeros(2, 2)
    skipped = torch.zeros(1, dtype=torch.int64)
    options = {"form": "magnitude", "reduce": "sum", "alpha": 0.5, "beta": 1.0}
    accumulate_unit_scores_([score], skipped, [weight], None, [(1, 1)], **options)
    assert not score.requires_grad
    apply_masks_([weight], [torch.eye(2, dtype=torch.bool)], [(1, 1)])
    assert weight.tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("row", "n", "m", "keep", "cost"),
    [
        ([1.0, 4.0, 3.0, 2.0], 2, 4, [0, 1, 1, 0], [3.0]),
        ([1.0, 4.0, 3.0, 2.0], 1, 4, [0, 1, 1, 1], [1.0]),
        ([5.0, 5.0, 5.0, 5.0], 2, 4, [1, 1, 0, 0], [10.0]),  # equals: the lower index stays
        ([2.0, 1.0, 1.0, 1.0], 2, 4, [1, 1, 0, 0], [2.0]),
        ([9.0, 1.0, 7.0, 7.0], 1, 2, [1, 0, 1, 0], [1.0, 7.0]),
        ([1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0], 2, 4, [0, 0, 1, 1, 1, 1, 0], [3.0, 7.0]),  # tail of 3 loses 1
        ([1.0, 2.0, 3.0, 4.0, 5.0], 3, 4, [0, 0, 0, 1, 1], [6.0, 0.0]),  # tail of 1 loses none
        ([INF, 0.0, INF, INF], 2, 4, [1, 0, 1, 0], [INF]),
    ],
)
def test_n_in_m(row, n, m, keep, cost):
    scores = [torch.tensor([row, row])]
    assert n_in_m_masks(scores, n, m)[0].int().tolist() == [keep, keep]
    assert n_in_m_group_scores(scores, n, m)[0].tolist() == [cost, cost]


def select(layers, budget, grids=None):
    scores = [torch.tensor(layer) for layer in layers]
    if grids is None:
        grids = [UnitGrid.of_blocks(tuple(score.shape), (1, 1)) for score in scores]
    threshold, remainder = kth_score(scores, grids, budget)
    assert threshold.shape == remainder.shape == ()
    assert (threshold.dtype, remainder.dtype) == (torch.float32, torch.int64)
    masks = masks_from_threshold(scores, grids, threshold, remainder)
    return threshold.item(), remainder.item(), [mask.int().tolist() for mask in masks]


@pytest.mark.parametrize(
    ("budget", "threshold", "remainder", "keep"),
    [
        (0, 1.0, 0, [[[1, 1], [1, 1]], [[1, 1, 1]]]),
        (1, 2.0, 0, [[[1, 0], [1, 1]], [[1, 1, 1]]]),
        (2, 2.0, 1, [[[1, 0], [1, 1]], [[1, 0, 1]]]),  # of the three 2s the last goes first
        (3, 2.0, 2, [[[1, 0], [1, 1]], [[0, 0, 1]]]),
        (4, 3.0, 0, [[[1, 0], [0, 1]], [[0, 0, 1]]]),
        (5, 4.0, 0, [[[0, 0], [0, 1]], [[0, 0, 1]]]),
        (6, 5.0, 0, [[[0, 0], [0, 0]], [[0, 0, 1]]]),
        (7, INF, 0, [[[0, 0], [0, 0]], [[0, 0, 0]]]),
        (99, INF, 0, [[[0, 0], [0, 0]], [[0, 0, 0]]]),
    ],
)
def test_thresholds_and_masks(budget, threshold, remainder, keep):
    assert select([[[3.0, 1.0], [2.0, 4.0]], [[2.0, 2.0, 5.0]]], budget) == (threshold, remainder, keep)


def test_a_unit_that_does_not_fit_stops_the_selection():
    grids = [UnitGrid.of_blocks((5, 2), (4, 1))]  # sizes 4 4 / 1 1
    assert select([[[1.0, 2.0], [3.0, 0.0]]], 4, grids) == (1.0, 3, [[[1, 1], [1, 0]]])
    assert select([[[1.0, 2.0], [3.0, 0.0]]], 5, grids) == (2.0, 0, [[[0, 1], [1, 0]]])
    assert select([[[7.0, 7.0], [7.0, 7.0]]], 5, grids) == (7.0, 5, [[[1, 1], [0, 0]]])
    assert select([[[7.0, 7.0], [7.0, 7.0]]], 6, grids) == (7.0, 6, [[[1, 0], [0, 0]]])


def test_pruned_units_go_first_and_protected_ones_never():
    layer = [[INF, -INF, 1.0, INF]]
    assert select([layer], 1) == (1.0, 0, [[[1, 0, 1, 1]]])
    assert select([layer], 2) == (INF, 0, [[[1, 0, 0, 1]]])
    assert select([layer], 4) == (INF, 0, [[[1, 0, 0, 1]]])


def test_zeros_of_both_signs_are_equal():
    assert select([[[0.0, -0.0, 0.0, -0.0]]], 2) == (0.0, 2, [[[1, 1, 0, 0]]])


def test_nothing_to_select_from():
    assert select([], 5) == (INF, 0, [])


def test_a_large_selection_takes_the_sampled_bracket():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(700, 500, generator=generator), torch.rand(300, 333, generator=generator)]
    grids = [UnitGrid.of_blocks((2800, 500), (4, 1)), UnitGrid.of_blocks((899, 333), (3, 1))]
    elements = sum(grid.elements for grid in grids)
    for share in (0.0001, 0.5, 0.9, 0.99999):
        budget = int(share * elements)
        threshold, remainder = kth_score(layers, grids, budget)
        masks = masks_from_threshold(layers, grids, threshold, remainder)
        gone = [(~mask * grid.sizes()).sum().item() for mask, grid in zip(masks, grids, strict=True)]
        assert budget - 4 < sum(gone) <= budget


def test_a_sample_that_misleads_costs_time_only():
    scores = torch.zeros(1 << 18)
    scores[::3] = 1.0  # the stride of the sample is 3: it sees nothing but ones
    grid = UnitGrid.of_blocks((1, 1 << 18), (1, 1))
    threshold, remainder = kth_score([scores[None]], [grid], 1000)
    assert (threshold.item(), remainder.item()) == (0.0, 1000)
    (mask,) = masks_from_threshold([scores[None]], [grid], threshold, remainder)
    assert int((~mask).sum()) == 1000


def test_masks_zero_in_place():
    base = torch.tensor([[1.0, NAN, 3.0], [-4.0, INF, -0.0], [7.0, 8.0, 9.0]])
    tensor = base.clone()
    address = tensor.data_ptr()
    mask = torch.tensor([[True, False], [False, True]])
    apply_masks_([tensor], [mask], [(2, 2)])
    assert tensor.data_ptr() == address
    assert tensor.tolist() == [[1.0, pytest.approx(NAN, nan_ok=True), 0.0], [-4.0, INF, 0.0], [0.0, 0.0, 9.0]]
    assert not torch.signbit(tensor[1, 2])


def test_masks_reach_a_transposed_view():
    storage = torch.ones(3, 4)
    apply_masks_([storage.t()], [torch.tensor([[True, False, True]])], [(4, 1)])
    assert storage.sum(1).tolist() == [4.0, 0.0, 4.0]


def test_statistics():
    masks = [torch.tensor([[True, False], [True, True]]), torch.zeros(0, 3, dtype=torch.bool)]
    before = [torch.tensor([[True, True], [False, True]]), torch.zeros(0, 3, dtype=torch.bool)]
    assert mask_statistics(masks, before).tolist() == [[3, 2], [0, 0]]
    assert mask_statistics([], []).shape == (0, 2)
