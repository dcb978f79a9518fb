"""Saving a model so that it loads again, with its own widths: safetensors and a manifest, written in one move.

A saved folder::

    model.safetensors   every tensor
    manifest.json       how to build the bare model, the width of every layer that was cut, hashes, versions
    config.json         the Hugging Face config, where the model has one
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors
from torch import nn

from tritprune.errors import CheckpointError
from tritprune.registry import models

FORMAT = 1
TENSORS, MANIFEST, CONFIG = "model.safetensors", "manifest.json", "config.json"


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    builder: Mapping[str, Any],
    widths: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model's folder; what was there before is replaced only when the new one is whole.

    Args:
        model: the model.
        folder: where.
        builder: how to build the bare model: ``{"kind": "transformers", "class": ...}`` or
            ``{"kind": "registered", "name": ..., "arguments": {...}}``.
        widths: what the slimmer changed: ``{"linears": {name: [out, in]}, "attributes": {module: {name: value}}}``.
        extra: anything to keep beside it.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_tensors(model, str(temporary / TENSORS))
        config = getattr(model, "config", None)
        if hasattr(config, "to_json_string"):
            (temporary / CONFIG).write_text(config.to_json_string(), encoding="utf-8")  # type: ignore[union-attr]
        manifest = {
            "format": FORMAT,
            "builder": dict(builder),
            "widths": dict(widths or {}),
            "sha256": _sha256(temporary / TENSORS),
            "torch": torch.__version__,
            "extra": dict(extra or {}),
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def load_model(folder: str | os.PathLike[str]) -> nn.Module:
    """Rebuild a saved model in evaluation mode.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    folder = Path(folder)
    missing = [name for name in (TENSORS, MANIFEST) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is not a saved model: {', '.join(missing)} missing")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    if _sha256(folder / TENSORS) != manifest["sha256"]:
        raise CheckpointError(f"{folder / TENSORS} is damaged: its SHA-256 is not the one in {MANIFEST}")
    model = _build(folder, manifest["builder"])
    widths = manifest["widths"]
    for name, (rows, cols) in widths.get("linears", {}).items():
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        _resize(module, rows, cols, bias=widths.get("biases", {}).get(name, module.bias is not None))
    for name, attributes in widths.get("attributes", {}).items():
        for attribute, value in attributes.items():
            setattr(model.get_submodule(name), attribute, value)
    try:
        load_tensors(model, str(folder / TENSORS))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: the tensors do not fit the manifest: {error}") from error
    return model.eval()


def _build(folder: Path, builder: Mapping[str, Any]) -> nn.Module:
    if builder["kind"] == "transformers":
        import transformers

        kind = getattr(transformers, builder["class"])
        return kind(kind.config_class.from_pretrained(folder))
    return models.build({"name": builder["name"], **builder.get("arguments", {})})


def _resize(module: nn.Linear, rows: int, cols: int, *, bias: bool) -> None:
    module.out_features, module.in_features = rows, cols
    module.weight = nn.Parameter(module.weight.new_empty(rows, cols))
    module.bias = nn.Parameter(module.weight.new_empty(rows)) if bias else None  # type: ignore[assignment]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
