"""Cutting what was taken away on paper out of a real model: tensors, the sizes of layers, the counts of attentions."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritprune.slimming.account import Selections, selected
from tritprune.slimming.multihead import SlimMultiheadAttention, adapt
from tritprune.slimming.weights import Weights

HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "num_q_heads")
"""Attributes of an attention module that may hold its number of heads."""

KEY_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
"""Attributes of an attention module that may hold its number of key and value heads."""

HEAD_WIDTHS = (
    "all_head_size",
    "inner_dim",
    "all_head_dim",
    "attention_width",
    "split_size",
    "embed_dim",
    "hidden_size",
)
"""Attributes of an attention module that may hold number of heads * head size."""


def selections_of(weights: Weights) -> Selections:
    """For each tensor and dimension that lost atoms, the indices that are left."""
    made: Selections = {}
    for name, dim in weights.first:
        gone = weights.gone_of(name, dim)
        if gone.any():
            made.setdefault(name, {})[dim] = torch.from_numpy(np.flatnonzero(~gone))
    return made


def cut(model: nn.Module, weights: Weights, selections: Selections) -> None:
    """Give ``model``, a copy of the one that ``weights`` knows, what is left of each tensor, its layers their sizes."""
    names = selections.keys() | weights.folded.keys()
    new = {name: _remade(name, weights, selections) for name in names}
    own = {id(tensor): name for name, tensor in _all_tensors(model)}
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in list(table.items()):
                name = own.get(id(tensor)) if tensor is not None else f"{path}.{key}".removeprefix(".")
                if name not in new:
                    continue
                data = new[name]
                if table is module._parameters and not isinstance(data, nn.Parameter):
                    like = tensor if tensor is not None else module._parameters["weight"]
                    assert like is not None
                    data = new[name] = nn.Parameter(data.to(like.dtype), requires_grad=like.requires_grad)
                table[key] = data  # type: ignore[assignment]
        resize(module)
    settle(model)


def _all_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from reversed([*model.named_parameters(), *model.named_buffers()])


def _remade(name: str, weights: Weights, selections: Selections) -> Tensor:
    tensor = weights.tensors.get(name)
    made = weights.folded.get(name, tensor)
    assert made is not None
    chosen = selections.get(name, {})
    if tensor is None:  # a bias that did not exist: its rows are those of its weight
        of_weight = selections.get(f"{name.removesuffix('bias')}weight", {})
        rows = of_weight.get(weights.rows(name))
        chosen = {} if rows is None else {0: rows}
    elif made.dtype != tensor.dtype:
        made = made.to(tensor.dtype)
    return selected(made, chosen).contiguous() if chosen else made.clone()


def resize(module: nn.Module) -> None:
    """Set the sizes that a layer says of itself to those of its weight."""
    weight = module._parameters.get("weight")
    if weight is None:
        return
    for kind, sizes in SIZES_BY_KIND.items():
        if isinstance(module, kind):
            for name, size in sizes(module, weight).items():
                if getattr(module, name) != size:
                    setattr(module, name, size)
            return
    if type(module).__name__ == "Conv1D" and weight.dim() == 2 and hasattr(module, "nf"):
        module.nx, module.nf = weight.shape  # type: ignore[assignment]


def settle(model: nn.Module) -> None:
    """After tensors were given other shapes: let each layer compute with those that it has now."""
    for module in model.modules():
        adapt(module)
        if isinstance(module, nn.RNNBase) and module._parameters.get("weight_ih_l0") is not None:
            module.input_size = module._parameters["weight_ih_l0"].shape[1]  # type: ignore[union-attr]
            module._init_flat_weights()


def _convolution(module: Any, weight: Tensor) -> dict[str, int]:
    if module.transposed:
        return {"in_channels": weight.shape[0], "out_channels": weight.shape[1] * module.groups}
    groups = module.groups * weight.shape[0] // module.out_channels if module.groups > 1 else 1
    return {"groups": groups, "in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0]}


SIZES_BY_KIND: dict[type[nn.Module], Callable[[Any, Tensor], dict[str, int]]] = {
    nn.Linear: lambda _, weight: {"out_features": weight.shape[0], "in_features": weight.shape[1]},
    nn.Embedding: lambda _, weight: {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]},
    nn.modules.conv._ConvNd: _convolution,
    nn.modules.batchnorm._NormBase: lambda _, weight: {"num_features": weight.shape[0]},
    nn.GroupNorm: lambda module, weight: {
        "num_groups": module.num_groups * weight.shape[0] // module.num_channels,
        "num_channels": weight.shape[0],
    },
    nn.PReLU: lambda _, weight: {"num_parameters": weight.shape[0]},
}
"""How each kind of layer names its sizes."""


def own_config(module: nn.Module) -> Any:
    """A copy of the configuration that ``module`` shares with others, now its own; None if it has none."""
    config = vars(module).get("config")
    if config is None or isinstance(config, nn.Module) or not hasattr(config, "__dict__"):
        return None
    module.config = copy.copy(config)
    return module.config


def set_counts(modules: Iterable[nn.Module], changes: Mapping[str, tuple[int, int]], size: int, style: str) -> None:
    """Set the attributes of an attention's modules that count its heads.

    Args:
        modules: the modules that hold the attention.
        changes: "heads" and "keys": number of heads, of key and value heads, before and after.
        size: size of a head.
        style: "known": the attributes of the lists above; "counts": of these the counts alone; "all": every whole
            number that equals a count or a width, but for those that number a layer; "config": as "known", and the
            counts in the module's configuration, of which it then has a copy of its own.
    """
    (heads, heads_left), (keys, keys_left) = changes["heads"], changes["keys"]
    named = [(KEY_COUNTS, keys, keys_left), (HEAD_COUNTS, heads, heads_left)]
    if style != "counts":
        named.append((HEAD_WIDTHS, heads * size, heads_left * size))
    if keys and heads // keys > 1 and keys_left:
        named.append((("num_key_value_groups",), heads // keys, heads_left // keys_left))
    for module in modules:
        config = own_config(module) if style == "config" else None
        for names, before, after in named[:2] if config is not None else ():
            for name in names:
                if type(vars(config).get(name)) is int and vars(config)[name] == before:
                    setattr(config, name, after)
        done: set[str] = set()
        for names, before, after in named:
            if names is HEAD_WIDTHS and isinstance(module, SlimMultiheadAttention):
                continue  # its width is that of the stream
            chosen = (
                names if style != "all" else [name for name in vars(module) if "layer" not in name and "id" not in name]
            )
            for name in chosen:
                if name not in done and type(vars(module).get(name)) is int and vars(module)[name] == before:
                    setattr(module, name, after)
                    done.add(name)
