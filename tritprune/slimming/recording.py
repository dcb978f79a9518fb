"""What both tracers write down: operations in order, each use of a parameter under its dotted name."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tritprune.errors import TraceError
from tritprune.slimming.model_inputs import ModelInputs, tensors_of
from tritprune.slimming.nodes import Graph, Node, Value

PASSING = ("lift_fresh", "lift_fresh_copy", "detach", "detach_", "alias", "clone", "contiguous")
"""Operations that hand on a constant as it is."""


def outputs_of(model: nn.Module, inputs: ModelInputs) -> dict[str, Tensor]:
    """The tensors that the model returns, by path.

    Raises:
        TraceError: there is none.
    """
    made = tensors_of(inputs.call(model))
    if not made:
        raise TraceError(
            f"{type(model).__name__} returns no tensor, so there is nothing to trace or to compare; "
            "return a tensor, or a mapping, sequence or dataclass that holds one"
        )
    return made


def first_names(model: nn.Module) -> dict[int, str]:
    """The first dotted name of every parameter and buffer, by identity."""
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


class Recorder:
    """Collects nodes, whichever tracer reads them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.parameters: dict[str, Value] = {}

    def add(self, kind: str, inputs: tuple[Value, ...], outputs: tuple[Value, ...], scope: str) -> int:
        """One more operation; its position."""
        base = kind if kind.endswith("__") else kind.removesuffix("_")
        base, inputs = _one_convolution(base, inputs)
        in_place = kind.endswith("_") and not kind.endswith("__")
        self.nodes.append(Node(len(self.nodes), base, inputs, outputs, scope, in_place))
        return len(self.nodes) - 1

    def parameter(self, name: str, value: str, tensor: Tensor) -> Value:
        """The value of a parameter or buffer; the same one at each use."""
        return self.parameters.setdefault(
            name, Value(value, shape=tuple(tensor.shape), dtype=tensor.dtype, parameter=name)
        )

    def graph(self, inputs: list[str], outputs: dict[str, str]) -> Graph:
        """All that was recorded and is needed."""
        needed = _needed(self.nodes, outputs)
        nodes = tuple(replace(node, index=position) for position, node in enumerate(needed))
        return Graph(nodes, frozenset(inputs), outputs, self.parameters)


def _needed(nodes: list[Node], outputs: Iterable[str]) -> list[Node]:
    """The operations that lead to an output or write in place; what the model computes and throws away is left out."""
    read = set(outputs)
    kept: list[Node] = []
    for node in reversed(nodes):
        if node.in_place or any(value.name in read for value in node.outputs):
            read |= {value.name for value in node.operands()}
            kept.append(node)
    return kept[::-1]


def _one_convolution(kind: str, inputs: tuple[Value, ...]) -> tuple[str, tuple[Value, ...]]:
    """Every convolution as x, weight, bias, stride, padding, dilation, transposed, output padding, groups."""
    off = (constant("", False), constant("", [0]))
    if kind in ("_convolution", "convolution"):
        return "convolution", inputs[:9]
    if kind in ("conv1d", "conv2d", "conv3d"):
        return "convolution", (*inputs[:6], *off, inputs[6])
    if kind == "_convolution_mode":  # padding by a word
        return "convolution", (*inputs[:6], *off, inputs[6])
    if kind in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        x, weight, bias, stride, padding, output_padding, groups, dilation = inputs
        return "convolution", (x, weight, bias, stride, padding, dilation, constant("", True), output_padding, groups)
    return kind, inputs


def constant(name: str, value: Any) -> Value:
    """A plain value."""
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    return Value(name, shape=shape, dtype=getattr(value, "dtype", None), constant=value, is_constant=True)
