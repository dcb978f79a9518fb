"""A small BERT and a way to kill parts of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

WIDTH, HEADS, UNITS, VOCABULARY = 24, 4, 40, 50
SIZE = WIDTH // HEADS


@pytest.fixture
def make_bert() -> Callable[..., nn.Module]:
    """A BertForSequenceClassification with weights large enough for every part to matter."""
    transformers = pytest.importorskip("transformers")

    def make(**settings: object) -> nn.Module:
        sizes: dict[str, object] = {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "intermediate_size": UNITS,
            "max_position_embeddings": 16,
            "num_labels": 3,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.BertForSequenceClassification(transformers.BertConfig(**(sizes | settings)))
            for name, parameter in model.named_parameters():
                if "LayerNorm" not in name:
                    nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    """Two sequences of eight, the second one padded."""
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.arange(16).view(2, 8) % VOCABULARY, "attention_mask": mask}


@pytest.fixture
def kill() -> Callable[..., None]:
    """``kill(linear, rows=..., columns=...)`` zeroes weights in place."""

    @torch.no_grad()
    def zero(linear: nn.Linear, *, rows: object = None, columns: object = None) -> None:
        if rows is not None:
            linear.weight[rows] = 0  # type: ignore[index]
        if columns is not None:
            linear.weight[:, columns] = 0  # type: ignore[index]

    return zero
