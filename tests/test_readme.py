"""What the README shows is run: its commands compose, its code works."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import BertConfig, BertForSequenceClassification

import tritprune

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line.split("#")[0])
    for line in README.splitlines()
    if re.match(r"(`?python -m tritprune|torchrun|scripts/run)", line) and "--" not in line.split("tritprune")[-1]
]


def tiny_bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes)).eval()


def test_there_is_something_to_check():
    assert len(BLOCKS) >= 4
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_composes(words):
    overrides = [word.strip("`") for word in words if "=" in word]
    singles = [re.sub(r"^([^=\[]+=[^,\[]+),.*$", r"\1", override) for override in overrides]  # a sweep's first value
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        assert compose("config", overrides=singles) is not None


def test_the_library_example_runs():
    block = next(b for b in BLOCKS if "pruner.attach(optimizer)" in b)
    model = tiny_bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    before, after = block.replace("end_step=1000", "end_step=2").split("...")
    names = {"tritprune": tritprune, "model": model, "optimizer": optimizer, "example_inputs": tokens}
    exec(before, names)
    for _ in range(2):
        optimizer.zero_grad()
        model(**tokens, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    assert names["pruner"].sparsity().prunable.sparsity == pytest.approx(0.9, abs=1e-3)
    exec(after.partition("\n")[2], names)
    assert isinstance(names["slim"], torch.nn.Module)


def test_the_layer_groups_fit_a_bert():
    block = next(b for b in BLOCKS if "groups=[" in b)
    names = {"tritprune": tritprune, "model": tiny_bert()}
    exec(block, names)
    assert {layer.group for layer in names["pruner"].layers} == {"attention", "feed_forward"}


def test_a_neural_compressor_config_loads_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my_nc.yaml").write_text("{op_names: [attention], target_sparsity: 0.5, start_step: 1, end_step: 4}")
    block = next(b for b in BLOCKS if "from_neural_compressor" in b)
    model = tiny_bert()
    names = {"tritprune": tritprune, "model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    exec(block, names)
    assert names["pruner"].target_sparsity_ratio == 0.5
    assert all("attention" in layer.name for layer in names["pruner"].layers)


def test_a_criterion_of_your_own_is_as_short_as_the_readme_says():
    block = next(b for b in BLOCKS if "register_criterion" in b)
    exec(block, {})
    scores = tritprune.get_criterion("cautious").element_scores(torch.tensor([[-2.0]]), torch.tensor([[0.5]]))
    assert scores.item() == 3.0
