import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tritprune.slimming import Linear2LinearSearcher, RecipeSearcher, SelfMHASearcher, slim_model

SOURCE = Path(__file__).with_name("architectures.py")
spec = importlib.util.spec_from_file_location("architectures", SOURCE)
architectures = importlib.util.module_from_spec(spec)
sys.modules["architectures"] = architectures
spec.loader.exec_module(architectures)
NAMES = architectures.NAMES


@cache
def row(name):
    return architectures.row(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_dead_is_cut_exactly_or_refused_by_name(name):
    pytest.importorskip("transformers")
    _, _, cut, refused, _, parameters, tracers, difference = row(name)
    before, after = (int(number.replace(",", "")) for number in parameters.split(" → "))
    assert after < before
    assert cut != "nothing"
    assert tracers == "the same"
    assert float(difference) < 1e-4
    if "heads" not in cut and name in architectures.TRANSFORMERS and name != "ConvNeXt":
        assert "heads" in refused


@pytest.mark.parametrize("name", [name for name in architectures.TRANSFORMERS if "Llama," not in name])
def test_the_recipe_of_each_names_the_same_linears_as_the_graph(name):
    pytest.importorskip("transformers")
    model, inputs = architectures.build(name)
    names = {id(module): path for path, module in model.named_modules()}
    by_recipe = [[names[id(module)] for module in found] for found in RecipeSearcher(model).search()]
    searched = SelfMHASearcher(model, example_inputs=inputs).search()
    chains = Linear2LinearSearcher(model, example_inputs=inputs).search()
    by_graph = [item["qkv"] + item["ffn"] for item in searched]
    by_graph += [[*item["target_frontier_linears"], item["root_linear"]] for item in chains]
    assert by_recipe
    assert {tuple(sorted(found)) for found in by_recipe} <= {tuple(sorted(found)) for found in by_graph}


def test_the_page_is_what_the_slimmer_does():
    pytest.importorskip("transformers")
    first, _, second = architectures.PAGE.read_text(encoding="utf-8").partition(architectures.MORE_HEAD)
    made = architectures.HEAD + "".join(f"| {' | '.join(row(name))} |\n" for name in NAMES)
    assert [line.rpartition(" | ")[0] for line in first.splitlines()] == [
        line.rpartition(" | ")[0] for line in made.splitlines()
    ], "docs/architectures.md is stale: run scripts/architectures"
    lines = [line.split(" | ") for line in second.splitlines()]
    assert {line[-2] for line in lines} == {"the same"}
    assert max(float(line[-1].removesuffix(" |")) for line in lines) < 1e-3


@pytest.mark.parametrize("name", ["BERT", "GPT-2", "ViT", "ResNet-18-like", "MobileNet-like", "MLP-Mixer"])
def test_in_float64_the_outputs_agree_to_its_last_digits(name):
    pytest.importorskip("transformers")
    model, inputs = architectures.build(name)
    architectures.damage(model, inputs)
    model = model.double()
    if isinstance(inputs, dict):
        inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    else:
        inputs = inputs.double()
    result = slim_model(model, inputs)
    assert result.parameters_after < result.parameters_before
    assert result.certificate.max_abs_difference < 1e-12
    assert result.certificate.tolerance == 1e-9
    assert torch.float64 in {parameter.dtype for parameter in result.model.parameters()}
