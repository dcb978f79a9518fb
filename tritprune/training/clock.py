"""Where a step's time goes."""

import time
from typing import Any

import torch


class StepClock:
    """Wall time of a step and of its parts, in milliseconds.

    On a GPU it records device events, so that nothing waits before the values are read.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._start = self._now()

    def part(self, name: str) -> "_Span":
        """Context manager that adds to the part ``name``."""
        return _Span(self, name)

    def milliseconds(self) -> dict[str, float]:
        """``time/step_ms``, ``time/forward_ms``, ``time/backward_ms``."""
        spans = {"step": [(self._start, self._now())], **self._spans}
        if self._cuda:
            torch.cuda.synchronize()
        return {f"time/{name}_ms": sum(self._between(a, b) for a, b in pairs) for name, pairs in spans.items()}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._cuda else 1e3 * (end - start)


class _Span:
    def __init__(self, clock: StepClock, name: str) -> None:
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._begin = self._clock._now()

    def __exit__(self, *_: object) -> None:
        self._clock._spans.setdefault(self._name, []).append((self._begin, self._clock._now()))
