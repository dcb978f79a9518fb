"""What a model computes, as a graph of plain dataclasses. The only file that knows ``torch.jit``.

The parameters are inputs of the trace, so each use of a parameter is seen under its name, and a model that is called
with its own parameters swapped for these inputs runs its own code: nothing of the model is rewritten for tracing.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from tritprune.errors import ConfigError, TraceError
from tritprune.registry import did_you_mean
from tritprune.slimming.model_inputs import ModelInputs, evaluating, tensors_of


@dataclass(frozen=True, eq=False)
class Value:
    """Something that an operation reads or makes.

    Args:
        name: unique in the graph.
        shape: of a tensor, as traced; None for everything else.
        dtype: of a tensor.
        constant: the plain value (number, text, None, list of these, 0-d tensor) if ``is_constant``.
        parameter: the parameter's dotted name, if this is one.
        is_tensors: whether this is a list of tensors, as chunk and unbind make it.
    """

    name: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    constant: Any = None
    is_constant: bool = False
    parameter: str | None = None
    is_tensors: bool = False


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Args:
        index: position in the order of execution.
        kind: the operation's name: "linear", "gelu", "view", ...
        inputs: its arguments in the operation's own order; constants among them.
        outputs: what it makes.
    """

    index: int
    kind: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @property
    def output(self) -> Value:
        """The first thing it makes."""
        return self.outputs[0]

    def __str__(self) -> str:
        read = ", ".join(repr(v.constant) if v.is_constant else v.parameter or v.name for v in self.inputs)
        return f"{', '.join(v.name for v in self.outputs)} = {self.kind}({read})"


@dataclass(frozen=True)
class Graph:
    """The operations of one forward pass in the order of execution.

    Args:
        nodes: the operations.
        inputs: names of the values that are the model's inputs.
        outputs: names of the values that the model returns.
    """

    nodes: tuple[Node, ...]
    inputs: frozenset[str]
    outputs: frozenset[str]

    @cached_property
    def _producers(self) -> dict[str, Node]:
        return {value.name: node for node in self.nodes for value in node.outputs}

    @cached_property
    def _consumers(self) -> dict[str, list[Node]]:
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(value.name for value in node.inputs if not value.is_constant):
                readers.setdefault(name, []).append(node)
        return readers

    @cached_property
    def _parameter_readers(self) -> dict[str, list[Node]]:
        readers: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
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


def trace(model: nn.Module, inputs: Any, tracer: str = "jit") -> Graph:
    """Run ``model`` once in evaluation mode and record what it computes.

    Args:
        model: left as it was.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        tracer: how to read the model; "jit" is ``torch.jit.trace``.

    Raises:
        ConfigError: unknown tracer.
        TraceError: the model does not run on these inputs, or cannot be traced.
    """
    if tracer not in TRACERS:
        raise ConfigError(f"unknown tracer '{tracer}'; {did_you_mean(str(tracer), list(TRACERS))}")
    return TRACERS[tracer](model, ModelInputs.of(inputs))


def _trace_with_jit(model: nn.Module, inputs: ModelInputs) -> Graph:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter.detach() for parameter in model.parameters()]
    tensors = inputs.tensors()

    def forward(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(tensors, arguments, strict=False))
        traced = dict(zip(names, arguments[len(tensors) :], strict=True))
        with _swapped_parameters(model, traced):
            made = tuple(tensors_of(inputs.with_tensors(given).call(model)).values())
        if not made:
            raise TraceError("the model returns no tensor, so there is nothing to trace or to compare")
        return made

    try:
        with evaluating(model), warnings.catch_warnings():
            # The deprecation of torch.jit is this file's business; a traced shape or branch is fixed on purpose.
            warnings.filterwarnings("ignore", message=r".*torch\.jit.*deprecated.*", category=DeprecationWarning)
            warnings.simplefilter("ignore", TracerWarning)
            traced: Any = torch.jit.trace(forward, (*tensors.values(), *parameters), check_trace=False, strict=False)
    except TraceError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise TraceError(
            f"{type(model).__name__} cannot be traced on the example inputs "
            f"({', '.join(f'{name} {tuple(t.shape)}' for name, t in tensors.items())}): "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    shapes = {names[id(parameter)]: tuple(parameter.shape) for parameter in model.parameters()}
    return _read(traced.inlined_graph, len(tensors), shapes)


@contextmanager
def _swapped_parameters(model: nn.Module, replacements: Mapping[int, Tensor]) -> Iterator[None]:
    """Let every place that holds a parameter see ``replacements[id(parameter)]``; tied ones see the same."""
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = replacements[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def _read(graph: Any, n_inputs: int, parameters: Mapping[str, tuple[int, ...]]) -> Graph:
    """The traced graph as dataclasses; it takes ``n_inputs`` of the model, then the parameters (name -> shape)."""
    given = [value.debugName() for value in graph.inputs()]
    values = {name: Value(name) for name in given[:n_inputs]}
    for name, (parameter, shape) in zip(given[n_inputs:], parameters.items(), strict=True):
        values[name] = Value(name, shape=shape, parameter=parameter)
    nodes: list[Node] = []
    outputs: set[str] = {value.debugName() for value in graph.outputs()}
    for raw in graph.nodes():
        kind = raw.kind().rpartition("::")[2]
        made = [_value(value) for value in raw.outputs()]
        read = tuple(values[value.debugName()] for value in raw.inputs())
        if kind == "Constant":
            values[made[0].name] = Value(made[0].name, constant=raw.output().toIValue(), is_constant=True)
            continue
        if kind == "ListConstruct" and all(value.is_constant for value in read):
            items = [value.constant for value in read]
            values[made[0].name] = Value(made[0].name, constant=items, is_constant=True)
            continue
        if kind == "TupleConstruct" and made[0].name in outputs:  # the tuple that holds all outputs
            outputs |= {value.name for value in read}
            continue
        values.update({value.name: value for value in made})
        nodes.append(Node(len(nodes), kind, read, tuple(made)))
    return Graph(tuple(nodes), frozenset(given[:n_inputs]), frozenset(outputs))


def _value(raw: Any) -> Value:
    kind = raw.type()
    if kind.kind() == "ListType" and kind.getElementType().kind() == "TensorType":
        return Value(raw.debugName(), is_tensors=True)
    if kind.kind() != "TensorType" or kind.sizes() is None:
        return Value(raw.debugName())
    return Value(raw.debugName(), shape=tuple(kind.sizes()), dtype=kind.dtype())


TRACERS = {"jit": _trace_with_jit}
"""How a model can be read, by name."""
