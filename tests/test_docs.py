"""What docs/ says about the code is what the code says."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import tritprune
from tritprune.neural_compressor import keys
from tritprune.schedules import Linear, schedules

DOCS = Path(__file__).parent.parent / "docs"


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(generator().pages()))
def test_a_generated_page_is_up_to_date(name):
    assert (DOCS / name).read_text(encoding="utf-8") == generator().pages()[name], "run scripts/vocabulary"


def test_a_new_key_makes_the_page_stale(monkeypatch):
    monkeypatch.setattr(keys, "KEYS", (*keys.KEYS, keys.Key("brand_new", 1, "frequency")))
    page = (DOCS / "neural_compressor.md").read_text(encoding="utf-8")
    assert "brand_new" in generator().with_keys(page) != page


def test_a_new_name_makes_the_vocabulary_stale(monkeypatch):
    monkeypatch.setitem(schedules._entries, "brand_new", Linear)
    assert "| `brand_new` | [Linear]" in generator().vocabulary()


def test_both_ways_of_the_page_are_the_same_pruning():
    """Their config and the rewritten one choose the same masks; only the loop's length is cut short."""
    page = (DOCS / "neural_compressor.md").read_text(encoding="utf-8")
    blocks = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "tritprune" in b]
    tokens = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}
    digests = []
    for block in blocks:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)).eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        names = {"tritprune": tritprune, "model": model, "optimizer": optimizer, "batches": []}
        exec(re.sub(r"(start_step=|end_step=|frequency=)(\d+)0\b", r"\g<1>\2", block), names)
        for _ in range(100):
            optimizer.zero_grad()
            model(**tokens).loss.backward()
            optimizer.step()
        assert names["pruner"].current_sparsity_ratio == pytest.approx(0.8, abs=0.001)
        digests.append(names["pruner"].digest())
    assert len(digests) == 2
    assert digests[0] == digests[1]


SPEC = {
    "patterns": ("register_pattern", "get_pattern", "BasePattern", "PatternNxM", "PatternNInM", "PatternMHA"),
    "criteria": (
        "register_criterion", "get_criterion", "PruningCriterion", "MagnitudeCriterion", "GradientCriterion",
        "SnipCriterion", "SnipMomentumCriterion", "SnipMomentumBlockCriterion", "RetrainFreeCriterion",
    ),
    "pruners": (
        "register_pruner", "get_pruner", "Pruner", "MagnitudePruner", "SnipPruner", "SnipMomentumPruner",
        "PatternLockPruner", "ProgressivePruner", "BlockMaskPruner", "RetrainFreePruner", "MultiheadAttentionPruner",
        "GroupLasso", "get_sparsity_ratio", "model_slim",
    ),
    "attributes": (
        "modules", "config", "masks", "scores", "pattern", "scheduler", "current_sparsity_ratio", "global_step",
        "start_step", "end_step", "update_frequency_on_step", "target_sparsity_ratio", "max_sparsity_ratio_per_layer",
        "on_step_begin", "on_step_end", "on_epoch_begin", "on_epoch_end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("part", SPEC)
def test_every_name_of_the_system_before_is_in_the_vocabulary_and_here(part):
    table = generator().vocabulary().partition("## Neural Compressor's names")[2]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    here = {name.strip(" `"): told for names, told in rows for name in re.split(r"[ ,(`|]+", names) if name}
    for name in SPEC[part]:
        assert name in here, name
        assert "not here yet" not in here[name]


def test_only_the_language_model_one_shot_is_missing():
    keys_page = (DOCS / "neural_compressor.md").read_text(encoding="utf-8").partition("## Every key")[2]
    for page in (generator().vocabulary(), keys_page):
        missing = [line for line in page.splitlines() if "not here yet" in line]
        assert len(missing) == 1
        assert "sparse_gpt" in missing[0]
