"""Channels between convolutions: batch norms, depthwise and grouped convolutions, pools, padding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tritprune.slimming import slim_model

both = pytest.mark.parametrize("tracer", ["jit", "export"])


def made(body, shape=(2, 3, 6, 6), tracer="jit"):
    """``body`` with random weights and statistics, slimmed in float64 after ``body.damage``; the outputs are equal."""
    torch.manual_seed(0)
    model = body.double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_(std=0.5)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
        model.damage()
    result = slim_model(model, torch.randn(shape, dtype=torch.float64), tracer=tracer)
    x = torch.randn(5, *shape[1:], dtype=torch.float64)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-10)
    return result


class Net(nn.Module):
    """conv, batch norm, activation, conv, pool, linear."""

    def __init__(self, activation=torch.relu, padding=0, mode="zeros"):
        super().__init__()
        self.activation = activation
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 5, 3, padding=padding, padding_mode=mode)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.second(self.activation(self.norm(self.first(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))

    def damage(self):
        self.first.weight[[1, 4]] = 0  # what is left is the batch norm's constant
        self.norm.weight[2] = 0  # as is here
        self.norm.bias[[1, 2, 4]] = torch.tensor([0.3, 0.7, -0.4]).double()
        self.norm.running_mean[[1, 4]] = 0
        self.second.weight[:, 6] = 0
        self.head.weight[:, 3] = 0


@both
def test_constants_go_through_batch_norm_and_activation_into_the_next_bias(tracer):
    result = made(Net(torch.sigmoid), tracer=tracer)
    assert [(cut.where, cut.before, cut.after) for cut in result.cuts] == [("first", 8, 4), ("second", 5, 4)]
    assert result.selections["first.weight"][0].tolist() == [0, 3, 5, 7]
    assert result.selections["norm.running_var"][0].tolist() == [0, 3, 5, 7]
    assert result.folded == ("second.bias",)
    assert (result.model.norm.num_features, result.model.second.in_channels) == (4, 4)


def test_padding_with_zeros_keeps_a_constant_that_is_not_zero():
    result = made(Net(torch.relu, padding=1))
    assert result.selections["first.weight"][0].tolist() == [0, 1, 2, 3, 5, 7]  # relu(-0.4) = 0 goes
    reasons = {(refusal.kind, refusal.where): refusal.reason for refusal in result.refused}
    assert (
        reasons["rows", "first"]
        == "1 of 6 rows are dead but stay: their units are alive: convolution second reads them"
    )
    assert made(Net(torch.relu, padding=1, mode="replicate")).selections["first.weight"][0].tolist() == [0, 3, 5, 7]


@both
def test_a_depthwise_convolution_loses_its_channels(tracer):
    class Depthwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.widen, self.filter = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 12, 3, padding=1, groups=6)
            self.narrow = nn.Conv2d(12, 4, 1)

        def forward(self, x):
            return self.narrow(F.hardswish(self.filter(F.relu6(self.widen(x)))))

        def damage(self):
            self.narrow.weight[:, [4, 5, 9]] = 0
            self.widen.weight[5], self.widen.bias[5] = 0, -1.0  # relu6 makes it zero, so padding is no obstacle

    result = made(Depthwise(), tracer=tracer)
    assert result.selections["widen.weight"][0].tolist() == [0, 1, 3, 4]
    assert result.selections["filter.weight"][0].tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    assert (result.model.filter.groups, result.model.filter.in_channels, result.model.filter.out_channels) == (4, 4, 8)


def test_a_grouped_convolution_loses_whole_groups():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 9, 3, groups=3)
            self.last = nn.Conv1d(9, 2, 1)

        def forward(self, x):
            return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))

        def damage(self):
            self.last.weight[:, 3:7] = 0

    result = made(Grouped(), (2, 3, 7))
    assert result.selections["second.weight"][0].tolist() == [0, 1, 2, 6, 7, 8]
    assert (result.model.second.groups, result.model.first.out_channels) == (2, 4)


def test_channels_that_are_flattened_with_their_pixels():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(64, 5)

        def forward(self, x):
            return self.head(torch.sigmoid(self.conv(x)).flatten(1))

        def damage(self):
            self.conv.weight[1] = 0
            self.head.weight[:, 32:48] = 0
            self.head.weight[:, 48:60] = 0  # a part of channel 3 only

    result = made(Flat())
    assert result.selections["conv.weight"][0].tolist() == [0, 3]
    assert result.model.head.in_features == 32
    assert result.refused[0].reason.startswith("12 of 32 columns are dead but stay: their units are alive")


@both
def test_concatenated_channels_go_from_where_they_come(tracer):
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 2, 1)

        def forward(self, x):
            return self.out(torch.cat([self.left(x), F.silu(self.right(x))], dim=1))

        def damage(self):
            self.out.weight[:, [1, 4, 9]] = 0
            self.left.weight[3] = 0

    result = made(Dense(), tracer=tracer)
    assert result.selections["left.weight"][0].tolist() == [0, 2]
    assert result.selections["right.weight"][0].tolist() == [1, 2, 3, 4]
    assert result.model.out.in_channels == 6


def test_a_group_norm_keeps_a_channel_whose_group_lives():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.second = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.second(self.norm(self.first(x)))

        def damage(self):
            self.second.weight[:, 0] = 0

    result = made(Normed())
    assert result.cuts == []
    reasons = [refusal.reason for refusal in result.refused]
    assert reasons == ["1 of 4 columns are dead but stay: group_norm norm normalises 2 channels together"]


def test_a_transposed_convolution_is_cut_where_nothing_reads():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.up, self.last = nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv2d(5, 2, 1)

        def forward(self, x):
            return self.last(torch.relu(self.up(torch.relu(self.first(x)))))

        def damage(self):
            self.up.weight[[0, 3]] = 0
            self.last.weight[:, 1] = 0

    result = made(Decoder())
    assert result.model.up.weight.shape == (4, 4, 2, 2)
    assert (result.model.up.in_channels, result.model.up.out_channels) == (4, 4)


class Normed(nn.Module):
    """Two convolutions with a norm between."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        self.eval()

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("tracer", ["jit", "export"])
@pytest.mark.parametrize(
    ("norm", "left"), [(lambda: nn.GroupNorm(4, 8), 6), (lambda: nn.InstanceNorm2d(8, affine=True), 5)]
)
def test_groups_of_channels_that_are_normalised_together_go_together(norm, left, tracer):
    model = Normed(norm())
    with torch.no_grad():
        model.second.weight[:, [0, 2, 3]] = 0  # channel 1 stays, and channel 0 in its group
    result = slim_model(model, torch.rand(2, 3, 8, 8), tracer=tracer)
    assert [(cut.before, cut.after) for cut in result.cuts] == [(8, left)]
    assert result.model.norm.weight.shape == (left,)
    if left == 6:
        assert (result.model.norm.num_groups, result.model.norm.num_channels) == (3, 6)
        (refusal,) = result.refused
        assert refusal.reason == "1 of 6 columns are dead but stay: group_norm norm normalises 2 channels together"
    x = torch.rand(1, 3, 9, 9)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [nn.GroupNorm(4, 8, affine=False), nn.GroupNorm(1, 8)])
def test_channels_that_are_all_normalised_together_stay(norm):
    model = Normed(norm)
    with torch.no_grad():
        model.second.weight[:, [2, 3]] = 0
    assert slim_model(model, torch.rand(2, 3, 8, 8)).cuts == []


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_weight_that_is_computed_is_named_so_and_holds_no_other_layer():
    model = Normed(nn.InstanceNorm2d(8, affine=True))
    with torch.no_grad():
        model.first.weight[0], model.norm.bias[0] = 0, 0
        model.second.weight[3] = 0
    nn.utils.parametrize.register_parametrization(model.second, "weight", Twice())
    reasons = [refusal.reason for refusal in slim_model(model, torch.rand(2, 3, 8, 8)).refused]
    assert any(reason.endswith("its weight is computed while it runs") for reason in reasons), reasons
    assert not any("does not run" in reason for reason in reasons)
