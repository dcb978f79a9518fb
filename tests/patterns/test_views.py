"""The 2-D view of a weight: what is a row, what is a column, and back again."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tritprune.patterns import WeightView

LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(3, 5, 2),
    "conv2d": lambda: nn.Conv2d(3, 5, (2, 3)),
    "conv3d": lambda: nn.Conv3d(2, 3, (1, 2, 2)),
    "grouped": lambda: nn.Conv2d(4, 6, 2, groups=2),
    "pointwise": lambda: nn.Conv2d(3, 5, 1),
    "hf_conv1d": lambda: Conv1D(4, 6),
}


def view_of(name):
    view = WeightView.of(name, LAYERS[name]())
    assert view is not None
    return view


@pytest.mark.parametrize("name", LAYERS)
def test_there_and_back(name):
    view = view_of(name)
    weight = view.parameter.detach()
    flat = view.to_2d(weight)
    assert tuple(flat.shape) == view.shape
    assert view.shape[0] * view.shape[1] == view.elements == weight.numel()
    assert torch.equal(view.from_2d(flat), weight)
    assert view.from_2d(flat).shape == weight.shape


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_is_an_output(name):
    """Zeroing a row zeroes that output for every input (up to the bias)."""
    view = view_of(name)
    module = view.module
    inputs = {
        "linear": (2, 6), "conv1d": (2, 3, 7), "conv2d": (2, 3, 5, 5), "conv3d": (2, 2, 4, 4, 4),
        "grouped": (2, 4, 5, 5), "pointwise": (2, 3, 5, 5), "hf_conv1d": (2, 6),
    }  # fmt: skip
    with torch.no_grad():
        flat = view.to_2d(view.parameter.detach()).clone()
        flat[1] = 0
        view.parameter.copy_(view.from_2d(flat))
        assert isinstance(module.bias, nn.Parameter)
        module.bias.zero_()
        out = module(torch.randn(inputs[name]))
    channel = -1 if name in ("linear", "hf_conv1d") else 1
    assert bool((out.select(channel, 1) == 0).all())
    assert not bool((out.select(channel, 0) == 0).all())


def test_the_input_channel_is_innermost():
    weight = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)  # [out, in, kh, kw]
    conv = nn.Conv2d(3, 2, 2)
    view = WeightView.of("conv", conv)
    assert view is not None
    flat = view.to_2d(weight)
    assert flat[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]
    for position, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        assert torch.equal(flat[:, 3 * position : 3 * position + 3], weight[:, :, i, j])


def test_conv1d_of_transformers_is_transposed_and_linear_is_not():
    conv = Conv1D(4, 6)
    view = WeightView.of("c_attn", conv)
    assert view is not None
    assert (view.kind, view.shape, tuple(conv.weight.shape)) == ("hf_conv1d", (4, 6), (6, 4))
    assert torch.equal(view.to_2d(conv.weight)[1], conv.weight[:, 1])


@pytest.mark.parametrize(
    ("name", "shares"),
    [("linear", True), ("hf_conv1d", True), ("pointwise", True), ("conv2d", False), ("conv1d", False)],
)
def test_what_shares_memory(name, shares):
    assert view_of(name).is_view is shares


def test_what_is_no_layer():
    for module in (nn.LayerNorm(4), nn.Embedding(3, 4), nn.ConvTranspose2d(3, 4, 2), nn.ReLU(), nn.BatchNorm1d(3)):
        assert WeightView.of("x", module) is None


def test_a_weight_that_is_computed_has_no_view():
    assert WeightView.of("x", nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))) is None
