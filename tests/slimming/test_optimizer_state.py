"""The slim model's training goes on as the masked model's would have."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tritprune
from tritprune.errors import ConfigError
from tritprune.slimming import slim_model, slim_optimizer


def lock(model):
    """Apply the masks that are there: what is zero stays zero."""
    zero = {name: p == 0 for name, p in model.named_parameters() if p.ndim == 2 and "embeddings" not in name}

    @torch.no_grad()
    def apply():
        for name, where in zero.items():
            model.get_parameter(name)[where] = 0

    return apply


def groups_of(model):
    return [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(groups_of(m), lr=1e-2, amsgrad=True),
    "fused": lambda m: torch.optim.AdamW(groups_of(m), lr=1e-2, fused=True),
    "adam": lambda m: torch.optim.Adam(m.named_parameters(), lr=1e-2),
    "sgd": lambda m: torch.optim.SGD(groups_of(m), lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda m: torch.optim.RMSprop(groups_of(m), lr=1e-3, momentum=0.5, centered=True),
}


class Training:
    """A model, its optimizer, a schedule and the masks; steps on fixed batches."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.apply = model, optimizer, lock(model)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    def go(self, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            tokens = torch.randint(0, 50, (4, 8), generator=generator)
            labels = torch.randint(0, 3, (4,), generator=generator)
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(input_ids=tokens).logits, labels).backward()
            self.optimizer.step()
            self.schedule.step()
            self.apply()
        return self


@pytest.fixture
def masked(make_bert, kill):
    """Units and heads that nothing reads, as channelx1 and heads masks leave them; in float64."""
    model = make_bert().double()
    first, second = model.bert.encoder.layer
    kill(first.output.dense, columns=slice(0, 9))
    kill(second.output.dense, columns=slice(5, 30))
    for linear in (second.attention.self.query, second.attention.self.key, second.attention.self.value):
        kill(linear, rows=slice(6, 12))
    kill(second.attention.output.dense, columns=slice(6, 12))
    with torch.no_grad():
        first.intermediate.dense.weight[20:24, :5] = 0  # other zeros stay masked, in both models
    return model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_uninterrupted(name, masked, tokens):
    training = Training(masked, OPTIMIZERS[name](masked)).go(range(4))
    kept = copy.deepcopy(training)  # the masked model that just goes on
    kept.apply = lock(kept.model)
    result = slim_model(masked, tokens)
    assert {cut.kind for cut in result.cuts} == {"feed-forward units", "heads"}
    rates = [group["lr"] for group in training.optimizer.param_groups]
    carried = slim_optimizer(training.optimizer, masked, result)
    assert (carried.dropped, dict(carried.created), carried.approximate) == ((), {}, ())
    assert [group["lr"] for group in training.optimizer.param_groups] == rates
    assert set(carried.moved) == {n for n, _ in result.model.named_parameters()}
    training.model, training.apply = result.model, lock(result.model)
    training.go(range(4, 9))
    kept.go(range(4, 9))
    expected, made = kept.model(**tokens).logits, result.model(**tokens).logits
    before = masked(**tokens).logits
    assert (expected - before).abs().max() > 1e-2  # the further steps did something
    for name, parameter in result.model.named_parameters():
        reference = kept.model.get_parameter(name).detach()
        for dimension, indices in result.selections.get(name, {}).items():
            reference = reference.index_select(dimension, indices)
        torch.testing.assert_close(parameter.detach(), reference, rtol=0, atol=1e-9, msg=name)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-9)


def test_without_the_state_training_does_not_go_on_alike(masked, tokens):
    training = Training(masked, OPTIMIZERS["adamw"](masked)).go(range(4))
    kept = copy.deepcopy(training)
    kept.apply = lock(kept.model)
    result = slim_model(masked, tokens)
    fresh = Training(result.model, OPTIMIZERS["adamw"](result.model)).go(range(4, 9))
    kept.go(range(4, 9))
    assert (kept.model(**tokens).logits - fresh.model(**tokens).logits).abs().max() > 1e-3


def test_dyadic_numbers_go_on_to_the_last_bit():
    """Sums that do not round have no order: the same bits in float64."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape, generator=generator) / 4)
        model[2].weight[:, [1, 5, 6]] = 0
    data = torch.randint(-2, 3, (6, 8, 4), generator=generator).double()

    def go(trained, optimizer, batches):
        apply = lock(trained)
        for batch in batches:
            optimizer.zero_grad()
            (trained(batch) * torch.tensor([1.0, -1.0])).sum().backward()
            optimizer.step()
            apply()

    optimizer = torch.optim.SGD(model.parameters(), lr=2**-6, momentum=0.5)
    go(model, optimizer, data[:3])
    kept, kept_optimizer = copy.deepcopy((model, optimizer))
    result = slim_model(model, data[0])
    assert result.model[0].out_features == 5
    slim_optimizer(optimizer, model, result)
    go(result.model, optimizer, data[3:])
    go(kept, kept_optimizer, data[3:])
    assert torch.equal(result.model(data[0]), kept(data[0]))
    assert torch.equal(result.model[2].weight, kept[2].weight[:, [0, 2, 3, 4, 7]])


def test_folded_biases_are_named_and_a_new_one_joins_the_other_biases(kill):
    model = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 4, bias=False), nn.Linear(4, 2))
    kill(model[0], rows=[0, 2])
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    kill(model[0], rows=[0, 2])
    result = slim_model(model, torch.rand(2, 3))
    carried = tritprune.slim_optimizer(optimizer, model, result)
    assert dict(carried.created) == {"2.bias": 1}
    assert carried.approximate == ("2.bias",)
    result.model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state[result.model[2].bias]["step"] == 1
    assert optimizer.state[result.model[0].weight]["step"] == 2


def test_names_of_parameters_stay_with_them(masked, tokens):
    optimizer = torch.optim.SGD(masked.named_parameters(), lr=0.1)
    result = slim_model(masked, tokens)
    slim_optimizer(optimizer, masked, result)
    (group,) = optimizer.param_groups
    slim = dict(result.model.named_parameters())
    assert all(slim[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))


@pytest.mark.parametrize("foreign", [False, True])
def test_what_cannot_be_cut_is_refused_and_nothing_changes(foreign, masked, tokens):
    optimizer = torch.optim.Adafactor(masked.parameters(), lr=1e-2)
    if foreign:
        optimizer = torch.optim.SGD([*masked.parameters(), nn.Parameter(torch.ones(3, 2))], lr=0.1)
    masked(**tokens).logits.sum().backward()
    optimizer.step()
    before = copy.copy(optimizer.state), [list(group["params"]) for group in optimizer.param_groups]
    result = slim_model(masked, tokens)
    words = r"group 0 \(3x2\) is none of the Bert" if foreign else r"'row_var' of bert\S+ has shape \[\d+, 1\]"
    with pytest.raises(ConfigError, match=words):
        slim_optimizer(optimizer, masked, result)
    after = optimizer.state, [list(group["params"]) for group in optimizer.param_groups]
    assert before[0].keys() == after[0].keys()
    assert all(a is b for one, two in zip(before[1], after[1], strict=True) for a, b in zip(one, two, strict=True))
