"""Achieved sparsity equals the target to the exact unit: patterns x scopes x criteria, with ties and ragged units."""

import itertools

import pytest
import torch
from torch import nn

from tritprune.errors import BudgetError, ConfigError
from tritprune.pruners import Pruner
from tritprune.selection import exact_budget

CRITERIA = ("magnitude", "gradient", "snip", "snip_momentum", "random")
SIZES = {"first": (10, 13), "second": (7, 10)}


def zeros_in_weights(model, name):
    return int((model.get_submodule(name).weight == 0).sum())


def check_report(model, pruner):
    """Event, report and the weights themselves tell the same story."""
    event, report = pruner.last_event, {row["name"]: row for row in pruner.layer_report()}
    total = 0
    for name, count in event.layers.items():
        assert count.zeros == report[name]["zeros"] == zeros_in_weights(model, name)
        assert count.zeros == pruner.masks[name].zeros() == int((~pruner.masks.element_mask(name)).sum())
        assert count.kept == report[name]["kept_units"]
        assert report[name]["sparsity"] == count.zeros / count.elements
        total += count.zeros
    assert event.sparsity == total / sum(count.elements for count in event.layers.values())
    assert pruner.sparsity().prunable.zeros == total
    return total


def greedy(scores, sizes, budget):
    """Elements of the longest prefix of ascending scores (higher layer, then higher index first among equals)."""
    units = sorted(
        (score, -layer, -index, size)
        for layer, (layer_scores, layer_sizes) in enumerate(zip(scores, sizes, strict=True))
        for index, (score, size) in enumerate(zip(layer_scores, layer_sizes, strict=True))
    )
    total = 0
    for *_, size in units:
        if total + size > budget:
            break
        total += size
    return total


@pytest.mark.parametrize(
    ("pattern", "target", "scope", "criterion"),
    [
        (pattern, target, scope, criterion)
        for (pattern, target), scope, criterion in itertools.product(
            [("1x1", 0.29), ("4x1", 0.6), ("3x2", 0.5), ("channelx1", 0.4), ("1xchannel", 0.4), ("8x12", 0.5)],
            ("global", "local"),
            CRITERIA,
        )
    ],
)
def test_blocks(net, sgd, train, pattern, target, scope, criterion):
    optimizer = sgd(net)
    pruner = Pruner(
        net, pattern=pattern, target_sparsity=target, scope=scope, criterion=criterion, end_step=4, frequency=2
    ).attach(optimizer)
    grids = {name: pruner.masks[name].grid for name in SIZES}
    seen = {}
    pruner.on_update(lambda event: seen.update(event.layers))
    train(net, optimizer, 3)
    held = {name: mask.mask.clone() for name, mask in pruner.masks.items()}
    final = {}
    inner = pruner._groups[0].propose

    def spy(step):
        final.update({n: s.clone() for n, s in pruner.scores.items()})
        return inner(step)

    pruner._groups[0].propose = spy
    train(net, optimizer, 2, first=3)
    check_report(net, pruner)
    scores = {name: final[name].masked_fill(~held[name], float("-inf")).flatten().tolist() for name in SIZES}
    sizes = {name: grids[name].sizes().flatten().tolist() for name in SIZES}
    groups = [list(SIZES)] if scope == "global" else [[name] for name in SIZES]
    for names in groups:
        elements = sum(SIZES[name][0] * SIZES[name][1] for name in names)
        expected = greedy([scores[n] for n in names], [sizes[n] for n in names], exact_budget(target, elements))
        assert sum(zeros_in_weights(net, name) for name in names) == expected
        assert expected <= exact_budget(target, elements)
    assert seen.keys() == SIZES.keys()


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("pattern", "target"), [("2:4", 0.5), ("2:4", 0.25), ("1:4", 0.25), ("2:3", 0.3)])
def test_n_in_m(net, sgd, train, pattern, target, criterion, scope):
    n, m = map(int, pattern.split(":"))
    optimizer = sgd(net)
    pruner = Pruner(
        net, pattern=pattern, target_sparsity=target, scope=scope, criterion=criterion, end_step=4, frequency=1
    ).attach(optimizer)
    budget = 0
    train(net, optimizer, 5)
    total = check_report(net, pruner)
    possible = 0
    for name, (rows, columns) in SIZES.items():
        mask = pruner.masks[name].mask
        for start in range(0, columns, m):
            group = mask[:, start : start + m]
            quota = group.shape[1] * n // m
            possible += rows * quota
            assert set((~group).sum(1).tolist()) <= {0, quota}
        budget += exact_budget(target, rows * columns)
    budget = budget if scope == "local" else exact_budget(target, 200)
    if target == n / m:  # every group; short ones lose floor(L n / m)
        assert total == min(possible, budget)
    else:
        assert budget - n * (2 if scope == "local" else 1) < total <= budget


@pytest.mark.parametrize(("pattern", "unit"), [("1x1", 1), ("4x1", 4), ("channelx1", 8)])
def test_ties_do_not_over_prune(sgd, pattern, unit):
    """All scores equal: the predecessor gave 1.0 where 0.5 was asked for."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    pruner = Pruner(
        model, pattern=pattern, criterion="magnitude", target_sparsity=0.5, schedule="one_shot", end_step=0,
        exclude_head=False,
    ).attach(sgd(model))  # fmt: skip
    assert pruner.sparsity().prunable.zeros == 64
    assert pruner.last_event.flip_rate == 0.5
    first, second = pruner.masks["0"].mask, pruner.masks["1"].mask
    assert bool(first.all())  # the higher layer goes first
    assert not second.any()
    assert pruner.last_event.layers["1"].kept == 0
    assert pruner.last_event.layers["0"].kept == 64 // unit


def test_29_percent_of_100_is_29(sgd):
    model = nn.Sequential(nn.Linear(10, 10))
    Pruner(model, pattern="1x1", criterion="magnitude", target_sparsity=0.29, start_step=0, end_step=0).attach(
        sgd(model)
    )
    assert zeros_in_weights(model, "0") == 29


@pytest.mark.parametrize("schedule", ["linear", "cos", "exp", "cube", "cubic"])
def test_every_update_is_on_the_curve_and_masks_only_shrink(net, sgd, train, schedule):
    optimizer = sgd(net)
    pruner = Pruner(net, pattern="1x1", target_sparsity=0.77, schedule=schedule, end_step=11, frequency=3)
    pruner.attach(optimizer)
    events, masks = [], []
    pruner.on_update(lambda event: (events.append(event), masks.append({n: m.mask for n, m in pruner.masks.items()})))
    train(net, optimizer, 14)
    assert [event.step for event in events] == [3, 6, 9, 11]
    for event in events:
        assert event.target == pruner.target_at(event.step)
        assert round(event.sparsity * 200) == exact_budget(event.target, 200)
    assert events[-1].target == 0.77
    assert events[-1].sparsity == 154 / 200
    for earlier, later in itertools.pairwise(masks):
        assert all(bool((earlier[name] | ~later[name]).all()) for name in earlier)
    flips = [int((a["first"] ^ b["first"]).sum() + (a["second"] ^ b["second"]).sum()) for a, b in
             itertools.pairwise([{k: torch.ones_like(v) for k, v in masks[0].items()}, *masks])]  # fmt: skip
    assert [event.flip_rate for event in events] == [flip / 200 for flip in flips]


def test_caps_and_floors_hold_and_the_target_too(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(
        net, pattern="1x1", criterion="random", target_sparsity=0.6, min_layer_sparsity=0.55, max_layer_sparsity=0.65,
        end_step=6, frequency=2, exclude_head=True,
    ).attach(optimizer)  # fmt: skip
    train(net, optimizer, 7)
    counts = pruner.last_event.layers
    assert sum(c.zeros for c in counts.values()) == 120
    for count in counts.values():
        assert 0.55 <= count.zeros / count.elements <= 0.65


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "3x2"])
def test_floors_grow_with_the_schedule(net, sgd, train, pattern):
    """No update prunes more than its target asks for, and the floor holds in the end."""
    optimizer = sgd(net)
    pruner = Pruner(
        net, pattern=pattern, criterion="random", schedule="linear", target_sparsity=0.65, min_layer_sparsity=0.6,
        end_step=8,
    ).attach(optimizer)  # fmt: skip
    events = []
    pruner.on_update(events.append)
    train(net, optimizer, 8)
    assert len(events) == 8
    for event in events:
        assert sum(count.zeros for count in event.layers.values()) <= exact_budget(event.target, 200)
    assert all(count.zeros >= 0.6 * count.elements for count in events[-1].layers.values())
    assert not any(count.zeros >= 0.6 * count.elements for count in events[3].layers.values())


def test_a_cap_gives_its_budget_to_the_others(make_net, sgd):
    shares = {}
    for cap in (1.0, 0.6):
        net = make_net()
        with torch.no_grad():
            net.second.weight.mul_(1e-3)  # without a cap nearly all of it would go
        pruner = Pruner(
            net, pattern="1x1", criterion="magnitude", target_sparsity=0.5, start_step=0, end_step=0,
            max_layer_sparsity=cap,
        ).attach(sgd(net))  # fmt: skip
        shares[cap] = {n: c.zeros for n, c in pruner.last_event.layers.items()}
    assert shares[1.0] == {"first": 30, "second": 70}
    assert shares[0.6] == {"first": 58, "second": 42}


def test_a_layer_that_nearly_vanishes_is_announced_once(net, sgd, train):
    with torch.no_grad():
        net.second.weight.mul_(1e-6)
    optimizer = sgd(net, lr=1e-9)
    pruner = Pruner(net, pattern="1x1", criterion="magnitude", target_sparsity=0.5, end_step=4, schedule="linear")
    warnings = []
    pruner.on_update(lambda event: warnings.append(event.warnings))
    pruner.attach(optimizer)
    train(net, optimizer, 4)
    expected = (
        "second keeps 0 of 70 weights (density 0.00%) at step 3; max_layer_sparsity would hold it"  # 75 of 200 go
    )
    assert warnings == [(), (), (expected,), ()]


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"max_layer_sparsity": 0.3}, BudgetError, ["0.5", "0.3"]),
        ({"min_layer_sparsity": 0.7}, BudgetError, ["0.5", "0.7"]),
        ({"min_layer_sparsity": 0.6, "max_layer_sparsity": 0.4}, ConfigError, ["0.6", "0.4"]),
        ({"scope": "local", "max_layer_sparsity": 0.4}, BudgetError, ["0.5", "0.4"]),
    ],
)
def test_caps_and_floors_that_contradict_the_target(net, settings, error, said):
    with pytest.raises(error) as caught:
        Pruner(net, pattern="1x1", target_sparsity=0.5, end_step=5, **settings)
    assert all(word in str(caught.value) for word in said)
