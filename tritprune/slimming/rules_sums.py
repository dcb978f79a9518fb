"""Rules for operations that sum over a dimension: linears, convolutions, products of tensors, attention."""

from dataclasses import replace

import numpy as np

from tritprune.slimming.forms import Form, Group
from tritprune.slimming.nodes import Node, Value
from tritprune.slimming.rules_elementwise import aligned, combined
from tritprune.slimming.walk import Rule, Walk, describe


def linear(walk: Walk, node: Node) -> Form:
    """``y = x W' + b`` with W [out, in]."""
    x, weight, bias = node.inputs[0], walk.form(node.inputs[1]), node.inputs[2] if len(node.inputs) > 2 else None
    return _weighted(walk, node, walk.form(x), weight, 1, 0, bias)


def addmm(walk: Walk, node: Node) -> Form | None:
    """``y = b + x W`` with W [in, out], as Hugging Face's Conv1D computes it."""
    if node.argument(3, 1) != 1 or node.argument(4, 1) != 1:
        return None
    weight = walk.form(node.inputs[2])
    if weight.weight is None:
        return None
    return _weighted(walk, node, walk.form(node.inputs[1]), weight, 0, 1, node.inputs[0])


def _weighted(
    walk: Walk, node: Node, x: Form, weight: Form, summed: int, kept: int, bias: Value | None, padded: bool = False
) -> Form:
    """Dimension ``summed`` of ``weight`` with the last of ``x``; dimension ``kept`` is the result's last."""
    if bias is not None and bias.is_constant:
        bias = None
    walk.reads(node, x, x.rank - 1, weight, summed, bias=bias, padded=padded)
    shape = tuple(node.output.shape or ())
    read = x.group(x.rank - 1)
    groups = [g.unknown() for g in x.without(*([read] if read else []))]
    if read is not None and len(read.dims) > 1:
        dims = tuple(d for d in read.dims if d != x.rank - 1)
        groups.append(Group.of(dims, read.atoms.take(0, read.axis(x.rank - 1))))
    groups += _outputs(walk, weight, kept, len(shape) - 1, bias)
    return Form(shape, tuple(groups), x.free - {x.rank - 1})


def _outputs(walk: Walk, weight: Form, kept: int, dim: int, bias: Value | None) -> list[Group]:
    """The group of what a weight makes: a row of zeros makes its bias."""
    own = weight.group(kept)
    offset = walk.form(bias).group(0) if bias is not None else None
    if own is None:
        if offset is not None:
            walk.pin(offset, "they are added to a single number")
        return []
    if offset is not None:
        walk.merge(own.atoms, offset.atoms)
    made = Group.of((dim,), own.atoms)
    if weight.weight is None or (bias is not None and offset is None):  # computed while it runs
        return [made]
    name, dims = weight.weight
    rows = own.atoms - walk.weights.first[name, dims[kept]]
    zero = walk.weights.zeros(name, dims[kept])[rows]
    if offset is not None:
        return [made.with_constants(zero & offset.known, offset.constant)]
    added = walk.weights.bias_of(name, None)
    return [made.with_constants(zero, np.zeros(zero.shape) if added is None else added[rows])]


def grouped(walk: Walk, node: Node) -> Form | None:
    """``y = x W[expert of its row]`` with the weights of all experts in one [experts, in, out]: they have one width."""
    weight = walk.form(node.inputs[1])
    if weight.rank != 3 or len(walk.form(node.inputs[0]).shape) != 2:
        return None
    return _weighted(walk, node, walk.form(node.inputs[0]), weight, 1, 2, None)


def convolution(walk: Walk, node: Node) -> Form | None:
    """Channels in dimension 1; the weight is [out, in / groups, ...], transposed [in, out / groups, ...]."""
    x, weight = walk.form(node.inputs[0]), walk.form(node.inputs[1])
    bias = None if node.inputs[2].is_constant else node.inputs[2]
    shape = tuple(node.output.shape or ())
    padding, transposed, groups = node.argument(4), node.argument(6), node.argument(8)
    spatial = len(weight.shape) - 2
    channel = len(shape) - spatial - 1
    if x.rank != len(shape) or any(d != channel for g in x.groups for d in g.dims):
        return None
    padded = transposed or padding is None or (padding != "valid" and any(padding))
    if groups == 1:
        summed, kept = (0, 1) if transposed else (1, 0)
        walk.reads(node, x, channel, weight, summed, bias=bias, padded=bool(padded))
        made = _outputs(walk, weight, kept, channel, bias)
        return Form(shape, tuple(made if not transposed else [g.unknown() for g in made]))
    if transposed:
        return None
    return _grouped(walk, node, x, weight, channel, groups, bias, bool(padded))


def _grouped(
    walk: Walk, node: Node, x: Form, weight: Form, channel: int, groups: int, bias: Value | None, padded: bool
) -> Form | None:
    """A group's inputs and outputs stay or go together; in a depthwise convolution a group is a channel."""
    read, own = x.group(channel), weight.group(0)
    if read is None or own is None or not walk.is_whole(weight, 0):
        return None
    inputs, outputs = read.atoms.reshape(groups, -1), own.atoms.reshape(groups, -1)
    walk.merge(inputs, inputs[:, :1])
    walk.merge(outputs, inputs[:, :1])
    inner = weight.group(1)
    if inner is not None:
        walk.pin(inner, f"{describe(node)} is a grouped convolution")
    (made,) = _outputs(walk, weight, 0, channel, bias)
    computed = bias is not None and bias.parameter is None
    if inputs.shape[1] == 1 and not computed:  # a constant stays one where no padding's zeros come in between
        name = weight.weight[0]  # type: ignore[index]
        total = walk.weights.tensors[name].double().flatten(1).sum(1).cpu().numpy()
        offset = walk.weights.bias_of(name, bias.parameter if bias is not None else None)
        times = outputs.shape[1]
        constant, known = np.repeat(read.constant, times), np.repeat(read.known, times)
        known = known & ((constant == 0) | (not padded))
        result = np.where(made.known, made.constant, constant * total + (0.0 if offset is None else offset))
        made = made.with_constants(made.known | known, result)
    return Form(tuple(node.output.shape or ()), (made,))


def matmul(walk: Walk, node: Node) -> Form | None:
    """``matmul`` and ``bmm``: with a parameter on the right a linear, else a product of two tensors."""
    left, right = walk.form(node.inputs[0]), walk.form(node.inputs[1])
    if left.rank >= 1 and right.rank == 2 and right.weight is not None:
        return _weighted(walk, node, left, right, 0, 1, None)
    if left.rank < 2 or right.rank < 2:
        return None
    return product(walk, node, left, right, tuple(node.output.shape or ()))


def baddbmm(walk: Walk, node: Node) -> Form | None:
    """``beta a + alpha (b @ c)``."""
    made = product(walk, node, walk.form(node.inputs[1]), walk.form(node.inputs[2]), tuple(node.output.shape or ()))
    return None if made is None else _added(walk, node, made, node.inputs[0])


def product(walk: Walk, node: Node, left: Form, right: Form, shape: tuple[int, ...]) -> Form | None:
    """``left [.., n, k] @ right [.., k, m]``, the dimensions before broadcast together."""
    rank = len(shape)
    a = left.moved((*([1] * (rank - left.rank)), *left.shape), lambda d: d + rank - left.rank)
    b = right.moved((*([1] * (rank - right.rank)), *right.shape), lambda d: d + rank - right.rank)
    reason = f"{describe(node)} sums over all of them"
    batch: list[Form] = []
    free: list[Group] = []
    for form, summed, other in ((a, rank - 1, rank - 2), (b, rank - 2, rank - 1)):
        kept: list[Group] = []
        for group in form.groups:
            if summed in group.dims:
                walk.lock_or_pin(group, [summed], reason)
                rest = tuple(d for d in group.dims if d != summed)
                if not rest:
                    continue
                group = group.first_of(summed).unknown()
            kept.append(group)
        outer = [g for g in kept if other not in g.dims]
        inner = [walk.lock(g, [other]) if len(g.dims) > 1 else g for g in kept if other in g.dims]
        free += inner
        sizes = tuple(1 if d >= rank - 2 else s for d, s in enumerate(form.shape))
        batch.append(
            Form(sizes, tuple(outer) + tuple(g.first_of(other).unknown() for g in inner if len(g.dims) > 1), form.free)
        )
    batch = [aligned(walk, node, form, (*shape[:-2], 1, 1)) for form in batch]
    groups = combined(walk, node, batch, (*shape[:-2], 1, 1))
    named = {frozenset(g.dims) for g in free}
    groups = [g.unknown() for g in groups if not any(set(g.dims) <= dims for dims in named)]
    for group in free:
        over = [g for g in free if g is not group and set(g.dims) & set(group.dims)]
        if over:
            walk.pin(group, f"{describe(node)} makes every pair of them")
    made = [
        _mixed(left, group, rank)
        for group in free
        if not any(g is not group and set(g.dims) & set(group.dims) for g in free)
    ]
    kept_free = frozenset(d for d in range(rank - 2) if all(f.shape[d] == 1 or d in f.free for f in (a, b)))
    return Form(shape, (*groups, *made), kept_free)


def _mixed(left: Form, group: Group, rank: int) -> Group:
    """What is constant on the right stays so where the left only averages it; zero stays zero."""
    if rank - 1 not in group.dims:
        return group.unknown()
    stays = group.known & ((group.constant == 0) | left.sums_to_one)
    return group.with_constants(stays, group.constant)


def attention(walk: Walk, node: Node) -> Form | None:
    """``scaled_dot_product_attention``: softmax(Q K' + mask) V, heads in the third dimension from the end."""
    query, key, value = (walk.form(v) for v in node.inputs[:3])
    mask, dropout = node.inputs[3], node.argument(4, 0.0)
    shape = tuple(node.output.shape or ())
    if len(node.inputs) > 7 and node.argument(7) is True:
        query_heads = query.shape[-3]
        key, value = (_repeated(form, query_heads) for form in (key, value))
    transposed = key.moved(
        (*key.shape[:-2], key.shape[-1], key.shape[-2]),
        lambda d: {key.rank - 1: key.rank - 2, key.rank - 2: key.rank - 1}.get(d, d),
    )
    scores = product(walk, node, query, transposed, (*shape[:-1], key.shape[-2]))
    if scores is None:
        return None
    if not mask.is_constant:
        scores = _added(walk, node, scores, mask)
    for group in scores.groups:
        if scores.rank - 1 in group.dims:
            walk.lock_or_pin(group, [scores.rank - 1], f"{describe(node)} normalises over them")
    probabilities = replace(scores, groups=tuple(g.unknown() for g in scores.groups), sums_to_one=dropout == 0)
    return product(walk, node, probabilities, value, shape)


def _repeated(form: Form, heads: int) -> Form:
    dim = form.rank - 3
    times = heads // form.shape[dim]
    groups = tuple(
        g.taken(dim, np.repeat(np.arange(form.shape[dim]), times)) if dim in g.dims else g for g in form.groups
    )
    return replace(form, shape=(*form.shape[:dim], heads, *form.shape[dim + 1 :]), groups=groups)


def _added(walk: Walk, node: Node, form: Form, value: Value) -> Form:
    """``form`` plus a tensor that is broadcast to it: a mask, a position bias."""
    groups = combined(walk, node, [form, aligned(walk, node, walk.form(value), form.shape)], form.shape)
    return replace(form, groups=tuple(group.unknown() for group in groups), sums_to_one=False)


GROUPED = ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")
"""Products of each row with the weight of its expert."""

SUMS: dict[str, Rule] = {
    **dict.fromkeys(GROUPED, grouped),
    "addmm": addmm,
    "baddbmm": baddbmm,
    "bmm": matmul,
    "convolution": convolution,
    "linear": linear,
    "matmul": matmul,
    "mm": matmul,
    "scaled_dot_product_attention": attention,
}
"""Operations that sum over a dimension."""
