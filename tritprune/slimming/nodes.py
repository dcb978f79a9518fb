"""What a model computes, as plain data: values, the operations that read and make them, and the graph of these."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Value:
    """Something that an operation reads or makes.

    Args:
        name: unique in the graph.
        shape: of a tensor, as traced; None for everything else.
        dtype: of a tensor.
        constant: the plain value (number, text, None, list of these, tensor) if ``is_constant``.
        parameter: the dotted name, if this is a parameter or a buffer.
        items: the parts, if this is a list that holds tensors.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    constant: Any = None
    is_constant: bool = False
    parameter: str | None = None
    items: tuple["Value", ...] = ()

    @property
    def rank(self) -> int:
        """Number of dimensions of a tensor; 0 for everything else."""
        return len(self.shape or ())

    def tensors(self) -> Iterator["Value"]:
        """Itself, or the tensors of a list, constants left out."""
        for value in self.items or (self,):
            if not value.is_constant:
                yield value


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Args:
        index: position in the order of execution.
        kind: the operation's name without the underscore of its in-place form: "linear", "gelu", "view", ...
        inputs: its arguments in the operation's own order; constants among them.
        outputs: what it makes; a list that it makes (chunk, split, unbind) is given as its parts.
        scope: dotted name of the module whose code ran it; empty for the model itself.
        in_place: whether it writes to its first input.
    """

    index: int
    kind: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    scope: str = ""
    in_place: bool = False

    @property
    def output(self) -> Value:
        """The first thing it makes."""
        return self.outputs[0]

    def operands(self) -> Iterator[Value]:
        """The tensors that it reads, constants left out, those of lists among them."""
        for value in self.inputs:
            yield from value.tensors()

    def argument(self, position: int, default: Any = None) -> Any:
        """The constant at this position; ``default`` if it is missing or not known."""
        if position >= len(self.inputs) or not self.inputs[position].is_constant:
            return default
        return self.inputs[position].constant

    def __str__(self) -> str:
        read = ", ".join(_text(value) for value in self.inputs)
        return f"{', '.join(v.name for v in self.outputs)} = {self.kind}({read})"


def _text(value: Value) -> str:
    if value.items:
        return f"[{', '.join(map(_text, value.items))}]"
    return repr(value.constant) if value.is_constant else value.parameter or value.name


@dataclass(frozen=True)
class Graph:
    """The operations of one forward pass in the order of execution.

    Args:
        nodes: the operations.
        inputs: names of the values that are the model's inputs.
        outputs: names of the values that the model returns, with the path of each in what is returned.
        parameters: the parameters and buffers, by dotted name.
    """

    nodes: tuple[Node, ...]
    inputs: frozenset[str]
    outputs: dict[str, str]
    parameters: dict[str, Value]

    @cached_property
    def _producers(self) -> dict[str, Node]:
        return {value.name: node for node in self.nodes for value in node.outputs}

    @cached_property
    def _consumers(self) -> dict[str, list[Node]]:
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(value.name for value in node.operands()):
                readers.setdefault(name, []).append(node)
        return readers

    @cached_property
    def _parameter_readers(self) -> dict[str, list[Node]]:
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in node.operands():
                if value.parameter:
                    readers.setdefault(value.parameter, []).append(node)
        return readers

    def producer(self, value: Value) -> Node | None:
        """The operation that makes ``value``; None for inputs, parameters and constants."""
        return self._producers.get(value.name)

    def consumers(self, value: Value) -> list[Node]:
        """The operations that read ``value``, in order."""
        return self._consumers.get(value.name, [])

    def readers_of_parameter(self, name: str) -> list[Node]:
        """The operations that read the parameter with this dotted name."""
        return self._parameter_readers.get(name, [])

    def is_output(self, value: Value) -> bool:
        """Whether the model returns ``value``."""
        return value.name in self.outputs
