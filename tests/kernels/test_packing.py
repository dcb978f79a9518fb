import numpy as np
import pytest
import torch

from tritprune.kernels import UnitGrid, apply_masks_, mask_statistics, masks_from_threshold, n_in_m_masks
from tritprune.kernels.packing import pack_mask, packed_length, unpack_mask
from tritprune.pruners.masks import pack


@pytest.mark.parametrize("units", [0, 1, 7, 8, 9, 640])
def test_bits_are_those_of_a_saved_mask_and_come_back(units):
    mask = torch.rand(units, generator=torch.Generator().manual_seed(units)) < 0.5
    bits = pack_mask(mask)
    assert bits.shape == (packed_length(units),)
    assert torch.equal(bits, pack(mask))
    assert bits.tolist() == np.packbits(mask.numpy()).tolist()
    assert torch.equal(unpack_mask(bits, (units,)), mask)


def test_bits_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"uint8 \[2\] does not hold 17 bits"):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), (17,))


def test_the_first_unit_is_the_highest_bit_and_spare_bits_are_zero():
    score = torch.tensor([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0]])
    grid = UnitGrid.of_blocks((2, 3), (1, 1))
    threshold, remainder = torch.tensor(3.0), torch.tensor(0)
    (bits,) = masks_from_threshold([score], [grid], threshold, remainder, packed=True)
    assert bits.tolist() == [0b00111100]
    weight = torch.ones(2, 3)
    apply_masks_([weight], [bits], [(1, 1)])
    assert weight.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert mask_statistics([bits], [torch.tensor([0b10110000], dtype=torch.uint8)]).tolist() == [[4, 3]]
    (bits,) = n_in_m_masks([torch.tensor([[1.0, 9.0, 8.0, 2.0]])], 2, 4, packed=True)
    assert bits.tolist() == [0b01100000]
