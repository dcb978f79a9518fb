"""Rules for entries that are looked up by number."""

import numpy as np

from tritprune.slimming.forms import Form, Group
from tritprune.slimming.nodes import Node, Value
from tritprune.slimming.rules_views import take
from tritprune.slimming.walk import Rule, Walk, describe


def index(walk: Walk, node: Node) -> Form | None:
    """Entries looked up by number in one dimension: numbers that are fixed in the code, or the first dimension's."""
    form, shape = walk.form(node.inputs[0]), tuple(node.output.shape or ())
    given = node.inputs[1]
    positions = list(given.items) or [Value("", constant=c, is_constant=True) for c in given.constant or []]
    looked_up = [(dim, v) for dim, v in enumerate(positions) if not (v.is_constant and v.constant is None)]
    if len(looked_up) != 1:
        return None
    ((dim, where),) = looked_up
    if where.is_constant and where.constant.dim() == 1 and not where.constant.dtype.is_floating_point:
        return take(form, dim, np.arange(form.shape[dim])[where.constant.cpu().numpy()], shape)
    own = form.group(dim)
    if dim or (own is not None and len(own.dims) > 1):
        return None
    if own is not None:
        walk.pin(own, f"{describe(node)} looks them up by number")
    shift = len(shape) - form.rank
    rest = Form(form.shape, form.without(*([own] if own else [])))
    return rest.moved(shape, lambda d: d + shift)


def index_select(walk: Walk, node: Node) -> Form | None:
    """Entries of one dimension, by numbers that are computed."""
    form, dim = walk.form(node.inputs[0]), node.argument(1)
    if dim is None:
        return None
    own = form.group(dim % form.rank)
    if own is not None and len(own.dims) > 1:
        return None
    if own is not None:
        walk.pin(own, f"{describe(node)} looks them up by number")
    return Form(tuple(node.output.shape or ()), form.without(*([own] if own else [])), form.free - {dim % form.rank})


def gather(walk: Walk, node: Node) -> Form | None:
    """``y[i, j] = x[i, index[i, j]]``: along the other dimensions the result is as ``x``."""
    form, index, shape = walk.form(node.inputs[0]), walk.form(node.inputs[2]), tuple(node.output.shape or ())
    dim = node.argument(1, 0) % max(form.rank, 1)
    if any(form.shape[d] != shape[d] for d in range(form.rank) if d != dim):
        return None
    kept: list[Group] = []
    for group in form.groups:
        if dim in group.dims:
            walk.lock_or_pin(group, [dim], f"{describe(node)} looks them up by number")
            group = group.first_of(dim) if len(group.dims) > 1 else group
        if dim in group.dims:
            continue
        if all(index.shape[d] == 1 or index.follows(d, group) for d in group.dims):
            kept.append(group.unknown())
        else:
            walk.pin(group, f"{describe(node)} looks up other entries for each of them")
    return Form(shape, tuple(kept))


def embedding(walk: Walk, node: Node) -> Form:
    """Rows of a table, looked up by number."""
    table = walk.form(node.inputs[0])
    shape = tuple(node.output.shape or ())
    groups: list[Group] = []
    for group in table.groups:
        if group.dims == (0,):
            walk.pin(group, f"{describe(node)} looks them up by number")
        elif table.weight is not None:
            zero = walk.weights.zeros(table.weight[0], table.weight[1][1])
            groups.append(group.at((len(shape) - 1,)).with_constants(zero, np.zeros(zero.shape)))
    return Form(shape, tuple(groups))


LOOKUPS: dict[str, Rule] = {
    "embedding": embedding,
    "gather": gather,
    "index": index,
    "index_select": index_select,
}
"""Operations that look entries up."""
