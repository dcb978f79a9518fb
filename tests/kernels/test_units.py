import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritprune.kernels import UnitGrid


def test_a_block_that_divides_gives_equal_units():
    grid = UnitGrid.of_blocks((8, 6), (4, 2))
    assert (grid.shape, grid.units, grid.elements, grid.uniform_size) == ((2, 3), 6, 48, 8)
    assert grid.sizes().tolist() == [[8, 8, 8], [8, 8, 8]]


def test_ragged_edges_are_smaller_units():
    grid = UnitGrid.of_blocks((5, 7), (4, 3))
    assert grid.uniform_size is None
    assert grid.sizes().tolist() == [[12, 12, 4], [3, 3, 1]]


def test_a_block_larger_than_the_layer_is_one_smaller_unit():
    grid = UnitGrid.of_blocks((3, 2), (4, 4))
    assert (grid.shape, grid.uniform_size, grid.elements) == ((1, 1), 6, 6)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_layer_has_no_units(shape):
    grid = UnitGrid.of_blocks(shape, (4, 1))
    assert (grid.units, grid.elements, grid.sizes().numel(), grid.uniform_size) == (0, 0, 0, 4)


def test_a_block_without_elements_is_refused():
    with pytest.raises(ValueError, match="0x3"):
        UnitGrid.of_blocks((4, 4), (0, 3))


@given(shape=st.tuples(st.integers(0, 20), st.integers(0, 20)), block=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_sizes_agree_with_each_other(shape, block):
    grid = UnitGrid.of_blocks(shape, block)
    sizes = grid.sizes()
    assert sizes.shape == grid.shape
    assert int(sizes.sum()) == grid.elements == shape[0] * shape[1]
    assert torch.equal(grid.sizes_at(torch.arange(grid.units)), sizes.flatten())
    assert (len(set(sizes.flatten().tolist())) <= 1) == (grid.uniform_size is not None)
    if grid.units and grid.uniform_size is not None:
        assert grid.uniform_size == int(sizes[0, 0])
