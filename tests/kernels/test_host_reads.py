"""Launchers read nothing back from a device: a step neither waits for it nor breaks a CUDA graph."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tritprune import selection
from tritprune.kernels import UnitGrid, cases, dispatch
from tritprune.kernels import triton as launchers
from tritprune.kernels.triton import multi_tensor

READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
"""Operations whose result, or whose result's size, the host must know."""


class Reads(TorchDispatchMode):
    """Names of the operations that read, and how many were dispatched."""

    def __init__(self):
        super().__init__()
        self.found, self.dispatched = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.dispatched += 1
        name = func.name().partition("::")[2].partition(".")[0]
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)
        unsized = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name.startswith(READS) or by_mask or unsized:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch):
    """The launchers' own work, with kernels that do nothing."""
    launches = []
    with monkeypatch.context() as patch:
        patch.setattr(multi_tensor, "launch", lambda kernel, *_, **__: launches.append(kernel))
        patch.setattr(dispatch, "_choose", lambda op, device: "triton")
        with Reads() as reads:
            tolist = torch.Tensor.tolist  # it is not dispatched
            patch.setattr(torch.Tensor, "tolist", lambda tensor: (reads.found.append("tolist"), tolist(tensor))[1])
            yield reads, launches


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
    pruned = [torch.rand(grid.shape) < 0.2 for grid in grids]
    with counted(monkeypatch) as (reads, launches):
        selection.select(scores, grids, 300, pruned=pruned, floors=[100, None], caps=[300, 150], check=False)
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
