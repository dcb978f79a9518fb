import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tritprune
from tritprune.errors import ConfigError, TraceError
from tritprune.slimming.graph import trace


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.second(self.dropout(torch.relu(self.first(x)))) * scale


def test_nodes_read_parameters_by_name_and_know_their_shapes():
    graph = trace(TwoLinears(), torch.rand(5, 3))
    first, relu, dropout, second, *_ = graph.nodes
    assert [first.kind, relu.kind, dropout.kind, second.kind] == ["linear", "relu", "dropout", "linear"]
    assert [value.parameter for value in first.inputs] == [None, "first.weight", "first.bias"]
    assert second.inputs[2].is_constant
    assert second.inputs[2].constant is None
    assert first.output.shape == (5, 4)
    assert dropout.inputs[2].constant is False  # evaluation mode, although the model is in training mode
    assert graph.consumers(first.output) == [relu]
    assert graph.producer(relu.output) is relu
    assert graph.readers_of_parameter("first.weight") == [first]
    assert graph.is_output(graph.nodes[-1].output)
    assert "first.weight" in str(first)


def test_model_is_left_as_it_was():
    model = TwoLinears()
    model.dropout.eval()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    trace(model, {"x": torch.rand(2, 3), "scale": 2.0})
    assert model.training
    assert not model.dropout.training
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.requires_grad


def test_failure_in_the_middle_leaves_the_parameters():
    model = TwoLinears()
    kept = list(model.parameters())
    with pytest.raises(TraceError, match=r"TwoLinears cannot be traced .*x \(2, 7\)"):
        trace(model, {"x": torch.rand(2, 7)})
    assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))


def test_tied_parameters_are_seen_as_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    graph = trace(model, torch.rand(2, 3))
    assert len(graph.readers_of_parameter("0.weight")) == 2


def test_key_value_caches_are_outputs():
    class Cache:
        def __init__(self, keys):
            self.layers = [{"keys": keys}]

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.key = nn.Linear(3, 3)

        def forward(self, x):
            keys = self.key(x)
            return {"logits": keys.sum(), "cache": Cache(keys)}

    graph = trace(Caching(), torch.rand(2, 3))
    assert graph.is_output(graph.nodes[0].output)


def test_unknown_tracer_names_the_choices():
    with pytest.raises(ConfigError, match=r"unknown tracer 'jitt'; did you mean 'jit'\? known: export, jit"):
        trace(TwoLinears(), torch.rand(2, 3), tracer="jitt")


@pytest.mark.parametrize("given", [3, "text", {"x": 1}, {"x": torch.rand(2, 3), "y": [torch.rand(1)]}, ()])
def test_odd_inputs_are_refused(given):
    with pytest.raises(ConfigError, match="model inputs"):
        trace(TwoLinears(), given)


def test_model_without_tensor_output_is_refused():
    class Silent(nn.Module):
        def forward(self, x):
            return float(x.shape[0])

    with pytest.raises(TraceError, match="returns no tensor"):
        trace(Silent(), torch.rand(2))


def test_only_graph_knows_torch_jit_and_torch_export():
    root = Path(tritprune.__file__).parent
    users = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"^[^#\"]*torch\.(jit|export)\b(?!`)", path.read_text(encoding="utf-8"), re.MULTILINE)
        and re.search(r"(import|from) torch\.(jit|export)|[^`]torch\.(jit|export)\.", path.read_text(encoding="utf-8"))
    ]
    assert users == ["slimming/graph.py"]
