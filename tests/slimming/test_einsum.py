import pytest
import torch
from torch import nn

from tritprune.slimming import SelfMHASearcher, slim_model
from tritprune.slimming.rules_einsum import Equation

WIDTH, HEADS, SIZE = 12, 3, 4


def filled(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


class Written(nn.Module):
    """Attention as papers write it; heads stay beside tokens, which no transposition moves."""

    def __init__(self, scores="bqhd,bkhd->bhqk", mixed="bhqk,bkhd->bqhd", swapped=False):
        super().__init__()
        self.scores, self.mixed, self.swapped, self.num_heads = scores, mixed, swapped, HEADS
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (y.view(*x.shape[:2], self.num_heads, -1) for y in (self.query(x), self.key(x), self.value(x)))
        weights = torch.einsum(self.scores, q, k).div(2).softmax(-1)
        mixed = torch.einsum(self.mixed, *((v, weights) if self.swapped else (weights, v)))
        return x + self.out(mixed.reshape(*x.shape[:2], -1))


class Shaped(nn.Module):
    """Attention whose weights have heads as a dimension of their own, as XLNet's."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Parameter(torch.empty(WIDTH, HEADS, SIZE)) for _ in range(4))

    def forward(self, x):
        q, k, v = (torch.einsum("bth,hnd->btnd", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bind,bjnd->bnij", q, k).softmax(-1)
        return x + torch.einsum("bnij,bjnd,hnd->bih", weights, v, self.o)


class Paired(Shaped):
    def forward(self, x):
        q, k, v = (torch.einsum("bth,hnd->btnd", x, w) for w in (self.q, self.k, self.v))
        mixed = torch.einsum("bnij,bjnd->bind", torch.einsum("bind,bjnd->bnij", q, k).softmax(-1), v)
        return x + torch.einsum("bind,hnd->bih", mixed, self.o)


X = torch.arange(2 * 5 * WIDTH).view(2, 5, WIDTH).float().sin()


@pytest.mark.parametrize(
    ("settings", "tracer"),
    [
        ({}, "jit"),
        ({}, "export"),
        ({"scores": "b q h d, b k h d -> b h q k"}, "jit"),
        ({"mixed": "bkhd,bhqk->bqhd", "swapped": True}, "jit"),
    ],
)
def test_heads_go(settings, tracer):
    model = filled(Written(**settings))
    with torch.no_grad():
        model.value.weight[:SIZE] = 0  # its bias is a constant, which the output's bias takes up
        model.out.weight[:, -SIZE:] = 0
    result = slim_model(model, X, tracer=tracer)
    assert [(cut.kind, cut.before, cut.after) for cut in result.cuts] == [("heads", 3, 1)]
    assert (result.model.num_heads, result.folded) == (1, ("out.bias",))
    (found,) = SelfMHASearcher(model, example_inputs=X, tracer=tracer).search()
    assert found == {"qkv": ["query", "key", "value"], "ffn": ["out"]}


def test_sums_over_heads_are_refused():
    model = filled(Written(mixed="bhqk,bkgd->bqhd"))
    with torch.no_grad():
        model.out.weight[:, -SIZE:] = 0
    result = slim_model(model, X)
    assert result.cuts == []
    assert any("einsum" in refusal.reason for refusal in result.refused)


def test_sums_over_queries_make_no_probabilities():
    model = filled(Written(mixed="bhqk,bqhd->bkhd"))
    with torch.no_grad():
        model.value.weight[:SIZE] = 0
    assert slim_model(model, X).cuts == []


def test_weights_of_three_dimensions_lose_heads():
    model = filled(Paired())
    with torch.no_grad():
        model.o[:, 1] = 0
    result = slim_model(model, X)
    assert result.model.q.shape == result.model.o.shape == (WIDTH, 2, SIZE)
    torch.testing.assert_close(result.model(X + 1), model(X + 1), rtol=1e-4, atol=1e-5)


def test_products_of_three_are_refused_by_name():
    model = filled(Shaped())
    with torch.no_grad():
        model.o[:, 1] = 0
    result = slim_model(model, X)
    assert result.cuts == []
    assert result.parameters_after == result.parameters_before


def test_equations():
    assert Equation.of("...ij,...jk->...ik", (4, 3)) == Equation(("ABij", "Bjk"), "ABik")
    assert Equation.of("ij,jk", (2, 2)) == Equation(("ij", "jk"), "ik")
    assert Equation.of("ii->i", (2,)) is None
    assert Equation.of("ij,jk->ik", (2, 3)) is None
