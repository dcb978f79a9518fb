"""Where a trace knows less than it seems to: nothing is cut on a number that other data would change."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tritprune.errors import CertificateError, TraceError
from tritprune.slimming import slim_model


class Net(nn.Module):
    """Two linears with a unit whose row is zero and whose bias is not, so that it is a constant."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.other = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.between = between
        with torch.no_grad():
            self.up.weight[0], self.up.bias[0] = 0.0, 1.0

    def forward(self, x):
        return self.between(self, x)


def outputs_agree(model, inputs, *others):
    result = slim_model(model, inputs)
    for other in others:
        torch.testing.assert_close(result.model(other), model(other), atol=1e-5, rtol=1e-5)
    return result


@pytest.fixture
def inputs():
    return torch.rand(2, 6, generator=torch.Generator().manual_seed(1))


def test_a_number_that_is_computed_from_data_is_refused_with_its_line(inputs):
    model = Net(lambda m, x: m.down(m.up(x) / x.abs().max().item())).eval()
    with pytest.raises(TraceError, match=r"computes a Python number from its data \(test_honesty.py, line \d+\)"):
        slim_model(model, inputs)


def test_a_layer_that_did_not_run_can_still_read_what_it_reads(inputs):
    model = Net(lambda m, x: m.down(F.relu(m.up(x))) if x.mean() < 5 else m.other(F.relu(m.up(x)))).eval()
    with torch.no_grad():
        model.down.weight[:, 3] = 0.0
    result = outputs_agree(model, inputs, inputs, inputs + 10)
    assert any("other does not run on the example inputs" in str(refusal.reason) for refusal in result.refused)


def test_a_computed_bias_is_no_constant(inputs):
    model = Net(lambda m, x: m.down(F.linear(x, m.up.weight, m.up.bias * F.relu(x.mean() - 5)))).eval()
    outputs_agree(model, inputs, inputs, inputs + 10)


def test_a_write_through_a_view_changes_what_it_is_a_view_of(inputs):
    def between(m, x):
        hidden = m.up(x)
        hidden[:, :4].masked_fill_(x[:, :1] > 5, 7.0)
        return m.down(hidden)

    outputs_agree(Net(between).eval(), inputs, inputs, inputs + 10)


def test_a_model_that_is_random_in_evaluation_is_refused(inputs):
    model = Net(lambda m, x: m.down(F.relu(m.up(x + torch.randn_like(x))))).eval()
    with pytest.raises(CertificateError, match="gives other outputs each time it runs"):
        slim_model(model, inputs)


@pytest.mark.parametrize("kept", [torch.ones(3), [torch.ones(2)], (torch.ones(2), 1)], ids=["tensor", "list", "tuple"])
def test_tensors_in_attributes_are_left_alone(kept, inputs):
    model = Net(lambda m, x: m.down(F.relu(m.up(x)))).eval()
    del model.other
    model.kept = kept
    assert outputs_agree(model, inputs, inputs, inputs + 10).cuts


def test_what_a_training_pass_left_behind_does_not_stop_the_copy(inputs):
    def between(m, x):
        hidden = F.relu(m.up(x))
        if m.training:
            m.left = hidden.abs().mean()
        return m.down(hidden)

    model = Net(between).train()
    del model.other
    model(inputs)
    assert not model.left.is_leaf
    assert outputs_agree(model.eval(), inputs, inputs).cuts
