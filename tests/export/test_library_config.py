import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import tritprune
from tritprune.errors import ConfigError
from tritprune.export import even_widths, load_model, loads_with, save_model
from tritprune.export.library_config import describe, misfit

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
VIT = {"hidden_size": 24, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
TOKENS = {"input_ids": torch.arange(16).view(2, 8)}


def slim_of(name, bare, slim):
    """What a slimmed library model is: the sizes of one configuration, and still the configuration of the bare one."""
    kind = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(slim).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.config = bare
    return model, kind


def narrow(up, down, kept):
    """Keep the first units of a feed-forward block, as the slimmer would."""
    up.weight = nn.Parameter(up.weight.detach()[:kept].clone())
    down.weight = nn.Parameter(down.weight.detach()[:, :kept].clone())
    if up.bias is not None:
        up.bias = nn.Parameter(up.bias.detach()[:kept].clone())
    up.out_features = down.in_features = kept


def llama(**changes):
    return transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4, "head_dim": 6} | changes)


def qwen(**changes):
    return transformers.Qwen2Config(**{**SIZES, "num_key_value_heads": 4} | changes)


def t5(**changes):
    return transformers.T5Config(**{"vocab_size": 50, "d_model": 24, "num_layers": 2, "d_kv": 6} | changes)


def bart(**changes):
    sizes = {"vocab_size": 50, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return transformers.BartConfig(**sizes, **heads, **changes)


def gemma(sizes):
    few = {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 50, "laurel_rank": 2, "altup_num_inputs": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "num_kv_shared_layers": 0}
    layers = {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2, "num_hidden_layers": 2}
    width = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": sizes}
    return transformers.Gemma3nTextConfig(**width, **few, **heads, **layers)


def step(layers=None):
    kinds = {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense"] * 2, "sliding_window": 8}
    config = transformers.Step3p7TextConfig(**SIZES, num_key_value_heads=2, head_dim=6, **kinds)
    config.per_layer_config = layers
    return config


@pytest.mark.parametrize(
    ("name", "bare", "slim", "said"),
    [
        ("BertModel", {}, {}, "BertConfig says all of its widths"),
        ("LlamaForCausalLM", llama(), llama(intermediate_size=24), "intermediate_size 24"),
        (
            "LlamaForCausalLM",
            llama(num_key_value_heads=2),
            llama(num_attention_heads=2, num_key_value_heads=1),
            "num_attention_heads 2, num_key_value_heads 1",
        ),
        (
            "Qwen2ForCausalLM",
            qwen(),
            qwen(num_attention_heads=3, num_key_value_heads=3, head_dim=6, intermediate_size=10),
            "intermediate_size 10, num_attention_heads 3, num_key_value_heads 3",
        ),
        (
            "MistralForCausalLM",
            transformers.MistralConfig(**SIZES, num_key_value_heads=2, head_dim=6),
            transformers.MistralConfig(**SIZES | {"num_attention_heads": 2}, num_key_value_heads=1, head_dim=6),
            "num_attention_heads 2, num_key_value_heads 1",
        ),
        (
            "ViTModel",
            transformers.ViTConfig(**VIT, num_attention_heads=4, intermediate_size=40),
            transformers.ViTConfig(**VIT, num_attention_heads=3, head_dim=6, intermediate_size=8),
            "intermediate_size 8, num_attention_heads 3",
        ),
        ("T5ForConditionalGeneration", t5(num_heads=4, d_ff=40), t5(num_heads=3, d_ff=8), "d_ff 8, num_heads 3"),
        (
            "BartModel",
            bart(encoder_ffn_dim=40, decoder_ffn_dim=40),
            bart(encoder_ffn_dim=8, decoder_ffn_dim=12),
            "encoder_ffn_dim 8, decoder_ffn_dim 12",
        ),
        ("Gemma3nForCausalLM", gemma([32, 32]), gemma([32, 24]), "intermediate_size [32, 24]"),
        (
            "Step3p7TextModel",
            step(),
            step({1: {"num_attention_heads": 2, "num_key_value_heads": 1}}),
            "num_attention_heads [4, 2], num_key_value_heads [2, 1]",
        ),
    ],
)
def test_configurations_that_say_slim_widths(name, bare, slim, said):
    if not isinstance(bare, transformers.PreTrainedConfig):
        bare = slim = transformers.BertConfig(**SIZES)
    model, kind = slim_of(name, bare, slim)
    before = bare.to_dict()
    found = describe(model, kind)
    assert (found.complete, said in found.because) == (True, True), found.because
    assert misfit(found.config, kind, model) is None
    assert bare.to_dict() == before


def test_what_a_configuration_cannot_say_is_named():
    model, kind = slim_of("LlamaForCausalLM", llama(), llama())
    narrow(model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj, 30)
    narrow(model.model.layers[0].mlp.gate_proj, nn.Linear(40, 1), 30)
    found = describe(model, kind)
    assert not found.complete
    assert found.because == (
        "its layers have 2 different values of intermediate_size (30, 40) and LlamaConfig has one for all"
    )
    model, kind = slim_of("BertModel", transformers.BertConfig(**SIZES), transformers.BertConfig(**SIZES))
    attention = model.encoder.layer[0].attention
    for linear in (attention.self.query, attention.self.key, attention.self.value):
        narrow(linear, nn.Linear(24, 1), 18)
    narrow(nn.Linear(1, 24), attention.output.dense, 18)
    found = describe(model, kind)
    assert not found.complete
    expected = "BertConfig has no value for a size of encoder.layer.0.attention.self.query.weight alone"
    assert found.because == f"{expected} (24 before, 18 now)"


def test_a_module_that_was_added_is_named_when_saving(tmp_path):
    model, _ = slim_of("LlamaForCausalLM", llama(), llama())
    model.model.layers[0].mlp.adapter = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"has a module 'model\.layers\.0\.mlp\.adapter' that LlamaForCausalLM"):
        tritprune.save(model, tmp_path / "slim")
    assert list(tmp_path.iterdir()) == []


def test_a_bias_that_was_added_is_named():
    model, kind = slim_of("LlamaForCausalLM", llama(), llama())
    model.model.layers[1].mlp.down_proj.bias = nn.Parameter(torch.ones(24))
    found = describe(model, kind)
    assert not found.complete
    assert found.because.startswith("model.layers.1.mlp.down_proj.bias was added to keep the outputs")


def test_equal_shapes_with_other_heads_are_no_match():
    model, kind = slim_of("LlamaForCausalLM", llama(), llama())
    other = llama(num_attention_heads=2, num_key_value_heads=2, head_dim=12)
    problem = misfit(other, kind, model)
    assert problem is not None
    assert "head_dim is 12 there and 6 here" in problem


def uneven_bert():
    model, kind = slim_of(
        "BertForSequenceClassification", transformers.BertConfig(**SIZES), transformers.BertConfig(**SIZES)
    )
    for layer, kept in zip(model.bert.encoder.layer, (25, 30), strict=True):
        narrow(layer.intermediate.dense, layer.output.dense, kept)
    attention = model.bert.encoder.layer[1].attention
    for linear in (attention.self.query, attention.self.key, attention.self.value):
        narrow(linear, nn.Linear(24, 1), 18)
    narrow(nn.Linear(1, 24), attention.output.dense, 18)
    attention.self.num_attention_heads, attention.self.all_head_size = 3, 18
    return model, kind


def test_widths_are_evened_out_with_units_that_do_nothing():
    model, kind = uneven_bert()
    expected = model(**TOKENS).logits
    even, said = even_widths(model, kind)
    assert said == {"intermediate_size": 30}
    assert describe(even, kind).complete
    assert even.bert.encoder.layer[0].intermediate.dense.out_features == 30
    assert even.bert.encoder.layer[1].attention.self.num_attention_heads == 4  # BERT ties the head size to the width
    torch.testing.assert_close(even(**TOKENS).logits, expected, rtol=0, atol=2e-6)
    assert not even.training
    again, _ = even_widths(model, kind)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in even.state_dict().items())


def test_llama_heads_are_evened_out_in_the_configuration():
    model, kind = slim_of("LlamaForCausalLM", llama(), llama(num_attention_heads=3, num_key_value_heads=3))
    two, _ = slim_of("LlamaForCausalLM", llama(), llama(num_attention_heads=2, num_key_value_heads=2))
    model.model.layers[1].self_attn = two.model.layers[1].self_attn
    assert not describe(model, kind).complete
    even, said = even_widths(model, kind)
    assert said == {"num_attention_heads": 3, "num_key_value_heads": 3}
    assert even.model.layers[1].self_attn.q_proj.out_features == 18
    torch.testing.assert_close(even(**TOKENS).logits, model(**TOKENS).logits, rtol=0, atol=2e-6)


def test_a_run_evens_out_and_proves_again(tmp_path):
    from tritprune.slimming import check_saved, slim_model
    from tritprune.training.driver import _evened

    config = transformers.BertConfig(**SIZES)
    model, _ = slim_of("BertForSequenceClassification", config, config)
    with torch.no_grad():
        for layer, dead in zip(model.bert.encoder.layer, (10, 4), strict=True):
            layer.output.dense.weight[:, :dead] = 0
    result = slim_model(model, TOKENS)
    padded, told = _evened(model, result)
    assert told == {"widths": {"intermediate_size": 36}, "parameters_put_back": 6 * (24 + 1 + 24)}
    assert padded.parameters_after == result.parameters_after + told["parameters_put_back"]
    assert padded.certificate.parameters[1] == padded.parameters_after
    padded.certificate.save(tmp_path)
    builder = {"kind": "transformers", "class": "BertForSequenceClassification"}
    save_model(padded.model, tmp_path / "slim", builder=builder, widths=padded.widths)
    assert check_saved(load_model(tmp_path / "slim"), tmp_path)


WITHOUT_TRITPRUNE = """
import sys, torch
torch.set_num_threads(1)
sys.modules["tritprune"] = None
import transformers
from safetensors.torch import save_file
made = {}
for name, folder in zip(sys.argv[2::2], sys.argv[3::2]):
    model = getattr(transformers, name).from_pretrained(folder).eval()
    made[name] = model(input_ids=torch.arange(16).view(2, 8))[0].detach().contiguous()
try:
    import tritprune
except ImportError:
    save_file(made, sys.argv[1])
"""


def test_slim_folders_load_where_there_is_no_tritprune(tmp_path):
    from safetensors.torch import load_file

    uneven, kind = uneven_bert()
    even, _ = even_widths(uneven, kind)
    qwen_slim, _ = slim_of(
        "Qwen2ForCausalLM", qwen(), qwen(num_attention_heads=3, num_key_value_heads=3, head_dim=6, intermediate_size=10)
    )
    gemma_slim, _ = slim_of("Gemma3nForCausalLM", gemma([32, 32]), gemma([32, 24]))
    step_slim, _ = slim_of("Step3p7TextModel", step(), step({1: {"num_attention_heads": 2, "num_key_value_heads": 1}}))
    each_layer = {"Gemma3nForCausalLM": gemma_slim, "Step3p7TextModel": step_slim}
    models = {"AutoModelForSequenceClassification": even, "AutoModelForCausalLM": qwen_slim, **each_layer}
    saved = []
    for auto, model in models.items():
        builder = {"kind": "transformers", "class": type(model).__name__}
        folder = save_model(model, tmp_path / auto, builder=builder)
        assert loads_with(folder).startswith("from_pretrained: yes, ")
        assert torch.equal(load_model(folder)(**TOKENS)[0], model(**TOKENS)[0])
        saved += [auto, str(folder)]
    made = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", WITHOUT_TRITPRUNE, str(made), *saved]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found = load_file(made)
    torch.testing.assert_close(found["AutoModelForSequenceClassification"], uneven(**TOKENS).logits, rtol=0, atol=2e-6)
    for name, model in (("AutoModelForCausalLM", qwen_slim), *each_layer.items()):
        torch.testing.assert_close(found[name], model(**TOKENS)[0], rtol=0, atol=2e-6)


def test_a_slim_swin_is_told_that_its_configuration_cannot_say_it():
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 2}
    model, kind = slim_of("SwinModel", transformers.SwinConfig(**sizes), transformers.SwinConfig(**sizes))
    block = model.encoder.layers[0].blocks[0]
    narrow(block.mlp.fc1, block.mlp.fc2, 20)
    found = describe(model, kind)
    assert found.because.startswith("SwinConfig has no value for a size of encoder.layers.0.blocks.0.mlp.fc1.weight")


def test_the_sentence_says_no_and_why(tmp_path):
    model, _ = uneven_bert()
    builder = {"kind": "transformers", "class": "BertForSequenceClassification"}
    widths = {"layers": {}, "attributes": {}}
    folder = save_model(copy.deepcopy(model), tmp_path / "slim", builder=builder, widths=widths)
    sentence = loads_with(folder)
    assert sentence.startswith("from_pretrained: no, because its layers have 2 different values of intermediate_size")
    said = "slimmer.uniform=true (tritprune.save(..., uniform=True)) would pad its layers to widths that it can say"
    remedy = f"{said}; tritprune.load loads it"
    assert sentence.endswith(f"BertConfig has one for all; {remedy}")
