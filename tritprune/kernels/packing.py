"""Packed masks: one bit a unit, row-major, the first unit in the highest bit of the first byte; spare bits are 0.

The same bits as in a saved mask file. Operations take them in place of bool masks (``uint8 [ceil(units / 8)]``), and
those that make masks make them packed where asked: an eighth of the bytes to write, read and keep.
"""

import torch
from torch import Tensor


def packed_length(units: int) -> int:
    """Bytes of a packed mask."""
    return -(-units // 8)


def pack_mask(mask: Tensor) -> Tensor:
    """Bits of a bool tensor of any shape: uint8 ``[ceil(n / 8)]`` on its device."""
    bits = torch.zeros(8 * packed_length(mask.numel()), dtype=torch.uint8, device=mask.device)
    bits[: mask.numel()] = mask.reshape(-1)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)  # made there: nothing is sent
    return (bits.view(-1, 8) << places).sum(1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`pack_mask`: bool of ``shape``.

    Raises:
        ValueError: fewer or more bytes than the shape needs.
    """
    units = torch.Size(shape).numel()
    if bits.dtype != torch.uint8 or bits.shape != (packed_length(units),):
        raise ValueError(f"{bits.dtype} {list(bits.shape)} does not hold {units} bits")
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> places & 1).view(-1)[:units].view(shape).bool()


def is_packed(mask: Tensor) -> bool:
    """Whether a mask is packed, by its type."""
    return mask.dtype == torch.uint8
