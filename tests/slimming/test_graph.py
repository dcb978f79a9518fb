import re
from pathlib import Path

import pytest
import torch
from torch import nn

import tritprune
from tritprune.errors import ConfigError, TraceError
from tritprune.slimming.graph import TRACERS, trace


class TwoLinears(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, scale=1.0):
        return self.second(self.dropout(torch.relu(self.first(x)))) * scale


both = pytest.mark.parametrize("tracer", list(TRACERS))


@both
def test_nodes_read_parameters_by_name_and_know_their_shapes(tracer):
    graph = trace(TwoLinears(), torch.rand(5, 3), tracer)
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
    assert [first.scope, relu.scope, dropout.scope, second.scope] == ["first", "", "dropout", "second"]


@both
def test_model_is_left_as_it_was(tracer):
    model = TwoLinears()
    model.dropout.eval()
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    trace(model, {"x": torch.rand(2, 3), "scale": 2.0}, tracer)
    assert model.training
    assert not model.dropout.training
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.requires_grad


@both
def test_failure_in_the_middle_leaves_the_parameters(tracer):
    model = TwoLinears()
    kept = list(model.parameters())
    with pytest.raises(TraceError, match=r"\(x \(2, 7\)\): it does not run on them in module 'first'"):
        trace(model, {"x": torch.rand(2, 7)}, tracer)
    assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))


@both
def test_tied_parameters_are_seen_as_one(tracer):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    graph = trace(model, torch.rand(2, 3), tracer)
    assert len(graph.readers_of_parameter("0.weight")) == 2


@both
def test_key_value_caches_are_outputs(tracer):
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

    graph = trace(Caching(), torch.rand(2, 3), tracer)
    assert graph.is_output(graph.nodes[0].output)


def test_unknown_tracer_names_the_choices():
    with pytest.raises(ConfigError, match=r"unknown tracer 'jitt'; did you mean 'jit'\? known: export, jit"):
        trace(TwoLinears(), torch.rand(2, 3), tracer="jitt")


@pytest.mark.parametrize("given", [3, "text", {"x": 1}, {"x": torch.rand(2, 3), "y": [torch.rand(1)]}, ()])
def test_odd_inputs_are_refused(given):
    with pytest.raises(ConfigError, match="model inputs"):
        trace(TwoLinears(), given)


@both
def test_model_without_tensor_output_is_refused(tracer):
    class Silent(nn.Module):
        def forward(self, x):
            return float(x.shape[0])

    with pytest.raises(TraceError, match="returns no tensor"):
        trace(Silent(), torch.rand(2), tracer)


class Kinds(nn.Module):
    """In-place and out-of-place forms, lists, sizes, a buffer, a convolution, an autograd function."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fused = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 12)
        self.scale = nn.Buffer(torch.ones(4))

    def forward(self, x):
        x = torch.relu_(self.norm(self.conv(x)))
        x = x.flatten(2).transpose(1, 2)[:, : x.shape[-1] // 2] * self.scale
        a, b, c = self.fused(x).chunk(3, dim=-1)
        return {"sum": torch.cat([a, b, Squared.apply(c)], dim=-1), "pair": (a, b)}


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x


def test_both_tracers_give_the_same_graph():
    model, x = Kinds(), torch.rand(2, 2, 4, 4)
    jit, export = (trace(model, x, tracer) for tracer in TRACERS)
    kinds = [
        "convolution",
        "batch_norm",
        "relu",
        "flatten",
        "transpose",
        "slice",
        "mul",
        "linear",
        "chunk",
        "mul",
        "cat",
    ]
    for graph in (jit, export):
        nodes = [
            node for node in graph.nodes if not (node.kind == "slice" and node.output.shape == node.inputs[0].shape)
        ]
        assert [node.kind for node in nodes] == kinds
        assert list(graph.outputs.values()) == ["sum", "pair.0", "pair.1"]
        assert set(graph.parameters) >= {"conv.weight", "norm.running_mean", "scale"}
        (chunk,) = [node for node in nodes if node.kind == "chunk"]
        assert [value.shape for value in chunk.outputs] == [(2, 2, 4)] * 3
        assert graph.consumers(chunk.outputs[2])[0].kind == "mul"
        (cat,) = [node for node in nodes if node.kind == "cat"]
        assert len(list(cat.operands())) == 3
        assert [node.argument(4) for node in nodes if node.kind == "convolution"] == [[1, 1]]


@both
def test_what_the_models_code_sets_while_it_is_traced_is_set_back(tracer):
    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.size = nn.Linear(3, 3), 7

        def forward(self, x):
            self.size = x.shape[0]
            self.seen = x
            return self.linear(x)

    model = Noting()
    trace(model, torch.rand(2, 3), tracer)
    assert model.size == 7
    assert not hasattr(model, "seen")


@both
def test_caches_are_off_while_a_model_is_traced(tracer):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    graph = trace(model, {"input_ids": torch.arange(6).view(1, 6)}, tracer)
    assert list(graph.outputs.values()) == ["logits"]
    assert model.config.use_cache is True


def test_a_branch_on_the_data_is_named_with_what_to_do():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3))
            self.inner[0].register_forward_hook(lambda module, given, made: made if made.sum() > 0 else -made)

        def forward(self, x):
            return self.inner(x)

    message = r"by export in module 'inner.*' at `.*made\.sum\(\) > 0.*It runs untraced: try tracer=jit"
    with pytest.raises(TraceError, match=message):
        trace(Branching(), torch.rand(2, 3), "export")
    assert trace(Branching(), torch.rand(2, 3), "jit").nodes


def test_only_the_tracers_know_torch_jit_and_torch_export():
    root = Path(tritprune.__file__).parent
    users = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"^[^#\"]*torch\.(jit|export)\b(?!`)", path.read_text(encoding="utf-8"), re.MULTILINE)
        and re.search(r"(import|from) torch\.(jit|export)|[^`]torch\.(jit|export)\.", path.read_text(encoding="utf-8"))
    ]
    tracers = ["slimming/export_tracer.py", "slimming/jit_tracer.py"]
    assert sorted(users) == ["export/artifacts.py", *tracers]  # the first writes files of torch.export
