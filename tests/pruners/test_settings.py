"""Everything that can be refused is refused in the constructor, with the choices or the numbers."""

import pytest
import torch

from tritprune.criteria import Snip
from tritprune.errors import ConfigError, UnknownNameError
from tritprune.patterns import BlockPattern
from tritprune.pruners import Pruner, get_pruner, pruners
from tritprune.schedules import Schedule


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_sparsity": 1.0}, ["target_sparsity", "[0, 1)", "1.0"]),
        ({"target_sparsity": 1.2}, ["1.2"]),
        ({"target_sparsity": -0.1}, ["-0.1"]),
        ({"target_sparsity": float("nan")}, ["nan"]),
        ({"target_sparsity": "0.5"}, ["target_sparsity is a number", "'0.5'"]),
        ({"initial_sparsity": 0.95}, ["0.95", "0.9"]),
        ({"start_step": 15, "end_step": 12}, ["15", "12"]),
        ({"frequency": 0}, ["frequency", "0"]),
        ({"end_step": None}, ["end_step", "None"]),
        ({"end_step": 0.6}, ["end_step", "0.6", "resolve_step"]),
        ({"scope": "globl"}, ["global, local", "globl"]),
        ({"reduce": "median"}, ["median", "mean, sum"]),
        ({"regrow": "yes"}, ["regrow is true or false", "'yes'"]),
        ({"min_layer_sparsity": -0.1}, ["min_layer_sparsity", "-0.1"]),
        ({"max_layer_sparsity": 1.1}, ["max_layer_sparsity", "1.1"]),
        ({"pattern": "5:4"}, ["0 < N < M", "5:4"]),
        ({"pattern": "2:4", "target_sparsity": 0.7}, ["0.7", "0.5", "2:4"]),
        ({"pattern": "1:4", "target_sparsity": 0.26}, ["0.26", "0.25", "1:4"]),
        ({"pattern": "2:4", "reduce": "max", "target_sparsity": 0.5}, ["2:4", "max", "mean, sum"]),
        ({"pattern": "1:16", "target_sparsity": 0.05}, ["1:16", "no unit", "first [10, 13]"]),
        ({"criterion": "snip", "schedule": "one_shot"}, ["step 0", "Snip", "start at step 1"]),
        ({"criterion": "gradient", "initial_sparsity": 0.1}, ["step 0", "0.1", "Gradient"]),
        ({"criterion": "snip", "end_step": 0}, ["step 0", "0.9", "Snip"]),
        ({"groups": {"name": "a"}}, ["groups is a list of mappings"]),
        ({"groups": "attention"}, ["groups is a list of mappings", "'attention'"]),
        ({"groups": ["attention"]}, ["groups is a list of mappings", "['attention']"]),
        ({"groups": [{"name": "a", "includ": ["first"]}]}, ["'a'", "includ", "did you mean 'include'"]),
        ({"groups": [{"name": "a"}, {"name": "a"}]}, ["two pruner groups", "'a'"]),
        ({"groups": [{"name": "a", "target_sparsity": 2}]}, ["group 'a'", "2"]),
        ({"groups": [{"name": 3}]}, ["name is a word", "3"]),
        ({"groups": [{"name": "a"}, {"name": "b"}]}, ["first is in two pruner groups, 'a' and 'b'"]),
    ],
)
def test_settings_that_cannot_be(net, settings, said):
    with pytest.raises(ConfigError) as error:
        Pruner(net, **{"end_step": 10, **settings})
    assert [word for word in said if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"criterion": "snipp"}, "unknown criterion 'snipp'; did you mean 'snip'"),
        ({"pattern": "blok"}, "unknown pattern 'blok'; did you mean 'block'"),
        ({"schedule": "cubik"}, "unknown schedule 'cubik'; did you mean 'cubic'"),
    ],
)
def test_unknown_names(net, settings, said):
    with pytest.raises(UnknownNameError, match=said):
        Pruner(net, end_step=10, **settings)


@pytest.mark.parametrize("values", [1.3, -0.2, 0.95])
def test_a_schedule_that_leaves_its_range_is_refused(net, values):
    class Wild(Schedule):
        def curve(self, x, initial, target):
            return values

    with pytest.raises(ConfigError, match=f"Wild asks for sparsity {values:g} at step 1"):
        Pruner(net, end_step=10, schedule=Wild())


def test_objects_and_mappings_are_accepted(net):
    pruner = Pruner(
        net, end_step=5, criterion=Snip(), pattern=BlockPattern(2, 2), schedule={"name": "linear"}, start_step=1
    )
    assert {layer.pattern for layer in pruner.layers} == {"2x2"}


def test_a_block_larger_than_a_layer_is_one_ragged_unit(net):
    pruner = Pruner(net, end_step=1, pattern="8x1", target_sparsity=0.5)
    assert [(layer.name, layer.unit, layer.units) for layer in pruner.layers] == [
        ("first", "8x1", 26),
        ("second", "7x1", 10),
    ]


@pytest.mark.parametrize(
    ("pattern", "said"), [("64x1", "64 outputs .* first, has 10; .*n=channel"), ("1x64", "64 inputs .* first, has 13")]
)
def test_a_block_that_divides_no_layer_is_refused_with_the_numbers(net, pattern, said):
    with pytest.raises(ConfigError, match=said):
        Pruner(net, end_step=1, pattern=pattern, target_sparsity=0.5)


def test_the_registry_of_pruners(net):
    assert {"iterative", "one_shot"} <= set(pruners)
    assert isinstance(get_pruner("iterative", model=net, end_step=3), Pruner)
    with pytest.raises(UnknownNameError, match="unknown pruner 'iteratve'; did you mean 'iterative'"):
        get_pruner("iteratve", model=net)
    for name in ("iterative", "one_shot"):
        with pytest.raises(ConfigError, match="has no key 'sparsity'; did you mean 'target_sparsity'"):
            get_pruner({"name": name, "sparsity": 0.5}, model=net, end_step=1)
    with pytest.raises(ConfigError, match="needs end_step"):
        get_pruner("iterative", model=net)


def test_one_shot(net, sgd, train):
    pruner = get_pruner({"name": "one_shot", "target_sparsity": 0.5, "pattern": "1x1", "schedule": "cubic"}, model=net)
    assert (pruner.final_step, pruner.target_at(0), pruner.target_at(1)) == (1, 0.0, 0.5)
    optimizer = sgd(net)
    pruner.attach(optimizer)
    assert pruner.last_event is None
    train(net, optimizer, 3)
    assert pruner.last_event.step == 1
    assert pruner.sparsity().prunable.sparsity == 0.5
    with pytest.raises(ConfigError, match="end_step=1 is before start_step=2"):
        get_pruner({"name": "one_shot", "start_step": 2, "end_step": 1}, model=net)


def test_one_shot_goes_on_only_to_regrow(net):
    """A config may bring an end_step of the iterative pruner; without regrowing nothing could change until then."""
    config = {"name": "one_shot", "start_step": 2, "end_step": 9, "frequency": 3}
    assert get_pruner(config, model=net).final_step == 2
    pruner = get_pruner({**config, "regrow": True}, model=net)
    assert (pruner.final_step, pruner.target_at(1), pruner.target_at(2), pruner.target_at(9)) == (9, 0.0, 0.9, 0.9)


def test_one_shot_in_groups(net):
    groups = [{"include": ["first"]}, {"include": ["second"], "start_step": 4, "target_sparsity": 0.5}]
    pruner = get_pruner({"name": "one_shot", "groups": groups, "end_step": 12}, model=net)
    assert pruner.final_step == 4
    assert [group.target_at(step) for group in pruner._groups for step in (0, 1, 3, 4)] == [
        0,
        0.9,
        0.9,
        0.9,
        0,
        0,
        0,
        0.5,
    ]


def test_shared_defaults_are_not_changed_by_a_group(net):
    """A mutable default made the second config of a process equal to the first."""
    groups = [{"name": "a", "include": ["first"], "pattern": {"name": "block", "n": 2, "m": 1}}]
    copied = [dict(groups[0])]
    first = Pruner(net, end_step=4, groups=groups)
    second = Pruner(net, end_step=4)
    assert groups == copied
    assert {layer.pattern for layer in first.layers} == {"2x1"}
    assert {layer.pattern for layer in second.layers} == {"4x1"}


def test_one_pattern_object_may_serve_two_groups(net):
    pattern = BlockPattern(1, 1)
    pruner = Pruner(
        net,
        end_step=1,
        groups=[
            {"include": ["first"], "pattern": pattern, "reduce": "max"},
            {"include": ["second"], "pattern": pattern, "reduce": "sum"},
        ],
    )
    assert [group.pattern.reduce for group in pruner._groups] == ["max", "sum"]
    assert pattern.reduce == "mean"


def test_groups_may_bring_their_own_end(net):
    groups = [{"include": ["first"], "end_step": 4}, {"include": ["second"], "end_step": 9}]
    assert Pruner(net, end_step=None, groups=groups).final_step == 9


def test_weights_on_two_devices_are_refused(net):
    pruner = Pruner(net, end_step=1)
    net.second.to("meta")
    optimizer = torch.optim.SGD([net.first.weight], lr=0.1)
    with pytest.raises(ConfigError, match="several devices"):
        pruner.attach(optimizer)
