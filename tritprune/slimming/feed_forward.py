"""Feed-forward blocks in a traced graph: one or more linears, element-wise operations, one linear.

A block is found from its last linear (the root) backwards. Everything between the linears works element by element, so
unit j of the first linears' outputs reaches the root only as its input j. The block can lose units if nothing else
reads what is in between.
"""

from dataclasses import dataclass

from torch import nn

from tritprune.slimming.elementwise import is_elementwise
from tritprune.slimming.graph import Graph, Node, Value
from tritprune.slimming.linears import Linears, describe


@dataclass(frozen=True)
class FeedForward:
    """One block: ``root(elementwise(first(x), ...))``.

    Args:
        root: name of the linear that reads the units.
        frontier: names of the linears that make them, in order of execution; two in a gated block.
        frontier_values: what each of them makes, by its name in the graph.
        nodes: the element-wise operations in between, in order of execution.
        end: what the root reads, by its name in the graph.
        obstacle: why no unit can be cut; None if units can be cut.
    """

    root: str
    frontier: tuple[str, ...]
    frontier_values: tuple[str, ...]
    nodes: tuple[Node, ...]
    end: str
    obstacle: str | None


def find_feed_forward(graph: Graph, model: nn.Module) -> list[FeedForward]:
    """Every feed-forward block of ``model``, in order of execution, cuttable or not."""
    linears = Linears(graph, model)
    blocks = (_block(node, name, linears) for node in graph.nodes if (name := linears.name(node)) is not None)
    return [block for block in blocks if block is not None]


def _block(root: Node, name: str, linears: Linears) -> FeedForward | None:
    """The block that ends in ``root``; None if something else than element-wise operations leads to it."""
    graph, end = linears.graph, root.inputs[0]
    region: dict[int, Node] = {}
    frontier: dict[int, Node] = {}
    waiting = [end]
    while waiting:
        value = waiting.pop()
        node = graph.producer(value)
        if node is None or value.shape != end.shape:
            return None
        if linears.name(node) is not None:
            frontier[node.index] = node
            continue
        if not is_elementwise(node):
            return None
        if node.index not in region:
            region[node.index] = node
            waiting += [operand for operand in node.inputs if not _is_plain(operand)]
    first = [frontier[index] for index in sorted(frontier)]
    names = tuple(str(linears.name(node)) for node in first)
    nodes = tuple(region[index] for index in sorted(region))
    obstacle = _obstacle(root, name, names, nodes, first, linears)
    return FeedForward(name, names, tuple(node.output.name for node in first), nodes, end.name, obstacle)


def _obstacle(
    root: Node, name: str, names: tuple[str, ...], nodes: tuple[Node, ...], frontier: list[Node], linears: Linears
) -> str | None:
    for linear in (name, *names):
        reason = linears.obstacle(linear)
        if reason is not None:
            return f"{linear} cannot change its size: {reason}"
    inside = {node.index for node in nodes} | {root.index}
    for node in (*frontier, *nodes):
        for value in node.outputs:
            if linears.graph.is_output(value):
                return "the model also returns them"
            others = [n for n in linears.graph.consumers(value) if n.index not in inside and not _reads_a_count(n)]
            if others:
                also = ", ".join(dict.fromkeys(describe(other, linears) for other in others))
                return f"their values are read outside of the block too, by {also}"
    return None


def _is_plain(value: Value) -> bool:
    """A number, not a tensor with units: plain constants and 0-d tensors."""
    return value.is_constant and (not hasattr(value.constant, "shape") or value.constant.dim() == 0)


def _reads_a_count(node: Node) -> bool:
    """Whether ``node`` reads the size of a dimension other than the last, which cutting units leaves alone."""
    shape = node.inputs[0].shape
    if node.kind != "size" or shape is None or len(node.inputs) < 2 or not isinstance(node.inputs[1].constant, int):
        return False
    return node.inputs[1].constant % len(shape) != len(shape) - 1
