"""Which traced operations are a model's linear layers: ``nn.Linear``, Hugging Face's Conv1D, products written out."""

from torch import nn

from tritprune.slimming.nodes import Graph, Node, Value

PRODUCTS = ("matmul", "mm")
TURNS = ("t", "numpy_T", "transpose", "permute")
PARTS = ("chunk", "split", "split_with_sizes", "slice", "narrow", "contiguous")
"""Operations that take some rows of a weight, as where query, key and value have one."""


class Linears:
    """The linear layers of a model as the trace sees them.

    Args:
        graph: the trace of ``model``.
        model: the model.
    """

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.graph = graph
        self.modules = {name: module for name, module in model.named_modules() if is_linear(module)}
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            first.setdefault(id(parameter), name)
        owners = {first[id(module.weight)]: name for name, module in reversed(self.modules.items())}
        self._owner = {
            node.index: owners.get(weight.parameter, weight.parameter.removesuffix(".weight"))
            for node in graph.nodes
            if (weight := self._weight(node)) is not None and weight.parameter is not None
        }
        self._nodes: dict[str, list[Node]] = {}
        for node in graph.nodes:
            if node.index in self._owner:
                self._nodes.setdefault(self._owner[node.index], []).append(node)

    def _weight(self, node: Node) -> Value | None:
        """The 2-D parameter that ``node`` multiplies its input with."""
        if node.kind == "linear":
            weight = node.inputs[1]
        elif node.kind == "addmm":
            weight = node.inputs[2]
        elif node.kind in PRODUCTS:
            weight = node.inputs[1]
        else:
            return None
        while (made := self.graph.producer(weight)) is not None and made.kind in (*TURNS, *PARTS):
            weight = made.inputs[0]
        return weight if weight.parameter and weight.rank == 2 else None

    def name(self, node: Node) -> str | None:
        """The dotted name of the layer that ``node`` runs; None if it runs none."""
        return self._owner.get(node.index)

    def input(self, node: Node) -> Value:
        """What the layer that ``node`` runs reads."""
        return node.inputs[1] if node.kind == "addmm" else node.inputs[0]


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that has its weight as a parameter of its own."""
    known = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    return known and isinstance(module._parameters.get("weight"), nn.Parameter)
