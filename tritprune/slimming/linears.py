"""Which traced operations are a model's ``nn.Linear`` modules, and whether such a module may change its size."""

from torch import nn

from tritprune.slimming.graph import Graph, Node


class Linears:
    """The ``nn.Linear`` modules of a model as the trace sees them.

    Args:
        graph: the trace of ``model``.
        model: the model.
    """

    def __init__(self, graph: Graph, model: nn.Module) -> None:
        self.graph = graph
        self.modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name)
        owners = {self._names[id(module.weight)][0]: name for name, module in reversed(self.modules.items())}
        self._owner = {
            node.index: owners[weight]
            for node in graph.nodes
            if node.kind == "linear" and (weight := node.inputs[1].parameter) in owners
        }
        self._nodes: dict[str, list[Node]] = {}
        for node in graph.nodes:
            if node.index in self._owner:
                self._nodes.setdefault(self._owner[node.index], []).append(node)

    def name(self, node: Node) -> str | None:
        """The dotted name of the module that ``node`` runs; None if it is not one of them."""
        return self._owner.get(node.index)

    def node(self, name: str) -> Node | None:
        """The operation that runs the module, if it runs exactly once."""
        nodes = self._nodes.get(name, [])
        return nodes[0] if len(nodes) == 1 else None

    def obstacle(self, name: str) -> str | None:
        """Why the module cannot change its size wherever it stands; None if it can."""
        module = self.modules[name]
        if type(module).forward is not nn.Linear.forward or nn.utils.parametrize.is_parametrized(module):
            return f"{type(module).__name__} computes more than a linear"
        for part in ("weight", "bias"):
            parameter = getattr(module, part)
            if parameter is None:
                continue
            names = self._names[id(parameter)]
            if len(names) > 1:
                others = ", ".join(other for other in names if other != f"{name}.{part}")
                return f"its {part} is tied to {others}"
            readers = self.graph.readers_of_parameter(names[0])
            if not readers:
                return "it does not run on the example inputs"
            if len(readers) > 1:
                return f"its {part} is read {len(readers)} times in one forward pass"
            if self.name(readers[0]) != name:
                return f"its {part} is read by {readers[0].kind}, not by a linear of its own"
        return None


def module_of(node: Node) -> str | None:
    """The dotted name of the module whose parameters ``node`` reads; None if it reads none."""
    for value in node.inputs:
        if value.parameter:
            return value.parameter.rpartition(".")[0]
    return None


def describe(node: Node, linears: Linears) -> str:
    """``node`` in a sentence: the name of its module, else of its operation."""
    name = linears.name(node) or module_of(node)
    return f"{node.kind} {name}" if name else node.kind
