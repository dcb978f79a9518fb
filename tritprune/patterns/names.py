"""The names that modules have in the plain model, whatever is wrapped around it or around a part of it.

``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel`` put a module of their own in
between, and ``_orig_mod`` or ``module`` into every name below it. Masks, settings and reports know plain names only, so
that one made on either side fits the other.
"""

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_HOLD_MODULE: tuple[type[nn.Module], ...] = (DataParallel, DistributedDataParallel, AveragedModel)


def plain_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, without the wrappers and the parts of names that they add.

    Args:
        model: wrapped or not.
        remove_duplicate: give a module that has several names by its first one only.
    """
    seen: set[nn.Module] = set()
    pending = [("", model)]
    while pending:
        name, module = pending.pop()
        module = unwrapped(module)
        if remove_duplicate and module in seen:
            continue
        seen.add(module)
        yield name, module
        prefix = f"{name}." if name else ""
        pending += [(prefix + part, child) for part, child in reversed(_children(module).items()) if child is not None]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside any number of wrappers."""
    while True:
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


def _inside(module: nn.Module) -> nn.Module | None:
    """What a wrapper holds; None if this is none."""
    if isinstance(module, _HOLD_MODULE):
        return _children(module)["module"]
    # By name: importing the compiler to ask for its class would take longer than importing torch.
    if type(module).__name__ == "OptimizedModule":
        return _children(module)["_orig_mod"]
    return None


def _children(module: nn.Module) -> dict[str, nn.Module | None]:
    """All of them: ``named_children()`` leaves out the second name of a shared one."""
    return vars(module)["_modules"]
