"""One walk through a graph: which atoms stay or go together, which must stay and why, which weights read which.

Every operation has a rule that says what its results are made of. An operation without a rule keeps whatever it reads
as it is: nothing is cut on a guess.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tritprune.slimming.forms import Array, Form, Group
from tritprune.slimming.nodes import Graph, Node, Value
from tritprune.slimming.weights import Weights


@dataclass(frozen=True, eq=False)
class Reader:
    """A weight that sums over a dimension: a linear, a convolution, a product with a parameter.

    Args:
        node: the operation.
        weight: the parameter's name.
        dim: the parameter's dimension that is summed over.
        group: what is read, index by index of that dimension.
        bias: the parameter that is added to the sum, or None.
        padded: whether zeros are read as well, beside the tensor.
    """

    node: Node
    weight: str
    dim: int
    group: Group
    bias: str | None
    padded: bool


Rule = Callable[["Walk", Node], "Form | Sequence[Form] | None"]


@dataclass
class Walk:
    """The state of a walk, and what the rules do to it.

    Attributes:
        rules: the rule of each operation.
        passing: the operations that hand on the width of what they read.
        views: the operations whose results share memory with what they read.
        edges: pairs of arrays of atoms; the atoms at the same index stay or go together.
        pins: atoms that must stay, and why.
        readers: the weights that sum over atoms.
        ties: atoms that stay or go as a whole, and why, where that is not the rule for heads.
        split: groups of several dimensions; what is left of one must be a block again.
        forms: what is known of each value, by name.
    """

    graph: Graph
    weights: Weights
    rules: dict[str, Rule]
    passing: frozenset[str] = frozenset()
    views: frozenset[str] = frozenset()
    edges: list[tuple[Array, Array]] = field(default_factory=list)
    pins: list[tuple[Array, str]] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    ties: list[tuple[Array, str]] = field(default_factory=list)
    split: list[Group] = field(default_factory=list)
    forms: dict[str, Form] = field(default_factory=dict)

    def run(self) -> "Walk":
        """Walk through all operations."""
        self.weights.start_over()
        for node in self.graph.nodes:
            rule = self.rules.get(node.kind)
            made = rule(self, node) if rule is not None else None
            if made is None:
                made = self.keep(node)
            forms = [made] if isinstance(made, Form) else list(made)
            for value, form in zip(node.outputs, forms, strict=False):
                assert value.shape is None or len(value.shape) == form.rank, str(node)
                self.forms[value.name] = form
            if node.in_place:
                self._forget_written(node)
        for name, path in self.graph.outputs.items():
            for group in self.forms.get(name, Form()).groups:
                self.pin(group, "the model returns them" + (f" as {path}" if path != "output" else ""))
        return self

    def _forget_written(self, node: Node) -> None:
        """A write through a view changes what the view is of: no number of it is known any more."""
        value = node.inputs[0]
        while (producer := self.graph.producer(value)) is not None and producer.kind in self.views:
            value = producer.inputs[0]
            form = self.form(value)
            unknown = tuple(group.unknown() for group in form.groups)
            self.forms[value.name] = replace(form, groups=unknown, sums_to_one=False)

    def form(self, value: Value) -> Form:
        """What is known of ``value``."""
        if value.name in self.forms:
            return self.forms[value.name]
        if value.parameter is not None:
            self.forms[value.name] = self.weights.form(value.parameter)
            return self.forms[value.name]
        return Form(tuple(value.shape or ()))

    def behind(self, value: Value) -> list[Node]:
        """The operations that ``value`` comes from, nearest first, back to inputs, parameters and new widths."""
        found: dict[int, Node] = {}
        waiting = [value]
        while waiting:
            node = self.graph.producer(waiting.pop(0))
            if node is not None and node.index not in found:
                found[node.index] = node
                waiting += node.operands()
        return list(found.values())

    def is_whole(self, weight: Form, dim: int) -> bool:
        """Whether dimension ``dim`` of a tensor is that of a parameter, with all its entries in order."""
        own = weight.group(dim)
        if weight.weight is None or own is None:
            return False
        name, dims = weight.weight
        return np.array_equal(own.atoms, self.weights.atoms(name, dims[dim]))

    def merge(self, one: Array, two: Array) -> None:
        """The atoms at the same index stay or go together."""
        self.edges.append((one, np.broadcast_to(two, one.shape)))

    def lock(self, group: Group, dims: Sequence[int]) -> Group:
        """Along ``dims`` all of ``group`` stays or goes together: those dimensions keep their size."""
        axes = tuple(group.axis(dim) for dim in dims)
        first = group.atoms
        for axis in axes:
            first = first.take([0], axis)
        self.edges.append((np.broadcast_to(first, group.atoms.shape), group.atoms))
        return group

    def lock_or_pin(self, group: Group, dims: Sequence[int], reason: str) -> None:
        """As :meth:`lock`; if that is the whole group, none of it can go."""
        if set(dims) >= set(group.dims):
            self.pin(group, reason)
        else:
            self.lock(group, [dim for dim in group.dims if dim in dims])
            if group.dims[0] in dims:
                self.ties.append((group.atoms.reshape(-1), reason))

    def pin(self, group: Group, reason: str) -> None:
        """None of ``group`` can go."""
        self.pins.append((group.atoms.reshape(-1), reason))

    def keep(self, node: Node, reason: str | None = None) -> list[Form]:
        """Nothing that ``node`` reads can be cut, and nothing is known of what it makes."""
        for value in node.operands():
            for group in self.form(value).groups:
                self.pin(group, reason or f"they feed {describe(node)}, which needs all of them")
        return [Form(tuple(value.shape or ())) for value in node.outputs]

    def reads(
        self,
        node: Node,
        form: Form,
        dim: int,
        weight: Form,
        weight_dim: int,
        *,
        bias: Value | None,
        padded: bool = False,
    ) -> None:
        """``node`` sums over dimension ``dim`` of ``form``, weighted by dimension ``weight_dim`` of ``weight``."""
        group, own = form.group(dim), weight.group(weight_dim)
        if own is None or weight.weight is None or not self.is_whole(weight, weight_dim):
            if group is not None:
                self.lock_or_pin(group, [dim], f"they feed {describe(node)}, whose weight is computed while it runs")
            if own is not None:
                self.lock_or_pin(own, [weight_dim], f"the weight of {describe(node)} is computed while it runs")
        elif group is None:
            self.pin(own, f"they read {self.origin(node)}")
        elif len(group.dims) > 1:
            self.lock(group, [dim])
            self.pin(own, f"{describe(node)} is applied to every part of what it reads")
        else:
            self.merge(group.atoms, own.atoms)
            name, dims = weight.weight
            held = bias.parameter if bias is not None else None
            self.readers.append(Reader(node, name, dims[weight_dim], group, held, padded))

    def origin(self, node: Node) -> str:
        """What ``node`` reads, in words: the model's input, or the operation whose width is not followed."""
        value = node.inputs[1] if node.kind == "addmm" else node.inputs[0]
        while (producer := self.graph.producer(value)) is not None and producer.inputs:
            if producer.kind not in self.passing:
                return f"what {describe(producer)} makes, whose width is not followed"
            value = producer.inputs[0].items[0] if producer.inputs[0].items else producer.inputs[0]
        return "the model's input" if value.name in self.graph.inputs else "a width that is not followed"


def describe(node: Node) -> str:
    """``node`` in words: its operation and the module that it belongs to."""
    for value in node.operands():
        if value.parameter and "." in value.parameter:
            return f"{node.kind} {value.parameter.rpartition('.')[0]}"
    return f"{node.kind} in {node.scope}" if node.scope else node.kind
