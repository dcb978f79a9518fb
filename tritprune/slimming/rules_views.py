"""Rules for operations that only move elements: views, permutations, parts, repetitions."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tritprune.slimming.forms import Form, Group, permuted, reshaped
from tritprune.slimming.nodes import Node
from tritprune.slimming.walk import Rule, Walk, describe

WHOLE = 1 << 62


def reshape(walk: Walk, node: Node) -> Form:
    """Any view whose elements stay in order: the shapes say all."""
    made, lost = reshaped(walk.form(node.inputs[0]), tuple(node.output.shape or ()))
    for group in lost:
        walk.pin(group, f"{describe(node)} mixes them with other dimensions")
    walk.split += [group for group in made.groups if len(group.dims) > 1]
    return made


def transpose(walk: Walk, node: Node) -> Form:
    """Two dimensions change places."""
    form = walk.form(node.inputs[0])
    order = list(range(form.rank))
    if form.rank >= 2:
        one, two = (node.argument(1), node.argument(2)) if len(node.inputs) > 2 else (0, 1)
        order[one], order[two] = order[two], order[one]
    return permuted(form, order, tuple(node.output.shape or ()))


def permute(walk: Walk, node: Node) -> Form:
    """Dimensions in another order."""
    return permuted(walk.form(node.inputs[0]), node.argument(1), tuple(node.output.shape or ()))


def movedim(walk: Walk, node: Node) -> Form | None:
    """Some dimensions go elsewhere, the others keep their order."""
    form = walk.form(node.inputs[0])
    source, target = node.argument(1), node.argument(2)
    sources = [d % form.rank for d in (source if isinstance(source, list) else [source])]
    targets = [d % form.rank for d in (target if isinstance(target, list) else [target])]
    others = iter(dim for dim in range(form.rank) if dim not in sources)
    order = [sources[targets.index(d)] if d in targets else next(others) for d in range(form.rank)]
    return permuted(form, order, tuple(node.output.shape or ()))


def expand(walk: Walk, node: Node) -> Form:
    """Dimensions of size 1 repeated, new ones in front; the model's code chooses how often."""
    form, shape = walk.form(node.inputs[0]), tuple(node.output.shape or ())
    ahead = len(shape) - form.rank
    groups = [group.at(tuple(dim + ahead for dim in group.dims)) for group in form.groups]
    grown = {d for d in range(len(shape)) if d < ahead or form.shape[d - ahead] != shape[d]}
    kept: list[Group] = []
    for group in groups:
        if any(dim in grown for dim in group.dims):
            walk.pin(group, f"{describe(node)} repeats them")
        else:
            kept.append(group)
    return Form(shape, tuple(kept), frozenset({d + ahead for d in form.free} | grown))


def take(form: Form, dim: int, index: Sequence[int] | np.ndarray, shape: tuple[int, ...]) -> Form:
    """The entries ``index`` of dimension ``dim``."""
    groups = tuple(g.taken(dim, index).simplified() if dim in g.dims else g for g in form.groups)
    return Form(shape, groups, form.free, form.sums_to_one and dim != form.rank - 1, form.weight)


def dropped(form: Form, dim: int, shape: tuple[int, ...]) -> Form:
    """Without dimension ``dim``, of size 1."""
    groups: list[Group] = []
    for group in form.groups:
        if dim in group.dims and len(group.dims) > 1:
            group = group.first_of(dim)
        if dim not in group.dims:
            groups.append(group.at(tuple(d - (d > dim) for d in group.dims)))
    return Form(shape, tuple(groups), frozenset(d - (d > dim) for d in form.free if d != dim))


def select(walk: Walk, node: Node) -> Form | None:
    """One entry of a dimension, which goes."""
    form, dim, index = walk.form(node.inputs[0]), node.argument(1), node.argument(2)
    dim %= form.rank
    own = form.group(dim)
    if own is not None and index is None:
        return None
    if own is not None and len(own.dims) == 1:
        walk.pin(own.taken(dim, [index]), f"{describe(node)} takes one of them by its number")
    made = take(form, dim, [index or 0], form.shape) if own is not None else form
    return dropped(made, dim, tuple(node.output.shape or ()))


def slices(walk: Walk, node: Node) -> Form | None:
    """A range of a dimension."""
    form = walk.form(node.inputs[0])
    shape = tuple(node.output.shape or ())
    dim = node.argument(1, 0) % form.rank
    if form.group(dim) is None or shape == form.shape:
        whole = shape[-1:] == form.shape[-1:]  # a part of the probabilities does not sum to one
        return replace(form, shape=shape, weight=None, sums_to_one=form.sums_to_one and whole)
    if not all(value.is_constant for value in node.inputs[1:]):
        return None
    start, stop = node.argument(2, 0), node.argument(3, WHOLE)
    if node.kind == "narrow":
        stop = start + shape[dim]
    step = node.argument(4, 1) if node.kind == "slice" else 1
    index = np.arange(form.shape[dim])[start : None if stop is None else stop : step]
    return take(form, dim, index, shape) if len(index) == shape[dim] else None


def pieces(walk: Walk, node: Node) -> list[Form]:
    """A tensor in consecutive parts: chunk, split."""
    form = walk.form(node.inputs[0])
    dim = node.argument(2, 0) % form.rank
    made: list[Form] = []
    start = 0
    for value in node.outputs:
        shape = tuple(value.shape or ())
        made.append(take(form, dim, np.arange(start, start + shape[dim]), shape))
        start += shape[dim]
    return made


def unbind(walk: Walk, node: Node) -> list[Form] | None:
    """Every entry of a dimension, which goes."""
    form = walk.form(node.inputs[0])
    dim = node.argument(1, 0) % form.rank
    own = form.group(dim)
    if own is not None and len(own.dims) == 1:
        return None
    return [dropped(take(form, dim, [k], form.shape), dim, tuple(v.shape or ())) for k, v in enumerate(node.outputs)]


def repeat(walk: Walk, node: Node) -> Form | None:
    """``repeat_interleave`` by a number, ``repeat`` by numbers."""
    form, shape = walk.form(node.inputs[0]), tuple(node.output.shape or ())
    if node.kind == "repeat":
        times = node.argument(1)
        if times is None or len(times) != form.rank:
            return None
        made = form
        for dim, count in enumerate(times):
            if count != 1:
                sizes = (*made.shape[:dim], made.shape[dim] * count, *made.shape[dim + 1 :])
                made = take(made, dim, np.tile(np.arange(made.shape[dim]), count), sizes)
        return replace(made, weight=None)
    count, dim = node.argument(1), node.argument(2)
    if not isinstance(count, int) or dim is None:
        return None
    return take(form, dim % form.rank, np.repeat(np.arange(form.shape[dim]), count), shape)


def rolled(walk: Walk, node: Node) -> Form | None:
    """Entries in another order along some dimensions."""
    form = walk.form(node.inputs[0])
    dims = node.argument(2 if node.kind == "roll" else 1)
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or any(form.group(dim % form.rank) for dim in dims):  # without dimensions all elements are rolled
        return None
    return replace(form, weight=None, sums_to_one=False)


VIEWS: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"), reshape),
    **dict.fromkeys(("transpose", "t", "swapaxes", "numpy_T", "swapdims"), transpose),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"), pieces),
    **dict.fromkeys(("slice", "narrow"), slices),
    **dict.fromkeys(("repeat", "repeat_interleave"), repeat),
    **dict.fromkeys(("roll", "flip"), rolled),
    "_reshape_alias": reshape,
    "movedim": movedim,
    "permute": permute,
    "select": select,
    "unbind": unbind,
}
"""Operations that only move elements."""
