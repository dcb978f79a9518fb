"""Laws of selection against a brute-force oracle: sort everything in Python, take the longest prefix that fits."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tritprune.kernels import UnitGrid, kth_score, masks_from_threshold, n_in_m_group_scores, n_in_m_masks

SCORES = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 1e-40, 0.25, 0.5, 0.5, 1.0, 3e38, math.inf])


@st.composite
def selections(draw):
    scores, grids = [], []
    for _ in range(draw(st.integers(0, 4))):
        shape = (draw(st.integers(0, 9)), draw(st.integers(0, 6)))
        grid = UnitGrid.of_blocks(shape, (draw(st.integers(1, 4)), draw(st.integers(1, 4))))
        values = draw(st.lists(SCORES, min_size=grid.units, max_size=grid.units))
        scores.append(torch.tensor(values, dtype=torch.float32).view(grid.shape))
        grids.append(grid)
    elements = sum(grid.elements for grid in grids)
    return scores, grids, draw(st.integers(0, elements + 2))


def by_sorting(scores, grids, budget):
    """(threshold, remainder, kept units in order), from the words of the contract."""
    units = [
        (score, -layer, -index, size)
        for layer, (values, grid) in enumerate(zip(scores, grids, strict=True))
        for index, (score, size) in enumerate(
            zip(values.flatten().tolist(), grid.sizes().flatten().tolist(), strict=True)
        )
    ]
    gone, left = set(), budget
    threshold = math.inf
    for score, layer, index, size in sorted(units):
        if score == math.inf:
            break
        if size > left:
            threshold = score
            break
        gone.add((-layer, -index))
        left -= size
    below = sum(size for score, _, _, size in units if score < threshold)
    remainder = 0 if threshold == math.inf else budget - below
    keep = [[(layer, i) not in gone for i in range(grid.units)] for layer, grid in enumerate(grids)]
    return threshold, remainder, keep


@given(selections())
def test_thresholds_and_masks_are_what_sorting_gives(selection):
    scores, grids, budget = selection
    threshold, remainder = kth_score(scores, grids, budget)
    masks = masks_from_threshold(scores, grids, threshold, remainder)
    kept = [mask.flatten().tolist() for mask in masks]
    assert (threshold.item(), remainder.item(), kept) == by_sorting(scores, grids, budget)


@given(selections())
def test_a_larger_budget_never_brings_a_unit_back(selection):
    scores, grids, budget = selection
    less = masks_from_threshold(scores, grids, *kth_score(scores, grids, budget))
    more = masks_from_threshold(scores, grids, *kth_score(scores, grids, budget + 3))
    assert all(bool((small <= large).all()) for small, large in zip(more, less, strict=True))


@given(st.data())
def test_n_in_m_prunes_the_lowest_of_each_group(data):
    m = data.draw(st.integers(2, 6))
    n = data.draw(st.integers(1, m - 1))
    row = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=0, max_size=17))
    keep, costs = [], []
    for start in range(0, len(row), m):
        group = row[start : start + m]
        order = sorted(range(len(group)), key=lambda i, group=group: (group[i], -i))
        gone = order[: len(group) * n // m]
        keep += [i not in gone for i in range(len(group))]
        costs.append(sum(group[i] for i in gone))
    scores = [torch.tensor([row])]
    assert n_in_m_masks(scores, n, m)[0].tolist() == [keep]
    assert n_in_m_group_scores(scores, n, m)[0].tolist() == [costs]
