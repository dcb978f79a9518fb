"""Attention blocks in a traced graph: query, key and value linears, softmax(QK')V per head, one output linear.

A block is found outwards from the operation that mixes the values: ``scaled_dot_product_attention``, or the matrix
product behind a softmax. Heads can be cut where the trace proves that each head keeps to itself from the linears to the
output linear: one axis of every tensor in between counts the heads, and only views and scalings touch it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from tritprune.slimming.elementwise import base_kind, is_identity
from tritprune.slimming.graph import Graph, Node, Value
from tritprune.slimming.linears import Linears, describe

PRODUCTS = ("matmul", "bmm")
VIEWS = ("view", "reshape", "unflatten", "flatten", "_unsafe_view", "_reshape_alias")
SCALINGS = ("mul", "div")
MASKINGS = (*SCALINGS, "add", "masked_fill")


@dataclass(frozen=True)
class Attention:
    """One attention block.

    Args:
        query, key, value: names of the linears that feed it; several where the trace shows several.
        output: name of the linear that reads all heads; None if there is none.
        heads: number of heads as traced.
        obstacle: why no head can be cut; None if heads can be cut.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    output: str | None
    heads: int
    obstacle: str | None

    @property
    def linears(self) -> tuple[str, str, str, str]:
        """The names of the four linears of a block that can be cut."""
        return (self.query[0], self.key[0], self.value[0], str(self.output))


class MixedHeadsError(Exception):
    """The walk met something that does not keep the heads apart; the message says what."""


def find_attention(graph: Graph, model: nn.Module) -> list[Attention]:
    """Every attention block of ``model``, in order of execution, cuttable or not."""
    linears = Linears(graph, model)
    blocks = (_block(core, linears) for core in _cores(graph))
    return [block for block in blocks if block.query and block.key and block.value]


@dataclass(frozen=True)
class _Core:
    """The operations of softmax(QK')V: what they read, and every value that stays inside."""

    query: Value
    key: Value
    value: Value
    mixed: Value
    bias: tuple[Value, ...]
    dropout: bool
    inside: tuple[Node, ...]


def _cores(graph: Graph) -> Iterator[_Core]:
    for node in graph.nodes:
        if node.kind == "scaled_dot_product_attention":
            query, key, value, mask, dropout, *_ = node.inputs
            bias = () if mask.is_constant and mask.constant is None else (mask,)
            yield _Core(query, key, value, node.output, bias, dropout.constant != 0, (node,))
        elif node.kind in PRODUCTS and (core := _explicit_core(node, graph)) is not None:
            yield core


def _explicit_core(product: Node, graph: Graph) -> _Core | None:
    """softmax(scale * QK' + mask) V written out; None if ``product`` is no such thing."""
    inside: list[Node] = [product]
    bias: list[Value] = []
    normalised = False  # a softmax was met; what follows it may not change the sum of the probabilities
    node = graph.producer(product.inputs[0])
    while node is not None and node.kind not in PRODUCTS:
        kind = base_kind(node)
        if kind == "softmax" and node.inputs[1].constant in (-1, rank_of(node.output) - 1):
            normalised = True
        elif normalised and kind in MASKINGS:
            bias += [value for value in node.inputs[1:2] if value.shape is not None]
        elif not (is_identity(node) or kind == "to"):
            return None
        inside.append(node)
        node = graph.producer(node.inputs[0])
    if node is None or not normalised or rank_of(node.output) < 3:
        return None
    query, key = node.inputs
    return _Core(query, key, product.inputs[1], product.output, tuple(bias), False, (*reversed(inside), node))


def rank_of(value: Value) -> int:
    """Number of dimensions of a traced tensor; 0 if it is none."""
    return len(value.shape or ())


def _block(core: _Core, linears: Linears) -> Attention:
    query, key, value = (_nearest_linears(v, linears) for v in (core.query, core.key, core.value))
    output = _next_linear(core.mixed, linears)
    shape = core.query.shape or ()
    heads = shape[-3] if len(shape) >= 3 else 0
    obstacle = _obstacle(core, heads, (query, key, value), output, linears)
    return Attention(query, key, value, output, heads, obstacle)


def _obstacle(
    core: _Core, heads: int, feeding: tuple[tuple[str, ...], ...], output: str | None, linears: Linears
) -> str | None:
    names = [name for names in feeding for name in names]
    if output is None:
        return "no single linear reads its heads"
    if any(len(linear) != 1 for linear in feeding) or len(set(names)) != 3:
        return f"query, key and value are not three linears of their own ({', '.join(dict.fromkeys(names))})"
    if core.dropout:
        return "its attention probabilities are dropped out even in evaluation"
    for name in (*names, output):
        reason = linears.obstacle(name)
        if reason is not None:
            return f"{name} cannot change its size: {reason}"
    counts = [linears.modules[name].out_features for name in names]
    if len({*counts, linears.modules[output].in_features}) != 1:
        return f"query, key and value have {', '.join(map(str, counts))} outputs: its heads share keys and values"
    for bias in core.bias:
        if bias.shape is None or (len(bias.shape) >= 3 and bias.shape[-3] != 1):
            return "its mask or position bias has one entry per head"
    try:
        path = list(core.inside)
        path += _walk_back(core.query, heads, linears, scaled=True)
        path += _walk_back(core.key, heads, linears, scaled=True)
        path += _walk_back(core.value, heads, linears, scaled=False)
        path += _walk_forward(core.mixed, heads, linears)
    except MixedHeadsError as stuck:
        return str(stuck)
    return _read_elsewhere(path, linears)


def _walk_back(value: Value, heads: int, linears: Linears, *, scaled: bool) -> list[Node]:
    """From one input of the core back to its linear; the nodes on the way, the linear among them."""
    axis, seen = rank_of(value) - 3, []
    while True:
        node = linears.graph.producer(value)
        if node is None or value.shape is None or axis < 0 or value.shape[axis] != heads:
            raise MixedHeadsError("the trace does not show which axis counts its heads")
        seen.append(node)
        source = node.inputs[0]
        if node.kind in VIEWS and _splits(source, value, axis):
            return seen + _walk_to_linear(source, linears, scaled=scaled)
        axis = _axis_before(node, axis, linears, scaled=scaled)
        value = source


def _walk_to_linear(value: Value, linears: Linears, *, scaled: bool) -> list[Node]:
    """From the undivided width back to its linear; the nodes on the way, the linear among them."""
    seen: list[Node] = []
    while True:
        node = linears.graph.producer(value)
        if node is None:
            raise MixedHeadsError("a linear's outputs do not reach the attention directly")
        seen.append(node)
        if linears.name(node) is not None:
            return seen
        if not (is_identity(node) or (scaled and _scales(node))):
            raise MixedHeadsError(f"{describe(node, linears)} comes between a linear and the heads")
        value = node.inputs[0]


def _walk_forward(value: Value, heads: int, linears: Linears) -> list[Node]:
    """From the mixed values to the output linear; the nodes on the way, that linear among them."""
    axis, seen = rank_of(value) - 3, []
    merged = False
    while True:
        readers = [node for node in linears.graph.consumers(value) if node.kind != "size"]
        if len(readers) != 1:
            raise MixedHeadsError(f"its mixed values are read {len(readers)} times")
        node = readers[0]
        seen.append(node)
        if merged and linears.name(node) is not None:
            return seen
        if not merged and node.kind in VIEWS and _splits(node.output, value, axis):
            merged, axis = True, rank_of(node.output) - 1
        elif merged and not is_identity(node):
            raise MixedHeadsError(f"{describe(node, linears)} comes between the heads and the output linear")
        elif not merged:
            axis = _axis_after(node, axis, linears)
            if axis < 0 or node.output.shape is None or node.output.shape[axis] != heads:
                raise MixedHeadsError("the trace does not show which axis counts its heads")
        value = node.output


def _splits(joined: Value, split: Value, axis: int) -> bool:
    """Whether ``split`` [.., heads, head size] is ``joined`` [.., heads * head size] with its last axis divided."""
    if joined.shape is None or split.shape is None or axis != len(split.shape) - 2:
        return False
    return joined.shape == (*split.shape[:-2], split.shape[-2] * split.shape[-1])


def _permutation(node: Node) -> list[int] | None:
    """For each axis of the result, the axis of the input that it shows; None if ``node`` does not move axes."""
    order = list(range(rank_of(node.output)))
    if node.kind == "transpose":
        first, second = node.inputs[1].constant, node.inputs[2].constant
        order[first], order[second] = order[second], order[first]
        return order
    if node.kind == "permute":
        return [axis % len(order) for axis in node.inputs[1].constant]
    return None


def _axis_before(node: Node, axis: int, linears: Linears, *, scaled: bool) -> int:
    order = _permutation(node)
    if order is not None:
        return order[axis]
    if _keeps_shape(node) or (scaled and _scales(node)):
        return axis
    raise MixedHeadsError(f"{describe(node, linears)} comes between a linear and the heads")


def _axis_after(node: Node, axis: int, linears: Linears) -> int:
    order = _permutation(node)
    if order is not None:
        return order.index(axis)
    if _keeps_shape(node):
        return axis
    raise MixedHeadsError(f"{describe(node, linears)} comes between the heads and the output linear")


def _scales(node: Node) -> bool:
    """Whether ``node`` multiplies all heads by the same number."""
    if node.kind not in SCALINGS:
        return False
    factor = node.inputs[1]
    return factor.is_constant and getattr(factor.constant, "ndim", 0) == 0


def _keeps_shape(node: Node) -> bool:
    return is_identity(node) or (node.kind in VIEWS and node.output.shape == node.inputs[0].shape)


def _read_elsewhere(path: list[Node], linears: Linears) -> str | None:
    """What else reads a value of ``path``, whose last node is the output linear."""
    inside = {node.index for node in path}
    for node in path[:-1]:
        for value in node.outputs:
            if linears.graph.is_output(value):
                return "the model also returns values that have one entry per head"
            # What a size is used for shows when the cut model runs.
            others = [n for n in linears.graph.consumers(value) if n.index not in inside and n.kind != "size"]
            if others:
                also = ", ".join(dict.fromkeys(describe(other, linears) for other in others))
                return f"its values are read outside of the attention too, by {also}"
    return None


def _nearest_linears(value: Value, linears: Linears) -> tuple[str, ...]:
    """Names of the linears that are met first when going back from ``value``."""
    found: dict[int, str] = {}
    waiting, seen = [value], set[str]()
    while waiting:
        current = waiting.pop()
        if current.name in seen:
            continue
        seen.add(current.name)
        node = linears.graph.producer(current)
        if node is None:
            continue
        name = linears.name(node)
        if name is not None:
            found[node.index] = name
        else:
            waiting += [source for source in node.inputs if _is_data(source)]
    return tuple(dict.fromkeys(found[index] for index in sorted(found)))


def _next_linear(value: Value, linears: Linears) -> str | None:
    """Name of the one linear that reads ``value`` through anything but other linears; None if not exactly one."""
    found: list[str] = []
    waiting, seen = [value], set[str]()
    while waiting and len(found) < 2:
        current = waiting.pop()
        for node in linears.graph.consumers(current):
            name = linears.name(node)
            if name is not None:
                found.append(name)
            else:
                fresh = [output for output in node.outputs if _is_data(output) and output.name not in seen]
                waiting += fresh
                seen |= {output.name for output in fresh}
    return found[0] if len(found) == 1 else None


def _is_data(value: Value) -> bool:
    """A tensor of real numbers, or several; sizes, indices and bool masks lead elsewhere."""
    return value.is_tensors or (value.dtype is not None and value.dtype.is_floating_point)
