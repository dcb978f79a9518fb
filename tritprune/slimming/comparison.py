"""When two tensors count as equal: the same but for the rounding of sums that are added in another order."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Largest allowed |a - b| / max(1, max |a|) by dtype; all other dtypes must be equal."""


@dataclass(frozen=True)
class Difference:
    """How far two tensors, or two sets of named tensors, are apart.

    Args:
        largest: the largest absolute difference; infinite where names, shapes or dtypes differ.
        allowed: what is allowed where ``largest`` is, in the tensors' own unit.
        within: whether every element is within what is allowed.
        where: the name of the first tensor that is not, else of the one with the largest difference.
    """

    largest: float
    allowed: float
    within: bool
    where: str


def difference(reference: Tensor, other: Tensor, name: str = "") -> Difference:
    """Largest |reference - other|, held against tolerance(dtype) * max(1, max |reference|).

    NaN equals NaN and infinity equals itself; the comparison is made in float64.
    """
    if reference.shape != other.shape or reference.dtype != other.dtype:
        return Difference(float("inf"), 0.0, False, name)
    if reference.numel() == 0:
        return Difference(0.0, 0.0, True, name)
    wide, narrow = reference.detach().double(), other.detach().double()
    same = (wide == narrow) | (wide.isnan() & narrow.isnan())
    apart = torch.where(same, 0.0, (wide - narrow).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    finite = wide[wide.isfinite()].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    allowed = TOLERANCES.get(reference.dtype, 0.0) * scale
    largest = float(apart.max())
    return Difference(largest, allowed, largest <= allowed, name)


def largest_difference(reference: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Difference:
    """The differences of all tensors in one: fails where the first tensor fails, and where the names differ."""
    if list(reference) != list(other):
        odd = sorted(set(reference) ^ set(other)) or list(reference)
        return Difference(float("inf"), 0.0, False, odd[0])
    parts = [difference(tensor, other[name], name) for name, tensor in reference.items()]
    broken = [part for part in parts if not part.within]
    if broken:
        return broken[0]
    return max(parts, key=lambda part: part.largest, default=Difference(0.0, 0.0, True, ""))


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over named tensors: names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
