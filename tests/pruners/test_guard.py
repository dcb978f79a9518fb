"""The guard: every way in which a pruned weight comes back is seen, with layer, count and step."""

import copy

import pytest
import torch

from tritprune.errors import ConfigError, MaskMismatchError, MaskViolationError
from tritprune.pruners import ProgressivePruner, Pruner
from tritprune.pruners.guard import Watch

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


def test_a_mask_that_is_written_to_is_seen_before_the_next_step(at_work, train, net):
    """Also one that prunes as much as before: the counts alone would not show it."""
    pruner, optimizer = at_work
    mask = pruner._groups[0].masks[0][0]
    mask[[0, 1]] = mask[[1, 0]]
    pruner.apply_masks_()
    with pytest.raises(MaskViolationError, match="somebody wrote to the masks of first before step 5"):
        train(net, optimizer, 1, first=5)
    with pytest.raises(MaskViolationError, match="masks of first"):
        pruner.verify()


@pytest.mark.parametrize("change", ["checkpoint", "data", "swapped"])
def test_every_way_to_write_to_weights_is_seen_before_the_next_step(at_work, net, train, change):
    pruner, optimizer = at_work
    dense = {name: torch.ones_like(value) for name, value in net.state_dict().items()}
    if change == "checkpoint":
        net.load_state_dict(dense)
    elif change == "data":  # a write that torch's version counters do not show
        net.first.weight.data.copy_(dense["first.weight"])
    else:
        net.first.weight.data = dense["first.weight"]
    zeros = int((~pruner.masks.element_mask("first")).sum())
    with pytest.raises(MaskViolationError, match=rf"at step 5: first \({zeros} weights\)"):
        train(net, optimizer, 1, first=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_conversion_is_looked_at_and_holds(at_work, net, dtype, train):
    pruner, optimizer = at_work
    net.to(dtype).float()
    train(net, optimizer, 1, first=5)
    assert pruner.step == 6


@pytest.mark.parametrize("apply", [True, False])
def test_an_average_of_the_weights_is_watched(net, sgd, train, apply):
    """It keeps a little of what is pruned now, until the masks are applied to it."""
    optimizer = sgd(net)
    pruner = Pruner(net, **SETTINGS, guard="on").attach(optimizer)
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    pruner.watch(averaged)
    for step in range(7):
        if step == 2 and not apply:
            said = r"at step 2: first of the watched AveragedModel \(\d+ weights\).*pruner.masks.apply_\(model\)"
            with pytest.raises(MaskViolationError, match=said):
                train(net, optimizer, 1, first=step)
            return
        train(net, optimizer, 1, first=step)
        averaged.update_parameters(net)
        if apply:
            pruner.masks.apply_(averaged)
    assert pruner.verify(averaged).step == 7


def test_what_cannot_be_watched_is_refused(net, at_work):
    pruner, _ = at_work
    with pytest.raises(MaskMismatchError, match="no such layer"):
        pruner.watch(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="not where the pruned one is, on cpu"):
        pruner.watch(copy.deepcopy(net).to("meta"))
    with pytest.raises(ConfigError, match=r"watch\(\) needs a pruner with guard='on'"):
        Pruner(net, **SETTINGS).watch(copy.deepcopy(net))


def test_elements_that_fade_are_looked_at(net, sgd, train):
    optimizer = sgd(net)
    settings = {**SETTINGS, "end_step": 9}
    pruner = ProgressivePruner(net, **settings, frequency=4, progressive_steps=2, guard="on").attach(optimizer)
    train(net, optimizer, 4)
    fade = pruner._fades["all"]
    whole = pruner._whole_masks().element_mask("first")
    faded = (whole & ~fade.partial[0]).nonzero()
    assert len(faded)
    with torch.no_grad():
        net.first.weight[tuple(faded[0])] = 1.0
    with pytest.raises(MaskViolationError, match=r"at step 4: first \(1 weights\)"):
        train(net, optimizer, 1, first=4)


class Deferred(Watch):
    """As on a GPU: what a look has seen is read at a later one."""

    def __init__(self, views, whose=""):
        super().__init__(views, whose, deferred=True)


def test_on_a_device_the_step_reads_nothing_and_the_next_one_tells(net, sgd, train, monkeypatch):
    monkeypatch.setattr("tritprune.pruners.guard.Watch", Deferred)
    optimizer = sgd(net, foreach=False)
    pruner = Pruner(net, **SETTINGS, guard="on").attach(optimizer)
    train(net, optimizer, 5)
    spoil(net, pruner)
    train(net, optimizer, 1, first=5)  # seen at step 5, and zeroed again by the step itself
    with pytest.raises(MaskViolationError, match=r"at step 5: first \(3 weights\)"):
        train(net, optimizer, 1, first=6)
    train(net, optimizer, 1, first=6)  # told once
    assert pruner.step == 7


def test_on_a_device_verify_tells_what_the_last_look_has_seen(net, sgd, train, monkeypatch):
    monkeypatch.setattr("tritprune.pruners.guard.Watch", Deferred)
    optimizer = sgd(net)
    pruner = Pruner(net, **SETTINGS, guard="on").attach(optimizer)
    train(net, optimizer, 5)
    spoil(net, pruner)
    train(net, optimizer, 1, first=5)
    with pytest.raises(MaskViolationError, match=r"at step 5: first \(3 weights\)"):
        pruner.verify()
    pruner.verify()


def test_the_first_step_of_trouble_and_the_largest_count_are_kept(net):
    pruner = Pruner(net, **SETTINGS)
    group = pruner._groups[0]
    watch = Deferred(group.views)
    masks = [mask.clone() for mask in group.flat_masks]
    for step, pruned in ((6, 0), (7, 1), (8, 2), (9, 0)):
        masks[1].fill_(True)
        masks[1].view(-1)[:pruned] = False
        watch._read = None
        watch.look(masks, group.blocks, step)
    with pytest.raises(MaskViolationError, match=r"at step 7: second \(8 weights\)"):
        watch.report()
