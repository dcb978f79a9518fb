"""Attention blocks in a traced graph: query, key and value linears, softmax(QK')V per head, one output linear.

A block is found outwards from the operation that mixes the values: ``scaled_dot_product_attention``, or the matrix
product behind a softmax. Query, key and value may be one fused linear, and several query heads may share a key.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from tritprune.slimming.elementwise import is_elementwise, is_identity
from tritprune.slimming.linears import Linears
from tritprune.slimming.nodes import Graph, Node, Value

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
MOVES = ("to", "view", "reshape", "slice", "permute", "transpose")
MASKINGS = ("masked_fill", "where", "max", "cat")


@dataclass(frozen=True)
class Attention:
    """One attention block.

    Args:
        query, key, value: names of the linears that feed it: one name three times where they are fused.
        output: name of the linear that reads all heads; None if there is none.
        heads: number of heads as traced.
        queries, keys: what is multiplied, [.., heads, tokens, head size] and the same or its transpose.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    output: str | None
    heads: int
    queries: Value
    keys: Value

    @property
    def feeding(self) -> list[str]:
        """The linears of query, key and value, each once."""
        return list(dict.fromkeys([*self.query, *self.key, *self.value]))

    @property
    def where(self) -> str:
        """The module that holds the block."""
        return common_parent(self.feeding) or ", ".join(self.feeding)


def find_attention(graph: Graph, model: nn.Module) -> list[Attention]:
    """Every attention block of ``model``, in order of execution, cuttable or not."""
    linears = Linears(graph, model)
    blocks = (_block(core, linears) for core in _cores(graph))
    return [block for block in blocks if block.query and block.key and block.value]


def common_parent(names: Iterable[str]) -> str:
    """The longest dotted name that is a parent of all ``names``; empty for the model itself."""
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) != 1:
            break
        shared.append(level[0])
    return ".".join(shared)


@dataclass(frozen=True)
class _Core:
    """What softmax(QK')V reads and makes."""

    query: Value
    key: Value
    value: Value
    mixed: Value


def _cores(graph: Graph) -> Iterator[_Core]:
    for node in graph.nodes:
        if node.kind == "scaled_dot_product_attention":
            query, key, value, *_ = node.inputs
            yield _Core(query, key, value, node.output)
        elif node.kind in PRODUCTS and (core := _explicit_core(node, graph)) is not None:
            yield core


def _explicit_core(product: Node, graph: Graph) -> _Core | None:
    """softmax(scale * QK' + mask) V written out; None if ``product`` is no such thing."""
    if product.kind == "baddbmm" or len(_factors(product)) != 2:
        return None
    found = [core for core in (_behind(product, *pair, graph) for pair in _orders(product)) if core is not None]
    return found[0] if found else None


def _orders(product: Node) -> list[tuple[Value, Value]]:
    """Probabilities and values: in an equation they may stand in either order."""
    left, right = _factors(product)
    return [(left, right), (right, left)] if product.kind == "einsum" else [(left, right)]


def _factors(product: Node) -> tuple[Value, ...]:
    """What a product multiplies."""
    if product.kind == "einsum":
        return product.inputs[1].items
    return product.inputs[1:3] if product.kind == "baddbmm" else product.inputs[:2]


def _behind(product: Node, probabilities: Value, values: Value, graph: Graph) -> _Core | None:
    """The attention whose probabilities these are."""
    normalised = False  # a softmax was met; what follows it may not change the sum of the probabilities
    node = graph.producer(probabilities)
    while node is not None and node.kind not in PRODUCTS:
        if node.kind.endswith("softmax") and node.argument(1) in (-1, node.output.rank - 1):
            normalised = True
        elif not (is_identity(node) or node.kind in MOVES or (normalised and _masks(node))):
            return None
        node = graph.producer(_scores(node))
    if node is None or not normalised or node.output.rank < 3 or len(_factors(node)) != 2:
        return None
    query, key = _factors(node)
    return _Core(query, key, values, product.output)


def _scores(node: Node) -> Value:
    """Of what ``node`` reads, the scores: not the condition of a choice, nor what is appended to them."""
    if node.kind == "where":
        return next((value for value in node.inputs[1:3] if value.shape == node.output.shape), node.inputs[0])
    return next(node.inputs[0].tensors(), node.inputs[0])


def _masks(node: Node) -> bool:
    """Whether ``node`` treats each score alone."""
    return node.kind in MASKINGS or is_elementwise(node)


def _block(core: _Core, linears: Linears) -> Attention:
    query, key, value = (_nearest_linears(v, linears) for v in (core.query, core.key, core.value))
    output = _next_linear(core.mixed, linears)
    return Attention(query, key, value, output, _heads(core, output, linears), core.query, core.key)


def _heads(core: _Core, output: str | None, linears: Linears) -> int:
    """What the output linear reads, divided by what each head makes; else the third dimension from the end."""
    shape = core.query.shape or ()
    layer, size = linears.modules.get(str(output)), (core.mixed.shape or (1,))[-1]
    if layer is not None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        width = weight.shape[0] if type(layer).__name__ == "Conv1D" else weight.shape[1]
        return width // size
    return shape[-3] if len(shape) >= 3 else 0


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
            waiting += [source for source in node.operands() if _is_data(source)]
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
    """A tensor of real numbers; sizes, indices and bool masks lead elsewhere."""
    return value.dtype is not None and value.dtype.is_floating_point
