"""The rule for ``einsum``: a product with a parameter, or of two tensors, whatever the order of their dimensions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from tritprune.slimming.forms import Form, Group, permuted, reshaped
from tritprune.slimming.nodes import Node, Value
from tritprune.slimming.rules_sums import product
from tritprune.slimming.walk import Rule, Walk, describe


@dataclass(frozen=True)
class Equation:
    """``bqhd,bkhd->bhqk`` in parts; an ellipsis is written out.

    Args:
        operands: the labels of each operand.
        result: the labels of the result.
    """

    operands: tuple[str, ...]
    result: str

    @classmethod
    def of(cls, text: str, ranks: Sequence[int]) -> "Equation | None":
        """Parsed; None if a label is twice in one place, or the ranks do not fit."""
        left, arrow, right = text.replace(" ", "").partition("->")
        written = left.split(",")
        hidden = max((rank - len(p.replace("...", "")) for p, rank in zip(written, ranks, strict=False)), default=0)
        spare = [chr(code) for code in range(ord("A"), ord("Z") + 1) if chr(code) not in text][: max(hidden, 0)]
        parts = [
            p.replace("...", "".join(spare[len(spare) - (rank - len(p.replace("...", ""))) :]))
            for p, rank in zip(written, ranks, strict=False)
        ]
        if not arrow:
            once = sorted({c for c in left if c.isalpha() and left.count(c) == 1})
            right = ("..." if "..." in left else "") + "".join(once)
        result = right.replace("...", "".join(spare))
        fits = len(written) == len(ranks) and [len(p) for p in parts] == list(ranks)
        return cls(tuple(parts), result) if fits and all(len(set(p)) == len(p) for p in (*parts, result)) else None


def einsum(walk: Walk, node: Node) -> Form | None:
    """A permutation of one operand, or the product of two; sums over one operand alone are not followed."""
    values = factors(node)
    equation = Equation.of(str(node.argument(0)), [value.rank for value in values])
    if equation is None:
        return None
    forms = [walk.form(value) for value in values]
    shape = tuple(node.output.shape or ())
    if len(forms) == 1 and set(equation.operands[0]) == set(equation.result):
        return permuted(forms[0], [equation.operands[0].index(label) for label in equation.result], shape)
    if len(forms) != 2:
        return None
    (a, b), (left, right) = forms, equation.operands
    if not set(left) ^ set(right) <= set(equation.result):
        return None
    summed = [label for label in left if label in right and label not in equation.result]
    shared = [label for label in equation.result if label in left and label in right]
    if (a.weight is not None or b.weight is not None) and not shared and summed:
        x, weight = (a, b) if b.weight is not None else (b, a)
        of_x, of_weight = (left, right) if b.weight is not None else (right, left)
        return _weighted(walk, node, (x, of_x), (weight, of_weight), summed, equation.result)
    if b.sums_to_one and not a.sums_to_one:
        a, b, left, right = b, a, right, left
    return _product(walk, node, (a, left), (b, right), summed, shared, equation.result)


def factors(node: Node) -> tuple[Value, ...]:
    """The operands of an ``einsum``."""
    return node.inputs[1].items if len(node.inputs) > 1 else ()


def _weighted(
    walk: Walk, node: Node, x: tuple[Form, str], weight: tuple[Form, str], summed: list[str], result: str
) -> Form:
    """``x`` with a parameter: each label that is summed over is one that the parameter reads."""
    (form, labels), (own, of_own) = x, weight
    gone = set(summed)
    for label in summed:  # padded: no constant is folded, there is no bias to hold it
        walk.reads(node, form, labels.index(label), own, of_own.index(label), bias=None, padded=True)
    made: list[Group] = []
    for group in form.groups:
        rest = [dim for dim in group.dims if labels[dim] not in gone]
        for dim in group.dims if rest else ():
            group = group.first_of(dim) if dim not in rest else group
        if rest:
            made.append(group.unknown().at(tuple(result.index(labels[dim]) for dim in group.dims)))
    name, dims = own.weight or ("", ())
    for dim, label in enumerate(of_own):
        group = own.group(dim)
        if group is None or label in gone:
            continue
        rows = group.atoms - walk.weights.first[name, dims[dim]]
        zero = walk.weights.zeros(name, dims[dim])[rows]
        made.append(group.with_constants(zero, np.zeros(zero.shape)).at((result.index(label),)))
    free = frozenset(result.index(labels[dim]) for dim in form.free if labels[dim] not in gone)
    return Form(tuple(node.output.shape or ()), tuple(made), free)


def _product(
    walk: Walk,
    node: Node,
    one: tuple[Form, str],
    two: tuple[Form, str],
    summed: list[str],
    shared: list[str],
    result: str,
) -> Form | None:
    """Two tensors as ``[shared.., n, k] @ [shared.., k, m]``; what lies between is moved there and back."""
    (a, left), (b, right) = one, two
    size = {label: n for form, labels in (one, two) for label, n in zip(labels, form.shape, strict=True)}
    rows, columns = ([label for label in result if label in own and label not in shared] for own in (left, right))

    def matrix(form: Form, labels: str, order: list[list[str]]) -> Form:
        flat = [label for part in order for label in part]
        moved = permuted(form, [labels.index(label) for label in flat], tuple(size[label] for label in flat))
        sizes = (*(size[label] for label in shared), *(prod(size[label] for label in part) for part in order[1:]))
        made, lost = reshaped(moved, sizes)
        for group in lost:
            walk.pin(group, f"{describe(node)} sums over them in parts")
        return made

    sums = a.sums_to_one and summed == [left[-1]]
    a = replace(matrix(a, left, [shared, rows, summed]), sums_to_one=sums)
    b = matrix(b, right, [shared, summed, columns])
    made = product(walk, node, a, b, (*a.shape[:-1], b.shape[-1]))
    if made is None:
        return None
    order = [*shared, *rows, *columns]
    opened, lost = reshaped(made, tuple(size[label] for label in order))
    for group in lost:
        walk.pin(group, f"{describe(node)} mixes them with other dimensions")
    walk.split += [group for group in opened.groups if len(group.dims) > 1]
    return permuted(opened, [order.index(label) for label in result], tuple(node.output.shape or ()))


EINSUM: dict[str, Rule] = {"einsum": einsum}
"""Sums of products that are written as an equation."""
