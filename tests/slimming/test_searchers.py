import logging

import pytest
import torch
from torch import nn

from tritprune.errors import ConfigError
from tritprune.slimming import (
    ClassifierHeadSearcher,
    JitBasicSearcher,
    Linear2LinearSearcher,
    RecipeSearcher,
    SelfMHASearcher,
    get_attributes,
    get_common_module,
    print_iterables,
)

LAYER = "bert.encoder.layer"
QKV = [[f"{LAYER}.{i}.attention.self.{part}" for part in ("query", "key", "value")] for i in range(2)]
FFN = [[f"{LAYER}.{i}.attention.output.dense"] for i in range(2)]


def test_get_attributes(make_bert):
    model = make_bert()
    assert get_attributes(model, f"{LAYER}.0.output.dense") is model.bert.encoder.layer[0].output.dense
    with pytest.raises(ConfigError, match=r"'bert\.encoder' \(BertEncoder\) has no 'layers'"):
        get_attributes(model, "bert.encoder.layers.0")


def test_get_common_module():
    assert get_common_module("a.b.0.query", "a.b.0.key") == "a.b.0"
    assert get_common_module("a.b.self.query", "a.b.output.dense") == "a.b"
    assert get_common_module("a", "b") == ""


def test_print_iterables(caplog):
    with caplog.at_level(logging.INFO, logger="tritprune"):
        print_iterables([{"root_linear": "a"}, "b"])
    assert [record.message for record in caplog.records] == ["{'root_linear': 'a'}", "b"]


def test_recipe_searcher(make_bert):
    model = make_bert()
    searcher = RecipeSearcher(model, {"BertAttention": ["self.query", "self.key", "self.value", "output.dense"]})
    found = searcher.search()
    assert searcher.targets == {"BertAttention"}
    assert found is searcher.searching_results
    assert len(found) == 2
    assert found[1][3] is model.bert.encoder.layer[1].attention.output.dense
    assert searcher.search("BertAttention") == found
    with pytest.raises(ConfigError, match="the recipe has no 'BertLayer'; it has: BertAttention"):
        searcher.search("BertLayer")


def test_recipes_of_common_architectures(make_bert):
    model = make_bert()
    layer = model.bert.encoder.layer[1]
    assert RecipeSearcher(model).search("BertLayer")[1] == [layer.intermediate.dense, layer.output.dense]
    with pytest.raises(ConfigError, match=r"no recipe for Linear \(model type None\): give one; known: bert, roberta"):
        RecipeSearcher(nn.Linear(2, 2))


TRACERS = pytest.mark.parametrize("tracer", ["jit", "export"])


@pytest.mark.parametrize("given", ["nothing", "mapping", "pair", "examples", "placeholder"])
def test_linear_to_linear(given, make_bert, tokens):
    model = make_bert(max_position_embeddings=64)
    labelled = {**tokens, "labels": torch.zeros(2, dtype=torch.long)}
    arguments = {
        "nothing": {},
        "mapping": {"dataloader": [labelled]},
        "pair": {"dataloader": iter([(tokens["input_ids"], torch.zeros(2))])},
        "examples": {"example_inputs": tokens},
        "placeholder": {"placeholder_shape": (2, 5), "placeholder_dtype": torch.int32},
    }[given]
    searcher = Linear2LinearSearcher(model, **arguments)
    found = searcher.search()
    assert found == [
        {"root_linear": f"{LAYER}.0.output.dense", "target_frontier_linears": [f"{LAYER}.0.intermediate.dense"]},
        {"root_linear": f"{LAYER}.1.output.dense", "target_frontier_linears": [f"{LAYER}.1.intermediate.dense"]},
        {"root_linear": "classifier", "target_frontier_linears": ["bert.pooler.dense"]},
    ]
    assert len(searcher.target_op_lut["gelu"]) == 2
    assert searcher.current_pattern.root == "classifier"
    objects = searcher.from_layer_name_to_object(found)
    assert objects[0]["root_linear"] is model.bert.encoder.layer[0].output.dense
    assert objects[0]["target_frontier_linears"] == [model.bert.encoder.layer[0].intermediate.dense]


@TRACERS
def test_self_attention(tracer, make_bert):
    model = make_bert(max_position_embeddings=32)
    searcher = SelfMHASearcher(model, tracer=tracer)
    found = searcher.search()
    assert found == [{"qkv": QKV[0], "ffn": FFN[0]}, {"qkv": QKV[1], "ffn": FFN[1]}]
    assert searcher.search(split_qkv_ffn=True) == (QKV[0] + QKV[1], FFN[0] + FFN[1])
    (first, _) = searcher.from_layer_name_to_object(found)
    assert first["mha_name"] == [f"{LAYER}.0.attention"]
    assert first["mha_module"] == [model.bert.encoder.layer[0].attention]
    assert first["qkv_module"][2] is model.bert.encoder.layer[0].attention.self.value


def test_base_attributes():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    searcher = JitBasicSearcher(model)
    assert searcher.target_layers == ["Linear"]
    assert searcher.device == torch.device("cpu")
    assert [node.kind for node in searcher.flatten_static_graph] == ["linear", "relu", "linear"]
    assert list(searcher.static_graph.nodes) == searcher.flatten_static_graph
    assert len(Linear2LinearSearcher(model).search()) == 1


@TRACERS
def test_vision_model_gets_an_image(tracer):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    searcher = SelfMHASearcher(transformers.ViTForImageClassification(config), tracer=tracer)
    (found,) = searcher.search()
    assert len(found["qkv"]) == 3
    assert len(found["ffn"]) == 1


@TRACERS
def test_decoder_with_a_cache_and_grouped_queries(tracer):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
    )
    model = transformers.LlamaForCausalLM(config)
    found = SelfMHASearcher(model, placeholder_shape=(1, 6), tracer=tracer).search()
    start = "model.layers.0.self_attn"
    assert found[0] == {"qkv": [f"{start}.{p}_proj" for p in "qkv"], "ffn": [f"{start}.o_proj"]}
    assert len(found) == 2
    chains = Linear2LinearSearcher(model, placeholder_shape=(1, 6), tracer=tracer).search()
    assert [sorted(item["target_frontier_linears"]) for item in chains] == [
        [f"model.layers.{i}.mlp.gate_proj", f"model.layers.{i}.mlp.up_proj"] for i in range(2)
    ]


def test_classifier_head(make_bert):
    model = make_bert()
    assert ClassifierHeadSearcher(model).search() == "classifier"
    assert ClassifierHeadSearcher(model).search(return_name=False) is model.classifier
    assert ClassifierHeadSearcher(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).search() is None
    assert ClassifierHeadSearcher(nn.ReLU()).search() is None
