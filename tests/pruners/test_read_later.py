"""On a GPU the numbers of a mask update are read one step later. Forced here on the CPU: nothing else may change."""

import sys
from pathlib import Path

import pytest
import torch

from tritprune.errors import NonFiniteScoreError
from tritprune.optim import MaskedSGD
from tritprune.pruners import OneShotPruner, ProgressivePruner, Pruner, record
from tritprune.pruners.reading import start_reading

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from counting import counted

SETTINGS = {"target_sparsity": 0.7, "end_step": 9, "frequency": 3}
GROUPS = [
    {"name": "a", "include": ["first"], "pattern": "2:4", "target_sparsity": 0.5, "end_step": 6},
    {"name": "b", "include": ["second"], "pattern": "4x1", "scope": "local", "max_layer_sparsity": 0.8},
]


@pytest.fixture
def later(monkeypatch):
    """Every pruner reads later, as it does on a GPU."""

    def switch(on=True):
        monkeypatch.setattr(Pruner, "_reads_later", property(lambda pruner: on and pruner._may_read_later))

    return switch


@pytest.mark.parametrize("settings", [SETTINGS, {**SETTINGS, "regrow": True}, {**SETTINGS, "groups": GROUPS}])
def test_masks_weights_and_events_are_the_same(settings, make_net, sgd, train, later):
    seen = []
    for on in (False, True):
        later(on)
        net = make_net()
        optimizer, events = sgd(net), []
        pruner = Pruner(net, **settings)
        pruner.on_update(events.append)
        pruner.attach(optimizer)
        digests = []
        for step in range(11):
            train(net, optimizer, 1, first=step)
            digests.append(pruner._whole_masks().digest())
        pruner.detach()
        seen.append((events, digests, [weight.tolist() for weight in net.state_dict().values()]))
    assert seen[0] == seen[1]
    assert [event.step for event in seen[1][0]] == [3, 6, 9]


def test_an_event_comes_before_the_next_step_or_as_soon_as_somebody_asks(net, sgd, train, later):
    later()
    optimizer, events = sgd(net), []
    pruner = Pruner(net, **SETTINGS)
    pruner.on_update(lambda event: events.append((event.step, pruner.step)))
    pruner.attach(optimizer)
    train(net, optimizer, 3)
    assert not events
    train(net, optimizer, 1, first=3)
    assert events == [(3, 3)]
    train(net, optimizer, 2, first=4)
    assert len(events) == 1
    assert pruner.last_event.step == 6
    assert events[1:] == [(6, 6)]
    pruner.settle()
    assert len(events) == 2


@pytest.mark.parametrize(
    "ask",
    [
        lambda pruner: pruner.masks,
        lambda pruner: pruner.layer_report(),
        lambda pruner: pruner.state_dict(),
        lambda pruner: pruner.verify(),
        lambda pruner: pruner.plan(),
        lambda pruner: pruner.current_sparsity_ratio,
        lambda pruner: pruner.detach(),
    ],
)
def test_whatever_is_asked_has_been_read(ask, net, sgd, train, later):
    later()
    optimizer, events = sgd(net), []
    pruner = OneShotPruner(net, target_sparsity=0.5, start_step=2)
    pruner.on_update(events.append)
    pruner.attach(optimizer)
    train(net, optimizer, 2)
    assert not events
    ask(pruner)
    assert [event.step for event in events] == [2]
    assert sum(row["zeros"] for row in pruner.layer_report()) == sum(count.zeros for count in events[0].layers.values())


@pytest.mark.parametrize("pattern", ["1x1", "2:4"])
def test_scores_that_are_not_finite_leave_the_masks_and_are_told_with_their_step(pattern, net, sgd, train, later):
    later()
    optimizer = sgd(net)
    pruner = Pruner(net, criterion="magnitude", pattern=pattern, target_sparsity=0.5, end_step=6, frequency=2)
    pruner.attach(optimizer)
    train(net, optimizer, 2)
    before = [mask.clone() for mask in pruner._groups[0].flat_masks]
    assert not all(bool(mask.all()) for mask in before)
    train(net, optimizer, 1, first=2)
    kept = pruner.masks.element_mask("second").nonzero()[0]
    with torch.no_grad():
        net.second.weight[tuple(kept)] = float("nan")
    optimizer.zero_grad(set_to_none=True)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for mask, old in zip(pruner._groups[0].flat_masks, before, strict=True):
        assert torch.equal(mask, old)
    with pytest.raises(NonFiniteScoreError, match=r"at step 4.*second \(1 units\)"):
        optimizer.step()
    for mask, old in zip(pruner.masks.values(), before, strict=True):
        assert torch.equal(mask.mask, old)


def test_a_prune_step_at_step_0_is_told_by_attach(net, sgd, later):
    later()
    events = []
    settings = {"criterion": "magnitude", "target_sparsity": 0.5, "start_step": 0}
    pruner = OneShotPruner(net, **settings)
    pruner.on_update(events.append)
    pruner.attach(sgd(net))
    assert [event.step for event in events] == [0]
    pruner.detach()
    net.first.weight.data[0, 0] = float("nan")
    pruner = OneShotPruner(net, **settings)
    with pytest.raises(NonFiniteScoreError, match="at step 0"):
        pruner.attach(sgd(net))
    assert not pruner.attached
    assert not pruner._groups[0].prunes


def test_the_end_of_a_loop_that_calls_the_functions_tells_the_last_update(net, sgd, train, later):
    later()
    optimizer, events = sgd(net), []
    pruner = OneShotPruner(net, target_sparsity=0.5, start_step=1)
    pruner.on_update(events.append)
    pruner.on_train_begin()
    train(net, optimizer, 1, first=0)  # gradients
    pruner.on_before_optimizer_step()
    pruner.on_after_optimizer_step()
    assert not events
    pruner.on_train_end()
    assert [event.step for event in events] == [1]


@pytest.mark.parametrize("on", [False, True])
def test_a_callback_may_detach_the_pruner(on, net, train, later):
    later(on)
    optimizer = MaskedSGD(net.parameters(), lr=0.05)
    pruner = Pruner(net, **SETTINGS)
    pruner.on_update(lambda event: pruner.detach())
    pruner.attach(optimizer)
    train(net, optimizer, 5)
    assert pruner.step == 3
    assert all(optimizer.masks_of(parameter) is None for parameter in net.parameters())


def test_an_update_before_a_capture_is_told_after_it_too(net, sgd, train, later, monkeypatch):
    later()
    optimizer, events = sgd(net), []
    pruner = Pruner(net, **{**SETTINGS, "frequency": 1})
    pruner.on_update(events.append)
    pruner.attach(optimizer)
    train(net, optimizer, 3)
    monkeypatch.setattr(record, "capturing", lambda: True)
    train(net, optimizer, 1, first=3)
    assert len(events) < 3
    monkeypatch.undo()
    pruner.settle()
    steps = [event.step for event in events]
    assert steps == list(range(steps[0], 5))


def test_the_numbers_are_waited_for_on_their_own_device(monkeypatch):
    """Which need not be the current one, whose stream knows nothing of the copy."""
    recorded = []

    class Event:
        def record(self, stream=None):
            recorded.append(stream)

    def empty(shape, dtype, pin_memory):
        assert pin_memory
        return torch.zeros(shape, dtype=dtype)

    class OnAnotherDevice(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda:1")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch, "empty", empty)
    numbers = torch.tensor([3, 4]).as_subclass(OnAnotherDevice)
    on_its_way, arrived = start_reading(numbers)
    assert on_its_way.tolist() == [3, 4]
    assert isinstance(arrived, Event)
    assert recorded == ["stream of cuda:1"]


def test_a_pruner_that_needs_the_numbers_reads_at_once(net, sgd, train, later):
    later()
    optimizer, events = sgd(net), []
    pruner = ProgressivePruner(net, **SETTINGS, progressive_steps=3)
    pruner.on_update(events.append)
    pruner.attach(optimizer)
    train(net, optimizer, 3)
    assert events[-1].step == 3


@pytest.mark.parametrize("settings", [{"regrow": True}, {"scope": "local"}, {"pattern": "2:4", "target_sparsity": 0.5}])
def test_no_step_of_a_pruner_reads_anything_back(settings, net, sgd, train, later, monkeypatch):
    """Of a step with a mask update and of one without; kernels are counted, not run."""
    optimizer = sgd(net)
    pruner = Pruner(net, **{"end_step": 50, "frequency": 2, **settings}).attach(optimizer)
    train(net, optimizer, 3)
    later()
    with counted(monkeypatch) as (reads, launches):
        for _ in range(2):
            pruner._before_step(optimizer, (), {})
            pruner._after_step(optimizer)
    assert pruner.step == 5
    assert not reads.found
    assert any("masks" in kernel.__name__ for kernel in launches)
