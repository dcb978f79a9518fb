"""Attentions whose heads are all dead: what stands in their place, and when it may."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tritprune.slimming.attention import Attention
from tritprune.slimming.comparison import difference
from tritprune.slimming.model_inputs import ModelInputs, evaluating
from tritprune.slimming.nodes import Graph

KEEPS_CACHE = "it keeps keys and values for the tokens to come"


class RemovedAttention(nn.Module):
    """Stands where an attention was that had no living head: ``y = b`` for each token, b the output linear's bias.

    It takes what the attention took. In the place of attention weights and whatever else the attention returned behind
    its result, it returns None.

    Args:
        output: dotted name, within the attention, of its output linear, which reads nothing now; None where that linear
            is not part of the attention, which then makes a tensor of width 0.
        layer: that linear.
        returns: number of values in the tuple that the attention returned; 0 where it returned its result alone.
    """

    batch_first = False  # nn.TransformerEncoderLayer asks, before it would read the attention's weights by itself

    def __init__(self, output: str | None, layer: nn.Module | None, returns: int) -> None:
        super().__init__()
        self._output, self._returns = output, returns  # the linear itself may be called "output"
        holder: nn.Module = self
        *parents, name = (output or "").split(".")
        for parent in parents:
            holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        if layer is not None:
            holder.add_module(name, layer)

    @classmethod
    def of(cls, module: nn.Module, output: str | None, returns: int) -> "RemovedAttention":
        """The stand-in for ``module``, in the same mode."""
        made = cls(output, None if output is None else module.get_submodule(output), returns)
        return made.train(module.training)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The bias of the output linear at every token of the first tensor, [..., tokens, width]."""
        read = first_tensor(*arguments, **named)
        assert read is not None
        made = read.new_empty((*read.shape[:-1], 0))
        if self._output is not None:
            made = self.get_submodule(self._output)(made)
        return (made, *[None] * (self._returns - 1)) if self._returns else made

    def extra_repr(self) -> str:
        """What it is, where a model is printed."""
        return "all heads were dead"


def arguments_of(removed: RemovedAttention) -> dict[str, Any]:
    """What a stand-in was made with, but for the linear: ``output`` and ``returns``."""
    return {"output": removed._output, "returns": removed._returns}


def first_tensor(*arguments: Any, **named: Any) -> Tensor | None:
    """The first tensor of real numbers among the arguments of a call."""
    given = (*arguments, *named.values())
    return next((value for value in given if isinstance(value, Tensor) and value.is_floating_point()), None)


@dataclass(frozen=True)
class Removal:
    """An attention that may go as a whole: the arguments of :meth:`RemovedAttention.of`.

    Args:
        where: dotted name of the attention's module.
        output: dotted name of its output linear within it, or None.
        returns: see :class:`RemovedAttention`.
    """

    where: str
    output: str | None
    returns: int


def remove(model: nn.Module, removal: Removal) -> None:
    """Put the stand-in where the attention is, under each name that it has."""
    old = model.get_submodule(removal.where)
    new = RemovedAttention.of(old, removal.output, removal.returns)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is old:
                module._modules[name] = new


def removal_of(model: nn.Module, inputs: ModelInputs, graph: Graph, attention: Attention) -> Removal | str:
    """How an attention can go as a whole, or why it cannot.

    It can where its own parameters reach nothing but its output linear, it keeps nothing for the next token, and its
    module returns its result: alone, or in front of other things in a tuple; and nothing added to it.

    Args:
        model: the model as it was traced.
        inputs: it is run on these once.
        graph: the trace.
        attention: a block of it.
    """
    where, output = attention.where, str(attention.output)
    modules = dict(model.named_modules())
    if not where or where not in modules:
        return "its query, key and value linears are not in a module of their own"
    if _may_cache(modules[where]):
        return KEEPS_CACHE
    within = output.removeprefix(f"{where}.") if output.startswith(f"{where}.") else None
    weight: Tensor = modules[output].weight  # type: ignore[assignment]
    made, read = weight.shape[::-1] if type(modules[output]).__name__ == "Conv1D" else weight.shape
    said: list[int | str] = []

    def watch(module: nn.Module, arguments: Any, named: dict[str, Any], result: Any) -> None:
        if any(hasattr(value, "get_seq_length") for value in (*arguments, *named.values())):
            said.append(KEEPS_CACHE)
            return
        first = result[0] if isinstance(result, tuple) and result else result
        source = first_tensor(*arguments, **named)
        shape = None if source is None else (*source.shape[:-1], read if within is None else made)
        if not isinstance(first, Tensor) or first.shape != shape:
            said.append(f"what {type(module).__name__} returns is not its result at every token")
        elif within is not None and not _is_constant(first):
            said.append(f"{type(module).__name__} returns more than what its heads make")
        else:
            said.append(len(result) if isinstance(result, tuple) else 0)

    handle = modules[where].register_forward_hook(watch, with_kwargs=True)
    plain = ModelInputs(inputs.form, {name: value for name, value in inputs.values.items() if name != "use_cache"})
    try:
        with evaluating(model, caches=True):
            plain.call(model)
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
        return f"{type(model).__name__} does not run with its caches: {type(error).__name__}"
    finally:
        handle.remove()
    forms = list(dict.fromkeys(said))
    if len(forms) != 1:
        return f"{type(modules[where]).__name__} returns different things each time it is called"
    form = forms[0]
    if not isinstance(form, str) and not _feeds_only(graph, where, output):
        return f"{type(modules[where]).__name__} has parameters that more than its output linear depends on"
    return form if isinstance(form, str) else Removal(where, within, form)


def _may_cache(module: nn.Module) -> bool:
    """Whether a module takes a cache by name; one of transformers is watched instead, as many name it and have none."""
    names = inspect.signature(module.forward).parameters
    return not type(module).__module__.startswith("transformers.") and any(
        word in name for name in names for word in ("past", "cache")
    )


def _is_constant(result: Tensor) -> bool:
    """Whether a tensor [..., width] is the same at every token, but for rounding."""
    return difference(result, result.reshape(-1, result.shape[-1])[:1].expand_as(result)).within


def _feeds_only(graph: Graph, where: str, output: str) -> bool:
    """Whether all that depends on the parameters in ``where`` ends in the linear ``output``."""
    own = [name for name in graph.parameters if name.startswith(f"{where}.") and not name.startswith(f"{output}.")]
    waiting = [node for name in own for node in graph.readers_of_parameter(name)]
    seen: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node.index in seen or any(value.parameter == f"{output}.weight" for value in node.operands()):
            continue
        seen.add(node.index)
        for value in node.outputs:
            if graph.is_output(value):
                return False
            waiting += graph.consumers(value)
    return True
