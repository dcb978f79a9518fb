import pytest
import torch
from torch import nn

from tritprune.errors import ConfigError
from tritprune.slimming import latency
from tritprune.slimming.latency import measure, measure_together


class Watched(nn.Module):
    def __init__(self, name, log):
        super().__init__()
        self.name, self.log = name, log
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.log.append((self.name, len(x), self.training, torch.is_inference_mode_enabled()))
        return x * self.weight


def test_models_take_turns():
    log = []
    models = {"dense": Watched("dense", log), "slim": Watched("slim", log)}
    measured = measure_together(models, torch.ones, batches=(1, 4), repeats=2, warmup=1)
    order = ["dense", "slim", "slim", "dense", "dense", "slim"]  # each round begins with the next model
    assert log == [(name, batch, False, True) for batch in (1, 4) for name in order]
    assert list(measured) == ["dense", "slim"]
    assert list(measured["dense"]) == [1, 4]
    assert all(model.training for model in models.values())


def test_percentiles(monkeypatch):
    clock = iter(value for taken in [9.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] for value in (0.0, taken))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    found = measure(nn.Identity(), torch.ones, batches=(1,), repeats=11, warmup=1)[1]
    assert (found.p10_ms, found.median_ms, found.p90_ms, found.repeats) == (2000.0, 6000.0, 10000.0, 11)


def test_rounds_are_compared_each_with_itself(monkeypatch):
    """A machine that is between one and forty times as busy from round to round: half the time is half the time."""
    busy = [1, 40, 3, 1, 20, 2, 7, 1, 30, 5, 2]
    taken = [value * factor for number, factor in enumerate(busy) for value in ((2.0, 1.0), (1.0, 2.0))[number % 2]]
    taken[2 * 4 + 1] *= 3  # one round went the other way
    clock = iter(value for each in taken for value in (0.0, each))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    models = {"dense": nn.Identity(), "slim": nn.Identity()}
    found = measure_together(models, torch.ones, batches=(1,), repeats=11, warmup=0)
    assert (found["slim"][1].ratio, found["slim"][1].ratio_low, found["slim"][1].ratio_high) == (2.0, 2.0, 2.0)
    assert found["dense"][1].ratio == 1.0
    assert found["slim"][1].p90_ms > 2 * found["dense"][1].p10_ms


def test_real_times_are_positive():
    found = measure(nn.Linear(8, 8), lambda batch: {"input": torch.rand(batch, 8)}, batches=(2,), repeats=3)[2]
    assert 0 < found.p10_ms <= found.median_ms <= found.p90_ms


@pytest.mark.parametrize("settings", [{"repeats": 0}, {"warmup": -1}, {"batches": (0,)}])
def test_bad_settings(settings):
    with pytest.raises(ConfigError, match="latency needs repeats >= 1"):
        measure(nn.Identity(), torch.ones, **settings)
