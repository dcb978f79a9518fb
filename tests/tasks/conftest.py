"""One prepared pydocs task and one tiny BERT checkpoint for all tests of this folder."""

from pathlib import Path

import pytest
import torch

from tritprune.tasks import PyDocs

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a the film was good bad very not and it is ##ly really dull fine"


@pytest.fixture(scope="session")
def pydocs() -> PyDocs:
    task = PyDocs()
    task.prepare()
    return task


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config, random weights and tokenizer of a BERT encoder of width 16, without a head."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_bert")
    words = VOCABULARY.split()
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(vocabulary), model_max_length=32).save_pretrained(folder)
    return folder
