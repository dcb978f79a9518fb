"""How the bare model of a saved one is made: from a class of transformers, a registered one, or any that is named."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritprune.errors import CheckpointError, ConfigError, MissingPackageError, TritpruneError
from tritprune.export.config_fields import of_no_width
from tritprune.registry import did_you_mean, models

KINDS = ("registered", "transformers", "class")
"""The kinds of builders."""


def builder_of(model: nn.Module, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How :func:`save_model` says which class a model is of: of transformers, registered, or any other.

    Args:
        model: the model.
        arguments: what its class was called with, in plain values; of no use to a transformers model.

    Raises:
        ConfigError: the class cannot be imported by name (it is local to a function), so it cannot be built again.
    """
    kind = type(model)
    package = kind.__module__.partition(".")[0]
    if package == "transformers" and getattr(import_module(package), kind.__name__, None) is kind:
        return {"kind": "transformers", "class": kind.__name__}
    given = dict(arguments or {})
    for name in models:
        if models.get(name) is kind:
            return {"kind": "registered", "name": name, "arguments": given}
    if "<locals>" in kind.__qualname__ or "." in kind.__qualname__:
        raise ConfigError(
            f"{kind.__qualname__} is defined inside of something else and cannot be imported again; "
            "define it at the top of a module"
        )
    return {"kind": "class", "class": f"{kind.__module__}.{kind.__qualname__}", "arguments": given}


def check_builder(builder: Mapping[str, Any], error: type[TritpruneError]) -> None:
    """Refuse a builder that nothing can be built from.

    Raises:
        error: the message says what is wrong with it.
        MissingPackageError: transformers is needed and not installed.
    """
    kind = builder.get("kind")
    if kind not in KINDS:
        raise error(f"unknown builder kind '{kind}'; {did_you_mean(str(kind), KINDS)}")
    if kind == "registered" and builder.get("name") not in models:
        name = str(builder.get("name"))
        raise error(f"no model is registered as '{name}'; {did_you_mean(name, models.names())}")
    if kind == "transformers":
        transformers_class(builder, error)
    if kind == "class" and not isinstance(builder.get("class"), str):
        raise error("a builder of kind 'class' names the class: {'kind': 'class', 'class': 'my_module.Net'}")


def transformers_class(builder: Mapping[str, Any], error: type[TritpruneError]) -> Any:
    """The model class that a builder of kind "transformers" names; nothing else of that library can be named."""
    try:
        library = import_module("transformers")
    except ImportError as missing:
        raise MissingPackageError(
            f"this model needs transformers ({missing}); pip install 'tritprune[hf]'"
        ) from missing
    found = getattr(library, str(builder.get("class")), None)
    if not (isinstance(found, type) and issubclass(found, library.PreTrainedModel) and found.config_class is not None):
        raise error(f"transformers {library.__version__} has no model class '{builder.get('class')}'")
    return found


def own_class(model: nn.Module, builder: Mapping[str, Any]) -> Any:
    """The transformers class that the builder names, which must be the model's.

    Raises:
        ConfigError: it is another one.
    """
    library_class = transformers_class(builder, ConfigError)
    if type(model) is not library_class:
        raise ConfigError(f"the builder makes a {library_class.__name__}, the model is a {type(model).__name__}")
    return library_class


def check_class(builder: Mapping[str, Any], plugins: Sequence[str], folder: Path) -> None:
    """Refuse a class of a module that the caller did not name.

    Raises:
        CheckpointError: the class is of another module, or is no class of that module.
    """
    module, _, name = builder["class"].rpartition(".")
    if module not in plugins:
        raise CheckpointError(
            f"the model in {folder} is a {builder['class']}; code is imported only when you ask for it: "
            f"load it with plugins=['{module}'], or with build={name}"
        )
    found = getattr(import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(f"the model in {folder} is a {builder['class']}, and '{module}' has no such class")


def build_bare(builder: Mapping[str, Any], config: Callable[[], Mapping[str, Any]], attention: str | None) -> nn.Module:
    """The bare model; the global random state stays as it is.

    Args:
        builder: how to build it.
        config: reads the configuration of a transformers model.
        attention: the attention implementation of a transformers model, or None.
    """
    with torch.random.fork_rng(devices=[]):
        if builder["kind"] == "registered":
            return models.get(builder["name"])(**builder.get("arguments", {}))
        if builder["kind"] == "class":
            module, _, name = builder["class"].rpartition(".")
            return getattr(import_module(module), name)(**builder.get("arguments", {}))
        library_class = transformers_class(builder, CheckpointError)
        made = library_class.config_class.from_dict(config())
        if attention:
            made._attn_implementation = attention
        with of_no_width():
            return library_class(made)
