"""A model in a folder that loads again anywhere: safetensors, a manifest, and the library's config where there is one.

The folder::

    model.safetensors    every weight and persistent buffer, named as in the model's ``state_dict``
    manifest.json        how to build the model, which layers have which size, SHA-256 of the other files, versions
    config.json          a Hugging Face model's configuration; ``from_pretrained`` reads it where it can say all widths
"""

import copy
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tritprune.errors import CheckpointError, ConfigError, MissingPackageError, RunFolderError, TritpruneError
from tritprune.registry import did_you_mean, models

FORMAT = 1
WEIGHTS, MANIFEST, CONFIG = "model.safetensors", "manifest.json", "config.json"
KINDS = ("registered", "transformers")
FEED_FORWARD_SIZES = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "hidden_dim", "n_inner", "d_ff", "mlp_dim")
"""Names that Hugging Face configurations give to the width of all feed-forward layers."""


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
            ``{"kind": "registered", "name": name, "arguments": {...}}`` for one of :data:`tritprune.registry.models`.
        widths: ``SlimResult.widths`` of a slim model: where its layers and head counts are not the bare ones.
        extra: plain values that the manifest keeps for its reader.

    Returns:
        The folder.

    Raises:
        ConfigError: a builder that cannot build this model, or a state that is not tensors.
        RunFolderError: the folder cannot be written, or holds something else than a saved model.
    """
    folder = Path(folder)
    _check_builder(builder, ConfigError)
    widths = {"layers": {}, "attributes": {}, **(widths or {})}
    tensors, aliases = _tensors(model)
    manifest: dict[str, Any] = {"format": FORMAT, "class": type(model).__name__, "builder": dict(builder)}
    manifest |= {"widths": widths, "aliases": aliases, "extra": dict(extra or {})}
    config = None
    if builder["kind"] == "transformers":
        config, plain = _describe_transformers(model, builder, widths)
        manifest |= {"from_pretrained": plain, "attention": getattr(config, "_attn_implementation", None)}
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
        manifest["files"] = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
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


def load_model(folder: str | os.PathLike[str]) -> nn.Module:
    """Build the model that was saved in ``folder``, with its widths and weights, on the CPU and in evaluation mode.

    Raises:
        CheckpointError: something is missing, damaged or does not fit; the message says what.
        MissingPackageError: transformers is needed and not installed.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
        model = _build(folder, manifest)
        _resize(model, manifest["widths"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        if isinstance(error, TritpruneError):
            raise
        raise CheckpointError(f"the model in {folder} cannot be built: {type(error).__name__}: {error}") from error
    _fill(model, tensors, manifest["aliases"], folder)
    return model.eval()


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


def _check_builder(builder: Mapping[str, Any], error: type[TritpruneError]) -> None:
    kind = builder.get("kind")
    if kind not in KINDS:
        raise error(f"unknown builder kind '{kind}'; {did_you_mean(str(kind), KINDS)}")
    if kind == "registered" and builder.get("name") not in models:
        name = str(builder.get("name"))
        raise error(f"no model is registered as '{name}'; {did_you_mean(name, models.names())}")
    if kind == "transformers":
        _transformers_class(builder, error)


def _transformers_class(builder: Mapping[str, Any], error: type[TritpruneError]) -> Any:
    """The model class that a builder of kind "transformers" names; nothing else of that library can be named."""
    try:
        library = import_module("transformers")
    except ImportError as missing:
        raise MissingPackageError(
            f"this model needs transformers ({missing}); pip install 'tritprune[hf]'"
        ) from missing
    found = getattr(library, str(builder.get("class")), None)
    if not (isinstance(found, type) and issubclass(found, library.PreTrainedModel) and found.config_class is not None):
        raise error(f"transformers {library.__version__} has no model class '{builder.get('class')}'")
    return found


def _describe_transformers(model: nn.Module, builder: Mapping[str, Any], widths: Mapping[str, Any]) -> tuple[Any, bool]:
    """The configuration to store, and whether it alone describes the model, so that ``from_pretrained`` loads it."""
    library_class = _transformers_class(builder, ConfigError)
    if type(model) is not library_class:
        raise ConfigError(f"the builder makes a {library_class.__name__}, the model is a {type(model).__name__}")
    config: Any = copy.deepcopy(model.config)
    config.architectures = [library_class.__name__]
    if not widths["attributes"]:
        shapes = [shape for layer in widths["layers"].values() for shape in layer["tensors"].values() if shape]
        sizes = sorted({size for shape in shapes for size in shape})
        names = [name for name in FEED_FORWARD_SIZES if isinstance(getattr(config, name, None), int)]
        for changes in ({}, *({name: size} for name in names for size in sizes)):
            candidate = copy.deepcopy(config)
            for name, size in changes.items():
                setattr(candidate, name, size)
            if _fits(candidate, library_class, model):
                return candidate, True
    return config, False


def _fits(config: Any, library_class: Any, model: nn.Module) -> bool:
    """Whether a model built from ``config`` has the names and shapes of ``model``."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        built = library_class(copy.deepcopy(config))
    shapes = {name: tensor.shape for name, tensor in built.state_dict().items()}
    return shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}


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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file that it lists was found and its SHA-256 holds."""
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
        found = _sha256(path)
        if found != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is {found[:16]}..., the manifest says {expected[:16]}..."
            )
    _check_builder(builder, CheckpointError)
    return manifest


def _build(folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """The bare model; the global random state stays as it is."""
    builder = manifest["builder"]
    with torch.random.fork_rng(devices=[]):
        if builder["kind"] == "registered":
            return models.get(builder["name"])(**builder.get("arguments", {}))
        library_class = _transformers_class(builder, CheckpointError)
        config = library_class.config_class.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        if manifest.get("attention"):
            config._attn_implementation = manifest["attention"]
        return library_class(config)


def _resize(model: nn.Module, widths: Mapping[str, Any]) -> None:
    """Give layers the shapes of the manifest (their tensors are filled later) and set their sizes and head counts."""
    for name, layer in {**_linears(widths.get("linears", {})), **widths.get("layers", {})}.items():
        module = model.get_submodule(name)
        for part, shape in layer["tensors"].items():
            _reshape(module, name, part, shape)
        _set_counts(module, name, layer["sizes"])
    for name, counts in widths["attributes"].items():
        _set_counts(model.get_submodule(name), name, counts)


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
    for attribute, value in counts.items():
        made = tuple(value) if isinstance(value, list) else value
        old = getattr(module, attribute)
        parts = made if isinstance(made, tuple) else (made,)
        if type(made) is not type(old) or not all(type(part) is int for part in parts):
            raise CheckpointError(f"the manifest sets '{name}.{attribute}' to {value!r}, which is not a count")
        setattr(module, attribute, made)


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
