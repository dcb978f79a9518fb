"""A selection copies no scores: what it takes beside its masks is bounded, on every backend and at any size."""

import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from counting import Held, counted

from tritprune import selection
from tritprune.kernels import UnitGrid, threshold_reference, use_backend

LIMIT = 64 << 20


def problem(layers, units, *, fill):
    """Layers of single weights of which some have gone, with floors and caps."""
    grids = [UnitGrid.of_blocks((1, units), (1, 1))] * layers
    scores = [torch.rand(grid.shape) if fill else torch.empty(grid.shape) for grid in grids]
    kept = [score > 0.2 if fill else torch.empty(score.shape, dtype=torch.bool) for score in scores]
    bounds = {"floors": [units // 10] * layers, "caps": [units // 10 * 9] * layers}
    return scores, grids, {"kept": kept, "check": False, **bounds}


def test_held_bytes_are_seen():
    with Held() as held:
        for _ in range(3):
            torch.ones(1000)
        torch.ones(1000).add(1)
    assert held.most == 8000


@pytest.mark.parametrize("each", [False, True], ids=["one budget", "a budget a layer"])
@pytest.mark.parametrize(("layers", "units"), [(1, 2**31 + 2**20), (72, 2**20)])
def test_on_a_device_scratch_is_bounded(layers, units, each, monkeypatch):
    """Nothing is written to these tensors: kernels are counted, not run."""
    scores, grids, options = problem(layers, units, fill=False)
    budget = [units // 2] * layers if each else layers * units // 2
    with counted(monkeypatch) as (reads, launches), Held() as held:
        masks = selection.select(scores, grids, budget, **options)
    assert launches
    assert not reads.found
    assert held.most - sum(mask.nbytes for mask in masks) <= LIMIT < 4 * units * layers


def test_the_reference_holds_chunks(monkeypatch):
    for name in ("_CHUNK", "_SAMPLE", "_ROOM"):
        monkeypatch.setattr(threshold_reference, name, 1 << 14)
    scores, grids, options = problem(2, 1 << 19, fill=True)
    with use_backend("torch"), Held() as held:
        masks = selection.select(scores, grids, 1 << 19, **options)
    assert held.most - sum(mask.nbytes for mask in masks) <= 2 << 20 < 4 << 20


@pytest.mark.parametrize("equal", [False, True], ids=["different", "all equal"])
def test_the_compiled_loops_hold_pieces(equal):
    """By the process's own resident bytes: arrays inside compiled loops are nobody else's to count."""
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not peak.exists():
        pytest.skip("no /proc: resident bytes cannot be read")
    scores, grids, options = problem(2, 1 << 24, fill=True)
    if equal:
        scores = [score.fill_(1.0) for score in scores]
    with use_backend("numba"):
        small = [torch.rand(1, 16)] * 2, [UnitGrid.of_blocks((1, 16), (1, 1))] * 2
        selection.select(*small, 16, kept=[torch.ones(1, 16, dtype=torch.bool)] * 2, check=False)
        peak.write_text("5")
        before = resident(status, "VmRSS")
        masks = selection.select(scores, grids, 1 << 24, **options)
        most = resident(status, "VmHWM")
    assert most - before - sum(mask.nbytes for mask in masks) <= LIMIT < 4 << 25


def resident(status, field):
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1])
