"""Calling a model with inputs of any form, and finding the tensors in whatever it returns."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError

PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class ModelInputs:
    """The arguments of one forward pass.

    Args:
        form: how they were given: ``tensor``, ``tuple`` (positional) or ``mapping`` (keywords).
        values: the arguments by name, or by position as text ("0", "1").
    """

    form: str
    values: Mapping[str, Any]

    @classmethod
    def of(cls, given: "ModelInputs | Tensor | Sequence[Any] | Mapping[str, Any]") -> "ModelInputs":
        """Wrap a tensor, a sequence of positional arguments or a mapping of keyword arguments.

        Raises:
            ConfigError: another type, no tensor in it, or a value that is neither a tensor nor a plain number or text.
        """
        if isinstance(given, ModelInputs):
            return given
        if isinstance(given, Tensor):
            return cls("tensor", {"0": given})
        if isinstance(given, Mapping):
            made = cls("mapping", {str(name): value for name, value in given.items()})
        elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
            made = cls("tuple", {str(position): value for position, value in enumerate(given)})
        else:
            raise ConfigError(f"model inputs are a tensor, a tuple or a mapping of them, got {type(given).__name__}")
        odd = {n: type(v).__name__ for n, v in made.values.items() if not isinstance(v, (Tensor, *PLAIN))}
        if odd:
            raise ConfigError(f"model inputs are tensors or plain values, got {odd}")
        if not made.tensors():
            raise ConfigError("model inputs hold no tensor")
        return made

    def tensors(self) -> dict[str, Tensor]:
        """The tensors among the arguments."""
        return {name: value for name, value in self.values.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "ModelInputs":
        """The same arguments with other tensors under the same names."""
        return ModelInputs(self.form, {**self.values, **tensors})

    def call(self, model: nn.Module) -> Any:
        """Run ``model`` on these arguments and return what it returns."""
        if self.form == "mapping":
            return model(**self.values)
        return model(*self.values.values())


def tensors_of(output: Any) -> dict[str, Tensor]:
    """Every tensor in a model's output by its path: ``logits``, ``hidden_states.0``; a bare tensor is ``output``.

    Looks into mappings, sequences, dataclasses and the attributes of other objects (key-value caches), so that nothing
    a model hands out escapes the comparison.
    """
    found: dict[str, Tensor] = {}
    _collect(output, "", found, set())
    return found


def _collect(value: Any, path: str, found: dict[str, Tensor], seen: set[int]) -> None:
    if isinstance(value, Tensor) and value.is_nested:
        value = value.unbind()  # sequences of different lengths
    if isinstance(value, Tensor):
        found[path or "output"] = value
        return
    if isinstance(value, (*PLAIN, bytes, torch.dtype, torch.device, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        children = [(str(name), child) for name, child in value.items()]
    elif isinstance(value, Sequence):
        children = [(str(position), child) for position, child in enumerate(value)]
    elif is_dataclass(value):
        children = [(field.name, getattr(value, field.name)) for field in fields(value)]
    else:
        children = list(getattr(value, "__dict__", {}).items())
    for name, child in children:
        _collect(child, f"{path}.{name}" if path else name, found, seen)


@contextmanager
def evaluating(*models: nn.Module, caches: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients, and without key-value caches.

    A cache is what attention read, kept for the next token: its size is that of the heads, so a slim model's differs.
    On leaving, each module gets its own mode back and each configuration its setting.

    Args:
        models: the models.
        caches: have the caches that configurations can turn on, whether they do or not.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    switches = {id(config): config for model in models for config in _configurations(model)}
    switched = [config for config in switches.values() if config.use_cache is (not caches)]
    for model in models:
        model.eval()
    for config in switched:
        config.use_cache = caches
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for config in switched:
            config.use_cache = not caches


def _configurations(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        config = vars(module).get("config")
        if hasattr(config, "use_cache"):
            yield config
