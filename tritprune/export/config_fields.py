"""The values of a transformers configuration that size tensors, and what they size, found out by building.

Which tensors a value sizes is not known by name: the bare model is built on the meta device with another value, and the
shapes that move are those.
"""

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tritprune.errors import ConfigError
from tritprune.slimming.removal import RemovedAttention

FEED_FORWARD_FIELDS = (
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "n_inner", "d_ff"),
    *("mlp_dim", "ffn_hidden_size"),
)
"""Names that configurations give to the width of all feed-forward layers."""

HEAD_FIELDS = (
    *("num_attention_heads", "num_key_value_heads", "num_heads", "num_decoder_heads", "n_head", "n_heads"),
    *("encoder_attention_heads", "decoder_attention_heads"),
)
"""Names that configurations give to the number of heads of all layers."""

Place = tuple[str, int]  # tensor name, dimension
MISSING = object()


@dataclass(frozen=True)
class Sized:
    """What one value of the configuration sizes.

    Args:
        field: its name.
        values: the value that the slim model has at each place that the field sizes.
        listed: whether the configuration has one value for each layer.
        pin: other values that must be said along with it.
    """

    field: str
    values: Mapping[Place, float]
    listed: bool
    pin: Mapping[str, int]

    @property
    def distinct(self) -> list[int]:
        """The different values, ascending."""
        return sorted({int(value) for value in self.values.values()})

    @property
    def whole(self) -> bool:
        """Whether every place has a whole number."""
        return all(value == int(value) for value in self.values.values())

    def by_layer(self) -> list[int] | None:
        """The value of each layer; None where a place has no layer number, or a layer two values or none."""
        layers: dict[int, int] = {}
        for (name, _), value in self.values.items():
            number = re.search(r"\.(\d+)\.", name)
            if number is None or layers.setdefault(int(number[1]), int(value)) != int(value):
                return None
        return [layers[number] for number in range(len(layers))] if set(layers) == set(range(len(layers))) else None


def sized_fields(config: Any, library_class: Any, model: nn.Module) -> Iterator[Sized]:
    """The widths and head counts of ``config``, each with the places that it sizes: those that grow as it does."""
    bare = shapes_of(config, library_class)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    aliases = getattr(config, "attribute_map", {})
    for field in (*FEED_FORWARD_FIELDS, *HEAD_FIELDS):
        value = _value(config, field)
        if field in aliases or value is MISSING:
            continue
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            first = value[0]
        elif isinstance(value, int) or value is None:
            first = value
        else:
            continue
        other = 2 * first if first else 3 * int(getattr(config, "hidden_size", 1))
        for pin in _pins(config) if field in HEAD_FIELDS else ({},):
            probe = copy.deepcopy(config)
            set_values(probe, {**pin, field: [other] * len(value) if isinstance(value, list) else other})
            if failure(probe, library_class) is not None:
                continue
            moved = {
                (name, dimension): size / other
                for name, shape in shapes_of(probe, library_class).items()
                if len(shape) == len(bare.get(name, ()))
                for dimension, size in enumerate(shape)
                if size != bare[name][dimension]
                and (first is None or isinstance(value, list) or bare[name][dimension] * other == size * first)
            }
            values = {
                (name, dimension): own[name][dimension] / per_unit
                for (name, dimension), per_unit in moved.items()
                if name in own
            }
            if values:
                yield Sized(field, values, isinstance(value, list), pin)
                break


def _value(config: Any, field: str) -> Any:
    try:
        return getattr(config, field, MISSING)
    except RuntimeError:  # the library refuses to tell a value that layers have each of their own
        return vars(config).get(field, MISSING)


def has_each_layer(config: Any, sized: Sized, library_class: Any) -> bool:
    """Whether the library's model reads a value for each layer (``per_layer_config``): tried on the first layer."""
    bare, value = shapes_of(config, library_class), _value(config, sized.field)
    if not hasattr(type(config), "per_layer_config") or not isinstance(value, int):
        return False
    try:
        moved = shapes_of(with_each_layer(config, {0: {**sized.pin, sized.field: 2 * value or 2}}), library_class)
    except Exception:  # the library's own checks of a configuration: any kind of error
        return False
    changed = {name for name, shape in moved.items() if bare.get(name) != shape}
    return bool(changed) and changed <= {name for name, _ in sized.values if re.search(r"\.0\.", name)}


def with_each_layer(config: Any, values: Mapping[int, Mapping[str, int]]) -> Any:
    """A copy of ``config`` with these values for these layers, beside those that it has for layers already."""
    made = copy.deepcopy(config)
    given = config.to_dict().get("per_layer_config") or {}
    layers = {int(number): dict(own) for number, own in given.items()}
    for number, own in values.items():
        layers.setdefault(number, {}).update(own)
    made.per_layer_config = layers
    return made


def _pins(config: Any) -> list[dict[str, int]]:
    """A head size that stays while the number of heads changes, for libraries that would divide the width anew."""
    if isinstance(size := _value(config, "head_dim"), int) and size:
        return [{}]
    width, heads = _value(config, "hidden_size"), _value(config, "num_attention_heads")
    tells = isinstance(width, int) and isinstance(heads, int) and width and heads
    return [{"head_dim": width // heads}, {}] if tells else [{}]


def set_values(config: Any, values: Mapping[str, Any]) -> None:
    """Set values of a configuration."""
    for name, value in values.items():
        setattr(config, name, value)


def failure(config: Any, library_class: Any) -> str | None:
    """Why no model can be built from a configuration; None if one can."""
    try:
        built(config, library_class)
    except Exception as error:  # the library's own checks of a configuration: any kind of error
        return last_line(error)
    return None


@contextmanager
def of_no_width() -> Iterator[None]:
    """Without PyTorch's warning that a layer of width 0 has nothing to initialise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        yield


def built(config: Any, library_class: Any) -> nn.Module:
    """The bare model without storage; configurations are read back as ``from_pretrained`` would, checks included."""
    again = type(config).from_dict(config.to_dict())
    with torch.random.fork_rng(devices=[]), torch.device("meta"), of_no_width():
        return library_class(again)


def shapes_of(config: Any, library_class: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the bare model."""
    return {name: tuple(tensor.shape) for name, tensor in built(config, library_class).state_dict().items()}


def differences(bare: Mapping[str, tuple[int, ...]], model: nn.Module) -> dict[Place, tuple[int, int]]:
    """Where the slim model is of another size: place -> (bare, slim); removed attentions left out.

    Raises:
        ConfigError: a parameter that only one of the two has, or that has another number of dimensions.
    """
    removed = tuple(f"{name}." for name in removed_attentions(model))
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*own, *bare]:
        if name not in bare:
            raise ConfigError(f"{name} was added to keep the outputs, and the library's model has no such parameter")
        if name not in own and name.startswith(removed):
            continue
        if name not in own:
            raise ConfigError(f"{name} of the library's model is gone")
        if len(bare[name]) != len(own[name]):
            raise ConfigError(f"{name} has {len(own[name])} dimensions, in the library's model {len(bare[name])}")
    return {
        (name, dimension): (bare[name][dimension], size)
        for name, shape in own.items()
        for dimension, size in enumerate(shape)
        if size != bare[name][dimension]
    }


def removed_attentions(model: nn.Module) -> list[str]:
    """Dotted names of the attentions that were removed."""
    return [name for name, module in model.named_modules() if isinstance(module, RemovedAttention)]


def last_line(error: BaseException) -> str:
    """The last line of an error's message, where the libraries say what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
