"""A pruner that cannot be made before the length of training is known: what every callback holds."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from tritprune.errors import ConfigError
from tritprune.pruners import Pruner, get_pruner, pruners
from tritprune.schedules import resolve_steps


class LatePruner:
    """Settings of a pruner whose steps may be fractions of training or epochs; or a pruner that is there already.

    Args:
        callback: the callback's name, for messages.
        pruner: a registered name, or a pruner.
        settings: its settings.

    Raises:
        UnknownNameError: no pruner of that name.
        ConfigError: settings beside a pruner that has its own.
    """

    def __init__(self, callback: str, pruner: str | Pruner, settings: Mapping[str, Any]) -> None:
        if isinstance(pruner, Pruner) and settings:
            raise ConfigError(
                f"{callback} was given a pruner, which has its own settings, and also {', '.join(settings)}"
            )
        if not isinstance(pruner, Pruner):
            pruners.get(pruner)
        self._pruner, self._settings = pruner, dict(settings)

    def make(self, model: nn.Module, *, total_steps: int | None, steps_per_epoch: int | None, total_is: str) -> Pruner:
        """The pruner of a training.

        Args:
            model: what is trained.
            total_steps: optimizer steps of all of it; None: not known.
            steps_per_epoch: optimizer steps of an epoch; None: not known.
            total_is: what the user calls ``total_steps``.

        Raises:
            ConfigError: a step past the end, one that cannot be resolved, or anything that the pruner refuses.
        """
        if isinstance(self._pruner, Pruner):
            if total_steps is not None and self._pruner.final_step > total_steps:
                raise ConfigError(
                    f"the pruner's end_step={self._pruner.final_step} is past the end of training, "
                    f"{total_is}={total_steps}"
                )
            return self._pruner
        lengths: dict[str, Any] = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
        return get_pruner({"name": self._pruner, **resolve_steps(self._settings, **lengths, total_is=total_is)}, model)


def unfinished(pruner: Pruner) -> str | None:
    """A sentence if training has ended before the last mask update."""
    if pruner.step >= pruner.final_step:
        return None
    return (
        f"training ended after {pruner.step} optimizer steps, before the last mask update at {pruner.final_step}: "
        f"sparsity is {pruner.current_sparsity_ratio:.4f}, not {pruner.target_sparsity_ratio:g}"
    )
