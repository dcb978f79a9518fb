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
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tritprune.errors import CheckpointError, ConfigError, MissingPackageError, RunFolderError, TritpruneError
from tritprune.export.library_config import describe, even_widths
from tritprune.registry import did_you_mean, models
from tritprune.slimming import SlimResult
from tritprune.slimming.surgery import own_config, settle

FORMAT = 1
WEIGHTS, MANIFEST, CONFIG = "model.safetensors", "manifest.json", "config.json"
KINDS = ("registered", "transformers", "class")


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
    _check_builder(builder, ConfigError)
    widths = {"layers": {}, "attributes": {}, **(widths or {})}
    tensors, aliases = _tensors(model)
    manifest: dict[str, Any] = {"format": FORMAT, "class": type(model).__name__, "builder": dict(builder)}
    manifest |= {"widths": widths, "aliases": aliases, "extra": dict(extra or {})}
    config = None
    if builder["kind"] == "transformers":
        described = describe(model, _own_class(model, builder))
        config = described.config
        manifest |= {"from_pretrained": described.complete, "from_pretrained_because": described.because}
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


def save(
    model: nn.Module | SlimResult,
    folder: str | os.PathLike[str],
    *,
    arguments: Mapping[str, Any] | None = None,
    uniform: bool = False,
) -> Path:
    """Save a model, or the result of slimming one, so that :func:`tritprune.load` builds it again anywhere.

    Args:
        model: a model as its class makes it, or what :func:`tritprune.slim_model` returned.
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
        widths = None
    return save_model(bare, folder, builder=builder, widths=widths)


def builder_of(model: nn.Module, arguments: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """How :func:`save_model` says which class a model is of: of transformers, registered, or any other.

    Args:
        model: the model.
        arguments: what its class was called with, in plain values; of no use to a transformers model.

    Raises:
        ConfigError: the class cannot be imported by name (it is local to a function), so it cannot be built again.
    """
    kind = type(model)
    package = kind.__module__.partition(".")[0]
    if package == "transformers" and getattr(import_module(package), kind.__name__, None) is kind:
        return {"kind": "transformers", "class": kind.__name__}
    given = dict(arguments or {})
    for name in models:
        if models.get(name) is kind:
            return {"kind": "registered", "name": name, "arguments": given}
    if "<locals>" in kind.__qualname__ or "." in kind.__qualname__:
        raise ConfigError(
            f"{kind.__qualname__} is defined inside of something else and cannot be imported again; "
            "define it at the top of a module"
        )
    return {"kind": "class", "class": f"{kind.__module__}.{kind.__qualname__}", "arguments": given}


def loads_with(folder: str | os.PathLike[str]) -> str:
    """How a saved model loads, in one line: "from_pretrained: yes, ..." or "from_pretrained: no, because ..."."""
    manifest = _read_manifest(Path(folder))
    if manifest["builder"]["kind"] != "transformers":
        return "from_pretrained: no, because it is no transformers model; tritprune.load loads it"
    because = str(manifest.get("from_pretrained_because", ""))
    if manifest.get("from_pretrained"):
        return f"from_pretrained: yes, {because}"
    remedy = "; uniform=true would pad them" if because.startswith("its layers have") else ""
    return f"from_pretrained: no, because {because}{remedy}; tritprune.load loads it"


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
    if kind == "class" and not isinstance(builder.get("class"), str):
        raise error("a builder of kind 'class' names the class: {'kind': 'class', 'class': 'my_module.Net'}")


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


def _own_class(model: nn.Module, builder: Mapping[str, Any]) -> Any:
    library_class = _transformers_class(builder, ConfigError)
    if type(model) is not library_class:
        raise ConfigError(f"the builder makes a {library_class.__name__}, the model is a {type(model).__name__}")
    return library_class


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
        found = _sha256(path)
        if found != expected:
            raise CheckpointError(
                f"{path} is damaged: its SHA-256 is {found[:16]}..., the manifest says {expected[:16]}..."
            )
    if plugins is None:
        return manifest
    _check_builder(builder, CheckpointError)
    if builder["kind"] == "class":
        module, _, name = builder["class"].rpartition(".")
        if module not in plugins:
            raise CheckpointError(
                f"the model in {folder} is a {builder['class']}; code is imported only when you ask for it: "
                f"load it with plugins=['{module}'], or with build={name}"
            )
        found = getattr(import_module(module), name, None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise CheckpointError(f"the model in {folder} is a {builder['class']}, and '{module}' has no such class")
    return manifest


def _build(folder: Path, manifest: Mapping[str, Any], build: Callable[..., nn.Module] | None) -> nn.Module:
    """The bare model; the global random state stays as it is."""
    builder = manifest["builder"]
    with torch.random.fork_rng(devices=[]):
        if build is not None:
            return build(**builder.get("arguments", {}))
        if builder["kind"] == "registered":
            return models.get(builder["name"])(**builder.get("arguments", {}))
        if builder["kind"] == "class":
            module, _, name = builder["class"].rpartition(".")
            return getattr(import_module(module), name)(**builder.get("arguments", {}))
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
