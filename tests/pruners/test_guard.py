"""The guard: every way in which a pruned weight comes back is seen, with layer, count and step."""

import copy

import pytest
import torch

from tritprune.errors import ConfigError, MaskMismatchError, MaskViolationError
from tritprune.pruners import Pruner

SETTINGS = {"criterion": "snip_momentum", "target_sparsity": 0.5, "start_step": 1, "end_step": 4}


@pytest.fixture
def at_work(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(net, **SETTINGS, guard="on").attach(optimizer)
    train(net, optimizer, 5)
    return pruner, optimizer


def spoil(net, pruner, count=3):
    """Write to ``count`` pruned weights of the first layer."""
    gone = ~pruner.masks.element_mask("first")
    with torch.no_grad():
        net.first.weight.view(-1)[gone.flatten().nonzero().flatten()[:count]] = 0.25


def test_what_holds_is_told(at_work):
    pruner, _ = at_work
    assert str(pruner.verify()) == "2 layers hold their masks at step 5: 97 pruned weights are zero"


def test_a_write_is_found_before_the_next_step(at_work, net, train):
    pruner, optimizer = at_work
    spoil(net, pruner)
    with pytest.raises(MaskViolationError, match=r"at step 5: first \(3 weights\).*apply_masks_\(\)"):
        pruner.verify()
    with pytest.raises(MaskViolationError, match=r"at step 5: first \(3 weights\)"):
        train(net, optimizer, 1, first=5)
    assert pruner.step == 5


def test_without_the_guard_the_step_goes_on(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(net, **SETTINGS).attach(optimizer)
    train(net, optimizer, 5)
    spoil(net, pruner)
    train(net, optimizer, 1, first=5)
    pruner.verify()


def test_a_loaded_checkpoint_is_seen(at_work, net):
    pruner, _ = at_work
    state = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    with pytest.raises(MaskViolationError, match=r"first \(\d+ weights\), second"):
        pruner.verify()


@pytest.mark.parametrize("averaged", [False, True])
def test_another_model_is_held_against_the_masks(at_work, net, averaged):
    pruner, _ = at_work
    other = torch.optim.swa_utils.AveragedModel(net) if averaged else copy.deepcopy(net)
    assert pruner.verify(other).layers == 2
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(MaskViolationError, match=r"first \(\d+ weights\)"):
        pruner.verify(other)
    with pytest.raises(MaskMismatchError, match=r"first has a mask.*no such layer"):
        pruner.verify(torch.nn.Linear(2, 2))


def test_conversion_keeps_what_holds(at_work, net):
    pruner, _ = at_work
    net.to(torch.bfloat16)
    pruner.verify()


def test_a_changed_mask_is_seen(at_work):
    pruner, _ = at_work
    group = pruner._groups[0]
    group.masks[0][0][0, 0] = not group.masks[0][0][0, 0]
    pruner.apply_masks_()
    with pytest.raises(MaskViolationError, match=r"the mask of first was changed behind the pruner's back"):
        pruner.verify()


def test_masks_that_are_not_of_their_pattern_are_seen(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(net, **SETTINGS, pattern="2:4").attach(optimizer)
    train(net, optimizer, 5)
    pruner.verify()
    group = pruner._groups[0]
    group.masks[0][0][0, :4] = torch.tensor([False, True, True, True])
    pruner._counts |= group.count()
    pruner.apply_masks_()
    with pytest.raises(MaskViolationError, match=r"not of pattern 2:4 at step 5: first \(1 units\)"):
        pruner.verify()


def test_an_unknown_mode_shows_the_choices(net):
    with pytest.raises(ConfigError, match="guard is one of off, on, got 'sometimes'"):
        Pruner(net, **SETTINGS, guard="sometimes")


def test_the_first_step_of_trouble_is_kept():
    from tritprune.pruners.guard import Watch

    watch = Watch(2, torch.device("cpu"))
    watch.since, watch.counts = torch.tensor([-1, 7]), torch.tensor([0, 2])

    class View:
        name = "layer"

    with pytest.raises(MaskViolationError, match=r"at step 7: layer \(2 weights\)"):
        watch.report([View(), View()])
