"""A slim model whose layers are padded to the same widths, so that its configuration can say them."""

import copy
from typing import Any

import torch
from torch import nn

from tritprune.errors import ConfigError
from tritprune.export.config_fields import (
    differences,
    failure,
    of_no_width,
    removed_attentions,
    set_values,
    shapes_of,
    sized_fields,
)


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
    wanted = differences(shapes_of(config, library_class), model)
    blocks = tuple(f"{name}." for name in removed_attentions(model))
    groups = {int(g) for m in model.modules() if isinstance(g := vars(m).get("num_key_value_groups"), int)}
    if len(groups) > 1:
        raise ConfigError(f"its layers have groups of {', '.join(map(str, sorted(groups)))} heads per key and value")
    said: dict[str, int] = {}
    for sized in sized_fields(config, library_class, model):
        if sized.whole and wanted.keys() & sized.values.keys():
            width = sized.distinct[-1]
            trial = copy.deepcopy(config)
            set_values(
                trial,
                {**sized.pin, sized.field: [width] * len(getattr(config, sized.field)) if sized.listed else width},
            )
            if failure(trial, library_class) is None:
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
