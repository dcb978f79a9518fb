"""Masked steps on a device against torch's own optimizers there and a mask; scripts/gpu runs these."""

import pytest
import torch
from torch import nn

from tritprune.optim import MaskedAdamW, MaskedSGD, WeightMask

pytestmark = pytest.mark.gpu

SHAPES = [(256, 128), (130, 77), (1000,), ()]
SGD = {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.01}


def parameters():
    """Usual and tiny weights, zeros, and weights of every size that fp32 has."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in SHAPES]
    exponents = torch.randint(-140, 126, SHAPES[1], generator=generator)
    made[1] = (made[1].double() * 2.0**exponents).float()
    made[2][::2] = 0.0
    return [nn.Parameter(tensor.cuda()) for tensor in made]


def ulps(actual, expected):
    """The largest distance in units in the last place, zero and its neighbours included."""
    places = [tensor.detach().view(torch.int32).long() for tensor in (actual, expected)]
    places = [torch.where(place < 0, -(place & 0x7FFFFFFF), place) for place in places]
    apart = (places[0] - places[1]).abs().masked_fill(actual.isnan() & expected.isnan(), 0)
    return int(apart.max())


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        (MaskedAdamW, torch.optim.AdamW, {"lr": 3e-3, "betas": (0.9, 0.98), "eps": 1e-7, "weight_decay": 0.1}),
        (MaskedAdamW, torch.optim.AdamW, {"lr": 0.3, "betas": (0.3, 0.4), "eps": 0.0, "weight_decay": 0.0}),
        (MaskedSGD, torch.optim.SGD, SGD),
        (MaskedSGD, torch.optim.SGD, SGD | {"dampening": 0.2}),
        (MaskedSGD, torch.optim.SGD, SGD | {"nesterov": True}),
        (MaskedSGD, torch.optim.SGD, SGD | {"momentum": 0.0}),
    ],
)
def test_a_step_on_a_device_is_that_of_torch_there_and_the_mask_within_one_ulp(ours, theirs, options):
    mine, other = parameters(), parameters()
    own, reference = ours(mine, **options), theirs(other, **options, foreach=True)
    keep = torch.rand(64, 128, generator=torch.Generator().manual_seed(5)).cuda() < 0.4
    own.use_masks({mine[0]: WeightMask(keep, (4, 1), lambda tensor: tensor)})
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        for weight, expected in zip(mine, other, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator).cuda()
            expected.grad = weight.grad.clone()
        own.step()
        reference.step()
        other[0].detach().mul_(keep.repeat_interleave(4, 0)).add_(0.0)
        assert [ulps(a, b) <= 1 for a, b in zip(mine, other, strict=True)] == [True] * len(SHAPES)
        for weight, expected in zip(mine, other, strict=True):
            for name in {"exp_avg", "exp_avg_sq", "momentum_buffer"} & reference.state[expected].keys():
                if reference.state[expected][name] is not None:
                    assert ulps(own.state[weight][name], reference.state[expected][name]) <= 1
                    reference.state[expected][name].copy_(own.state[weight][name])  # one step is compared at a time
            expected.detach().copy_(weight.detach())
