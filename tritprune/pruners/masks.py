"""Masks of a model's layers: what stays, by layer name; packed to one bit a unit on disk."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tritprune.errors import CheckpointError, MaskMismatchError, RunFolderError
from tritprune.kernels import UnitGrid, apply_masks_
from tritprune.patterns import Block, Kind, WeightView, from_2d, plain_modules, view_shape

FORMAT = "tritprune masks 1"


@dataclass(frozen=True, eq=False)
class LayerMask:
    """What stays of one layer.

    Args:
        mask: bool ``[rows, cols]`` over blocks of the weight view, True = keep.
        block: ``(n, m)``: outputs by inputs of a block.
        kind: how the layer stores its weight.
        weight_shape: the weight's own shape.
    """

    mask: Tensor
    block: Block
    kind: Kind
    weight_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """``(R, C)`` of the weight view."""
        return view_shape(self.kind, self.weight_shape)

    @property
    def grid(self) -> UnitGrid:
        """The blocks of the weight view."""
        return UnitGrid.of_blocks(self.shape, self.block)

    def element_mask(self) -> Tensor:
        """bool, True = keep, of the weight's own shape and layout."""
        (rows, columns), (n, m) = self.shape, self.block
        grid = self.grid
        row = torch.arange(rows, device=self.mask.device).div(n, rounding_mode="floor").clamp_(max=grid.rows - 1)
        column = torch.arange(columns, device=self.mask.device).div(m, rounding_mode="floor").clamp_(max=grid.cols - 1)
        return from_2d(self.mask[row][:, column], self.kind, self.weight_shape)

    def zeros(self) -> int:
        """How many elements are pruned."""
        return int(self.grid.sizes(self.mask.device).masked_fill(self.mask, 0).sum())

    def describe(self) -> dict[str, Any]:
        """All but the mask, in plain Python."""
        return {"block": list(self.block), "kind": self.kind, "weight_shape": list(self.weight_shape)}


class MaskSet(Mapping[str, LayerMask]):
    """Masks by dotted layer name, in registration order.

    Args:
        layers: the masks.
    """

    def __init__(self, layers: Mapping[str, LayerMask]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> LayerMask:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def element_mask(self, name: str) -> Tensor:
        """The mask of a layer's weight in its own shape: bool, True = keep.

        Raises:
            KeyError: no such layer.
        """
        return self[name].element_mask()

    def digest(self) -> str:
        """SHA-256 over names, blocks, shapes and masks: equal masks have equal digests on every device."""
        digest = hashlib.sha256()
        for name, layer in self.items():
            digest.update(json.dumps([name, layer.describe()], sort_keys=True).encode())
            digest.update(pack(layer.mask).numpy().tobytes())
        return digest.hexdigest()

    def apply_(self, model: nn.Module) -> None:
        """Zero what is pruned in a model's weights, in place.

        Raises:
            MaskMismatchError: a layer that the model lacks, or whose weight has another shape.
        """
        modules = dict(plain_modules(model, remove_duplicate=False))
        views: list[WeightView] = []
        for name, layer in self.items():
            view = WeightView.of(name, modules[name]) if name in modules else None
            if view is None or view.weight_shape != layer.weight_shape:
                found = "no such layer" if view is None else f"a weight of shape {list(view.weight_shape)}"
                raise MaskMismatchError(
                    f"the mask of {name} is for a weight of shape {list(layer.weight_shape)}; the model has {found}"
                )
            views.append(view)
        layers = list(self.values())
        apply_to_weights_(views, [layer.mask for layer in layers], [layer.block for layer in layers])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks, one bit a unit, in one move: the file is whole or not there.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        from safetensors import SafetensorError  # here: pruning itself needs no more than torch
        from safetensors.torch import save_file

        path = Path(path)
        described = {name: layer.describe() for name, layer in self.items()}
        # One key only: safetensors does not keep an order of several, and equal masks shall give equal files.
        metadata = {"tritprune": json.dumps({"format": FORMAT, "layers": described})}
        try:
            handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            os.close(handle)
            try:
                save_file({name: pack(layer.mask) for name, layer in self.items()}, temporary, metadata=metadata)
                Path(temporary).chmod(0o644)  # a temporary file is one that only its owner reads
                os.replace(temporary, path)  # noqa: PTH105 (a move within the folder)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise RunFolderError(f"masks cannot be written to {path}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MaskSet":
        """Read what :meth:`save` wrote, onto the CPU.

        Raises:
            CheckpointError: the file is missing, damaged or something else.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"there are no masks at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                content = json.loads((file.metadata() or {}).get("tritprune", "{}"))
                if content.get("format") != FORMAT:
                    raise CheckpointError(f"{path} does not hold masks: its format is {content.get('format')!r}")
                bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            order = content["layers"]
            return cls({name: _layer(bits[name], order[name]) for name in order})
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"the masks at {path} are damaged: {error}") from error


def apply_to_weights_(views: list[WeightView], masks: list[Tensor], blocks: list[Block]) -> None:
    """Zero what is pruned in the weights of ``views``, in place and in the same storage."""
    apply_to_tensors_(views, [view.parameter.detach() for view in views], masks, blocks)


def apply_to_tensors_(views: list[WeightView], tensors: list[Tensor], masks: list[Tensor], blocks: list[Block]) -> None:
    """Zero what is pruned in tensors that have the layout of the views' weights, in place."""
    flat = [view.to_2d(tensor) for view, tensor in zip(views, tensors, strict=True)]
    apply_masks_(flat, masks, blocks)
    for view, tensor, part in zip(views, tensors, flat, strict=True):
        if part.data_ptr() != tensor.data_ptr():  # a convolution whose view is a copy
            tensor.copy_(view.from_2d(part))


def pack(mask: Tensor) -> Tensor:
    """Bits of a bool tensor of any shape: uint8 ``[ceil(n / 8)]`` on the CPU, row-major, first in the highest bit."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`pack`.

    Raises:
        ValueError: fewer or more bits than the shape needs.
    """
    units = shape[0] * shape[1]
    if bits.dtype != torch.uint8 or bits.numel() != -(-units // 8):
        raise ValueError(f"{bits.numel()} bytes do not hold {units} bits")
    flat = np.unpackbits(bits.cpu().numpy(), count=units)
    return torch.from_numpy(flat.astype(bool)).reshape(shape)


def _layer(bits: Tensor, described: Mapping[str, Any]) -> LayerMask:
    n, m = described["block"]
    shape = tuple(described["weight_shape"])
    empty = LayerMask(bits, (n, m), described["kind"], shape)
    return LayerMask(unpack(bits, empty.grid.shape), (n, m), described["kind"], shape)
