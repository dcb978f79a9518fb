import pytest

from tritprune.errors import ConfigError, UnknownNameError
from tritprune.registry import Registry, did_you_mean


class Point:
    def __init__(self, x: int, *, y: int = 2) -> None:
        self.x, self.y = x, y


@pytest.fixture
def shapes() -> Registry[object]:
    registry = Registry[object]("shape")
    registry.register("point")(Point)
    registry.register("pair")(lambda **anything: anything)
    return registry


def test_builds_from_a_name_and_from_a_mapping(shapes):
    point = shapes.build({"name": "point", "x": 1})
    assert (point.x, point.y) == (1, 2)
    assert shapes.build("pair", a=3) == {"a": 3}


def test_an_unknown_name_shows_the_nearest_and_all(shapes):
    with pytest.raises(UnknownNameError, match=r"unknown shape 'pont'; did you mean 'point'\? known: pair, point"):
        shapes.get("pont")


def test_an_unknown_key_shows_the_accepted_ones(shapes):
    with pytest.raises(ConfigError, match=r"shape 'point' has no key 'z'; .*known: x, y"):
        shapes.build({"name": "point", "x": 1, "z": 3})


def test_a_missing_argument_is_named(shapes):
    with pytest.raises(ConfigError, match="shape 'point' needs x"):
        shapes.build("point")


def test_a_mapping_without_a_name_is_refused(shapes):
    with pytest.raises(ConfigError, match="shape has no name"):
        shapes.build({"x": 1})


def test_a_name_cannot_be_taken_twice_by_different_things(shapes):
    with pytest.raises(ConfigError, match="registered already"):
        shapes.register("point")(Registry)
    shapes.register("point")(Point)  # the same thing again, as after a module is reloaded


def test_nothing_near_means_no_suggestion():
    assert did_you_mean("zzz", ["alpha", "beta"]) == "known: alpha, beta"
