"""Mask tuning: what is left of a layer is scaled so that its outputs come near those of the dense model.

A layer with columns in units adds up ``y = sum_u m_u W_u h_u``, one term a unit. With the masks ``m`` of the units that
stay as unknowns, inputs ``h`` of the pruned and ``h'`` of the dense model, and all positions of all batches:

    minimise over m   sum_t |sum_u m_u W_u h_u(t) - W h'(t)|^2 + damping |m - 1|^2

Normal equations in fp64, ``(A + damping I) m = c + damping``, with ``A = sum of blocks of (H'H) * (W'W)`` and
``c = sum of blocks of (H'H_dense) * (W'W)``. As ``m = 1`` has no penalty, the fit is never farther from the dense
outputs than the layer was. Layers are fitted in the order in which they run, each behind those fitted already.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError
from tritprune.patterns import Site, WeightView, plain_modules

DAMPING = 1e-3
"""Over the mean of A's diagonal."""


@dataclass(frozen=True)
class Columns:
    """A layer whose units are whole columns.

    Args:
        view: the layer.
        width: columns of a unit; the last one may have fewer.
        keep: bool ``[units]``.
    """

    view: WeightView
    width: int
    keep: Tensor


def columns_of(site: Site, place: int, keep: Tensor, label: str) -> Columns:
    """The columns that the units of a site are in one of its views.

    Raises:
        ConfigError: its units are no whole columns of a linear.
    """
    view, (n, m) = site.views[place], site.blocks[place]
    if view.kind == "conv" or n < view.shape[0]:
        raise ConfigError(
            f"tuning scales what a linear adds up, whole columns: {view.name} has units of pattern {label} "
            f"({min(n, view.shape[0])}x{m} of a {view.kind}); use channelx1 or heads, or leave tune out"
        )
    return Columns(view, m, keep.reshape(-1))


@torch.no_grad()
def tune_(
    model: nn.Module,
    dense: nn.Module,
    layers: Sequence[Columns],
    batches: Sequence[Any],
    forward: Callable[[nn.Module, Any], object],
) -> dict[str, tuple[float, float]]:
    """Scale the kept columns of every layer, in place.

    Args:
        model: pruned; its weights change.
        dense: a copy of it from before.
        layers: what to fit.
        batches: calibration batches.
        forward: runs a model on a batch.

    Returns:
        By layer, ``|y - y_dense|^2 / |y_dense|^2`` over all batches, before and after its fit.
    """
    found: dict[str, tuple[float, float]] = {}
    by_name = {layer.view.name: layer for layer in layers}
    for name in _in_order(dense, list(by_name), batches[0], forward):
        layer = by_name[name]
        weight = layer.view.to_2d(_layer(dense, name).get_parameter("weight")).double()  # [R, C]
        products = weight.t() @ weight
        own, cross, total = torch.zeros_like(products), torch.zeros_like(products), 0.0
        for batch in batches:
            ours, theirs = (_inputs(each, name, batch, forward) for each in (model, dense))  # [T, C]
            own += ours.t() @ ours
            cross += ours.t() @ theirs
            total += float((theirs @ weight.t()).square().sum())
        a, c = _by_unit(own * products, layer.width), _by_unit(cross * products, layer.width).sum(1)
        keep = layer.keep.to(a.device)
        if not keep.any() or total == 0:
            continue
        a, c = a[keep][:, keep], c[keep]
        ones = torch.ones_like(c)
        damping = DAMPING * a.diagonal().mean()
        fitted = ones
        if damping > 0:
            fitted = torch.linalg.solve(a + damping * torch.eye(len(c), dtype=a.dtype, device=a.device), c + damping)
        before, after = (float(m @ a @ m - 2 * m @ c) + total for m in (ones, fitted))
        scale = torch.zeros(len(keep), dtype=a.dtype, device=a.device).masked_scatter(keep, fitted)
        parameter = layer.view.to_2d(layer.view.parameter)
        parameter.mul_(scale.repeat_interleave(layer.width)[: parameter.shape[1]].to(parameter.dtype))
        found[name] = before / total, after / total
    return found


def _by_unit(values: Tensor, width: int) -> Tensor:
    """Sums over blocks: ``[C, C] -> [units, units]``."""
    units = -(-values.shape[0] // width)
    missing = units * width - values.shape[0]
    padded = nn.functional.pad(values, (0, missing, 0, missing))
    return padded.reshape(units, width, units, width).sum((1, 3))


def _in_order(
    model: nn.Module, names: Sequence[str], batch: Any, forward: Callable[[nn.Module, Any], object]
) -> list[str]:
    """The layers in the order in which they first run; those that never run are left out."""
    order: list[str] = []
    with _watching(model, names, lambda name, _: order.append(name)):
        forward(model, batch)
    return list(dict.fromkeys(order))


def _inputs(model: nn.Module, name: str, batch: Any, forward: Callable[[nn.Module, Any], object]) -> Tensor:
    """What a layer reads, all positions: fp64 ``[T, C]``."""
    seen: list[Tensor] = []
    with _watching(model, [name], lambda _, read: seen.append(read.flatten(0, -2).double())):
        forward(model, batch)
    return torch.cat(seen)


def _layer(model: nn.Module, name: str) -> nn.Module:
    """The layer with this name in the plain model, whatever is wrapped around it."""
    return dict(plain_modules(model, remove_duplicate=False))[name]


@contextmanager
def _watching(model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def watch(name: str) -> Any:
        return _layer(model, name).register_forward_pre_hook(lambda _, inputs: see(name, inputs[0].detach()))

    handles = [watch(name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
