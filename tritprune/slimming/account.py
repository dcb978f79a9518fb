"""What a slim model has of the model that it was cut from: which indices, what is new or folded, how wide it is."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tritprune.slimming.removal import RemovedAttention, arguments_of

Selections = dict[str, dict[int, Tensor]]
"""Parameter or buffer -> {dimension: int64 indices into it as it was, in the order kept}, for what was cut."""

SIZES = (
    *("in_features", "out_features", "in_channels", "out_channels", "groups", "num_features", "normalized_shape"),
    *("num_groups", "num_channels", "embedding_dim", "num_embeddings", "nf", "nx"),
)
"""Attributes in which a layer says its own sizes."""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by dotted name; each once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def copied(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that a training forward pass has left in attributes are copied without their history."""
    left = [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor) and not v.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in left})


def selected(tensor: Tensor, selection: Mapping[int, Tensor]) -> Tensor:
    """The part of ``tensor`` that ``selection`` keeps."""
    for dimension, kept in selection.items():
        tensor = tensor.index_select(dimension, kept.to(tensor.device))
    return tensor


def changed_widths(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """In plain values, what to do to a model like ``before`` so that the tensors of ``after`` fit in.

    Returns:
        ``{"layers": {module: {"tensors": {name: shape or None}, "sizes": {attribute: number or list}}},
        "attributes": {module: {attribute: number}}}``: own tensors of a module that have another shape, or are new, or
        gone (None); the attributes of :data:`SIZES` that changed; and all other counts that changed, as those of heads,
        ``config.`` before those in a configuration of the module's own. Where attentions were removed, also
        ``"removed": {module: {"output": name or None, "returns": number}}``: the arguments of
        :class:`tritprune.slimming.removal.RemovedAttention`.
    """
    layers: dict[str, dict[str, Any]] = {}
    attributes: dict[str, dict[str, Any]] = {}
    removed: dict[str, dict[str, Any]] = {}
    old = dict(before.named_modules())
    for name, module in after.named_modules():
        if isinstance(module, RemovedAttention):
            removed[name] = arguments_of(module)
            continue
        was, now = _own_tensors(old[name]), _own_tensors(module)
        tensors = {key: shape for key, shape in now.items() if was.get(key, None) != shape}
        counts = dict(_changed_counts(old[name], module))
        sizes = {key: value for key, value in counts.items() if key in SIZES}
        if tensors or sizes:
            layers[name] = {"tensors": tensors, "sizes": sizes}
        if len(counts) > len(sizes):
            attributes[name] = {key: value for key, value in counts.items() if key not in SIZES}
    return {"layers": layers, "attributes": attributes} | ({"removed": removed} if removed else {})


def _own_tensors(module: nn.Module) -> dict[str, list[int] | None]:
    own = {**module._parameters, **module._buffers}
    return {name: None if tensor is None else list(tensor.shape) for name, tensor in own.items()}


def _changed_counts(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(after).items():
        was = vars(before).get(name)
        one = type(value) is int and type(was) is int
        several = isinstance(value, tuple) and value and all(type(part) is int for part in value)
        if not name.startswith("_") and (one or several) and value != was:
            yield name, value if one else list(value)  # type: ignore[arg-type]
    mine, theirs = vars(after).get("config"), vars(before).get("config")
    if type(mine) is type(theirs) and hasattr(mine, "__dict__") and not isinstance(mine, nn.Module):
        for name, value in vars(mine).items():
            if type(value) is int and type(vars(theirs).get(name)) is int and value != vars(theirs)[name]:
                yield f"config.{name}", value
