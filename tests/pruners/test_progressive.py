"""Progressive pruning: partial masks in between, exactly the schedule's whole masks at every update."""

import pytest
import torch

from tritprune.errors import ConfigError, MaskViolationError
from tritprune.pruners import ProgressivePruner

SETTINGS = {"criterion": "snip_momentum", "start_step": 2, "end_step": 14, "frequency": 4, "progressive_steps": 4}


def zeros_of(pruner):
    return sum(mask.zeros() for mask in pruner.masks.values())


@pytest.mark.parametrize(("pattern", "target"), [("4x1", 0.6), ("2:4", 0.4), ("channelx1", 0.5)])
def test_masks_are_partial_in_between_and_whole_at_every_update(net, sgd, train, pattern, target):
    optimizer = sgd(net)
    pruner = ProgressivePruner(net, pattern=pattern, target_sparsity=target, **SETTINGS).attach(optimizer)
    zeros, partial, whole, previous = [], [], [], None
    for step in range(16):
        train(net, optimizer, 1, first=step)
        masks = pruner.masks
        zeros.append(zeros_of(pruner))
        fading = zeros_of(pruner) != sum(mask.zeros() for mask in pruner._whole_masks().values())
        (partial if fading else whole).append(step + 1)
        pruner.verify()
        if previous is not None:
            for name in masks:
                assert not (masks.element_mask(name) & ~previous[name]).any(), "what has faded comes back"
        previous = {name: masks.element_mask(name) for name in masks}
    assert {2, 6, 10, 14, 15, 16} <= set(whole)
    assert {4, 5, 8, 9, 12, 13} <= set(partial)
    assert zeros == sorted(zeros)

    assert zeros[13] == zeros[15]
    size = {"4x1": 4, "2:4": 2, "channelx1": 10}[pattern]
    assert target * 200 - size < zeros[-1] <= target * 200
    (group,) = pruner._groups
    for step in (6, 10):
        assert group.target_at(step) * 200 - size < zeros[step - 1] <= group.target_at(step) * 200


def test_the_shares_are_exact(net, sgd, train):
    optimizer = sgd(net)
    pruner = ProgressivePruner(net, pattern="4x1", target_sparsity=0.6, **SETTINGS).attach(optimizer)
    zeros = []
    for step in range(6):
        train(net, optimizer, 1, first=step)
        zeros.append(zeros_of(pruner))
    total = zeros[5] - zeros[1]
    assert [zero - zeros[1] for zero in zeros[1:]] == [total * share // 4 for share in range(5)]


def test_the_smallest_weights_fade_first(net, sgd, train):
    optimizer = sgd(net, lr=1e-9, momentum=0.0)
    pruner = ProgressivePruner(net, pattern="4x1", target_sparsity=0.6, **SETTINGS).attach(optimizer)
    train(net, optimizer, 2)
    before = {name: net.get_submodule(name).weight.detach().abs().clone() for name in pruner.masks}
    train(net, optimizer, 2, first=2)
    gone = torch.cat([before[name][~pruner.masks.element_mask(name)] for name in before])
    train(net, optimizer, 2, first=4)
    later = torch.cat([before[name][~pruner.masks.element_mask(name)] for name in before])
    assert 0 < len(gone) < len(later)
    assert float(gone.max()) <= float(later.sort().values[len(gone)])


@pytest.mark.parametrize("stop", [3, 5, 6, 9, 13])
def test_it_resumes_bit_for_bit(make_net, sgd, train, stop):
    whole, parts = make_net(), make_net()
    optimizer = sgd(whole)
    straight = ProgressivePruner(whole, pattern="2:4", target_sparsity=0.4, **SETTINGS).attach(optimizer)
    train(whole, optimizer, 16)
    optimizer = sgd(parts)
    first = ProgressivePruner(parts, pattern="2:4", target_sparsity=0.4, **SETTINGS).attach(optimizer)
    train(parts, optimizer, stop)
    state = first.state_dict()
    first.detach()
    second = ProgressivePruner(parts, pattern="2:4", target_sparsity=0.4, **SETTINGS)
    second.load_state_dict(state)
    assert second.digest() == first.digest()
    second.attach(optimizer)
    train(parts, optimizer, 16 - stop, first=stop)
    assert second.digest() == straight.digest()
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_partial_events_reach_the_curves(net, sgd, train):
    optimizer = sgd(net)
    pruner = ProgressivePruner(net, pattern="4x1", target_sparsity=0.6, **SETTINGS).attach(optimizer)
    events = []
    pruner.on_update(events.append)
    train(net, optimizer, 14)
    assert [event.step for event in events] == list(range(2, 15))
    sparsities = [event.sparsity for event in events]
    assert sparsities == sorted(sparsities)
    assert 0.6 - 4 / 200 < sparsities[-1] <= 0.6


def test_what_has_faded_is_verified(net, sgd, train):
    optimizer = sgd(net)
    pruner = ProgressivePruner(net, pattern="4x1", target_sparsity=0.6, **SETTINGS).attach(optimizer)
    train(net, optimizer, 4)
    with torch.no_grad():
        net.first.weight.add_(1)
    with pytest.raises(MaskViolationError, match="at step 4: first"):
        pruner.verify()
    pruner.apply_masks_()
    pruner.verify()


def tensors_of(pruner):
    (fade,) = pruner._fades.values()
    (group,) = pruner._groups
    chosen, _ = fade.chosen
    return [
        *chosen.keep,
        *(mask for own in chosen.masks for mask in own),
        chosen.numbers,
        *fade.partial,
        *group.flat_masks,
    ]


@pytest.mark.parametrize("ask", ["apply_masks_", "step", "guard"])
def test_what_fades_goes_with_the_model_to_another_device(net, sgd, train, ask):
    """Without a second device that can compute: everything that the next share needs is where the weights are."""
    optimizer = sgd(net)
    settings = {**SETTINGS, "pattern": "4x1", "target_sparsity": 0.6}
    pruner = ProgressivePruner(net, **settings).attach(optimizer)
    train(net, optimizer, 3)
    assert {tensor.device.type for tensor in tensors_of(pruner)} == {"cpu"}
    (group,) = pruner._groups
    elsewhere = net.to("meta")
    if ask == "apply_masks_":
        pruner.apply_masks_()
    elif ask == "guard":
        pruner._held(group)
    else:
        with pytest.MonkeyPatch.context() as patch:
            (fade,) = pruner._fades.values()
            patch.setattr(fade, "advance", lambda step: seen.extend(tensors_of(pruner)) or False)
            seen = []
            pruner._apply()
        assert seen
    assert next(elsewhere.parameters()).is_meta
    assert {tensor.device.type for tensor in tensors_of(pruner)} == {"meta"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"progressive_steps": 1}, "at least 2, got 1"),
        ({"frequency": 3}, r"progressive_steps=4 needs as many optimizer steps.*frequency=3 from step 2 to 14"),
        ({"regrow": True}, "does not regrow"),
    ],
)
def test_settings_out_of_range(net, changes, message):
    with pytest.raises(ConfigError, match=message):
        ProgressivePruner(net, target_sparsity=0.6, **{**SETTINGS, **changes})
