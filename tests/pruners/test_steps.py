"""What happens at an optimizer step, and what does not."""

import copy
import gc
import io

import pytest
import torch
from torch import nn

from tritprune import criteria
from tritprune.errors import ConfigError, NonFiniteScoreError
from tritprune.kernels import Op
from tritprune.pruners import Pruner


@pytest.fixture
def count_updates(monkeypatch):
    """How often scores were accumulated."""
    calls = []
    inner = criteria.Criterion.accumulate_

    def spy(self, *arguments):
        calls.append(type(self).__name__)
        return inner(self, *arguments)

    monkeypatch.setattr(criteria.Criterion, "accumulate_", spy)
    return calls


def test_two_lines_in_a_plain_loop(net, train):
    optimizer = torch.optim.AdamW(net.parameters())
    pruner = Pruner(net, criterion="snip_momentum", pattern="4x1", target_sparsity=0.9, end_step=10)
    assert pruner.attach(optimizer) is pruner
    train(net, optimizer, 12)
    units = 3 * 13 + 2 * 10
    assert pruner.step == 12
    assert sum(row["units"] for row in pruner.layer_report()) == units
    assert 0.9 - 4 / 200 < pruner.sparsity().prunable.sparsity <= 0.9


def test_pruned_weights_stay_zero_through_every_step(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(net, pattern="1x1", target_sparsity=0.5, end_step=4, frequency=2).attach(optimizer)
    addresses = {name: p.data_ptr() for name, p in net.named_parameters()}
    for step in range(8):
        train(net, optimizer, 1, first=step)
        for name, mask in pruner.masks.items():
            weight = net.get_submodule(name).weight
            assert not weight[~mask.element_mask()].any()
    assert addresses == {name: p.data_ptr() for name, p in net.named_parameters()}


def test_momentum_criteria_score_every_step_and_nothing_after_the_end(net, sgd, train, count_updates):
    """The predecessor's overhead went on after the end."""
    optimizer = sgd(net)
    pruner = Pruner(net, target_sparsity=0.5, end_step=6, frequency=3).attach(optimizer)
    train(net, optimizer, 4)
    assert len(count_updates) == 4
    assert pruner.scores
    train(net, optimizer, 6, first=4)
    assert len(count_updates) == 6
    assert pruner.scores == {}
    digest = pruner.digest()
    train(net, optimizer, 3, first=10)
    assert pruner.digest() == digest


@pytest.mark.parametrize(("criterion", "updates"), [("magnitude", 3), ("snip", 2), ("gradient", 2)])
def test_other_criteria_score_when_masks_are_due(net, sgd, train, count_updates, criterion, updates):
    optimizer = sgd(net)
    first = 0.25 if criterion == "magnitude" else 0.0  # then there is a prune step at step 0
    Pruner(net, criterion=criterion, initial_sparsity=first, target_sparsity=0.5, end_step=6, frequency=3).attach(
        optimizer
    )
    train(net, optimizer, 9)
    assert len(count_updates) == updates


def test_scores_are_those_of_the_weights_before_the_update(net, sgd):
    optimizer = sgd(net, lr=1.0)
    pruner = Pruner(net, pattern="1x1", criterion="snip", target_sparsity=0.5, end_step=9, start_step=1)
    pruner.attach(optimizer)
    net(torch.ones(2, 13)).sum().backward()
    weight, gradient = net.first.weight.detach().clone(), net.first.weight.grad.clone()
    optimizer.step()
    assert torch.equal(pruner.scores["first"], (weight * gradient).abs())
    assert not torch.equal(net.first.weight.detach(), weight)


def test_gradient_accumulation_counts_optimizer_steps(make_net, sgd, train):
    digests = []
    for accumulate in (1, 4):
        net = make_net()
        net = net.double().float()
        optimizer = sgd(net)
        pruner = Pruner(net, criterion="magnitude", target_sparsity=0.5, end_step=6, frequency=2).attach(optimizer)
        events = []
        pruner.on_update(lambda event, events=events: events.append(event.step))
        train(net, optimizer, 7, accumulate=accumulate)
        assert (pruner.step, events) == (7, [2, 4, 6])
        digests.append(pruner.digest())
    assert digests[0] == digests[1]


def test_evaluation_changes_nothing(net, sgd, train):
    """Evaluation forwards pruned, once."""
    optimizer = sgd(net)
    pruner = Pruner(net, target_sparsity=0.5, end_step=6).attach(optimizer)
    train(net, optimizer, 3)
    state = {name: p.clone() for name, p in net.state_dict().items()}
    digest = pruner.digest()
    net.eval()
    for _ in range(20):
        net(torch.randn(4, 13))
    assert (pruner.step, pruner.digest()) == (3, digest)
    assert all(torch.equal(p, state[name]) for name, p in net.state_dict().items())


def test_attach_and_detach(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(net, target_sparsity=0.5, end_step=4).attach(optimizer)
    train(net, optimizer, 2)
    pruner.detach()
    pruner.detach()
    train(net, optimizer, 2, first=2)
    assert pruner.step == 2
    assert bool((net.first.weight != 0).all())  # masks are no longer applied
    pruner.attach(optimizer)
    train(net, optimizer, 2, first=4)
    assert pruner.step == 4
    assert pruner.last_event.target == 0.5


def test_attaching_twice_is_refused(net, sgd):
    optimizer = sgd(net)
    pruner = Pruner(net, end_step=4).attach(optimizer)
    with pytest.raises(ConfigError, match="attached already"):
        pruner.attach(optimizer)


def test_two_pruners_on_one_layer_are_refused(net, sgd):
    """Masks of two pruners multiplied in silence, once."""
    optimizer = sgd(net)
    first = Pruner(net, end_step=4, include=["first", "second"]).attach(optimizer)
    second = Pruner(net, end_step=4, include=["second"])
    with pytest.raises(ConfigError, match="second is being pruned by another pruner"):
        second.attach(optimizer)
    first.detach()
    second.attach(optimizer)
    Pruner(net, end_step=4, include=["first"]).attach(optimizer)


def test_a_forgotten_pruner_frees_its_layers(net, sgd):
    optimizer = sgd(net)
    Pruner(net, end_step=4).attach(optimizer)
    del optimizer
    gc.collect()
    Pruner(net, end_step=4).attach(sgd(net))


def test_an_optimizer_of_another_model_is_refused(net, make_net, sgd):
    pruner = Pruner(net, end_step=4)
    with pytest.raises(ConfigError, match=r"none of the 2 weights to prune; .*another copy"):
        pruner.attach(sgd(make_net()))
    with pytest.raises(ConfigError, match="needs a torch optimizer, got object"):
        pruner.attach(type("object", (), {})())


def test_a_wrapped_optimizer_is_unwrapped(net, sgd, train):
    class Wrapper(torch.optim.Optimizer):
        """As accelerate's: an Optimizer by class that never ran Optimizer's constructor."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

    optimizer = sgd(net)
    pruner = Pruner(net, target_sparsity=0.5, end_step=2).attach(Wrapper(optimizer))
    train(net, optimizer, 2)
    assert pruner.step == 2


def test_an_attached_model_is_copied_and_saved(net, sgd, train, tmp_path):
    """torch.save(model) failed after attaching, once."""
    optimizer = sgd(net)
    pruner = Pruner(net, target_sparsity=0.5, end_step=2).attach(optimizer)
    train(net, optimizer, 3)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
        pruned = Pruner(other, target_sparsity=0.5, end_step=2).attach(sgd(other))  # not taken by the first
        assert pruned.step == 0
    assert pruner.step == 3


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_gradients_are_skipped_and_counted(net, sgd, bad):
    optimizer = sgd(net, lr=0.0)
    pruner = Pruner(net, pattern="1x1", target_sparsity=0.5, end_step=6, frequency=2).attach(optimizer)
    events = []
    pruner.on_update(events.append)
    for step in range(6):
        net.zero_grad()
        net(torch.randn(4, 13, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        if step in (0, 1, 4):
            net.first.weight.grad[0, :3] = bad
        for parameter in net.parameters():  # an update with these would spoil the weights, lr = 0 or not
            parameter.grad = torch.where(torch.isfinite(parameter.grad), parameter.grad, bad)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        optimizer.step()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(torch.where(torch.isfinite(parameter), parameter, before[name]))
            pruner.apply_masks_()
        optimizer.state.clear()
    assert [event.skipped_gradients for event in events] == [6, 0, 3]
    assert events[-1].sparsity == 0.5


def test_a_weight_that_is_not_finite_is_an_error_with_layer_and_step(net, sgd):
    with torch.no_grad():
        net.second.weight[0, 0] = float("nan")
    optimizer = sgd(net)
    pruner = Pruner(net, criterion="magnitude", pattern="1x1", target_sparsity=0.5, end_step=4, start_step=1)
    pruner.attach(optimizer)
    net(torch.randn(2, 13)).sum().backward()
    digest = pruner.digest()
    with pytest.raises(NonFiniteScoreError, match=r"at step 1.*second \(1 units\)"):
        optimizer.step()
    assert pruner.digest() == digest


def test_a_layer_without_a_gradient_is_left_alone_and_named(net, sgd):
    """It crashed the predecessor."""
    optimizer = sgd(net)
    pruner = Pruner(net, pattern="1x1", target_sparsity=0.3, end_step=4, frequency=2).attach(optimizer)
    events = []
    pruner.on_update(events.append)
    for _ in range(4):
        optimizer.zero_grad()
        net.first(torch.randn(4, 13)).square().mean().backward()
        optimizer.step()
    assert bool((net.second.weight != 0).all())
    assert events[-1].layers["first"].zeros == 60  # the whole budget, from the layer that has scores
    assert events[0].warnings == ("second has no gradient at step 2: nothing more of it is pruned now",)
    assert events[1].warnings == ()


def test_a_layer_without_a_gradient_keeps_what_was_pruned_before(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(net, pattern="1x1", target_sparsity=0.6, end_step=4, frequency=2, scope="local").attach(optimizer)
    train(net, optimizer, 2)
    before = pruner.masks["second"].mask.clone()
    assert not before.all()
    for _ in range(2):
        optimizer.zero_grad()
        net.first(torch.randn(4, 13)).square().mean().backward()
        optimizer.step()
    assert torch.equal(pruner.masks["second"].mask, before)
    assert pruner.last_event.layers["first"].zeros == 78


def test_no_gradient_at_all(net, sgd):
    optimizer = sgd(net)
    pruner = Pruner(net, target_sparsity=0.5, end_step=1).attach(optimizer)
    optimizer.step()
    assert pruner.last_event.sparsity == 0
    assert len(pruner.last_event.warnings) == 2


def test_gradient_criterion_does_not_regrow_unasked(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(
        net, pattern="1x1", criterion="gradient", schedule="one_shot", target_sparsity=0.5, start_step=1, end_step=9
    ).attach(optimizer)
    train(net, optimizer, 1)
    first = pruner.digest()
    train(net, optimizer, 8, first=1)
    assert pruner.digest() == first


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "2:4"])
def test_regrown_weights_start_from_zero_at_the_same_sparsity(net, sgd, train, pattern):
    optimizer = sgd(net)
    pruner = Pruner(
        net, pattern=pattern, criterion="gradient", schedule="one_shot", target_sparsity=0.4, start_step=1, end_step=9,
        regrow=True,
    ).attach(optimizer)  # fmt: skip
    train(net, optimizer, 1)
    came_back = 0
    for step in range(1, 9):
        before = {name: mask.element_mask() for name, mask in pruner.masks.items()}
        zeros = sum(mask.zeros() for mask in pruner.masks.values())
        train(net, optimizer, 1, first=step)
        for name, mask in pruner.masks.items():
            fresh = mask.element_mask() & ~before[name]
            came_back += int(fresh.sum())
            weight = net.get_submodule(name).weight
            assert not weight[~mask.element_mask() | fresh].any()
        assert abs(pruner.last_event.layers["first"].zeros + pruner.last_event.layers["second"].zeros - zeros) < 8
        assert pruner.last_event.sparsity <= 0.4
    assert came_back > 0


def test_regrowing_changes_which_of_a_group_are_pruned(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(
        net, pattern="2:4", criterion="gradient", schedule="one_shot", target_sparsity=0.5, start_step=1, end_step=9,
        regrow=True,
    ).attach(optimizer)  # fmt: skip
    train(net, optimizer, 1)
    first = {name: mask.mask for name, mask in pruner.masks.items()}
    train(net, optimizer, 8, first=1)
    for name, mask in pruner.masks.items():
        assert not torch.equal(mask.mask, first[name])
        assert torch.equal(mask.mask.sum(1), first[name].sum(1))  # every group, as many of each


@pytest.mark.parametrize("reset", [True, False])
def test_the_optimizers_momentum_of_pruned_weights(net, train, reset):
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    pruner = Pruner(net, pattern="1x1", target_sparsity=0.5, end_step=3, reset_state=reset).attach(optimizer)
    train(net, optimizer, 5)
    gone = ~pruner.masks.element_mask("first")
    state = optimizer.state[net.first.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert bool((state[key][~gone] != 0).all())
        assert bool((state[key][gone] == 0).all()) is reset
    assert state["step"] == 5


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_a_skipped_mixed_precision_step_is_not_a_step(net, fused, unscale):
    """GradScaler does not call step() then; a fused optimizer is called, and told by found_inf and grad_scale."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, fused=fused)
    pruner = Pruner(net, pattern="1x1", target_sparsity=0.5, end_step=5, frequency=1).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)

    def step(poison):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 13)).sum()).backward()
        if poison:
            net.first.bias.grad[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(4.0)

    step(poison=True)
    assert (pruner.step, pruner.last_event, pruner.scores) == (0, None, {})
    weight = net.first.weight.detach().clone()
    (gradient,) = torch.autograd.grad(net(torch.ones(2, 13)).sum(), net.first.weight)
    assert gradient.any()
    step(poison=False)
    assert pruner.step == 1
    assert torch.allclose(pruner.scores["first"], (weight * gradient).abs())


def test_conv_weights_are_pruned_in_their_own_storage(conv_net):
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    pruner = Pruner(conv_net, pattern="2x3", target_sparsity=0.5, end_step=3).attach(optimizer)
    pointers = [p.data_ptr() for p in conv_net.parameters()]
    for step in range(4):
        optimizer.zero_grad()
        batch = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        conv_net(batch).square().mean().backward()
        optimizer.step()
    assert pointers == [p.data_ptr() for p in conv_net.parameters()]
    for name, mask in pruner.masks.items():
        weight = conv_net.get_submodule(name).weight.detach()
        assert torch.equal(weight != 0, mask.element_mask())
    assert 0 < 0.5 - pruner.sparsity().prunable.sparsity + 1e-9 < 6 / pruner.sparsity().prunable.total


def test_n_in_m_of_a_convolution_counts_input_channels(sgd):
    conv = nn.Conv2d(4, 2, 2)
    Pruner(conv, pattern="2:4", criterion="magnitude", target_sparsity=0.5, end_step=0).attach(sgd(conv))
    assert (conv.weight != 0).sum(1).flatten().tolist() == [2] * 8


class HostReads:
    """Counts reads of tensors by the host outside of kernels, whose CPU reference may read."""

    METHODS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "numpy")

    def __init__(self, monkeypatch):
        self.seen, self.inside = [], 0
        for method in self.METHODS:
            monkeypatch.setattr(torch.Tensor, method, self.counting(method, getattr(torch.Tensor, method)))
        call = Op.__call__

        def kernel(op, *arguments, **options):
            self.inside += 1
            try:
                return call(op, *arguments, **options)
            finally:
                self.inside -= 1

        monkeypatch.setattr(Op, "__call__", kernel)

    def counting(self, method, inner):
        def read(tensor, *arguments, **options):
            if not self.inside:
                self.seen.append(method)
            return inner(tensor, *arguments, **options)

        return read


@pytest.mark.parametrize("pattern", ["3x2", "2:4", "channelx1"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_one_read_back_a_prune_step_and_none_between(make_net, monkeypatch, pattern, scope):
    """The predecessor read the host 10,656 times for one update of BERT-base."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=False)
    pruner = Pruner(
        net, pattern=pattern, target_sparsity=0.45, end_step=8, frequency=2, scope=scope, min_layer_sparsity=0.2,
        max_layer_sparsity=0.5 if pattern == "2:4" else 0.8, reset_state=True,
    ).attach(optimizer)  # fmt: skip
    reads = {}
    for step in range(1, 11):
        optimizer.zero_grad()
        net(torch.randn(8, 13, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        with monkeypatch.context() as patch:
            counter = HostReads(patch)
            optimizer.step()
            reads[step] = counter.seen
    assert pruner.last_event.step == 8
    assert reads == {step: ["tolist"] if step % 2 == 0 and step <= 8 else [] for step in range(1, 11)}


def test_timing_is_told(net, sgd, train):
    optimizer = sgd(net)
    pruner = Pruner(net, target_sparsity=0.5, end_step=2).attach(optimizer)
    train(net, optimizer, 1)
    assert pruner.last_timing["score"] > 0
    assert pruner.last_timing["mask"] > 0


def test_bf16_weights_are_pruned(sgd):
    layer = nn.Linear(16, 16, dtype=torch.bfloat16)
    optimizer = sgd(layer)
    pruner = Pruner(layer, pattern="2x2", target_sparsity=0.5, end_step=1).attach(optimizer)
    layer(torch.ones(1, 16, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert pruner.sparsity().prunable.sparsity == 0.5


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_closure_is_scored_with_the_gradients_that_it_makes(make_net, sgd, as_keyword):
    """A step that is given a closure computes its gradients inside: before it there are none, or those of the past."""

    def run(closured):
        net = make_net()
        optimizer = sgd(net)
        pruner = Pruner(net, target_sparsity=0.5, end_step=6, frequency=2).attach(optimizer)
        for step in range(7):
            batch = torch.randn(8, 13, generator=torch.Generator().manual_seed(step))

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = net(batch).square().mean()
                loss.backward()
                return loss

            if not closured:
                closure()
                optimizer.step()
            elif as_keyword:
                assert optimizer.step(closure=closure) > 0
            else:
                assert optimizer.step(closure) > 0
        return pruner.digest(), net.first.weight.detach()

    (digest, weight), (plain_digest, plain_weight) = run(True), run(False)
    assert digest == plain_digest
    assert torch.equal(weight, plain_weight)


def test_an_optimizer_that_evaluates_often_scores_once_a_step(net, count_updates):
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    pruner = Pruner(net, target_sparsity=0.5, end_step=2).attach(optimizer)
    evaluations = []

    def closure():
        evaluations.append(pruner.step)
        optimizer.zero_grad()
        loss = net(torch.ones(2, 13)).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert len(count_updates) == pruner.step == 2
    assert len(evaluations) > 2
