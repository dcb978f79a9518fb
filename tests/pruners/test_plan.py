"""The plan against what a run then does."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from tritprune.pruners import PatternLockPruner, ProgressivePruner, Pruner

SETTINGS = {"criterion": "snip_momentum", "start_step": 1, "end_step": 9, "frequency": 4}


class Even(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 24), nn.Linear(24, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize("kind", [Pruner, ProgressivePruner])
@pytest.mark.parametrize("pattern", ["4x1", "1x1", "2:4", "8x2"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_planned_counts_are_the_counts_of_the_run(sgd, train, kind, pattern, scope):
    torch.manual_seed(0)
    model = Even()
    optimizer = sgd(model)
    settings = {**SETTINGS, "pattern": pattern, "scope": scope, "target_sparsity": 0.37, "max_layer_sparsity": 0.45}
    pruner = kind(model, **settings).attach(optimizer)
    planned = {step.step: step for step in pruner.plan().groups[0].steps}
    assert list(planned) == [5, 9]  # cubic asks for nothing at its start
    done = {}
    pruner.on_update(lambda event: done.update({event.step: sum(c.zeros for c in event.layers.values())}))
    train(model, optimizer, 9, shape=(8, 16))
    for step, plan in planned.items():
        assert plan.least == plan.most == done[step] <= plan.budget


def test_units_of_several_sizes_are_planned_within_one_unit(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(net, pattern="4x1", target_sparsity=0.5, **SETTINGS).attach(optimizer)
    last = pruner.plan().groups[0].steps[-1]
    train(net, optimizer, 9)
    assert last.budget == 100
    assert last.least < last.most
    assert last.least <= pruner.sparsity().prunable.zeros <= last.most


def test_memory_is_what_is_held(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(net, pattern="4x1", target_sparsity=0.5, score_dtype="bf16", **SETTINGS).attach(optimizer)
    group = pruner.plan().groups[0]
    train(net, optimizer, 2)
    assert group.score_bytes == sum(s.numel() * s.element_size() for s in pruner.scores.values())
    assert group.mask_bytes == sum(mask.mask.numel() for mask in pruner.masks.values())


def test_rows_say_units_caps_and_reasons(net):
    pruner = Pruner(net, pattern="4x1", target_sparsity=0.5, max_layer_sparsity=0.8, min_layer_sparsity=0.1, **SETTINGS)
    plan = pruner.plan()
    first = plan.layers[0]
    assert (first.name, first.shape, first.unit, first.units, first.elements) == ("first", (10, 13), "4x1", 39, 130)
    assert (first.floor, first.cap) == (0.1, 0.8)
    assert plan.total == 200
    assert {e.name: e.reason for e in plan.excluded} == {"classifier": "classifier head"}
    assert json.loads(json.dumps(asdict(plan)))["groups"][0]["steps"][-1]["step"] == 9
    assert "2 layers with 200 weights, 1 left out" in str(plan)


def test_a_lock_plans_what_it_holds(net):
    with torch.no_grad():
        net.first.weight[:4] = 0
    plan = PatternLockPruner(net, pattern="4x1").plan()
    assert plan.layers[0].locked == 52
    assert plan.groups[0].steps == ()
    assert plan.groups[0].score_bytes == 0


@pytest.mark.parametrize(("pattern", "words"), [("channelx1", "whole channels"), ("4x1", "happen to be pruned")])
def test_what_can_be_cut_is_said(net, pattern, words):
    assert words in Pruner(net, pattern=pattern, target_sparsity=0.5, **SETTINGS).plan().groups[0].removable
