"""Dead rows and columns that stay, and why: one entry per linear and side, so that the report is honest and short."""

from dataclasses import dataclass

from torch import nn

from tritprune.slimming.attention import Attention
from tritprune.slimming.elementwise import base_kind, is_elementwise
from tritprune.slimming.feed_forward import FeedForward
from tritprune.slimming.graph import Graph, Node, Value
from tritprune.slimming.linears import Linears, describe
from tritprune.slimming.surgery import zero_columns, zero_rows

WIDTH_KEEPING = ("layer_norm", "rms_norm", "select", "slice", "mean", "index", "expand", "embedding")
"""Operations through which a tensor's last axis stays the same axis, besides the element-wise ones."""


@dataclass(frozen=True)
class Refusal:
    """Something dead that was not cut.

    Args:
        kind: "units", "heads", "rows" or "columns".
        where: dotted name of the module.
        reason: how much, and why it stays.
    """

    kind: str
    where: str
    reason: str


def explain_leftovers(
    graph: Graph, model: nn.Module, blocks: list[FeedForward], attentions: list[Attention]
) -> list[Refusal]:
    """One refusal for each linear that still has dead rows, and one for each that still has dead columns.

    Args:
        graph: the trace of the model before it was cut.
        model: the model after it was cut; the same module names.
        blocks: the feed-forward blocks of the trace.
        attentions: the attention blocks of the trace.
    """
    linears = Linears(graph, model)
    explainer = _Explainer(linears, blocks, attentions)
    refusals: list[Refusal] = []
    for name, linear in linears.modules.items():
        for kind, dead, why in (
            ("rows", zero_rows(linear), explainer.why_rows_stay),
            ("columns", zero_columns(linear), explainer.why_columns_stay),
        ):
            count = int(dead.sum())
            if count and not explainer.is_last_unit(name, kind, len(dead)):
                refusals.append(Refusal(kind, name, f"{count} of {len(dead)} {kind} are dead but stay: {why(name)}"))
    return refusals


class _Explainer:
    """Reads the graph around a linear and puts into words what ties its outputs or inputs to others."""

    def __init__(self, linears: Linears, blocks: list[FeedForward], attentions: list[Attention]) -> None:
        self.linears, self.graph = linears, linears.graph
        self._of_root = {block.root: block for block in blocks}
        self._of_frontier: dict[str, list[FeedForward]] = {}
        for block in blocks:
            for name in block.frontier:
                self._of_frontier.setdefault(name, []).append(block)
        self._feeding = {n: a for a in attentions for n in (*a.query, *a.key, *a.value)}
        self._merging = {attention.output: attention for attention in attentions}

    def is_last_unit(self, name: str, kind: str, width: int) -> bool:
        """Whether this is the one unit of a block without live units, which is reported with the block."""
        root = self._of_root.get(name)
        blocks = self._of_frontier.get(name, []) if kind == "rows" else [root] if root else []
        return width == 1 and any(block.obstacle is None for block in blocks)

    def why_rows_stay(self, name: str) -> str:
        """Why outputs of the linear cannot be removed."""
        node = self.linears.node(name)
        if node is None:
            return str(self.linears.obstacle(name))
        if name in self._feeding:
            return self._about_heads(self._feeding[name])
        if name in self._of_frontier:
            blocks = self._of_frontier[name]
            if len(blocks) > 1:
                return f"they feed {len(blocks)} linears at once: {', '.join(block.root for block in blocks)}"
            return blocks[0].obstacle or "their units live through the other linears of the block"
        value = node.output
        while True:
            if self.graph.is_output(value):
                return "they are the model's outputs"
            readers = [reader for reader in self.graph.consumers(value) if reader.kind != "size"]
            if not readers:
                return "nothing reads them on the example inputs"
            if len(readers) > 1:
                return f"they are read by {self._names(readers)}"
            reader = readers[0]
            parameters = [operand.parameter for operand in reader.inputs if operand.parameter]
            if is_elementwise(reader) and parameters:
                return f"{base_kind(reader)} combines them with the parameter {parameters[0]}"
            if base_kind(reader) == "add" and not any(operand.is_constant for operand in reader.inputs[:2]):
                return f"they feed a residual add; {self._sharers(reader.output)}"
            if not is_elementwise(reader):
                return f"they feed {describe(reader, self.linears)}, which needs the whole width"
            value = reader.output

    def why_columns_stay(self, name: str) -> str:
        """Why inputs of the linear cannot be removed."""
        node = self.linears.node(name)
        if node is None:
            return str(self.linears.obstacle(name))
        if name in self._merging:
            return self._about_heads(self._merging[name])
        if name in self._of_root:
            return str(self._of_root[name].obstacle)
        value = node.inputs[0]
        producer = self.graph.producer(value)
        if producer is None:
            return "they read the model's input"
        return f"they read the output of {describe(producer, self.linears)}; {self._sharers(value)}"

    def _about_heads(self, attention: Attention) -> str:
        if attention.obstacle is not None:
            return f"they belong to heads that cannot be cut: {attention.obstacle}"
        return "they belong to heads that stay, and all heads have the same size"

    def _names(self, nodes: list[Node]) -> str:
        return ", ".join(dict.fromkeys(describe(node, self.linears) for node in nodes))

    def _sharers(self, value: Value) -> str:
        """How many layers make or read the width of ``value``, walking through everything that keeps it."""
        if not value.shape:
            return "its width cannot be traced"
        width = value.shape[-1]
        found: set[str] = set()
        seen, waiting = {value.name}, [value]
        while waiting:
            current = waiting.pop()
            producer = self.graph.producer(current)
            for node in [*self.graph.consumers(current), *([producer] if producer else [])]:
                name = self.linears.name(node)
                if name is not None:
                    found.add(name)
                elif is_elementwise(node) or node.kind in WIDTH_KEEPING:
                    same = [v for v in (*node.inputs, *node.outputs) if v.shape and v.shape[-1] == width]
                    fresh = [v for v in same if v.name not in seen and not v.parameter]
                    seen |= {v.name for v in fresh}
                    waiting += fresh
        return f"its width {width} is shared by {len(found)} linears"
