"""What attentions do with positions: what keeps heads apart, and what ties them."""

import pytest
import torch
from torch import nn

from tritprune.slimming import slim_model

WIDTH, HEADS, SIZE, TOKENS = 12, 3, 4, 5
X = torch.arange(2 * TOKENS * WIDTH).view(2, TOKENS, WIDTH).float().sin()


class Attention(nn.Module):
    """Attention with something done to queries and keys, or to the scores, that positions decide."""

    def __init__(self, turn=None, change=None):
        super().__init__()
        self.num_heads, self.turn, self.change = HEADS, turn, change
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.sinks = nn.Parameter(torch.empty(HEADS))
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)
        with torch.no_grad():
            self.out.weight[:, SIZE : 2 * SIZE] = 0
        self.eval()

    def forward(self, x):
        q, k, v = (y.view(*x.shape[:2], -1, SIZE).transpose(1, 2) for y in (self.query(x), self.key(x), self.value(x)))
        if self.turn is not None:
            q, k = self.turn(q), self.turn(k)
        scores = q @ k.transpose(-1, -2)
        scores = scores if self.change is None else self.change(self, scores)
        return x + self.out((scores.softmax(-1)[..., : v.shape[2]] @ v).transpose(1, 2).flatten(2))


def partly(size):
    def turn(q):
        angles = torch.arange(q.shape[2]).float()[:, None]
        turned, rest = q[..., :size], q[..., size:]
        half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
        return torch.cat([turned * angles.cos() + half * angles.sin(), rest], -1)

    return turn


def relative(model, scores):
    tokens = torch.arange(scores.shape[-1])
    index = (tokens[:, None] - tokens).abs().expand(*scores.shape[:2], -1, -1)
    return scores + torch.gather(scores, -1, index)


def other_for_each_head(model, scores):
    tokens = torch.arange(scores.shape[-1])
    shift = torch.arange(HEADS)[:, None, None]
    index = ((tokens[:, None] - tokens).abs() + shift) % scores.shape[-1]
    return scores + torch.gather(scores, -1, index.expand(scores.shape[0], -1, -1, -1))


def with_sinks(model, scores):
    sinks = model.sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
    return torch.cat([scores, sinks], -1)


def masked(model, scores):
    return torch.where(torch.ones(scores.shape[-2:]).tril().bool(), scores, torch.tensor(-1e9))


def slopes(model, scores):
    steps = torch.pow(2.0, -torch.arange(1.0, model.num_heads + 1)).view(-1, 1, 1)
    return scores + steps * torch.arange(scores.shape[-1])


@pytest.mark.parametrize("tracer", ["jit", "export"])
@pytest.mark.parametrize("settings", [{"change": relative}, {"change": with_sinks}], ids=["relative", "sinks"])
def test_heads_go(settings, tracer):
    model = Attention(**settings)
    result = slim_model(model, X, tracer=tracer)
    assert [(cut.kind, cut.before, cut.after) for cut in result.cuts] == [("heads", 3, 2)]
    torch.testing.assert_close(result.model(X[:, :3] + 1), model(X[:, :3] + 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"turn": partly(2)}, {"turn": partly(SIZE)}, {"change": masked}], ids=["partly", "wholly", "chosen"]
)
def test_heads_go_that_are_turned_or_masked(settings):
    assert [(cut.kind, cut.before, cut.after) for cut in slim_model(Attention(**settings), X).cuts] == [("heads", 3, 2)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_for_each_head, "gather looks up other entries for each of them"),
        (slopes, "add combines them with slopes that the model's code computes from the number of heads (ALiBi)"),
    ],
)
def test_heads_that_are_told_apart_by_their_number_stay(change, reason):
    result = slim_model(Attention(change=change), X)
    assert result.cuts == []
    assert reason in next(refusal.reason for refusal in result.refused if refusal.kind == "heads")


def test_a_sink_takes_probability_so_that_constant_values_stay():
    model = Attention(change=with_sinks)
    with torch.no_grad():
        model.value.weight[:SIZE] = 0
    assert [(cut.before, cut.after) for cut in slim_model(model, X).cuts] == [(3, 2)]
