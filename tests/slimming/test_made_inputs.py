"""Inputs from the configuration, the signature and the first layer; what cannot be told is refused by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tritprune
from tritprune.errors import ConfigError
from tritprune.slimming import make_inputs
from tritprune.slimming.model_inputs import ModelInputs

TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
PAIR = {"vocab_size": 60, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
PAIR |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
IMAGE = {"image_size": [16, 24], "patch_size": 4}
SOUND = {"num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 20, "decoder_start_token_id": 1}
SOUND |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("name", "settings", "shapes"),
    [
        ("RobertaModel", TEXT | {"pad_token_id": 1}, {"input_ids": [2, 8]}),  # counts positions by what is no padding
        ("LlamaForSequenceClassification", TEXT, {"input_ids": [1, 8]}),  # without padding it takes one text
        ("BartForSequenceClassification", PAIR, {"input_ids": [2, 8], "decoder_input_ids": [2, 8]}),  # wants an end
        ("ViTModel", {**TEXT, **IMAGE}, {"pixel_values": [2, 3, 16, 24]}),
        ("WhisperModel", {**PAIR, **SOUND}, {"input_features": [2, 8, 12], "decoder_input_ids": [2, 8]}),
    ],
)
def test_a_transformers_model_says_what_it_takes(name, settings, shapes):
    transformers = pytest.importorskip("transformers")
    settings = {key: value for key, value in settings.items() if name != "ViTModel" or key != "vocab_size"}
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings))
    made = make_inputs(model)
    assert {key: list(tensor.shape) for key, tensor in made.items()} == shapes
    ids = made.get("input_ids")
    if ids is not None:
        assert model.config.pad_token_id not in ids.flatten().tolist()
        assert len(set(ids.flatten().tolist())) > 6
    ModelInputs.of(made).call(model.eval())


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(11, 4), nn.Linear(4, 2)

    def forward(self, input_ids, scale=1.0):
        return self.out(self.table(input_ids)) * scale


class Named(nn.Module):
    """One argument, by keyword alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 2)

    def forward(self, *, values):
        return self.layer(values)


PLAIN = [
    (Named, {"values": [2, 6]}),
    (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), [2, 6]),
    (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, 2)), [2, 3, 28, 28]),
    (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.AdaptiveAvgPool1d(1)), [2, 2, 32]),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [2, 8, 8]),
    (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), [2, 8]),
    (Tokens, {"input_ids": [2, 8]}),
]


@pytest.mark.parametrize(("build", "shape"), PLAIN)
def test_a_model_of_ones_own_is_known_by_its_first_layer(build, shape):
    model = build().to(torch.float64)
    made = make_inputs(model)
    if isinstance(made, dict):
        assert {key: list(tensor.shape) for key, tensor in made.items()} == shape
    else:
        assert list(made.shape) == shape
    ModelInputs.of(made).call(model)


class Images(nn.Module):
    """With a configuration of its own, which may say sizes in several ways or leave them open."""

    def __init__(self, **said):
        super().__init__()
        self.config, self.layer = SimpleNamespace(**said), nn.Conv2d(3, 2, 3)

    def forward(self, pixel_values):
        return self.layer(pixel_values)


@pytest.mark.parametrize(
    ("said", "sides"),
    [
        ({"image_size": {"height": 30, "width": 40}, "num_channels": None}, [30, 40]),
        ({"image_size": [30, 40]}, [30, 40]),
        ({"image_size": {"longest_edge": 40}, "num_mel_bins": 0, "max_source_positions": -1}, [224, 224]),
    ],
)
def test_an_images_size_is_read_as_a_configuration_may_say_it(said, sides):
    assert list(make_inputs(Images(**said))["pixel_values"].shape) == [2, 3, *sides]


class Open(nn.Module):
    def forward(self, query=None, passage=None):
        return query


class Two(nn.Module):
    def forward(self, query, passage):
        return query @ passage


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Two(), "can be made for Two, whose forward needs query, passage; give example_inputs, or a dataloader"),
        (Open(), "can be made for Open, whose forward can do without query, passage; give"),
        (
            nn.Sequential(nn.Linear(4, 3), nn.Linear(2, 2)),
            r"for Sequential: it does not run on \[2, 4\]; \[2, 8, 4\] \(the last: mat1 and mat2 shapes",
        ),
        (nn.Sequential(nn.BatchNorm1d(3)), "it says neither what it takes nor how much of it"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(model, message):
    with pytest.raises(ConfigError, match=message):
        make_inputs(model)


def test_auto_slim_from_the_model_alone():
    """Plan, prune and slim with no input, no dataloader and no layer name."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    groups = tritprune.parse_auto_slim_config(model, ffn2_sparsity=0.5)
    assert [group["include"] for group in groups] == [["2"]]
    pruner = tritprune.Pruner(model, criterion="magnitude", start_step=1, end_step=1, groups=groups, exclude_head=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner.attach(optimizer)
    model(torch.rand(3, 6)).sum().backward()
    optimizer.step()
    slim = tritprune.model_slim(model)
    assert (slim[0].out_features, slim[2].in_features) == (4, 4)
    torch.testing.assert_close(slim(torch.ones(1, 6)), model(torch.ones(1, 6)))
