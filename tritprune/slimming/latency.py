"""Milliseconds per forward pass, with their spread; models that are compared are measured in turn.

A machine's speed drifts, so one model after the other would compare moments, not models: A B C, B C A, C A B does not.
Each round begins with another one, or a scheduler whose slices are as long as a round would always halt the same model.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tritprune.errors import ConfigError
from tritprune.slimming.model_inputs import ModelInputs


@dataclass(frozen=True)
class Latency:
    """Time per forward pass at one batch size.

    Args:
        median_ms: median over the repeats, in milliseconds.
        p10_ms: 10th percentile, in milliseconds.
        p90_ms: 90th percentile, in milliseconds.
        repeats: number of timed passes.
        ratio: median over the rounds of the first model's time over this one's: above 1, this one is faster.
        ratio_low: lower end of the 95% interval of that median (by the ranks of a sign test, no distribution assumed).
        ratio_high: its upper end.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int
    ratio: float
    ratio_low: float
    ratio_high: float


def measure(
    model: nn.Module,
    make_inputs: Callable[[int], Any],
    *,
    batches: Sequence[int] = (1, 32),
    repeats: int = 30,
    warmup: int = 3,
) -> dict[int, Latency]:
    """Latency of one model by batch size; arguments as for :func:`measure_together`."""
    return measure_together({"model": model}, make_inputs, batches=batches, repeats=repeats, warmup=warmup)["model"]


def measure_together(
    models: Mapping[str, nn.Module],
    make_inputs: Callable[[int], Any],
    *,
    batches: Sequence[int] = (1, 32),
    repeats: int = 30,
    warmup: int = 3,
) -> dict[str, dict[int, Latency]]:
    """Latency of several models, interleaved: one pass of each, then the next round, which begins with the next model.

    Args:
        models: the models by name, in evaluation mode for the time of the measurement.
        make_inputs: batch size -> inputs on the models' device: a tensor, a tuple or a mapping.
        batches: batch sizes.
        repeats: timed rounds for each batch size.
        warmup: rounds before them that are not timed.

    Returns:
        ``{name: {batch: Latency}}``

    Raises:
        ConfigError: fewer than one repeat, a negative warm-up or a batch size below one.
    """
    if repeats < 1 or warmup < 0 or min(batches, default=1) < 1:
        raise ConfigError(
            f"latency needs repeats >= 1, warmup >= 0 and batches >= 1, "
            f"got repeats={repeats}, warmup={warmup}, batches={list(batches)}"
        )
    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    measured: dict[str, dict[int, Latency]] = {name: {} for name in models}
    names = list(models)
    try:
        for model in models.values():
            model.eval()
        for batch in batches:
            inputs = ModelInputs.of(make_inputs(batch))
            times: dict[str, list[float]] = {name: [] for name in models}
            for round_ in range(warmup + repeats):
                for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                    milliseconds = _time(models[name], inputs)
                    if round_ >= warmup:
                        times[name].append(milliseconds)
            first = next(iter(times.values()), [])
            for name, taken in times.items():
                measured[name][batch] = _summary(taken, first)
    finally:
        for module, training in modes:
            module.training = training
    return measured


@torch.inference_mode()
def _time(model: nn.Module, inputs: ModelInputs) -> float:
    """Milliseconds of one pass, the work on the device included."""
    _wait(inputs)
    start = time.perf_counter()
    inputs.call(model)
    _wait(inputs)
    return (time.perf_counter() - start) * 1e3


def _wait(inputs: ModelInputs) -> None:
    for device in {tensor.device for tensor in inputs.tensors().values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)


def _summary(taken: list[float], first: list[float]) -> Latency:
    shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    times = torch.tensor(taken, dtype=torch.float64)
    p10, median, p90 = times.quantile(shares).tolist()
    ratios = (torch.tensor(first, dtype=torch.float64) / times).sort().values
    count = len(taken)
    rank = max(0, int(count / 2 - 0.98 * count**0.5))  # 1.96 standard deviations of a binomial count of one half
    ratio, low, high = float(ratios.quantile(0.5)), float(ratios[rank]), float(ratios[count - 1 - rank])
    return Latency(median, p10, p90, count, ratio, low, high)
