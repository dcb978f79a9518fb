import pytest
import torch
from torch import nn

from tritprune.export import load_model, save
from tritprune.slimming import slim_model

SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
IDS = {"input_ids": torch.arange(14).view(2, 7)}


@pytest.fixture
def make():
    transformers = pytest.importorskip("transformers")

    def build(name, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            kind = getattr(transformers, name)
            model = kind(kind.config_class(**SIZES, **settings))
            for key, parameter in model.named_parameters():
                if "norm" not in key:
                    nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return build


def test_units_that_are_dead_in_all_experts_go_from_their_stacked_weights(make, tmp_path):
    model = make("MixtralForCausalLM", num_local_experts=4)
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj[:, :, [0, 5, 9]] = 0
        experts.gate_up_proj[:, 3] = 0  # a gate of zero
        experts.down_proj[2, :, 7] = 0
    result = slim_model(model, IDS)
    (cut,) = result.cuts
    assert (cut.kind, cut.where) == ("feed-forward units", "model.layers.1.mlp.experts")
    assert (cut.before, cut.after) == (12, 8)
    slim = result.model.model.layers[1].mlp.experts
    assert (slim.gate_up_proj.shape, slim.down_proj.shape) == ((4, 16, 16), (4, 16, 8))
    (refusal,) = [refusal for refusal in result.refused if "experts" in refusal.where]
    assert refusal.reason == (
        "1 of 48 columns are dead but stay: all experts are one tensor, and a unit goes only where it is dead in each "
        "of them"
    )
    save(result, tmp_path / "slim")
    loaded = load_model(tmp_path / "slim")
    with torch.no_grad():
        assert torch.equal(loaded(**IDS).logits, result.model(**IDS).logits)


def test_a_width_that_the_kernel_of_the_experts_does_not_take_is_refused_with_one_that_it_does(make):
    model = make("MixtralForCausalLM", num_local_experts=4)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[:, :, :6] = 0
    refused = slim_model(model, IDS).refused
    assert [refusal.where for refusal in refused] == ["model.layers.1.mlp.experts"]
    assert "6 of 12 columns are dead but stay" in refused[0].reason
    assert "strides should be multiple of 16 bytes: round_to=4 keeps to that" in refused[0].reason
    assert [(cut.before, cut.after) for cut in slim_model(model, IDS, round_to=4).cuts] == [(12, 8)]


def test_counts_in_the_configuration_of_one_layer_are_that_layers_own(make, tmp_path):
    model = make("Phi3ForCausalLM")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 8:] = 0
    result = slim_model(model, IDS)
    assert [(cut.where, cut.before, cut.after) for cut in result.cuts] == [("model.layers.1.self_attn", 4, 2)]
    layers = result.model.model.layers
    assert [layer.self_attn.config.num_attention_heads for layer in layers] == [4, 2]
    assert result.model.config.num_attention_heads == model.config.num_attention_heads == 4
    assert result.widths["attributes"]["model.layers.1.self_attn"]["config.num_attention_heads"] == 2
    save(result, tmp_path / "slim")
    loaded = load_model(tmp_path / "slim")
    with torch.no_grad():
        assert torch.equal(loaded(**IDS).logits, result.model(**IDS).logits)
        torch.testing.assert_close(loaded(**IDS).logits, model(**IDS).logits, rtol=1e-4, atol=1e-5)
