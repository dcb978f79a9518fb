"""A model's forward pass as a :class:`Graph`. The only file that knows ``torch.jit`` and ``torch.export``.

Both tracers give the same graph: operations by the names of ATen, arguments in the order of the operation's schema,
each use of a parameter or buffer under its dotted name, arithmetic on sizes computed, lists as their parts.
"""

import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError, TraceError
from tritprune.registry import did_you_mean
from tritprune.slimming.model_inputs import ModelInputs, evaluating, tensors_of
from tritprune.slimming.nodes import Graph, Node, Value

__all__ = ["TRACERS", "Graph", "Node", "Value", "trace"]

FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError, AssertionError)
PASSING = ("lift_fresh", "lift_fresh_copy", "detach", "detach_", "alias", "clone", "contiguous")
"""Operations that hand on a constant as it is."""

FUNCTIONAL = Path(str(torch.nn.functional.__file__))
"""Its code computes Python numbers from sizes alone."""

PLUMBING = ("_assert_tensor_metadata", "_assert_scalar", "size", "sym_size", "dim", "numel", "stride")
"""Operations whose results are no tensors with units: they are computed or left out."""


def trace(model: nn.Module, inputs: Any, tracer: str = "jit") -> Graph:
    """Run ``model`` once in evaluation mode and record what it computes.

    Args:
        model: left as it was.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        tracer: how to read the model: "jit" is ``torch.jit.trace``, "export" is ``torch.export.export``.

    Raises:
        ConfigError: unknown tracer.
        TraceError: the model does not run on these inputs, or cannot be traced; the message says where and what to do.
    """
    if tracer not in TRACERS:
        raise ConfigError(f"unknown tracer '{tracer}'; {did_you_mean(str(tracer), list(TRACERS))}")
    given = ModelInputs.of(inputs)
    scopes = _Scopes(model)
    try:
        with evaluating(model), _showing(model), warnings.catch_warnings(), scopes:
            # The deprecation of torch.jit is this file's business; a traced shape or branch is fixed on purpose.
            warnings.simplefilter("ignore")
            return TRACERS[tracer](model, given, scopes)
    except TraceError:
        raise
    except FAILURES as error:
        raise TraceError(_explain(model, given, tracer, scopes, error)) from error


class _Scopes:
    """Knows which module's code is running, and tells torch.jit's recording."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.running: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.running.append(name)
            state = torch._C._get_tracing_state()
            if state is not None:
                state.push_scope(name or ".")

        return hook

    def _leaving(self, *_: object) -> None:
        self.running.pop()
        state = torch._C._get_tracing_state()
        if state is not None:
            state.pop_scope()


@contextmanager
def _showing(model: nn.Module) -> Iterator[None]:
    """What would hide operations from a tracer is off; attributes that the model's code sets meanwhile are set back."""
    attributes = [(module, _public(module)) for module in model.modules()]
    fused, function = torch.backends.mha.get_fastpath_enabled(), torch.autograd.Function
    applied = vars(function)["apply"]
    torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder in one operation
    function.apply = classmethod(_forward_alone)  # type: ignore[assignment]
    try:
        yield
    finally:
        function.apply = applied  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, before in attributes:
            for name in _public(module).keys() - before.keys():
                delattr(module, name)
            vars(module).update(before)


def _public(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}


class _NoContext:
    """Takes what an autograd function keeps for its backward pass, and forgets it."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _forward_alone(function: Any, *arguments: Any) -> Any:
    """An autograd function's forward pass, so that its operations are recorded and not the function as a whole."""
    own_context = function.setup_context is not torch.autograd.Function.setup_context
    return function.forward(*arguments) if own_context else function.forward(_NoContext(), *arguments)


def _explain(model: nn.Module, inputs: ModelInputs, tracer: str, scopes: _Scopes, error: Exception) -> str:
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.tensors().items())
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    where = f" in module '{scopes.running[-1]}'" if scopes.running and scopes.running[-1] else ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename and f.line]
    frames = [frame for frame in frames if Path(frame.filename).name not in ("graph.py", "model_inputs.py")]
    code = f" at `{frames[-1].line}` ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    try:
        with evaluating(model):
            inputs.call(model)
    except FAILURES:
        return (
            f"{type(model).__name__} cannot be traced on the example inputs ({shapes}): it does not run on them"
            f"{where}{code}: {said}. Give inputs that the model takes"
        )
    other = next(name for name in TRACERS if name != tracer)
    return (
        f"{type(model).__name__} cannot be traced on the example inputs ({shapes}) by {tracer}{where}{code}: {said}. "
        f"It runs untraced: try tracer={other}, or write this line without Python values that depend on the data"
    )


def _outputs(model: nn.Module, inputs: ModelInputs) -> dict[str, Tensor]:
    made = tensors_of(inputs.call(model))
    if not made:
        raise TraceError(
            f"{type(model).__name__} returns no tensor, so there is nothing to trace or to compare; "
            "return a tensor, or a mapping, sequence or dataclass that holds one"
        )
    return made


def _names(model: nn.Module) -> dict[int, str]:
    """The first dotted name of every parameter and buffer, by identity."""
    names: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(tensor), name)
    return names


class _Recorder:
    """Collects nodes, whichever tracer reads them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.parameters: dict[str, Value] = {}

    def add(self, kind: str, inputs: tuple[Value, ...], outputs: tuple[Value, ...], scope: str) -> int:
        base = kind if kind.endswith("__") else kind.removesuffix("_")
        base, inputs = _one_convolution(base, inputs)
        in_place = kind.endswith("_") and not kind.endswith("__")
        self.nodes.append(Node(len(self.nodes), base, inputs, outputs, scope, in_place))
        return len(self.nodes) - 1

    def parameter(self, name: str, value: str, tensor: Tensor) -> Value:
        return self.parameters.setdefault(
            name, Value(value, shape=tuple(tensor.shape), dtype=tensor.dtype, parameter=name)
        )

    def graph(self, inputs: list[str], outputs: dict[str, str]) -> Graph:
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
    off = (_constant("", False), _constant("", [0]))
    if kind in ("_convolution", "convolution"):
        return "convolution", inputs[:9]
    if kind in ("conv1d", "conv2d", "conv3d"):
        return "convolution", (*inputs[:6], *off, inputs[6])
    if kind == "_convolution_mode":  # padding by a word
        return "convolution", (*inputs[:6], *off, inputs[6])
    if kind in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"):
        x, weight, bias, stride, padding, output_padding, groups, dilation = inputs
        return "convolution", (x, weight, bias, stride, padding, dilation, _constant("", True), output_padding, groups)
    return kind, inputs


def _constant(name: str, value: Any) -> Value:
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    return Value(name, shape=shape, dtype=getattr(value, "dtype", None), constant=value, is_constant=True)


# torch.jit.trace


def _trace_with_jit(model: nn.Module, inputs: ModelInputs, scopes: _Scopes) -> Graph:
    """Parameters and buffers are inputs of the trace: the model runs its own code with them swapped for these."""
    names = _names(model)
    own = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    tensors = inputs.tensors()
    paths: list[str] = []

    def forward(*arguments: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(tensors, arguments, strict=False))
        traced = dict(zip(own, arguments[len(tensors) :], strict=True))
        with _swapped_tensors(model, traced):
            made = _outputs(model, inputs.with_tensors(given))
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
    recorder = _Recorder()
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
            constant = all(value.is_constant for value in read)
            made = (_constant(made[0].name, [v.constant for v in read]) if constant else replace(made[0], items=read),)
        elif (result := _computed(kind, raw, read)) is not None:
            made = (_constant(made[0].name, result[0]),)
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


# torch.export


class _Called(nn.Module):
    """The model as a function from tensors to tensors."""

    def __init__(self, model: nn.Module, inputs: ModelInputs, paths: list[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.paths = model, inputs, paths

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs.tensors(), arguments, strict=True))
        made = _outputs(self.model, self.inputs.with_tensors(given))
        self.paths[:] = made
        return tuple(made.values())


def _trace_with_export(model: nn.Module, inputs: ModelInputs, scopes: _Scopes) -> Graph:
    paths: list[str] = []
    tensors = inputs.tensors()
    called = _Called(model, inputs, paths).eval()
    program = torch.export.export(called, tuple(tensors.values()), strict=False)
    return _Exported(model, program).read(paths)


class _Exported:
    """Reads the graph of an exported program, the graphs of its wrapped regions in place."""

    def __init__(self, model: nn.Module, program: Any) -> None:
        self.program = program
        self.recorder = _Recorder()
        self.inputs: list[str] = []
        self._first = _names(model)
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
            return _constant(node.name, self.program.constants[lifted])
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
            values[node] = _constant(name, read[0].constant)
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
            return _constant("", [part.constant for part in parts])
        return _constant("", argument)


def _made(name: str, made: Any) -> tuple[Value, ...]:
    if isinstance(made, list | tuple):
        return tuple(_fake(f"{name}.{position}", part) for position, part in enumerate(made))
    return (_fake(name, made),)


def _fake(name: str, made: Any) -> Value:
    if not isinstance(made, Tensor):
        return Value(name)
    return Value(name, shape=tuple(int(size) for size in made.shape), dtype=made.dtype)


TRACERS: dict[str, Callable[[nn.Module, ModelInputs, _Scopes], Graph]] = {
    "jit": _trace_with_jit,
    "export": _trace_with_export,
}
"""How a model can be read, by name."""
