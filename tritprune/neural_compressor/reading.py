"""A Neural Compressor config in any of its forms -> one flat mapping of keys per layer group."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tritprune.errors import ConfigError
from tritprune.neural_compressor.keys import KEYS, check_keys


class WeightPruningConfig:
    """Neural Compressor's class of this name: keys that hold for all layers, and ``pruning_configs`` for some.

    Args:
        pruning_configs: one mapping per layer group over the other keys; None: one group.
        keys: see :data:`~tritprune.neural_compressor.keys.KEYS`.

    Raises:
        ConfigError: an unknown key, or one that cannot be honoured.
    """

    def __init__(self, pruning_configs: Sequence[Mapping[str, Any]] | None = None, **keys: Any) -> None:
        check_keys("WeightPruningConfig", keys)
        self.pruning_configs = [dict(group) for group in pruning_configs or [{}]]
        self.weight_compression = dict(keys)


class _Loader(yaml.SafeLoader):
    """Reads the tags ``!Pruner`` and ``!PrunerV2`` as plain mappings."""


def _plain(loader: _Loader, node: Any) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


for _tag in ("!Pruner", "!PrunerV2"):
    _Loader.add_constructor(_tag, _plain)


def read(config: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The shared keys, and those of every layer group over them. ``config`` is left as it is.

    Args:
        config: a mapping, the path of a yaml file, or an object such as their ``WeightPruningConfig``. A mapping may
            hold the keys themselves or ``pruning: approach: weight_compression_v2:``, and the groups as
            ``pruning_configs`` or, in their yaml files, ``pruners``.

    Raises:
        ConfigError: none of these, an unknown key, or one that cannot be honoured.
    """
    if isinstance(config, str | os.PathLike):
        config = _from_file(Path(config))
    shared = _mapping(config, "the config")
    shared = _section(shared)
    groups = shared.pop("pruning_configs", None) or [{}]
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise ConfigError(f"pruning_configs is a list of mappings, got {groups!r}")
    check_keys("the Neural Compressor config", shared)
    own = [_mapping(group, f"pruning_configs[{number}]") for number, group in enumerate(groups)]
    for number, group in enumerate(own):
        check_keys(f"pruning_configs[{number}]", group)
    return shared, own


def resolve(shared: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Every key of one layer group: its own value, else the shared one, else the default; None counts as not given.

    ``reg_coeff`` and ``parameters: {reg_coeff: ...}`` are one setting; the nearest one given holds.

    Raises:
        ConfigError: ``reg_coeff`` is given twice on one level.
    """
    levels = [_with_parameters(level) for level in (group, shared)]
    values: dict[str, Any] = {}
    for key in KEYS:
        given = (level[key.name] for level in levels if level.get(key.name) is not None)
        values[key.name] = next(given, copy.deepcopy(key.default))
    return values


def _with_parameters(level: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(level)
    parameters = values.pop("parameters", None) or {}
    unknown = set(_mapping(parameters, "parameters")) - {"reg_coeff"}
    if unknown:
        raise ConfigError(f"parameters has no key '{sorted(unknown)[0]}'; known: reg_coeff")
    inner, outer = parameters.get("reg_coeff"), values.get("reg_coeff")
    if inner is not None and outer is not None and inner != outer:
        raise ConfigError(f"reg_coeff is {outer} and parameters.reg_coeff is {inner}; give one of them")
    if outer is None:
        values["reg_coeff"] = inner
    return values


def _from_file(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"cannot read the Neural Compressor config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no yaml: {error}") from error


def _mapping(value: Any, what: str) -> dict[str, Any]:
    """A copy of a mapping, or of the keys that one of their objects holds."""
    if isinstance(value, Mapping):
        return {str(key): copy.deepcopy(item) for key, item in value.items()}
    for attribute in ("weight_compression", "pruner_config"):
        held = getattr(value, attribute, None)
        if isinstance(held, Mapping):
            beside = ("pruning_configs", "backend")
            more = {name: getattr(value, name) for name in beside if getattr(value, name, None) is not None}
            return _mapping({**held, **more}, what)
    if hasattr(value, "__dict__") and not isinstance(value, type) and vars(value):
        return _mapping(vars(value), what)
    raise ConfigError(f"{what} must be a mapping, a yaml file or a WeightPruningConfig, got {type(value).__name__}")


def _section(config: dict[str, Any]) -> dict[str, Any]:
    """The pruning keys of a yaml file that may hold more."""
    if "pruning" not in config:
        return config
    approach = _mapping(_mapping(config["pruning"], "pruning").get("approach", {}), "pruning.approach")
    for name in ("weight_compression_v2", "weight_compression_pytorch", "weight_compression"):
        if name in approach:
            section = _mapping(approach[name], f"pruning.approach.{name}")
            if "pruners" in section:
                section["pruning_configs"] = section.pop("pruners")
            return section
    raise ConfigError(f"pruning.approach has no weight_compression_v2; it has {', '.join(approach) or 'nothing'}")
