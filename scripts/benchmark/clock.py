"""Time, bandwidth and counts: how every figure of the benchmark is taken.

Contenders of a problem run in turn (A B C A B C ...) in one process, each on inputs of its own, so that a slow minute
of the machine hits all of them alike. Figures are the median and the 10th and 90th percentile. The first contender runs
twice under two names: the distance between the two is the noise, and a ratio inside it says nothing. Before each run
256 MB are written, so that no input waits in a cache (jobs of over 240 MB see to that themselves). On CUDA a run is
timed by the host, to its end on the device, and beside that by events on the device alone.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tritprune.kernels import dispatch


@dataclass(frozen=True)
class Times:
    """Milliseconds of one contender: median, 10th and 90th percentile over ``repeats`` runs.

    ``device`` is the median by events on a GPU, None on the CPU.
    """

    median: float
    p10: float
    p90: float
    repeats: int
    device: float | None = None

    @staticmethod
    def of(samples: Sequence[tuple[float, float | None]]) -> "Times":
        """Summarise samples in seconds, by the host and by the device."""
        ordered = sorted(1e3 * host for host, _ in samples)
        last = len(ordered) - 1
        events = [1e3 * event for _, event in samples if event is not None]
        return Times(
            statistics.median(ordered),
            ordered[round(0.1 * last)],
            ordered[round(0.9 * last)],
            len(ordered),
            statistics.median(events) if events else None,
        )


def measure(
    contenders: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    seconds: float,
    cold: bool = True,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Times]:
    """Time contenders in turn, until each ran ``repeats`` times or all together took ``seconds`` (three runs at least).

    Args:
        contenders: name -> one run of it, warmed up here: twice, or once if that takes over a second.
        device: where they run; on CUDA a run ends when the device has finished it.
        repeats: runs of each contender.
        seconds: what the problem may take; a contender of a minute is not run fifty times.
        cold: write 256 MB before each run.
        tick: called after every round.
    """
    for run in contenders.values():
        if _once(run, device)[0] < 1.0:
            run()
    cache = torch.zeros(64 << 20 if cold else 0, device=device)
    samples: dict[str, list[tuple[float, float | None]]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    for turn in range(repeats):
        for name, run in contenders.items():
            cache.add_(1.0)
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
    best = min(_device_seconds(_once(lambda: target.copy_(source), device)) for _ in range(repeats))
    return 2 * source.numel() * source.element_size() / best


def product_rate(device: torch.device, *, repeats: int = 10) -> float:
    """Floating-point operations per second of an 8192-cubed bf16 matrix product: what the device can do at all."""
    left, right = (torch.ones(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = min(_device_seconds(_once(lambda: left @ right, device)) for _ in range(repeats))
    return 2 * 8192**3 / best


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


def count(run: Callable[[], object], *, stub: bool = False) -> Counts:
    """Count what one call of ``run`` dispatches, reads back, allocates and launches.

    Args:
        run: what is counted.
        stub: name Triton kernels instead of launching them: the counts of a GPU's path without a GPU.
    """
    reads = 0
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        nonlocal reads
        reads += 1
        return tolist(tensor)

    with (
        _counted_launches(stub=stub) as launches,
        Counting() as mode,
        mock.patch.object(torch.Tensor, "tolist", counted),
    ):
        run()
    mode.counts.launches = len(launches)
    mode.counts.host_reads += reads  # the dispatcher does not see them
    return mode.counts


@contextmanager
def forced_backend(name: str) -> Iterator[None]:
    """Every operation takes this backend, also where its results are not to be had."""
    with mock.patch.object(dispatch, "_choose", return_value=name):
        yield


def in_a_graph(run: Callable[[], object]) -> Callable[[], object] | None:
    """A replay of ``run`` from a CUDA graph, or None where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"\n  not captured in a graph: {error}".splitlines()[1], file=sys.stderr)
        return None
    return graph.replay


def _has_storage(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta"


@contextmanager
def _counted_launches(*, stub: bool = False) -> Iterator[list[str]]:
    """Names of the Triton kernels launched inside; with ``stub`` they are named and not launched."""
    launches: list[str] = []
    try:
        from triton.runtime.jit import JITFunction
    except ModuleNotFoundError:
        yield launches
        return
    run = JITFunction.run

    def recorded(kernel: Any, *arguments: Any, **keywords: Any) -> Any:
        launches.append(kernel.__name__)
        return None if stub else run(kernel, *arguments, **keywords)

    with mock.patch.object(JITFunction, "run", recorded):
        yield launches


def _once(run: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Seconds by the host's clock, to the end of the work, and by the device's events."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, None
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    first.record()
    run()
    last.record()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start, 1e-3 * first.elapsed_time(last)


def _device_seconds(sample: tuple[float, float | None]) -> float:
    return sample[0] if sample[1] is None else sample[1]
