"""``op_names``, ``excluded_op_names`` and ``pruning_op_types`` -> exact layer names."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tritprune.errors import ConfigError
from tritprune.patterns import plain_modules
from tritprune.pruners.layers import Inventory
from tritprune.registry import did_you_mean


def choose_layers(model: nn.Module, inventory: Inventory, values: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The names of the layers of one group, and those among them that are excluded.

    An entry that is exactly the name of a module means that module and what is in it, so that ``encoder.layer.1``
    leaves ``encoder.layer.10`` alone. Any other entry is a regular expression that is searched for anywhere in a name,
    as in Neural Compressor.

    Args:
        model: whose layers they are.
        inventory: its layers.
        values: the resolved keys of the group.

    Raises:
        ConfigError: an entry is no regular expression, an entry of ``op_names`` finds no layer, or a class name of
            ``pruning_op_types`` finds only layers that cannot be pruned.
    """
    modules = dict(plain_modules(model, remove_duplicate=False))
    types = names_in("pruning_op_types", values["pruning_op_types"])
    layers = [name for name in inventory.order if _is_of(modules[name], types)]
    for word in types:
        _check_type(word, modules, inventory)
    wanted = names_in("op_names", values["op_names"])
    included: set[str] = set()
    for entry in wanted:
        found = [name for name in layers if _found("op_names", entry, name, modules)]
        if not found:
            raise ConfigError(f"op_names '{entry}' finds no layer; {did_you_mean(entry, layers[:50])}")
        included |= set(found)
    if not wanted:
        included = set(layers)
    gone = [
        name
        for name in layers
        if name in included
        and any(
            _found("excluded_op_names", entry, name, modules)
            for entry in names_in("excluded_op_names", values["excluded_op_names"])
        )
    ]
    return [name for name in layers if name in included], gone


def names_in(key: str, value: Any) -> list[str]:
    """A list of names; a bare string is one name, not a list of letters.

    Raises:
        ConfigError: something else.
    """
    if isinstance(value, str):
        return [value]
    if value is None:
        return []
    if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{key} is a list of names, got {value!r}")
    return list(value)


def _found(key: str, entry: str, name: str, modules: Mapping[str, nn.Module]) -> bool:
    if entry in modules:
        return name == entry or name.startswith(f"{entry}.")
    try:
        return re.search(entry, name) is not None
    except re.error as error:
        raise ConfigError(f"{key} '{entry}' is no regular expression: {error}") from None


def _is_of(module: nn.Module, types: Sequence[str]) -> bool:
    return any(word in type(module).__name__ for word in types)


def _check_type(word: str, modules: Mapping[str, nn.Module], inventory: Inventory) -> None:
    """A class name that finds weights to prune in theirs, and none in ours, is told."""
    known = set(inventory.order)
    of_type = [name for name, module in modules.items() if word in type(module).__name__ and hasattr(module, "weight")]
    if of_type and known.isdisjoint(of_type):
        name = of_type[0]
        raise ConfigError(
            f"pruning_op_types '{word}' finds {len(of_type)} layers such as {name} ({type(modules[name]).__name__}); "
            "Linear, Conv and Conv1D layers can be pruned"
        )
