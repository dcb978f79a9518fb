"""Which pruner is at work on which layer; kept beside the model, so that the model can be copied and saved."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tritprune.errors import ConfigError
from tritprune.patterns import WeightView

_at_work: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]]" = weakref.WeakKeyDictionary()


def claim(pruner: object, views: Sequence[WeightView]) -> None:
    """Note that ``pruner`` works on these layers.

    Raises:
        ConfigError: another pruner does.
    """
    for view in views:
        owner = _owner(view.module)
        if owner is not None and owner is not pruner:
            raise ConfigError(f"{view.name} is being pruned by another pruner; detach() that one first")
    for view in views:
        _at_work[view.module] = weakref.ref(pruner)


def release(pruner: object, views: Sequence[WeightView]) -> None:
    """Note that ``pruner`` has left these layers."""
    for view in views:
        if _owner(view.module) is pruner:
            del _at_work[view.module]


def torch_optimizer(optimizer: Any, views: Sequence[WeightView]) -> torch.optim.Optimizer:
    """The optimizer whose steps count: the one inside a wrapper, and of several the one that has the views' weights.

    Raises:
        ConfigError: no optimizer has any of the weights, several have some of them, or something is no optimizer.
    """
    several = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    held = [(inner, _held(inner, views)) for inner in map(_inner, several)]
    fitting = [(inner, names) for inner, names in held if names]
    if not fitting:
        have = "the optimizer has" if len(several) == 1 else f"the {len(several)} optimizers have"
        raise ConfigError(
            f"{have} none of the {len(views)} weights to prune; it may have been made from another copy of the model"
        )
    if len(fitting) > 1:
        parts = "; ".join(f"{type(inner).__name__} has {len(names)}, first {names[0]}" for inner, names in fitting)
        raise ConfigError(
            f"the {len(views)} weights to prune are in {len(fitting)} optimizers ({parts}), whose steps differ; "
            "make one pruner for each, with include"
        )
    return fitting[0][0]


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside a wrapper (accelerate's, Lightning's) that has no hooks of its own."""
    inner = optimizer
    while "_optimizer_step_pre_hooks" not in vars(inner) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise ConfigError(f"attach() needs a torch optimizer, got {type(optimizer).__name__}")
    return inner


def _held(optimizer: torch.optim.Optimizer, views: Sequence[WeightView]) -> list[str]:
    """The names of the views whose weights an optimizer has."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return [view.name for view in views if id(view.parameter) in held]


def after_closure(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], do: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of ``optimizer.step`` with a closure that calls ``do`` once gradients are there.

    Some optimizers evaluate the closure several times a step; ``do`` is called after the first, which is at the weights
    before the step.

    Args:
        args: the optimizer, and the closure if it is not in ``kwargs``.
        kwargs: the rest.
        do: what needs gradients.

    Returns:
        None where the step is not given a closure.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None
    done = False

    def evaluate() -> Any:
        nonlocal done
        loss = closure()
        if not done:
            done = True
            do()
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": evaluate}
    return (*args[:1], evaluate, *args[2:]), dict(kwargs)


def still_others(pruner: Any, followed: torch.optim.Optimizer) -> list[Any]:
    """Make steps of all other optimizers leave the weights of a pruner's model alone while it calibrates.

    Their gradients are taken away for the length of the step, and are there again afterwards.

    Args:
        pruner: has ``model`` and ``calibrating``.
        followed: the optimizer that it is attached to.

    Returns:
        Handles, to be removed on detaching; they are when the pruner is gone.
    """
    me, own = weakref.ref(pruner), weakref.ref(followed)
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []

    def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        here = me()
        if here is None or not here.calibrating or optimizer is own():
            return None
        mine = {id(parameter) for parameter in here.model.parameters()}

        def take() -> None:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in mine and parameter.grad is not None:
                        kept.append((parameter, parameter.grad))
                        parameter.grad = None

        arguments = after_closure(args, kwargs, take)
        if arguments is None:
            take()
        return arguments

    def after(*_: Any) -> None:
        while kept:
            parameter, gradient = kept.pop()
            parameter.grad = gradient

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    for handle in handles:
        weakref.finalize(pruner, handle.remove)
    return handles


def _owner(module: nn.Module) -> object | None:
    reference = _at_work.get(module)
    return None if reference is None else reference()
