"""Fine-tuned dense models, kept by content: the same task, data, weights, seed and settings are never trained twice."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from tritprune.errors import CheckpointError
from tritprune.export import load_model, save_model
from tritprune.tasks import Task
from tritprune.training.checkpoint import fingerprint
from tritprune.training.settings import TrainingSettings


class DenseCache:
    """A folder of dense models.

    Args:
        folder: one sub-folder per model, named by the hash of what decided it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, task: Task, settings: TrainingSettings, seed: int, processes: int) -> str:
        """Hash of everything that decides the dense model's numbers."""
        parts: dict[str, Any] = {
            "task": task.name,
            "data": task.data_hash,
            "model": task.model_hash,
            "builder": task.builder(),
            "phase": dataclasses.asdict(settings.dense),
            "batch_size": settings.batch_size,
            "accumulate": settings.accumulate,
            "clip": settings.clip,
            "precision": settings.precision,
            "device": settings.resolve_device(),
            "processes": processes,
            "seed": seed,
        }
        return fingerprint(parts)

    def path(self, key: str) -> Path:
        """Where the model with this key is, or would be."""
        return self.folder / f"dense-{key}"

    def load(self, key: str) -> tuple[nn.Module, dict[str, float]] | None:
        """The model and its metrics, or None where there is none or where it is damaged."""
        folder = self.path(key)
        if not folder.exists():
            return None
        try:
            model = load_model(folder)
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            return model, manifest["extra"]["metrics"]
        except (CheckpointError, KeyError):
            return None  # it is trained again and replaced

    def save(self, key: str, model: nn.Module, task: Task, metrics: dict[str, float]) -> None:
        """Keep a model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_model(model, self.path(key), builder=task.builder(), extra={"metrics": metrics, "task": task.name})
