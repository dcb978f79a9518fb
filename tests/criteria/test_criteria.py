"""Criteria against their formulas, element by element; non-finite gradients; the random control; one's own."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritprune.criteria import (
    Criterion,
    Random,
    SnipMomentum,
    criteria,
    get_criterion,
    reduce_units,
    register_criterion,
)
from tritprune.errors import ConfigError, UnknownNameError
from tritprune.kernels import UnitGrid

WEIGHT = torch.tensor([[1.0, -2.0], [3.0, 0.0], [-4.0, 0.5]])
GRADIENT = torch.tensor([[0.5, 1.0], [-1.0, 7.0], [0.0, -2.0]])
CPU = torch.device("cpu")


def score(criterion, block, reduce="mean", weight=WEIGHT, gradient=GRADIENT, state=None):
    grid = UnitGrid.of_blocks(tuple(weight.shape), block)
    scores = criterion.initial_scores("layer", grid, CPU, 0) if state is None else state
    skipped = torch.zeros(1, dtype=torch.int64)
    gradients = [gradient] if criterion.needs_gradient else None
    criterion.accumulate_([scores], skipped, [weight], gradients, [block], reduce)
    return scores, int(skipped)


ELEMENTS = [
    ("magnitude", [[1, 2], [3, 0], [4, 0.5]]),
    ("gradient", [[0.5, 1], [1, 7], [0, 2]]),
    ("snip", [[0.5, 2], [3, 0], [0, 1]]),
    ("snip_momentum", [[0.5, 2], [3, 0], [0, 1]]),
    ("snip_momentum_block", [[0.5, 2], [3, 0], [0, 1]]),
    ("taylor", [[0.25, 4], [9, 0], [0, 1]]),
    ("retrain_free", [[0.25, 4], [9, 0], [0, 1]]),
    ("movement", [[-0.5, 2], [3, 0], [0, 1]]),
]

BLOCKS = [  # 2x1 with mean: rows 0 and 1 make a unit of two, row 2 a unit of one; w g is [.5, -2], [-3, 0], [0, -1]
    ("snip_momentum", [[1.75, 1], [0, 1]]),
    ("snip_momentum_block", [[1.25, 1], [0, 1]]),
    ("taylor", [[1.5625, 1], [0, 1]]),
    ("retrain_free", [[1.5625, 1], [0, 1]]),
    ("movement", [[1.25, 1], [0, 1]]),
]


@pytest.mark.parametrize(("name", "expected"), ELEMENTS)
def test_a_criterion_is_its_formula(name, expected):
    scores, skipped = score(get_criterion(name), (1, 1))
    assert scores.tolist() == expected
    assert skipped == 0


@pytest.mark.parametrize(("name", "expected"), BLOCKS)
def test_a_block_is_its_signed_sum_where_the_mask_is_meant(name, expected):
    scores, _ = score(get_criterion(name), (2, 1))
    assert scores.tolist() == expected


@pytest.mark.parametrize(
    ("name", "second"),
    [("snip_momentum_block", 1.9 * 1.25), ("taylor", 1.9 * 1.5625), ("retrain_free", 3.125), ("movement", 2.5)],
)
def test_what_a_second_step_adds(name, second):
    scores, _ = score(get_criterion(name), (2, 1))
    scores, _ = score(get_criterion(name), (2, 1), state=scores)
    assert scores[0, 0].item() == pytest.approx(second)


def test_the_gradient_of_a_block_mask_is_what_a_mask_parameter_would_get():
    """No mask parameter is needed: autograd of one gives the same numbers."""
    torch.manual_seed(0)
    weight, inputs = torch.randn(8, 6, requires_grad=True), torch.randn(5, 6)
    mask = torch.ones(2, 6, requires_grad=True)
    torch.tanh(inputs @ (weight * mask.repeat_interleave(4, 0)).t()).sum().backward()
    scores, _ = score(get_criterion("snip_momentum_block"), (4, 1), "sum", weight.detach(), weight.grad)
    assert torch.allclose(scores, mask.grad.abs(), atol=1e-6)


def test_l2_is_the_norm_of_the_unit():
    scores, _ = score(get_criterion("magnitude"), (2, 1), "l2")
    assert scores.tolist() == [[pytest.approx(10**0.5), 2.0], [4.0, 0.5]]


def test_bf16_scores_do_not_underflow_and_round_to_nearest():
    weight, gradient = torch.full((2, 2), 1e-4), torch.full((2, 2), 1e-5)
    state = torch.zeros(2, 2, dtype=torch.bfloat16)
    scores, _ = score(get_criterion("snip_momentum"), (1, 1), weight=weight, gradient=gradient, state=state)
    assert scores.dtype == torch.bfloat16
    assert scores[0, 0] == torch.tensor(1e-9).bfloat16() > 0
    assert torch.tensor(1e-9).half() == 0


@pytest.mark.parametrize("settings", [{"alpha": 1.1}, {"beta": 0.0}])
def test_mask_gradients_out_of_range(settings):
    ((key, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"{key}.*got {value}"):
        get_criterion({"name": "taylor", **settings})


def test_momentum_keeps_nine_tenths_of_the_past_and_all_of_the_present():
    """S = 0.9 S + 1.0 |w g|; the predecessor's README printed the two numbers swapped."""
    criterion = get_criterion("snip_momentum")
    assert (criterion.alpha, criterion.beta) == (0.9, 1.0)
    scores, _ = score(criterion, (1, 1))
    scores, _ = score(criterion, (1, 1), state=scores)
    assert torch.allclose(scores, 1.9 * torch.tensor(ELEMENTS[3][1]))


@pytest.mark.parametrize("name", ["magnitude", "gradient", "snip"])
def test_criteria_without_momentum_forget(name):
    criterion = get_criterion(name)
    fresh, _ = score(criterion, (2, 1))
    again, _ = score(criterion, (2, 1), state=torch.full_like(fresh, math.inf))
    assert torch.equal(fresh, again)
    assert not criterion.every_step


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [("mean", [[1.75, 1.0], [0.0, 1.0]]), ("sum", [[3.5, 2.0], [0.0, 1.0]]), ("max", [[3.0, 2.0], [0.0, 1.0]])],
)
def test_ragged_units_count_their_true_elements(reduce, expected):
    scores, _ = score(get_criterion("snip"), (2, 1), reduce)
    assert scores.tolist() == expected


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_infinite_gradient_does_not_poison_the_momentum(bad):
    criterion = get_criterion("snip_momentum")
    gradient = GRADIENT.clone()
    gradient[0, 1] = bad
    scores, skipped = score(criterion, (1, 1), gradient=gradient)
    assert skipped == 1
    assert scores.tolist() == [[0.5, 0.0], [3.0, 0.0], [0.0, 1.0]]
    scores, skipped = score(criterion, (1, 1), state=scores)
    assert skipped == 0
    assert scores[0, 1] == 2.0


def test_small_products_do_not_underflow():
    """Scores in fp16 did: 1e-4 times 1e-5 is 0 there."""
    weight = torch.full((2, 2), 1e-4, dtype=torch.float16)
    scores, _ = score(get_criterion("snip_momentum"), (1, 1), weight=weight, gradient=torch.full((2, 2), 1e-5))
    assert scores.dtype == torch.float32
    assert float(scores.min()) > 0


@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"alpha": -0.1}, {"beta": 0.0}, {"beta": math.inf}])
def test_momentum_out_of_range(settings):
    ((key, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"{key}.*got {value}"):
        get_criterion({"name": "snip_momentum", **settings})


def test_two_criteria_of_one_process_share_nothing():
    """A mutable default made the second equal to the first."""
    first = get_criterion({"name": "snip_momentum", "alpha": 0.5})
    assert isinstance(first, SnipMomentum)
    assert get_criterion("snip_momentum").alpha == 0.9
    assert first.alpha == 0.5


def test_an_unknown_criterion_shows_the_choices():
    with pytest.raises(UnknownNameError, match=r"unknown criterion 'snipp'; did you mean 'snip'\? known: .*magnitude"):
        get_criterion("snipp")
    with pytest.raises(ConfigError, match="has no key 'alfa'; did you mean 'alpha'"):
        get_criterion({"name": "snip_momentum", "alfa": 0.9})
    assert {"magnitude", "gradient", "snip", "snip_momentum", "random"} <= set(criteria.names())


def draw(name, seed=0, shape=(6, 5), own=None):
    return Random(own).initial_scores(name, UnitGrid.of_blocks(shape, (1, 1)), CPU, seed)


def test_random_scores_depend_on_seed_and_layer_only():
    assert torch.equal(draw("encoder.0"), draw("encoder.0"))
    assert not torch.equal(draw("encoder.0"), draw("encoder.1"))
    assert not torch.equal(draw("encoder.0"), draw("encoder.0", seed=1))
    assert torch.equal(draw("encoder.0", seed=1), draw("encoder.0", seed=2, own=1))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    draw("encoder.0")
    assert torch.equal(before, torch.random.get_rng_state())


def test_random_scores_are_drawn_once():
    criterion = get_criterion("random")
    scores, _ = score(criterion, (1, 1))
    again, _ = score(criterion, (1, 1), state=scores.clone(), weight=WEIGHT * 5)
    assert torch.equal(scores, again)
    assert 0 <= float(scores.min()) <= float(scores.max()) < 1


def reduced_by_hand(values, block, reduce):
    n, m = block
    rows = [values[i : i + n] for i in range(0, values.shape[0], n)]
    units = [[part[:, j : j + m] for j in range(0, values.shape[1], m)] for part in rows]
    number = {"mean": lambda u: u.mean(), "sum": lambda u: u.sum(), "max": lambda u: u.max()}[reduce]
    return torch.tensor([[float(number(unit)) for unit in line] for line in units])


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    reduce=st.sampled_from(["mean", "sum", "max"]),
    seed=st.integers(0, 100),
)
def test_units_of_ones_own_scores_keep_their_sign_and_size(shape, block, reduce, seed):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    actual = reduce_units(values, block, reduce)
    assert torch.allclose(actual, reduced_by_hand(values, block, reduce), atol=1e-5)


@register_criterion("test_cautious")
class Cautious(Criterion):
    def element_scores(self, weight, gradient):
        return weight.abs() * (1 + gradient.abs())


def test_a_criterion_of_ones_own():
    gradient = GRADIENT.clone()
    gradient[2, 0] = math.nan
    scores, skipped = score(get_criterion("test_cautious"), (1, 1), gradient=gradient)
    assert scores.tolist() == [[1.5, 4.0], [6.0, 0.0], [0.0, 1.5]]
    assert skipped == 1


def test_momentum_of_ones_own():
    class Slow(Cautious):
        every_step, alpha = True, 0.5

    scores, _ = score(Slow(), (3, 1), "sum")
    scores, _ = score(Slow(), (3, 1), "sum", state=scores)
    assert scores.tolist() == [[1.5 * (1.5 + 6 + 4), 1.5 * (4 + 0 + 1.5)]]


def test_half_precision_reaches_ones_own_criterion_as_fp32():
    seen = []

    class Looks(Criterion):
        needs_gradient = False

        def element_scores(self, weight, gradient):
            seen.append((weight.dtype, gradient))
            return weight

    score(Looks(), (1, 1), weight=WEIGHT.bfloat16())
    assert seen == [(torch.float32, None)]


def test_a_criterion_without_a_formula_says_what_is_missing():
    with pytest.raises(ConfigError, match="must override element_scores"):
        score(Criterion(), (1, 1))


def test_a_criterion_that_gives_another_shape_is_refused():
    class Wrong(Criterion):
        def element_scores(self, weight, gradient):
            return weight[:1]

    with pytest.raises(ConfigError, match=r"\[1, 2\].*\[3, 2\]"):
        score(Wrong(), (1, 1))
