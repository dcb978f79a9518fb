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


def per_head_slopes(m, q, k, v):
    slopes = torch.arange(1.0, 4.0).view(3, 1, 1)
    return torch.softmax(q @ k.transpose(-1, -2) * slopes, dim=-1) @ v


@pytest.mark.parametrize("mix", [per_head_bias, scaled_values])
def test_heads_go_through_what_keeps_them_apart(mix, randomised, kill):
    model = randomised(Attention(mix))
    kill(model.output, columns=slice(8, 12))
    kill(model.value, rows=slice(0, 4))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    assert result.model.num_heads == 1
    assert_same(result.model, model, 2, 5, WIDTH)


@pytest.mark.parametrize(
    ("mix", "reason"),
    [
        (per_head_slopes, "mul combines them with numbers for each of them that no parameter gives"),
        (fixed_heads, "the model does not run without them"),
        (normalised, "div shares them between heads"),
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
    assert any("the model returns them as 1" in r.reason for r in result.refused)


def test_values_that_are_read_elsewhere_are_refused(randomised, kill):
    class Leaking(Attention):
        def forward(self, x):
            return super().forward(x) + self.value(x)

    model = randomised(Leaking(fused))
    kill(model.output, columns=slice(8, 12))
    result = slim_model(model, torch.randn(2, 5, WIDTH))
    assert result.cuts == []
    assert any("1 of 3 heads are dead but stay: add combines them with" in r.reason for r in result.refused)


class Fused(nn.Module):
    """One linear for query, key and value; ``layout`` says in which order its rows are."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.num_heads = layout, HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        made = self.qkv(x)
        if self.layout == "parts first":
            q, k, v = made.view(*x.shape[:2], 3, self.num_heads, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.layout == "heads first":
            q, k, v = made.view(*x.shape[:2], self.num_heads, 3 * SIZE).transpose(1, 2).chunk(3, dim=-1)
        else:
            parts = made.split(made.shape[-1] // 3, dim=-1)
            q, k, v = (part.unflatten(-1, (self.num_heads, SIZE)).transpose(1, 2) for part in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tracer", ["jit", "export"])
@pytest.mark.parametrize(
    ("layout", "kept"),
    [
        ("parts first", [*range(4, 12), *range(16, 24), *range(28, 36)]),
        ("split", [*range(4, 12), *range(16, 24), *range(28, 36)]),
        ("heads first", [*range(12, 36)]),
    ],
)
def test_fused_projection_loses_the_rows_of_a_head(layout, kept, tracer, randomised, kill):
    model = randomised(Fused(layout))
    kill(model.proj, columns=slice(0, 4))
    result = slim_model(model, torch.randn(2, 5, WIDTH), tracer=tracer)
    (found,) = result.found
    assert (found["qkv"], found["ffn"], found["heads"], found["obstacle"]) == (["qkv"], ["proj"], 3, None)
    assert result.selections["qkv.weight"][0].tolist() == kept
    assert (result.model.num_heads, result.refused) == (2, [])
    assert_same(result.model, model, 3, 7, WIDTH)


class Grouped(nn.Module):
    """Four query heads; ``keys`` key and value heads."""

    def __init__(self, keys):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, keys * SIZE), nn.Linear(WIDTH, keys * SIZE)
        self.o, self.grouped = nn.Linear(16, WIDTH), keys > 1

    def forward(self, x):
        q, k, v = (linear(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("tracer", ["jit", "export"])
def test_a_key_head_goes_with_all_its_query_heads(tracer, randomised, kill):
    model = randomised(Grouped(2))
    kill(model.o, columns=slice(0, 4))
    result = slim_model(model, torch.randn(2, 5, WIDTH), tracer=tracer)
    assert result.cuts == []
    (refusal,) = result.refused
    assert refusal.reason == "1 of 4 heads are dead but stay: other heads need the keys and values that they share"
    kill(model.o, columns=slice(4, 8))
    result = slim_model(model, torch.randn(2, 5, WIDTH), tracer=tracer)
    assert [(cut.before, cut.after) for cut in result.cuts] == [(4, 2)]
    assert (result.found[0]["heads"], result.found[0]["key_value_heads"]) == (4, 2)
    assert [getattr(result.model, name).out_features for name in "qkv"] == [8, 4, 4]
    assert_same(result.model, model, 3, 7, WIDTH)


@pytest.mark.parametrize("tracer", ["jit", "export"])
def test_query_heads_go_alone_where_all_share_one_key_head(tracer, randomised, kill):
    model = randomised(Grouped(1))
    kill(model.o, columns=slice(4, 8))
    result = slim_model(model, torch.randn(2, 5, WIDTH), tracer=tracer)
    assert [(cut.before, cut.after) for cut in result.cuts] == [(4, 3)]
    assert [getattr(result.model, name).out_features for name in "qkv"] == [12, 4, 4]
    assert_same(result.model, model, 3, 7, WIDTH)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_bert_attention_is_found(implementation, make_bert, tokens):
    model = make_bert(attn_implementation=implementation)
    blocks = find_attention(trace(model, tokens), model)
    assert [block.heads for block in blocks] == [4, 4]
    start = "bert.encoder.layer.1.attention"
    assert (*blocks[1].feeding, blocks[1].output) == (
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
    assert any("without them the model's outputs differ" in refusal.reason for refusal in result.refused)
