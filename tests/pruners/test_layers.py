"""Which layers are pruned: globs, the classifier head, tied, frozen and unknown layers."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from tritprune.errors import ConfigError
from tritprune.pruners import Pruner, find_head
from tritprune.pruners.layers import matches, take_inventory

TINY = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 12, "vocab_size": 20}


@pytest.mark.parametrize(
    ("glob", "name", "fits"),
    [
        ("**", "a.b.c", True),
        ("a.**", "a.b", True),
        ("a.**", "a", True),
        ("**.c", "c", True),
        ("**.c", "a.b.c", True),
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.b.d.c", False),
        ("a.*", "a", False),
        ("layer*", "layer10", True),
        ("layer*", "a.layer1", False),
        ("layer.1", "layer.10", False),  # as a regex, it took it
        ("out", "output_proj", False),  # as a regex, it took it
        ("out", "out.proj", False),
        ("a.b", "aXb", False),
        ("*.self.q*y", "x.self.query", True),
        ("bert.encoder.layer.*.output.dense", "bert.encoder.layer.3.output.dense", True),
        ("bert.encoder.layer.*.output.dense", "bert.encoder.layer.3.attention.output.dense", False),
    ],
)
def test_globs(glob, name, fits):
    assert matches(glob, name) is fits


def reasons(pruner):
    return {exclusion.name: exclusion.reason for exclusion in pruner.excluded}


def pruned(pruner):
    return [layer.name for layer in pruner.layers]


def test_the_head_is_excluded_by_its_exact_name():
    """The predecessor used its name as a pattern, which took other layers along."""
    model = nn.ModuleDict({"out_proj": nn.Linear(4, 4), "layer": nn.Linear(4, 4), "layer_10": nn.Linear(4, 4)})
    model["out"] = nn.Linear(4, 2)
    pruner = Pruner(model, end_step=1)
    assert pruned(pruner) == ["out_proj", "layer", "layer_10"]
    assert reasons(pruner) == {"out": "classifier head"}
    assert pruned(Pruner(model, end_step=1, exclude_head=False)) == ["out_proj", "layer", "layer_10", "out"]


def test_heads_of_known_models():
    assert find_head(BertForSequenceClassification(BertConfig(**TINY, num_labels=3))) == "classifier"
    assert find_head(BertModel(BertConfig(**TINY))) is None  # an encoder has none; its last Linear is the pooler
    assert find_head(BertForMaskedLM(BertConfig(**TINY))) == "cls.predictions.decoder"
    gpt = GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=20, num_labels=3, pad_token_id=0)
    assert find_head(GPT2ForSequenceClassification(gpt)) == "score"


def test_a_top_level_head_beats_the_last_linear():
    model = nn.ModuleDict({"head": nn.Linear(4, 3), "body": nn.Linear(4, 4)})
    assert find_head(model) == "head"
    assert find_head(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))) == "1"


def test_a_model_of_one_layer_keeps_it():
    model = nn.Sequential(nn.Linear(4, 4))
    assert find_head(model) is None
    assert pruned(Pruner(model, end_step=1)) == ["0"]


def test_a_model_without_linear_is_pruned(conv_net):
    assert find_head(conv_net) is None
    assert pruned(Pruner(conv_net, end_step=1)) == ["stem", "grouped", "point", "signal"]


def test_a_model_without_any_layer_is_refused():
    with pytest.raises(ConfigError, match="LayerNorm has no Linear, Conv or Conv1D layer"):
        Pruner(nn.LayerNorm(4), end_step=1)


def test_a_bare_linear_is_pruned(sgd):
    model = nn.Linear(8, 8)
    pruner = Pruner(model, end_step=0, criterion="magnitude", target_sparsity=0.5).attach(sgd(model))
    assert pruner.sparsity().prunable.sparsity == 0.5


def test_gpt2_counts_as_what_it_is():
    """The predecessor reported a sparsity of 7.68: its Conv1D is stored [in, out]."""
    config = GPT2Config(n_embd=8, n_head=2, n_layer=2, vocab_size=20, n_positions=8, num_labels=3, pad_token_id=0)
    model = GPT2ForSequenceClassification(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, pattern="4x1", criterion="magnitude", target_sparsity=0.5, end_step=0).attach(optimizer)
    shapes = {row["name"].split(".")[-1]: row["shape"] for row in pruner.layer_report()}
    assert shapes["c_attn"] == [24, 8]  # [out, in]
    assert pruner.sparsity().prunable.sparsity == 0.5
    weight = model.transformer.h[0].attn.c_attn.weight  # [in, out]: 4 outputs of one input stand together
    blocks = (weight == 0).view(8, 6, 4).sum(2)
    assert set(blocks.flatten().tolist()) == {0, 4}


def test_tied_weights_are_pruned_once_under_their_first_name():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    pruner = Pruner(model, end_step=1, exclude_head=False)
    assert pruned(pruner) == ["a", "c"]
    assert reasons(pruner) == {"b": "tied to a"}


def test_one_module_under_two_names_is_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "again": shared, "c": nn.Linear(4, 4)})
    pruner = Pruner(model, end_step=1, exclude_head=False)
    assert pruned(pruner) == ["a", "c"]
    assert reasons(pruner) == {"again": "tied to a"}


def test_a_decoder_tied_to_the_embedding_is_not_pruned():
    model = BertForMaskedLM(BertConfig(**TINY))
    name = "cls.predictions.decoder"
    assert reasons(Pruner(model, end_step=1, exclude_head=False))[name] == (
        "tied to bert.embeddings.word_embeddings, which is no prunable layer"
    )


def test_what_cannot_be_pruned_has_a_reason():
    class Zoo(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(4, 4)
            self.frozen.weight.requires_grad = False
            self.double = nn.Linear(4, 4, dtype=torch.float64)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.up = nn.ConvTranspose2d(3, 4, 2)
            self.attention = nn.MultiheadAttention(8, 2)
            self.lazy = nn.LazyLinear(4)
            self.empty = nn.Linear(0, 4)
            self.good = nn.Linear(4, 4)

    with pytest.warns(UserWarning, match="zero-element"):
        zoo = Zoo()
    pruner = Pruner(zoo, end_step=1, exclude_head=False)
    assert pruned(pruner) == ["attention.out_proj", "good"]
    found = reasons(pruner)
    assert list(found) == ["frozen", "double", "normed", "up", "attention", "lazy", "empty"]
    for name, word in (
        ("frozen", "frozen"), ("double", "float64"), ("normed", "parametrization"), ("up", "ConvTranspose2d"),
        ("attention", "in_proj_weight"), ("lazy", "no shape"), ("empty", "empty"),
    ):  # fmt: skip
        assert word in found[name]


def test_include_and_exclude(net):
    pruner = Pruner(net, end_step=1, include=["first", "sec*"], exclude=["first"])
    assert pruned(pruner) == ["second"]
    assert reasons(pruner) == {"first": "excluded by 'first'", "classifier": "not included"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"include": ["nothing.here"]}, ["nothing.here", "matches no layer", "first"]),
        ({"exclude": ["secnd"]}, ["exclude 'secnd'", "nearest layers: second"]),
        ({"include": "first"}, ["list", "['first']"]),  # letters of a string would be globs
        ({"include": []}, ["no layer to prune", "include is empty"]),
        ({"include": ["classifier"]}, ["classifier: classifier head"]),
    ],
)
def test_globs_that_miss(net, settings, said):
    with pytest.raises(ConfigError) as error:
        Pruner(net, end_step=1, **settings)
    assert all(word in str(error.value) for word in said)


def test_a_glob_that_names_a_container_gets_a_hint():
    model = BertForSequenceClassification(BertConfig(**TINY))
    with pytest.raises(ConfigError, match=r"it is no layer but holds 12; write 'bert\.encoder\.\*\*'"):
        Pruner(model, end_step=1, include=["bert.encoder"])


def test_order_is_that_of_registration(net):
    assert take_inventory(net).order == ("first", "second", "classifier")
    pruner = Pruner(net, end_step=1, groups=[{"include": ["second"]}, {"include": ["first"]}])
    assert pruned(pruner) == list(pruner.masks) == ["first", "second"]
