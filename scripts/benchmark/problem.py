"""One job of the benchmark, and how results are held against each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One job.

    Args:
        name: of the job.
        floor: bytes that must be moved, whoever does it.
        contenders: name -> a run of it; the first is ours.
        check: raises if our result is wrong.
        agreement: name of a rival -> how its result compares with the reference.
        in_a_graph: whether ours can be captured in a CUDA graph.
    """

    name: str
    floor: int
    contenders: dict[str, Callable[[], object]]
    check: Callable[[], None]
    agreement: dict[str, str]
    in_a_graph: bool = True


def same(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise AssertionError where a layer is not the reference's (NaN equals NaN)."""
    for number, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
        require(torch.equal(mine, theirs), f"{what}: layer {number} differs from the reference")


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """How a rival's masks compare."""
    differing = sum(int((a != b).sum()) for a, b in zip(actual, expected, strict=True))
    return "same masks" if not differing else f"{differing:,} mask elements differ"


def require(holds: bool, message: str) -> None:
    """Raise AssertionError unless it holds."""
    if not holds:
        raise AssertionError(message)
