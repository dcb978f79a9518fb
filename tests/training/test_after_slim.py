"""Training goes on after slimming: as the masked model's would have, through interruptions, and it can be verified."""

import hashlib
import io
import itertools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

import tritprune
from tritprune.errors import ConfigError, InterruptedRunError
from tritprune.export import export_program
from tritprune.pruners import MaskSet
from tritprune.registry import models
from tritprune.slimming import state_sha256
from tritprune.training.settings import Phase
from tritprune.training.verification import verify_run

sys.path.insert(0, str(Path(__file__).parent))
from runs import make_driver, make_run, settings
from toy import ToyTask

# Units that nothing reads, and single weights of what stays, which training must not bring back.
GROUPS = [
    {"name": "units", "include": ["second"], "pattern": "channelx1", "target_sparsity": 0.5},
    {"name": "weights", "include": ["first"], "pattern": "1x1", "target_sparsity": 0.25},
]
PHASE = {"lr": 0.0625, "lr_schedule": "linear", "warmup": 0.25, "optimizer": "sgd", "weight_decay": 0.01}


def driver(folder, *, steps=16, after=8, tracer="jit", stop=None, task=None, **changes):
    options = settings(prune=Phase(steps=steps, **PHASE), after_slim=after, eval_every=5, **changes)
    run = make_run(folder / "run", task or ToyTask(), options, stop=stop)
    return make_driver(run, folder / "cache", tracer=tracer, groups=GROUPS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder / "run", driver(folder).execute()


def weights(folder, name):
    return load_file(folder / name / "model.safetensors")


def test_the_final_model_is_the_slim_one_trained_further(finished):
    folder, result = finished
    assert [row["model"] for row in result["rows"]] == ["dense", "pruned", "slim", "tuned"]
    dense, pruned, slim, tuned = result["rows"]
    assert slim["metrics"]["accuracy"] == pruned["metrics"]["accuracy"]
    assert tuned["metrics"]["loss"] != slim["metrics"]["loss"]
    assert dense["parameters"] == pruned["parameters"] > slim["parameters"] == tuned["parameters"]
    assert slim["sparsity"]["prunable"] == tuned["sparsity"]["prunable"]
    assert slim["sparsity"]["prunable"]["zeros"] > 0
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["models_sha256"]["slim"] == state_sha256(tritprune.load(folder / "slim"))
    assert result["artifacts"]["tuned"] == "tuned"
    assert not list(folder.glob("*.pt"))


def test_the_curves_and_the_learning_rate_go_on(finished):
    lines = [json.loads(line) for line in (finished[0] / "curves.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["stage"]) for line in lines if "loss/train" in line and line["stage"] != "dense"]
    assert steps == [(6 + n, "prune" if n <= 12 else "recover" if n <= 16 else "tune") for n in range(1, 25)]
    rates = [line["lr"] for line in lines if line.get("lr") is not None and line["stage"] != "dense"]
    assert rates == pytest.approx([Phase(steps=24, **PHASE).lr_factor(n) * PHASE["lr"] for n in range(24)])
    assert [line["step"] for line in lines if "accuracy/eval" in line and line["stage"] == "tune"] == [26, 30]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_is_the_masked_models_training_that_goes_on(tmp_path, optimizer):
    """Examples, rate, momentum and masks: a run of 24 steps that is slimmed after 16 or not at all."""
    for name, after in (("slimmed", 8), ("masked", 0)):
        options = settings(prune=Phase(steps=24 - after, **PHASE | {"optimizer": optimizer}), after_slim=after)
        run = make_run(tmp_path / name, ToyTask(), options)
        make_driver(run, tmp_path / "cache", tracer="jit", groups=GROUPS).execute()
    masked, tuned, slim = (weights(tmp_path / name, kind) for name, kind in
                           (("masked", "pruned"), ("slimmed", "tuned"), ("slimmed", "slim")))  # fmt: skip
    kept = MaskSet.load(tmp_path / "masked" / "masks.safetensors").element_mask("second").all(0)
    assert int(kept.sum()) == 8
    torch.testing.assert_close(tuned["second.weight"], masked["second.weight"][:, kept], rtol=0, atol=1e-6)
    torch.testing.assert_close(tuned["first.weight"], masked["first.weight"][kept], rtol=0, atol=1e-6)
    assert (tuned["first.weight"] - slim["first.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("stop_after", [18, 20, 24])  # at the end of recovery, after slimming, tuning
def test_a_stopped_run_ends_with_the_same_bits(finished, tmp_path, stop_after):
    shutil.copytree(finished[0].parent / "cache", tmp_path / "cache")
    calls = itertools.count(1)  # asked before each stage and after each step; the dense model is in the cache
    where = (
        "before the stage 'tune'" if stop_after == 20 else f"at step {stop_after - (2 if stop_after < 20 else 4)} of"
    )
    with pytest.raises(InterruptedRunError, match=where):
        driver(tmp_path, stop=lambda: "SIGTERM" if next(calls) == stop_after else None).execute()
    driver(tmp_path).execute()
    for name in ("slim", "tuned"):
        assert (tmp_path / "run" / name / "model.safetensors").read_bytes() == (
            finished[0] / name / "model.safetensors"
        ).read_bytes()
    lines = [[line for line in (folder / "curves.jsonl").read_text().splitlines() if '"dense"' not in line]
             for folder in (tmp_path / "run", finished[0])]  # fmt: skip
    shown = [[{k: v for k, v in json.loads(text).items() if "time/" not in k} for text in own] for own in lines]
    assert shown[0] == shown[1]
    assert all(finding.holds for finding in verify_run(tmp_path / "run"))


@models.register("toy_constant")
class Constant(nn.Module):
    """Units that are pruned as rows leave act(bias) behind: slimming makes a bias that was not there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4, bias=False)

    def forward(self, x):
        return self.second(torch.sigmoid(self.first(x)))


class ConstantTask(ToyTask):
    def build_model(self, seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Constant()

    def builder(self):
        return {"kind": "registered", "name": "toy_constant", "arguments": {}}


def test_a_bias_that_slimming_made_is_trained_and_told(tmp_path):
    options = settings(prune=Phase(steps=16, **PHASE), after_slim=8, latency_repeats=1)
    run = make_run(tmp_path / "run", ConstantTask(), options)
    run.progress.console = Console(file=io.StringIO(), width=200)
    make_driver(run, tmp_path / "cache", tracer="jit", pattern="1xchannel", include=["first"]).execute()
    slim, tuned = weights(tmp_path / "run", "slim"), weights(tmp_path / "run", "tuned")
    assert (slim["second.bias"] - tuned["second.bias"]).abs().max() > 1e-3
    assert "note: second.bias took up constants of cut units" in run.progress.console.file.getvalue()
    assert all(finding.holds for finding in verify_run(tmp_path / "run"))


def test_a_lost_checkpoint_costs_the_tuning_and_no_more(finished, tmp_path):
    """What the message about a damaged checkpoint advises: without it the stage begins anew."""
    shutil.copytree(finished[0].parent / "cache", tmp_path / "cache")
    calls = itertools.count(1)
    with pytest.raises(InterruptedRunError):
        driver(tmp_path, stop=lambda: "SIGTERM" if next(calls) == 24 else None).execute()
    (tmp_path / "run" / "checkpoint.pt").unlink()
    driver(tmp_path).execute()
    assert all(torch.equal(t, weights(finished[0], "tuned")[n]) for n, t in weights(tmp_path / "run", "tuned").items())


def test_a_tuned_model_is_verified_from_the_certificate_on(finished, tmp_path):
    found = {finding.what: finding for finding in verify_run(finished[0])}
    assert all(finding.holds for finding in found.values())
    zeros = MaskSet.load(finished[0] / "slim_masks.safetensors")["first"].zeros()
    assert zeros > 0
    assert found["tuned/: the certified slim model, trained further"].detail.endswith(
        f"{zeros} of them pruned and zero"
    )

    def broken(name, edit, **record):
        folder = shutil.copytree(finished[0], tmp_path / name)
        model = tritprune.load(folder / "tuned")
        with torch.no_grad():
            edit(model)
        save_file(model.state_dict(), folder / "tuned" / "model.safetensors")
        for signer, signed, more in (
            (folder / "tuned" / "manifest.json", "model.safetensors", {}),
            (folder / "tuning.json", "tuned/manifest.json", record),
        ):
            content = json.loads(signer.read_text()) | more
            content["files"][signed] = hashlib.sha256((signer.parent / signed).read_bytes()).hexdigest()
            signer.write_text(json.dumps(content))
        return [finding.detail for finding in verify_run(folder) if not finding.holds]

    def shift(model):
        model.first.weight.add_(1)

    def nothing(model):
        pass

    assert broken("same", nothing) == []
    assert broken("other", shift) == ["tuned/ has other weights than those that tuning.json recorded"]
    model = tritprune.load(finished[0] / "tuned")
    with torch.no_grad():
        shift(model)
    (said,) = broken("alive", shift, tuned_sha256=state_sha256(model))
    assert said == f"'first' has {zeros} weights in tuned/ where its mask prunes"
    (said,) = broken("stranger", nothing, slim_sha256="0" * 64)
    assert said == "tuning.json says that tuned/ came from another slim model than certificate.json certifies"


def test_a_program_is_held_against_the_tuned_model_not_against_the_certificate(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    inputs = ToyTask().model_inputs(ToyTask().example_inputs(2))

    def made_of(name):
        made = replace(export_program(tritprune.load(folder / name), inputs, folder / "tuned.pt2"), path="tuned.pt2")
        (folder / "exports.json").write_text(json.dumps({"files": [vars(made)]}))
        return next(finding for finding in verify_run(folder) if finding.what.startswith("tuned.pt2"))

    assert made_of("tuned").holds
    assert "tuned.pt2's outputs are not the saved model's" in made_of("slim").detail


def test_a_run_that_was_stopped_before_its_final_model_does_not_verify(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(folder / "tuned")
    (folder / "tuning.json").unlink()
    (finding,) = [finding for finding in verify_run(folder) if not finding.holds]
    assert finding.what == "tuned/: hashes, and the model loads"


def test_a_final_model_that_was_removed_with_its_records_is_missed(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(folder / "tuned")
    for name in ("tuning.json", "slim_masks.safetensors"):
        (folder / name).unlink()
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"exports": [{"path": "tuned.pt2"}]}))
    missed, file = [finding for finding in verify_run(folder) if not finding.holds]
    assert missed.what == "tuned/: hashes, and the model loads"
    assert file.detail == "tuned.pt2 is missing"


@pytest.mark.parametrize("value", [-1, 0.5, "two", True, None, "-1ep"])
def test_a_length_that_is_none_is_refused(value):
    with pytest.raises(
        ConfigError, match=r"training\.after_slim is a number of optimizer steps, or of epochs as in 2ep"
    ):
        settings(after_slim=value)


def test_epochs_become_steps():
    assert settings(after_slim="2ep").steps_after_slim(64) == 16
    assert settings(after_slim="0.5ep").prune_and_after(64).steps == 20
    assert settings().prune_and_after(64) == settings().prune
