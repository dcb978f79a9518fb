"""Feed-forward blocks in a traced graph: one or more linears, element-wise operations, one linear.

A block is found from its last linear (the root) backwards. Everything between the linears works element by element, so
unit j of the first linears' outputs reaches the root only as its input j. The first linear may also make two halves,
one of which gates the other.
"""

from dataclasses import dataclass

from torch import nn

from tritprune.slimming.elementwise import is_elementwise
from tritprune.slimming.linears import Linears
from tritprune.slimming.nodes import Graph, Node, Value

HALVES = ("chunk", "split", "slice", "glu", "split_with_sizes", "tensor_split")
FLATTENINGS = ("view", "reshape", "flatten", "_unsafe_view")


@dataclass(frozen=True)
class FeedForward:
    """One block: ``root(elementwise(first(x), ...))``.

    Args:
        root: name of the linear that reads the units.
        frontier: names of the linears that make them, in order of execution; two in a gated block.
    """

    root: str
    frontier: tuple[str, ...]


def find_feed_forward(graph: Graph, model: nn.Module) -> list[FeedForward]:
    """Every feed-forward block of ``model``, in order of execution, cuttable or not."""
    linears = Linears(graph, model)
    blocks = (_block(node, name, linears) for node in graph.nodes if (name := linears.name(node)) is not None)
    return list(dict.fromkeys(block for block in blocks if block is not None))


def _block(root: Node, name: str, linears: Linears) -> FeedForward | None:
    """The block that ends in ``root``; None if something else than element-wise operations leads to it."""
    graph, end = linears.graph, linears.input(root)
    region: set[int] = set()
    frontier: dict[int, Node] = {}
    waiting = [end]
    while waiting:
        value = waiting.pop()
        node = graph.producer(value)
        if node is None:
            return None
        if linears.name(node) is not None:
            frontier[node.index] = node
            continue
        same_width = value.rank and node.inputs[0].rank and value.shape[-1:] == node.inputs[0].shape[-1:]  # type: ignore[index]
        passes = is_elementwise(node) or (node.kind in FLATTENINGS and same_width) or node.kind in HALVES
        if not passes:
            return None
        if node.index not in region:
            region.add(node.index)
            tensors = [v for v in node.inputs if not _is_plain(v)]
            if any(is_elementwise(node) and v.shape != value.shape for v in tensors):
                return None
            waiting += tensors[:1] if not is_elementwise(node) else tensors
    names = [str(linears.name(frontier[index])) for index in sorted(frontier)]
    return FeedForward(name, tuple(dict.fromkeys(names)))


def _is_plain(value: Value) -> bool:
    """A number, not a tensor with units: plain constants and 0-d tensors."""
    return (value.is_constant and value.rank == 0) or (value.shape is None and not value.items)
