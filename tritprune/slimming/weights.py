"""The model's parameters while units are taken away on paper: which rows are zero, what was folded where."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from tritprune.slimming.account import named_tensors
from tritprune.slimming.forms import Array, Form, Group
from tritprune.slimming.nodes import Graph


@dataclass
class Weights:
    """Atoms for every dimension of every parameter that a graph reads, and what is left of them.

    Attributes:
        first: the first atom of each (parameter, dimension).
        size: the number of atoms.
        gone: bool per atom, those that were taken away.
        folded: biases that constants were folded into, in float64; new ones among them.
    """

    model: nn.Module
    graph: Graph
    first: dict[tuple[str, int], int] = field(default_factory=dict)
    size: int = 0
    folded: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tensors = {
            name: t.detach() for name, t in named_tensors(self.model).items() if name in self.graph.parameters
        }
        for name, tensor in self.tensors.items():
            for dim, length in enumerate(tensor.shape):
                self.first[name, dim] = self.size
                self.size += length
        self._own = self.size
        self.gone = np.zeros(self.size, bool)
        self._parameters = dict(self.model.named_parameters())
        self._nonzero: dict[str, Array] = {}
        self._zeros: dict[tuple[str, int], Array] = {}
        self._places: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in self.model.modules():
            for key, tensor in module._parameters.items():
                if tensor is not None:
                    self._places.setdefault(id(tensor), []).append((module, key))

    def atoms(self, name: str, dim: int) -> Array:
        """The atoms of one dimension of a parameter."""
        start = self.first[name, dim]
        return np.arange(start, start + self.tensors[name].shape[dim])

    def new_atoms(self, count: int) -> Array:
        """Atoms of something that is no parameter."""
        self.size += count
        return np.arange(self.size - count, self.size)

    def start_over(self) -> None:
        """Before a walk: only parameters have atoms."""
        self.size = self._own

    def form(self, name: str) -> Form:
        """A parameter as a tensor of its own atoms; a vector's numbers are known."""
        tensor = self.tensors[name]
        shape = tuple(tensor.shape)
        groups = [
            Group.of((dim,), self.atoms(name, dim)) for dim, size in enumerate(shape) if size > 1 or len(shape) == 1
        ]
        if len(groups) == 1 and tensor.is_floating_point():
            values = self.vector(name)
            groups = [groups[0].with_constants(np.ones(values.shape, bool), values)]
        return Form(shape, tuple(groups), weight=(name, tuple(range(len(shape)))))

    def vector(self, name: str) -> Array:
        """A parameter's numbers as they are now, flat, in float64."""
        now = self.folded[name] if name in self.folded else self.tensors[name].double()
        return now.reshape(-1).cpu().numpy()

    def bias_of(self, weight: str, bias: str | None) -> Array | None:
        """What is added to what a weight makes: its bias, also one that is still to be made; None if there is none."""
        name = bias or self.bias_place(weight)
        return self.vector(name) if name is not None and (name in self.tensors or name in self.folded) else None

    def zeros(self, name: str, dim: int) -> Array:
        """Bool per index: whether everything that is left of this row, column, ... is exactly zero."""
        key = (name, dim)
        if key not in self._zeros:
            if name not in self._nonzero:
                self._nonzero[name] = (self.tensors[name] != 0).cpu().numpy().view(np.uint8)
            left = self._nonzero[name]
            others = tuple(other for other in range(left.ndim) if other != dim)
            self._zeros[key] = np.bitwise_or.reduce(left, axis=others) == 0 if others else left == 0
        return self._zeros[key]

    def gone_of(self, name: str, dim: int) -> Array:
        """Bool per index of this dimension: whether it was taken away."""
        start = self.first[name, dim]
        return self.gone[start : start + self.tensors[name].shape[dim]]

    def take_away(self, atoms: Array) -> None:
        """Mark atoms as gone; what is left of the parameters that they cross may be zero now."""
        self.gone[atoms] = True
        for name, dim in self.first:
            gone = self.gone_of(name, dim)
            if gone.any() and name in self._nonzero:
                np.moveaxis(self._nonzero[name], dim, 0)[gone] = 0
                for other in range(self.tensors[name].dim()):
                    self._zeros.pop((name, other), None)

    def bias_place(self, weight: str) -> str | None:
        """The name of the bias that can be made for a weight whose layer has none; None if it cannot."""
        places = self._places.get(id(self._parameters.get(weight)), [])
        if len(places) != 1:
            return None
        module, key = places[0]
        if key != "weight" or "bias" not in module._parameters or module._parameters["bias"] is not None:
            return None
        return f"{weight.removesuffix('weight')}bias"

    def rows(self, bias: str) -> int:
        """The dimension of its weight that a made bias belongs to."""
        module = self._places[id(self._parameters[f"{bias.removesuffix('bias')}weight"])][0][0]
        turned = type(module).__name__ == "Conv1D" or getattr(module, "transposed", False)
        return 1 if turned else 0

    def fold(self, bias: str, amount: Tensor) -> None:
        """Add to a bias; one that is not there yet is made."""
        start = self.folded.get(bias)
        if start is None:
            start = self.tensors[bias].double() if bias in self.tensors else torch.zeros_like(amount)
        self.folded[bias] = start + amount.reshape(start.shape)
