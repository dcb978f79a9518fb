"""Neural Compressor 2.x pruning configs, as they are. docs/neural_compressor.md shows both side by side.

pruner = tritprune.from_neural_compressor("my_nc.yaml", model).attach(optimizer)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tritprune.criteria import Criterion
from tritprune.errors import ConfigError
from tritprune.neural_compressor.reading import WeightPruningConfig, read
from tritprune.neural_compressor.translate import Length, translate
from tritprune.pruners import Pruner, get_pruner, pruners
from tritprune.pruners.layers import take_inventory


def from_neural_compressor(
    config: Any,
    model: nn.Module,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    criterion: str | Mapping[str, Any] | Criterion | None = None,
    seed: int = 0,
) -> Pruner:
    """The pruner that a Neural Compressor config describes; every key is honoured or refused by name.

    Args:
        config: a mapping, the path of a yaml file, or their ``WeightPruningConfig``. It is not changed.
        model: whose layers are pruned.
        total_steps: optimizer steps of training, where the config has fractions of it.
        steps_per_epoch: optimizer steps of an epoch, where the config has epochs.
        criterion: instead of the config's, in every group (for a random control).
        seed: for criteria that draw random numbers.

    Raises:
        ConfigError: an unknown key, one that cannot be honoured, a layer in two groups, pruning types that need pruners
            of different kinds, or anything that :class:`Pruner` refuses.

    Example:
        >>> pruner = from_neural_compressor({"pattern": "2:4", "target_sparsity": 0.5, "end_step": 100}, model)
        ... # doctest: +SKIP
    """
    shared, groups = read(config)
    inventory = take_inventory(model)
    length = Length(total_steps, steps_per_epoch)
    translated = [translate(shared, group, model, inventory, length) for group in groups]
    kinds = {kind for kind, _ in translated}
    if len(kinds) > 1:
        told = ", ".join(
            f"pruning_configs[{number}] needs pruner '{kind}'" for number, (kind, _) in enumerate(translated)
        )
        raise ConfigError(
            f"one config holds pruners of several kinds: {told}; make one config of each kind and attach both pruners "
            "to the optimizer (a layer can be in one of them only)"
        )
    kind = kinds.pop()
    settings = [settings if criterion is None else {**settings, "criterion": criterion} for _, settings in translated]
    values: dict[str, Any] = {"name": kind, "seed": seed}
    if len(settings) == 1:
        return get_pruner({**values, **settings[0]}, model=model)
    named = [{"name": f"pruning_configs[{number}]", **group} for number, group in enumerate(settings)]
    ends = {"end_step": max(group["end_step"] for group in settings)} if "end_step" in settings[0] else {}
    return get_pruner({**values, **ends, "groups": named}, model=model)


def prepare_pruning(model: nn.Module, config: Any, optimizer: torch.optim.Optimizer, **length: Any) -> Pruner:
    """Neural Compressor's function of this name: the pruner, attached to the optimizer. Nothing is patched.

    Args:
        model: whose layers are pruned.
        config: as for :func:`from_neural_compressor`.
        optimizer: whose steps count.
        length: ``total_steps`` and ``steps_per_epoch``.

    Raises:
        ConfigError: as :func:`from_neural_compressor` and :meth:`Pruner.attach`.
    """
    return from_neural_compressor(config, model, **length).attach(optimizer)


@pruners.register("neural_compressor")
def neural_compressor_pruner(model: nn.Module, *, config: Any = None, **arguments: Any) -> Pruner:
    """:func:`from_neural_compressor` for the command line: ``pruner=neural_compressor pruner.config=my_nc.yaml``.

    Args:
        model: whose layers are pruned.
        config: the path of a yaml file, or its contents.
        arguments: as for :func:`from_neural_compressor`.

    Raises:
        ConfigError: no config, or as :func:`from_neural_compressor`.
    """
    if not config:
        raise ConfigError("pruner neural_compressor needs the file: pruner.config=my_nc.yaml")
    return from_neural_compressor(config, model, **arguments)


__all__ = ["WeightPruningConfig", "from_neural_compressor", "prepare_pruning"]
