"""Rules for tensors that are put behind one another."""

from math import prod

import numpy as np

from tritprune.slimming.forms import Form, Group
from tritprune.slimming.nodes import Node
from tritprune.slimming.walk import Rule, Walk, describe


def concatenate(walk: Walk, node: Node) -> Form | None:
    """Tensors behind one another along a dimension, or along a new one (stack)."""
    shape = tuple(node.output.shape or ())
    dim = node.argument(1, 0) % max(len(shape), 1)
    parts = [walk.form(value) for value in node.inputs[0].items]
    if node.kind != "stack":
        parts = [part for part in parts if part.rank > dim and part.shape[dim]]
    if not parts:
        return None
    if node.kind == "stack":
        parts = [p.moved((*p.shape[:dim], 1, *p.shape[dim:]), lambda d: d + (d >= dim)) for p in parts]
    along = [part.group(dim) for part in parts]
    others = [(part, part.without(*([own] if own else []))) for part, own in zip(parts, along, strict=True)]
    groups = _common(walk, node, others)
    if groups is None:
        return None
    if any(own is not None for own in along):
        joined = _joined(walk, node, parts, along, dim)
        if joined is None:
            return None
        groups.append(joined)
    free = frozenset.intersection(*(part.free for part in parts)) - {dim}
    return Form(shape, tuple(groups), free)


def _common(walk: Walk, node: Node, parts: list[tuple[Form, tuple[Group, ...]]]) -> list[Group] | None:
    """The groups that all parts share: what goes from one goes from all."""
    made = list(parts[0][1])
    named = {dim for group in made for dim in group.dims}
    for part, groups in parts[1:]:
        if not groups and named <= part.free:  # as many as the others have: rows of one number
            made = [group.unknown() for group in made]
            continue
        if {frozenset(g.dims) for g in groups} != {frozenset(g.dims) for g in made}:
            return None
        for k, group in enumerate(made):
            other = next(g for g in groups if set(g.dims) == set(group.dims)).ordered(group.dims)
            walk.merge(group.atoms, other.atoms)
            same = group.known & other.known & (group.constant == other.constant)
            made[k] = group.with_constants(same, group.constant)
    return made


def _joined(walk: Walk, node: Node, parts: list[Form], along: list[Group | None], dim: int) -> Group | None:
    first = max((own for own in along if own is not None), key=lambda own: len(own.dims))
    groups: list[Group] = []
    for part, own in zip(parts, along, strict=True):
        if own is None and len(first.dims) == 1:  # its own entries have no atoms; they cannot go, others around can
            groups.append(Group.of((dim,), walk.weights.new_atoms(part.shape[dim])))
            walk.pin(groups[-1], "they do not come from a parameter")
        elif own is None or own.dims == (dim,) != first.dims:  # what all heads share, repeated for each
            if not set(first.dims) - {dim} <= part.free:
                return None
            sizes = tuple(part.shape[d] if d == dim else first.atoms.shape[k] for k, d in enumerate(first.dims))
            groups.append(Group.of(first.dims, walk.weights.new_atoms(prod(sizes)).reshape(sizes)))
            if own is not None:
                walk.pin(own, f"{describe(node)} repeats them for each head")
        elif set(own.dims) != set(first.dims):
            return None
        else:
            groups.append(own.ordered(first.dims))
    axis = first.axis(dim)
    if len(first.dims) > 1:
        rest = [g.atoms.take(0, axis) for g in groups]
        for other in rest[1:]:
            walk.merge(rest[0], other)
    arrays = [np.concatenate([getattr(g, name) for g in groups], axis) for name in ("atoms", "known", "constant")]
    joined = Group(first.dims, *arrays)
    walk.split += [joined] if len(joined.dims) > 1 else []
    return joined


JOINS: dict[str, Rule] = dict.fromkeys(("cat", "stack", "concat", "concatenate"), concatenate)
"""Joins."""
