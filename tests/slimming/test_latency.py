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
    turn = [("dense", 1, False, True), ("slim", 1, False, True)]
    assert log == turn * 3 + [(name, 4, evaluating, inference) for name, _, evaluating, inference in turn] * 3
    assert list(measured) == ["dense", "slim"]
    assert list(measured["dense"]) == [1, 4]
    assert all(model.training for model in models.values())


def test_percentiles(monkeypatch):
    clock = iter(value for taken in [9.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11] for value in (0.0, taken))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    found = measure(nn.Identity(), torch.ones, batches=(1,), repeats=11, warmup=1)[1]
    assert (found.p10_ms, found.median_ms, found.p90_ms, found.repeats) == (2000.0, 6000.0, 10000.0, 11)


def test_real_times_are_positive():
    found = measure(nn.Linear(8, 8), lambda batch: {"input": torch.rand(batch, 8)}, batches=(2,), repeats=3)[2]
    assert 0 < found.p10_ms <= found.median_ms <= found.p90_ms


@pytest.mark.parametrize("settings", [{"repeats": 0}, {"warmup": -1}, {"batches": (0,)}])
def test_bad_settings(settings):
    with pytest.raises(ConfigError, match="latency needs repeats >= 1"):
        measure(nn.Identity(), torch.ones, **settings)
