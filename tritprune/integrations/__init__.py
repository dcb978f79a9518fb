"""Pruning inside other people's training loops. Each integration is one file, which alone imports its package.

| name | of | what |
|---|---|---|
| TransformersPruning | Hugging Face Transformers | a callback of ``transformers.Trainer`` |
| LightningPruning | Lightning | a callback of ``lightning.Trainer`` or ``pytorch_lightning.Trainer`` |

accelerate and plain PyTorch need none: ``pruner.attach(optimizer)``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tritprune.errors import MissingPackageError

if TYPE_CHECKING:
    from tritprune.integrations.lightning import LightningPruning
    from tritprune.integrations.transformers import TransformersPruning

__all__ = ["LightningPruning", "TransformersPruning"]

_HOME = {
    "LightningPruning": ("lightning", "pip install 'tritprune[lightning]'"),
    "TransformersPruning": ("transformers", "pip install 'tritprune[hf]'"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tritprune.integrations' has no attribute '{name}'; names: {', '.join(__all__)}")
    package, install = _HOME[name]
    try:
        value = getattr(import_module(f"tritprune.integrations.{package}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tritprune"):
            raise
        raise MissingPackageError(f"{name} needs the package {error.name}, which is not installed: {install}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
