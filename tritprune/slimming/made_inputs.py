"""Inputs for a model where nobody gave any: made from its configuration, its forward's signature and its first layer.

| the model takes | what is made |
|---|---|
| ``input_ids`` | token numbers ``[2, 8]``, no padding among them, the last one the end of the text if there is one |
| ``decoder_input_ids``, too | the same for the decoder, where the configuration says that there is one |
| ``pixel_values`` | ``[2, channels, height, width]`` as the configuration says, else 3 x 224 x 224 |
| ``input_values`` or ``input_features`` | a second of sound at 16 kHz ``[2, 16000]``, features ``[2, bins, frames]`` |
| one argument of another name | for its first layer: token numbers, ``[2, channels, 32, ...]``, ``[2, features]`` |

A made input has to run: of several sizes that a model might take, the first that does is chosen. None is random.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError
from tritprune.slimming.model_inputs import ModelInputs, evaluating

LENGTH, ROWS = 8, 2
SIDES = (32, 224, 28, 64, 16)  # of an image, or steps of a signal, where no configuration says how many
LABELS = ("label", "labels")


def inputs_for(model: nn.Module, dataloader: Iterable[Any] | None = None) -> Any:
    """A dataloader's first batch without its labels; where there is no dataloader, inputs that are made.

    Args:
        model: left as it is.
        dataloader: its batches are a tensor, a mapping (labels are taken out), or (inputs, labels).

    Raises:
        ConfigError: the dataloader has no batch, or no inputs can be made; the message says what was tried.
    """
    if dataloader is None:
        return make_inputs(model)
    batch = next(iter(dataloader), None)
    if batch is None:
        raise ConfigError("the dataloader has no batch: the model is read by running it on its first one")
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in LABELS}
    return batch[0] if isinstance(batch, list | tuple) and len(batch) == 2 else batch


def make_inputs(model: nn.Module) -> Any:
    """A mapping of keyword arguments, or a tensor, on which ``model`` runs.

    Args:
        model: left as it is; run once or a few times, in evaluation mode.

    Raises:
        ConfigError: it takes arguments that nothing tells, or runs on none of the made ones.
    """
    tried: list[str] = []
    problem = "it says neither what it takes nor how much of it"
    for made in _candidates(model):
        inputs = ModelInputs.of(made)
        try:
            with evaluating(model):
                inputs.call(model)
        except Exception as error:  # whatever a model's own code raises on an input that is none of its own
            tried.append(
                ", ".join(f"{name} {list(t.shape)}".removeprefix("0 ") for name, t in inputs.tensors().items())
            )
            said = (str(error).strip() or repr(error)).splitlines()[0]
            problem = f"it does not run on {'; '.join(tried)} (the last: {said})"
            continue
        return made
    raise ConfigError(
        f"no inputs could be made for {type(model).__name__}: {problem}; give example_inputs, or a dataloader"
    )


def _candidates(model: nn.Module) -> Iterator[Any]:
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in named if p.default is p.empty]
    makers = _makers(model)
    main = getattr(model, "main_input_name", None)
    known = [p.name for p in named if p.name in makers]
    chosen = list(dict.fromkeys([n for n in (main, *needed, "decoder_input_ids") if n in known] or known[:1]))
    if chosen and set(needed) <= set(chosen):
        for rows in (ROWS, 1):  # some classifiers take one text at a time
            yield {name: makers[name]()[:rows] for name in chosen}
        return
    if len(needed) != 1:
        optional = f"can do without {', '.join(p.name for p in named)}" if named else "names no argument"
        what = f"needs {', '.join(needed)}" if needed else optional
        raise ConfigError(
            f"no inputs can be made for {type(model).__name__}, whose forward {what}; "
            "give example_inputs, or a dataloader"
        )
    by_name = any(p.name == needed[0] and p.kind is p.KEYWORD_ONLY for p in named)
    for made in _for_first_layer(model):
        yield {needed[0]: made} if by_name else made


def _makers(model: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Arguments by name, as far as the configuration or an embedding tells their sizes."""
    config = getattr(model, "config", None)
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    found: dict[str, Callable[[], Tensor]] = {}
    words = getattr(config, "vocab_size", None) or (embedding.num_embeddings if embedding is not None else None)
    if isinstance(words, int):
        found["input_ids"] = lambda: _tokens(model, words, config)
        if getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = found["input_ids"]
    if config is not None:
        channels = getattr(config, "num_channels", None)
        image = (ROWS, channels if _is_size(channels) else 3, *_sides(getattr(config, "image_size", None)))
        found["pixel_values"] = lambda: _waves(model, image)
        found["input_values"] = lambda: _waves(model, (ROWS, 16000))
        bins, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
        if _is_size(bins) and _is_size(frames):
            found["input_features"] = lambda: _waves(model, (ROWS, bins, 2 * frames))
    return found


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and value > 0


def _sides(size: Any) -> tuple[int, ...]:
    """Height and width of an image: a number, two of them, or a mapping of both; 224 where it is none of these."""
    named = [size.get("height"), size.get("width")] if isinstance(size, Mapping) else size
    sides = tuple(named) if isinstance(named, list | tuple) else (named, named)
    told = tuple(side for side in sides if _is_size(side))
    return told if len(told) == len(sides) else (224, 224)


def first_layer(model: nn.Module) -> nn.Module | None:
    """The first module that has parameters of its own."""
    return next((m for m in model.modules() if next(m.parameters(recurse=False), None) is not None), None)


def _for_first_layer(model: nn.Module) -> Iterator[Tensor]:
    """What the first layer that has parameters takes."""
    first = first_layer(model)
    if isinstance(first, nn.Embedding):
        yield _tokens(model, first.num_embeddings, None)
    elif isinstance(first, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        dimensions = len(first.kernel_size)
        yield from (_waves(model, (ROWS, first.in_channels, *([side] * dimensions))) for side in SIDES)
    elif isinstance(first, nn.MultiheadAttention):
        yield _waves(model, (ROWS, LENGTH, first.embed_dim))
    elif isinstance(first, nn.Linear):
        yield _waves(model, (ROWS, first.in_features))
        yield _waves(model, (ROWS, LENGTH, first.in_features))


def _tokens(model: nn.Module, words: int, config: Any) -> Tensor:
    """Token numbers ``[2, 8]``: ascending, no padding, ending with the end of the text where the model has one."""
    padding, end = getattr(config, "pad_token_id", None), getattr(config, "eos_token_id", None)
    plain = [word for word in range(min(words, ROWS * LENGTH + 2)) if word not in (padding, end)] or [0]
    positions = getattr(config, "max_position_embeddings", None)
    length = min(LENGTH, positions) if isinstance(positions, int) and positions > 0 else LENGTH
    tokens = torch.tensor([plain[i % len(plain)] for i in range(ROWS * length)]).view(ROWS, length)
    if isinstance(end, int) and 0 <= end < words:
        tokens[:, -1] = end
    return tokens.to(_place(model).device)


def _waves(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Numbers between -1 and 1 that do not repeat."""
    place = _place(model)
    return torch.arange(torch.Size(shape).numel(), device=place.device).view(shape).double().sin().to(place.dtype)


def _place(model: nn.Module) -> Tensor:
    """A tensor of the model's device and floating dtype."""
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
