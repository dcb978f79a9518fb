"""tritprune: exact, fast, honest pruning of neural networks.

Public names load on first use, so that ``import tritprune`` costs no more than ``import torch``.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from tritprune.criteria import Criterion, get_criterion, register_criterion
    from tritprune.kernels import use_backend
    from tritprune.neural_compressor import from_neural_compressor
    from tritprune.optim import MaskedAdamW, MaskedSGD
    from tritprune.patterns import Pattern, get_pattern, register_pattern
    from tritprune.pruners import (
        BlockMaskPruner,
        HeadPruner,
        MagnitudePruner,
        MaskSet,
        PatternLockPruner,
        ProgressivePruner,
        Pruner,
        SnipMomentumPruner,
        SnipPruner,
        get_pruner,
        register_pruner,
    )
    from tritprune.schedules import Schedule, get_schedule, register_schedule
    from tritprune.slimming import slim, slim_model
    from tritprune.tasks import Task, get_task, register_task

__version__ = "0.1.0"

__all__ = [
    "BlockMaskPruner",
    "Criterion",
    "HeadPruner",
    "MagnitudePruner",
    "MaskSet",
    "MaskedAdamW",
    "MaskedSGD",
    "Pattern",
    "PatternLockPruner",
    "ProgressivePruner",
    "Pruner",
    "Schedule",
    "SnipMomentumPruner",
    "SnipPruner",
    "Task",
    "__version__",
    "from_neural_compressor",
    "get_criterion",
    "get_pattern",
    "get_pruner",
    "get_schedule",
    "get_task",
    "load",
    "register_criterion",
    "register_pattern",
    "register_pruner",
    "register_schedule",
    "register_task",
    "slim",
    "slim_model",
    "use_backend",
]

_HOME = {
    "criteria": ("Criterion", "get_criterion", "register_criterion"),
    "kernels": ("use_backend",),
    "neural_compressor": ("from_neural_compressor",),
    "optim": ("MaskedAdamW", "MaskedSGD"),
    "patterns": ("Pattern", "get_pattern", "register_pattern"),
    "pruners": (
        "BlockMaskPruner",
        "HeadPruner",
        "MagnitudePruner",
        "MaskSet",
        "PatternLockPruner",
        "ProgressivePruner",
        "Pruner",
        "SnipMomentumPruner",
        "SnipPruner",
        "get_pruner",
        "register_pruner",
    ),
    "schedules": ("Schedule", "get_schedule", "register_schedule"),
    "slimming": ("slim", "slim_model"),
    "tasks": ("Task", "get_task", "register_task"),
}


def load(folder: str | os.PathLike[str]) -> "nn.Module":
    """Rebuild a model that tritprune saved, in evaluation mode, with its slim widths.

    Args:
        folder: the folder that holds ``model.safetensors`` and ``manifest.json``.

    Raises:
        CheckpointError: the folder is damaged or incomplete; the message says what is missing.
    """
    import_module("tritprune.tasks")  # files the constructors of the tasks' own models
    return import_module("tritprune.export").load_model(folder)


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            value = getattr(import_module(f"tritprune.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'tritprune' has no attribute '{name}'; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
