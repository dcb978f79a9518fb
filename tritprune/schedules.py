"""When to prune and how much: step -> sparsity, pure arithmetic.

A :class:`Schedule` maps progress ``x`` in [0, 1] to a sparsity between ``i`` (initial) and ``a`` (target);
:class:`PruneTimes` says at which optimizer steps masks are updated and what ``x`` is there.

| name | sparsity at progress x |
|---|---|
| linear | ``i + (a - i) x`` |
| cos | ``i + (a - i) (1 - cos(pi x / 2))`` |
| exp | ``1 - (1 - i) ((1 - a) / (1 - i))^x``: the same share of what is left goes at every step |
| cube | ``i + (a - i) x^3``: slow start, most goes at the end |
| cubic | ``a + (i - a) (1 - x)^3``: fast start, most goes early (Zhu and Gupta 2017, arXiv:1710.01878, equation 1) |
| one_shot | ``a`` |
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar, cast

from tritprune.errors import ConfigError
from tritprune.registry import Registry

S = TypeVar("S", bound="type[Schedule]")


class Schedule(ABC):
    """A curve from the initial to the target sparsity. A schedule of your own overrides :meth:`curve`.

    Example:
        >>> get_schedule("cubic").sparsity(0.5, initial=0.0, target=0.8)
        0.7
    """

    def sparsity(self, x: float, initial: float = 0.0, target: float = 1.0) -> float:
        """The sparsity asked for at progress ``x``: exactly ``initial`` at 0 and exactly ``target`` at 1.

        Args:
            x: progress; values outside [0, 1] count as the nearer end.
            initial: sparsity at ``x = 0``, a fraction of zeros in [0, 1).
            target: sparsity at ``x = 1``.
        """
        if x >= 1:
            return target
        return initial if x <= 0 else self.curve(x, initial, target)

    @abstractmethod
    def curve(self, x: float, initial: float, target: float) -> float:
        """The sparsity at ``0 < x < 1``."""


schedules: Registry[Schedule] = Registry("schedule")
"""Schedules by name."""


def register_schedule(name: str) -> Callable[[S], S]:
    """Class decorator: files a schedule under ``name``.

    Raises:
        ConfigError: the name is taken.
    """
    return schedules.register(name)


def get_schedule(config: str | Mapping[str, Any] | Schedule) -> Schedule:
    """The schedule that ``config`` names: ``"cubic"``, ``{"name": "cubic"}``, or a schedule as it is.

    Raises:
        UnknownNameError: unknown name; the message lists the known ones.
        ConfigError: unknown argument.
    """
    return config if isinstance(config, Schedule) else schedules.build(config)


@register_schedule("linear")
class Linear(Schedule):
    """``i + (a - i) x``."""

    def curve(self, x: float, initial: float, target: float) -> float:
        """The sparsity at ``0 < x < 1``."""
        return initial + (target - initial) * x


@register_schedule("cos")
class Cosine(Schedule):
    """``i + (a - i) (1 - cos(pi x / 2))``."""

    def curve(self, x: float, initial: float, target: float) -> float:
        """The sparsity at ``0 < x < 1``."""
        return initial + (target - initial) * (1 - math.cos(math.pi * x / 2))


@register_schedule("exp")
class Exponential(Schedule):
    """``1 - (1 - i) ((1 - a) / (1 - i))^x``."""

    def curve(self, x: float, initial: float, target: float) -> float:
        """The sparsity at ``0 < x < 1``."""
        return 1 - (1 - initial) * ((1 - target) / (1 - initial)) ** x


@register_schedule("cube")
class Cube(Schedule):
    """``i + (a - i) x^3``: slow start. Not ``cubic``, which starts fast."""

    def curve(self, x: float, initial: float, target: float) -> float:
        """The sparsity at ``0 < x < 1``."""
        return initial + (target - initial) * x**3


@register_schedule("cubic")
class Cubic(Schedule):
    """``a + (i - a) (1 - x)^3``: fast start (Zhu and Gupta 2017, arXiv:1710.01878, equation 1)."""

    def curve(self, x: float, initial: float, target: float) -> float:
        """The sparsity at ``0 < x < 1``."""
        return target + (initial - target) * (1 - x) ** 3


@register_schedule("one_shot")
class OneShot(Schedule):
    """``a`` from the first prune step on."""

    def sparsity(self, x: float, initial: float = 0.0, target: float = 1.0) -> float:
        """The target, whatever ``x``."""
        return self.curve(x, initial, target)

    def curve(self, x: float, initial: float, target: float) -> float:
        """The target."""
        return target


@dataclass(frozen=True)
class PruneTimes:
    """The optimizer steps at which masks are updated.

    The first is ``start``, then every ``frequency`` steps, the last is ``end`` (whether or not ``frequency`` divides
    the way there).

    Args:
        start: first prune step; 0 is before the first optimizer step.
        end: last prune step.
        frequency: optimizer steps between two.

    Raises:
        ConfigError: ``end`` before ``start``, ``frequency`` below 1, a negative or non-integer step.
    """

    start: int
    end: int
    frequency: int = 1

    def __post_init__(self) -> None:
        for name, value in (("start_step", self.start), ("end_step", self.end), ("frequency", self.frequency)):
            if type(value) is not int:
                raise ConfigError(
                    f"{name} must be a whole number of optimizer steps, got {value!r}; fractions of training and "
                    "epochs become steps through tritprune.schedules.resolve_step"
                )
        if self.start < 0:
            raise ConfigError(f"start_step must be at least 0, got {self.start}")
        if self.end < self.start:
            raise ConfigError(f"end_step={self.end} is before start_step={self.start}")
        if self.frequency < 1:
            raise ConfigError(f"frequency must be at least 1 optimizer step, got {self.frequency}")

    @property
    def last(self) -> int:
        """The last prune step."""
        return self.end

    def due(self, step: int) -> bool:
        """Whether masks are updated after ``step`` optimizer steps."""
        if not self.start <= step <= self.end:
            return False
        return (step - self.start) % self.frequency == 0 or step == self.end

    def progress(self, step: int) -> float:
        """``(step - start) / (end - start)`` within [0, 1]; 1 at the only step of a one-shot."""
        if step >= self.end:
            return 1.0
        return max(0.0, (step - self.start) / (self.end - self.start))

    def next(self, step: int) -> int | None:
        """The first prune step after ``step``; None after the last."""
        if step < self.start:
            return self.start
        if step >= self.end:
            return None
        return min(step - (step - self.start) % self.frequency + self.frequency, self.end)

    def latest(self, step: int) -> int | None:
        """The last prune step at or before ``step``; None before the first."""
        if step < self.start:
            return None
        if step >= self.end:
            return self.end
        return step - (step - self.start) % self.frequency


def resolve_step(value: object, *, total_steps: int | None = None, steps_per_epoch: int | None = None) -> int:
    """An optimizer step from what a user may write.

    ``100`` is a step, ``0.1`` a fraction of training (rounded down), ``"2ep"`` or ``"0.5ep"`` epochs.

    Args:
        value: the setting.
        total_steps: optimizer steps of the whole training; needed for fractions.
        steps_per_epoch: optimizer steps of one epoch; needed for epochs.

    Raises:
        ConfigError: none of these, a fraction outside [0, 1], or the length of training is not known.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise ConfigError(
                f"a fraction of training is in [0, 1], got {value}; write a number of steps as an integer"
            )
        return _share(str(value), total_steps, value, "total_steps")
    if isinstance(value, str):
        epochs = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*ep\s*", value)
        if epochs:
            return _share(epochs[1], steps_per_epoch, value, "steps_per_epoch")
    raise ConfigError(f"a step is 100 (optimizer steps), 0.1 (fraction of training) or '2ep' (epochs), got {value!r}")


def resolve_steps(
    settings: Mapping[str, Any],
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    total_is: str = "total_steps",
) -> dict[str, Any]:
    """A pruner's settings with ``start_step`` and ``end_step``, also those of its groups, as optimizer steps.

    Args:
        settings: of a pruner; ``groups`` may be among them.
        total_steps: optimizer steps of the whole training.
        steps_per_epoch: optimizer steps of one epoch.
        total_is: what the user calls ``total_steps``.

    Raises:
        ConfigError: as :func:`resolve_step`, or a step past the end of training.
    """
    resolved = dict(settings)
    for key in ("start_step", "end_step"):
        if resolved.get(key) is not None:
            step = resolve_step(resolved[key], total_steps=total_steps, steps_per_epoch=steps_per_epoch)
            if total_steps is not None and step > total_steps:
                raise ConfigError(f"pruner.{key}={step} is past the end of training, {total_is}={total_steps}")
            resolved[key] = step
    given = resolved.get("groups")
    groups = list(cast("Sequence[object]", given)) if isinstance(given, Sequence) else []
    if groups and all(isinstance(group, Mapping) for group in groups):
        lengths: dict[str, Any] = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "total_is": total_is}
        resolved["groups"] = [resolve_steps(cast("Mapping[str, Any]", group), **lengths) for group in groups]
    return resolved


def _share(number: str, whole: int | None, value: object, unit: str) -> int:
    if whole is None:
        raise ConfigError(f"{value!r} becomes a step only where {unit} is known")
    return int(Fraction(number) * whole)
