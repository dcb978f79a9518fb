"""Races, looked for by repetition: the same call again and again, while another stream keeps the device busy."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from capture import PruneStep
from check import Check, Place
from torch import Tensor

from tritprune.kernels import cases
from tritprune.kernels import triton as launchers

SECONDS = 15.0
LARGE = [(3072, 768), (768, 3072), (1000, 777), (4096, 4096)]


def races(place: Place) -> Iterator[Check]:
    """The same call again and again on a busy device: every result must be the first one, bit for bit."""
    ops = sorted({case.op for case in cases.all_cases()})
    rounds = 2 if place.dry else 6
    for op in ops[:2] if place.dry else ops:
        chosen = cases.cases_of(op)
        chosen = chosen[:2] if place.dry else chosen
        function = getattr(launchers, op)
        differing = [
            case.name for case in chosen if not _same(partial(case.run, function, place.device), rounds, place)
        ]
        yield Check(f"{op}: {len(chosen)} cases, {rounds} times", not differing, "; ".join(differing))
    step = PruneStep([(32, 24)] if place.dry else LARGE, place.device)

    def whole_step() -> list[Tensor]:
        step.fill(7)
        masks, statistics = step.run()
        return [*masks, statistics, *(weight.clone() for weight in step.weights), *(s.clone() for s in step.scores)]

    def tied_step() -> list[Tensor]:
        step.fill(7)
        for tensor in (*step.weights, *step.gradients, *step.scores):
            tensor.mul_(2).round_()
        masks, statistics = step.run()
        return [*masks, statistics]

    ends = time.perf_counter() + (0 if place.dry else SECONDS)
    for name, run in {"a whole prune step": whole_step, "a prune step of ties": tied_step}.items():
        count, same, first = 0, True, [tensor.clone() for tensor in run()]
        while count < 2 or (time.perf_counter() < ends and count < 300):
            same &= _equal(_busy(run, place), first)
            count += 1
        yield Check(f"{name}, {count} times", same)
        ends += 0 if place.dry else SECONDS


def _same(run: Callable[[], list[Tensor]], rounds: int, place: Place) -> bool:
    first = run()
    return all(_equal(_busy(run, place), first) for _ in range(rounds - 1))


def _busy(run: Callable[[], list[Tensor]], place: Place) -> list[Tensor]:
    """A run while matrix products of another stream take some of the multiprocessors, in changing numbers."""
    if place.device.type != "cuda":
        return run()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        size = 256 * int(torch.randint(1, 6, ()))
        noise = torch.ones(size, size, device=place.device)
        for _ in range(8):
            noise = (noise @ noise).clamp_(max=1.0)
    result = run()
    place.wait()
    return result


def _equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(_bits_equal(a, b) for a, b in zip(actual, expected, strict=True))


def _bits_equal(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point():
        kind = torch.int32 if a.element_size() == 4 else torch.int16
        a, b = a.contiguous().view(kind), b.contiguous().view(kind)
    return torch.equal(a, b)
