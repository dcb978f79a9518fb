"""The 2-D view ``[out, in]`` of a weight that patterns act on.

| module | weight | view |
|---|---|---|
| Linear | ``[out, in]`` | as it is |
| Conv1d, 2d, 3d | ``[out, in / groups, *kernel]`` | ``[out, kernel positions * in / groups]``, channel innermost |
| transformers' Conv1D | ``[in, out]`` | its transpose, so that 4x1 always means 4 outputs by 1 input |
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

Kind = Literal["linear", "conv", "hf_conv1d"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class WeightView:
    """A layer whose weight has a 2-D view.

    Args:
        name: dotted name within the model.
        module: the layer.
        kind: how its weight is stored.
    """

    name: str
    module: nn.Module
    kind: Kind

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "WeightView | None":
        """The view of a module's weight; None if it is no Linear, Conv or Conv1D with a weight of its own."""
        kind = kind_of(module)
        if kind is None or own_weight(module) is None:
            return None
        return cls(name, module, kind)

    @property
    def parameter(self) -> nn.Parameter:
        """The weight."""
        parameter = own_weight(self.module)
        assert parameter is not None
        return parameter

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight as stored."""
        return tuple(self.parameter.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """``(R, C)`` of the view."""
        return view_shape(self.kind, self.weight_shape)

    @property
    def elements(self) -> int:
        """``R * C``."""
        return self.parameter.numel()

    @property
    def is_view(self) -> bool:
        """Whether :meth:`to_2d` shares memory with the weight (a convolution's does with one kernel position)."""
        weight = self.parameter.detach()
        return self.to_2d(weight).data_ptr() == weight.data_ptr()

    def to_2d(self, tensor: Tensor) -> Tensor:
        """A tensor in the weight's layout as ``[R, C]``: a view where strides allow it, else a copy."""
        return to_2d(tensor, self.kind)

    def from_2d(self, tensor: Tensor) -> Tensor:
        """An ``[R, C]`` tensor in the weight's layout: the inverse of :meth:`to_2d`."""
        return from_2d(tensor, self.kind, self.weight_shape)


def own_weight(module: nn.Module) -> nn.Parameter | None:
    """A module's own parameter ``weight``; None if it has none, or computes it from others (a parametrization)."""
    parameters: dict[str, nn.Parameter | None] = vars(module)["_parameters"]  # at every step: no walk over them
    return parameters.get("weight")


def kind_of(module: nn.Module) -> Kind | None:
    """How a module stores its weight; None if patterns do not know it."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _CONVOLUTIONS):
        return "conv"
    if any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__):
        return "hf_conv1d"
    return None


def view_shape(kind: Kind, weight_shape: tuple[int, ...]) -> tuple[int, int]:
    """``(R, C)`` of the view of a weight of that shape."""
    if kind == "hf_conv1d":
        return weight_shape[1], weight_shape[0]
    return weight_shape[0], math.prod(weight_shape[1:])


def to_2d(tensor: Tensor, kind: Kind) -> Tensor:
    """A tensor in the layout of a weight of that kind as ``[R, C]``."""
    if kind == "hf_conv1d":
        return tensor.t()
    return tensor.movedim(1, -1).flatten(1) if kind == "conv" else tensor


def from_2d(tensor: Tensor, kind: Kind, weight_shape: tuple[int, ...]) -> Tensor:
    """An ``[R, C]`` tensor in the layout of a weight of that kind and shape."""
    if kind == "hf_conv1d":
        return tensor.t()
    if kind == "linear":
        return tensor
    out_channels, in_channels, *kernel = weight_shape
    return tensor.reshape(out_channels, *kernel, in_channels).movedim(-1, 1)
