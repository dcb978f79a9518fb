"""Inputs for the certificate, made from the example inputs: other batch sizes and a shorter sequence."""

import torch
from torch import Tensor, nn

from tritprune.slimming.model_inputs import ModelInputs, evaluating

BATCHES = (1, 2, 7)


def derive_inputs(model: nn.Module, inputs: ModelInputs) -> list[ModelInputs]:
    """The example inputs as they are, batches of 1, 2 and 7 of them, and the first or last half of a sequence.

    A row beyond the given ones is a given one rolled along its last axis: new, yet made of valid values. Masks are not
    rolled, so that no query loses the last key that it may attend to. Nothing is drawn at random. A form that ``model``
    itself cannot run is left out.
    """
    tensors = inputs.tensors()
    batch = next((tensor.shape[0] for tensor in tensors.values() if tensor.dim()), 0)
    if not batch:
        return [inputs]
    batched = {name: tensor for name, tensor in tensors.items() if tensor.dim() and tensor.shape[0] == batch}
    forms = [
        inputs.with_tensors({name: _rows(tensor, size, roll="mask" not in name) for name, tensor in batched.items()})
        for size in BATCHES
        if size != batch
    ]
    shorter = _shorter(batched)
    if shorter:
        forms.append(inputs.with_tensors(shorter))
    return [inputs, *(form for form in forms if _runs(model, form))]


def _rows(tensor: Tensor, size: int, *, roll: bool) -> Tensor:
    given = tensor.shape[0]
    rows = [tensor[i % given] for i in range(size)]
    return torch.stack([row.roll(i // given, dims=-1) if roll and row.dim() else row for i, row in enumerate(rows)])


def _shorter(batched: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half of the sequence, if all tensors are whole numbers [B, L]; empty if not, or if a mask would be all zero."""
    lengths = {tensor.shape[1:] for tensor in batched.values()}
    if len(lengths) != 1 or any(tensor.is_floating_point() or tensor.is_complex() for tensor in batched.values()):
        return {}
    (length,) = lengths
    if len(length) != 1 or length[0] < 2:
        return {}
    half = length[0] // 2
    for part in (slice(0, half), slice(length[0] - half, length[0])):
        cut = {name: tensor[:, part] for name, tensor in batched.items()}
        if all(bool(tensor.any(dim=1).all()) for name, tensor in cut.items() if "mask" in name):
            return cut
    return {}


def _runs(model: nn.Module, inputs: ModelInputs) -> bool:
    try:
        with evaluating(model):
            inputs.call(model)
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError, AttributeError):
        return False  # a shape that this model does not take: a fixed batch size, say
    return True
