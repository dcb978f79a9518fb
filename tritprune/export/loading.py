"""A saved model is built again: the bare model, its widths, its weights; nothing that does not fit is passed over."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tritprune.errors import CheckpointError, ConfigError, TritpruneError
from tritprune.export.builders import build_bare, check_builder, check_class
from tritprune.export.saved_model import CONFIG, FORMAT, MANIFEST, WEIGHTS, sha256_of
from tritprune.slimming.removal import Removal, remove
from tritprune.slimming.surgery import own_config, settle


def load_model(
    folder: str | os.PathLike[str], *, plugins: Sequence[str] = (), build: Callable[..., nn.Module] | None = None
) -> nn.Module:
    """Build the model that was saved in ``folder``, with its widths and weights, on the CPU and in evaluation mode.

    A folder decides on no code that is run: beside the library's own classes and registered ones, only the modules that
    the caller names are imported.

    Args:
        folder: what :func:`save_model` wrote.
        plugins: modules to import first: those that register a model, or that hold the model's class.
        build: makes the bare model from the builder's arguments, in the place of what the manifest names.

    Raises:
        CheckpointError: something is missing, damaged or does not fit; the message says what.
        ConfigError: a plugin that cannot be imported.
        MissingPackageError: transformers is needed and not installed.
    """
    folder = Path(folder)
    for plugin in plugins:
        try:
            import_module(plugin)
        except ImportError as error:
            raise ConfigError(f"plugins: cannot import '{plugin}' ({error})") from error
    manifest = _read_manifest(folder, plugins if build is None else None)
    try:
        tensors = load_file(folder / WEIGHTS)
        model = _build(folder, manifest, build)
        _resize(model, manifest["widths"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        if isinstance(error, TritpruneError):
            raise
        raise CheckpointError(f"the model in {folder} cannot be built: {type(error).__name__}: {error}") from error
    _fill(model, tensors, manifest["aliases"], folder)
    return model.eval()


def loads_with(folder: str | os.PathLike[str]) -> str:
    """How a saved model loads, in one line: "from_pretrained: yes, ..." or "from_pretrained: no, because ..."."""
    manifest = _read_manifest(Path(folder))
    if manifest["builder"]["kind"] != "transformers":
        return "from_pretrained: no, because it is no transformers model; tritprune.load loads it"
    because = str(manifest.get("from_pretrained_because", ""))
    if manifest.get("from_pretrained"):
        return f"from_pretrained: yes, {because}"
    evens_out = manifest.get("evens_out", because.startswith("its layers have"))
    remedy = (
        "; slimmer.uniform=true (tritprune.save(..., uniform=True)) would pad its layers to widths that it can say"
        if evens_out
        else ""
    )
    return f"from_pretrained: no, because {because}{remedy}; tritprune.load loads it"


def _read_manifest(folder: Path, plugins: Sequence[str] | None = None) -> dict[str, Any]:
    """The manifest, after every file that it lists was found and its SHA-256 holds.

    Args:
        folder: where it is.
        plugins: modules that its builder may take a class from; None where its builder is not to be used.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known, files, builder = manifest["format"], manifest["files"], manifest["builder"]
        missing_parts = [part for part in ("widths", "aliases") if part not in manifest]
    except OSError as error:
        raise CheckpointError(f"no saved model in {folder}: {MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {type(error).__name__} {error}") from error
    if known != FORMAT:
        raise CheckpointError(f"{folder} has format {known}; this version of tritprune reads format {FORMAT}")
    if missing_parts or WEIGHTS not in files:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it lacks {', '.join(missing_parts) or WEIGHTS}")
    for name, expected in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            raise CheckpointError(f"the model in {folder} is incomplete: {name} is missing")
        found = sha256_of(path)
        if found != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is {found[:16]}..., the manifest says {expected[:16]}..."
            )
    if plugins is None:
        return manifest
    check_builder(builder, CheckpointError)
    if builder["kind"] == "class":
        check_class(builder, plugins, folder)
    return manifest


def _build(folder: Path, manifest: Mapping[str, Any], build: Callable[..., nn.Module] | None) -> nn.Module:
    """The bare model."""
    builder = manifest["builder"]
    if build is not None:
        with torch.random.fork_rng(devices=[]):
            return build(**builder.get("arguments", {}))
    return build_bare(
        builder, lambda: json.loads((folder / CONFIG).read_text(encoding="utf-8")), manifest.get("attention")
    )


def _resize(model: nn.Module, widths: Mapping[str, Any]) -> None:
    """Take away what was removed; give layers the manifest's shapes, to be filled later, their sizes, head counts."""
    for name, how in widths.get("removed", {}).items():
        remove(model, Removal(name, how["output"], int(how["returns"])))
    for name, layer in {**_linears(widths.get("linears", {})), **widths.get("layers", {})}.items():
        module = model.get_submodule(name)
        for part, shape in layer["tensors"].items():
            _reshape(module, name, part, shape)
        _set_counts(module, name, layer["sizes"])
    for name, counts in widths["attributes"].items():
        _set_counts(model.get_submodule(name), name, counts)
    settle(model)


def _linears(linears: Mapping[str, Any]) -> dict[str, Any]:
    """The form in which the first version wrote widths: ``{name: {"out", "in", "bias"}}``."""
    return {
        name: {
            "tensors": {"weight": [size["out"], size["in"]], "bias": [size["out"]] if size["bias"] else None},
            "sizes": {"out_features": size["out"], "in_features": size["in"]},
        }
        for name, size in linears.items()
    }


def _reshape(module: nn.Module, name: str, part: str, shape: list[int] | None) -> None:
    where = f"{name}.{part}" if name else part
    if part in module._buffers and shape is not None:
        buffer = module._buffers[part]
        if buffer is None:
            raise CheckpointError(f"the manifest sizes '{where}', which is None")
        module._buffers[part] = buffer.new_zeros(shape)
    elif part in module._parameters:
        like = next((p for p in module._parameters.values() if p is not None), None)
        if like is None:
            raise CheckpointError(f"the manifest sizes '{where}' of a module without parameters")
        module.register_parameter(part, None if shape is None else nn.Parameter(like.new_zeros(shape)))
    else:
        raise CheckpointError(f"the manifest sizes '{where}', which is no tensor of {type(module).__name__}")


def _set_counts(module: nn.Module, name: str, counts: Mapping[str, Any]) -> None:
    own = any(attribute.startswith("config.") for attribute in counts) and own_config(module)
    for path, value in counts.items():
        holder, attribute = (own, path.removeprefix("config.")) if path.startswith("config.") else (module, path)
        made = tuple(value) if isinstance(value, list) else value
        old = getattr(holder, attribute)
        parts = made if isinstance(made, tuple) else (made,)
        if type(made) is not type(old) or not all(type(part) is int for part in parts):
            raise CheckpointError(f"the manifest sets '{name}.{path}' to {value!r}, which is not a count")
        setattr(holder, attribute, made)


def _fill(model: nn.Module, tensors: dict[str, Tensor], aliases: Mapping[str, str], folder: Path) -> None:
    """Load every tensor, each into one of its own shape, in its own dtype."""
    try:
        tensors = tensors | {name: tensors[stored] for name, stored in aliases.items()}
    except KeyError as error:
        raise CheckpointError(f"the model in {folder} is damaged: no tensor {error}") from error
    own = model.state_dict(keep_vars=True)
    problems = [f"no tensor '{name}'" for name in own.keys() - tensors.keys()]
    problems += [f"unknown tensor '{name}'" for name in tensors.keys() - own.keys()]
    problems += [
        f"'{name}' is {list(tensors[name].shape)}, the model has {list(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"the weights in {folder} do not fit the model: {'; '.join(sorted(problems)[:3])}{more}")
    for name, tensor in own.items():
        tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors, strict=True)
    for name, stored in aliases.items():  # tied again, also where both were made anew in another width
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key in module._parameters:
            module._parameters[key] = model.get_parameter(stored)
