"""Time, bandwidth and counts: how every figure of the benchmark is taken.

Contenders of a problem run in turn (A B C A B C ...) in one process, each on inputs of its own, so that a slow minute
of the machine hits all of them alike. Figures are the median and the 10th and 90th percentile. The first contender runs
twice under two names: the distance between the two is the noise, and a ratio inside it says nothing.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender: median, 10th and 90th percentile over ``repeats`` runs."""

    median: float
    p10: float
    p90: float
    repeats: int

    @staticmethod
    def of(samples: Sequence[float]) -> "Times":
        """Summarise samples in seconds."""
        ordered = sorted(1e3 * sample for sample in samples)
        last = len(ordered) - 1
        return Times(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))


def measure(
    contenders: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    seconds: float,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Time contenders in turn, until each ran ``repeats`` times or all together took ``seconds`` (three runs at least).

    Args:
        contenders: name -> one run of it, warmed up here twice.
        device: where they run; on CUDA a run ends when the device has finished it.
        repeats: runs of each contender.
        seconds: what the problem may take; a contender of a minute is not run fifty times.
        tick: called after every round.
    """
    for run in contenders.values():
        for _ in range(2):
            run()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    for turn in range(repeats):
        for name, run in contenders.items():
            samples[name].append(_once(run, device))
        tick()
        if turn >= 2 and time.perf_counter() > end:
            break
    return {name: Times.of(values) for name, values in samples.items()}


def copy_bandwidth(device: torch.device, *, repeats: int = 15) -> float:
    """Bytes per second, read plus written, of copying 256 MB on this device: what every floor is divided by."""
    source = torch.ones(64 << 20, device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    best = min(_once(lambda: target.copy_(source), device) for _ in range(repeats))
    return 2 * source.numel() * source.element_size() / best


@dataclass
class Counts:
    """What one call does besides computing.

    Args:
        ops: torch operations dispatched.
        host_reads: numbers read back from the device (``.item()``, ``bool()``, ``.tolist()``).
        allocated: bytes of new tensors.
        launches: Triton kernels launched.
    """

    ops: int = 0
    host_reads: int = 0
    allocated: int = 0
    launches: int = 0


_READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item"}


class Counting(TorchDispatchMode):
    """Counts what is dispatched inside a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)}
        result = func(*args, **(kwargs or {}))
        self.counts.ops += 1
        self.counts.host_reads += func.overloadpacket.__name__ in _READS
        for leaf in tree_leaves(result):
            if _has_storage(leaf) and leaf.untyped_storage().data_ptr() not in known:
                self.counts.allocated += leaf.untyped_storage().nbytes()
        return result


def count(run: Callable[[], object]) -> Counts:
    """Count what one call of ``run`` dispatches, reads back, allocates and launches."""
    with _counted_launches() as launches, Counting() as mode:
        run()
    mode.counts.launches = len(launches or ())
    return mode.counts


def _has_storage(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta"


def _counted_launches() -> Any:
    if not torch.cuda.is_available():
        return nullcontext([])
    from unittest import mock

    from tritprune.kernels.triton import multi_tensor

    launches: list[str] = []
    launch = multi_tensor.launch

    def recorded(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        launches.append(kernel.__name__)
        launch(kernel, programs, *arguments, **constants)

    patched = mock.patch.object(multi_tensor, "launch", recorded)

    class _Launches:
        def __enter__(self) -> list[str]:
            patched.__enter__()
            return launches

        def __exit__(self, *error: object) -> None:
            patched.__exit__(*error)

    return _Launches()


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
