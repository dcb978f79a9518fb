"""What a pruner tells: events of mask updates, and sparsity with its denominator."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.kernels import mask_statistics
from tritprune.patterns import Site, kind_of, plain_modules


@dataclass(frozen=True)
class PrunedLayer:
    """A layer that is pruned.

    Args:
        name: dotted name.
        group: the group it belongs to.
        pattern: the group's pattern, ``4x1``.
        elements: weights.
        unit: what a unit is.
        units: how many units it has (for heads: that it shares with the other linears of its attention).
    """

    name: str
    group: str
    pattern: str
    elements: int
    unit: str
    units: int


@dataclass(frozen=True)
class LayerCount:
    """One layer after a mask update.

    Args:
        units: units of the layer.
        kept: units that stay.
        changed: units that went or came back at this update.
        elements: weights of the layer.
        zeros: weights that the mask prunes.
    """

    units: int
    kept: int
    changed: int
    elements: int
    zeros: int


@dataclass(frozen=True)
class PruneEvent:
    """One mask update.

    Args:
        step: optimizer steps done.
        target: the sparsity asked for, over all prunable layers.
        sparsity: the sparsity of the masks, over all prunable layers.
        flip_rate: changed units / units.
        layers: counts by layer name.
        skipped_gradients: non-finite gradient elements left out of scores since the last update.
        warnings: what deserves a look: layers without a gradient, layers that nearly vanish.
    """

    step: int
    target: float
    sparsity: float
    flip_rate: float
    layers: dict[str, LayerCount]
    skipped_gradients: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class SparsityCount:
    """Zeros among weights.

    Args:
        zeros: how many are zero.
        total: the denominator.
    """

    zeros: int
    total: int

    @property
    def sparsity(self) -> float:
        """``zeros / total``, in [0, 1]; 0 of nothing."""
        return self.zeros / self.total if self.total else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """Zeros of a model, counted in the weights themselves, over three denominators.

    Args:
        prunable: zeros and weights of the layers that are pruned.
        linear_conv: zeros and weights of all Linear, Conv and Conv1D layers; tied weights count once.
        parameters: zeros of those layers over all parameters of the model.
    """

    prunable: SparsityCount
    linear_conv: SparsityCount
    parameters: SparsityCount


def sparsity_of(model: nn.Module, layers: Iterable[str]) -> SparsityReport:
    """Count the zeros of any model: dense, masked or slim.

    Args:
        model: whose weights are counted.
        layers: names of the prunable layers; those that the model does not have count nothing.
    """
    modules = dict(plain_modules(model, remove_duplicate=False))
    chosen = [modules[name] for name in layers if name in modules]
    prunable = _weights(chosen)
    linear_conv = _weights(module for module in modules.values() if kind_of(module) is not None)
    zeros = _zeros(linear_conv)
    return SparsityReport(
        prunable=SparsityCount(_zeros(prunable), sum(weight.numel() for weight in prunable)),
        linear_conv=SparsityCount(zeros, sum(weight.numel() for weight in linear_conv)),
        parameters=SparsityCount(zeros, sum(parameter.numel() for parameter in model.parameters())),
    )


def layer_rows(
    layers: Sequence[PrunedLayer], shapes: Mapping[str, tuple[int, int]], counts: Mapping[str, LayerCount]
) -> list[dict[str, Any]]:
    """One row a layer: what it is, and how much of it the mask prunes.

    Args:
        layers: in order.
        shapes: ``(R, C)`` of the weight views, by layer name.
        counts: by layer name.
    """
    return [
        {
            "name": layer.name,
            "group": layer.group,
            "pattern": layer.pattern,
            "shape": list(shapes[layer.name]),
            "elements": layer.elements,
            "unit": layer.unit,
            "units": layer.units,
            "kept_units": counts[layer.name].kept,
            "zeros": counts[layer.name].zeros,
            "sparsity": counts[layer.name].zeros / layer.elements,
        }
        for layer in layers
    ]


def measure(
    sites: Sequence[Site], keep: Sequence[Tensor], before: Sequence[Tensor], masks: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Count units and pruned blocks of many sites on their device: int64 ``[n, 2]``, for :func:`read_counts`.

    Args:
        sites: where.
        keep: units that stay, per site.
        before: units that stayed before, per site.
        masks: per site, one mask per view.
    """
    new, old = list(keep), list(before)
    for site, unit_mask, layer_masks in zip(sites, keep, masks, strict=True):
        for view, block, mask in zip(site.views, site.blocks, layer_masks, strict=True):
            regions = _regions(mask, view.shape, block)
            new += regions if mask is not unit_mask else regions[1:]
            old += regions if mask is not unit_mask else regions[1:]
    return mask_statistics(new, old)


def read_counts(
    sites: Sequence[Site], masks: Sequence[Sequence[Tensor]], keep: Sequence[Tensor], counts: Sequence[Sequence[int]]
) -> dict[str, LayerCount]:
    """The counts of every layer from the numbers of :func:`measure`, once they are on the host."""
    layers: dict[str, LayerCount] = {}
    rest = iter(counts[len(sites) :])
    for site, unit_mask, layer_masks, (kept, changed) in zip(sites, keep, masks, counts, strict=False):
        for view, (n, m), mask in zip(site.views, site.blocks, layer_masks, strict=True):
            regions = _regions(mask, view.shape, (n, m))
            kept_in = [kept if mask is unit_mask else next(rest)[0]] + [next(rest)[0] for _ in regions[1:]]
            gone = [region.numel() - count for region, count in zip(regions, kept_in, strict=True)]
            zeros = n * m * gone[0]
            if len(gone) > 1:  # the last row and column of blocks may be smaller
                height = (view.shape[0] - 1) % n + 1 - n
                width = (view.shape[1] - 1) % m + 1 - m
                zeros += height * m * gone[1] + n * width * gone[2] + height * width * gone[3]
            layers[view.name] = LayerCount(site.grid.units, kept, changed, view.elements, zeros)
    return layers


def _regions(mask: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> list[Tensor]:
    """A mask, and where the block does not divide the view its last row, last column and corner."""
    if shape[0] % block[0] == 0 and shape[1] % block[1] == 0:
        return [mask]
    return [mask, mask[-1:].contiguous(), mask[:, -1:].contiguous(), mask[-1:, -1:].contiguous()]


def _weights(modules: Iterable[nn.Module]) -> list[Tensor]:
    weights = (getattr(module, "weight", None) for module in modules)
    return list({id(weight): weight for weight in weights if isinstance(weight, Tensor)}.values())


def _zeros(weights: Sequence[Tensor]) -> int:
    if not weights:
        return 0
    return int(torch.stack([weight.numel() - torch.count_nonzero(weight.detach()) for weight in weights]).sum())
