"""Rules for norms, softmax, means and pools: what they compute from all units ties these together."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from tritprune.slimming.forms import Form, Group
from tritprune.slimming.nodes import Node, Value
from tritprune.slimming.walk import Rule, Walk, describe


def batch_norm(walk: Walk, node: Node) -> Form | None:
    """``(x - mean) / sqrt(var + eps) w + b`` with stored statistics: each channel alone, a constant stays one."""
    x = walk.form(node.inputs[0])
    group = x.group(1)
    parts = [None if value.is_constant else value for value in node.inputs[1:5]]
    if node.argument(5) is not False or parts[2] is None or parts[3] is None or (group and len(group.dims) > 1):
        return None
    own = [walk.form(value).group(0) if value is not None else None for value in parts]
    if group is None:
        for part in own:
            if part is not None:
                walk.pin(part, f"{describe(node)} normalises channels whose number is not known")
        return Form(x.shape, x.groups)
    ones = np.ones(group.atoms.shape)
    for part in own:
        if part is not None:
            walk.merge(group.atoms, part.atoms)
    weight, bias, mean, variance = (
        part.constant if part is not None else default
        for part, default in zip(own, (ones, ones * 0, ones * 0, ones), strict=True)
    )
    scale = weight / np.sqrt(variance + node.argument(7, 1e-5))
    result = np.where(weight == 0, bias, (group.constant - mean) * scale + bias)
    made = group.with_constants(group.known | (weight == 0), result)
    return Form(x.shape, (*(g.unknown() for g in x.without(group)), made))


def layer_norm(walk: Walk, node: Node) -> Form:
    """Norms over the last dimensions (layer, RMS): these keep their width."""
    x = walk.form(node.inputs[0])
    return _normalised(walk, node, range(x.rank - len(node.argument(1)), x.rank), node.inputs[2:4])


def group_norm(walk: Walk, node: Node) -> Form:
    """Norms over groups of channels, and over each channel alone: a group goes as a whole, with its weights."""
    x = walk.form(node.inputs[0])
    alone = node.kind == "instance_norm"
    values = node.inputs[1:5] if alone else node.inputs[2:4]
    channels, count = x.group(1), x.shape[1] if alone else node.argument(1)
    own = [walk.form(value).group(0) for value in values if not value.is_constant]
    parts = [part for part in own if part is not None]
    if channels is None or not parts or count == 1 or len(x.groups) > 1 or channels.dims != (1,):
        return _normalised(walk, node, range(1, x.rank), values)
    for part in parts:
        walk.merge(channels.atoms, part.atoms)
    together = channels.atoms.reshape(count, -1)
    walk.merge(together, together[:, :1])
    if together.shape[1] > 1:
        walk.ties.append((channels.atoms, f"{describe(node)} normalises {together.shape[1]} channels together"))
    return Form(x.shape, (channels.unknown(),))


def _normalised(walk: Walk, node: Node, dims: Iterable[int], values: Iterable[Value]) -> Form:
    """All entries along ``dims`` are needed, and so are all of the weights."""
    x, over = walk.form(node.inputs[0]), set(dims)
    reason = f"{describe(node)} normalises over all of them"
    groups: list[Group] = []
    for group in x.groups:
        inside = [dim for dim in group.dims if dim in over]
        if inside:
            walk.lock_or_pin(group, inside, reason)
        groups.append(group.unknown())
    for value in values:
        if value.shape is not None and not value.is_constant:
            for own in walk.form(value).groups:
                walk.pin(own, reason)
    return Form(x.shape, tuple(groups), x.free)


def softmax(walk: Walk, node: Node) -> Form:
    """Over one dimension, which keeps its size."""
    x = walk.form(node.inputs[0])
    dim = node.argument(1, -1) % max(x.rank, 1)
    for group in x.groups:
        if dim in group.dims:
            walk.lock_or_pin(group, [dim], f"they feed {describe(node)}, which needs all of them")
    groups = tuple(group.unknown() for group in x.groups)
    return Form(x.shape, groups, x.free, node.kind.endswith("softmax") and "log" not in node.kind and dim == x.rank - 1)


AVERAGES = ("mean", "amax", "amin", "max", "min")
DIMS_AT_2 = ("norm", "linalg_vector_norm")


def reduce(walk: Walk, node: Node) -> Form | list[Form] | None:
    """Over some dimensions, which keep their size; an average of a constant is that constant."""
    x = walk.form(node.inputs[0])
    given = node.argument(2 if node.kind in DIMS_AT_2 else 1)
    if isinstance(given, bool) or (given is None and x.groups):
        return None
    dims = (
        sorted(d % max(x.rank, 1) for d in (given if isinstance(given, list) else [given])) if given is not None else []
    )
    dims = dims or list(range(x.rank))
    keeps = node.output.rank == x.rank and node.output.rank > 0
    groups: list[Group] = []
    for group in x.groups:
        inside = [dim for dim in group.dims if dim in dims]
        if inside:
            walk.lock_or_pin(group, inside, f"they feed {describe(node)}, which needs all of them")
        rest = tuple(dim for dim in group.dims if dim not in dims)
        if rest:
            for dim in inside:
                group = group.first_of(dim)
            group = group if node.kind in AVERAGES and not inside else group.unknown()
            groups.append(group.at(rest if keeps else tuple(d - sum(g < d for g in dims) for d in rest)))
    made = [Form(tuple(value.shape or ()), tuple(groups)) for value in node.outputs]
    return [made[0], *(replace(m, groups=tuple(g.unknown() for g in m.groups)) for m in made[1:])]


def running(walk: Walk, node: Node) -> Form:
    """Sums along one dimension that keep it."""
    x = walk.form(node.inputs[0])
    dim = node.argument(1, 0) % max(x.rank, 1)
    for group in x.groups:
        if dim in group.dims:
            walk.lock_or_pin(group, [dim], f"they feed {describe(node)}, which needs all of them")
    return Form(x.shape, tuple(group.unknown() for group in x.groups), x.free)


def pool(walk: Walk, node: Node) -> list[Form] | None:
    """Over the dimensions after the channels; a constant stays one unless padding mixes zeros in."""
    x = walk.form(node.inputs[0])
    rank = node.output.rank
    spatial = int(next((c for c in node.kind if c.isdigit()), "2"))
    mixed = range(rank - spatial, rank)
    over = [group for group in x.groups if set(group.dims) & set(mixed)]
    if rank != x.rank or any(not set(group.dims) <= set(mixed) for group in over):
        return None
    for group in over:
        walk.pin(group, f"{describe(node)} mixes them")
    exact = not node.kind.startswith("avg_pool") or not any(node.argument(3, [1])) or node.argument(5) is False
    groups = x.without(*over)
    if not exact:
        groups = tuple(g.with_constants(g.known & (g.constant == 0), g.constant) for g in groups)
    if "bicubic" in node.kind:
        groups = tuple(g.unknown() for g in groups)
    return [Form(tuple(value.shape or ()), groups) for value in node.outputs]


def pad(walk: Walk, node: Node) -> Form | None:
    """Entries added at the ends of the last dimensions: the others are as they were, zeros stay zeros."""
    x, added = walk.form(node.inputs[0]), node.argument(1)
    mode = node.argument(2) if node.kind == "pad" else node.kind
    if added is None:
        return Form(x.shape, x.groups, x.free) if node.output.shape == x.shape else None
    grown = [x.rank - 1 - k // 2 for k, count in enumerate(added) if count]
    if any(dim in group.dims for dim in grown for group in x.groups):
        return None
    value = node.argument(3 if node.kind == "pad" else 2, 0) or 0
    constant = mode in ("constant", "constant_pad_nd") and grown
    groups = tuple(g.with_constants(g.known & (g.constant == value), g.constant) if constant else g for g in x.groups)
    return Form(tuple(node.output.shape or ()), groups)


POOLS = [f"{name}_pool{n}d" for name in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)]
UPSAMPLINGS = [
    *(f"upsample_{name}" for name in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "trilinear3d")),
    *("upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    *(f"_upsample_nearest_exact{n}d" for n in (1, 2, 3)),
]
PADS = [f"{name}_pad{n}d" for name in ("reflection", "replication") for n in (1, 2, 3)]

NORMS: dict[str, Rule] = {
    **dict.fromkeys(
        (*AVERAGES, *DIMS_AT_2, "sum", "var", "std", "prod", "logsumexp", "argmax", "argmin", "all", "any"), reduce
    ),
    **dict.fromkeys(("cumsum", "cumprod"), running),
    **dict.fromkeys(("layer_norm", "rms_norm", "_fused_rms_norm"), layer_norm),
    **dict.fromkeys(("group_norm", "instance_norm"), group_norm),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_safe_softmax", "softmin"), softmax),
    **dict.fromkeys((*POOLS, *UPSAMPLINGS, "max_pool2d_with_indices"), pool),
    **dict.fromkeys(("pad", "constant_pad_nd", *PADS), pad),
    "batch_norm": batch_norm,
}
"""Norms, softmax, means and pools."""
