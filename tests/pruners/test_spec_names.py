"""A loop that was written for Neural Compressor: the names of its pruners, and its functions around a step."""

from functools import partial

import pytest
import torch

from tritprune.errors import ConfigError
from tritprune.pruners import (
    HeadPruner,
    MagnitudePruner,
    Pruner,
    SnipMomentumPruner,
    SnipPruner,
    get_pruner,
    pruners,
)
from tritprune.schedules import Linear

SETTINGS = {"pattern": "4x1", "target_sparsity": 0.5, "start_step": 1, "end_step": 6, "frequency": 2}


def by_functions(pruner, model, optimizer, steps, *, attached=False):
    """The loop of Neural Compressor's documentation."""
    if attached:
        pruner.attach(optimizer)
    pruner.on_train_begin()
    pruner.on_epoch_begin(0)
    for step in range(steps):
        pruner.on_step_begin(step)
        optimizer.zero_grad()
        batch = torch.randn((8, 13), generator=torch.Generator().manual_seed(step))
        model(batch).square().mean().backward()
        pruner.on_before_optimizer_step()
        optimizer.step()
        pruner.on_after_optimizer_step()
        pruner.on_step_end()
        pruner.on_before_eval()
        model(batch)
        pruner.on_after_eval()
    pruner.on_epoch_end()
    pruner.on_train_end()
    return pruner


@pytest.mark.parametrize("attached", [False, True], ids=["functions", "functions and hooks"])
def test_the_functions_prune_as_the_hooks_do_and_count_no_step_twice(make_net, sgd, train, attached):
    hooked, called = make_net(), make_net()
    first = Pruner(hooked, **SETTINGS)
    optimizer = sgd(hooked)
    first.attach(optimizer)
    train(hooked, optimizer, 8)
    second = by_functions(Pruner(called, **SETTINGS), called, sgd(called), 8, attached=attached)
    assert second.step == second.global_step == 8
    assert second.digest() == first.digest()
    for name, weight in hooked.state_dict().items():
        assert torch.equal(weight, called.state_dict()[name])


def test_the_functions_need_no_train_begin_and_a_step_at_0_prunes(make_net, sgd):
    model = make_net()
    pruner = get_pruner("one_shot", model, criterion="magnitude", start_step=0, target_sparsity=0.5)
    pruner.on_step_begin(0)
    assert pruner.sparsity().prunable.sparsity == pytest.approx(0.5, abs=0.03)
    rival = Pruner(model, **SETTINGS)
    with pytest.raises(ConfigError, match="another pruner"):
        rival.on_train_begin()
    pruner.on_train_end()
    rival.on_train_begin()
    rival.on_train_end()


@pytest.mark.parametrize("setting", [{"reset_state": True}, {"regularizer": "group_lasso"}])
def test_what_needs_the_optimizer_cannot_be_honoured_without_it(setting, net):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} needs the optimizer: call attach"):
        Pruner(net, **SETTINGS, **setting).on_train_begin()


def test_the_attributes_have_their_names(net, sgd, train):
    pruner = Pruner(net, **SETTINGS, schedule="linear", max_layer_sparsity=0.9)
    assert list(pruner.modules) == ["first", "second"]
    assert pruner.modules["first"] is net.first
    assert (pruner.start_step, pruner.end_step, pruner.update_frequency_on_step) == (1, 6, 2)
    assert (pruner.target_sparsity_ratio, pruner.max_sparsity_ratio_per_layer) == (0.5, 0.9)
    assert pruner.pattern.label == "4x1"
    assert isinstance(pruner.scheduler, Linear)
    assert pruner.config["criterion"] == "snip_momentum"
    assert set(pruner.masks) == {"first", "second"}
    assert (pruner.global_step, pruner.current_sparsity_ratio, pruner.scores) == (0, 0, {})
    pruner.attach(optimizer := sgd(net))
    train(net, optimizer, 5)
    assert (pruner.global_step, set(pruner.scores)) == (5, {"first", "second"})
    assert 0.3 < pruner.current_sparsity_ratio == pruner.current_sparsity_ratio == pruner.sparsity().prunable.sparsity


def test_an_attribute_that_differs_between_groups_says_so(net):
    groups = [
        {"name": "one", "include": ["first"], "frequency": 2, "target_sparsity": 0.5},
        {"name": "two", "include": ["second"], "frequency": 3, "target_sparsity": 0.2},
    ]
    pruner = Pruner(net, end_step=6, groups=groups)
    with pytest.raises(ConfigError, match=r"frequency differs .*one: 2, two: 3"):
        _ = pruner.update_frequency_on_step
    assert "frequency" not in pruner.config
    assert pruner.pattern.label == "4x1"
    assert pruner.target_sparsity_ratio == pytest.approx((0.5 * 130 + 0.2 * 70) / 200)


@pytest.mark.parametrize(
    ("name", "cls", "chosen"),
    [
        ("magnitude", MagnitudePruner, "magnitude"),
        ("snip", SnipPruner, "snip"),
        ("snip_momentum", SnipMomentumPruner, "snip_momentum"),
    ],
)
def test_a_named_pruner_is_iterative_with_its_criterion(make_net, sgd, train, name, cls, chosen):
    assert pruners.get(name) is cls
    digests = []
    for make in (cls, partial(Pruner, criterion=chosen)):
        model = make_net()
        pruner = make(model, **SETTINGS).attach(optimizer := sgd(model))
        train(model, optimizer, 6)
        digests.append(pruner.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("where", ["shared", "group"])
def test_a_named_pruner_refuses_another_criterion(net, where):
    given = {"criterion": "snip"} if where == "shared" else {"groups": [{"include": ["first"], "criterion": "snip"}]}
    with pytest.raises(ConfigError, match="with criterion 'magnitude', got criterion 'snip'"):
        MagnitudePruner(net, end_step=2, **given)
    with pytest.raises(ConfigError, match="did you mean 'target_sparsity'"):
        MagnitudePruner(net, end_step=2, target_sparsty=0.3)


def test_the_head_pruner_needs_attentions(net):
    with pytest.raises(ConfigError, match="attention"):
        HeadPruner(net, end_step=2)


def test_layers_by_name_instead_of_a_model(net):
    """get_pruner(modules, config) and the other way round: exactly those layers, the classifier among them."""
    modules = {"body.first": net.first, "classifier": net.classifier}
    for pruner in (
        get_pruner(modules, {"name": "iterative", **SETTINGS}),
        get_pruner("iterative", modules, **SETTINGS),
        get_pruner(config={"name": "iterative", **SETTINGS}, modules=modules),
    ):
        assert [layer.name for layer in pruner.layers] == ["body.first", "classifier"]
    with pytest.raises(ConfigError, match="from_neural_compressor"):
        get_pruner(modules, {"pruning_type": "snip", "end_step": 3})
