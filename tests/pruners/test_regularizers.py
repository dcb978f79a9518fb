"""Group lasso against its closed form, and what normalisation and score types change."""

import math

import pytest
import torch
from torch import nn

from tritprune.errors import ConfigError, UnknownNameError
from tritprune.patterns import WeightView
from tritprune.pruners import GroupLasso, Pruner, get_regularizer
from tritprune.selection import normalize_scores as normalize


def linear(rows, columns):
    layer = nn.Linear(columns, rows, bias=False)
    return layer, WeightView.of("layer", layer)


@pytest.mark.parametrize("block", [(4, 1), (1, 1), (1, 4), (3, 2), (100, 1)])
def test_every_unit_takes_the_proximal_step(block):
    torch.manual_seed(0)
    layer, view = linear(10, 7)
    before = layer.weight.detach().clone()
    GroupLasso(4.0).shrink_([view], [block], [0.05])
    for row in range(0, 10, block[0]):
        for column in range(0, 7, block[1]):
            unit = before[row : row + block[0], column : column + block[1]]
            share = max(0.0, 1 - 0.05 * 4.0 * math.sqrt(unit.numel()) / float(unit.norm()))
            now = layer.weight[row : row + block[0], column : column + block[1]]
            assert torch.allclose(now, unit * share, atol=1e-7)
    assert (layer.weight == 0).any()


def test_a_zero_unit_stays_zero_and_nothing_divides_by_zero():
    layer, view = linear(4, 2)
    nn.init.zeros_(layer.weight)
    GroupLasso(1.0).shrink_([view], [(4, 1)], [0.1])
    assert torch.equal(layer.weight, torch.zeros(4, 2))


def test_a_convolution_shrinks_in_its_own_layout():
    layer = nn.Conv2d(3, 4, 2, bias=False)
    before = layer.weight.detach().clone()
    GroupLasso(0.5).shrink_([WeightView.of("conv", layer)], [(1, 12)], [0.1])
    share = 1 - 0.05 * math.sqrt(12) / before.flatten(1).norm(dim=1)
    assert torch.allclose(layer.weight, before * share.clamp(min=0)[:, None, None, None], atol=1e-7)


@pytest.mark.parametrize("pattern", ["4x1", "2:4"])
def test_it_works_between_start_and_end_of_pruning(net, sgd, train, pattern):
    optimizer = sgd(net, lr=0.0, momentum=0.0)
    settings = {"criterion": "magnitude", "pattern": pattern, "target_sparsity": 0.25, "start_step": 2, "end_step": 3}
    pruner = Pruner(net, **settings, regularizer={"name": "group_lasso", "coeff": 1.0}).attach(optimizer)
    norms = []
    for _ in range(5):
        with torch.no_grad():
            optimizer.zero_grad()
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter)
        optimizer.param_groups[0]["lr"] = 0.01
        optimizer.step()
        norms.append(float(net.first.weight.detach().norm()))
    assert norms[0] > norms[1] > norms[2] == norms[3] == norms[4]
    pruner.verify()


def test_unknown_and_out_of_range():
    with pytest.raises(UnknownNameError, match=r"unknown regularizer 'lasso'.*group_lasso"):
        get_regularizer("lasso")
    with pytest.raises(ConfigError, match=r"coeff must be at least 0.*got -1"):
        get_regularizer({"name": "group_lasso", "coeff": -1})
    assert get_regularizer(None) is None


def test_normalisation_per_layer():
    scores = [torch.tensor([[3.0, -4.0]]), torch.zeros(2, 2), torch.empty(0, 3)]
    assert torch.allclose(normalize(scores, "l2")[0], torch.tensor([[0.6, -0.8]]))
    assert normalize(scores, "max")[0].tolist() == [[0.75, -1.0]]
    for how in ("l2", "max"):
        assert torch.equal(normalize(scores, how)[1], scores[1])
        assert normalize(scores, how)[2].shape == (0, 3)
    assert normalize(scores, "none")[0] is scores[0]


def test_normalisation_saves_a_layer_of_small_weights(net, sgd):
    with torch.no_grad():
        net.second.weight.mul_(1e-3)
    kept = {}
    for how in ("none", "max"):
        pruner = Pruner(
            net, criterion="magnitude", target_sparsity=0.35, start_step=0, end_step=0, normalize=how, pattern="1x1"
        )
        group = pruner._groups[0]
        group.update_scores_()
        kept[how] = int(group.propose(0).keep[1].sum())
    assert kept["none"] == 0
    assert kept["max"] > 35


@pytest.mark.parametrize("pattern", ["4x1", "1x1", "2:4"])
def test_bf16_scores_prune_exactly(net, sgd, train, pattern):
    optimizer = sgd(net)
    pruner = Pruner(net, pattern=pattern, score_dtype="bf16", target_sparsity=0.4, start_step=1, end_step=6)
    pruner.attach(optimizer)
    train(net, optimizer, 3)
    assert {score.dtype for score in pruner.scores.values()} == {torch.bfloat16}
    state = pruner.state_dict()
    pruner.load_state_dict(state)
    train(net, optimizer, 4, first=3)
    size = {"4x1": 4, "1x1": 1, "2:4": 2}[pattern]
    zeros = pruner.sparsity().prunable.zeros
    assert 80 - size < zeros <= 80
    pruner.verify()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"normalize": "l1"}, "normalize is one of none, l2, max, got 'l1'"),
        ({"score_dtype": "fp16"}, "score_dtype is one of fp32, bf16, got 'fp16'"),
        ({"criterion": "taylor", "reduce": "max"}, "Taylor cannot be reduced by 'max'.*known: mean, sum"),
    ],
)
def test_settings_out_of_range(net, setting, message):
    with pytest.raises(ConfigError, match=message):
        Pruner(net, end_step=3, start_step=1, **setting)
