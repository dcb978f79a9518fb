"""A model's forward pass as a :class:`Graph`, through one of two tracers, which alone know what they trace with.

Both give the same graph: operations by the names of ATen, arguments in the order of the operation's schema,
each use of a parameter or buffer under its dotted name, arithmetic on sizes computed, lists as their parts.
"""

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritprune.errors import ConfigError, TraceError
from tritprune.registry import did_you_mean
from tritprune.slimming.export_tracer import trace_with_export
from tritprune.slimming.jit_tracer import FAILURES, trace_with_jit
from tritprune.slimming.model_inputs import ModelInputs, evaluating
from tritprune.slimming.nodes import Graph, Node, Value

__all__ = ["TRACERS", "Graph", "Node", "Value", "trace"]

OWN = ("graph.py", "jit_tracer.py", "export_tracer.py", "recording.py", "model_inputs.py")
"""Files that a trace runs through on its way to the model's own code."""


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
            # The deprecation of torch.jit is the tracer's business; a traced shape or branch is fixed on purpose.
            warnings.simplefilter("ignore")
            return TRACERS[tracer](model, given)
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
    frames = [frame for frame in frames if Path(frame.filename).name not in OWN]
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


TRACERS: dict[str, Callable[[nn.Module, ModelInputs], Graph]] = {
    "jit": trace_with_jit,
    "export": trace_with_export,
}
"""How a model can be read, by name."""
