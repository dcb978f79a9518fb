"""The guard: do the weights hold what the masks say, and do the masks hold what the last update counted?

Right after the masks are applied that is true by construction. It breaks in between: a checkpoint is loaded under the
pruner, an average of weights is copied back, somebody writes to a weight. So with ``guard="on"`` the pruner looks
before each optimizer step, at the very weights that the forward pass has just used. On a GPU the counts stay on the
device, and are read when masks are updated or :meth:`Pruner.verify` is called; the message has the step at which it
began.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritprune.errors import MaskMismatchError, MaskViolationError
from tritprune.kernels import count_violations
from tritprune.patterns import WeightView, plain_modules
from tritprune.pruners.masks import LayerMask
from tritprune.pruners.reports import LayerCount


@dataclass(frozen=True)
class Verification:
    """What a check found.

    Args:
        step: optimizer steps done.
        layers: layers looked at.
        zeros: weights that the masks prune, all of them zero.
    """

    step: int
    layers: int
    zeros: int

    def __str__(self) -> str:
        return f"{self.layers} layers hold their masks at step {self.step}: {self.zeros:,} pruned weights are zero"


class Watch:
    """Counts violations at every step without reading them back.

    Args:
        layers: how many layers are watched.
        device: where they are.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        self.counts = torch.zeros(layers, dtype=torch.int64, device=device)
        self.since = torch.full((layers,), -1, dtype=torch.int64, device=device)

    def look(
        self, views: Sequence[WeightView], masks: Sequence[Tensor], blocks: Sequence[tuple[int, int]], step: int
    ) -> None:
        """Add what is wrong now; the first step of each layer's trouble is kept."""
        found = violations(views, masks, blocks).to(self.counts.device)
        self.since = torch.where((self.counts == 0) & (found > 0), step, self.since)
        self.counts = torch.maximum(self.counts, found)

    def report(self, views: Sequence[WeightView]) -> None:
        """Read the counts back.

        Raises:
            MaskViolationError: some layer broke its mask.
        """
        counts, since = torch.stack([self.counts, self.since]).tolist()
        refuse(
            {view.name: n for view, n in zip(views, counts, strict=True)}, min((s for s in since if s >= 0), default=0)
        )


def violations(views: Sequence[WeightView], masks: Sequence[Tensor], blocks: Sequence[tuple[int, int]]) -> Tensor:
    """Weights that should be zero and are not, per layer: int64 ``[T]`` on their device."""
    return count_violations([view.to_2d(view.parameter.detach()) for view in views], list(masks), list(blocks))


def refuse(counts: Mapping[str, int], step: int) -> None:
    """Raise if any layer has a weight that should be zero and is not.

    Raises:
        MaskViolationError: with layers, counts and step.
    """
    broken = [f"{name} ({count:,} weights)" for name, count in counts.items() if count]
    if broken:
        raise MaskViolationError(
            f"weights that are pruned are not zero at step {step}: {', '.join(broken[:5])}"
            + (f" and {len(broken) - 5} more layers" if len(broken) > 5 else "")
            + "; something wrote to them after the masks were applied (a loaded checkpoint, averaged weights); "
            "apply_masks_() zeroes them again"
        )


def check_counts(counted: Mapping[str, LayerCount], recorded: Mapping[str, LayerCount], step: int) -> None:
    """Hold the masks against what the last update counted.

    Raises:
        MaskViolationError: a mask was changed since, with both counts.
    """
    for name, count in counted.items():
        if (count.kept, count.zeros) != (recorded[name].kept, recorded[name].zeros):
            raise MaskViolationError(
                f"the mask of {name} was changed behind the pruner's back: it prunes {count.zeros:,} weights at step "
                f"{step}, the last update left {recorded[name].zeros:,}"
            )


def check_pattern(broken: Mapping[str, int], label: str, step: int) -> None:
    """Refuse masks that are not of their pattern.

    Raises:
        MaskViolationError: with layers and the number of units that are neither whole nor pruned as the pattern says.
    """
    named = [f"{name} ({count:,} units)" for name, count in broken.items() if count]
    if named:
        raise MaskViolationError(f"masks are not of pattern {label} at step {step}: {', '.join(named[:5])}")


def check_other(model: nn.Module, masks: Mapping[str, LayerMask], step: int) -> None:
    """Hold another model, an average of the weights or a loaded one, against the masks.

    Raises:
        MaskMismatchError: it lacks a layer, or has it in another shape.
        MaskViolationError: a pruned weight of it is not zero.
    """
    modules = dict(plain_modules(model, remove_duplicate=False))
    views: list[WeightView] = []
    for name, mask in masks.items():
        view = WeightView.of(name, modules[name]) if name in modules else None
        if view is None or view.weight_shape != mask.weight_shape:
            found = "no such layer" if view is None else f"a weight of shape {list(view.weight_shape)}"
            raise MaskMismatchError(f"{name} has a mask for shape {list(mask.weight_shape)}; that model has {found}")
        views.append(view)
    kept = [mask.mask.to(view.parameter.device) for view, mask in zip(views, masks.values(), strict=True)]
    counts = violations(views, kept, [mask.block for mask in masks.values()]).tolist()
    refuse({view.name: count for view, count in zip(views, counts, strict=True)}, step)
