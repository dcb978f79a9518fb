"""Masked steps against torch's own optimizers plus mask, bit for bit, and the pruner that hands its masks over."""

import pickle

import pytest
import torch
from torch import nn

from tritprune import Pruner
from tritprune.errors import ConfigError
from tritprune.kernels import masked_adamw_, pack_mask, use_backend
from tritprune.kernels.compiled import optimizers
from tritprune.optim import MaskedAdamW, MaskedSGD, WeightMask
from tritprune.pruners import group as group_module

ADAMW = {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}
SGD = {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.01}


def parameters(values="normal"):
    """Linear, bias, convolution and a convolution whose channels are last in memory."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 33), (40,), (6, 3, 2, 2), (8, 5, 3, 3), ()]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    if values == "ugly":
        exponents = [torch.randint(-140, 126, shape, generator=generator) for shape in shapes]
        made[0] = (made[0].double() * 2.0 ** exponents[0]).float()
        made[1], made[2] = torch.zeros(40), made[2] * 1e-39
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


def fill_gradients(many, step, ugly=False):
    """The same gradients for all: of usual size; ugly ones also tiny, of every size that fp32 has, or half zeros."""
    generator = torch.Generator().manual_seed(100 + step)
    for number, several in enumerate(zip(*many, strict=True)):
        shape = several[0].shape
        gradient = torch.randn(shape, generator=generator)
        exponents = torch.randint(-140, 60, shape, generator=generator)
        kind = (step + number) % 4 if ugly else 0
        gradient = {
            0: gradient,
            1: gradient * 1e-30,
            2: (gradient.double() * 2.0**exponents).float(),
            3: gradient * (exponents % 2),
        }[kind]
        for parameter in several:
            parameter.grad = gradient.clone()


def differing(mine, theirs):
    """Elements whose bits differ; any NaN is any other."""
    mine, theirs = mine.detach(), theirs.detach()
    different = mine.contiguous().view(torch.int32) != theirs.contiguous().view(torch.int32)
    return int((different & ~(mine.isnan() & theirs.isnan())).sum())


ADAMW_AND_SGD = [
    (MaskedAdamW, torch.optim.AdamW, ADAMW),
    (MaskedAdamW, torch.optim.AdamW, ADAMW | {"weight_decay": 0.0, "lr": 1e-2, "betas": (0.3, 0.4)}),
    (MaskedAdamW, torch.optim.AdamW, ADAMW | {"lr": 3.0, "eps": 0.0}),
    (MaskedSGD, torch.optim.SGD, SGD),
    (MaskedSGD, torch.optim.SGD, SGD | {"dampening": 0.2}),
    (MaskedSGD, torch.optim.SGD, SGD | {"nesterov": True}),
    (MaskedSGD, torch.optim.SGD, SGD | {"momentum": 0.0}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), ADAMW_AND_SGD)
@pytest.mark.parametrize(("masked", "foreach"), [("no", True), ("bool", False), ("packed", False)])
@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_many_steps_are_those_of_torch_and_the_mask_bit_for_bit(ours, theirs, options, foreach, masked, backend):
    mine, other = (parameters(values=values) for values in ("ugly", "ugly"))
    own, reference = ours(mine, **options), theirs(other, **options, foreach=foreach, fused=False)
    masks = {} if masked == "no" else masks_for(mine, masked == "packed")
    own.use_masks(masks)
    gone = gone_elements(mine, masks)
    with use_backend(backend):
        for step in range(6):
            fill_gradients((mine, other), step, ugly=True)
            own.step()
            reference.step()
            for weight, expected, pruned in zip(mine, other, gone, strict=True):
                expected.detach().masked_fill_(pruned, 0.0)
                assert differing(weight, expected) == 0
                for name in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & reference.state[expected].keys():
                    if reference.state[expected][name] is not None:
                        assert differing(own.state[weight][name], reference.state[expected][name]) == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_and_threads_change_no_bit(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(optimizers, "_ALONE", 64)
    monkeypatch.setattr(optimizers, "_TOGETHER", 100)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # elsewhere the reference may stand in
        optimizers._as_torch.cache_clear()
        assert optimizers._as_torch()
    for ours, options in ((MaskedAdamW, ADAMW), (MaskedSGD, SGD | {"nesterov": True})):
        made = {backend: parameters() for backend in ("torch", "numba")}
        for backend, weights in made.items():
            optimizer = ours(weights, **options)
            optimizer.use_masks(masks_for(weights, packed=True, reset=True))
            for step in range(3):
                fill_gradients((weights,), step)
                with use_backend(backend):
                    optimizer.step()
        assert [differing(*pair) for pair in zip(*made.values(), strict=True)] == [0] * 5


def test_where_the_loops_would_differ_from_torch_they_do_not_run(monkeypatch):
    expected, weights = parameters(), parameters()
    monkeypatch.setattr(optimizers, "_as_torch", lambda: False)
    monkeypatch.setattr(optimizers, "_adamw", None)
    for net, backend in ((expected, "torch"), (weights, "numba")):
        fill_gradients((net,), 0)
        with use_backend(backend):
            MaskedAdamW(net, **ADAMW).step()
    assert [differing(*pair) for pair in zip(weights, expected, strict=True)] == [0] * 5


def test_the_arithmetic_of_cuda_is_one_ulp_of_the_change_away():
    """What torch itself gives on a CPU and on CUDA differs by this, too."""
    generator = torch.Generator().manual_seed(0)
    w, g, m, v = (torch.randn(1, 4000, generator=generator) for _ in range(4))
    numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01, "step": 7}
    results = {}
    for rounding in ("own", "cuda"):
        made = [tensor.clone() for tensor in (w, g, m, v.abs())]
        masked_adamw_(*([tensor] for tensor in made), [None], [(1, 1)], **numbers, rounding=rounding)
        results[rounding] = made[0]
    change = (results["own"] - w).abs() + 0.01 * w.abs()
    difference = (results["own"] - results["cuda"]).abs()
    assert 0 < float((difference / change.clamp(min=1e-3)).max()) < 1e-4
    spacing = torch.nextafter(results["own"].abs(), torch.tensor(torch.inf)) - results["own"].abs()
    usual = change < results["own"].abs()
    assert float((difference / spacing)[usual].max()) <= 1


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
    with pytest.raises(ConfigError, match="MaskedSGD has no maximize"):  # it would go downhill
        MaskedSGD([{"params": list(two_layers().parameters()), "maximize": True}])
    optimizer = MaskedAdamW(two_layers().parameters())
    with pytest.raises(ConfigError, match="MaskedAdamW has no amsgrad"):
        optimizer.add_param_group({"params": list(two_layers().parameters()), "amsgrad": True})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ConfigError, match="gaps in memory"):
        MaskedSGD([nn.Parameter(torch.randn(4, 4, 6)[:, :, :3])])
