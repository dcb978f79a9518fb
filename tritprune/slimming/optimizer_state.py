"""Training goes on after slimming: an optimizer is moved from the masked model to the slim one with its state.

Let the cut units be such that nothing reads them (their columns are masked), as the patterns channelx1 and heads leave
them. Then the gradient of each weight that stays is the same in both models, and so is every step, up to the order in
which sums are rounded; the masks have to be applied after each step in both. What does not go on exactly is named:

* a bias that took up constants of cut units (``SlimResult.folded``, ``created``): the masked model trains the weights
  behind the constant one by one, the slim model trains their sum;
* a gradient clipped by the norm over all parameters: the masked model counts the gradients of masked weights, too;
* random numbers of another number, as dropout on a narrower layer draws.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError
from tritprune.slimming.account import selected
from tritprune.slimming.slimmer import SlimResult


@dataclass(frozen=True)
class Carried:
    """What became of an optimizer's parameters.

    Args:
        moved: names of the parameters that go on with their state, cut where they were cut.
        dropped: names of those that the slim model does not have any more.
        created: name -> number of the parameter group that it was put into, for biases that the slimmer made.
        approximate: names of those that do not go on exactly as in the masked model, because they hold constants.
    """

    moved: tuple[str, ...]
    dropped: tuple[str, ...]
    created: Mapping[str, int]
    approximate: tuple[str, ...]


def slim_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, result: SlimResult) -> Carried:
    """Move ``optimizer`` from ``model`` to ``result.model``, in place and as a whole or not at all.

    The optimizer stays the same object with the same parameter groups in the same order, so that learning rate
    schedulers and a gradient scaler that know it go on as they are. State of a parameter's shape (momentum, second
    moments) is cut as the parameter was; numbers (the step) are kept. Detach a pruner before: it masks the old model.

    Args:
        optimizer: over parameters of ``model``, and of nothing else.
        model: what :func:`slim_model` was given.
        result: what it returned.

    Raises:
        ConfigError: a parameter that is not the model's, or a state of an unknown shape: it would not be clear what to
            cut. Nothing has changed then.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    slim = dict(result.model.named_parameters())
    state: defaultdict[Any, Any] = defaultdict(dict)
    groups: list[list[tuple[str, nn.Parameter]]] = []
    moved: list[str] = []
    dropped: list[str] = []
    for number, group in enumerate(optimizer.param_groups):
        members: list[tuple[str, nn.Parameter]] = []
        for position, parameter in enumerate(group["params"]):
            name = names.get(id(parameter))
            if name is None:
                raise ConfigError(
                    f"parameter {position} of group {number} ({'x'.join(map(str, parameter.shape))}) is none of the "
                    f"{type(model).__name__}'s; give the model that the optimizer trained and that was slimmed"
                )
            if name not in slim:
                dropped.append(name)
                continue
            moved.append(name)
            members.append((name, slim[name]))
            if parameter in optimizer.state:
                state[slim[name]] = _cut_state(name, parameter, optimizer.state[parameter], result)
        groups.append(members)
    homes = {name: _home(name, groups) for name in result.created if name in slim}
    for name, number in homes.items():
        groups[number].append((name, slim[name]))
    for group, members in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [parameter for _, parameter in members]
        if "param_names" in group:
            group["param_names"] = [name for name, _ in members]
    optimizer.state = state
    return Carried(tuple(moved), tuple(dropped), homes, tuple(dict.fromkeys((*result.folded, *result.created))))


def _cut_state(name: str, parameter: Tensor, values: Mapping[str, Any], result: SlimResult) -> dict[str, Any]:
    cut: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            cut[key] = selected(value, result.selections.get(name, {})).clone()
        elif isinstance(value, Tensor) and value.dim() == 0:
            cut[key] = value.clone()
        elif value is None or isinstance(value, bool | int | float | str):
            cut[key] = value
        elif result.selections:
            shape = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ConfigError(
                f"the optimizer's '{key}' of {name} has {shape}, the parameter {list(parameter.shape)}: how it is to "
                "be cut is not known; start a new optimizer on the slim model"
            )
        else:
            cut[key] = value
    return cut


def _home(name: str, groups: list[list[tuple[str, nn.Parameter]]]) -> int:
    """The group of a new bias: that of the other biases, else that of its layer's weight, else the last."""
    biases = [number for number, members in enumerate(groups) if any(n.endswith(".bias") for n, _ in members)]
    weight = f"{name.rpartition('.')[0]}.weight"
    weights = [number for number, members in enumerate(groups) if any(n == weight for n, _ in members)]
    return (biases or weights or [len(groups) - 1])[0]
