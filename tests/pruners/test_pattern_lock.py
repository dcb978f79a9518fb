"""Locking: what is zero stays zero, exactly that, twice the same."""

import pytest
import torch
from torch import nn

from tritprune.errors import ConfigError
from tritprune.pruners import PatternLockPruner, Pruner


def pruned(net, pattern, target):
    pruner = Pruner(net, criterion="magnitude", pattern=pattern, target_sparsity=target, start_step=0, end_step=0)
    pruner.schedule = None
    pruner.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    pruner.detach()
    return {name: pruner.masks.element_mask(name) for name in pruner.masks}


@pytest.mark.parametrize(("pattern", "target"), [("2:4", 0.5), ("1:4", 0.25), ("4x1", 0.6), ("1x1", 0.7), ("3x5", 0.4)])
def test_a_pruned_model_stays_exactly_itself(net, train, sgd, pattern, target):
    masks = pruned(net, pattern, target)
    pruner = PatternLockPruner(net, pattern=pattern)
    for name, mask in masks.items():
        assert torch.equal(pruner.masks.element_mask(name), mask), name
    assert pruner.free_zeros == 0
    optimizer = sgd(net)
    pruner.attach(optimizer)
    train(net, optimizer, 5)
    for name, mask in masks.items():
        weight = net.get_submodule(name).weight
        assert torch.equal(weight != 0, mask), name
    assert PatternLockPruner(net, pattern=pattern).digest() == pruner.digest()
    pruner.verify()


def test_zeros_outside_the_pattern_are_free_and_counted(net):
    with torch.no_grad():
        net.first.weight[0, 0] = 0
        net.first.weight[4:8, 3] = 0
    pruner = PatternLockPruner(net, pattern="4x1")
    assert pruner.free_zeros == 1
    assert pruner.sparsity().prunable.zeros == 5
    assert pruner.target_at(10) == 4 / (130 + 70)


def test_a_dense_model_has_nothing_to_lock(net):
    with pytest.raises(ConfigError, match=r"nothing to lock: of 200 weights 0 are zero.*load a pruned model"):
        PatternLockPruner(net)
    with torch.no_grad():
        net.first.weight[0, 0] = 0
    with pytest.raises(
        ConfigError, match=r"1 are zero, and none of them fills a unit of pattern 4x1; pattern 1x1 locks"
    ):
        PatternLockPruner(net, pattern="4x1")


def test_a_group_of_three_zeros_is_locked_whole_and_one_of_one_is_free():
    layer = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[0.0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1]]))
    pruner = PatternLockPruner(layer, pattern="2:4")
    assert pruner.masks.element_mask("0").int().tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]]


def test_it_resumes(net, train, sgd):
    pruned(net, "4x1", 0.5)
    pruner = PatternLockPruner(net, pattern="4x1")
    state = pruner.state_dict()
    with torch.no_grad():
        net.first.weight.add_(1)
    pruner.load_state_dict(state)
    assert pruner.digest() == PatternLockPruner(net, pattern="4x1").digest()
