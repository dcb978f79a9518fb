import json
from types import SimpleNamespace

import pytest
import torch

from tritprune.errors import CheckpointError, RunFolderError
from tritprune.training.checkpoint import CHECKPOINT, RunFolder, find_resumable, fingerprint


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])  # the second is accelerate's name for it with several processes
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, device):
    folder = RunFolder(tmp_path / "run")
    folder.save_checkpoint({"phase": "prune", "step": 3, "model": {"w": torch.tensor([1.5, float("nan")])}})
    state = folder.load_checkpoint(device)
    assert state is not None
    assert state["step"] == 3
    assert torch.equal(state["model"]["w"].view(torch.int32), torch.tensor([1.5, float("nan")]).view(torch.int32))
    assert [p.name for p in folder.path.iterdir()] == [CHECKPOINT]


def test_no_checkpoint_is_none(tmp_path):
    assert RunFolder(tmp_path).load_checkpoint("cpu") is None


def test_a_checkpoint_cut_in_half_is_refused_with_its_size_and_what_to_do(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save_checkpoint({"w": torch.zeros(1000)})
    path = folder / CHECKPOINT
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"damaged \(.*bytes.*remove it"):
        folder.load_checkpoint("cpu")


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.save_checkpoint({"step": 1})

    def full_disk(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(RunFolderError, match=r"No space left.*resume=auto"):
        folder.save_checkpoint({"step": 2})
    monkeypatch.undo()
    state = folder.load_checkpoint("cpu")
    assert state == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunFolderError, match=r"cannot be written.*run_dir"):
        RunFolder(tmp_path / "file" / "run")


def test_a_disk_without_room_is_refused_with_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=5 * 2**20))
    with pytest.raises(RunFolderError, match=r"has 5 MiB free .* about 12 MiB"):
        RunFolder(tmp_path).check_room_for(torch.nn.Linear(512, 512, bias=False))


def test_the_newest_unfinished_run_of_the_same_config_is_found(tmp_path):
    for name, values in {
        "a": {"fingerprint": "x", "status": "running", "updated": "2026-01-01T00:00:00"},
        "b": {"fingerprint": "x", "status": "interrupted", "updated": "2026-01-02T00:00:00"},
        "c": {"fingerprint": "x", "status": "finished", "updated": "2026-01-03T00:00:00"},
        "d": {"fingerprint": "y", "status": "running", "updated": "2026-01-04T00:00:00"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(values))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "run.json").write_text("{half")
    assert find_resumable(tmp_path, "x") == tmp_path / "b"
    assert find_resumable(tmp_path, "z") is None


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        RunFolder(tmp_path).read_state()
