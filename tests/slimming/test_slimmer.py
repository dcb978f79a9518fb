import copy
import json
import logging

import pytest
import torch
from torch import nn

import tritprune
from tritprune.slimming import Cut, slim, slim_model


def damaged_bert(make_bert, kill, **settings):
    """Layer 0 has dead units and heads of both kinds; layer 1 has none."""
    model = make_bert(**settings)
    layer = model.bert.encoder.layer[0]
    kill(layer.intermediate.dense, rows=slice(0, 6))
    kill(layer.output.dense, rows=[3], columns=slice(4, 10))
    kill(layer.attention.self.value, rows=slice(0, 6))
    kill(layer.attention.output.dense, columns=slice(18, 24))
    kill(layer.attention.self.query, rows=[7, 8])
    kill(model.bert.pooler.dense, rows=[5])
    return model


@pytest.mark.parametrize("settings", [{}, {"attn_implementation": "eager", "hidden_act": "gelu_new"}])
def test_bert_loses_what_is_dead_and_says_what_stays(settings, make_bert, kill, tokens):
    model = damaged_bert(make_bert, kill, **settings)
    result = slim_model(model, tokens)
    start = "bert.encoder.layer.0"
    assert result.cuts == [
        Cut("feed-forward units", f"{start}.output.dense", 40, 30, "unit"),
        Cut("feed-forward units", "classifier", 24, 23, "unit"),
        Cut("heads", f"{start}.attention.self", 4, 2, "head"),
    ]
    reasons = {(refusal.where, refusal.kind): refusal.reason for refusal in result.refused}
    assert reasons == {
        (f"{start}.attention.self.query", "rows"): (
            "2 of 12 rows are dead but stay: they belong to heads that stay, and all heads have the same size"
        ),
        (f"{start}.output.dense", "rows"): (
            "1 of 24 rows are dead but stay: layer_norm bert.embeddings.LayerNorm normalises over all of them; "
            "16 layers share their width"
        ),
    }
    attention = result.model.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (2, 12)
    assert result.parameters_before == sum(p.numel() for p in model.parameters())
    assert result.parameters_after == sum(p.numel() for p in result.model.parameters()) < result.parameters_before
    assert result.certificate.holds
    assert len(result.certificate.checks) == 4  # as given (batch 2), 1, 7, half the length
    assert [item["kind"] for item in result.found] == ["feed-forward"] * 3 + ["stream"] + ["attention"] * 2
    records = [result.found, [vars(c) for c in result.cuts], [vars(r) for r in result.refused], result.widths]
    assert json.loads(json.dumps([*records, result.certificate.summary()]))[0] == result.found


def test_selections_say_what_was_kept_of_each_tensor(make_bert, kill, tokens):
    model = damaged_bert(make_bert, kill)
    result = slim_model(model, tokens)
    old, new = dict(model.named_parameters()), dict(result.model.named_parameters())
    start = "bert.encoder.layer.0"
    assert result.selections[f"{start}.intermediate.dense.weight"][0].tolist() == list(range(10, 40))
    assert result.selections[f"{start}.attention.output.dense.weight"][1].tolist() == list(range(6, 18))
    assert result.created == ()
    folded = [f"{start}.attention.output.dense.bias", f"{start}.output.dense.bias", "classifier.bias"]
    assert list(result.folded) == folded
    for name, parameter in new.items():
        kept = old[name]
        for dimension, indices in result.selections.get(name, {}).items():
            assert indices.dtype == torch.int64
            kept = kept.index_select(dimension, indices)
        assert torch.equal(kept, parameter) == (name not in result.folded)


def test_given_model_is_untouched(make_bert, kill, tokens):
    model = damaged_bert(make_bert, kill).train()
    model.bert.encoder.eval()
    logits = model.classifier
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    parameters = list(model.parameters())
    attributes = dict(vars(model.bert.encoder.layer[0].attention.self))
    result = slim_model(model, tokens)
    assert model.classifier is logits
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert attributes == dict(vars(model.bert.encoder.layer[0].attention.self))
    assert not any(module._forward_hooks for module in model.modules())
    assert not result.model.training


def test_slim_model_trains_on(make_bert, kill, tokens):
    model = damaged_bert(make_bert, kill)
    model.bert.embeddings.requires_grad_(False)
    model(**tokens).logits.sum().backward()
    small = slim(model, tokens)
    assert all(parameter.grad is None for parameter in small.parameters())
    assert model.classifier.weight.grad is not None
    assert not small.bert.embeddings.word_embeddings.weight.requires_grad
    small.train()(**tokens).logits.sum().backward()
    assert small.bert.encoder.layer[0].intermediate.dense.weight.grad.shape == (30, 24)


def test_random_4x1_mask(make_bert, tokens):
    """Blocks of 4 outputs by 1 input, 90% zero: only rows and columns that are zero as a whole go."""
    model = make_bert()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for linear in (layer.intermediate.dense, layer.output.dense):
                rows, columns = linear.weight.shape
                linear.weight *= (torch.rand(rows // 4, columns) > 0.95).repeat_interleave(4, dim=0)
    expected = [
        int(((layer.intermediate.dense.weight != 0).any(1) & (layer.output.dense.weight != 0).any(0)).sum())
        for layer in model.bert.encoder.layer
    ]
    result = slim_model(model, tokens)
    assert [layer.intermediate.dense.out_features for layer in result.model.bert.encoder.layer] == expected
    assert all(0 < kept < 40 for kept in expected)


def test_nothing_dead_nothing_cut(make_bert, tokens):
    model = make_bert()
    result = slim_model(model, tokens)
    assert result.cuts == []
    assert result.refused == []
    assert result.widths == {"layers": {}, "attributes": {}}
    assert (result.selections, result.created, result.folded) == ({}, (), ())
    assert result.certificate.max_abs_difference == 0.0


def test_model_without_linears():
    result = slim_model(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), torch.rand(2, 1, 5, 5))
    assert (result.cuts, result.refused, result.found) == ([], [], [])


def test_what_dies_because_of_a_cut_goes_too():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[4].weight[:, 0] = 0  # unit 0 of the second layer is not read ...
        model[2].weight[1:, 2] = 0  # ... and was the only one to read unit 2 of the first
    result = slim_model(model, torch.randn(2, 3))
    assert [(cut.before, cut.after) for cut in result.cuts] == [(4, 3), (4, 3)]


def test_vision_transformer_and_bf16(kill):
    from tritprune.tasks.digits import DigitsViT

    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = DigitsViT().to(dtype)
        for block in model.blocks:
            kill(block.attention.value, rows=slice(16, 32))
            kill(block.mlp.up, rows=slice(3, 9))
            kill(block.mlp.down, columns=[20])
        result = slim_model(model, torch.rand(2, 8, 8).to(dtype))
        assert [(cut.kind, cut.before, cut.after) for cut in result.cuts] == [
            ("feed-forward units", 128, 121),
            ("feed-forward units", 128, 121),
            ("heads", 4, 3),
            ("heads", 4, 3),
        ]
        assert all(parameter.dtype == dtype for parameter in result.model.parameters())


def test_minilm_size(make_bert, kill):
    model = make_bert(
        vocab_size=1000, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name:
                parameter *= 0.1
    for layer in model.bert.encoder.layer:
        kill(layer.output.dense, columns=slice(0, 1536, 2))
        kill(layer.attention.self.value, rows=slice(0, 96))
    inputs = {"input_ids": torch.arange(32).view(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    result = slim_model(model, inputs)
    assert {(cut.kind, cut.before, cut.after) for cut in result.cuts} == {
        ("feed-forward units", 1536, 768),
        ("heads", 12, 9),
    }
    assert len(result.cuts) == 12
    assert result.refused == []
    assert result.parameters_before - result.parameters_after == 6 * (768 * (2 * 384 + 1) + 96 * (4 * 384 + 3))


def test_public_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = 0
    assert tritprune.slim(model, torch.randn(2, 3))[0].out_features == 3
    assert tritprune.slim_model(model, (torch.randn(2, 3),)).cuts[0].after == 3


def test_tracing_says_nothing(make_bert, tokens, caplog, capsys):
    with caplog.at_level(logging.WARNING):
        slim_model(make_bert(), tokens)
    assert caplog.records == []
    assert capsys.readouterr() == ("", "")
