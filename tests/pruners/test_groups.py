"""Settings per layer group in one model: 4x1 here, channels there; whole heads, exactly."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tritprune.errors import ConfigError
from tritprune.pruners import Pruner


def tiny_bert(**changes):
    torch.manual_seed(0)
    values = {
        "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 30,
        "max_position_embeddings": 16, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return BertForSequenceClassification(BertConfig(**{**values, **changes}))


def train_bert(model, optimizer, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 30, (4, 6), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids[:, 0] % 3).loss.backward()
        optimizer.step()


def test_attention_blocks_and_feed_forward_channels_in_one_model():
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(
        model, end_step=6, frequency=2,
        groups=[
            {"name": "attention", "include": ["**.attention.self.*"], "pattern": "4x1", "target_sparsity": 0.75},
            {
                "name": "feed_forward", "include": ["bert.encoder.layer.*.output.dense"], "pattern": "channelx1",
                "target_sparsity": 0.5, "end_step": 4, "criterion": "magnitude", "scope": "local",
            },
        ],
    ).attach(optimizer)  # fmt: skip
    events = []
    pruner.on_update(events.append)
    train_bert(model, optimizer, 7)
    elements = {"attention": 6 * 256, "feed_forward": 2 * 16 * 24}
    zeros = {name: sum(r["zeros"] for r in pruner.layer_report() if r["group"] == name) for name in elements}
    assert zeros == {"attention": 0.75 * elements["attention"], "feed_forward": 0.5 * elements["feed_forward"]}
    assert pruner.final_step == 6
    total = sum(elements.values())
    expected = (0.75 * elements["attention"] + 0.5 * elements["feed_forward"]) / total
    assert pruner.target_at(6) == pytest.approx(expected)
    assert events[-1].sparsity == pytest.approx(expected)
    assert [event.step for event in events] == [2, 4, 6]
    for layer in range(2):
        weight = model.bert.encoder.layer[layer].output.dense.weight
        assert int((weight == 0).all(0).sum()) == 12
        assert int((weight == 0).any(0).sum()) == 12
    reasons = {e.name: e.reason for e in pruner.excluded}
    assert reasons["classifier"] == "classifier head" or reasons["classifier"] == "not included"
    assert reasons["bert.pooler.dense"] == "not included"
    # the group that is done reports no changes, and its counts stay
    done = "bert.encoder.layer.0.output.dense"
    assert events[-1].layers[done].changed == 0
    assert events[-1].layers[done].kept == 12


def head_is_dead(model, layer, head, size=4):
    attention = model.bert.encoder.layer[layer].attention
    rows = slice(head * size, (head + 1) * size)
    parts = [getattr(attention.self, n).weight[rows] for n in ("query", "key", "value")]
    parts.append(attention.output.dense.weight[:, rows])
    dead = [not part.any() for part in parts]
    assert len(set(dead)) == 1  # all four linears together
    return dead[0]


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("criterion", ["snip_momentum", "magnitude", "random"])
@pytest.mark.parametrize(("target", "heads"), [(0.375, {"global": 3, "local": 2}), (0.5, {"global": 4, "local": 4})])
def test_heads_exactly(scope, criterion, target, heads):
    model = tiny_bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pruner = Pruner(
        model, end_step=4, frequency=2, pattern="heads", include=["**.attention.**"], target_sparsity=target,
        scope=scope, criterion=criterion,
    ).attach(optimizer)  # fmt: skip
    train_bert(model, optimizer, 5)
    dead = [[head_is_dead(model, layer, head) for head in range(4)] for layer in range(2)]
    assert sum(map(sum, dead)) == heads[scope]
    for row in pruner.layer_report():
        layer = int(row["name"].split(".")[3])
        assert (row["unit"], row["units"], row["kept_units"]) == ("head", 4, 4 - sum(dead[layer]))
        assert row["zeros"] == 64 * sum(dead[layer])
    assert pruner.last_event.sparsity == heads[scope] / 8
    assert pruner.sparsity().prunable.zeros == 256 * heads[scope]


def test_a_pruned_head_adds_nothing_but_its_constant():
    """With its value bias at zero, a dead head's output is zero: the layer equals one that lacks it."""
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(
        model, end_step=0, pattern="heads", include=["**.layer.0.attention.**"], target_sparsity=0.5,
        criterion="magnitude",
    ).attach(optimizer)  # fmt: skip
    dead = [head for head in range(4) if head_is_dead(model, 0, head)]
    assert len(dead) == 2
    assert pruner.last_event.flip_rate == 0.5
    attention = model.bert.encoder.layer[0].attention.self
    nn.init.zeros_(attention.value.bias)
    context = attention(torch.randn(2, 5, 16))[0].view(2, 5, 4, 4)
    assert not context[:, :, dead].any()


def test_layers_outside_attention_are_excluded_with_a_reason():
    model = tiny_bert()
    pruner = Pruner(model, end_step=1, pattern="heads", target_sparsity=0.5)
    assert len(pruner.layers) == 8
    reasons = {e.name: e.reason for e in pruner.excluded}
    assert reasons["bert.encoder.layer.0.output.dense"] == "pattern head has no unit in it"
    assert reasons["classifier"] == "classifier head"


def test_a_head_with_a_frozen_part_is_refused():
    model = tiny_bert()
    model.bert.encoder.layer[0].attention.self.key.weight.requires_grad = False
    with pytest.raises(ConfigError, match=r"layer\.0\.attention.*not among its prunable layers: .*self\.key"):
        Pruner(model, end_step=1, pattern="heads", target_sparsity=0.5)


def test_head_counts_that_do_not_divide_are_refused():
    model = tiny_bert()
    model.bert.encoder.layer[0].attention.self.num_attention_heads = 3
    with pytest.raises(ConfigError, match="16 rows, which 3 heads do not divide"):
        Pruner(model, end_step=1, pattern="heads", target_sparsity=0.5)
