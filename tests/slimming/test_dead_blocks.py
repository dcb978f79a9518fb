"""A block of which every unit or head is dead goes as a whole, or keeps one for a reason that is named."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tritprune
from tritprune.export import even_widths, load_model, loads_with, save_model
from tritprune.slimming import Cut, check_saved, slim_model, slim_optimizer
from tritprune.slimming.removal import KEEPS_CACHE, RemovedAttention

FEED_FORWARD, ATTENTION = "bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.attention.self"


def said(result):
    return {(refusal.where, refusal.kind): refusal.reason for refusal in result.refused}


@pytest.fixture
def dead_bert(make_bert, kill):
    """Layer 0 has a dead feed-forward block with constants left in it, layer 1 a dead attention."""
    model = make_bert()
    kill(model.get_submodule("bert.encoder.layer.0.intermediate.dense"), rows=slice(None))
    kill(model.get_submodule(ATTENTION).value, rows=slice(None))
    return model


@pytest.mark.parametrize("tracer", ["jit", "export"])
def test_bert_loses_a_feed_forward_block_and_an_attention(tracer, dead_bert, tokens):
    result = slim_model(dead_bert, tokens, tracer=tracer)
    assert result.cuts == [
        Cut("feed-forward units", FEED_FORWARD, 40, 0, "unit"),
        Cut("heads", ATTENTION, 4, 0, "head"),
    ]
    assert result.refused == []
    gone = 40 * 24 * 2 + 40 + 4 * 24 * 24 + 3 * 24  # weights and biases of both blocks, but for two output biases
    assert result.parameters_before - result.parameters_after == gone
    layers = result.model.bert.encoder.layer
    assert layers[0].output.dense.weight.shape == (24, 0)
    assert isinstance(layers[1].attention.self, RemovedAttention)
    assert list(layers[1].attention.self.parameters()) == []
    assert set(result.folded) == {f"{FEED_FORWARD}.bias", "bert.encoder.layer.1.attention.output.dense.bias"}
    assert not any(name.startswith(ATTENTION) for name in result.selections)
    assert result.widths["removed"] == {ATTENTION: {"output": None, "returns": 2}}


def test_it_loads_again_and_is_slimmed_again(dead_bert, tokens, tmp_path):
    result = slim_model(dead_bert, tokens)
    folder = tritprune.save(result, tmp_path / "slim")
    result.certificate.save(tmp_path)
    loaded = load_model(folder)
    assert check_saved(loaded, tmp_path)
    assert torch.equal(loaded(**tokens).logits, result.model(**tokens).logits)
    assert "was removed, and no value of BertConfig says so; slimmer.uniform=true (tritprune.save" in loads_with(folder)
    again = slim_model(loaded, tokens)
    assert (again.cuts, again.refused, again.parameters_after) == ([], [], result.parameters_after)
    with torch.no_grad():
        loaded.bert.encoder.layer[1].output.dense.weight[:, 3:] = 0
    twice = slim_model(loaded, tokens)
    assert [cut.after for cut in twice.cuts] == [3]
    for number, saved in enumerate((twice, twice.model)):
        found = load_model(tritprune.save(saved, tmp_path / str(number)))
        assert torch.equal(found(**tokens).logits, twice.model(**tokens).logits)


def test_from_pretrained_loads_it_evened_out(dead_bert, tokens, tmp_path):
    result = slim_model(dead_bert, tokens)
    even, told = even_widths(result.model, type(result.model))
    assert told == {"intermediate_size": 40}
    torch.testing.assert_close(even(**tokens).logits, dead_bert(**tokens).logits, rtol=0, atol=2e-5)
    builder = {"kind": "transformers", "class": "BertForSequenceClassification"}
    assert loads_with(save_model(even, tmp_path / "even", builder=builder)).startswith("from_pretrained: yes")


def test_training_goes_on_without_them(dead_bert, tokens):
    optimizer = torch.optim.AdamW(dead_bert.parameters(), lr=1e-3)
    dead_bert(**tokens).logits.sum().backward()
    for name in (f"{FEED_FORWARD}.weight", f"{ATTENTION}.value.weight"):
        dead_bert.get_parameter(name).grad = None
    optimizer.step()
    result = slim_model(dead_bert, tokens)
    carried = slim_optimizer(optimizer, dead_bert, result)
    kinds = ("query", "key", "value")
    assert set(carried.dropped) == {f"{ATTENTION}.{kind}.{part}" for kind in kinds for part in ("weight", "bias")}
    result.model.train()(**tokens).logits.sum().backward()
    optimizer.step()
    pruner = tritprune.Pruner(result.model, end_step=4)
    assert all(sum(layer["shape"]) and 0 not in layer["shape"] for layer in pruner.layer_report())


def test_every_feed_forward_block_dead_is_a_width_that_a_configuration_says(make_bert, kill, tokens, tmp_path):
    model = make_bert()
    for layer in model.bert.encoder.layer:
        kill(layer.output.dense, columns=slice(None))
    folder = tritprune.save(slim_model(model, tokens), tmp_path / "slim")
    assert "says all of its widths: intermediate_size 0" in loads_with(folder)


@pytest.mark.parametrize(("tracer", "layer"), [("jit", 0), ("export", 1)])
def test_llama_loses_a_gated_block_and_keeps_what_generation_needs(tracer, layer):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.3)
        model.model.layers[0].mlp.gate_proj.weight.zero_()
        model.model.layers[layer].self_attn.o_proj.weight.zero_()
    ids = {"input_ids": torch.arange(16).view(2, 8)}
    model.config.use_cache = layer == 0  # as in training, or not
    result = slim_model(model, ids, tracer=tracer)
    assert model.config.use_cache == (layer == 0)
    assert result.cuts == [
        Cut("feed-forward units", "model.layers.0.mlp.down_proj", 40, 0, "unit"),
        Cut("heads", f"model.layers.{layer}.self_attn", 4, 2, "head"),
    ]
    reason = f"all heads are dead; 2 stay, which share a key: {KEEPS_CACHE}"
    assert said(result)[f"model.layers.{layer}.self_attn", "heads"] == reason
    made = [m.generate(**ids, max_new_tokens=4, do_sample=False, pad_token_id=0) for m in (model, result.model)]
    assert torch.equal(*made)


class Attention(nn.Module):
    """An attention in a module of its own; ``returns`` makes of its result what the module returns."""

    def __init__(self, returns=lambda made, x: made):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.heads, self.returns = 2, returns

    def forward(self, x):
        q, k, v = (linear(x).unflatten(-1, (-1, 4)).transpose(1, 2) for linear in (self.query, self.key, self.value))
        return self.returns(self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), x)


class Block(nn.Module):
    """An attention behind a residual."""

    def __init__(self, attention):
        super().__init__()
        self.norm, self.attention, self.head = nn.LayerNorm(8), attention, nn.Linear(8, 3)

    def forward(self, x):
        made = self.attention(self.norm(x))
        return self.head(x + (made[0] if isinstance(made, tuple) else made))


def blocked(attention):
    torch.manual_seed(0)
    model = Block(attention).eval()
    with torch.no_grad():
        model.attention.value.weight.zero_()
    return model, slim_model(model, torch.randn(2, 5, 8))


@pytest.mark.parametrize("returns", [lambda made, x: made, lambda made, x: (made, x)])
def test_an_attention_that_holds_its_output_linear(returns):
    model, result = blocked(Attention(returns))
    assert result.cuts == [Cut("heads", "attention", 2, 0, "head")]
    assert sorted(name for name, _ in result.model.attention.named_parameters()) == ["out.bias", "out.weight"]
    assert "all heads were dead" in repr(result.model)
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(result.model(x), model(x))


@pytest.mark.parametrize(
    ("returns", "reason"),
    [
        (lambda made, x: made + x, "Attention returns more than what its heads make"),
        (lambda made, x: [made, x][0][None], "what Attention returns is not its result at every token"),
    ],
)
def test_an_attention_that_does_more_keeps_a_head(returns, reason):
    _, result = blocked(Attention(returns))
    assert result.cuts == [Cut("heads", "attention", 2, 1, "head")]
    assert said(result)["attention", "heads"] == f"all heads are dead; one stays: {reason}"


def test_an_attention_that_adds_what_is_zero_in_the_example_keeps_a_head():
    model = Attention(lambda made, x: made + x)
    with torch.no_grad():
        model.value.weight.zero_()
    assert [cut.after for cut in slim_model(nn.Sequential(model), torch.zeros(2, 5, 8)).cuts] == [1]


def test_the_hooks_of_a_removed_attention_stay():
    model, seen = Block(Attention()).eval(), []
    model.attention.register_forward_hook(lambda module, arguments, made: seen.append(made.shape))
    with torch.no_grad():
        model.attention.value.weight.zero_()
    slim = slim_model(model, torch.randn(2, 5, 8)).model
    seen.clear()
    slim(torch.randn(3, 4, 8))
    assert isinstance(slim.attention, RemovedAttention)
    assert seen == [(3, 4, 8)]


class OfMemory(Attention):
    """Its queries come second."""

    def forward(self, memory, x):
        q, k, v = (
            linear(y).unflatten(-1, (-1, 4)).transpose(1, 2)
            for linear, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Reading(nn.Module):
    """Reads a memory, which may be longer."""

    def __init__(self, attention, read):
        super().__init__()
        self.attention, self.read = attention, read

    def forward(self, x, memory):
        return self.read(self.attention, x, memory)


@pytest.mark.parametrize(
    ("make", "read", "after"),
    [
        (OfMemory, lambda attention, x, memory: attention(memory, x), 1),
        (nn.MultiheadAttention, lambda attention, x, memory: attention(key=memory, value=memory, query=x)[0], 1),
        (nn.MultiheadAttention, lambda attention, x, memory: attention(x, memory, memory)[0], 0),
    ],
)
def test_what_is_left_of_an_attention_makes_a_token_for_each_query(make, read, after):
    model = Reading(OfMemory() if make is OfMemory else make(8, 2, batch_first=True), read).eval()
    with torch.no_grad():
        next(linear for name, linear in model.named_modules() if "out" in name).weight.zero_()
    result = slim_model(model, (torch.randn(2, 5, 8), torch.randn(2, 5, 8)))
    assert [cut.after for cut in result.cuts] == [after]
    x, memory = torch.randn(2, 3, 8), torch.randn(2, 6, 8)
    torch.testing.assert_close(result.model(x, memory), model(x, memory))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("dead", [0, 1])
def test_an_encoder_takes_its_fast_path_around_a_removed_attention(dead):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with torch.no_grad():
        model.layers[dead].self_attn.out_proj.weight.zero_()
    x, padding = torch.randn(2, 5, 8), torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]])
    slim = slim_model(model, (x,)).model
    assert isinstance(slim.layers[dead].self_attn, RemovedAttention)
    expected = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(slim(x, src_key_padding_mask=padding)[~padding], expected[~padding])
    with torch.no_grad():
        torch.testing.assert_close(slim(x, src_key_padding_mask=padding)[~padding], expected[~padding])


def test_an_attention_that_takes_a_cache_keeps_a_head():
    class Caching(Attention):
        def forward(self, x, layer_past=None):
            return super().forward(x)

    _, result = blocked(Caching())
    assert said(result)["attention", "heads"] == f"all heads are dead; one stays: {KEEPS_CACHE}"


def test_parameters_that_others_read_keep_a_head():
    class Leaking(Block):
        def forward(self, x):
            return super().forward(x) * self.attention.key.bias.sum()

    torch.manual_seed(0)
    model = Leaking(Attention()).eval()
    with torch.no_grad():
        model.attention.value.weight.zero_()
    result = slim_model(model, torch.randn(2, 5, 8))
    assert not any(isinstance(module, RemovedAttention) for module in result.model.modules())


class Residual(nn.Module):
    """An MLP with a residual around its middle."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down, self.last = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x + self.down(F.gelu(self.up(x))))


@pytest.mark.parametrize(("dead", "widths"), [(["down"], [8, 0]), (["last", "up"], [0, 0])])
def test_a_residual_block_and_a_whole_stream(dead, widths):
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        for name in dead:
            model.get_submodule(name).weight.zero_()
    result = slim_model(model, torch.randn(2, 4))
    assert [result.model.first.out_features, result.model.up.out_features] == widths
    assert result.refused == []
    x = torch.randn(5, 4)
    torch.testing.assert_close(result.model(x), model(x))


def test_widths_that_are_multiples_may_be_zero():
    torch.manual_seed(0)
    model = Residual()
    with torch.no_grad():
        model.down.weight.zero_()
        model.last.weight[:, 0] = 0
        model.up.weight[:, 0] = 0
    result = slim_model(model, torch.randn(2, 4), round_to=4)
    assert [result.model.first.out_features, result.model.up.out_features] == [8, 0]


def test_what_pytorch_cannot_run_with_no_channel_keeps_one():
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.LazyLinear(2))
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    viewed = nn.Sequential(nn.Linear(3, 4), Viewed(), nn.Linear(4, 2))
    expected = {
        "a convolution has at least one channel": (convolutions, torch.randn(2, 3, 6, 6), 2),
        "a batch norm has at least one channel": (normed.eval(), torch.randn(2, 3), 3),
        "the model does not run without them (cannot reshape tensor of 0 elements": (viewed, torch.randn(2, 3), 2),
    }
    for reason, (model, inputs, reader) in expected.items():
        model(inputs)
        with torch.no_grad():
            model[0].weight.zero_()
        result = slim_model(model, inputs)
        assert [cut.after for cut in result.cuts] == [1]
        assert said(result)[str(reader), "units"].startswith(f"all units are dead; one stays: {reason}")


class Viewed(nn.Module):
    """Code that names no size cannot have one of 0."""

    def forward(self, x):
        return torch.tanh(x.view(-1, x.size(-1)))


def test_one_block_that_must_keep_a_unit_costs_the_others_nothing():
    model = nn.Sequential(
        *(nn.Linear(3, 4), Viewed(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), Attention(), nn.Linear(8, 1))
    )
    model[5] = nn.Sequential(nn.Linear(3, 8), nn.Unflatten(0, (1, -1)), Attention(), nn.Flatten(0, 1))
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in (model[0], model[5][2].value):
            layer.weight.zero_()
    result = slim_model(model, torch.randn(2, 3))
    assert [cut.after for cut in result.cuts if cut.kind == "heads"] == [0]
    assert said(result)["2", "units"].startswith("all units are dead; one stays: the model does not run")
