"""A model read by ``torch.export``."""

from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import TraceError
from tritprune.slimming.model_inputs import ModelInputs
from tritprune.slimming.nodes import Graph, Value
from tritprune.slimming.recording import PASSING, Recorder, constant, first_names, outputs_of

PLUMBING = ("_assert_tensor_metadata", "_assert_scalar", "size", "sym_size", "dim", "numel", "stride")
"""Operations whose results are no tensors with units: they are computed or left out."""


class _Called(nn.Module):
    """The model as a function from tensors to tensors."""

    def __init__(self, model: nn.Module, inputs: ModelInputs, paths: list[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.paths = model, inputs, paths

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs.tensors(), arguments, strict=True))
        made = outputs_of(self.model, self.inputs.with_tensors(given))
        self.paths[:] = made
        return tuple(made.values())


def trace_with_export(model: nn.Module, inputs: ModelInputs) -> Graph:
    """The program's operations, with the model's own names for parameters and buffers."""
    paths: list[str] = []
    tensors = inputs.tensors()
    called = _Called(model, inputs, paths).eval()
    program = torch.export.export(called, tuple(tensors.values()), strict=False)
    return _Exported(model, program).read(paths)


class _Exported:
    """Reads the graph of an exported program, the graphs of its wrapped regions in place."""

    def __init__(self, model: nn.Module, program: Any) -> None:
        self.program = program
        self.recorder = Recorder()
        self.inputs: list[str] = []
        self._first = first_names(model)
        self._own = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }

    def read(self, paths: list[str]) -> Graph:
        values = {node: self._placeholder(node) for node in self.program.graph.nodes if node.op == "placeholder"}
        returned = self._walk(self.program.graph_module, values, "")
        return self.recorder.graph(self.inputs, dict(zip((v.name for v in returned), paths, strict=True)))

    def _placeholder(self, node: Any) -> Value:
        signature = self.program.graph_signature
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(node.name)
        if held is not None and held.removeprefix("model.") in self._own:
            tensor = self._own[held.removeprefix("model.")]
            return self.recorder.parameter(self._first[id(tensor)], node.name, tensor)
        lifted = signature.inputs_to_lifted_tensor_constants.get(node.name)
        if lifted is not None:
            return constant(node.name, self.program.constants[lifted])
        self.inputs.append(node.name)
        return _fake(node.name, node.meta["val"])

    def _walk(self, module: Any, values: dict[Any, Value], prefix: str) -> list[Value]:
        for node in module.graph.nodes:
            if node.op == "output":
                returned: Any = node.args[0]
                return [self._value(part, values) for part in returned]
            if node.op == "call_function":
                self._call(module, node, values, prefix)
        raise TraceError("the exported graph has no output; try tracer=jit")

    def _call(self, module: Any, node: Any, values: dict[Any, Value], prefix: str) -> None:
        name = prefix + node.name
        if getattr(node.target, "__name__", "") == "getitem":
            values[node] = values[node.args[0]].items[node.args[1]]
            return
        region = next((a for a in node.args if getattr(a, "op", None) == "get_attr"), None)
        if region is not None:  # a region under another autograd or autocast mode: its operations stand in its place
            inner = getattr(module, str(region.target))
            given = [self._value(a, values) for a in node.args[node.args.index(region) + 1 :]]
            holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
            made = self._walk(inner, dict(zip(holes, given, strict=True)), f"{name}.")
            values[node] = Value(name, items=tuple(made))
            return
        made = _made(name, node.meta.get("val"))
        values[node] = Value(name, items=made) if isinstance(node.meta.get("val"), list | tuple) else made[0]
        schema = getattr(node.target, "_schema", None)
        kind = schema.name.rpartition("::")[2] if schema is not None else getattr(node.target, "__name__", "unknown")
        if kind in PLUMBING:
            return
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        scope = str(stack[-1][0]).partition(".")[2] if stack else ""
        read = self._arguments(node, schema, values)
        if kind in PASSING and read[0].is_constant:
            values[node] = constant(name, read[0].constant)
            return
        self.recorder.add(kind, read, made, scope)

    def _arguments(self, node: Any, schema: Any, values: dict[Any, Value]) -> tuple[Value, ...]:
        if schema is None:
            return tuple(self._value(argument, values) for argument in (*node.args, *node.kwargs.values()))
        given = list(node.args)
        for argument in schema.arguments[len(given) :]:
            given.append(node.kwargs.get(argument.name, argument.default_value))
        return tuple(self._value(argument, values) for argument in given)

    def _value(self, argument: Any, values: dict[Any, Value]) -> Value:
        if isinstance(argument, torch.fx.Node):
            return values[argument] if argument in values else Value(argument.name)
        if isinstance(argument, list | tuple):
            parts = tuple(self._value(part, values) for part in argument)
            if not all(part.is_constant for part in parts):
                return Value("", items=parts)
            return constant("", [part.constant for part in parts])
        return constant("", argument)


def _made(name: str, made: Any) -> tuple[Value, ...]:
    if isinstance(made, list | tuple):
        return tuple(_fake(f"{name}.{position}", part) for position, part in enumerate(made))
    return (_fake(name, made),)


def _fake(name: str, made: Any) -> Value:
    if not isinstance(made, Tensor):
        return Value(name)
    return Value(name, shape=tuple(int(size) for size in made.shape), dtype=made.dtype)
