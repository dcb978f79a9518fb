"""Masked steps against torch's own optimizers plus mask, and the pruner that hands its masks over."""

import copy
import pickle

import pytest
import torch
from torch import nn

from tritprune import Pruner
from tritprune.errors import ConfigError
from tritprune.kernels import pack_mask
from tritprune.optim import MaskedAdamW, MaskedSGD, WeightMask
from tritprune.pruners import group as group_module

SINGLE = {"foreach": False, "fused": False}
ADAMW = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}
SGD = {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.01}


def parameters(seed=0):
    """Linear, bias, convolution and a convolution whose channels are last in memory."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(40, 33), (40,), (6, 3, 2, 2), (8, 5, 3, 3), ()]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    made[3] = made[3].contiguous(memory_format=torch.channels_last)
    return [nn.Parameter(tensor) for tensor in made]


def masks_for(weights, packed, reset=False):
    first = torch.rand(10, 33, generator=torch.Generator().manual_seed(5)) < 0.4
    last = torch.rand(2, 45, generator=torch.Generator().manual_seed(6)) < 0.4
    return {
        weights[0]: WeightMask(pack_mask(first) if packed else first, (4, 1), lambda tensor: tensor, reset),
        weights[3]: WeightMask(last, (4, 1), lambda tensor: tensor.movedim(1, -1).flatten(1), reset),
    }


def gone_elements(weights, masks):
    """Where a mask prunes, by hand."""
    gone = [torch.zeros(weight.shape, dtype=torch.bool) for weight in weights]
    first = torch.rand(10, 33, generator=torch.Generator().manual_seed(5)) < 0.4
    last = torch.rand(2, 45, generator=torch.Generator().manual_seed(6)) < 0.4
    if weights[0] in masks:
        gone[0] = ~first.repeat_interleave(4, 0)
        gone[3] = ~last.repeat_interleave(4, 0).view(8, 3, 3, 5).movedim(-1, 1)
    return gone


def ulp(scale):
    return torch.nextafter(scale.abs(), torch.tensor(torch.inf)) - scale.abs()


def fill_gradients(many, step):
    generator = torch.Generator().manual_seed(100 + step)
    for several in zip(*many, strict=True):
        gradient = torch.randn(several[0].shape, generator=generator)
        for parameter in several:
            parameter.grad = gradient.clone()


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (MaskedAdamW, torch.optim.AdamW, ADAMW),
        (MaskedAdamW, torch.optim.AdamW, ADAMW | {"weight_decay": 0.0, "lr": 1e-2}),
        (MaskedSGD, torch.optim.SGD, SGD),
        (MaskedSGD, torch.optim.SGD, SGD | {"dampening": 0.2}),
        (MaskedSGD, torch.optim.SGD, SGD | {"nesterov": True}),
        (MaskedSGD, torch.optim.SGD, SGD | {"momentum": 0.0}),
    ],
)
@pytest.mark.parametrize("masked", ["no", "bool", "packed"])
def test_a_step_is_that_of_torch_and_the_mask_within_one_ulp(ours, theirs, options, masked):
    mine, other = parameters(), parameters()
    own, reference = ours(mine, **options), theirs(other, **options, **SINGLE)
    masks = {} if masked == "no" else masks_for(mine, masked == "packed")
    own.use_masks(masks)
    gone = gone_elements(mine, masks)
    for step in range(6):
        states = copy.deepcopy(reference.state_dict())
        own.load_state_dict(copy.deepcopy(states))  # one step is compared at a time
        before = [weight.detach().clone() for weight in other]
        with torch.no_grad():
            for weight, value in zip(mine, before, strict=True):
                weight.copy_(value)
        fill_gradients((mine, other), step)
        own.step()
        reference.step()
        for number, (weight, expected, old, pruned) in enumerate(zip(mine, other, before, gone, strict=True)):
            expected.detach().masked_fill_(pruned, 0.0)
            assert not weight[pruned].any()
            new = expected.detach()
            scale = torch.stack([old.abs(), new.abs(), 4 * (new - old).abs()]).amax(0)
            assert float(((weight.detach() - new).abs() / ulp(scale)).max()) <= 1
            for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                if name in reference.state[expected]:
                    state, wanted = own.state[weight][name], reference.state[expected][name]
                    past = states["state"].get(number, {}).get(name, torch.zeros(()))
                    scale = torch.maximum(torch.maximum(wanted.abs(), past.abs()), weight.grad.abs())
                    assert float(((state - wanted).abs() / ulp(scale)).max()) <= 2


@pytest.mark.parametrize(("ours", "options"), [(MaskedAdamW, ADAMW), (MaskedSGD, SGD)])
def test_states_of_pruned_elements_are_zeroed_on_request(ours, options):
    weights = parameters()
    optimizer = ours(weights, **options)
    for step, reset in ((0, False), (1, True)):
        masks = masks_for(weights, packed=True, reset=reset)
        optimizer.use_masks(masks)
        fill_gradients((weights,), step)
        optimizer.step()
        gone = gone_elements(weights, masks)
        for weight, pruned in zip(weights, gone, strict=True):
            moments = [state for state in optimizer.state[weight].values() if state.shape == weight.shape != ()]
            assert moments or weight.dim() == 0
            for moment in moments:
                assert bool(moment[~pruned].all())
                assert bool((moment[pruned] == 0).all()) == (reset or not pruned.any())


def test_either_loads_the_state_of_the_other_and_copies_begin_without_masks():
    weights = parameters()
    optimizer = MaskedAdamW(weights, **ADAMW)
    optimizer.use_masks(masks_for(weights, packed=False))
    fill_gradients((weights,), 0)
    optimizer.step()
    theirs = torch.optim.AdamW(parameters(), **ADAMW)
    theirs.load_state_dict(optimizer.state_dict())
    assert torch.equal(
        theirs.state[theirs.param_groups[0]["params"][0]]["exp_avg"], optimizer.state[weights[0]]["exp_avg"]
    )
    twin = pickle.loads(pickle.dumps(MaskedSGD(parameters(), **SGD)))
    assert twin.masks_of(weights[0]) is None
    assert optimizer.masks_of(weights[0]) is not None


def test_what_it_does_not_do_is_refused_by_name():
    weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ConfigError, match="no amsgrad"):
        MaskedAdamW([weight], amsgrad=True)
    with pytest.raises(ConfigError, match=r"betas in \[0, 1\), got .*betas=\(0.9, 1.0\)"):
        MaskedAdamW([weight], betas=(0.9, 1.0))
    with pytest.raises(ConfigError, match="nesterov needs momentum"):
        MaskedSGD([weight], nesterov=True)
    with pytest.raises(ConfigError, match=r"steps on float32 weights, got bfloat16 \[2, 3\]"):
        MaskedSGD([nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))])
    convolution = nn.Parameter(torch.ones(4, 2, 3, 3))
    mask = WeightMask(torch.ones(1, 18, dtype=torch.bool), (4, 1), lambda tensor: tensor.movedim(1, -1).flatten(1))
    with pytest.raises(ConfigError, match=r"\[4, 2, 3, 3\] has no two-dimensional view"):
        MaskedAdamW([convolution]).use_masks({convolution: mask})
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = MaskedSGD(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match="does not take sparse gradients"):
        optimizer.step()


def test_a_pruner_hands_its_masks_over_and_spares_its_own_pass(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    optimizer = MaskedAdamW(model.parameters(), lr=1e-2)
    passes = []
    apply = group_module.apply_to_weights_
    monkeypatch.setattr(group_module, "apply_to_weights_", lambda *a: (passes.append(pruner.step), apply(*a)))
    pruner = Pruner(model, pattern="4x1", target_sparsity=0.5, start_step=2, end_step=6, frequency=2, reset_state=True)
    pruner.attach(optimizer)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(5, 16, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        if pruner.step >= 4:
            assert pruner.verify().zeros > 0
    assert passes == [4, 6]
    weight, mask = model[0].weight, pruner.masks.element_mask("0")
    assert int((~mask).sum()) > 0
    assert not weight[~mask].any()
    assert not optimizer.state[weight]["exp_avg"][~mask].any()
    pruner.detach()
    assert optimizer.masks_of(weight) is None


def zeros_of(net):
    return [float((part.weight == 0).float().mean()) for part in net]


def steps(net, optimizers, count=6):
    for step in range(count):
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(torch.randn(4, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def test_two_pruners_on_one_optimizer_both_have_their_masks():
    net = two_layers()
    optimizer = MaskedAdamW(net.parameters(), lr=1e-2)
    settings = {"pattern": "1x1", "target_sparsity": 0.5, "start_step": 1, "end_step": 3}
    first, second = (Pruner(net, include=[name], exclude_head=False, **settings).attach(optimizer) for name in "01")
    steps(net, [optimizer])
    assert zeros_of(net) == [0.5, 0.5]
    second.detach()
    steps(net, [optimizer], 2)
    assert zeros_of(net)[0] == 0.5
    assert first.verify().zeros == 32


def test_a_weight_that_the_optimizer_does_not_step_on_keeps_its_zeros():
    net = two_layers()
    optimizers = [torch.optim.SGD(net[1].parameters(), lr=0.1), MaskedAdamW(net[0].parameters(), lr=1e-2)]
    pruner = Pruner(net, pattern="1x1", target_sparsity=0.5, start_step=1, end_step=3, exclude_head=False)
    pruner.attach(optimizers[1])
    steps(net, optimizers)
    assert sum(zeros_of(net)) == 1.0


def test_states_and_parameters_that_it_cannot_step_on_are_refused():
    theirs = torch.optim.AdamW(two_layers().parameters(), amsgrad=True)
    with pytest.raises(ConfigError, match="has no amsgrad"):
        MaskedAdamW(two_layers().parameters()).load_state_dict(theirs.state_dict())
    with pytest.raises(ConfigError, match="gaps in memory"):
        MaskedSGD([nn.Parameter(torch.randn(4, 4, 6)[:, :, :3])])
