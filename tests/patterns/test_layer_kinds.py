"""What goes together in the stored weights of every kind of layer; N:M that grows; several patterns in one model."""

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tritprune import Pruner
from tritprune.errors import ConfigError

LAYERS = {
    "linear": lambda: nn.Linear(6, 10),
    "conv1d": lambda: nn.Conv1d(3, 10, 2),
    "conv2d": lambda: nn.Conv2d(3, 10, (2, 3)),
    "grouped": lambda: nn.Conv2d(4, 10, 2, groups=2),
    "depthwise": lambda: nn.Conv2d(10, 10, 3, groups=10),
    "Conv1D of transformers": lambda: Conv1D(10, 6),
}


def places(layer):
    """``(output, kernel position, input channel)`` of every element of the stored weight, in the weight's layout."""
    shape = tuple(layer.weight.shape)
    if isinstance(layer, Conv1D):
        return {(i, o): (o, (), i) for i, o in itertools.product(*map(range, shape))}
    return {
        (o, i, *position): (o, position, i)
        for o, i, *position in (tuple(index) for index in itertools.product(*map(range, shape)))
        for position in [tuple(position)]
    }


def units_by_definition(layer, n, m):
    """Elements that stay or go together: N consecutive outputs by M consecutive columns, input channel innermost."""
    found: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    order = {key: c for c, key in enumerate(sorted({(p, i) for _, p, i in places(layer).values()}))}
    outputs = {o for o, _, _ in places(layer).values()}
    n, m = (len(outputs) if n == "channel" else n), (len(order) if m == "channel" else m)
    for index, (output, position, channel) in places(layer).items():
        found.setdefault((output // n, order[position, channel] // m), set()).add(index)
    return found.values()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("n", "m"), [(4, 1), ("channel", 1), (1, "channel"), ("channel", 2), (2, "channel"), (3, 2), (7, 3)]
)
def test_what_goes_together(kind, n, m):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    units = list(units_by_definition(layer, n, m))
    with torch.no_grad():
        layer.weight.copy_(torch.rand_like(layer.weight) + 1)
    pruner = Pruner(
        layer, pattern=f"{n}x{m}", criterion="magnitude", target_sparsity=0.55, end_step=0, schedule="linear"
    )
    means = {frozenset(unit): sum(layer.weight[index].item() for index in unit) / len(unit) for unit in units}
    pruner.attach(torch.optim.SGD(layer.parameters(), lr=0.1))
    zero = {tuple(index) for index in (layer.weight == 0).nonzero().tolist()}
    gone, budget = set(), int(0.55 * layer.weight.numel())
    for unit in sorted(means, key=means.__getitem__):
        if len(gone) + len(unit) > budget:
            break
        gone |= unit
    assert zero == gone
    assert pruner.layer_report()[0]["units"] == len(units)


def test_a_row_of_a_convolution_is_a_filter_and_a_column_one_position_of_one_input_channel():
    conv = nn.Conv2d(3, 4, 2)
    with torch.no_grad():
        conv.weight.fill_(1).select(0, 2).fill_(0.1)
    rows = Pruner(conv, pattern="1xchannel", criterion="magnitude", target_sparsity=0.25, end_step=0)
    rows.attach(torch.optim.SGD(conv.parameters(), lr=0.1)).detach()
    assert (conv.weight == 0).flatten(1).all(1).tolist() == [False, False, True, False]
    with torch.no_grad():
        conv.weight.fill_(1)[:, 1, 0, 1] = 0.1
    columns = Pruner(conv, pattern="channelx1", criterion="magnitude", target_sparsity=1 / 12, end_step=0)
    columns.attach(torch.optim.SGD(conv.parameters(), lr=0.1))
    assert (conv.weight == 0).nonzero()[:, 1:].unique(dim=0).tolist() == [[1, 0, 1]]
    assert int((conv.weight == 0).sum()) == 4


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 3), (5, 8)])
def test_n_in_m_grows_with_the_schedule(kind, n, m):
    """At every update a group is dense or has lost exactly N, and what is pruned is pruned for good."""
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    places_of = sorted(places(layer).items(), key=lambda item: item[1])
    columns = len(places_of) // 10
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    pruner = Pruner(
        layer,
        pattern=f"{n}:{m}",
        criterion="magnitude",
        target_sparsity=n / m,
        schedule="linear",
        start_step=1,
        end_step=6,
    ).attach(optimizer)
    before: set[tuple[int, ...]] = set()
    grown = []
    for _ in range(6):
        layer.weight.grad = torch.randn_like(layer.weight)
        optimizer.step()
        zero = {index for index, _ in places_of if layer.weight[index] == 0}
        for row in range(10):
            own = [index for index, _ in places_of[row * columns : (row + 1) * columns]]
            for start in range(0, columns, m):
                group = own[start : start + m]
                assert len(zero.intersection(group)) in (0, len(group) * n // m)
        assert before <= zero
        before = zero
        grown.append(len(zero))
    assert grown == sorted(grown)
    assert len(set(grown)) > 2
    assert grown[-1] == 10 * (columns // m * n + columns % m * n // m) == pruner.sparsity().prunable.zeros


class Mixed(nn.Module):
    """Convolutions, a transposed linear and linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3)
        self.mixer = Conv1D(16, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2))
        self.classifier = nn.Linear(16, 3)

    def forward(self, x):
        x = self.mixer(self.stem(x).mean((2, 3)))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x)


def test_several_patterns_in_one_model_by_name_and_by_glob():
    torch.manual_seed(0)
    model = Mixed()
    groups = [
        {"name": "filters", "include": ["stem"], "pattern": "1xchannel", "target_sparsity": 0.25},
        {"name": "transposed", "include": ["mixer"], "pattern": "channelx2", "target_sparsity": 0.5},
        {"name": "fine", "include": ["blocks.*.0"], "pattern": "2:4", "target_sparsity": 0.5},
        {
            "name": "coarse",
            "include": ["blocks.*.1"],
            "pattern": "4x4",
            "target_sparsity": 0.75,
            "criterion": "magnitude",
        },
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(model, start_step=1, end_step=4, groups=groups).attach(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn((3, 4, 5, 5), generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    zero = {layer.name: model.get_submodule(layer.name).weight == 0 for layer in pruner.layers}
    assert int(zero["stem"].flatten(1).all(1).sum()) == 2
    assert int(zero["stem"].sum()) == 2 * 36
    assert int(zero["mixer"].view(4, 2, 16).all(2).all(1).sum()) == 2  # stored [in, out]: two inputs of all outputs
    for block in ("blocks.0.0", "blocks.1.0"):
        assert (zero[block].view(16, 4, 4).sum(2) == 2).all()
    coarse = sum(int(zero[f"blocks.{i}.1"].view(4, 4, 4, 4).all(3).all(1).sum()) for i in range(2))
    assert coarse == 24
    assert {e.name: e.reason for e in pruner.excluded} == {"classifier": "not included"}


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"include": ["blocks.**"], "pattern": "2:4"}, r"blocks\.0\.1 is in two pruner groups, 'a' and 'b'"),
        ({"include": ["blocks.0.1"], "pattern": "4x1"}, r"blocks\.0\.1 is in two pruner groups, 'a' and 'b'"),
        ({"include": ["blocks.7"]}, r"include 'blocks\.7' of group 'b' matches no layer"),
    ],
)
def test_overlaps_and_misses_are_refused(second, said):
    groups = [{"name": "a", "include": ["blocks.*.1"]}, {"name": "b", **second}]
    with pytest.raises(ConfigError, match=said):
        Pruner(Mixed(), end_step=3, target_sparsity=0.5, groups=groups)
