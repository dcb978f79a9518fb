"""Attentions whose heads are all dead: what stands in their place, and when it may."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.slimming.attention import Attention
from tritprune.slimming.comparison import difference
from tritprune.slimming.model_inputs import ModelInputs, evaluating
from tritprune.slimming.nodes import Graph

KEEPS_CACHE = "it keeps keys and values for the tokens to come"
CALL_HOOKS = [key for key in vars(nn.Module()) if key.startswith(("_forward", "_backward")) or "full_backward" in key]


class RemovedAttention(nn.Module):
    """Stands where an attention was that had no living head: ``y = b`` for each token, b the output linear's bias.

    It takes what the attention took. In the place of attention weights and whatever else the attention returned behind
    its result, it returns None; ``output_attentions`` of transformers, which goes by classes, passes it over.

    Args:
        output: dotted name, within the attention, of its output linear, which reads nothing now; None where that linear
            is not part of the attention, which then makes a tensor of width 0.
        layer: that linear.
        returns: number of values in the tuple that the attention returned; 0 where it returned its result alone.
    """

    batch_first = False  # nn.TransformerEncoderLayer asks, before it would read the attention's weights by itself
    in_proj_weight = in_proj_bias = torch.empty(
        0
    )  # nn.TransformerEncoder asks whether its first layer's have gradients

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
        """The stand-in for ``module``, in the same mode and with the hooks that its calls have."""
        made = cls(output, None if output is None else module.get_submodule(output), returns)
        vars(made).update({key: value for key, value in vars(module).items() if key in CALL_HOOKS})
        return made.train(module.training)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The bias of the output linear at every token of the first tensor, [..., tokens, width]."""
        read = first_tensor(*arguments, **named)
        assert read is not None
        if read.is_nested:  # as nn.TransformerEncoder makes of padding
            made = torch.nested.as_nested_tensor([self._at_each_token(one) for one in read.unbind()])
        else:
            made = self._at_each_token(read)
        return (made, *[None] * (self._returns - 1)) if self._returns else made

    def _at_each_token(self, read: Tensor) -> Tensor:
        made = read.new_empty((*read.shape[:-1], 0))
        return made if self._output is None else self.get_submodule(self._output)(made)

    def extra_repr(self) -> str:
        """What it is, where a model is printed."""
        return "all heads were dead"


def arguments_of(removed: RemovedAttention) -> dict[str, Any]:
    """What a stand-in was made with, but for the linear: ``output`` and ``returns``."""
    return {"output": removed._output, "returns": removed._returns}


def first_tensor(*arguments: Any, **named: Any) -> Tensor | None:
    """The first tensor of real numbers among the arguments of a call."""
    return next((value for value in (*arguments, *named.values()) if _is_real(value)), None)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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

    It can where its own parameters reach nothing but its output linear, it keeps nothing for the next token, its module
    returns its result (alone, or in front of other things in a tuple; and nothing added to it, whatever the module is
    given), and the first tensor that the module is given is the one with the queries.

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
    asked: list[Tensor] = []  # what the query linears read

    def listen(_: nn.Module, arguments: Any) -> None:
        asked.extend(arguments[:1])

    def watch(module: nn.Module, arguments: Any, named: dict[str, Any], result: Any) -> None:
        if any(hasattr(value, "get_seq_length") for value in (*arguments, *named.values())):
            said.append(KEEPS_CACHE)
            return
        first = result[0] if isinstance(result, tuple) and result else result
        source = first_tensor(*arguments, **named)
        shape = None if source is None else (*source.shape[:-1], read if within is None else made)
        if not isinstance(first, Tensor) or first.shape != shape:
            said.append(f"what {type(module).__name__} returns is not its result at every token")
        elif within is not None and not _is_constant(module, arguments, named, first):
            said.append(f"{type(module).__name__} returns more than what its heads make")
        elif not _has_queries(module, source, arguments, named, asked):
            said.append(f"the first tensor that {type(module).__name__} is given may not be the one with the queries")
        else:
            said.append(len(result) if isinstance(result, tuple) else 0)

    handles = [modules[name].register_forward_pre_hook(listen) for name in attention.query if name in modules]
    handles.append(modules[where].register_forward_hook(watch, with_kwargs=True))
    plain = ModelInputs(inputs.form, {name: value for name, value in inputs.values.items() if name != "use_cache"})
    try:
        with evaluating(model, caches=True):
            plain.call(model)
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError) as error:
        return f"{type(model).__name__} does not run with its caches: {type(error).__name__}"
    finally:
        for handle in handles:
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


def _is_constant(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], result: Tensor) -> bool:
    """Whether a result [..., width] is the same at every token, and for other numbers given; but for rounding."""
    other = module.forward(*map(_other, arguments), **{name: _other(value) for name, value in named.items()})
    first = other[0] if isinstance(other, tuple) else other
    token = result.reshape(-1, result.shape[-1])[:1].expand_as(result)
    return difference(result, token).within and difference(result, first).within


def _other(value: Any) -> Any:
    """Numbers in [-1, 1], no two tokens alike, in the place of a tensor of real numbers."""
    if not _is_real(value):
        return value
    return torch.arange(value.numel(), device=value.device).sin().to(value.dtype).view(value.shape)


def _has_queries(
    module: nn.Module, source: Tensor | None, arguments: tuple[Any, ...], named: dict[str, Any], asked: list[Tensor]
) -> bool:
    """Whether the result has a token for each token of ``source``, and not of another tensor that is as long here."""
    if isinstance(module, nn.MultiheadAttention):
        return source is (arguments[0] if arguments else named.get("query"))
    others = [value for value in (*arguments, *named.values()) if _is_real(value) and value is not source]
    alike = source is not None and any(value.shape[:-1] == source.shape[:-1] for value in others)
    return not alike or any(source is read for read in asked)


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
