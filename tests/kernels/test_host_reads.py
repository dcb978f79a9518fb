"""Launchers read nothing back from a device: a step neither waits for it nor breaks a CUDA graph."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from counting import Reads, counted

from tritprune import selection
from tritprune.kernels import UnitGrid, cases
from tritprune.kernels import triton as launchers
from tritprune.kernels.triton import multi_tensor


def test_a_read_is_seen():
    with Reads() as reads:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        bool(torch.ones(()) > 0)
        torch.ones(3)[torch.tensor([True, False, True])]
        torch.arange(2).repeat_interleave(torch.tensor([1, 2]))
    assert reads.found == ["_local_scalar_dense", "nonzero", "_local_scalar_dense", "index", "repeat_interleave"]


def test_a_list_of_numbers_is_a_read(monkeypatch):
    with counted(monkeypatch) as (reads, _):
        torch.ones(2).tolist()
    assert reads.found == ["tolist"]


@pytest.mark.parametrize("op", sorted({case.op for case in cases.all_cases()}))
def test_launchers_read_nothing_back(op, monkeypatch):
    for case in cases.cases_of(op):
        arguments = case.arguments()
        with cases.use_sampling(case.sampling), counted(monkeypatch) as (reads, _):
            getattr(launchers, op)(**arguments)
        assert not reads.found, str(case)


def test_a_selection_with_caps_floors_and_pruned_units_reads_nothing_back(monkeypatch):
    grids = [UnitGrid.of_blocks((40, 12), (4, 1)), UnitGrid.of_blocks((33, 7), (4, 1))]
    scores = [torch.rand(grid.shape) for grid in grids]
    kept = [torch.rand(grid.shape) >= 0.2 for grid in grids]
    with counted(monkeypatch) as (reads, launches):
        selection.select(scores, grids, 300, kept=kept, floors=[100, None], caps=[300, 150], check=False)
    assert not reads.found
    assert launches


def test_caps_and_floors_of_many_layers_take_the_launches_of_few(monkeypatch):
    counts = []
    for layers in (2, 20):
        grids = [UnitGrid.of_blocks((64, 16), (4, 1))] * layers
        scores = [torch.rand(grid.shape) for grid in grids]
        with counted(monkeypatch) as (_, launches):
            selection.select(scores, grids, 500 * layers, floors=[100] * layers, caps=[700] * layers, check=False)
        counts.append(len(launches))
    assert counts[0] == counts[1] <= 21


def test_layers_with_budgets_of_their_own_are_searched_in_the_launches_of_few(monkeypatch):
    counts = []
    for layers in (2, 20):
        grids = [UnitGrid.of_blocks((64, 16), (4, 1))] * layers
        scores, kept = [torch.rand(grid.shape) for grid in grids], [torch.rand(grid.shape) < 0.9 for grid in grids]
        with counted(monkeypatch) as (reads, launches):
            selection.select(scores, grids, [500] * layers, kept=kept, caps=[700] * layers, check=False)
        assert not reads.found
        counts.append(len(launches))
    assert counts[0] == counts[1] <= 14


def test_memory_for_graphs_is_never_handed_out_twice():
    arena = multi_tensor.Arena(8, pinned=False)
    with pytest.raises(RuntimeError, match="run the same step once before it is captured"):
        arena.keep(torch.arange(3))
    arena.provide()
    first = arena.keep(torch.arange(3))
    second = arena.keep(torch.tensor([[7, 8]]))
    assert (second.data_ptr() - first.data_ptr()) == 32
    assert first.tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="table of 3 numbers"):
        arena.keep(torch.arange(3))
    arena.provide()
    arena.keep(torch.arange(5))
    assert first.tolist() == [0, 1, 2]
    assert second.tolist() == [[7, 8]]
