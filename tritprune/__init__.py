"""tritprune: exact, fast, honest pruning of neural networks.

Public names load on first use, so that ``import tritprune`` costs no more than ``import torch``.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from tritprune.criteria import Criterion, get_criterion, register_criterion
    from tritprune.export import export_onnx, export_program, loads_with, save
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
        RetrainFreePruner,
        SnipMomentumPruner,
        SnipPruner,
        get_pruner,
        register_pruner,
    )
    from tritprune.schedules import Schedule, get_schedule, register_schedule
    from tritprune.slimming import model_slim, parse_auto_slim_config, slim, slim_model, slim_optimizer
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
    "RetrainFreePruner",
    "Schedule",
    "SnipMomentumPruner",
    "SnipPruner",
    "Task",
    "__version__",
    "export_onnx",
    "export_program",
    "from_neural_compressor",
    "get_criterion",
    "get_pattern",
    "get_pruner",
    "get_schedule",
    "get_task",
    "load",
    "loads_with",
    "model_slim",
    "parse_auto_slim_config",
    "register_criterion",
    "register_pattern",
    "register_pruner",
    "register_schedule",
    "register_task",
    "save",
    "slim",
    "slim_model",
    "slim_optimizer",
    "use_backend",
]

_HOME = {
    "criteria": ("Criterion", "get_criterion", "register_criterion"),
    "export": ("export_onnx", "export_program", "loads_with", "save"),
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
        "RetrainFreePruner",
        "SnipMomentumPruner",
        "SnipPruner",
        "get_pruner",
        "register_pruner",
    ),
    "schedules": ("Schedule", "get_schedule", "register_schedule"),
    "slimming": ("model_slim", "parse_auto_slim_config", "slim", "slim_model", "slim_optimizer"),
    "tasks": ("Task", "get_task", "register_task"),
}


def load(
    folder: str | os.PathLike[str], *, plugins: "Sequence[str]" = (), build: "Callable[..., nn.Module] | None" = None
) -> "nn.Module":
    """Rebuild a model that tritprune saved, in evaluation mode, with its slim widths.

    Args:
        folder: the folder that holds ``model.safetensors`` and ``manifest.json``.
        plugins: modules to import first: those of your own that hold or register the model's class.
        build: your own constructor of the bare model; called with the arguments that were saved.

    Raises:
        CheckpointError: the folder is damaged or incomplete; the message says what is missing.
    """
    import_module("tritprune.tasks")  # files the constructors of the tasks' own models
    return import_module("tritprune.export").load_model(folder, plugins=plugins, build=build)


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            value = getattr(import_module(f"tritprune.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'tritprune' has no attribute '{name}'; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
