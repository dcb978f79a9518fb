"""How hard the search for a threshold tries to read the scores only once; the result does not depend on it."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Sizes of the sampled search on a device.

    Args:
        least: units from which a sample is drawn; fewer are searched byte by byte, out of the cache.
        units_per_sample: about one score of so many is drawn.
        smallest: scores in a sample, at least.
        largest: scores in a sample, at most.
        deviations: half the width of the bracket, in standard deviations of a sample's rank.
        programs: programs that share the scores out, each with a segment of its own for what lies in the bracket.
        room: bytes for all segments together.
        tiles: in how many pieces the ties of very many units are counted.
    """

    least: int = 1 << 22
    units_per_sample: int = 1 << 10
    smallest: int = 1 << 16
    largest: int = 1 << 20
    deviations: float = 5.0
    programs: int = 1024
    room: int = 56 << 20
    tiles: int = 1 << 20


_sampling = Sampling()


def get_sampling() -> Sampling:
    """The sizes in force."""
    return _sampling


@contextmanager
def use_sampling(sampling: Sampling | None) -> Generator[None]:
    """Other sizes within a ``with`` block, so that small inputs take every path; None leaves them as they are."""
    global _sampling
    before = _sampling
    _sampling = before if sampling is None else sampling
    try:
        yield
    finally:
        _sampling = before
