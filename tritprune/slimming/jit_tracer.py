"""A model read by ``torch.jit.trace``."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import TraceError
from tritprune.slimming.model_inputs import ModelInputs
from tritprune.slimming.nodes import Graph, Value
from tritprune.slimming.recording import PASSING, Recorder, constant, first_names, outputs_of

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, AssertionError)
FUNCTIONAL = Path(str(torch.nn.functional.__file__))
"""Its code computes Python numbers from sizes alone."""


def trace_with_jit(model: nn.Module, inputs: ModelInputs) -> Graph:
    """Parameters and buffers are inputs of the trace: the model runs its own code with them swapped for these."""
    names = first_names(model)
    own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    tensors = inputs.tensors()
    paths: list[str] = []

    def forward(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(tensors, arguments, strict=False))
        traced = dict(zip(own, arguments[len(tensors) :], strict=True))
        with _swapped_tensors(model, traced):
            made = outputs_of(model, inputs.with_tensors(given))
        paths[:] = made
        return tuple(made.values())

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        traced: Any = torch.jit.trace(
            forward, (*tensors.values(), *(t.detach() for t in own.values())), check_trace=False, strict=False
        )
    for warning in said:
        if Path(warning.filename) == FUNCTIONAL:
            continue
        if "to a Python number" in str(warning.message) or "to a Python float" in str(warning.message):
            raise TraceError(
                f"{type(model).__name__} computes a Python number from its data ({Path(warning.filename).name}, line "
                f"{warning.lineno}), so that what is constant cannot be told; keep it a tensor"
            )
    return _read_jit(traced.inlined_graph, tensors, {names[key]: tensor for key, tensor in own.items()}, paths)


@contextmanager
def _swapped_tensors(model: nn.Module, replacements: Mapping[int, Tensor]) -> Iterator[None]:
    """Let every place that holds a parameter or buffer see ``replacements[id(it)]``; tied ones see the same."""
    places = [
        (table, name, tensor)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    try:
        for table, name, tensor in places:
            table[name] = replacements[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for table, name, tensor in places:
            table[name] = tensor  # type: ignore[assignment]


def _read_jit(graph: Any, inputs: Mapping[str, Tensor], own: Mapping[str, Tensor], paths: list[str]) -> Graph:
    recorder = Recorder()
    given = [value.debugName() for value in graph.inputs()]
    values: dict[str, Value] = {}
    for name, tensor in zip(given, inputs.values(), strict=False):
        values[name] = Value(name, shape=tuple(tensor.shape), dtype=tensor.dtype)
    for name, (parameter, tensor) in zip(given[len(inputs) :], own.items(), strict=True):
        values[name] = recorder.parameter(parameter, name, tensor)
    makers: dict[str, int] = {}
    for raw in graph.nodes():
        kind = raw.kind().rpartition("::")[2]
        made = tuple(_jit_value(value) for value in raw.outputs())
        read = tuple(values[value.debugName()] for value in raw.inputs())
        if kind == "ListUnpack" and read[0].name in makers:
            index = makers[read[0].name]
            recorder.nodes[index] = replace(recorder.nodes[index], outputs=made)
        elif kind in ("ListUnpack", "TupleUnpack"):
            made = tuple(
                replace(v, name=m.name) if v.is_constant else v for v, m in zip(read[0].items, made, strict=True)
            )
            values.update({out.debugName(): value for out, value in zip(raw.outputs(), made, strict=True)})
            continue
        elif kind in ("ListConstruct", "TupleConstruct"):
            plain = all(value.is_constant for value in read)
            made = (constant(made[0].name, [v.constant for v in read]) if plain else replace(made[0], items=read),)
        elif (result := _computed(kind, raw, read)) is not None:
            made = (constant(made[0].name, result[0]),)
        else:
            index = recorder.add(kind, read, made, raw.scopeName().rpartition("/")[2].strip("."))
            makers[made[0].name] = index
        values.update({value.name: value for value in made})
    returned = [value.debugName() for value in graph.outputs()]
    if len(returned) == 1 and values[returned[0]].items:
        returned = [value.name for value in values[returned[0]].items]
    return recorder.graph(given[: len(inputs)], dict(zip(returned, paths, strict=True)))


def _computed(kind: str, raw: Any, read: tuple[Value, ...]) -> tuple[Any] | None:
    """The result of arithmetic on sizes and other numbers, in a tuple; None if ``kind`` is no such thing."""
    if kind == "Constant":
        return (raw.output().toIValue(),)
    if kind == "size" and read[0].shape is not None:
        if len(read) == 1:
            return (list(read[0].shape),)
        return (read[0].shape[read[1].constant],) if read[1].is_constant else None
    if not read or not all(value.is_constant for value in read):
        return None
    first = read[0].constant
    if kind == "NumToTensor":
        return (torch.tensor(first),)
    if kind in ("Int", "Float", "Bool", "ScalarImplicit", "IntImplicit", "FloatImplicit"):
        return (first.item() if isinstance(first, Tensor) else first,)
    if kind in PASSING or (kind == "to" and raw.output().type().dtype() == getattr(first, "dtype", None)):
        return (first,)
    if kind in ("min", "max") and len(read) == 1:
        return (getattr(torch, kind)(first),)
    scalar = all(getattr(v.constant, "ndim", 0) == 0 and not isinstance(v.constant, list) for v in read)
    operation = getattr(torch.ops.aten, kind, None)
    if not scalar or operation is None or raw.output().type().kind() != "TensorType":
        return None
    numbers = [value.constant for value in read]
    try:
        if kind in ("add", "sub", "rsub"):
            return (operation(*numbers[:2], alpha=numbers[2]),)
        if kind == "div" and len(numbers) > 2:
            return (operation(*numbers[:2], rounding_mode=numbers[2]),)
        return (operation(*numbers),)
    except FAILURES:  # no arithmetic after all: an operation that makes a tensor from numbers in another way
        return None


def _jit_value(raw: Any) -> Value:
    kind = raw.type()
    if kind.kind() != "TensorType" or kind.sizes() is None:
        return Value(raw.debugName())
    return Value(raw.debugName(), shape=tuple(kind.sizes()), dtype=kind.dtype())
