"""The plan as a person reads it, and what it says of the slimmer against what the slimmer then does."""

import io

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from tritprune import Pruner, slim_model
from tritprune.app.foresight import foresee
from tritprune.app.plan_view import plan_view

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
GROUPS = [
    {"name": "units", "include": ["**.output.dense"], "exclude": ["**.attention.**"], "pattern": "channelx1"},
    {"name": "heads", "include": ["**.attention.**"], "pattern": "heads"},
]
AT_ONCE = {"criterion": "magnitude", "schedule": "one_shot", "end_step": 0, "target_sparsity": 0.5}
TOKENS = {"input_ids": torch.arange(16).view(2, 8)}


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **SIZES)).eval()


def shown(pruner, model, width=80, **inputs):
    plan = pruner.plan()
    console = Console(width=width, record=True, file=io.StringIO())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for part in plan_view(plan, foresee(model, plan, **inputs), parameters, "python -m tritprune experiment=x"):
        console.print(part)
    return console.export_text()


def test_what_the_slimmer_will_cut_is_what_it_cuts():
    model = bert()
    pruner = Pruner(model, **AT_ONCE, max_layer_sparsity=0.75, groups=GROUPS)
    foreseen = foresee(model, pruner.plan())
    assert [one.text.partition(", ")[0] for one in foreseen] == ["about 40 of 80 units", "about 4 of 8 heads"]
    assert [one.refused for one in foreseen] == [(), ()]
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    result = slim_model(model, TOKENS)
    assert result.parameters_before - result.parameters_after == sum(one.parameters for one in foreseen)


def test_what_it_will_not_cut_is_what_it_refuses():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.side = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(12, 3)

        def forward(self, x):
            hidden = F.relu(self.up(x))
            return self.down(hidden), self.side(hidden), x

    torch.manual_seed(0)
    model = Shared().eval()
    pruner = Pruner(model, **AT_ONCE, include=["down"], pattern="channelx1", exclude_head=False)
    (foreseen,) = foresee(model, pruner.plan())
    assert foreseen.parameters == 0
    assert "0 of 12 units, in 0 of 1 layers" in foreseen.text
    assert [(name, "side" in reason) for name, reason in foreseen.refused] == [("down", True)]
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    result = slim_model(model, torch.randn(2, 8))
    assert result.parameters_after == result.parameters_before


def test_small_units_promise_nothing():
    model = bert()
    (foreseen,) = foresee(model, Pruner(model, **AT_ONCE, pattern="4x1").plan())
    assert foreseen.parameters == 0
    assert "nothing for certain; of 2 feed-forward blocks" in foreseen.text or "of 3 feed-forward" in foreseen.text


def test_a_model_that_cannot_be_traced_says_so():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 12), nn.Linear(12, 4)

        def forward(self, x):
            return self.down(self.up(x.flatten(1)).relu()) + x.shape[2]

    model = Images()
    plan = Pruner(model, **AT_ONCE, pattern="channelx1", exclude_head=False).plan()
    assert "could not be traced before the run" in foresee(model, plan)[0].text
    assert "could not" not in foresee(model, plan, torch.zeros(2, 1, 4))[0].text


def test_a_person_reads_it_at_80_columns():
    model = bert()
    text = shown(Pruner(model, **AT_ONCE, max_layer_sparsity=0.75, groups=GROUPS), model)
    assert max(map(len, text.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "self.query 2 x 24x24 head 3 of 4 (to 75%) 576" in lines
    assert "layers of heads, in bert.encoder.layer.*.attention" in lines
    assert "dense 2 x 24x40 24x1 30 of 40 (to 75%) 960" in lines
    assert "0 0.5000 960 960 40 50.0000%" in lines  # after step, target, may go, go, units, sparsity
    assert "bert.encoder.layer.*.intermediate.dense 2 x not included" in lines
    assert "memory: scores 320 bytes, masks 80 bytes" in lines
    assert any(line.startswith("the slimmer can cut: about 40 of 80 units, in 2 of 2 layers") for line in lines)
    assert any("parameters now, about" in line for line in lines)
    assert lines[-1] == "nothing was trained; go: python -m tritprune experiment=x"


def test_floors_units_of_several_sizes_and_large_memory_are_told():
    model = nn.Sequential(nn.Linear(600, 514), nn.ReLU(), nn.Linear(514, 514), nn.Linear(514, 2))
    pruner = Pruner(model, **{**AT_ONCE, "end_step": 3}, pattern="4x1", min_layer_sparsity=0.1, max_layer_sparsity=0.9)
    text = shown(pruner, model, example_inputs=torch.zeros(1, 600))
    assert "10% to 90% of 77,400" in text
    assert "memory: scores 574.8 kB, masks 143.7 kB" in text
    assert "286,295 to 286,298" in text
