"""Rules for operations that treat each element alone, on one tensor or on several that are broadcast together."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tritprune.slimming.elementwise import ELEMENTWISE, IDENTITIES, UNCOMPUTED, apply
from tritprune.slimming.forms import Array, Form, Group
from tritprune.slimming.nodes import Node, Value
from tritprune.slimming.walk import Rule, Walk, describe


def elementwise(walk: Walk, node: Node) -> Form | None:
    """The result has the units of all operands; those at the same place stay or go together."""
    shape = tuple(node.output.shape or ())
    tensors = [value for value in node.inputs if value.shape is not None]
    if any(value.items for value in node.inputs):
        return None
    operands = {value.name: aligned(walk, node, walk.form(value), shape) for value in tensors}
    groups = combined(walk, node, list(operands.values()), shape)
    if node.kind in ELEMENTWISE and node.kind not in IDENTITIES:
        groups = [_computed(node, group, operands) for group in groups]
    else:
        groups = [group.unknown() for group in groups]
    free = frozenset(d for d in range(len(shape)) if all(_yields(form, d) for form in operands.values()))
    parts = {d: parts for form in operands.values() for d, parts in form.parts}
    parts = {
        d: p for d, p in parts.items() if all(_yields(f, d) or dict(f.parts).get(d) == p for f in operands.values())
    }
    return Form(shape, tuple(groups), free, parts=tuple(parts.items()))


def identity(walk: Walk, node: Node) -> Form | None:
    """The result is the operand: dropout in evaluation, copies, casts."""
    form = walk.form(node.inputs[0])
    if node.kind.endswith("dropout") and node.argument(2) is not False and node.argument(1) != 0:
        return Form(form.shape, tuple(group.unknown() for group in form.groups))
    return form


def fill(walk: Walk, node: Node) -> Form:
    """A tensor of one number, whose size the model's code chooses."""
    shape = tuple(node.output.shape or ())
    return Form(shape, free=frozenset(range(len(shape))))


def aligned(walk: Walk, node: Node, form: Form, shape: tuple[int, ...]) -> Form:
    """An operand in the result's dimensions; what is broadcast has size 1 there and no group."""
    ahead = len(shape) - form.rank
    made = form.moved((*([1] * ahead), *form.shape), lambda d: d + ahead)
    kept: list[Group] = []
    for group in made.groups:
        grown = [dim for dim in group.dims if made.shape[dim] != shape[dim]]
        for dim in grown[: len(group.dims) - 1]:
            group = group.first_of(dim)
        if set(grown) & set(group.dims):
            walk.pin(group, f"{describe(node)} repeats them")
        else:
            kept.append(group)
    return replace(made, groups=tuple(kept))


def combined(walk: Walk, node: Node, forms: list[Form], shape: tuple[int, ...]) -> list[Group]:
    """The groups of operands that are broadcast together, tied to one another; constants are those of the first."""
    made: list[Group] = []
    for form in forms:
        for group in form.groups:
            group = _tied(walk, node, made, group)
            if group is not None:
                made.append(group)
    for form in forms:
        for group in made:
            alone = [d for d in group.dims if form.shape[d] > 1 and form.group(d) is None]
            bare = [d for d in alone if not form.follows(d, group)]
            if bare:
                walk.lock_or_pin(group, bare, f"{describe(node)} combines them with {_other(walk, node)}")
    return made


def _tied(walk: Walk, node: Node, made: list[Group], group: Group) -> Group | None:
    """Tie ``group`` to those in ``made`` that share its dimensions; None if these stand for it."""
    for k, other in enumerate(made):
        shared = [dim for dim in other.dims if dim in group.dims]
        if not shared:
            continue
        if set(other.dims) == set(group.dims):
            walk.merge(other.atoms, group.ordered(other.dims).atoms)
            return None
        if set(group.dims) < set(other.dims):
            _tie_part(walk, node, other, group)
            return None
        if set(other.dims) < set(group.dims):
            made.pop(k)
            _tie_part(walk, node, group, other)
            return _tied(walk, node, made, group)
        reason = f"{describe(node)} combines them with dimensions that are divided otherwise"
        walk.pin(other, reason)
        walk.pin(group, reason)
        return None
    return group


def _tie_part(walk: Walk, node: Node, whole: Group, part: Group) -> None:
    """``part`` has some of the dimensions of ``whole`` and is the same along the others."""
    if part.dims == whole.dims[-1:]:  # inside of a head: all heads share it
        walk.lock(whole, part.dims)
        walk.pin(part, f"{describe(node)} shares them between heads")
        return
    order = [dim for dim in whole.dims if dim in part.dims]
    spread = [whole.atoms.shape[k] if dim in order else 1 for k, dim in enumerate(whole.dims)]
    walk.merge(whole.atoms, part.ordered(order).atoms.reshape(spread))


def _other(walk: Walk, node: Node) -> str:
    """In words, an operand of ``node`` without units."""
    for value in node.operands():
        if value.rank and not walk.form(value).groups:
            behind = walk.behind(value)
            if {"pow", "arange"} <= {made.kind for made in behind}:
                return "slopes that the model's code computes from the number of heads (ALiBi), fewer would get others"
            first = behind[-1].inputs[0] if behind and behind[-1].inputs else value
            if first.name in walk.graph.inputs:
                return "the model's input"
    return "numbers for each of them that no parameter gives"


def _yields(form: Form, dim: int) -> bool:
    return form.shape[dim] == 1 or dim in form.free


def _computed(node: Node, group: Group, operands: dict[str, Form]) -> Group:
    """The constants of the result along ``group``: known where those of all operands are, or a factor is zero."""
    shape = group.atoms.shape
    known = np.ones(shape, bool)
    zero = np.zeros(shape, bool)
    arguments: list[Any] = []
    for value in node.inputs:
        if value.shape is None:
            arguments.append(value.constant)
            continue
        mine, number = _constants(value, operands[value.name], group)
        known &= mine
        zero |= mine & (number == 0)
        arguments.append(torch.from_numpy(np.ascontiguousarray(number)))
    if not known.any() and not (node.kind == "mul" and zero.any()):
        return group.unknown()
    result = np.asarray(apply(node, arguments).double().expand(shape))
    if node.kind == "mul":
        known, result = known | zero, np.where(zero, 0.0, result)
    return group.with_constants(known, result)


def _constants(value: Value, form: Form, group: Group) -> tuple[Array, Array]:
    """Where an operand is known along ``group``, and its numbers there (1 where it is not known)."""
    shape = group.atoms.shape
    if value.is_constant:
        if value.constant.numel() == 1:
            return np.ones(shape, bool), np.full(shape, float(value.constant))
        return np.zeros(shape, bool), np.ones(shape)
    own = next((g for g in form.groups if set(g.dims) == set(group.dims)), None)
    if own is None:
        return np.zeros(shape, bool), np.ones(shape)
    own = own.ordered(group.dims)
    return own.known, np.where(own.known, own.constant, 1.0)


def glu(walk: Walk, node: Node) -> Form | None:
    """One half times the sigmoid of the other."""
    form = walk.form(node.inputs[0])
    dim = node.argument(1, -1) % form.rank
    group = form.group(dim)
    if group is None or len(group.dims) > 1:
        return None
    half = form.shape[dim] // 2
    first, second = (group.map(group.dims, lambda a, s=s: a[s]) for s in (slice(half), slice(half, None)))
    walk.merge(first.atoms, second.atoms)
    with np.errstate(over="ignore"):
        result = first.constant / (1 + np.exp(-second.constant))
    zero = first.known & (first.constant == 0)
    made = first.with_constants(zero | (first.known & second.known), np.where(zero, 0.0, result))
    return Form(tuple(node.output.shape or ()), (*form.without(group), made))


POINTWISE: dict[str, Rule] = {
    **dict.fromkeys((*ELEMENTWISE, *UNCOMPUTED), elementwise),
    **dict.fromkeys(IDENTITIES, identity),
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), fill),
    "glu": glu,
}
"""Operations that treat each element alone."""
