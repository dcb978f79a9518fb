"""Pruners by name."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from tritprune.pruners.spec_names import by_modules
from tritprune.registry import Registry

if TYPE_CHECKING:
    from tritprune.pruners.base import Pruner

P = TypeVar("P", bound="type[Pruner]")

pruners: "Registry[Pruner]" = Registry("pruner")
"""Pruners by name."""


def register_pruner(name: str) -> Callable[[P], P]:
    """Class decorator: files a pruner under ``name``.

    Raises:
        ConfigError: the name is taken.
    """
    return pruners.register(name)


def get_pruner(
    config: str | Mapping[str, Any], modules: nn.Module | Mapping[str, nn.Module] | None = None, **arguments: Any
) -> "Pruner":
    """Make the pruner that ``config`` names, ``"iterative"`` or ``{"name": "one_shot", **settings}``.

    Args:
        config: a name, or a mapping with ``name`` and settings. It may change places with ``modules``.
        modules: the model, or ``{dotted name: layer}`` of exactly the layers to prune.
        arguments: more of its arguments; ``model`` instead of ``modules``.

    Raises:
        UnknownNameError: unknown name; the message lists the known ones.
        ConfigError: an unknown or missing setting, or one out of range.
    """
    settings, model = by_modules(config, modules)
    return pruners.build(settings, **({} if model is None else {"model": model}), **arguments)
