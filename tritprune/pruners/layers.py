"""Which layers of a model may be pruned, and why the others are not."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from tritprune.errors import ConfigError
from tritprune.patterns import WeightView, kind_of, own_weight, plain_modules, unwrapped

HEAD_NAMES = ("classifier", "score", "head", "heads", "fc", "lm_head", "qa_outputs", "logits")
"""Dotted-name parts by which models call their classifier head."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Exclusion:
    """A layer that is not pruned.

    Args:
        name: dotted layer name.
        reason: why, in a few words.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Inventory:
    """The layers of a model.

    Args:
        views: those that can be pruned, in registration order.
        excluded: those that cannot.
        head: the classifier head's name, if one was found.
        order: the names of all of these, in registration order.
    """

    views: tuple[WeightView, ...]
    excluded: tuple[Exclusion, ...]
    head: str | None
    order: tuple[str, ...]


def take_inventory(model: nn.Module) -> Inventory:
    """Every Linear, Conv and Conv1D of a model, and what keeps some of them from being pruned.

    Raises:
        ConfigError: the model has no such layer.
    """
    owners = _weight_owners(model)
    views: list[WeightView] = []
    excluded: list[Exclusion] = []
    order: list[str] = []
    for name, module in plain_modules(model, remove_duplicate=False):
        reason = _unprunable(name, module, owners)
        view = WeightView.of(name, module)
        if reason is not None:
            excluded.append(Exclusion(name, reason))
        elif view is not None:
            views.append(view)
        else:
            continue
        order.append(name)
    if not views and not excluded:
        raise ConfigError(f"{type(unwrapped(model)).__name__} has no Linear, Conv or Conv1D layer that could be pruned")
    return Inventory(tuple(views), tuple(excluded), find_head(model), tuple(order))


def find_head(model: nn.Module) -> str | None:
    """The exact dotted name of the classifier head; None if the model does not seem to have one.

    A Linear with as many outputs as ``model.config`` has labels (or tokens) and a name of :data:`HEAD_NAMES`; for
    models without such a config the last Linear below a top-level name of :data:`HEAD_NAMES`, else the last Linear of a
    model that has more to prune than that.
    """
    linears = [(name, module) for name, module in plain_modules(model) if isinstance(module, nn.Linear)]
    config = getattr(unwrapped(model), "config", None)
    outputs = {getattr(config, key, None) for key in ("num_labels", "vocab_size")} - {None}
    if outputs:
        fitting = [name for name, module in linears if module.out_features in outputs]
        named = [name for name in fitting if not set(name.split(".")).isdisjoint(HEAD_NAMES)]
        return (named or fitting or [None])[-1]
    named = [name for name, _ in linears if name.split(".")[0] in HEAD_NAMES]
    layers = [name for name, module in plain_modules(model) if WeightView.of(name, module) is not None]
    if named:
        return named[-1] if len(layers) > 1 else None
    return linears[-1][0] if linears and len(layers) > 1 else None


def choose(
    inventory: Inventory, include: Sequence[str], exclude: Sequence[str], *, exclude_head: bool, group: str
) -> tuple[list[WeightView], list[Exclusion]]:
    """The layers of one group, and those that its globs name but that it leaves out.

    Args:
        inventory: the model's layers.
        include: exact dotted names or globs.
        exclude: exact dotted names or globs, stronger than ``include``.
        exclude_head: leave the classifier head out.
        group: the group's name, for messages.

    Raises:
        ConfigError: a glob that matches nothing, or no layer left.
    """
    for what, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not any(matches(glob, name) for name in inventory.order):
                raise ConfigError(_unmatched(what, glob, group, inventory.order))
    included = [name for name in inventory.order if any(matches(glob, name) for glob in include)]
    left_out = {e.name: e for e in inventory.excluded if e.name in included}
    for name in included:
        by = next((glob for glob in exclude if matches(glob, name)), None)
        if exclude_head and name == inventory.head:
            left_out.setdefault(name, Exclusion(name, "classifier head"))
        if by is not None:
            left_out.setdefault(name, Exclusion(name, f"excluded by '{by}'"))
    views = [view for view in inventory.views if view.name in included and view.name not in left_out]
    if not views:
        reasons = "; ".join(f"{e.name}: {e.reason}" for e in list(left_out.values())[:5])
        raise ConfigError(f"group '{group}' has no layer to prune: {reasons or 'include is empty'}")
    return views, list(left_out.values())


def matches(glob: str, name: str) -> bool:
    """Whether a dotted name fits: ``*`` is (some of) one part of it, ``**`` any number of parts, else exactly."""
    return _fits(glob.split("."), name.split("."))


def _fits(globs: Sequence[str], parts: Sequence[str]) -> bool:
    if not globs:
        return not parts
    if globs[0] == "**":
        return any(_fits(globs[1:], parts[skipped:]) for skipped in range(len(parts) + 1))
    return bool(parts) and _part(globs[0]).fullmatch(parts[0]) is not None and _fits(globs[1:], parts[1:])


@cache
def _part(glob: str) -> re.Pattern[str]:
    """One part of a glob; only ``*`` is special."""
    return re.compile(".*".join(re.escape(text) for text in glob.split("*")))


def _unmatched(what: str, glob: str, group: str, names: Sequence[str]) -> str:
    inside = [name for name in names if name.startswith(f"{glob}.")]
    if inside:
        hint = f"it is no layer but holds {len(inside)}; write '{glob}.**'"
    else:
        near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or list(names[:3])
        hint = f"nearest layers: {', '.join(near)}"
    return f"{what} '{glob}' of group '{group}' matches no layer; {hint} (* is one part of a name, ** any number)"


def _weight_owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Every module that holds a given tensor as a parameter, by the tensor's id, in registration order."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in plain_modules(model, remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    return owners


def _unprunable(name: str, module: nn.Module, owners: dict[int, list[tuple[str, nn.Module]]]) -> str | None:
    """Why a module is listed as excluded; None if it can be pruned or is no layer with a matrix at all."""
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return f"{type(module).__name__} has no view [outputs, inputs]"
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return "nn.MultiheadAttention keeps query, key and value in one parameter (in_proj_weight), not in Linears"
    if kind_of(module) is None:
        return None
    weight = own_weight(module)
    if weight is None:
        return "its weight is computed (a parametrization) or absent"
    if isinstance(weight, nn.UninitializedParameter):
        return "its weight has no shape before the first forward pass"
    sharing = owners[id(weight)]
    other = next((owner for owner, owned in sharing if kind_of(owned) is None), None)
    if other is not None:
        return f"tied to {other}, which is no prunable layer"
    if sharing[0][0] != name:
        return f"tied to {sharing[0][0]}"
    if not weight.requires_grad:
        return "frozen"
    if weight.dtype not in _DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}; float32, bfloat16 and float16 can be pruned"
    return "its weight is empty" if weight.numel() == 0 else None
