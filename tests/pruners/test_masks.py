"""Mask sets: element masks by hand, one bit a unit on disk, whole files only, digests."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tritprune.errors import CheckpointError, MaskMismatchError, RunFolderError
from tritprune.pruners import LayerMask, MaskSet
from tritprune.pruners.masks import pack, unpack


def layer_mask(rows, block=(2, 1), kind="linear", shape=(3, 2)):
    return LayerMask(torch.tensor(rows), block, kind, shape)


def sample():
    return MaskSet(
        {
            "z.first": layer_mask([[True, False], [False, True]]),
            "a.conv": layer_mask([[True, False]] * 2, (1, 4), "conv", (2, 4, 1, 2)),
        }
    )


def test_element_masks_by_hand():
    masks = sample()
    assert masks.element_mask("z.first").tolist() == [[True, False], [True, False], [False, True]]
    conv = masks.element_mask("a.conv")  # columns 0 to 3: kernel position 0; 4 to 7: position 1
    assert conv.shape == (2, 4, 1, 2)
    assert bool(conv[..., 0].all())
    assert not conv[..., 1].any()
    assert (masks["z.first"].zeros(), masks["a.conv"].zeros()) == (3, 8)


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    block=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    seed=st.integers(0, 1000),
)
def test_element_masks_of_ragged_blocks(shape, block, seed):
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    mask = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) > 0.5
    layer = LayerMask(mask, block, "linear", shape)
    elements = layer.element_mask()
    for r in range(shape[0]):
        for c in range(shape[1]):
            assert elements[r, c] == mask[r // block[0], c // block[1]]
    assert layer.zeros() == int((~elements).sum())


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_bits_there_and_back(values):
    mask = torch.tensor([values])
    bits = pack(mask)
    assert bits.numel() == -(-len(values) // 8)
    assert torch.equal(unpack(bits, (1, len(values))), mask)
    assert torch.equal(pack(mask.t()), bits)


def test_bits_that_do_not_fit():
    with pytest.raises(ValueError, match="2 bytes do not hold 3 bits"):
        unpack(torch.zeros(2, dtype=torch.uint8), (1, 3))


def same(one, other):
    return list(one) == list(other) and all(
        torch.equal(one[n].mask, other[n].mask) and one[n].describe() == other[n].describe() for n in one
    )


def test_save_and_load(tmp_path):
    masks = sample()
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    loaded = MaskSet.load(path)
    assert same(masks, loaded)
    assert loaded.digest() == masks.digest()
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]
    assert {name: tuple(bits.shape) for name, bits in load_file(path).items()} == {"z.first": (1,), "a.conv": (1,)}


def test_equal_masks_give_equal_files(tmp_path):
    for name in ("one", "two"):
        sample().save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    sample().save(path)
    before = path.read_bytes()

    def broken(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", broken)
    with pytest.raises(RunFolderError, match="No space left"):
        sample().save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_save_that_is_stopped_before_the_move_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "masks.safetensors"
    sample().save(path)
    before = path.read_bytes()

    def stopped(source, target):
        assert Path(source).parent == tmp_path  # a move within one folder is atomic
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        MaskSet({"a": layer_mask([[True]])}).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RunFolderError, match="nowhere"):
        sample().save(tmp_path / "nowhere" / "masks.safetensors")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "masks.safetensors"
    with pytest.raises(CheckpointError, match="no masks at"):
        MaskSet.load(path)
    sample().save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        MaskSet.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="does not hold masks"):
        MaskSet.load(path)
    described = {"format": "tritprune masks 1", "layers": {"a": layer_mask([[True]]).describe()}}
    save_file({"b": torch.zeros(1, dtype=torch.uint8)}, path, metadata={"tritprune": json.dumps(described)})
    with pytest.raises(CheckpointError, match="damaged"):
        MaskSet.load(path)


def test_digests_tell_masks_names_and_blocks_apart():
    first = layer_mask([[True, False], [False, True]])
    digests = {
        MaskSet({"a": first}).digest(),
        MaskSet({"b": first}).digest(),
        MaskSet({"a": layer_mask([[True, False], [True, True]])}).digest(),
        MaskSet({"a": layer_mask([[True, False], [False, True]], shape=(4, 2))}).digest(),
    }
    assert len(digests) == 4
    assert MaskSet({"a": first}).digest() in digests


def test_apply_to_a_model():
    model = nn.ModuleDict({"z": nn.ModuleDict({"first": nn.Linear(2, 3)}), "a": nn.ModuleDict()})
    model["a"]["conv"] = nn.Conv2d(4, 2, (1, 2))
    masks = sample()
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    masks.apply_(model)
    for name in masks:
        weight = model.get_submodule(name).weight
        assert torch.equal(weight != 0, masks.element_mask(name))
    assert addresses == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_masks_of_another_model_are_refused():
    with pytest.raises(MaskMismatchError, match=r"z\.first.*no such layer"):
        sample().apply_(nn.Linear(2, 3))
    model = nn.ModuleDict({"first": nn.Linear(2, 4)})
    with pytest.raises(MaskMismatchError, match=r"\[3, 2\].*\[4, 2\]"):
        MaskSet({"first": sample()["z.first"]}).apply_(model)
