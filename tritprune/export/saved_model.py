"""A model in a folder that loads again anywhere: safetensors, a manifest, and the library's config where there is one.

The folder::

    model.safetensors    every weight and persistent buffer, named as in the model's ``state_dict``
    manifest.json        how to build the model, which layers have which size, SHA-256 of the other files, versions
    config.json          a Hugging Face model's configuration; ``from_pretrained`` reads it where it can say all widths
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tritprune.errors import ConfigError, RunFolderError
from tritprune.export.builders import build_bare, builder_of, check_builder, own_class
from tritprune.export.config_fields import built
from tritprune.export.even_widths import even_widths
from tritprune.export.library_config import describe
from tritprune.slimming import SlimResult
from tritprune.slimming.account import changed_widths

FORMAT = 1
WEIGHTS, MANIFEST, CONFIG = "model.safetensors", "manifest.json", "config.json"


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    builder: Mapping[str, Any],
    widths: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Save ``model`` into ``folder``, whole or not at all; a model that was saved there before is replaced.

    Args:
        model: any module whose state is tensors; tied tensors are stored once.
        folder: made if it is missing.
        builder: how to build the bare model: ``{"kind": "transformers", "class": name}`` for a Hugging Face model, or
            ``{"kind": "registered", "name": name, "arguments": {...}}`` for one of :data:`tritprune.registry.models`,
            or ``{"kind": "class", "class": "my_module.Net", "arguments": {...}}``; see :func:`builder_of`.
        widths: ``SlimResult.widths`` of a slim model: where its layers and head counts are not the bare ones.
        extra: plain values that the manifest keeps for its reader.

    Returns:
        The folder.

    Raises:
        ConfigError: a builder that cannot build this model, or a state that is not tensors.
        RunFolderError: the folder cannot be written, or holds something else than a saved model.
    """
    folder = Path(folder)
    check_builder(builder, ConfigError)
    widths = {"layers": {}, "attributes": {}, **(widths or {})}
    tensors, aliases = _tensors(model)
    manifest: dict[str, Any] = {"format": FORMAT, "class": type(model).__name__, "builder": dict(builder)}
    manifest |= {"widths": widths, "aliases": aliases, "extra": dict(extra or {})}
    config = None
    if builder["kind"] == "transformers":
        described = describe(model, own_class(model, builder))
        config = described.config
        manifest |= {"from_pretrained": described.complete, "from_pretrained_because": described.because}
        manifest["evens_out"] = described.evens_out and not described.complete
        manifest["attention"] = getattr(config, "_attn_implementation", None)
    manifest["versions"] = _versions(builder)
    _refuse_strangers(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        if config is not None:
            (temporary / CONFIG).write_text(config.to_json_string(), encoding="utf-8")
        manifest["files"] = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        shutil.copymode(
            temporary / MANIFEST, temporary / WEIGHTS
        )  # safetensors makes files that only their owner reads
        _move_into_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(f"the model cannot be saved to {folder}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"the manifest holds plain values only: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def save(
    model: nn.Module | SlimResult,
    folder: str | os.PathLike[str],
    *,
    arguments: Mapping[str, Any] | None = None,
    uniform: bool = False,
) -> Path:
    """Save a model, or the result of slimming one, so that :func:`tritprune.load` builds it again anywhere.

    Args:
        model: a model as its class makes it, a slim model, or what :func:`tritprune.slim_model` returned; also one that
            was slimmed more than once: its widths are held against those that its class makes. Where a class of your
            own cannot be called with ``arguments`` here, only what the last slimming changed is known.
        folder: made if it is missing; replaced if it holds a saved model.
        arguments: what the model's class was called with, for a class of your own.
        uniform: pad a transformers model's layers to the same widths, so that ``from_pretrained`` loads it, too.

    Returns:
        The folder; :func:`loads_with` says in one line how it loads.

    Raises:
        ConfigError: a class that cannot be built again, or widths that cannot be evened out.
        RunFolderError: the folder cannot be written, or holds something else than a saved model.
    """
    bare = model.model if isinstance(model, SlimResult) else model
    widths = model.widths if isinstance(model, SlimResult) else None
    builder = builder_of(bare, arguments)
    if uniform:
        if builder["kind"] != "transformers":
            raise ConfigError(f"uniform is for models of transformers; {type(bare).__name__} has no configuration")
        bare, _ = even_widths(bare, type(bare))
    if builder["kind"] == "transformers":
        try:
            widths = changed_widths(built(bare.config, type(bare)), bare)
        except KeyError as error:
            raise ConfigError(
                f"the model has a module {error} that {type(bare).__name__} does not make, so it could not be built "
                "again; save it without what was added"
            ) from error
    else:
        widths = _with_earlier(widths, builder, bare)
    return save_model(bare, folder, builder=builder, widths=widths)


def _with_earlier(widths: Mapping[str, Any] | None, builder: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """``widths``, and what earlier slimming changed: all that differs from what the class makes."""
    made: dict[str, Any] = dict(widths or {})
    try:
        with torch.device("meta"):
            found = changed_widths(build_bare(builder, dict, None), model)
    except Exception:  # code of the user's own, in which anything may happen; loading may build it in another way
        return made
    for part, modules in found.items():
        own = dict(made.get(part, {}))
        for name, changed in modules.items():
            if part == "layers":
                given = own.get(name, {"tensors": {}, "sizes": {}})
                own[name] = {kind: {**given[kind], **changed[kind]} for kind in ("tensors", "sizes")}
            else:
                own[name] = {**own.get(name, {}), **changed}
        made[part] = own
    return made


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state to be stored, and the names that share a tensor with a stored one (name -> stored name)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"'{name}' in the model's state is {type(tensor).__name__}, not a tensor")
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _versions(builder: Mapping[str, Any]) -> dict[str, str]:
    packages = ["torch", "safetensors", *(["transformers"] if builder["kind"] == "transformers" else [])]
    found = {"tritprune": str(import_module("tritprune").__version__)}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _refuse_strangers(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise RunFolderError(f"{folder} is not a folder; the model is not saved over it")
    strangers = (
        sorted({path.name for path in folder.iterdir()} - {WEIGHTS, MANIFEST, CONFIG}) if folder.exists() else []
    )
    if strangers:
        raise RunFolderError(
            f"{folder} holds {', '.join(strangers[:3])}{', ...' if len(strangers) > 3 else ''}: "
            "it is not replaced by a saved model; choose another folder"
        )


def _move_into_place(temporary: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
