"""One launch over many tensors: pointer tables, tiles, and the single place where kernels are launched.

Layers reach a kernel as an int64 table ``[T, FIELDS]`` of addresses, sizes and strides, and are cut into tiles of a
fixed number of positions. Tile number -> layer is a second small table. Both are pure functions of the numbers in
them, so they are cached by these numbers and never stale; a first upload goes through pinned memory and does not
synchronise. While a CUDA graph is captured nothing is cached (what the graph makes exists after its first replay only),
and the numbers are uploaded from pinned memory that is never written again, so that every replay finds them.

An address out of a table tells the compiler nothing about its alignment, and 4-byte loads would be the result. So
launchers put layers that meet :func:`is_aligned` into launches of their own, whose kernels repeat the fact with
``tl.multiple_of`` (``ALIGNED``).
"""

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16
"""What ``ALIGNED`` promises: every address in bytes, every size and stride in elements is a multiple of this."""

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

Layer = TypeVar("Layer")


@triton.jit
def find_tile(
    table_ptr,  # [T, FIELDS] int64; field 0 is the number of the layer's first tile
    owners_ptr,  # [tiles] int32
    FIELDS: tl.constexpr,
):
    """The table row of the layer that this program works on, and which of the layer's tiles is its own."""
    tile = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(owners_ptr + tile).to(tl.int64) * FIELDS
    return row_ptr, tile - tl.load(row_ptr)


@triton.jit
def load_pointer(field_ptr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of a table as a pointer to TYPE."""
    ptr = tl.load(field_ptr).to(tl.pointer_type(TYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def load_size(field_ptr, ALIGNED: tl.constexpr):
    """A size or stride of a table."""
    size = tl.load(field_ptr)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size


@triton.jit
def load_stride(field_ptr, ONE: tl.constexpr):
    """A stride of a table, or the 1 that it is known to be."""
    return tl.full([], 1, tl.int64) if ONE else tl.load(field_ptr)


@triton.jit
def walk_grid(tile, n_rows, n_cols, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """The positions of a tile in a grid that is walked row by row: rows, columns (int32) and which of them exist.

    One 64-bit division a program and one 32-bit division a position: the flat position may pass 2^31, a single
    row or column number does not.
    """
    start = tile * BLOCK
    first_row = start // n_cols
    first_col = (start - first_row * n_cols).to(tl.int32)
    width = n_cols.to(tl.int32)
    if ALIGNED:
        first_col = tl.multiple_of(first_col, 16)
        width = tl.multiple_of(width, 16)
    along = first_col + tl.arange(0, BLOCK)  # [BLOCK]
    rows = first_row.to(tl.int32) + along // width
    return rows, along % width, rows < n_rows.to(tl.int32)


@triton.jit
def at(rows, cols, stride_r, stride_c):
    """Offsets of elements in int64, whatever the type of their row and column numbers."""
    return rows.to(tl.int64) * stride_r + cols.to(tl.int64) * stride_c


def is_aligned(*numbers: int) -> bool:
    """Whether all of these addresses, sizes and strides are multiples of :data:`ALIGNMENT`."""
    return all(number % ALIGNMENT == 0 for number in numbers)


def group_by(layers: Iterable[Layer], key: Callable[[Layer], Hashable]) -> dict[Any, list[Layer]]:
    """The layers of each key, in order: what one launch serves."""
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return groups


def tables(
    fields: Sequence[tuple[int, ...]], positions: Sequence[int], block: int, device: torch.device
) -> tuple[Tensor, Tensor, int]:
    """What :func:`find_tile` reads, and how many tiles there are.

    Args:
        fields: the numbers of each layer; the number of its first tile is put before them.
        positions: how many positions each layer has.
        block: positions of a tile.
        device: where the kernel will run.
    """
    tiles = tuple(-(-count // block) for count in positions)
    rows: list[tuple[int, ...]] = []
    first = 0
    for numbers, count in zip(fields, tiles, strict=True):
        rows.append((first, *numbers))
        first += count
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        lengths = _captured_table((tiles,), device)[0]
        return _captured_table(tuple(rows), device), _owners_of(lengths, first), first
    stream = 0
    if device.type == "cuda":
        _arena.provide()
        stream = torch.cuda.current_stream(device).cuda_stream
    return _table(tuple(rows), device, stream), _owners(tiles, device, stream), first


def launch(kernel: Any, programs: int, *arguments: Tensor | float, **constants: Any) -> None:
    """Start ``programs`` programs of a kernel on the device of its first argument; none if there is nothing to do.

    Every launch of the package goes through here, with products and sums rounded one by one
    (``enable_fp_fusion=False``), as the reference does.
    """
    if programs == 0:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants, num_warps=4, enable_fp_fusion=False)


class Arena:
    """Host memory for the tables of CUDA graphs: what is handed out stays as it is for the life of the process.

    Args:
        size: numbers that a new piece of memory holds.
        pinned: whether a device may read it while the host goes on.
    """

    def __init__(self, size: int = 1 << 17, *, pinned: bool = True) -> None:
        self._size, self._pinned, self._used = size, pinned, 0
        self._pieces: list[Tensor] = []

    def provide(self) -> None:
        """See to it that at least half a piece is free; not while a graph is captured, which may not allocate."""
        if not self._pieces or self._used > self._size // 2:
            self._pieces.append(torch.empty(self._size, dtype=torch.int64, pin_memory=self._pinned))
            self._used = 0

    def keep(self, table: Tensor) -> Tensor:
        """A copy of a table that nothing will ever overwrite.

        Raises:
            RuntimeError: no room is left, or nothing ran before the capture.
        """
        if not self._pieces or self._used + table.numel() > self._size:
            raise RuntimeError(
                f"no pinned memory for a table of {table.numel()} numbers in a CUDA graph: run the same step once "
                "before it is captured, and capture one step a graph"
            )
        kept = self._pieces[-1][self._used : self._used + table.numel()].view(table.shape)
        self._used += -(-table.numel() // 2) * 2  # addresses of whole 16 bytes
        return kept.copy_(table)


_arena = Arena()


def _captured_table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return _arena.keep(torch.tensor(rows, dtype=torch.int64)).to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """Kept per stream: another one would not wait for the upload."""
    del stream
    table = torch.tensor(rows, dtype=torch.int64)
    if device.type != "cuda":
        return table
    return table.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=64)
def _owners(tiles: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _owners_of(_table((tiles,), device, stream)[0], sum(tiles))


def _owners_of(lengths: Tensor, total: int) -> Tensor:
    layers = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
    return layers.repeat_interleave(lengths, output_size=total)
