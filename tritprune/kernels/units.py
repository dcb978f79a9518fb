"""How a layer's weight view is cut into units: a grid of equal rectangles, smaller at the lower and right edge."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UnitGrid:
    """A layer's units as a grid ``[rows, cols]``.

    Every unit has ``row_size * col_size`` elements, but the units of the last row have ``last_row_size`` rows and
    the units of the last column ``last_col_size`` columns, which may be fewer. In a grid of one row (column) only
    ``last_row_size`` (``last_col_size``) counts.

    Example:
        >>> UnitGrid.of_blocks((10, 3), (4, 1)).sizes().tolist()
        [[4, 4, 4], [4, 4, 4], [2, 2, 2]]
    """

    rows: int
    cols: int
    row_size: int
    last_row_size: int
    col_size: int
    last_col_size: int

    @staticmethod
    def of_blocks(shape: tuple[int, int], block: tuple[int, int]) -> "UnitGrid":
        """The grid of ``n x m`` blocks over an ``[R, C]`` view; what the blocks do not divide is a smaller unit.

        Args:
            shape: ``(R, C)``.
            block: ``(n, m)``, both at least 1.

        Raises:
            ValueError: a block without elements.
        """
        rows, last_row_size = _cut(shape[0], block[0], block)
        cols, last_col_size = _cut(shape[1], block[1], block)
        return UnitGrid(rows, cols, block[0], last_row_size, block[1], last_col_size)

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, cols)``."""
        return (self.rows, self.cols)

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.rows * self.cols

    @property
    def elements(self) -> int:
        """How many elements all units have together."""
        return _length(self.rows, self.row_size, self.last_row_size) * _length(
            self.cols, self.col_size, self.last_col_size
        )

    @property
    def uniform_size(self) -> int | None:
        """The size of a unit in elements if all units have the same, else None."""
        if self.units == 0:
            return self.row_size * self.col_size
        if self.rows > 1 and self.row_size != self.last_row_size:
            return None
        if self.cols > 1 and self.col_size != self.last_col_size:
            return None
        return self.last_row_size * self.last_col_size

    def sizes(self, device: torch.device | str = "cpu") -> Tensor:
        """The size of every unit in elements: int64 ``[rows, cols]``."""
        heights = self.row_heights(device)
        return heights[:, None] * self.col_widths(device)[None, :]

    def sizes_at(self, index: Tensor) -> Tensor:
        """The sizes in elements of the units at row-major positions ``index``: int64, of the shape of ``index``."""
        uniform = self.uniform_size
        if uniform is not None:
            return torch.full_like(index, uniform)
        row = index // self.cols
        col = index - row * self.cols
        heights = torch.where(row == self.rows - 1, self.last_row_size, self.row_size)
        return heights * torch.where(col == self.cols - 1, self.last_col_size, self.col_size)

    def row_heights(self, device: torch.device | str = "cpu") -> Tensor:
        """Element rows in each row of units: int64 ``[rows]``."""
        return _extents(self.rows, self.row_size, self.last_row_size, device)

    def col_widths(self, device: torch.device | str = "cpu") -> Tensor:
        """Element columns in each column of units: int64 ``[cols]``."""
        return _extents(self.cols, self.col_size, self.last_col_size, device)


def _cut(length: int, size: int, block: tuple[int, int]) -> tuple[int, int]:
    """How many pieces of ``size`` cover ``length``, and how long the last one is."""
    if size < 1:
        raise ValueError(f"a unit needs at least one row and one column, got block {block[0]}x{block[1]}")
    pieces = -(-length // size)
    return pieces, length - (pieces - 1) * size if pieces else size


def _length(pieces: int, size: int, last: int) -> int:
    return (pieces - 1) * size + last if pieces else 0


def _extents(pieces: int, size: int, last: int, device: torch.device | str) -> Tensor:
    extents = torch.full((pieces,), size, dtype=torch.int64, device=device)
    extents[-1:] = last
    return extents
