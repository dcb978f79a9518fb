"""The same names, whatever is wrapped around the model or a part of it."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tritprune.patterns import plain_modules, unwrapped


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Sequential()))


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, AveragedModel, lambda m: nn.DataParallel(compiled(m))])
def test_wrappers_are_looked_through(model, wrap):
    names = [name for name, _ in model.named_modules()]
    assert [name for name, _ in plain_modules(wrap(model))] == names
    model[1] = wrap(model[1])
    assert [name for name, _ in model.named_modules()] != names
    assert [name for name, _ in plain_modules(model)] == names


def test_the_module_inside_is_the_models_own(model):
    assert unwrapped(nn.DataParallel(compiled(model))) is model
    assert dict(plain_modules(compiled(model)))["1.0"] is model[1][0]


def test_module_is_a_name_like_any_other(model):
    model.module = nn.Linear(2, 2)
    assert "module" in dict(plain_modules(model))


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_shared_modules_as_in_torch(remove_duplicate):
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, None, nn.ReLU())})
    expected = list(model.named_modules(remove_duplicate=remove_duplicate))
    assert list(plain_modules(model, remove_duplicate=remove_duplicate)) == expected
