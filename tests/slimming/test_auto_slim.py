import copy

import pytest
import torch
from torch import nn

import tritprune
from tritprune.errors import CertificateError, ConfigError
from tritprune.slimming import certify, model_slim, parse_auto_slim_config, slimmer


class Tied(nn.Module):
    """A chain that can lose channels, one whose channels are read twice, and a head count nobody says."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        hidden = torch.relu(self.first(x))
        return x + self.second(hidden), hidden


def test_groups_of_bert_are_those_of_the_hand_written_experiment(make_bert, tokens):
    model = make_bert()
    before = copy.deepcopy(model.state_dict())
    groups = parse_auto_slim_config(model, ffn2_sparsity=0.5, mha_sparsity=0.25, example_inputs=tokens)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert groups.refused == []
    by_hand = [
        {"name": "feed_forward", "include": ["bert.encoder.layer.*.output.dense"], "pattern": "channelx1"},
        {"name": "heads", "include": ["bert.encoder.layer.*.attention.**"], "pattern": {"name": "heads"}},
    ]
    by_hand = [group | {"target_sparsity": t} for group, t in zip(by_hand, (0.5, 0.25), strict=True)]
    pruners = [tritprune.Pruner(model, end_step=1, groups=given) for given in (groups, by_hand)]
    auto, hand = ([(layer.name, layer.group, layer.unit, layer.units) for layer in p.layers] for p in pruners)
    assert auto == hand
    assert len(auto) == 10


SIZES = {"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 24}


@pytest.mark.parametrize(
    ("name", "settings", "layers"),
    [
        ("Llama", {"num_key_value_heads": 2, "intermediate_size": 40}, 10),  # a unit is a group of two heads
        ("GPT2", {}, 6),  # Conv1D, query, key and value in one
    ],
)
def test_grouped_and_fused_attentions(name, settings, layers, tokens):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**SIZES, **settings)
    model = getattr(transformers, f"{name}Model")(config)
    groups = parse_auto_slim_config(model, ffn2_sparsity=0.5, mha_sparsity=0.5, example_inputs=tokens)
    assert groups.refused == []
    pruner = tritprune.Pruner(model, end_step=1, groups=groups)
    assert len(pruner.layers) == layers


def test_the_whole_road_without_a_layer_name(make_bert, tokens):
    model = make_bert()
    groups = parse_auto_slim_config(model, [tokens | {"labels": 0}], 0.5, 0.25, scope="local")
    pruner = tritprune.Pruner(
        model, criterion="magnitude", schedule="one_shot", end_step=1, start_step=1, groups=groups
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    pruner.attach(optimizer)
    for _ in range(2):
        model(**tokens).logits.sum().backward()
        optimizer.step()
    slim = model_slim(model, example_inputs=tokens)
    for layer in slim.bert.encoder.layer:
        assert layer.intermediate.dense.out_features == 20
        assert layer.attention.self.num_attention_heads == 3


def test_the_same_as_a_neural_compressor_config(make_bert, tokens):
    model = make_bert()
    groups = parse_auto_slim_config(model, ffn2_sparsity=0.5, mha_sparsity=0.25, example_inputs=tokens)
    configs = groups.as_neural_compressor()
    assert configs[0]["op_names"][0] == r"^bert\.encoder\.layer\.0\.output\.dense$"
    theirs = tritprune.from_neural_compressor({"pruning_configs": configs, "end_step": 10}, model)
    ours = tritprune.Pruner(model, end_step=10, groups=groups)
    assert [(layer.name, layer.unit, layer.units) for layer in theirs.layers] == [
        (layer.name, layer.unit, layer.units) for layer in ours.layers
    ]
    assert [group.target_sparsity for group in theirs.groups] == [0.5, 0.25]


def test_what_cannot_go_is_refused_by_name():
    groups = parse_auto_slim_config(Tied(), ffn2_sparsity=0.5, example_inputs=torch.rand(2, 4))
    assert [group["include"] for group in groups] == [["down"]]
    (refusal,) = groups.refused
    assert (refusal.kind, refusal.where) == ("feed-forward", "second")
    assert "the model returns them" in refusal.reason


def test_heads_by_unknown_names_are_refused():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.a, self.b, self.c))
            return self.d(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    with pytest.raises(ConfigError, match=r"nothing in Attention that can go: a, b, c, d: .*names that pattern heads"):
        parse_auto_slim_config(Attention(), mha_sparsity=0.5, example_inputs=torch.rand(2, 3, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ffn2_sparsity": 1.0}, r"ffn2_sparsity is a share in \[0, 1\), got 1.0"),
        ({"mha_sparsity": "half"}, r"mha_sparsity is a share in \[0, 1\), got 'half'"),
        ({}, "nothing to do: ffn2_sparsity and mha_sparsity are both 0"),
        ({"ffn2_sparsity": 0.5}, "nothing in Linear that can go: no two linears"),
        ({"ffn2_sparsity": 0.5, "dataloader": []}, "the dataloader has no batch"),
        ({"ffn2_sparsity": 0.5, "example_inputs": torch.rand(2, 3)}, "nothing in Linear that can go: no two linears"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_auto_slim_config(nn.Linear(3, 3), **settings)


def dead_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[4].weight[:, :2] = 0
    return model


def test_in_place_the_model_itself_is_the_slim_one():
    model = dead_net()
    expected = model(torch.ones(2, 3))
    model[1].eval()
    assert model_slim(model, example_inputs=torch.rand(2, 3), in_place=True) is model
    assert [model[0].out_features, model[2].out_features] == [4, 3]
    assert [module.training for module in model] == [True, False, True, True, True]
    torch.testing.assert_close(model(torch.ones(2, 3)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_fault_in_the_middle_of_surgery_leaves_the_model_whole(call, in_place, monkeypatch):
    model = dead_net()
    before, parts = copy.deepcopy(model), {name: id(tensor) for name, tensor in model.named_parameters()}
    calls = iter(range(1, 100))

    def faulty(module, name, value):
        if name in ("in_features", "out_features") and next(calls) == call:
            raise MemoryError("no room")
        nn.Module.__setattr__(module, name, value)

    monkeypatch.setattr(nn.Linear, "__setattr__", faulty)
    with pytest.raises(MemoryError, match="no room"):
        model_slim(model, example_inputs=torch.rand(2, 3), in_place=in_place)
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == parts
    assert all(torch.equal(t, before.state_dict()[name]) for name, t in model.state_dict().items())
    assert [m.extra_repr() for m in model.modules()] == [m.extra_repr() for m in before.modules()]


def test_a_wrong_cut_leaves_the_model_whole_in_place(monkeypatch):
    model = dead_net()
    before = copy.deepcopy(model)

    def differs(masked, slim, checks):
        with torch.no_grad():
            slim[2].bias += 1
        return certify(masked, slim, checks)

    monkeypatch.setattr(slimmer, "certify", differs)
    with pytest.raises(CertificateError, match="first in module '4'"):
        model_slim(model, example_inputs=torch.rand(2, 3), in_place=True)
    assert all(torch.equal(t, before.state_dict()[name]) for name, t in model.state_dict().items())
