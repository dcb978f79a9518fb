"""A finished run is held against what it recorded: every kind of damage is found, and named."""

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritprune.errors import CheckpointError
from tritprune.export import export_program
from tritprune.pruners import MaskSet
from tritprune.training.verification import verify_run

sys.path.insert(0, str(Path(__file__).parent))
from runs import make_driver, make_run, settings
from toy import ToyTask


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = make_run(folder / "run", ToyTask(), settings())
    driver = make_driver(run, folder / "cache", tracer="jit", pattern="channelx1")
    driver.plan = replace(driver.plan, save_as=("torch_export",))
    driver.execute()
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def verdicts(folder):
    found = verify_run(folder)
    return {finding.what.partition(":")[0]: finding for finding in found}, [f for f in found if not f.holds]


def sign(folder, *names):
    """What a forger would do: write the new hashes into a manifest or into the certificate."""
    path = next(folder / name for name in ("manifest.json", "certificate.json") if (folder / name).exists())
    record = json.loads(path.read_text())
    record["files"] |= {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    path.write_text(json.dumps(record))


def change(path, name, edit):
    tensors = load_file(path)
    edit(tensors[name])
    save_file(tensors, path)


def test_a_run_as_it_was_left_holds(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found, broken = verdicts(run)
    assert broken == []
    zeros = sum(layer["zeros"] for layer in json.loads((run / "pruning.json").read_text())["layers"])
    assert found["masks"].detail == f"{zeros} weights in 2 layers are pruned and zero"
    assert zeros > 100
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_weight_that_came_back_is_named(run):
    masks = MaskSet.load(run / "masks.safetensors")
    dead = (~masks.element_mask("second")).nonzero()[0]
    change(
        run / "pruned" / "model.safetensors", "second.weight", lambda w: w.index_put_(tuple(dead), torch.tensor(1.0))
    )
    _, broken = verdicts(run)
    assert broken[0].what.startswith("pruned/")
    assert "model.safetensors is damaged: its SHA-256" in broken[0].detail
    sign(run / "pruned", "model.safetensors")
    _, broken = verdicts(run)
    assert broken[0].detail.startswith("pruned/manifest.json was changed")
    sign(run, "pruned/manifest.json")
    _, broken = verdicts(run)
    assert broken[0].detail == "pruned/ has other weights than those that certificate.json certifies"
    assert broken[1].detail == "'second' has 1 weights in pruned/ where its mask prunes"


def test_a_slim_model_that_differs_is_named_by_its_first_module(run):
    change(run / "slim" / "model.safetensors", "first.weight", lambda w: w.add_(0.01))
    sign(run / "slim", "model.safetensors")
    sign(run, "slim/manifest.json")
    _, broken = verdicts(run)
    assert [finding.what for finding in broken] == [
        "weights and counts: as certified",
        "slim/: the outputs of the certificate",
        "slim/ against pruned/, module by module",
    ]
    assert "they differ first in module 'first'" in broken[2].detail or "module 'second'" in broken[2].detail


def test_other_masks_are_found(run):
    masks = MaskSet.load(run / "masks.safetensors")
    masks["second"].mask[0, 0] ^= True
    masks.save(run / "masks.safetensors")
    _, broken = verdicts(run)
    assert broken[0].detail.startswith("masks.safetensors was changed: its SHA-256 is ")
    assert broken[1].detail == "masks.safetensors holds other masks than those that pruning.json recorded"


def test_a_certificate_with_other_tensors_is_found(run):
    path = run / "certificate.safetensors"
    change(path, "0/out/output", lambda t: t.add_(1))
    record = json.loads((run / "certificate.json").read_text())
    record["tensors_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (run / "certificate.json").write_text(json.dumps(record))
    _, broken = verdicts(run)
    assert "damaged: its tensors are not those of outputs_sha256" in broken[0].detail


@pytest.mark.parametrize(
    ("gone", "first"),
    [
        ("masks.safetensors", "masks.safetensors is missing"),
        ("pruned/manifest.json", "pruned/manifest.json is missing"),
        ("slim/model.safetensors", "model.safetensors is missing"),
        ("certificate.json", "certificate.json cannot be read"),
    ],
)
def test_what_is_missing_is_named(gone, first, run):
    (run / gone).unlink()
    _, broken = verdicts(run)
    assert first in broken[0].detail


def test_a_program_made_of_the_slim_model_is_held_against_its_hash_and_the_certificate(run):
    program = run / "slim.pt2"
    found, _ = verdicts(run)
    assert found["slim.pt2"].detail.startswith("3 inputs, largest difference ")
    damaged = bytearray(program.read_bytes())
    damaged[-1] ^= 1
    program.write_bytes(damaged)
    _, broken = verdicts(run)
    assert broken[0].detail.startswith("slim.pt2 was changed: its SHA-256 is")
    other = ToyTask().build_model(0)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    export_program(other.eval(), ToyTask().model_inputs(ToyTask().example_inputs(2)), program)
    record = json.loads((run / "exports.json").read_text())
    record["files"][0]["sha256"] = hashlib.sha256(program.read_bytes()).hexdigest()
    (run / "exports.json").write_text(json.dumps(record))
    _, broken = verdicts(run)
    assert "slim.pt2's outputs are not the saved model's: 'output' differs by" in broken[0].detail
    del record["files"][0]["sha256"]
    (run / "exports.json").write_text(json.dumps(record))
    assert "records no hash of slim.pt2: the run is of an older version" in verdicts(run)[1][0].detail
    (run / "exports.json").write_text('{"files": 3}')
    assert verdicts(run)[1][0].detail == "exports.json knows nothing of slim.pt2"
    (run / "exports.json").write_text("[]")
    assert "exports.json is damaged" in verdicts(run)[1][0].detail
    (run / "exports.json").unlink()
    assert verdicts(run)[1][0].detail == "exports.json knows nothing of slim.pt2"
    shutil.copy(run / "masks.safetensors", run / "slim.onnx")
    program.unlink()
    assert [finding.what.partition(":")[0] for finding in verdicts(run)[1]] == ["slim.onnx", "slim.pt2"]


def test_other_counts_are_found(run):
    record = json.loads((run / "certificate.json").read_text())
    record["parameters"]["slim"] = 1
    (run / "certificate.json").write_text(json.dumps(record))
    _, broken = verdicts(run)
    assert [finding.what for finding in broken] == ["weights and counts: as certified"]
    assert broken[0].detail.endswith("parameters, certificate.json says 1")


def test_what_is_no_finished_run_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="no run is there"):
        verify_run(tmp_path / "nowhere")
    (run / "pruning.json").unlink()
    with pytest.raises(CheckpointError, match="the run has no pruned model yet"):
        verify_run(run)


def test_a_slim_model_that_was_removed_is_missing(run):
    for name in ("slimming.json", "certificate.json", "certificate.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "slim")
    _, broken = verdicts(run)
    assert [finding.what for finding in broken] == ["slim model"]
    assert "they were removed, or the run did not get that far" in broken[0].detail


def test_a_run_without_slimming_holds(tmp_path):
    run = make_run(tmp_path / "run", ToyTask(), settings())
    make_driver(run, tmp_path / "cache", tracer=None, pattern="channelx1").execute()
    found, broken = verdicts(tmp_path / "run")
    assert broken == []
    assert found["slim model"].detail == "this run has none (slimmer=none)"
