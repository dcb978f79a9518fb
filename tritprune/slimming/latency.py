"""How long a forward pass takes, models in turn within one run, so that a drifting machine treats them alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass.

    Args:
        median_ms: the figure to quote.
        p10_ms: a tenth of the passes were faster.
        p90_ms: a tenth were slower.
        repeats: timed passes.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int


def measure_together(
    models: Mapping[str, nn.Module],
    make_inputs: Callable[[int], Mapping[str, Tensor]],
    *,
    batches: Sequence[int] = (1, 32),
    repeats: int = 30,
    warmup: int = 3,
) -> dict[str, dict[int, Latency]]:
    """Time several models in turn: A B C A B C.

    Args:
        models: by name, in evaluation mode, on one device.
        make_inputs: batch size -> keyword arguments.
        batches: batch sizes.
        repeats: timed passes per model and batch size.
        warmup: passes before, not timed.
    """
    measured: dict[str, dict[int, Latency]] = {name: {} for name in models}
    with torch.inference_mode():
        for batch in batches:
            inputs = make_inputs(batch)
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for turn in range(warmup + repeats):
                for name, model in models.items():
                    _wait(inputs)
                    start = time.perf_counter()
                    model(**inputs)
                    _wait(inputs)
                    if turn >= warmup:
                        seconds[name].append(1e3 * (time.perf_counter() - start))
            for name, values in seconds.items():
                low, middle, high = np.percentile(values, [10, 50, 90])
                measured[name][batch] = Latency(float(middle), float(low), float(high), repeats)
    return measured


def _wait(inputs: Mapping[str, Tensor]) -> None:
    if any(value.is_cuda for value in inputs.values()):
        torch.cuda.synchronize()
