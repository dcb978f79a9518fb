"""What the training loop can be told, checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

from tritprune.errors import ConfigError
from tritprune.registry import check_arguments, did_you_mean
from tritprune.schedules import resolve_step

PRECISIONS = ("fp32", "bf16", "fp16")
LR_SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "sgd")
DEVICES = ("auto", "cpu", "cuda")

T = TypeVar("T")


@dataclass(frozen=True)
class Phase:
    """One training phase: the dense fine-tuning, or pruning and recovery together.

    Args:
        steps: optimizer steps.
        lr: peak learning rate.
        warmup: fraction of ``steps`` over which the rate rises linearly from 0.
        lr_schedule: after the warm-up: ``linear`` or ``cosine`` decay to 0, or ``constant``.
        optimizer: ``adamw`` or ``sgd`` (momentum 0.9).
        weight_decay: decoupled weight decay, not applied to biases and norms.
    """

    steps: int
    lr: float
    warmup: float = 0.05
    lr_schedule: str = "linear"
    optimizer: str = "adamw"
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        if self.lr <= 0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup is a fraction of the steps, in [0, 1], got {self.warmup}")
        _one_of("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)

    def lr_factor(self, done: int) -> float:
        """The share of the peak rate at which the step after ``done`` steps is taken."""
        warm = round(self.warmup * self.steps)
        if done < warm:
            return (done + 1) / warm
        progress = (done - warm) / max(1, self.steps - warm)
        if self.lr_schedule == "linear":
            return 1 - progress
        if self.lr_schedule == "cosine":
            return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress, dtype=torch.float64)).item())
        return 1.0


@dataclass(frozen=True)
class Distillation:
    """Knowledge distillation from the dense model (Hinton et al. 2015, arXiv:1503.02531, section 2).

    loss = (1 - weight) * task loss + weight * T^2 * KL(softmax(teacher / T) || softmax(student / T))

    Args:
        weight: 0 turns it off, 1 ignores the labels.
        temperature: T.
    """

    weight: float = 0.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"training.distillation.weight must be in [0, 1], got {self.weight}")
        if self.temperature <= 0:
            raise ConfigError(f"training.distillation.temperature must be above 0, got {self.temperature}")


@dataclass(frozen=True)
class TrainingSettings:
    """Everything about training but the task and the pruner.

    Args:
        dense: the fine-tuning that gives the dense model.
        prune: pruning and recovery together; the pruner's last mask update parts the two.
        after_slim: optimizer steps, or ``"2ep"``, with which ``prune`` goes on in the slim model: one learning rate
            schedule over both.
        batch_size: examples per optimizer step, over all processes and micro-batches.
        accumulate: micro-batches per optimizer step and process.
        clip: largest norm of the gradient; null for no clipping.
        precision: ``fp32``, or autocast to ``bf16`` or ``fp16`` (with loss scaling).
        distillation: from the dense model while pruning and recovering.
        eval_every: steps between evaluations; each stage also ends with one.
        checkpoint_every: steps between checkpoints; each stage and a signal also save one.
        log_every: steps between lines in the curves.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads; null leaves torch's choice.
        latency_batches: batch sizes at which the models are timed.
        latency_repeats: timed forward passes per model and batch size.
    """

    dense: Phase
    prune: Phase
    after_slim: int | str = 0
    batch_size: int = 16
    accumulate: int = 1
    clip: float | None = 1.0
    precision: str = "fp32"
    distillation: Distillation = field(default_factory=Distillation)
    eval_every: int = 50
    checkpoint_every: int = 50
    log_every: int = 1
    device: str = "auto"
    threads: int | None = None
    latency_batches: tuple[int, ...] = (1, 32)
    latency_repeats: int = 30

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "eval_every", "checkpoint_every", "log_every", "latency_repeats"):
            _at_least(name, getattr(self, name), 1)
        _check_after_slim(self.after_slim)
        if self.batch_size % self.accumulate:
            raise ConfigError(
                "training.batch_size must be a multiple of training.accumulate, "
                f"got {self.batch_size} and {self.accumulate}"
            )
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"training.clip must be above 0 or null, got {self.clip}")
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("device", self.device, DEVICES)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "training.device=cuda was asked for, but torch finds no CUDA device here "
                f"(torch {torch.__version__}); use training.device=auto or cpu"
            )
        if self.precision == "fp16" and self.resolve_device() == "cpu":
            raise ConfigError(
                "training.precision=fp16 needs a GPU (loss scaling on the CPU is slow and pointless); use bf16"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TrainingSettings":
        """Build from a nested mapping.

        Raises:
            ConfigError: an unknown or missing key, or a value out of range.
        """
        values = dict(config)
        for name, kind in (("dense", Phase), ("prune", Phase), ("distillation", Distillation)):
            if name in values:
                values[name] = _build(f"training.{name}", kind, values[name])
        if "latency_batches" in values:
            values["latency_batches"] = tuple(values["latency_batches"])
        return _build("training", cls, values)

    def steps_after_slim(self, n_train: int) -> int:
        """Optimizer steps after slimming, with ``n_train`` training examples."""
        return resolve_step(self.after_slim, steps_per_epoch=max(1, n_train // self.batch_size))

    def prune_and_after(self, n_train: int) -> Phase:
        """The phase of pruning and recovery with the steps after slimming, over which its schedule runs."""
        return replace(self.prune, steps=self.prune.steps + self.steps_after_slim(n_train))

    def resolve_device(self) -> str:
        """``cuda`` or ``cpu``."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


def _build(what: str, kind: type[T], values: Mapping[str, Any]) -> T:
    check_arguments(what, kind, values)
    for item in fields(kind):  # type: ignore[arg-type]
        accepted = {int: int, float: int | float}.get(item.type)  # type: ignore[arg-type]
        if accepted is None or item.name not in values:
            continue
        value = values[item.name]
        if isinstance(value, bool) or not isinstance(value, accepted):
            kind_of_number = "whole number" if item.type is int else "number"
            raise ConfigError(f"{what}.{item.name} must be a {kind_of_number}, got {value!r}")
    return kind(**values)


def _check_after_slim(value: int | str) -> None:
    try:
        good = not isinstance(value, float) and resolve_step(value, steps_per_epoch=1) >= 0
    except ConfigError:
        good = False
    if not good:
        raise ConfigError(f"training.after_slim is a number of optimizer steps, or of epochs as in 2ep, got {value!r}")


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name} '{value}'; {did_you_mean(str(value), known)}")
