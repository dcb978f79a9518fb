"""Everything at once: one mask update, then training goes on with fixed masks."""

from typing import Any

from torch import nn

from tritprune.errors import ConfigError
from tritprune.pruners.base import Pruner, register_pruner
from tritprune.registry import check_arguments


@register_pruner("one_shot")
class OneShotPruner(Pruner):
    """Asks for the whole target at ``start_step``; the schedule has nothing to decide.

    Args:
        model: as for :class:`Pruner`.
        start_step: the only mask update, after this many optimizer steps; 0 prunes in :meth:`attach`, which needs a
            criterion without gradients.
        end_step: None, or ``start_step``.
        settings: as for :class:`Pruner`.

    Raises:
        ConfigError: ``end_step`` after ``start_step``, or anything that :class:`Pruner` refuses.
    """

    def __init__(self, model: nn.Module, *, start_step: int = 1, end_step: int | None = None, **settings: Any) -> None:
        if end_step is not None and end_step != start_step:
            raise ConfigError(
                f"one_shot prunes once: end_step={end_step} must be start_step={start_step}; "
                "the iterative pruner has a start and an end"
            )
        check_arguments("pruner 'one_shot'", Pruner, {"model": model, "end_step": start_step, **settings})
        super().__init__(model, start_step=start_step, end_step=start_step, **settings)
