"""Everything at once: one mask update, then training goes on with fixed masks."""

from typing import Any

from torch import nn

from tritprune.errors import ConfigError
from tritprune.pruners.base import Pruner, register_pruner
from tritprune.pruners.settings import check_groups
from tritprune.registry import check_arguments


@register_pruner("one_shot")
class OneShotPruner(Pruner):
    """Asks for the whole target at ``start_step``. Its schedule is ``one_shot``, whatever ``schedule`` says.

    Args:
        model: as for :class:`Pruner`.
        start_step: the mask update, after this many optimizer steps; 0 prunes in :meth:`attach`, which needs a
            criterion without gradients.
        end_step: with ``regrow``, masks are updated until then, at the same sparsity; without it nothing could change
            any more, and the last mask update is that of ``start_step``.
        settings: as for :class:`Pruner`.

    Raises:
        ConfigError: ``end_step`` before ``start_step``, or anything that :class:`Pruner` refuses.
    """

    def __init__(self, model: nn.Module, *, start_step: int = 1, end_step: int | None = None, **settings: Any) -> None:
        check_arguments("pruner 'one_shot'", Pruner, {"model": model, "end_step": end_step, **settings})
        groups = settings.pop("groups", None)
        check_groups(groups)
        shared = {"start_step": start_step, "end_step": end_step, "regrow": settings.pop("regrow", False)}
        at_once = [
            {**group, **_times(**{key: group.get(key, shared[key]) for key in shared})} for group in groups or ()
        ]
        super().__init__(model, **{**settings, **_times(**shared)}, groups=at_once or None)


def _times(start_step: int, end_step: int | None, regrow: bool) -> dict[str, Any]:
    end = start_step if end_step is None else end_step
    if end < start_step:
        raise ConfigError(f"end_step={end} is before start_step={start_step}")
    return {
        "start_step": start_step,
        "end_step": end if regrow else start_step,
        "regrow": regrow,
        "schedule": "one_shot",
    }
