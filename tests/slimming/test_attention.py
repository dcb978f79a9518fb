import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tritprune.slimming.attention import find_attention
from tritprune.slimming.graph import trace
from tritprune.slimming.slimmer import slim_model

WIDTH, HEADS, SIZE = 12, 3, 4


class Attention(nn.Module):
    """Attention as small vision transformers write it; ``mix`` computes softmax(QK')V from [B, heads, T, size]."""

    def __init__(self, mix, *, bias=True):
        super().__init__()
        self.mix = mix
        self.num_heads = HEADS
        self.query = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.key = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.value = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.output = nn.Linear(WIDTH, WIDTH, bias=bias)

    def split(self, x):
        return x.view(*x.shape[:2], self.num_heads, SIZE).transpose(1, 2)

    def forward(self, x):
        mixed = self.mix(self, self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x)))
        return x + self.output(mixed.transpose(1, 2).flatten(2))


def fused(m, q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def explicit(m, q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(SIZE), dim=-1) @ v


def explicit_with_scaled_query(m, q, k, v):
    return F.dropout((q * 0.5 @ k.transpose(-1, -2)).softmax(-1), 0.1, m.training) @ v


@pytest.fixture
def randomised():
    def fill(model):
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
        return model

    return fill


def assert_same(slim, model, *shape):
    x = torch.randn(*shape)
    torch.testing.assert_close(slim(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mix", [fused, explicit, explicit_with_scaled_query])
def test_dead_heads_go(mix, bias, randomised, kill):
    model = randomised(Attention(mix, bias=bias))
    kill(model.value, rows=slice(0, 4))
    kill(model.output, columns=slice(8, 12))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    (cut,) = result.cuts
    assert (cut.kind, cut.before, cut.after, cut.unit) == ("heads", 3, 1, "head")
    assert result.model.num_heads == 1
    assert [getattr(result.model, name).out_features for name in ("query", "key", "value")] == [4, 4, 4]
    assert result.model.output.in_features == 4
    assert result.widths["attributes"] == {"": {"num_heads": 1}}
    assert (result.model.output.bias is None) == (not bias)
    assert_same(result.model, model, 3, 7, WIDTH)


def test_query_that_is_scaled_before_it_is_split(randomised, kill):
    class Scaled(Attention):
        def forward(self, x):
            q, k, v = self.split(self.query(x) * 0.5), self.split(self.key(x)), self.split(self.value(x))
            return x + self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = randomised(Scaled(fused))
    kill(model.value, rows=slice(0, 4))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    assert result.model.num_heads == 2
    assert_same(result.model, model, 3, 7, WIDTH)


def test_value_bias_of_a_dead_head_reaches_the_output_bias(randomised, kill):
    model = randomised(Attention(fused))
    kill(model.value, rows=slice(4, 8))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    moved = model.output.weight[:, 4:8] @ model.value.bias[4:8]
    assert moved.abs().max() > 0.1
    torch.testing.assert_close(result.model.output.bias, model.output.bias + moved)


def test_one_head_stays_where_all_are_dead(randomised, kill):
    model = randomised(Attention(fused))
    kill(model.value, rows=slice(None))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    assert result.model.num_heads == 1
    assert any("all heads are dead; one stays" in refusal.reason for refusal in result.refused)
    assert_same(result.model, model, 2, 5, WIDTH)


def test_part_of_a_head_is_refused(randomised, kill):
    model = randomised(Attention(fused))
    kill(model.value, rows=slice(0, 3))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    assert result.cuts == []
    (refusal,) = result.refused
    assert refusal.where == "value"
    assert refusal.reason == (
        "3 of 12 rows are dead but stay: they belong to heads that stay, and all heads have the same size"
    )


def per_head_bias(m, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(1, m.num_heads, q.shape[2], k.shape[2]))


def fixed_heads(m, q, k, v):
    return F.scaled_dot_product_attention(q, k, v).reshape(q.shape[0], 3, -1, SIZE)


def normalised(m, q, k, v):
    return F.scaled_dot_product_attention(F.normalize(q, dim=1), k, v)


def scaled_values(m, q, k, v):
    return F.scaled_dot_product_attention(q, k, v) * 2


def not_normalised(m, q, k, v):
    return (torch.softmax(q @ k.transpose(-1, -2), dim=-1) * 0.5) @ v


def across_queries(m, q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2), dim=-2) @ v


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (per_head_bias, "its mask or position bias has one entry per head"),
        (fixed_heads, "the model does not run with fewer heads"),
        (normalised, "comes between a linear and the heads"),
        (scaled_values, "mul comes between the heads and the output linear"),
    ],
)
def test_heads_that_are_tied_together_are_refused(mix, reason, randomised, kill):
    model = randomised(Attention(mix))
    kill(model.output, columns=slice(8, 12))
    kill(model.value, rows=slice(0, 4))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    assert result.cuts == []
    (refusal,) = [refusal for refusal in result.refused if refusal.kind == "heads"]
    assert refusal.reason.startswith("2 of 3 heads are dead but stay: ")
    assert reason in refusal.reason
    assert_same(result.model, model, 2, 5, WIDTH)


@pytest.mark.parametrize("mix", [not_normalised, across_queries])
def test_probabilities_that_do_not_sum_to_one_are_no_attention(mix, randomised, kill):
    model = randomised(Attention(mix))
    kill(model.value, rows=slice(0, 4))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    assert result.cuts == []
    assert not [item for item in result.found if item["kind"] == "attention"]


def test_returned_probabilities_are_refused(randomised, kill):
    class Telling(Attention):
        def forward(self, x):
            q, k, v = (self.split(linear(x)) for linear in (self.query, self.key, self.value))
            probabilities = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
            return self.output((probabilities @ v).transpose(1, 2).flatten(2)), probabilities

    model = randomised(Telling(fused))
    kill(model.output, columns=slice(8, 12))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    assert result.cuts == []
    assert any("the model also returns values that have one entry per head" in r.reason for r in result.refused)


def test_values_that_are_read_elsewhere_are_refused(randomised, kill):
    class Leaking(Attention):
        def forward(self, x):
            return super().forward(x) + self.value(x)

    class Peeking(Attention):
        def forward(self, x):
            v = self.value(x)
            mixed = F.scaled_dot_product_attention(self.split(self.query(x)), self.split(self.key(x)), self.split(v))
            return self.output(mixed.transpose(1, 2).flatten(2)) + v

    for kind, reason in ((Leaking, "read 2 times"), (Peeking, "read outside of the attention too, by add")):
        model = randomised(kind(fused))
        kill(model.output, columns=slice(8, 12))
        result = slim_model(model, torch.randn(2, 5, WIDTH))
        assert result.cuts == []
        assert any(reason in refusal.reason for refusal in result.refused)


def test_fused_projection_is_found_and_refused(randomised, kill):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = randomised(Fused())
    kill(model.proj, columns=slice(0, 4))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    (found,) = result.found
    assert (found["qkv"], found["ffn"], found["heads"]) == (["qkv"], ["proj"], 3)
    (refusal,) = [refusal for refusal in result.refused if refusal.kind == "heads"]
    assert refusal.reason == (
        "1 of 3 heads are dead but stay: query, key and value are not three linears of their own (qkv)"
    )


def test_grouped_query_attention_is_found_and_refused(randomised, kill):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8)
            self.o = nn.Linear(16, WIDTH)

        def forward(self, x):
            q, k, v = (linear(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for linear in (self.q, self.k, self.v))
            return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))

    model = randomised(Grouped())
    kill(model.o, columns=slice(0, 4))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    (refusal,) = [refusal for refusal in result.refused if refusal.kind == "heads"]
    assert "query, key and value have 16, 8, 8 outputs: its heads share keys and values" in refusal.reason


def test_pytorchs_own_attention_is_left_alone(randomised):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model = randomised(Wrapped())
    with torch.no_grad():
        model.attention.out_proj.weight[:, :4] = 0
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    assert result.cuts == []
    assert any(refusal.where == "attention.out_proj" for refusal in result.refused)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_attention_is_found(implementation, make_bert, tokens):
    model = make_bert(attn_implementation=implementation)
    blocks = find_attention(trace(model, tokens), model)
    assert [block.obstacle for block in blocks] == [None, None]
    assert [block.heads for block in blocks] == [4, 4]
    start = "bert.encoder.layer.1.attention"
    assert blocks[1].linears == (
        f"{start}.self.query",
        f"{start}.self.key",
        f"{start}.self.value",
        f"{start}.output.dense",
    )


def test_decoder_heads_go_but_not_where_a_query_sees_no_key(kill, randomised):
    """With left padding and a causal mask a query may see no key: its head gives 0, not the value bias."""
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=20,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
        use_cache=False,
    )
    model = randomised(transformers.OPTForCausalLM(config))
    kill(model.model.decoder.layers[0].self_attn.v_proj, rows=slice(4, 8))
    ids, mask = torch.arange(16).view(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    result = slim_model(model, {"input_ids": ids, "attention_mask": mask})
    assert [(cut.kind, cut.after) for cut in result.cuts] == [("heads", 3)]
    mask[1] = mask[1].flip(0)
    result = slim_model(model, {"input_ids": ids, "attention_mask": mask})
    assert result.cuts == []
    assert any("with fewer heads the model's outputs differ" in refusal.reason for refusal in result.refused)
