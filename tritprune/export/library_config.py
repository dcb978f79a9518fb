"""What a transformers configuration can say of a slim model's widths, so that plain ``from_pretrained`` loads it.

The slim model's shapes give each value: the same for all layers, or, where the library allows it, one for each layer.
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from tritprune.errors import ConfigError
from tritprune.export.config_fields import (
    built,
    differences,
    has_each_layer,
    last_line,
    removed_attentions,
    set_values,
    shapes_of,
    sized_fields,
    with_each_layer,
)

HEAD_WORDS = ("head", "group", "scal")
"""What a module's numbers about its heads have in their names; the rebuilt model's must be the slim model's."""


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
        wanted = differences(shapes_of(config, library_class), model)
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
            set_values(candidate, {**sized.pin, sized.field: values[0]})
            said.append(f"{sized.field} {values[0]}")
        elif sized.listed and sized.whole and (layers := sized.by_layer()) is not None:
            set_values(candidate, {**sized.pin, sized.field: layers})
            said.append(f"{sized.field} {layers}")
        elif (
            sized.whole and (layers := sized.by_layer()) is not None and has_each_layer(candidate, sized, library_class)
        ):
            each = {number: {**sized.pin, sized.field: value} for number, value in enumerate(layers)}
            candidate = with_each_layer(candidate, each)
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


def misfit(config: Any, library_class: Any, model: nn.Module) -> str | None:
    """How a model built from ``config`` differs from ``model`` in names, shapes or its modules' head numbers."""
    try:
        bare = built(config, library_class)
    except Exception as error:  # the library's own checks of a configuration: any kind of error
        return last_line(error)
    theirs = {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()}
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*ours, *theirs]:
        if theirs.get(name) != ours.get(name):
            return f"{name} is {_shape(theirs.get(name))} there and {_shape(ours.get(name))} here"
    modules = dict(bare.named_modules())
    for name, module in model.named_modules():
        for attribute, value in _head_numbers(module).items():
            other = vars(modules[name]).get(attribute)
            if other != value:
                return f"{name}.{attribute} is {other} there and {value} here"
    return None


def _head_numbers(module: nn.Module) -> dict[str, int | float]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and any(word in name for word in HEAD_WORDS)
    }


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
