import copy

import pytest
import torch
from torch import nn

from tritprune.errors import TraceError
from tritprune.export import load_model, save
from tritprune.slimming import slim_model
from tritprune.slimming.multihead import SlimMultiheadAttention

WIDTH, HEADS, SIZE = 12, 3, 4
KINDS = {
    "packed": {},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 8},
    "appended key": {"add_bias_kv": True},
    "appended zero": {"add_zero_attn": True},
}
PADDING = torch.tensor([[False] * 5, [False, False, False, True, True]])
CAUSAL = torch.ones(4, 5).triu(1).bool()
CALLS = {
    "plain": {},
    "no weights": {"need_weights": False},
    "weights of each head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING, "need_weights": False},
    "padding as numbers": {"key_padding_mask": PADDING.float() * -1.5},
    "mask": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "both masks": {"attn_mask": CAUSAL.float(), "key_padding_mask": PADDING.float()},
    "mask of each head": {"attn_mask": torch.arange(120.0).view(6, 4, 5).sin()},
}


def filled(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


@torch.no_grad()
def without_heads(attention, *heads):
    """Heads whose columns of the output projection are zero."""
    for head in heads:
        attention.out_proj.weight[:, head * SIZE : (head + 1) * SIZE] = 0


def inputs_of(attention):
    torch.manual_seed(1)
    widths = (WIDTH, attention.kdim, attention.vdim)
    tensors = tuple(torch.randn(2, tokens, width) for tokens, width in zip((4, 5, 5), widths, strict=True))
    return tensors if attention.batch_first else tuple(x.transpose(0, 1) for x in tensors)


class Reading(nn.Module):
    """An attention whose probabilities are computed and thrown away, as ``need_weights=True`` does by default."""

    def __init__(self, attention, **call):
        super().__init__()
        self.attention, self.call = attention, call

    def forward(self, query, key, value):
        return self.attention(query, key, value, **self.call)[0]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_with_all_heads_it_computes_what_pytorch_does(kind, call):
    for batch_first in (True, False):
        theirs = filled(nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **kind))
        ours = copy.deepcopy(theirs)
        ours.__class__ = SlimMultiheadAttention
        for made, expected in zip(ours(*inputs_of(ours), **call), theirs(*inputs_of(theirs), **call), strict=True):
            assert (made is None) == (expected is None)
            if made is not None:
                torch.testing.assert_close(made, expected)


def test_unbatched_and_refused_calls():
    theirs = filled(nn.MultiheadAttention(WIDTH, HEADS))
    ours = copy.deepcopy(theirs)
    ours.__class__ = SlimMultiheadAttention
    x = torch.randn(5, WIDTH)
    for made, expected in zip(ours(x, x, x, PADDING[1]), theirs(x, x, x, PADDING[1]), strict=True):
        torch.testing.assert_close(made, expected)
    with pytest.raises(ValueError, match="is_causal needs attn_mask"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask of three dimensions has 1 x 3 rows, got 4"):
        ours(x, x, x, attn_mask=torch.zeros(4, 5, 5))
    with pytest.raises(ValueError, match="attn_mask is for 4 queries, there are 5"):
        ours(x, x, x, attn_mask=torch.zeros(4, 5))


@pytest.mark.parametrize("tracer", ["jit", "export"])
@pytest.mark.parametrize(
    ("name", "need"), [("packed", True), ("no bias", False), ("other widths", True), ("appended key", False)]
)
def test_dead_heads_go(name, need, tracer):
    kind = KINDS[name] | {"add_zero_attn": name == "no bias"}
    model = Reading(filled(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **kind)), need_weights=need)
    without_heads(model.attention, 1)
    result = slim_model(model, inputs_of(model.attention), tracer=tracer)
    slim = result.model.attention
    assert [(cut.kind, cut.before, cut.after) for cut in result.cuts] == [("heads", 3, 2)]
    assert (slim.num_heads, slim.head_dim, slim.embed_dim) == (2, SIZE, WIDTH)
    assert slim.out_proj.weight.shape == (WIDTH, 8)
    assert list(slim.state_dict()) == list(model.attention.state_dict())
    call = {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "need_weights": False}
    torch.testing.assert_close(
        slim(*inputs_of(slim), **call)[0], model.attention(*inputs_of(slim), **call)[0], rtol=1e-4, atol=1e-5
    )


def test_the_bias_of_dead_values_reaches_the_output_bias():
    model = Reading(filled(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)))
    with torch.no_grad():
        model.attention.in_proj_weight[2 * WIDTH : 2 * WIDTH + SIZE] = 0
    result = slim_model(model, inputs_of(model.attention))
    assert result.model.attention.num_heads == 2
    assert result.folded == ("attention.out_proj.bias",)


def test_heads_whose_mean_probabilities_are_returned_stay():
    model = filled(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    without_heads(model, 1)
    result = slim_model(model, inputs_of(model))
    assert result.cuts == []
    assert any("they feed mean" in refusal.reason for refusal in result.refused if refusal.kind == "heads")


def test_heads_with_a_mask_of_their_own_from_outside_stay():
    class Masked(Reading):
        def forward(self, query, key, value, mask):
            return self.attention(query, key, value, attn_mask=mask, need_weights=False)[0]

    model = Masked(filled(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)))
    without_heads(model.attention, 1)
    result = slim_model(model, (*inputs_of(model.attention), torch.zeros(2 * HEADS, 4, 5)))
    assert result.cuts == []
    assert any("with the model's input" in refusal.reason for refusal in result.refused if refusal.kind == "heads")


class Joined(nn.Module):
    """Heads beside the batch in one dimension, and a mask for each sequence that is repeated for its heads."""

    def __init__(self, heads_last):
        super().__init__()
        self.heads_last, self.num_heads = heads_last, HEADS
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x, bias):
        def split(y):
            return y.view(*x.shape[:2], -1, SIZE).transpose(1, 2).flatten(0, 1)  # [B * heads, T, size]

        shape = (-1, self.num_heads, -1, -1)
        repeated = bias[:, None].expand(*shape) if self.heads_last else bias[None].expand(self.num_heads, -1, -1, -1)
        scores = split(self.query(x)) @ split(self.key(x)).transpose(1, 2) + repeated.flatten(0, 1)
        mixed = scores.softmax(-1) @ split(self.value(x))
        return x + self.out(mixed.unflatten(0, (x.shape[0], -1)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads_last", [True, False])
def test_a_mask_of_each_sequence_is_repeated_for_its_heads_in_their_order_alone(heads_last):
    model = filled(Joined(heads_last))
    with torch.no_grad():
        model.out.weight[:, :SIZE] = 0
    inputs = (torch.randn(2, 4, WIDTH), torch.randn(2, 4, 4))
    result = slim_model(model, inputs)
    if heads_last:
        assert [(cut.before, cut.after) for cut in result.cuts] == [(3, 2)]
    else:  # row b * heads + h of the scores gets the mask of another sequence: of another one, with fewer heads
        assert result.cuts == []
        assert "add combines them with the model's input" in result.refused[0].reason


def test_an_attention_with_code_of_its_own_keeps_its_heads():
    class Own(nn.MultiheadAttention):
        pass

    model = Reading(filled(Own(WIDTH, HEADS, batch_first=True)))
    without_heads(model.attention, 1)
    result = slim_model(model, inputs_of(model.attention))
    assert result.cuts == []
    assert any("the model does not run without them" in refusal.reason for refusal in result.refused)


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with every setting at its default: nested tensors and fused layers where it can."""

    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH * 2, 6, 20, batch_first=True), 3)

    def forward(self, x, padding):
        return self.layers(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_takes_its_fast_path_around_the_layers_that_lost_heads(tmp_path):
    model = filled(Encoder())
    for layer, heads in zip(model.layers.layers, ([0, 1], [], [2, 3, 4, 5]), strict=True):
        without_heads(layer.self_attn, *heads)
    x = torch.randn(2, 5, WIDTH * 2)
    result = slim_model(model, (x, PADDING))
    assert [(cut.before, cut.after) for cut in result.cuts] == [(6, 4), (6, 2)]
    with torch.no_grad():
        expected = model(x, PADDING)
        assert (expected[1, 3:] == 0).all()  # what padding becomes in nested tensors alone
        torch.testing.assert_close(result.model(x, PADDING), expected, rtol=1e-4, atol=1e-5)
        save(result, tmp_path / "slim")
        loaded = load_model(tmp_path / "slim", build=Encoder)
        assert torch.equal(loaded(x, PADDING), result.model(x, PADDING))
    assert type(loaded.layers.layers[0].self_attn) is SlimMultiheadAttention
    assert type(loaded.layers.layers[1].self_attn) is nn.MultiheadAttention
    trained = result.model.train()
    trained(x, PADDING).sum().backward()
    assert trained.layers.layers[0].self_attn.in_proj_weight.grad.abs().sum() > 0


def test_a_number_from_data_is_still_refused():
    class Scaled(Reading):
        def forward(self, query, key, value):
            return self.attention(query * float(query.mean()), key, value)[0]

    model = Scaled(filled(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)))
    with pytest.raises(TraceError, match="computes a Python number from its data"):
        slim_model(model, inputs_of(model.attention))
