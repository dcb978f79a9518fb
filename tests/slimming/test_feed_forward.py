from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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
    """The fixpoint by hand: a unit goes with its zero row or its zero column; the first stays if all would go."""
    weights = [weight.clone() for weight in weights]
    changed = True
    while changed:
        changed = False
        for layer in range(len(weights) - 1):
            first, second = weights[layer], weights[layer + 1]
            alive = [j for j in range(len(first)) if any(first[j] != 0) and any(second[:, j] != 0)] or [0]
            if len(alive) < len(first):
                weights[layer], weights[layer + 1], changed = first[alive], second[:, alive], True
    return [len(weight) for weight in weights]


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
    assert "1 of 8 rows are dead but stay: their units live through the other linears of the block" in refusal.reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.down(torch.relu(h := m.up(x))) + m.other(h), "they feed 2 linears at once: down, other"),
        (lambda m, x: m.down(h := torch.relu(m.up(x))) + m.other(h), "they feed 2 linears at once: down, other"),
        (
            lambda m, x: m.down(h := torch.relu(m.up(x))) + m.other(h.softmax(-1)),
            "outside of the block too, by softmax",
        ),
        (lambda m, x: (m.down(h := torch.relu(m.up(x))), h), "the model also returns them"),
        (lambda m, x: m.down(torch.relu(m.up(m.down(m.up(x))))), "its weight is read 2 times in one forward pass"),
        (lambda m, x: m.down(h := m.up(x)) / h.size(-1), "by size"),
        (
            lambda m, x: m.down(torch.relu(m.up(x))) + m.up.weight.sum(),
            "its weight is read 2 times in one forward pass",
        ),
        (lambda m, x: m.down(torch.relu(m.up(x)) + m.gate(x)) + m.other(m.gate(x)), "read 2 times"),
    ],
)
def test_fan_out_is_refused_with_its_reason(body, reason):
    result, kept = kept_units(Block(body), rows=[0, 3], columns=[5])
    assert kept == 8
    assert result.cuts == []
    rows = next(refusal for refusal in result.refused if refusal.where == "up")
    assert rows.reason.startswith("2 of 8 rows are dead but stay: ")
    assert reason in rows.reason
    columns = next(refusal for refusal in result.refused if refusal.where == "down")
    assert columns.reason.startswith("1 of 8 columns are dead but stay: ")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (lambda m, x: m.down(torch.softmax(m.up(x), dim=-1)), "they feed softmax, which needs the whole width"),
        (lambda m, x: m.down(m.up(x) + m.gate(x).detach().mean(dim=0)), "residual add"),
        (lambda m, x: m.down(torch.cat([m.up(x)[..., :4], m.gate(x)[..., 4:]], dim=-1)), "they feed slice"),
        (lambda m, x: m.down(m.up(x) * m.gate.bias), "mul combines them with the parameter gate.bias"),
        (lambda m, x: m.down(m.up(x) + m.gate.bias), "add combines them with the parameter gate.bias"),
    ],
)
def test_what_is_not_element_by_element_is_left_alone(body, reason):
    result, kept = kept_units(Block(body), rows=[0, 3])
    assert kept == 8
    (refusal,) = [refusal for refusal in result.refused if refusal.where == "up"]
    assert reason in refusal.reason


def test_tied_weights_are_refused():
    model = Block(lambda m, x: m.down(torch.relu(m.up(x))) + m.other(m.gate(x)))
    model.gate.weight = model.up.weight
    result, kept = kept_units(model, rows=[0])
    assert kept == 8
    assert any("its weight is tied to gate.weight" in refusal.reason for refusal in result.refused)


def test_residual_width_is_refused_with_the_number_that_share_it():
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
    assert reasons["inner.1"] == (
        "2 of 6 rows are dead but stay: they feed a residual add; its width 6 is shared by 4 linears"
    )
    assert reasons["head"].startswith("1 of 6 columns are dead but stay: they read the output of add; ")


def test_outputs_of_the_model_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].weight[:, 0] = 0
    result = slim_model(model, torch.randn(2, 3))
    assert [refusal.reason for refusal in result.refused] == [
        "1 of 4 rows are dead but stay: they are the model's outputs",
        "1 of 3 columns are dead but stay: they read the model's input",
    ]


def test_one_unit_stays_where_all_are_dead():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.zero_()
    result = slim_model(model, torch.randn(2, 3))
    assert result.model[0].out_features == 1
    (refusal,) = [refusal for refusal in result.refused if refusal.where == "2"]
    assert refusal.kind == "units"
    assert "all units are dead; one stays" in refusal.reason
    x = torch.randn(4, 3)
    torch.testing.assert_close(result.model(x), model(x))


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


def test_a_linear_of_another_kind_is_refused():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = 0
    result = slim_model(model, torch.randn(2, 3))
    assert result.cuts == []
    assert any("Doubled computes more than a linear" in refusal.reason for refusal in result.refused)


def test_blocks_are_found_in_order_of_execution():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Linear(5, 2))
    blocks = find_feed_forward(trace(model, torch.randn(2, 3)), model)
    assert [(block.root, block.frontier) for block in blocks] == [("2", ("0",)), ("3", ("2",))]


def test_fast_paths_that_read_the_weights_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    with torch.no_grad():
        layer.linear1.weight[:3] = 0
    result = slim_model(layer, torch.randn(2, 5, 8))
    assert result.cuts == []
    assert any(r.where == "linear1" and r.reason.startswith("3 of 16 rows are dead but stay") for r in result.refused)
