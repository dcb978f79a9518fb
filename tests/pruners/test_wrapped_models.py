"""A model that is compiled, parallel, copied or saved is pruned as the plain one, by the plain one's names."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from tritprune.pruners import MaskSet, Pruner

SETTINGS = {"target_sparsity": 0.7, "start_step": 1, "end_step": 6, "frequency": 2}


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def count_compilations():
    """Compiled graphs and reasons for graph breaks since the start of the test."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: (counters["stats"]["unique_graphs"], dict(counters["graph_break"]))
    torch._dynamo.reset()


def compiled(net):
    return torch.compile(net, backend="aot_eager")


def compiled_parts(net):
    net.first, net.second = (torch.compile(part, backend="eager") for part in (net.first, net.second))
    return net


WRAPPERS = {"compiled": compiled, "compiled_parts": compiled_parts, "data_parallel": nn.DataParallel}


def pruned(net, train, sgd, *, given=None, trained=None):
    """Train and prune; the pruner is made from ``given``, the forward pass is that of ``trained``."""
    optimizer = sgd(net)
    pruner = Pruner(net if given is None else given, **SETTINGS).attach(optimizer)
    train(net if trained is None else trained, optimizer, 8)
    return pruner


def weights(net):
    """Parameters in registration order, whatever they are called."""
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, while compiling
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("give", ["plain", "wrapped"])
def test_the_same_masks_and_weights(make_net, train, sgd, wrap, give):
    plain = make_net()
    expected = pruned(plain, train, sgd)
    net = make_net()
    wrapped = WRAPPERS[wrap](net)
    pruner = pruned(net, train, sgd, given=wrapped if give == "wrapped" else net, trained=wrapped)
    assert [layer.name for layer in pruner.layers] == ["first", "second"]
    assert [(e.name, e.reason) for e in pruner.excluded] == [("classifier", "classifier head")]
    assert pruner.digest() == expected.digest()
    assert pruner.sparsity() == expected.sparsity()
    assert pruner.verify(wrapped).zeros == pruner.verify(plain).zeros
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(net), strict=True))


@pytest.mark.parametrize("give", ["plain", "wrapped"])
def test_distributed_data_parallel(make_net, train, sgd, one_process, give):
    expected = pruned(make_net(), train, sgd)
    net = make_net()
    wrapped = DistributedDataParallel(net)
    pruner = pruned(net, train, sgd, given=wrapped if give == "wrapped" else net, trained=wrapped)
    assert [layer.name for layer in pruner.layers] == ["first", "second"]
    assert pruner.digest() == expected.digest()
    buffer = io.BytesIO()
    torch.save(wrapped, buffer)
    buffer.seek(0)
    assert pruner.verify(torch.load(buffer, weights_only=False)).layers == 2


def test_masks_and_states_fit_on_either_side(make_net, train, sgd):
    net = make_net()
    pruner = pruned(net, train, sgd, given=nn.DataParallel(net))
    other = make_net(seed=1)
    MaskSet(pruner.masks).apply_(torch.compile(other, backend="eager"))
    pruner.verify(other)
    fresh = Pruner(torch.compile(make_net(seed=2), backend="eager"), **SETTINGS)
    fresh.load_state_dict(pruner.state_dict())
    assert fresh.digest() == pruner.digest()


def test_heads_are_found_through_compiled_layers():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=11, **sizes))
    names = [layer.name for layer in Pruner(model, pattern="heads", target_sparsity=0.5, end_step=2).layers]
    for i, layer in enumerate(model.encoder.layer):
        model.encoder.layer[i] = torch.compile(layer, backend="eager")
    whole = torch.compile(model, backend="eager")
    assert [layer.name for layer in Pruner(whole, pattern="heads", target_sparsity=0.5, end_step=2).layers] == names
    assert names


def test_masks_never_recompile_nor_break_the_graph(make_net, sgd, train, count_compilations):
    net = make_net()
    model = compiled(net)
    optimizer = sgd(net)
    pruner = Pruner(model, **SETTINGS, guard="on").attach(optimizer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        train(model, optimizer, 8)
    assert count_compilations() == (1, {})
    assert pruner.last_event.step == 6


def test_the_count_can_fail(make_net, count_compilations):
    model = compiled(make_net())
    for size in (2, 3):
        model(torch.ones(size, 13))
    assert count_compilations()[0] == 2
    torch.compile(lambda x: torch._dynamo.graph_break() or x + 1, backend="eager")(torch.ones(1))
    assert count_compilations()[1]


@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, compiled], ids=["plain", "parallel", "compiled"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_an_attached_model_is_copied_with_its_zeros_and_free_to_be_pruned(make_net, sgd, train, wrap, way):
    net = make_net()
    model = wrap(net)
    optimizer = sgd(net)
    pruner = Pruner(model, **SETTINGS).attach(optimizer)
    train(model, optimizer, 7)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert pruner.verify(other).layers == 2
    second = Pruner(other, **SETTINGS).attach(sgd(other))  # not taken by the first
    train(other, second._optimizer, 2)
    train(model, optimizer, 1, first=7)
    assert (pruner.step, second.step) == (8, 2)
