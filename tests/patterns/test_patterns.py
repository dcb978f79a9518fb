"""Patterns: names and shorthands, units and masks written by hand, N of M held to brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tritprune.errors import ConfigError, UnknownNameError
from tritprune.kernels import UnitGrid
from tritprune.patterns import (
    BlockPattern,
    HeadsPattern,
    NInMPattern,
    Pattern,
    WeightView,
    get_pattern,
    patterns,
    register_pattern,
    set_reduction,
)


def linear_view(outputs, inputs, name="layer"):
    view = WeightView.of(name, nn.Linear(inputs, outputs))
    assert view is not None
    return view


def site_of(pattern, outputs, inputs):
    view = linear_view(outputs, inputs)
    sites = pattern.sites([view], view.module)
    assert len(sites) == 1
    return sites[0]


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ("4x1", "4x1"), ("1x1", "1x1"), ("32x32", "32x32"), ("channelx1", "channelx1"), ("1xchannel", "1xchannel"),
        ("channelx2", "channelx2"), ("2:4", "2:4"), ("1:4", "1:4"), ("4:8", "4:8"), ("heads", "head"), ("block", "4x1"),
        ({"name": "block", "n": 8, "m": 2}, "8x2"), ({"name": "block", "n": "channel", "m": 1}, "channelx1"),
        ({"name": "n_in_m", "n": 1, "m": 3}, "1:3"), ({"name": "heads"}, "head"), (BlockPattern(2, 2), "2x2"),
    ],
)  # fmt: skip
def test_names_shorthands_and_mappings(config, label):
    assert get_pattern(config).label == label


@pytest.mark.parametrize("config", ["5:4", "4:4", "0:4", {"name": "n_in_m", "n": 5, "m": 4}])
def test_n_in_m_out_of_range(config):
    with pytest.raises(ConfigError, match=r"N:M needs 0 < N < M, got \d:4"):
        get_pattern(config)


@pytest.mark.parametrize("config", ["0x1", "1x0", {"name": "block", "n": 0}, {"name": "block", "n": 1.5, "m": 1}])
def test_blocks_out_of_range(config):
    with pytest.raises(ConfigError, match="at least 1"):
        get_pattern(config)


@pytest.mark.parametrize("config", ["4x", "x1", "chanelx1", "2in4", "2;4", "blok"])
def test_an_unknown_pattern_shows_the_choices(config):
    with pytest.raises(UnknownNameError, match=r"unknown pattern .*known: block, heads, n_in_m.*4x1.*2:4"):
        get_pattern(config)


def test_registry_and_arguments():
    assert {"block", "n_in_m", "heads"} <= set(patterns.names())
    with pytest.raises(ConfigError, match="has no key 'k'"):
        get_pattern({"name": "block", "k": 4})


@pytest.mark.parametrize(
    ("config", "block", "grid", "unit"),
    [
        ("4x1", (4, 1), (3, 6), "4x1"),
        ("1x4", (1, 4), (10, 2), "1x4"),
        ("channelx1", (10, 1), (1, 6), "10x1"),
        ("1xchannel", (1, 6), (10, 1), "1x6"),
        ("channelx2", (10, 2), (1, 3), "10x2"),
        ("10x6", (10, 6), (1, 1), "10x6"),
    ],
)
def test_blocks_of_a_layer_of_10_outputs_and_6_inputs(config, block, grid, unit):
    pattern = get_pattern(config)
    site = site_of(pattern, 10, 6)
    assert site.blocks == (block,)
    assert site.grid.shape == grid
    assert site.grid.elements == site.elements == 60
    assert pattern.unit_name(site) == unit


def test_a_block_site_hands_scores_and_masks_through():
    pattern = get_pattern("4x1")
    site = site_of(pattern, 10, 6)
    scores, keep = torch.rand(3, 6), torch.rand(3, 6) > 0.5
    assert pattern.unit_scores(site, [scores], [keep]) is scores
    assert pattern.layer_masks(site, keep, [scores], [keep])[0] is keep
    assert pattern.kept_units(site, [keep]) is keep
    assert pattern.max_sparsity == 1.0


# scores of one output, what 2:4 keeps: written by hand
TWO_OF_FOUR = [
    ([1, 2, 3, 4], [0, 0, 1, 1]),
    ([4, 1, 3, 2], [1, 0, 1, 0]),
    ([5, 5, 5, 5], [1, 1, 0, 0]),  # ties: the lower index stays
    ([1, 1, 0, 1], [1, 1, 0, 0]),
    ([0, 0, 0, 9], [1, 0, 0, 1]),
]


@pytest.mark.parametrize(("scores", "expected"), TWO_OF_FOUR)
def test_two_of_four_by_hand(scores, expected):
    pattern = get_pattern("2:4")
    site = site_of(pattern, 1, 4)
    score, ones = torch.tensor([scores]).float(), torch.ones(1, 4, dtype=torch.bool)
    mask = pattern.layer_masks(site, torch.tensor([[False]]), [score], [ones])[0]
    assert mask.int().tolist() == [expected]
    assert torch.equal(pattern.layer_masks(site, torch.tensor([[True]]), [score], [ones])[0], ones)


def test_one_of_four_prunes_one_of_four():
    """N of M are pruned; the predecessor reported the sparsity of 1:4 as 0."""
    pattern = get_pattern("1:4")
    assert pattern.max_sparsity == 0.25
    site = site_of(pattern, 2, 8)
    mask = pattern.layer_masks(
        site, torch.zeros(2, 2, dtype=torch.bool), [torch.rand(2, 8)], [torch.ones(2, 8, dtype=torch.bool)]
    )[0]
    assert mask.view(2, 2, 4).sum(2).tolist() == [[3, 3], [3, 3]]


def test_a_pruned_group_keeps_its_mask_when_scores_change():
    pattern = get_pattern("2:4")
    site = site_of(pattern, 1, 8)
    ones, first_gone = torch.ones(1, 8, dtype=torch.bool), torch.tensor([[False, True]])
    before = pattern.layer_masks(site, first_gone, [torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]])], [ones])
    assert before[0].int().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
    both_gone = torch.tensor([[False, False]])
    after = pattern.layer_masks(site, both_gone, [torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])], before)
    assert after[0].int().tolist() == [[0, 0, 1, 1, 1, 1, 0, 0]]
    assert pattern.kept_units(site, before).tolist() == [[False, True]]
    assert pattern.kept_units(site, after).tolist() == [[False, False]]


@pytest.mark.parametrize(
    ("n", "m", "inputs", "cols", "elements"),
    [
        (2, 4, 8, 2, 4),
        (2, 4, 10, 3, 5),  # a tail of 2 loses 1
        (1, 4, 10, 2, 2),  # a tail of 2 loses floor(2 / 4) = 0: no unit
        (1, 4, 11, 2, 2),
        (3, 4, 5, 1, 3),
        (3, 4, 6, 2, 4),
        (2, 4, 3, 1, 1),  # one short group
    ],
)
def test_short_last_groups(n, m, inputs, cols, elements):
    site = site_of(NInMPattern(n, m), 1, inputs)
    assert (site.grid.cols, site.grid.elements) == (cols, elements)
    assert site.elements == inputs


def test_a_layer_too_narrow_to_lose_anything_has_no_site():
    view = linear_view(4, 3)
    assert NInMPattern(1, 4).sites([view], view.module) == []


@given(
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (4, 8)]),
    rows=st.integers(1, 3),
    columns=st.integers(4, 18),
    seed=st.integers(0, 10**6),
)
def test_n_in_m_is_exact_per_group_and_costs_the_least(pattern, rows, columns, seed):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 4, (rows, columns), generator=generator).float()
    pattern = NInMPattern(n, m)
    set_reduction(pattern, "sum")
    view = linear_view(rows, columns)
    sites = pattern.sites([view], view.module)
    if not sites:
        assert columns * n // m == 0
        return
    site = sites[0]
    keep = torch.rand(site.grid.shape, generator=generator) > 0.5
    ones = torch.ones(rows, columns, dtype=torch.bool)
    costs = pattern.unit_scores(site, [scores], [ones])
    mask = pattern.layer_masks(site, keep, [scores], [ones])[0]
    assert torch.equal(pattern.kept_units(site, [mask]), keep)
    sizes = site.grid.sizes()
    for r, g in itertools.product(range(rows), range(-(-columns // m))):
        group = slice(g * m, (g + 1) * m)
        gone = ~mask[r, group]
        if g >= site.grid.cols or keep[r, g]:
            assert not gone.any()
            continue
        quota = len(gone) * n // m
        assert int(gone.sum()) == quota == int(sizes[r, g])
        cheapest = sum(sorted(scores[r, group].tolist())[:quota])
        assert float(scores[r, group][gone].sum()) == cheapest == float(costs[r, g])


def test_mean_makes_short_groups_comparable():
    pattern = NInMPattern(2, 4)
    site = site_of(pattern, 1, 6)
    scores, ones = torch.ones(1, 6), torch.ones(1, 6, dtype=torch.bool)
    assert pattern.unit_scores(site, [scores], [ones]).tolist() == [[1.0, 1.0]]
    set_reduction(pattern, "sum")
    assert pattern.unit_scores(site, [scores], [ones]).tolist() == [[2.0, 1.0]]


def test_reductions_that_a_pattern_cannot_honour_are_refused():
    with pytest.raises(ConfigError, match="2:4 cannot reduce scores by 'max'; known: mean, sum"):
        set_reduction(get_pattern("2:4"), "max")
    with pytest.raises(ConfigError, match="did you mean 'mean'"):
        set_reduction(get_pattern("4x1"), "meen")
    set_reduction(get_pattern("4x1"), "max")


def test_a_pattern_of_ones_own():
    @register_pattern("test_half_row")
    class HalfRow(Pattern):
        def block(self, view):
            return 1, -(-view.shape[1] // 2)

    pattern = get_pattern("test_half_row")
    site = site_of(pattern, 3, 7)
    assert site.grid == UnitGrid(3, 2, 1, 1, 4, 3)
    assert pattern.label == "HalfRow"


def test_a_pattern_without_a_block_says_what_is_missing():
    with pytest.raises(ConfigError, match=r"must override block\(view\) for layer"):
        site_of(Pattern(), 3, 7)


def test_heads_need_an_attention():
    view = linear_view(4, 4)
    with pytest.raises(ConfigError, match=r"no attention among 1 layers; known names: self\.query"):
        HeadsPattern().sites([view], nn.Sequential(view.module))
