"""What a transformers configuration can say of a slim model's widths, so that plain ``from_pretrained`` loads it.

Which tensors a value of the configuration sizes is not known by name: the bare model is built on the meta device with
another value, and the shapes that move are those. The slim model's shapes then give the value: the same for all layers,
or, where the library allows it, one for each layer.
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

HEAD_WORDS = ("head", "group", "scal")
"""What a module's numbers about its heads have in their names; the rebuilt model's must be the slim model's."""

Place = tuple[str, int]  # tensor name, dimension


@dataclass(frozen=True)
class Description:
    """A configuration, and whether it alone describes the model.

    Args:
        config: to be stored beside the weights.
        complete: whether ``from_pretrained`` builds the model from it.
        because: why, or why not, in a sentence's second half.
        evens_out: whether :func:`even_widths` can make a model that a configuration describes.
    """

    config: Any
    complete: bool
    because: str
    evens_out: bool = True


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


def describe(model: nn.Module, library_class: Any) -> Description:
    """The configuration of ``model``, with slim widths where it can say them.

    Args:
        model: a model of ``library_class`` whose ``config`` is still that of the bare model.
        library_class: a transformers model class.
    """
    config: Any = copy.deepcopy(model.config)
    config.architectures = [library_class.__name__]
    name = type(config).__name__
    problem = misfit(config, library_class, model)
    if problem is None:
        return Description(config, True, f"{name} says all of its widths")
    try:
        wanted = _differences(_shapes(config, library_class), model)
    except ConfigError as error:
        return Description(config, False, str(error), evens_out=False)
    removed = removed_attentions(model)
    if removed:
        more = f" and {len(removed) - 1} more" if len(removed) > 1 else ""
        because = f"the attention {removed[0]} was removed{more}, and no value of {name} says so"
        return Description(config, False, because)
    fields = list(sized_fields(config, library_class, model))
    candidate, said = copy.deepcopy(config), []
    for sized in fields:
        if not wanted.keys() & sized.values.keys():
            continue
        values = sized.distinct
        if sized.whole and len(values) == 1:
            _set(candidate, {**sized.pin, sized.field: values[0]})
            said.append(f"{sized.field} {values[0]}")
        elif sized.listed and sized.whole and (layers := sized.by_layer()) is not None:
            _set(candidate, {**sized.pin, sized.field: layers})
            said.append(f"{sized.field} {layers}")
        else:
            shown = ", ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "")
            return Description(
                config,
                False,
                f"its layers have {len(values)} different values of {sized.field} ({shown}) and {name} has one for all",
            )
    said_of = {place for sized in fields for place in sized.values}
    for (tensor, dimension), (before, after) in wanted.items():
        if (tensor, dimension) not in said_of:
            return Description(
                config, False, f"{name} has no value for a size of {tensor} alone ({before} before, {after} now)"
            )
    problem = misfit(candidate, library_class, model)
    if problem is None:
        return Description(candidate, True, f"{name} says all of its widths: {', '.join(said)}")
    return Description(config, False, f"{name} with {', '.join(said)} builds another model: {problem}")


@torch.no_grad()
def even_widths(model: nn.Module, library_class: Any) -> tuple[nn.Module, dict[str, int]]:
    """A copy of a slim model whose layers have the same widths, so that its configuration can say them.

    Each width becomes the largest that a layer has, or the bare model's where the configuration ties it to something
    else; the units that come back have zero weights and zero biases, at the end, so nothing reads or feeds them. An
    attention that was removed comes back with all of its weights zero.

    Returns:
        The model, built by the library, and the values that its configuration now says.

    Raises:
        ConfigError: it has a parameter that the library's model lacks, or groups of heads of different sizes.
    """
    config: Any = copy.deepcopy(model.config)
    wanted = _differences(_shapes(config, library_class), model)
    blocks = tuple(f"{name}." for name in removed_attentions(model))
    groups = {int(g) for m in model.modules() if isinstance(g := vars(m).get("num_key_value_groups"), int)}
    if len(groups) > 1:
        raise ConfigError(f"its layers have groups of {', '.join(map(str, sorted(groups)))} heads per key and value")
    said: dict[str, int] = {}
    for sized in sized_fields(config, library_class, model):
        if sized.whole and wanted.keys() & sized.values.keys():
            width = sized.distinct[-1]
            trial = copy.deepcopy(config)
            _set(
                trial,
                {**sized.pin, sized.field: [width] * len(getattr(config, sized.field)) if sized.listed else width},
            )
            if _failure(trial, library_class) is None:
                config, said = trial, said | {sized.field: width}
    with torch.random.fork_rng(devices=[]), of_no_width():
        even = library_class(config)
    own = model.state_dict(keep_vars=True)
    for name, tensor in even.state_dict(keep_vars=True).items():
        if name not in own and name.startswith(blocks):  # a removed attention comes back as zeros
            tensor.data = torch.zeros_like(tensor)
            continue
        given = own[name].detach()
        small = [size for size, have in zip(tensor.shape, given.shape, strict=True) if size < have]
        if small:
            raise ConfigError(f"'{name}' is {list(given.shape)} and would become {list(tensor.shape)}")
        padded = given.new_zeros(tensor.shape)
        padded[tuple(slice(0, size) for size in given.shape)] = given
        tensor.data = padded
    even.train(model.training)
    return even, said


def misfit(config: Any, library_class: Any, model: nn.Module) -> str | None:
    """How a model built from ``config`` differs from ``model`` in names, shapes or its modules' head numbers."""
    try:
        built = _built(config, library_class)
    except Exception as error:  # the library's own checks of a configuration: any kind of error
        return _first_line(error)
    theirs = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            return f"{name} is {_shape(theirs.get(name))} there and {_shape(ours.get(name))} here"
    modules = dict(built.named_modules())
    for name, module in model.named_modules():
        for attribute, value in _head_numbers(module).items():
            other = vars(modules[name]).get(attribute)
            if other != value:
                return f"{name}.{attribute} is {other} there and {value} here"
    return None


def sized_fields(config: Any, library_class: Any, model: nn.Module) -> Iterator[Sized]:
    """The widths and head counts of ``config``, each with the places that it sizes."""
    bare = _shapes(config, library_class)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    aliases = getattr(config, "attribute_map", {})
    for field in (*FEED_FORWARD_FIELDS, *HEAD_FIELDS):
        if field in aliases or not hasattr(config, field):
            continue
        value = getattr(config, field)
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            first = value[0]
        elif isinstance(value, int) or value is None:
            first = value
        else:
            continue
        other = 2 * first if first else 3 * int(getattr(config, "hidden_size", 1))
        for pin in _pins(config) if field in HEAD_FIELDS else ({},):
            probe = copy.deepcopy(config)
            _set(probe, {**pin, field: [other] * len(value) if isinstance(value, list) else other})
            if _failure(probe, library_class) is not None:
                continue
            moved = {
                (name, dimension): size / other
                for name, shape in _shapes(probe, library_class).items()
                if len(shape) == len(bare.get(name, ()))
                for dimension, size in enumerate(shape)
                if size != bare[name][dimension]
            }
            values = {
                (name, dimension): own[name][dimension] / per_unit
                for (name, dimension), per_unit in moved.items()
                if name in own
            }
            if values:
                yield Sized(field, values, isinstance(value, list), pin)
                break


def _pins(config: Any) -> list[dict[str, int]]:
    """A head size that stays while the number of heads changes, for libraries that would divide the width anew."""
    if getattr(config, "head_dim", None):
        return [{}]
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return [{"head_dim": width // heads}, {}] if width and heads else [{}]


def _set(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _failure(config: Any, library_class: Any) -> str | None:
    try:
        _built(config, library_class)
    except Exception as error:  # as in misfit
        return _first_line(error)
    return None


@contextmanager
def of_no_width() -> Iterator[None]:
    """Without PyTorch's warning that a layer of width 0 has nothing to initialise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
        yield


def _built(config: Any, library_class: Any) -> nn.Module:
    """The bare model without storage; configurations are read back as ``from_pretrained`` would, checks included."""
    again = type(config).from_dict(config.to_dict())
    with torch.random.fork_rng(devices=[]), torch.device("meta"), of_no_width():
        return library_class(again)


def _shapes(config: Any, library_class: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in _built(config, library_class).state_dict().items()}


def _differences(bare: Mapping[str, tuple[int, ...]], model: nn.Module) -> dict[Place, tuple[int, int]]:
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


def _head_numbers(module: nn.Module) -> dict[str, int | float]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and any(word in name for word in HEAD_WORDS)
    }


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
