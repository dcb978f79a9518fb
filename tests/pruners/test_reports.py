"""Sparsity with its denominator, counted in the weights themselves."""

import torch
from torch import nn

from tritprune.pruners import SparsityCount, sparsity_of


def test_three_denominators_by_hand():
    model = nn.ModuleDict({"a": nn.Linear(4, 3), "norm": nn.LayerNorm(4), "conv": nn.Conv1d(2, 2, 2)})
    model["tied"] = nn.Linear(4, 3)
    model["tied"].weight = model["a"].weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model["a"].weight[0] = 0.0
        model["a"].weight[1, 0] = -0.0
        model["conv"].weight[0] = 0.0
        model["norm"].bias.zero_()  # not a weight of a layer: does not count as pruned
    report = sparsity_of(model, ["a", "not_there"])
    assert report.prunable == SparsityCount(5, 12)
    assert report.linear_conv == SparsityCount(5 + 4, 12 + 8)
    assert report.parameters == SparsityCount(9, 12 + 3 + 3 + 8 + 8 + 2)
    assert report.prunable.sparsity == 5 / 12


def test_nothing_has_no_sparsity():
    report = sparsity_of(nn.LayerNorm(3), [])
    assert report.prunable == SparsityCount(0, 0)
    assert report.prunable.sparsity == 0.0
    assert report.parameters == SparsityCount(0, 6)
