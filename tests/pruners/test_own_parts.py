"""A user's own criterion, pattern, schedule and pruner: some twenty lines, by name or as objects."""

import torch

from tritprune import (
    Criterion,
    Pattern,
    Pruner,
    Schedule,
    get_pruner,
    register_criterion,
    register_pattern,
    register_pruner,
    register_schedule,
)


@register_criterion("own_movement")
class Movement(Criterion):
    """-w g accumulated: weights that move towards zero go (signed scores)."""

    every_step, alpha = True, 1.0

    def element_scores(self, weight, gradient):
        return -weight * gradient


@register_pattern("own_pairs")
class RowPairs(Pattern):
    """Two whole outputs."""

    def block(self, view):
        return 2, view.shape[1]


@register_schedule("own_steps")
class Stairs(Schedule):
    """Half at half time."""

    def curve(self, x, initial, target):
        return initial if x < 0.5 else (initial + target) / 2


@register_pruner("own_gentle")
class Gentle(Pruner):
    """Every second step, never more than 60% of a layer."""

    def __init__(self, model, *, end_step, target_sparsity=0.5):
        super().__init__(
            model,
            end_step=end_step,
            frequency=2,
            max_layer_sparsity=0.6,
            pattern="1x1",
            target_sparsity=target_sparsity,
        )


def test_own_parts_work_together(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(
        net, criterion="own_movement", pattern="own_pairs", schedule="own_steps", target_sparsity=0.5, end_step=8,
        frequency=2, seed=1,
    ).attach(optimizer)  # fmt: skip
    targets = []
    pruner.on_update(lambda event: targets.append((event.step, event.target)))
    expected = torch.zeros(10, 13)
    for step in range(8):
        optimizer.zero_grad()
        net(torch.randn(8, 13, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        if step < 7:
            expected -= net.first.weight.detach() * net.first.weight.grad
        optimizer.step()
        if step == 6:
            units = expected.view(5, 2, 13).mean((1, 2)).view(5, 1)
            assert torch.allclose(pruner.scores["first"], units, atol=1e-6)
            assert float(units.min()) < 0
    assert targets == [(2, 0.0), (4, 0.25), (6, 0.25), (8, 0.5)]
    assert {layer.unit for layer in pruner.layers} == {"2x13", "2x10"}
    pruned_rows = (net.first.weight == 0).all(1).view(5, 2)
    assert bool((pruned_rows.all(1) | ~pruned_rows.any(1)).all())
    assert 0.5 - 26 / 200 < pruner.sparsity().prunable.sparsity <= 0.5


def test_an_own_pruner(net, sgd, train):
    optimizer = sgd(net)
    pruner = get_pruner({"name": "own_gentle", "end_step": 4}, model=net).attach(optimizer)
    train(net, optimizer, 5)
    assert pruner.sparsity().prunable.sparsity == 0.5
    assert max(row["sparsity"] for row in pruner.layer_report()) <= 0.6


def test_an_own_criterion_with_state_of_its_own_resumes(make_net, sgd, train):
    class Counting(Movement):
        def __init__(self):
            self.updates = 0

        def accumulate_(self, *arguments):
            self.updates += 1
            super().accumulate_(*arguments)

        def state_dict(self):
            return {"updates": self.updates}

        def load_state_dict(self, state):
            self.updates = state["updates"]

    net = make_net()
    optimizer = sgd(net)
    pruner = Pruner(net, criterion=Counting(), target_sparsity=0.5, end_step=8).attach(optimizer)
    train(net, optimizer, 3)
    other = Counting()
    Pruner(make_net(), criterion=other, target_sparsity=0.5, end_step=8).load_state_dict(pruner.state_dict())
    assert other.updates == 3
