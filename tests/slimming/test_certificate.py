import copy
import json

import pytest
import torch
from torch import nn

from tritprune.errors import CertificateError, CheckpointError
from tritprune.slimming import certify, check_saved, slim_model, slimmer
from tritprune.slimming.check_inputs import derive_inputs
from tritprune.slimming.comparison import difference, largest_difference, sha256
from tritprune.slimming.model_inputs import ModelInputs, tensors_of
from tritprune.slimming.weights import Weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.no_grad():
        made[0].weight[:2] = 0
        made[0].bias[:2] = 1.0
    return made


@pytest.fixture
def unfolded(monkeypatch):
    """Constants of dead units get lost."""
    monkeypatch.setattr(Weights, "fold", lambda *arguments: None)


@pytest.fixture
def untried(monkeypatch):
    """The trial after the cut says yes to everything, so that the certificate has the last word."""
    monkeypatch.setattr(slimmer._Slimmer, "_trial", lambda *arguments: None)


@pytest.mark.usefixtures("unfolded", "untried")
def test_lost_constant_is_caught_and_the_model_untouched(model):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CertificateError, match=r"differ first in module '2', by .*e-01 where 2\.00e-05 is allowed"):
        slim_model(model, torch.randn(4, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [model[0].out_features, model[2].in_features] == [6, 6]


@pytest.mark.usefixtures("untried")
def test_wrong_units_are_caught(model, monkeypatch):
    def first_ones(weights):
        made = selections_of(weights)
        return {name: {d: torch.arange(len(kept)) for d, kept in dims.items()} for name, dims in made.items()}

    selections_of = slimmer.selections_of
    monkeypatch.setattr(slimmer, "selections_of", first_ones)
    with pytest.raises(CertificateError, match="first in module '2'"):
        slim_model(model, torch.randn(4, 3))


@pytest.mark.usefixtures("unfolded", "untried")
def test_bert_sabotage_names_the_layer(make_bert, kill, tokens):
    model = make_bert()
    kill(model.bert.encoder.layer[1].intermediate.dense, rows=slice(0, 6))
    with pytest.raises(CertificateError, match=r"first in module 'bert\.encoder\.layer\.1\.output\.dense'"):
        slim_model(model, tokens)


@pytest.mark.usefixtures("unfolded")
def test_a_cut_that_fails_its_trial_is_taken_back_and_the_others_stay(make_bert, kill, tokens):
    model = make_bert()
    kill(model.bert.encoder.layer[0].attention.self.value, rows=slice(0, 6))
    kill(model.bert.encoder.layer[1].output.dense, columns=slice(0, 5))
    result = slim_model(model, tokens)
    assert [(cut.kind, cut.after) for cut in result.cuts] == [("feed-forward units", 35)]
    (refusal,) = [refusal for refusal in result.refused if refusal.kind == "heads"]
    assert "1 of 4 heads are dead but stay: without them the model's outputs differ by" in refusal.reason
    state = model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in result.model.state_dict().items() if n not in result.selections)


def test_model_that_does_not_run_is_caught(model):
    broken = copy.deepcopy(model)
    broken[2] = nn.Linear(4, 5)
    with pytest.raises(CertificateError, match=r"does not run on inputs 0 \(4, 3\): first in module '2'"):
        certify(model, broken, [ModelInputs.of(torch.randn(4, 3))])


def test_other_outputs_are_caught():
    class Pair(nn.Module):
        def __init__(self, second):
            super().__init__()
            self.second = second

        def forward(self, x):
            return {"first": x, "second": x + self.second}

    inputs = [ModelInputs.of(torch.ones(1, 2))]
    with pytest.raises(CertificateError, match=r"by 1\.00e-03"):
        certify(Pair(0.0), Pair(1e-3), inputs)
    assert certify(Pair(0.0), Pair(1e-6), inputs).holds
    with pytest.raises(CertificateError, match="gives NaN in second"):
        certify(Pair(float("nan")), Pair(float("nan")), inputs)


def test_comparison_can_fail():
    one = torch.ones(3)
    assert difference(one, one.clone()).within
    assert difference(one, one + 1e-6).within
    assert not difference(one, one + 1e-4).within
    assert difference(1000 * one, 1000 * one + 1e-2).within  # relative to the largest element
    assert not difference(one, one.double()).within
    assert not difference(one, torch.ones(4)).within
    assert not difference(one, torch.tensor([1.0, float("nan"), 1.0])).within
    assert not difference(torch.tensor([1]), torch.tensor([2])).within
    assert not difference(torch.tensor([True]), torch.tensor([False])).within
    masked = torch.tensor([float("-inf"), float("nan"), 2.0])
    assert difference(masked, masked.clone()).within
    assert difference(torch.empty(0), torch.empty(0)).within
    assert largest_difference({"a": one, "b": one}, {"a": one, "b": one + 1}).where == "b"
    assert not largest_difference({"a": one}, {"b": one}).within
    assert largest_difference({}, {}).within


def test_hash_sees_values_names_and_shapes():
    one = torch.ones(2, 3)
    assert sha256({"a": one}) == sha256({"a": one.clone()})
    others = [{"b": one}, {"a": one.view(3, 2)}, {"a": one.double()}, {"a": torch.full((2, 3), 1.0000001)}]
    assert len({sha256({"a": one}), *map(sha256, others)}) == 5


def test_outputs_of_any_form():
    tensor = torch.ones(1)

    class Thing:
        def __init__(self):
            self.keys = [tensor]
            self.itself = self

    found = tensors_of({"a": tensor, "b": (tensor, None, 3), "c": Thing(), "d": nn.Linear(1, 1)})
    assert list(found) == ["a", "b.0", "c.keys.0"]
    assert list(tensors_of(tensor)) == ["output"]


class Identity(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return input_ids * 1.0


def test_derived_inputs(tokens):
    forms = derive_inputs(Identity(), ModelInputs.of(tokens))
    shapes = [tuple(form.values["input_ids"].shape) for form in forms]
    assert shapes == [(2, 8), (1, 8), (7, 8), (2, 4)]
    seven = forms[2].values["input_ids"]
    assert len(seven.unique(dim=0)) == 7
    assert torch.equal(seven[2], tokens["input_ids"][0].roll(1))
    assert torch.equal(forms[2].values["attention_mask"][3], tokens["attention_mask"][1])


def test_derived_sequence_never_loses_its_mask(tokens):
    tokens["attention_mask"] = torch.tensor([[0] * 5 + [1] * 3, [0] * 4 + [1] * 4])
    forms = derive_inputs(Identity(), ModelInputs.of(tokens))
    assert torch.equal(forms[-1].values["input_ids"], tokens["input_ids"][:, 4:])
    tokens["attention_mask"][0] = torch.tensor([1] + [0] * 7)
    assert len(derive_inputs(Identity(), ModelInputs.of(tokens))) == 3


def test_derived_inputs_leave_out_what_the_model_cannot_run():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(2, 3)

    assert len(derive_inputs(Fixed(), ModelInputs.of(torch.rand(2, 3)))) == 1
    assert len(derive_inputs(nn.Identity(), ModelInputs.of(torch.tensor(1.0)))) == 1


def test_chosen_inputs_are_used(model):
    result = slim_model(model, torch.randn(4, 3), check_inputs=[torch.randn(5, 3), (torch.randn(6, 3),)])
    assert [check.inputs for check in result.certificate.checks] == [{"0": [5, 3]}, {"0": [6, 3]}]


def test_saved_certificate_recognises_its_model(make_bert, kill, tokens, tmp_path):
    model = make_bert()
    kill(model.bert.encoder.layer[0].intermediate.dense, rows=slice(0, 6))
    result = slim_model(model, {**tokens, "output_hidden_states": True})
    result.certificate.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["certificate.json", "certificate.safetensors"]
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert record["holds"] is True
    assert record["outputs_sha256"] == result.certificate.outputs_sha256
    assert set(record["checks"][0]["outputs"]) == {"logits", *(f"hidden_states.{i}" for i in range(3))}
    assert check_saved(result.model, tmp_path)
    assert check_saved(result.model.train(), tmp_path)
    assert result.model.training
    with torch.no_grad():
        result.model.classifier.bias[0] += 0.01
    assert not check_saved(result.model, tmp_path)
    assert not check_saved(nn.Linear(3, 3), tmp_path)


@pytest.mark.parametrize("name", ["certificate.json", "certificate.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_damaged_certificate(name, damage, model, tmp_path):
    slim_model(model, torch.randn(4, 3)).certificate.save(tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content.replace(b'"calls"', b'"cells"') if name.endswith("json") else content[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=name if damage == "missing" else "damaged"):
        check_saved(model, tmp_path)
