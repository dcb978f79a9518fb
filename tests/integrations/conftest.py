"""The examples of docs/own_loop, and what a run is compared by."""

import functools
import hashlib
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "own_loop"


@pytest.fixture(scope="session")
def example():
    """``example("name")``: what the file of that name defines, without running its last lines."""
    return functools.cache(lambda name: SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py"))))


@pytest.fixture(scope="session")
def outcome():
    """Everything that must be equal: bits of all weights, masks, steps done."""

    def of(model, pruner):
        weights = {name: hashlib.sha256(value.numpy()).hexdigest() for name, value in model.state_dict().items()}
        return {"weights": weights, "masks": pruner.digest(), "step": pruner.step}

    return of


class Curve(list):
    """``(step, sparsity)`` of every mask update of the pruners that it follows."""

    def follow(self, pruner):
        pruner.on_update(lambda event: self.append((event.step, event.sparsity)))
        return pruner


@pytest.fixture
def curve():
    return Curve
