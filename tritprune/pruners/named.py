"""Pruners that are called by what they choose: :class:`Pruner` with one setting fixed.

| name | is |
|---|---|
| magnitude | ``iterative`` with criterion ``magnitude`` |
| snip | ``iterative`` with criterion ``snip`` |
| snip_momentum | ``iterative`` with criterion ``snip_momentum`` |
| block_mask | ``iterative`` with criterion ``snip_momentum_block`` |
| heads | ``iterative`` with pattern ``heads`` |
"""

from typing import Any, ClassVar

from torch import nn

from tritprune.errors import ConfigError
from tritprune.pruners.base import Pruner, register_pruner
from tritprune.pruners.settings import check_groups
from tritprune.registry import check_arguments


class NamedPruner(Pruner):
    """A pruner one of whose settings is in its name.

    Attributes:
        fixes: the setting and its value.
        called: its registered name, for messages.

    Raises:
        ConfigError: the fixed setting is given, shared or in a group, or anything that :class:`Pruner` refuses.
    """

    fixes: ClassVar[dict[str, str]] = {}
    called: ClassVar[str] = ""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        check_arguments(f"pruner '{self.called}'", Pruner, {"model": model, **settings})
        groups = settings.get("groups")
        check_groups(groups)
        for key, value in self.fixes.items():
            for given in (settings, *(groups or ())):
                if given.get(key, value) != value:
                    raise ConfigError(
                        f"pruner '{self.called}' is pruner 'iterative' with {key} '{value}', got {key} "
                        f"{given[key]!r}; pruner 'iterative' takes any"
                    )
        super().__init__(model, **{**settings, **self.fixes})


@register_pruner("magnitude")
class MagnitudePruner(NamedPruner):
    """Prunes along the schedule what has the smallest ``abs(w)``."""

    fixes: ClassVar[dict[str, str]] = {"criterion": "magnitude"}
    called: ClassVar[str] = "magnitude"


@register_pruner("snip")
class SnipPruner(NamedPruner):
    """Prunes along the schedule what has the smallest ``abs(w g)`` (Lee et al. 2019, arXiv:1810.02340)."""

    fixes: ClassVar[dict[str, str]] = {"criterion": "snip"}
    called: ClassVar[str] = "snip"


@register_pruner("snip_momentum")
class SnipMomentumPruner(NamedPruner):
    """Prunes along the schedule what has the smallest ``S``, ``S <- 0.9 S + abs(w g)``."""

    fixes: ClassVar[dict[str, str]] = {"criterion": "snip_momentum"}
    called: ClassVar[str] = "snip_momentum"


@register_pruner("block_mask")
class BlockMaskPruner(NamedPruner):
    """Prunes along the schedule what has the smallest ``S``, ``S <- 0.9 S + abs(sum_unit w g)``.

    The sum of ``w g`` over a unit is the gradient of the loss with respect to the unit's mask.
    """

    fixes: ClassVar[dict[str, str]] = {"criterion": "snip_momentum_block"}
    called: ClassVar[str] = "block_mask"


@register_pruner("heads")
class HeadPruner(NamedPruner):
    """Prunes whole attention heads along the schedule: query, key, value rows and output columns together."""

    fixes: ClassVar[dict[str, str]] = {"pattern": "heads"}
    called: ClassVar[str] = "heads"
