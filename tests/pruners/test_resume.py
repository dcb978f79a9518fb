"""A pruner that is stopped in the middle and goes on gives the same masks and weights, bit for bit."""

import io

import pytest
import torch

from tritprune.errors import CheckpointError, MaskMismatchError
from tritprune.pruners import Pruner

CASES = [
    {"criterion": "snip_momentum", "pattern": "4x1"},
    {"criterion": "snip_momentum", "pattern": "2:4", "target_sparsity": 0.5},
    {"criterion": "snip_momentum", "pattern": "1x1", "regrow": True, "reset_state": True},
    {"criterion": "random", "pattern": "3x2", "seed": 5},
    {"criterion": "magnitude", "pattern": "channelx1", "initial_sparsity": 0.2},
    {"criterion": "snip", "pattern": "1x1", "min_layer_sparsity": 0.3, "max_layer_sparsity": 0.8},
    {
        "groups": [
            {"name": "a", "include": ["first"], "pattern": "4x1", "end_step": 6},
            {"name": "b", "include": ["second"], "pattern": "2:4", "target_sparsity": 0.5, "criterion": "random"},
        ]
    },
]


def saved_and_loaded(*states):
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def make(net, settings):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    return optimizer, Pruner(net, **{"target_sparsity": 0.7, "end_step": 10, "frequency": 3, **settings})


@pytest.mark.parametrize("stop", [0, 1, 4, 6, 9, 10, 12])
@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(map(str, s.values()))[:40])
def test_the_same_bits(make_net, train, settings, stop):
    net = make_net()
    optimizer, pruner = make(net, settings)
    whole_events = []
    pruner.on_update(whole_events.append)
    pruner.attach(optimizer)
    train(net, optimizer, 14)

    part = make_net()
    optimizer, before = make(part, settings)
    events = []
    before.on_update(events.append)
    before.attach(optimizer)
    train(part, optimizer, stop)
    states = saved_and_loaded(part.state_dict(), optimizer.state_dict(), before.state_dict())

    other = make_net(seed=1)
    optimizer, after = make(other, settings)
    other.load_state_dict(states[0])
    optimizer.load_state_dict(states[1])
    after.load_state_dict(states[2])
    assert after.digest() == before.digest()
    assert after.layer_report() == before.layer_report()
    assert after.step == stop
    after.on_update(events.append)
    after.attach(optimizer)
    train(other, optimizer, 14 - stop, first=stop)

    assert after.digest() == pruner.digest()
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name
    assert events == whole_events


def test_the_comparison_can_fail(make_net, train):
    digests = set()
    for seed in (0, 1):
        net = make_net()
        optimizer, pruner = make(net, {"criterion": "random", "pattern": "1x1", "seed": seed})
        pruner.attach(optimizer)
        train(net, optimizer, 12)
        digests.add(pruner.digest())
    assert len(digests) == 2


def test_without_the_scores_the_masks_would_differ(make_net, train):
    """The state matters: a resume that drops the momentum is another run."""
    digests = []
    for drop in (False, True):
        net = make_net()
        optimizer, pruner = make(net, {"pattern": "1x1"})
        pruner.attach(optimizer)
        train(net, optimizer, 5)
        state = pruner.state_dict()
        if drop:
            for score in state["groups"]["all"]["scores"].values():
                score.zero_()
        pruner.load_state_dict(state)
        train(net, optimizer, 5, first=5)
        digests.append(pruner.digest())
    assert digests[0] != digests[1]


def test_a_state_is_a_snapshot(make_net, train):
    net = make_net()
    optimizer, pruner = make(net, {"pattern": "1x1"})
    pruner.attach(optimizer)
    train(net, optimizer, 4)
    state = pruner.state_dict()
    scores = state["groups"]["all"]["scores"]["first"].clone()
    train(net, optimizer, 3, first=4)
    assert torch.equal(scores, state["groups"]["all"]["scores"]["first"])


def test_loading_applies_the_masks(make_net, train):
    net = make_net()
    optimizer, pruner = make(net, {"pattern": "1x1"})
    pruner.attach(optimizer)
    train(net, optimizer, 7)
    other = make_net(seed=3)
    _, fresh = make(other, {"pattern": "1x1"})
    fresh.load_state_dict(pruner.state_dict())
    for name, mask in pruner.masks.items():
        assert torch.equal(other.get_submodule(name).weight != 0, mask.element_mask())


def test_after_the_end_no_scores_are_saved(make_net, train):
    net = make_net()
    optimizer, pruner = make(net, {})
    pruner.attach(optimizer)
    train(net, optimizer, 11)
    assert pruner.state_dict()["groups"]["all"]["scores"] == {}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pattern": "2x1"}, r"first is .* in blocks of 2x1 here and .* in blocks of 4x1 in the state"),
        ({"include": ["first"]}, "second is not pruned here"),
        ({"groups": [{"name": "other"}]}, r"groups \['other'\] here, \['all'\] in the state"),
    ],
)
def test_a_state_of_other_layers_is_refused(make_net, settings, said):
    _, pruner = make(make_net(), {"pattern": "4x1"})
    _, other = make(make_net(), {"pattern": "4x1", **settings})
    with pytest.raises(MaskMismatchError, match=said):
        other.load_state_dict(pruner.state_dict())


def test_something_else_is_refused(make_net):
    _, pruner = make(make_net(), {})
    with pytest.raises(CheckpointError, match="not a pruner's state"):
        pruner.load_state_dict({"step": 3})
