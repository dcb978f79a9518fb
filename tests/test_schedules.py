"""Schedules against closed forms that are written out here, and the times at which masks are updated."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritprune.errors import ConfigError, UnknownNameError
from tritprune.schedules import (
    PruneTimes,
    Schedule,
    get_schedule,
    register_schedule,
    resolve_step,
    resolve_steps,
    schedules,
)

NAMES = ("linear", "cos", "exp", "cube", "cubic", "one_shot")

# (name, x, initial, target, value worked out by hand)
VALUES = [
    ("linear", 0.25, 0.0, 0.8, 0.2),
    ("linear", 0.5, 0.2, 0.8, 0.5),
    ("cos", 0.5, 0.0, 1.0, 1 - math.sqrt(0.5)),
    ("cos", 2 / 3, 0.1, 0.9, 0.5),  # cos(60 degrees) = 1/2
    ("exp", 0.5, 0.0, 0.75, 0.5),  # density 1 -> 1/2 -> 1/4
    ("exp", 0.5, 0.36, 0.84, 0.68),  # density 0.64 -> 0.32 -> 0.16
    ("cube", 0.5, 0.0, 0.8, 0.1),
    ("cube", 0.5, 0.1, 0.9, 0.2),
    ("cubic", 0.5, 0.0, 0.8, 0.7),
    ("cubic", 0.5, 0.1, 0.9, 0.8),
    ("one_shot", 0.0, 0.0, 0.6, 0.6),
    ("one_shot", 0.5, 0.0, 0.6, 0.6),
]


@pytest.mark.parametrize(("name", "x", "initial", "target", "expected"), VALUES)
def test_a_schedule_is_its_closed_form(name, x, initial, target, expected):
    assert get_schedule(name).sparsity(x, initial, target) == pytest.approx(expected, abs=1e-12)


def test_every_schedule_is_checked_above():
    assert set(NAMES) == {value[0] for value in VALUES} <= set(schedules.names())


sparsities = st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)).map(sorted)


@pytest.mark.parametrize("name", NAMES)
@given(ends=sparsities)
def test_both_ends_are_exact(name, ends):
    initial, target = ends
    schedule = get_schedule(name)
    assert schedule.sparsity(1.0, initial, target) == target
    assert schedule.sparsity(1.5, initial, target) == target
    if name != "one_shot":
        assert schedule.sparsity(0.0, initial, target) == initial


@pytest.mark.parametrize("name", NAMES)
@given(ends=sparsities, xs=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_a_schedule_rises(name, ends, xs):
    schedule = get_schedule(name)
    low, high = (schedule.sparsity(x, *ends) for x in xs)
    assert low <= high + 1e-12


def test_cube_starts_slowly_and_cubic_fast():
    cube, cubic = get_schedule("cube"), get_schedule("cubic")
    assert cube.sparsity(0.1) < 0.01
    assert cubic.sparsity(0.1) > 0.25


def test_an_unknown_schedule_shows_the_choices():
    with pytest.raises(UnknownNameError, match=r"did you mean 'cubic'.*known: .*one_shot"):
        get_schedule("cubik")
    with pytest.raises(ConfigError, match="has no key 'power'"):
        get_schedule({"name": "cubic", "power": 3})


def test_a_schedule_of_ones_own():
    @register_schedule("test_square")
    class Square(Schedule):
        def curve(self, x, initial, target):
            return initial + (target - initial) * x**2

    assert get_schedule({"name": "test_square"}).sparsity(0.5, 0.0, 0.8) == pytest.approx(0.2)
    assert isinstance(get_schedule(Square()), Square)


def test_times_include_start_and_end_even_if_the_frequency_does_not_divide():
    times = PruneTimes(start=2, end=11, frequency=4)
    assert [step for step in range(20) if times.due(step)] == [2, 6, 10, 11]
    assert times.progress(2) == 0
    assert times.progress(6) == pytest.approx(4 / 9)
    assert times.progress(11) == 1
    assert [times.latest(step) for step in (0, 1, 2, 5, 6, 10, 11, 50)] == [None, None, 2, 2, 6, 10, 11, 11]


def test_a_one_shot_time():
    times = PruneTimes(start=5, end=5, frequency=3)
    assert [step for step in range(12) if times.due(step)] == [5]
    assert times.progress(5) == 1


@given(start=st.integers(0, 30), length=st.integers(0, 50), frequency=st.integers(1, 20))
def test_the_last_time_is_the_end_and_latest_is_due(start, length, frequency):
    times = PruneTimes(start, start + length, frequency)
    due = [step for step in range(start + length + 5) if times.due(step)]
    assert due[0] == start
    assert due[-1] == times.last == start + length
    for step in range(start + length + 5):
        assert times.latest(step) == max((d for d in due if d <= step), default=None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((15, 12, 1), ["start_step=15", "end_step=12"]),
        ((0, 10, 0), ["frequency", "0"]),
        ((-1, 10, 1), ["start_step", "-1"]),
        ((0, 0.6, 1), ["end_step", "0.6", "resolve_step"]),
        ((0, None, 1), ["end_step", "None"]),
        ((0, True, 1), ["end_step", "True"]),
    ],
)
def test_times_that_cannot_be(arguments, said):
    with pytest.raises(ConfigError) as error:
        PruneTimes(*arguments)
    assert all(word in str(error.value) for word in said)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0), (17, 17), (0.6, 240), (1.0, 400), (0.0, 0), (0.29, 116), ("2ep", 200), ("0.5ep", 50), (" 1 ep ", 100)],
)
def test_steps_as_numbers_fractions_and_epochs(value, expected):
    assert resolve_step(value, total_steps=400, steps_per_epoch=100) == expected


def test_a_fraction_is_decimal_not_binary():
    assert int(0.29 * 100) == 28
    assert resolve_step(0.29, total_steps=100) == 29


@pytest.mark.parametrize("value", [1.5, -0.1, "soon", "2", None, True, [1]])
def test_steps_that_are_none_of_these(value):
    with pytest.raises(ConfigError):
        resolve_step(value, total_steps=400, steps_per_epoch=100)


@pytest.mark.parametrize(("value", "missing"), [(0.5, "total_steps"), ("1ep", "steps_per_epoch")])
def test_a_fraction_needs_the_length_of_training(value, missing):
    with pytest.raises(ConfigError, match=missing):
        resolve_step(value)


def test_a_pruners_settings_are_resolved_with_those_of_its_groups():
    settings = {"end_step": 0.5, "frequency": 2, "groups": [{"start_step": "1ep"}, {"end_step": 7, "pattern": "4x1"}]}
    assert resolve_steps(settings, total_steps=40, steps_per_epoch=10) == {
        "end_step": 20, "frequency": 2, "groups": [{"start_step": 10}, {"end_step": 7, "pattern": "4x1"}],
    }  # fmt: skip
    assert resolve_steps({"end_step": 3}) == {"end_step": 3}
    with pytest.raises(ConfigError, match=r"pruner.end_step=41 is past .*max_steps=40"):
        resolve_steps({"groups": [{"end_step": 41}]}, total_steps=40, total_is="max_steps")


@pytest.mark.parametrize("groups", [None, [], "attention", 3, [1, 2], {"include": []}])
def test_groups_that_are_none_are_left_to_the_pruner(groups):
    assert resolve_steps({"end_step": 0.5, "groups": groups}, total_steps=4) == {"end_step": 2, "groups": groups}
