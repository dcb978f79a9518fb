"""The examples of docs/own_loop run as they say, and give the bits of a plain loop."""

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional as F

from tritprune import Pruner

EXAMPLES = Path(__file__).parents[2] / "docs" / "own_loop"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
STEPS = 20


class Watch(list):
    """``(step, zeros)`` after every optimizer step, also one that was skipped; ends the loop after ``stop`` steps."""

    def __init__(self, stop=None):
        self.stop = stop

    def __call__(self, pruner):
        self.append((pruner.step, pruner.sparsity().prunable.zeros))
        if pruner.step == self.stop:
            raise KeyboardInterrupt


def plain_loop(shown, accumulate=1, scale=None):
    """A loop without any of it: batches in order, the pruner on the optimizer; loss scaling written out."""
    model = shown.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pruner = Pruner(model, pattern="4x1", target_sparsity=0.8, start_step=1, end_step=14).attach(optimizer)
    watch = Watch()
    batches = enumerate(shown.make_batches(), 1)
    while pruner.step < STEPS:
        i, (images, labels) = next(batches)
        with torch.autocast("cpu", torch.float16, enabled=scale is not None):
            loss = F.cross_entropy(model(images), labels) / accumulate
        (loss * (scale or 1.0)).backward()
        if i % accumulate:
            continue
        gradients = [parameter.grad for parameter in model.parameters()]
        if all(gradient.isfinite().all() for gradient in gradients):
            for gradient in gradients:
                gradient.mul_(1 / (scale or 1.0))
            optimizer.step()
        else:
            scale /= 2
        optimizer.zero_grad()
        watch(pruner)
    return model, pruner, watch


def test_mixed_precision_and_accumulation(example, outcome):
    shown, watch = example("plain_pytorch"), Watch()
    model, pruner, skipped = shown.train(STEPS, watch)
    assert 0 < skipped == [step for step, _ in watch].count(0)
    expected, plain_pruner, seen = plain_loop(shown, shown.ACCUMULATE, scale=2.0**24)
    assert watch == seen
    assert watch[-1] == (STEPS, int(0.8 * 16384 / 4) * 4)
    assert outcome(model, pruner) == outcome(expected, plain_pruner)


def test_accelerate(example, outcome, tmp_path):
    shown, watch = example("accelerate_loop"), Watch()
    model, pruner = shown.train(STEPS, tmp_path / "whole", watch)
    expected, plain_pruner, seen = plain_loop(shown, shown.ACCUMULATE)
    assert watch == seen
    assert outcome(model, pruner) == outcome(expected, plain_pruner)


def test_accelerate_resumes(example, outcome, tmp_path, monkeypatch):
    shown = example("accelerate_loop")
    model, pruner = shown.train(60, tmp_path / "whole")
    expected = outcome(model, pruner)
    with pytest.raises(KeyboardInterrupt):
        shown.train(60, tmp_path / "killed", Watch(stop=31))
    watch = Watch()
    model, pruner = shown.train(60, tmp_path / "killed", watch)
    assert watch[0][0] == 21
    assert outcome(model, pruner) == expected


def test_compiled(example, outcome):
    shown, watch = example("compiled_model"), Watch()
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        model, pruner = shown.train(STEPS, watch)
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    expected, plain_pruner, seen = plain_loop(shown)
    assert [layer.name for layer in pruner.layers] == ["0", "2"]
    assert watch == seen
    assert outcome(model._orig_mod, pruner) == outcome(expected, plain_pruner)


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec", "ignore:The 'train_dataloader' does not have many")
@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs_as_its_first_line_says(name, tmp_path, monkeypatch, capsys):
    path = EXAMPLES / f"{name}.py"
    assert ast.get_docstring(ast.parse(path.read_text())).splitlines()[0] == f"python docs/own_loop/{name}.py"
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    runpy.run_path(str(path), run_name="__main__")
    sparsity = re.search(r"sparsity (0\.\d+), masks [0-9a-f]{12}", capsys.readouterr().out)
    assert sparsity is not None
    assert float(sparsity[1]) == pytest.approx(0.8, abs=1e-3)


def test_there_are_five():
    assert len(NAMES) == 5
