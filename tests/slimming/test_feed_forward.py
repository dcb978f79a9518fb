from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tritprune.errors import ConfigError
from tritprune.slimming.feed_forward import find_feed_forward
from tritprune.slimming.graph import trace
from tritprune.slimming.slimmer import slim_model

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
}


def expected_widths(weights):
    """The fixpoint by hand, in rounds: a unit goes with its zero row or column, a width of 1 stays."""
    weights = [weight.clone() for weight in weights]
    singles = [len(weight) == 1 for weight in weights[:-1]]
    while True:
        alive = [
            [j for j in range(len(first)) if single or (any(first[j] != 0) and any(second[:, j] != 0))]
            for (first, second), single in zip(pairwise(weights), singles, strict=True)
        ]
        if all(len(kept) == len(first) for kept, first in zip(alive, weights, strict=False)):
            return [len(weight) for weight in weights]
        for layer, kept in enumerate(alive):
            weights[layer], weights[layer + 1] = weights[layer][kept], weights[layer + 1][:, kept]


@st.composite
def chains(draw):
    """A chain of linears with random zero rows and columns, and activations in between."""
    widths = draw(st.lists(st.integers(1, 6), min_size=3, max_size=5))
    torch.manual_seed(draw(st.integers(0, 1000)))
    layers = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs, bias=draw(st.booleans()))
        with torch.no_grad():
            linear.weight[draw(st.lists(st.integers(0, outputs - 1), max_size=outputs))] = 0
            linear.weight[:, draw(st.lists(st.integers(0, inputs - 1), max_size=inputs))] = 0
        layers += [linear, ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))](), nn.Dropout(0.5)]
    return nn.Sequential(*layers[:-2]).double(), widths[0]


@given(chains())
def test_outputs_stay_equal_and_widths_are_the_fixpoint(chain):
    model, inputs = chain
    linears = [module for module in model if isinstance(module, nn.Linear)]
    result = slim_model(model, torch.randn(3, inputs, dtype=torch.float64))
    slim = [module for module in result.model if isinstance(module, nn.Linear)]
    assert [linear.out_features for linear in slim] == expected_widths([linear.weight.detach() for linear in linears])
    assert [tuple(linear.weight.shape) for linear in slim] == [(m.out_features, m.in_features) for m in slim]
    x = torch.randn(20, inputs, dtype=torch.float64)
    torch.testing.assert_close(result.model(x), model.eval()(x), rtol=1e-9, atol=1e-12)


class Block(nn.Module):
    """A feed-forward block whose forward each test chooses."""

    def __init__(self, body, **settings):
        super().__init__()
        self.body = body
        self.up = nn.Linear(4, 8, **settings)
        self.gate = nn.Linear(4, 8, **settings)
        self.down = nn.Linear(8, 4, **settings)
        if "other" in body.__code__.co_names:  # a layer that does not run would hold what it may read
            self.other = nn.Linear(8, 4, **settings)

    def forward(self, x):
        return self.body(self, x)


def gelu_new(x):
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0))))


def kept_units(model, *, rows=None, columns=None, gate_rows=None):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        if rows is not None:
            model.up.weight[rows] = 0
        if gate_rows is not None:
            model.gate.weight[gate_rows] = 0
        if columns is not None:
            model.down.weight[:, columns] = 0
    result = slim_model(model, torch.randn(3, 5, 4))
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(result.model(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    return result, result.model.down.in_features


def test_activation_written_out_is_followed():
    _, kept = kept_units(Block(lambda m, x: m.down(gelu_new(m.up(x)))), rows=[0, 3], columns=[5])
    assert kept == 5


def test_constant_of_a_dead_unit_goes_into_a_new_bias():
    model = Block(lambda m, x: m.down(torch.sigmoid(m.up(x))), bias=False)
    result, kept = kept_units(model, rows=[1])
    assert kept == 7
    torch.testing.assert_close(result.model.down.bias, 0.5 * model.down.weight[:, 1])
    sizes = {"tensors": {"weight": [4, 7], "bias": [4]}, "sizes": {"in_features": 7}}
    assert result.widths["layers"]["down"] == sizes
    assert result.created == ("down.bias",)


def test_no_bias_is_made_where_none_is_needed():
    result, kept = kept_units(Block(lambda m, x: m.down(torch.relu(m.up(x))), bias=False), rows=[1])
    assert kept == 7
    assert result.model.down.bias is None


def test_gated_block_loses_units_of_all_its_linears():
    def gated(m, x):
        return m.down(torch.nn.functional.silu(m.gate(x)) * m.up(x))

    model = Block(gated, bias=False)
    result, kept = kept_units(model, rows=[1], gate_rows=[2], columns=[6])
    assert kept == 5  # a zero factor is enough where no bias lifts it
    assert result.model.up.out_features == result.model.gate.out_features == 5
    assert result.found[0]["target_frontier_linears"] == ["up", "gate"] or result.found[0][
        "target_frontier_linears"
    ] == ["gate", "up"]


def test_gated_block_keeps_a_unit_whose_other_factor_lives():
    result, kept = kept_units(Block(lambda m, x: m.down(torch.sigmoid(m.gate(x)) * m.up(x))), gate_rows=[2])
    assert kept == 8
    (refusal,) = result.refused
    assert (refusal.kind, refusal.where) == ("rows", "gate")
    assert refusal.reason == "1 of 8 rows are dead but stay: their units are alive: linear down reads them"


@pytest.mark.parametrize(
    ("body", "rows"),
    [
        (lambda m, x: m.down(torch.relu(h := m.up(x))) + m.other(h), [0, 3]),
        (lambda m, x: m.down(h := torch.sigmoid(m.up(x))) + m.other(h.tanh()), [0, 3]),
        (lambda m, x: m.down(torch.relu(m.up(x))) + m.up.bias.sum() * 0 + m.other(m.gate(x)), []),
        (lambda m, x: m.down(m.up(x) * m.gate.bias), [0, 3]),
        (lambda m, x: m.down(m.up(x) + m.gate.bias), [0, 3]),
    ],
)
def test_a_unit_goes_where_all_its_readers_can_do_without_it(body, rows):
    result, kept = kept_units(Block(body), rows=rows)
    assert kept == 8 - len(rows)
    assert not [refusal for refusal in result.refused if refusal.where == "up"]


def test_a_unit_that_one_of_two_readers_needs_stays():
    def fan_out(m, x):
        return m.down(h := torch.relu(m.up(x))) + m.other(h)

    result, kept = kept_units(Block(fan_out), columns=[5])
    assert kept == 8
    (refusal,) = result.refused
    assert refusal.where == "down"
    assert refusal.reason == "1 of 8 columns are dead but stay: their units are alive: linear other reads them"


def test_a_weight_that_runs_twice_is_cut_where_both_runs_agree():
    def twice(m, x):
        return m.down(torch.sigmoid(m.up(torch.relu(m.down(torch.sigmoid(m.up(x)))))))

    result, kept = kept_units(Block(twice), rows=[0, 3], columns=[5])
    assert kept == 5
    assert result.folded == ("down.bias",)

    def differently(m, x):
        return m.down(torch.sigmoid(m.up(m.down(torch.tanh(m.up(x))))))

    _, kept = kept_units(Block(differently), rows=[0, 3], columns=[5])
    assert kept == 7  # the bias of down cannot hold both constants


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.down(h := torch.relu(m.up(x))) + m.other(h.softmax(-1)), "they feed softmax, which needs all"),
        (lambda m, x: (m.down(h := torch.relu(m.up(x))), h), "the model returns them as 1"),
        (lambda m, x: m.down(torch.relu(h := m.up(x))) / h.size(-1), "without them the model's outputs differ by"),
        (lambda m, x: m.down(torch.relu(m.up(x))) + m.up.weight.sum(), "they feed sum up, which needs all of them"),
        (lambda m, x: m.down(torch.softmax(m.up(x), dim=-1)), "they feed softmax, which needs all of them"),
        (lambda m, x: m.down(torch.roll(m.up(x), 1)), "they feed roll, which needs all of them"),
        (lambda m, x: m.down(torch.cumsum(m.up(x), dim=-1)), "they feed cumsum, which needs all of them"),
        (lambda m, x: m.down(torch.fft.fft(m.up(x)).real), "they feed fft_fft, which needs all of them"),
        (lambda m, x: m.down(m.up(x) + torch.arange(8.0)), "add combines them with"),
        (
            lambda m, x: m.down(torch.cat([m.up(x)[..., :4], m.gate(x)[..., 4:]], dim=-1)),
            "the model does not run without",
        ),
        (
            lambda m, x: m.down(m.up(x) + m.gate(x).detach().mean(dim=0)),
            "their units are alive: linear down reads them",
        ),
    ],
)
def test_what_ties_units_together_is_named(body, reason):
    result, kept = kept_units(Block(body), rows=[0, 3])
    assert kept == 8
    assert result.cuts == []
    (refusal,) = [refusal for refusal in result.refused if refusal.where == "up"]
    assert refusal.reason.startswith("2 of 8 rows are dead but stay: ")
    assert reason in refusal.reason


def test_tied_weights_lose_the_same_rows():
    model = Block(lambda m, x: m.down(torch.relu(m.up(x))) + m.other(torch.relu(m.gate(x))))
    model.gate.weight = model.up.weight
    result, kept = kept_units(model, rows=[0])
    assert kept == 7
    assert result.model.gate.weight is result.model.up.weight
    assert result.model.gate.out_features == result.model.other.in_features == 7


@pytest.mark.parametrize("layout", ["chunk", "glu"])
def test_fused_gate_and_up(layout):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up, self.down = nn.Linear(4, 16), nn.Linear(8, 4)

        def forward(self, x):
            if layout == "glu":
                return self.down(nn.functional.glu(self.gate_up(x)))
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(nn.functional.silu(gate) * up)

    model = Fused()
    with torch.no_grad():
        model.down.weight[:, [0, 7]] = 0
        model.gate_up.weight[[2, 10]] = 0
    result = slim_model(model, torch.randn(3, 4))
    kept = [1, 3, 4, 5, 6]
    assert result.selections["gate_up.weight"][0].tolist() == kept + [8 + k for k in kept]
    assert result.found[0]["target_frontier_linears"] == ["gate_up"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(result.model(x), model(x))


def test_a_residual_width_goes_where_it_is_dead_everywhere():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 6)
            self.inner = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x)
            for linear in self.inner:
                x = x + torch.relu(linear(x))
            return self.head(x)

    model = Residual()
    with torch.no_grad():
        for linear in (model.first, *model.inner):
            linear.weight[1] = 0
        model.inner[1].weight[2:4] = 0
    result = slim_model(model, torch.randn(2, 3))
    assert result.model.first.out_features == result.model.head.in_features == 5
    reasons = {refusal.where: refusal.reason for refusal in result.refused}
    assert reasons["inner.1"] == "2 of 5 rows are dead but stay: their units are alive: linear inner.0 reads them"
    x = torch.randn(4, 3)
    torch.testing.assert_close(result.model(x), model(x))


def test_a_width_that_starts_with_the_input_stays():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            for linear in self.inner:
                x = x + torch.relu(linear(x))
            return self.head(x)

    model = Residual()
    with torch.no_grad():
        model.inner[1].weight[2:4] = 0
        model.head.weight[:, 0] = 0
    result = slim_model(model, torch.randn(2, 6))
    reasons = {refusal.where: refusal.reason for refusal in result.refused}
    assert result.cuts == []
    why = "add combines them with the model's input; 4 layers share their width"
    assert reasons["inner.1"] == f"2 of 6 rows are dead but stay: {why}"
    assert reasons["head"] == f"1 of 6 columns are dead but stay: {why}"


def test_outputs_of_the_model_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[:, 0] = 0
    result = slim_model(model, torch.randn(2, 3))
    assert [refusal.reason for refusal in result.refused] == [
        "1 of 4 rows are dead but stay: the model returns them",
        "1 of 3 columns are dead but stay: they read the model's input",
    ]


def test_a_constant_that_is_not_finite_keeps_its_unit():
    class Logarithm(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.down(1.0 / self.up(x)).nan_to_num(0.0, 0.0, 0.0)

    model = Logarithm()
    with torch.no_grad():
        model.up.weight[0] = 0
        model.up.bias[0] = 0
    result = slim_model(model, torch.randn(2, 3))
    assert result.model.up.out_features == 4


def test_a_linear_of_another_kind_is_cut_by_what_it_computes():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = 0
    result = slim_model(model, torch.randn(2, 3))
    assert result.model[0].out_features == 3
    x = torch.randn(5, 3)
    torch.testing.assert_close(result.model(x), model(x))


def test_a_weight_that_is_computed_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    result = slim_model(model, torch.randn(2, 3))
    assert result.cuts == []
    (refusal,) = result.refused
    assert "they read what linear 0 makes, whose width is not followed" in refusal.reason


def test_blocks_are_found_in_order_of_execution():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 2))
    blocks = find_feed_forward(trace(model, torch.randn(2, 3)), model)
    assert [(block.root, block.frontier) for block in blocks] == [("2", ("0",)), ("3", ("2",))]


def test_pytorchs_encoder_is_seen_behind_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        layer.linear1.weight[:3] = 0
    result = slim_model(layer, torch.randn(2, 5, 8))
    assert [(cut.where, cut.after) for cut in result.cuts] == [("linear2", 13)]
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(result.model(x), layer(x))


@pytest.mark.parametrize(("multiple", "expected"), [(1, 5), (2, 6), (4, 8), (3, 6), (16, 10)])
def test_rounded_widths_keep_the_strongest_dead_units(multiple, expected):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3))
    with torch.no_grad():
        model[0].weight[:] = 1.0
        model[2].weight[:, [0, 2, 4, 6, 8]] = 0
        model[0].weight[[4, 8]] = 2.0
    result = slim_model(model, torch.randn(2, 4), round_to=multiple)
    kept = result.selections.get("0.weight", {0: torch.arange(10)})[0].tolist()
    assert len(kept) == expected
    assert kept == sorted([1, 3, 5, 7, 9, *[4, 8, 0, 2, 6][: expected - 5]])
    if multiple in (2, 4):
        reason = f"{expected - 5} of 10 units are dead but stay: widths are multiples of {multiple}"
        assert [refusal.reason for refusal in result.refused] == [reason]


def test_round_to_is_checked():
    with pytest.raises(ConfigError, match="round_to is a whole number from 1 on, got 0"):
        slim_model(nn.Linear(2, 2), torch.randn(1, 2), round_to=0)
