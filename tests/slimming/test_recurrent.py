import pytest
import torch
from torch import nn

from tritprune.export import load_model, save
from tritprune.slimming import slim_model


class Tagger(nn.Module):
    """A linear, a recurrent layer that reads it, a linear that reads that."""

    def __init__(self, kind="LSTM", **settings):
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.rnn = getattr(nn, kind)(8, 5, batch_first=True, **settings)
        width = 5 * (2 if settings.get("bidirectional") else 1)
        self.out = nn.Linear(settings.get("proj_size", width), 3)

    def forward(self, x):
        return self.out(self.rnn(torch.relu(self.up(x)))[0])


X = torch.arange(2 * 4 * 6).view(2, 4, 6).float().sin()


def damaged(*arguments, **settings):
    torch.manual_seed(0)
    model = Tagger(*arguments, **settings).eval()
    with torch.no_grad():
        model.up.weight[1], model.up.bias[1] = 0, 0.5  # a constant that the gates' bias takes up
        for name, weight in model.rnn.named_parameters():
            if name.startswith("weight_ih_l0"):
                weight[:, 2] = 0
        model.out.weight[:, 3] = 0
    return model


@pytest.mark.parametrize(
    ("kind", "settings", "tracer"),
    [
        ("LSTM", {"num_layers": 2, "bidirectional": True}, "jit"),
        ("LSTM", {"num_layers": 2, "bidirectional": True}, "export"),
        ("GRU", {}, "jit"),
        ("RNN", {"nonlinearity": "relu"}, "jit"),
    ],
)
def test_what_it_reads_goes_and_what_it_feeds_back_stays(kind, settings, tracer, tmp_path):
    model = damaged(kind, **settings)
    result = slim_model(model, X, tracer=tracer)
    assert [(cut.kind, cut.where, cut.before, cut.after) for cut in result.cuts] == [
        ("feed-forward units", "rnn", 8, 6)
    ]
    assert result.model.rnn.input_size == 6
    (refusal,) = result.refused
    assert (refusal.kind, refusal.where) == ("columns", "out")
    assert "rnn feeds them back to itself, so its hidden size stays" in refusal.reason
    save(result, tmp_path / "slim")
    loaded = load_model(tmp_path / "slim", build=lambda: Tagger(kind, **settings))
    with torch.no_grad():
        assert torch.equal(loaded(X + 1), result.model(X + 1))


def test_a_projection_stays_too():
    result = slim_model(damaged(proj_size=4), X)
    assert any("feeds them back" in refusal.reason for refusal in result.refused)


def test_a_column_of_one_direction_alone_stays():
    model = damaged(bidirectional=True)
    with torch.no_grad():
        model.up.bias[1] = 0
        model.rnn.weight_ih_l0[:, 4] = 0
    result = slim_model(model, X)
    assert [(cut.before, cut.after) for cut in result.cuts] == [(8, 6)]


def test_without_a_bias_a_constant_stays():
    result = slim_model(damaged(bias=False), X)
    assert [(cut.before, cut.after) for cut in result.cuts] == [(8, 7)]
