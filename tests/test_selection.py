"""Selection against a brute-force oracle in plain Python, and answers written by hand."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritprune.errors import BudgetError, NonFiniteScoreError
from tritprune.kernels import UnitGrid, count_non_finite, pack_mask, unpack_mask
from tritprune.selection import (
    Demand,
    at_least,
    check_feasible,
    exact_budget,
    largest_unit,
    normalize_scores,
    refuse_non_finite,
    select,
)

SCORES = torch.tensor


def row(units, size=1, last=None):
    """Units in one row, all of ``size`` elements but the last."""
    return UnitGrid(1, units, 1, 1, size, size if last is None else last)


@pytest.mark.parametrize(
    ("sparsity", "elements", "expected"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.9, 10, 9),
        (1 / 3, 3, 1),
        (2 / 7, 70, 20),
        (0.1234567, 10**7, 1234567),
        (0.1, 9, 0),
        (0.0, 5, 0),
        (1e-05, 100000, 1),
    ],
)
def test_a_budget_is_exact(sparsity, elements, expected):
    assert exact_budget(sparsity, elements) == expected


def test_binary_arithmetic_would_not_do():
    assert int(0.29 * 100) == 28


@given(st.integers(0, 9999), st.integers(0, 10**9))
def test_budgets_are_floor_and_ceiling_of_the_decimal(ten_thousandths, elements):
    exact = Fraction(ten_thousandths, 10000) * elements
    assert exact_budget(ten_thousandths / 10000, elements) == math.floor(exact)
    assert at_least(ten_thousandths / 10000, elements) == math.ceil(exact)


def test_lowest_scores_go():
    keep = select([SCORES([[3.0, 1.0, 2.0, 0.5]])], [row(4)], 2)
    assert keep[0].tolist() == [[True, False, True, False]]


def test_among_equals_the_lower_index_stays_and_later_layers_go_first():
    scores = [torch.ones(1, 3), torch.ones(1, 3)]
    keep = select(scores, [row(3), row(3)], 4)
    assert [k.tolist() for k in keep] == [[[True, True, False]], [[False, False, False]]]


def test_a_constant_layer_at_half_loses_exactly_half():
    keep = select([torch.full((8, 8), 0.25)], [UnitGrid.of_blocks((8, 8), (1, 1))], 32)
    assert int((~keep[0]).sum()) == 32
    assert bool(keep[0][:4].all())


def test_negative_scores_and_signed_zeros_are_scores():
    keep = select([SCORES([[-2.0, 0.0, -0.0, -3.0]])], [row(4)], 3)
    assert keep[0].tolist() == [[False, True, False, False]]


def test_units_of_unequal_size_go_while_they_fit_and_not_after():
    """Order: size 2 (score 1), size 3 (2), size 1 (3). A budget of 4 takes the first only: the second does not fit,
    and the third is not preferred over it."""
    grids = [row(1, 2), row(1, 3), row(1, 1)]
    scores = [SCORES([[1.0]]), SCORES([[2.0]]), SCORES([[3.0]])]
    for budget, gone in ((0, 0), (1, 0), (2, 1), (4, 1), (5, 2), (6, 3)):
        keep = select(scores, grids, budget)
        assert [not bool(k) for k in keep] == [i < gone for i in range(3)]


def test_what_has_gone_stays_gone_whatever_its_score():
    kept = [SCORES([[True, True, False, True]])]
    keep = select([SCORES([[1.0, 2.0, 9.0, 3.0]])], [row(4)], 2, kept=kept)
    assert keep[0].tolist() == [[False, True, False, True]]
    keep = select([SCORES([[1.0, 2.0, 9.0, 3.0]])], [row(4)], 0, kept=kept)
    assert keep[0].tolist() == [[True, True, False, True]]


def test_a_cap_moves_its_budget_to_the_other_layers():
    scores = [SCORES([[1.0, 2.0, 3.0, 4.0]]), SCORES([[5.0, 6.0, 7.0, 8.0]])]
    keep = select(scores, [row(4), row(4)], 4, caps=[1, None])
    assert [k.tolist() for k in keep] == [[[False, True, True, True]], [[False, False, False, True]]]


def test_a_floor_is_a_floor():
    """The predecessor's minimum ratio was none: a layer could lose less than it."""
    scores = [SCORES([[1.0, 2.0, 3.0, 4.0]]), SCORES([[5.0, 6.0, 7.0, 8.0]])]
    keep = select(scores, [row(4), row(4)], 4, floors=[None, 2])
    assert [k.tolist() for k in keep] == [[[False, False, True, True]], [[False, False, True, True]]]


def test_a_floor_takes_the_fewest_whole_units_that_reach_it():
    """Units of 3, 3, 3 and 1 elements; the last has the lowest score. A floor of 2 takes it and one of 3."""
    grid = row(4, 3, last=1)
    scores = SCORES([[2.0, 3.0, 4.0, 1.0]])
    for floor, gone in ((1, {3}), (2, {3, 0}), (4, {3, 0}), (5, {3, 0, 1}), (10, {0, 1, 2, 3})):
        keep = select([scores], [grid], 0, floors=[floor])
        assert {i for i in range(4) if not keep[0][0, i]} == gone


def test_a_held_layer_loses_nothing_more():
    kept = [SCORES([[False, True, True]]), SCORES([[True, True, True]])]
    scores = [SCORES([[5.0, 0.0, 0.0]]), SCORES([[1.0, 2.0, 3.0]])]
    keep = select(scores, [row(3), row(3)], 3, kept=kept, caps=[0, None])
    assert [k.tolist() for k in keep] == [[[False, True, True]], [[False, False, True]]]


def test_scores_are_not_changed():
    scores = SCORES([[1.0, 2.0]])
    select([scores], [row(2)], 1, kept=[SCORES([[False, True]])], caps=[1], floors=[1])
    assert scores.tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_score_is_refused(bad):
    with pytest.raises(NonFiniteScoreError, match=r"layer 1 \(1 units\)"):
        select([torch.zeros(1, 2), SCORES([[bad, 1.0]])], [row(2), row(2)], 1)


def test_the_refusal_names_layers_and_step():
    counts = count_non_finite([torch.zeros(1, 2), SCORES([[math.nan, math.inf]])])
    assert counts.tolist() == [0, 2]
    with pytest.raises(NonFiniteScoreError, match=r"at step 7.*encoder\.0 \(2 units\)"):
        refuse_non_finite(counts.tolist(), ["head", "encoder.0"], step=7)
    assert count_non_finite([]).tolist() == []
    refuse_non_finite([0, 0], ["a", "b"])


def oracle(scores, grids, budget, pruned, floors, caps):
    """The documented rule, one unit at a time, in Python integers and floats."""
    sizes = [grid.sizes().flatten().tolist() for grid in grids]
    units = [
        (-math.inf if gone else score, -layer, -index)
        for layer, (layer_scores, layer_gone) in enumerate(zip(scores, pruned, strict=True))
        for index, (score, gone) in enumerate(
            zip(layer_scores.flatten().tolist(), layer_gone.flatten().tolist(), strict=True)
        )
    ]

    def size(unit):
        return sizes[-unit[1]][-unit[2]]

    def prefix(order, limit):
        taken, total = [], 0
        for unit in order:
            if total + size(unit) > limit:
                break
            taken.append(unit)
            total += size(unit)
        return taken

    forced = {unit for unit in units if unit[0] == -math.inf}
    barred = set()
    for layer in range(len(grids)):
        order = sorted(unit for unit in units if -unit[1] == layer)
        if caps[layer] is not None:
            barred |= set(order) - set(prefix(order, caps[layer]))
        if floors[layer]:
            total = 0
            for unit in order:
                if total >= floors[layer]:
                    break
                forced.add(unit)
                total += size(unit)
    barred -= forced
    front = sorted(unit for unit in units if unit in forced)
    order = front + sorted(unit for unit in units if unit not in forced and unit not in barred)
    gone = forced | set(prefix(order, budget))
    keep = [torch.ones(grid.shape, dtype=torch.bool) for grid in grids]
    for unit in gone:
        keep[-unit[1]].view(-1)[-unit[2]] = False
    return keep


@st.composite
def selections(draw):
    """A few small layers with ties, ragged units, floors, caps and units that have gone."""
    grids, scores, pruned, floors, caps = [], [], [], [], []
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
        block = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
        grid = UnitGrid.of_blocks(shape, block)
        values = draw(st.lists(st.integers(-2, 4), min_size=grid.units, max_size=grid.units))
        gone = draw(st.lists(st.booleans(), min_size=grid.units, max_size=grid.units))
        bounded = draw(st.sampled_from(["none", "cap", "floor", "both"]))
        low, high = sorted(draw(st.tuples(st.integers(0, grid.elements), st.integers(0, grid.elements))))
        grids.append(grid)
        scores.append(torch.tensor(values, dtype=torch.float32).view(grid.shape) / 2)
        pruned.append(torch.tensor(gone).view(grid.shape))
        floors.append(low if bounded in ("floor", "both") else None)
        caps.append(high if bounded in ("cap", "both") else None)
    budget = draw(st.integers(0, sum(grid.elements for grid in grids) + 2))
    if draw(st.booleans()):
        pruned = [torch.zeros_like(gone) for gone in pruned]
    return scores, grids, budget, pruned, floors, caps


@settings(max_examples=400)
@given(selections())
def test_selection_is_what_the_oracle_says(case):
    scores, grids, budget, pruned, floors, caps = case
    expected = oracle(scores, grids, budget, pruned, floors, caps)
    kept = [~gone for gone in pruned]
    if budget % 2:
        bits = [pack_mask(mask) for mask in kept]
        actual = select(scores, grids, budget, kept=bits, floors=floors, caps=caps, packed=True)
        actual = [unpack_mask(mask, wanted.shape) for mask, wanted in zip(actual, expected, strict=True)]
    else:
        actual = select(scores, grids, budget, kept=kept, floors=floors, caps=caps)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


@given(selections(), st.lists(st.integers(0, 60), min_size=3, max_size=3))
def test_budgets_of_their_own_are_searched_together_as_alone(case, budgets):
    scores, grids, _, pruned, floors, caps = case
    kept, budgets = [~gone for gone in pruned], budgets[: len(grids)]
    together = select(scores, grids, budgets, kept=kept, floors=floors, caps=caps)
    layers = zip(scores, grids, budgets, kept, floors, caps, strict=True)
    for mine, (score, grid, budget, own, floor, cap) in zip(together, layers, strict=True):
        (alone,) = select([score], [grid], budget, kept=[own], floors=[floor], caps=[cap])
        assert torch.equal(mine, alone)


def test_the_oracle_can_tell_a_wrong_tie():
    scores, grids = [torch.ones(1, 2)], [row(2)]
    expected = oracle(scores, grids, 1, [torch.zeros(1, 2, dtype=torch.bool)], [None], [None])
    assert not torch.equal(expected[0], torch.tensor([[False, True]]))


@given(selections())
def test_a_larger_budget_prunes_a_superset(case):
    scores, grids, budget, pruned, floors, caps = case
    less = select(scores, grids, budget, kept=[~gone for gone in pruned], floors=floors, caps=caps)
    more = select(scores, grids, budget + 3, kept=[~gone for gone in pruned], floors=floors, caps=caps)
    assert all(bool((a | ~b).all()) for a, b in zip(less, more, strict=True))


def demand(units, size, floor=None, cap=None, last=None, name="layer"):
    grid = row(units, size, last)
    return Demand(name, grid.elements, grid, floor, cap)


def test_caps_below_the_target_are_refused_with_numbers():
    demands = [demand(10, 4, cap=12), demand(10, 4, cap=12)]
    with pytest.raises(BudgetError) as error:
        check_feasible(demands, 40, 0.5)
    for number in ("0.5", "40 of 80", "24", "0.3"):
        assert number in str(error.value)
    check_feasible(demands, 24, 0.3)


def test_floors_above_the_target_are_refused_with_numbers():
    with pytest.raises(BudgetError) as error:
        check_feasible([demand(10, 4, floor=30), demand(10, 4)], 20, 0.25)
    for number in ("0.25", "20 of 80", "32", "0.4"):
        assert number in str(error.value)


def test_a_floor_above_its_own_cap_is_refused():
    with pytest.raises(BudgetError, match="encoder: the floor"):
        check_feasible([demand(10, 4, floor=20, cap=16, name="encoder")], 16, 0.4)


def test_a_floor_above_what_the_pattern_can_prune_is_refused():
    grid = UnitGrid(4, 2, 1, 1, 2, 2)  # 2:4 of 8 inputs
    with pytest.raises(BudgetError, match="the pattern allows 16"):
        check_feasible([Demand("layer", 32, grid, floor=20)], 16, 0.5)


def test_whole_units_count_not_elements():
    """A cap of 18 of 36 elements is 4 units of 4; two such layers cannot give the 36 of 72 that 0.5 asks for."""
    demands = [demand(9, 4, cap=18), demand(9, 4, cap=18)]
    with pytest.raises(BudgetError, match="caps allow 32"):
        check_feasible(demands, 36, 0.5)
    check_feasible([demand(10, 4, cap=20), demand(10, 4, cap=20)], 40, 0.5)


def test_the_last_short_group_of_a_pattern_is_no_contradiction():
    grid = UnitGrid(4, 2, 1, 1, 1, 1)  # 1:4 of 10 inputs: the last 2 lose none
    check_feasible([Demand("layer", 40, grid)], 10, 0.25)


def test_the_largest_unit():
    assert largest_unit(UnitGrid.of_blocks((10, 3), (4, 2))) == 8
    assert largest_unit(UnitGrid.of_blocks((3, 3), (4, 2))) == 6


@settings(max_examples=300)
@given(st.data())
def test_what_is_called_feasible_is_reached_and_what_is_refused_is_not(data):
    """Equal units: the check says exactly what selection can do."""
    size = data.draw(st.integers(1, 4))
    demands, scores = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        units = data.draw(st.integers(1, 8))
        low, high = sorted(data.draw(st.tuples(*[st.integers(0, units * size)] * 2)))
        demands.append(
            demand(units, size, data.draw(st.sampled_from([None, low])), data.draw(st.sampled_from([None, high])))
        )
        values = data.draw(st.lists(st.integers(0, 3), min_size=units, max_size=units))
        scores.append(torch.tensor([values], dtype=torch.float32))
    grids = [d.grid for d in demands]
    budget = data.draw(st.integers(0, sum(d.elements for d in demands)))
    keep = select(scores, grids, budget, floors=[d.floor for d in demands], caps=[d.cap for d in demands])
    gone = [size * int((~k).sum()) for k in keep]
    honoured = (
        all((d.floor or 0) <= n and (d.cap is None or n <= d.cap) for d, n in zip(demands, gone, strict=True))
        and sum(gone) == budget // size * size
    )
    try:
        check_feasible(demands, budget, 0.5)
    except BudgetError:
        assert not honoured
    else:
        assert honoured


def test_normalized_layers_have_one_scale_and_keep_signs_zeros_and_infinities():
    layers = [torch.tensor([3.0, -4.0]), torch.zeros(2, 2), torch.tensor([2.0, math.inf, -math.inf]), torch.empty(0)]
    l2, zeros, infinite, empty = normalize_scores(layers, "l2")
    assert torch.equal(l2, torch.tensor([0.6, -0.8]))
    assert torch.equal(zeros, torch.zeros(2, 2))
    assert infinite.tolist() == [1.0, math.inf, -math.inf]
    assert empty.shape == (0,)
    largest = normalize_scores(layers, "max")
    assert torch.equal(largest[0], torch.tensor([0.75, -1.0]))
    assert normalize_scores(layers, "none")[0] is layers[0]
    with pytest.raises(ValueError, match="none, l2 or max, got 'l1'"):
        normalize_scores(layers, "l1")


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_normalizing_neither_underflows_nor_overflows(size):
    scores = torch.tensor([3.0, 4.0]) * size
    assert torch.allclose(normalize_scores([scores], "l2")[0], torch.tensor([0.6, 0.8]))


def test_bf16_scores_hold_what_fp16_loses_and_ties_are_cut_exactly():
    small = torch.tensor([1e-9, 2e-9])
    assert small.half().count_nonzero() == 0
    assert small.bfloat16().unique().numel() == 2
    scores = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)).mul(1e-9).bfloat16().float()
    assert scores.unique().numel() < 1500
    grid = UnitGrid.of_blocks((40, 50), (1, 1))
    masks = select([scores], [grid], 777)
    assert int((~masks[0]).sum()) == 777
    assert scores[~masks[0]].max() <= scores[masks[0]].min()
