"""Where a unit stands in the order in which units go: at its score, unless it is forced to an end.

    standing(u) = -inf   if kept(u) = 0, or (s, u) is up to the unit at the layer's floor
                  +inf   else if (s, u) is from the unit at the layer's cap on
                  s      else

Masks of kept units are read beside the scores (a byte or a bit a unit), floors and caps are two units a layer: so
nothing of the size of the scores is written to force a unit, and every pass of a search agrees on where it stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritprune.kernels.packing import is_packed
from tritprune.kernels.threshold_reference import Bounds
from tritprune.kernels.triton import multi_tensor
from tritprune.kernels.triton.multi_tensor import load_pointer
from tritprune.kernels.units import UnitGrid

NONE, BYTES, BITS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""How kept units are marked."""


@triton.jit
def load_mask(mask_ptr, unit, inside, PACKED: tl.constexpr):
    """1 where a unit stays, and where there is none, else 0: of a byte or of a bit a unit."""
    if PACKED:
        byte = tl.load(mask_ptr + (unit >> 3), mask=inside, other=-1)
        return ((byte.to(tl.int32) >> (7 - (unit & 7).to(tl.int32))) & 1).to(tl.int8)
    return tl.load(mask_ptr + unit, mask=inside, other=1)


@triton.jit
def load_marks(kept_ptr, start, n_units, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """1 where one of BLOCK neighbours is kept: int8 [BLOCK]. ``start`` is a multiple of 8."""
    marks = tl.full([BLOCK], 1, tl.int8)
    if KEPT == BYTES:
        unit = start + tl.arange(0, BLOCK)  # [BLOCK]
        marks = tl.load(kept_ptr + unit, mask=unit < n_units, other=0)
    if KEPT == BITS:
        byte = start // 8 + tl.arange(0, BLOCK // 8)  # [BLOCK // 8]
        bits = tl.load(kept_ptr + byte, mask=byte * 8 < n_units, other=0).to(tl.int32)
        marks = tl.reshape((bits[:, None] >> (7 - tl.arange(0, 8))[None, :]) & 1, [BLOCK]).to(tl.int8)
    return marks


@triton.jit
def load_bounds(bound_scores_ptr, bound_places_ptr, layer, BOUNDED: tl.constexpr):
    """Score and index of the units at a layer's floor and at its cap."""
    floor, floor_at, cap, cap_at = 0.0, 0, 0.0, 0  # nobody reads these
    if BOUNDED:
        floor, cap = tl.load(bound_scores_ptr + 2 * layer), tl.load(bound_scores_ptr + 2 * layer + 1)
        floor_at, cap_at = tl.load(bound_places_ptr + 2 * layer), tl.load(bound_places_ptr + 2 * layer + 1)
    return floor, floor_at, cap, cap_at


@triton.jit
def standing(score, unit, marks, bounds, KEPT: tl.constexpr, BOUNDED: tl.constexpr):
    """Where units stand, from their scores, indices, marks and the layer's bounds."""
    stands = score
    if BOUNDED:
        floor, floor_at, cap, cap_at = bounds
        stands = tl.where((score > cap) | ((score == cap) & (unit <= cap_at)), float("inf"), stands)
        stands = tl.where((score < floor) | ((score == floor) & (unit >= floor_at)), float("-inf"), stands)
    if KEPT != NONE:
        stands = tl.where(marks != 0, stands, float("-inf"))
    return stands


@dataclass(frozen=True)
class SearchLayer:
    """A layer with units: what kernels read of it to know where its units stand.

    Args:
        number: which of all layers it is.
        score: contiguous.
        grid: unit sizes.
        kept: units that have not gone, contiguous; None: all.
    """

    number: int
    score: Tensor
    grid: UnitGrid
    kept: Tensor | None

    @property
    def fields(self) -> tuple[int, ...]:
        """Score, units, cols, row, last row, col and last col."""
        grid = self.grid
        row_size, col_size = grid.row_size, grid.col_size
        if grid.uniform_size is not None and grid.units:
            row_size, col_size = grid.last_row_size, grid.last_col_size  # all that a grid of one row or column has
        sizes = (row_size, grid.last_row_size, col_size, grid.last_col_size)
        return (self.score.data_ptr(), grid.units, max(grid.cols, 1), *sizes)

    @property
    def marks(self) -> tuple[int, int]:
        """Mask of kept units, and the layer's number."""
        return (0 if self.kept is None else self.kept.data_ptr()), self.number

    @property
    def variant(self) -> tuple[bool, bool]:
        """(ragged, aligned): what a launch has in common."""
        addresses = (self.score.data_ptr(), self.marks[0], self.grid.units)
        return self.grid.uniform_size is None, multi_tensor.is_aligned(*addresses)


@dataclass(frozen=True)
class Order:
    """What all launches of a search share.

    Args:
        layers: those that have units.
        bounds: score and index of each layer's floor and cap; stand-ins that no kernel reads where there are none.
        constants: KEPT and BOUNDED.
    """

    layers: list[SearchLayer]
    bounds: Bounds
    constants: dict[str, int | bool]

    @classmethod
    def of(
        cls,
        scores: Sequence[Tensor],
        grids: Sequence[UnitGrid],
        kept: Sequence[Tensor] | None,
        bounds: Bounds | None,
        device: torch.device,
    ) -> "Order":
        """Of what an operation was given."""
        marks = [None] * len(scores) if kept is None else [mask.contiguous() for mask in kept]
        layers = [
            SearchLayer(number, score.contiguous(), grid, mark)
            for number, (score, grid, mark) in enumerate(zip(scores, grids, marks, strict=True))
        ]
        kind = NONE if not kept else BITS if is_packed(kept[0]) else BYTES
        constants: dict[str, int | bool] = {"KEPT": kind.value, "BOUNDED": bounds is not None}
        if bounds is None:
            bounds = torch.empty(1, device=device), torch.empty(1, dtype=torch.int64, device=device)
        return cls(layers, bounds, constants)


@triton.jit
def load_standing(
    marks_ptr,  # the table's fields kept, layer
    start,
    n_units,
    score_ptr,
    bounds,
    KEPT: tl.constexpr,
    BOUNDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where BLOCK neighbours stand, their indices and which of them exist."""
    unit = start + tl.arange(0, BLOCK)  # [BLOCK] int64
    inside = unit < n_units
    score = tl.load(score_ptr + unit, mask=inside, other=0.0)
    marks = load_marks(load_pointer(marks_ptr, tl.int8, ALIGNED), start, n_units, KEPT, BLOCK)
    return standing(score, unit, marks, bounds, KEPT, BOUNDED), unit, inside
