import pytest
import torch

from tritprune.errors import ConfigError
from tritprune.training.settings import Distillation, Phase, TrainingSettings

PHASES = {"dense": {"steps": 4, "lr": 0.1}, "prune": {"steps": 4, "lr": 0.1}}


def test_nested_mappings_become_settings():
    settings = TrainingSettings.from_config(
        {**PHASES, "distillation": {"weight": 0.7}, "batch_size": 8, "latency_batches": [1, 2]}
    )
    assert settings.dense == Phase(steps=4, lr=0.1)
    assert settings.distillation == Distillation(weight=0.7, temperature=2.0)
    assert settings.latency_batches == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batchsize": 8}, r"training has no key 'batchsize'; did you mean 'batch_size'\?"),
        (
            {"dense": {"steps": 4, "lr": 0.1, "warm_up": 1}},
            r"training.dense has no key 'warm_up'; did you mean 'warmup'",
        ),
        ({"dense": {"steps": 4}}, "training.dense needs lr"),
        ({"dense": {"steps": 0, "lr": 0.1}}, "steps must be at least 1, got 0"),
        ({"dense": {"steps": "many", "lr": 0.1}}, "training.dense.steps must be a whole number, got 'many'"),
        ({"dense": {"steps": 4, "lr": -1.0}}, "lr must be above 0, got -1.0"),
        ({"dense": {"steps": 4, "lr": 0.1, "lr_schedule": "cosin"}}, "did you mean 'cosine'"),
        ({"dense": {"steps": 4, "lr": 0.1, "optimizer": "adam"}}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"batch_size": 10, "accumulate": 4}, "multiple of training.accumulate, got 10 and 4"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"clip": 0.0}, "clip must be above 0 or null"),
        ({"distillation": {"weight": 1.5}}, r"in \[0, 1\], got 1.5"),
        ({"distillation": {"temperature": 0.0}}, "above 0, got 0.0"),
    ],
)
def test_what_is_wrong_is_named_with_choices_or_numbers(change, message):
    with pytest.raises(ConfigError, match=message):
        TrainingSettings.from_config({**PHASES, **change})


def test_cuda_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device here"):
        TrainingSettings.from_config({**PHASES, "device": "cuda"})
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        TrainingSettings.from_config({**PHASES, "precision": "fp16"})


def test_learning_rates_warm_up_and_decay():
    linear = Phase(steps=10, lr=1.0, warmup=0.2)
    assert [linear.lr_factor(i) for i in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    cosine = Phase(steps=10, lr=1.0, warmup=0.0, lr_schedule="cosine")
    assert cosine.lr_factor(0) == pytest.approx(1.0)
    assert cosine.lr_factor(5) == pytest.approx(0.5)
    constant = Phase(steps=10, lr=1.0, warmup=0.0, lr_schedule="constant")
    assert constant.lr_factor(9) == 1.0
