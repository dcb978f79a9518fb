"""The guard: do the weights hold what the masks say, and do the masks hold what the last update counted?

Right after the masks are applied that is true by construction. It breaks in between: a checkpoint is loaded under the
pruner, an average of weights is copied back, somebody writes to a weight or to a mask. So with ``guard="on"`` the
pruner looks before each optimizer step, at the very weights that the forward pass has just used, and at the models
that :meth:`Pruner.watch` was given. On the CPU a violation is told at once. On a GPU counts stay on the device; they
are copied to the host beside the work and read at a later step, when they are there, without waiting; the message has
the step at which it began.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError, MaskMismatchError, MaskViolationError
from tritprune.kernels import count_violations
from tritprune.patterns import Block, WeightView, plain_modules
from tritprune.pruners.group import LayerGroup
from tritprune.pruners.masks import LayerMask
from tritprune.pruners.reading import start_reading
from tritprune.pruners.reports import LayerCount

MODES = ("off", "on")


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


class Guard:
    """The guard of a pruner.

    Args:
        mode: ``on`` or ``off``.
        groups: the pruner's layer groups.

    Raises:
        ConfigError: another mode.
    """

    def __init__(self, mode: str, groups: Sequence[LayerGroup]) -> None:
        if mode not in MODES:
            raise ConfigError(f"guard is one of {', '.join(MODES)}, got '{mode}'")
        self.on = mode == "on"
        self._watches = [(group, [Watch(group.views)]) for group in groups] if self.on else []

    def watch(self, model: nn.Module, masks: Mapping[str, LayerMask]) -> None:
        """Look at another model, too; see :meth:`Pruner.watch`."""
        if not self.on:
            raise ConfigError(
                "watch() needs a pruner with guard='on'; verify(model) checks at once, whatever the guard"
            )
        views = {view.name: view for view in views_of(model, masks)}
        for group, watches in self._watches:
            own = [views[view.name] for view in group.views]
            if any(view.parameter.device != group.device for view in own):
                raise ConfigError(f"the model to watch is not where the pruned one is, on {group.device}")
            watches.append(Watch(own, f" of the watched {type(model).__name__}"))

    @torch.no_grad()
    def look(self, held: Callable[[LayerGroup], tuple[list[Tensor], list[Block]]], step: int) -> None:
        """A glance at the weights that the forward pass has used.

        Args:
            held: the masks that a group's weights must hold, and their blocks; none while nothing is pruned.
            step: optimizer steps done.

        Raises:
            MaskViolationError: something is wrong now, or was at an earlier look.
        """
        for group, watches in self._watches:
            group.follow_device()
            check_unwritten(group.altered(), step)
            masks, blocks = held(group)
            for watch in watches if masks else ():
                watch.look(masks, blocks, step)

    def report(self) -> None:
        """Read back now what the looks have seen.

        Raises:
            MaskViolationError: some layer broke its mask.
        """
        for _, watches in self._watches:
            for watch in watches:
                watch.report()


class Watch:
    """What the guard has seen of some layers: looked at every step, read back without waiting.

    Args:
        views: the layers.
        whose: for messages, whose layers they are; empty: the pruned model's.
        deferred: read what a look has seen at a later one; None: where the weights are not on the CPU.
    """

    def __init__(self, views: Sequence[WeightView], whose: str = "", *, deferred: bool | None = None) -> None:
        self.views, self._whose, self._deferred = views, whose, deferred
        self._seen: Tensor | None = None  # [2, T] on the device: most violations at one look, step of the first
        self._read: Tensor | None = None  # [2, T] on the host: a copy of it, on its way
        self._arrived: torch.cuda.Event | None = None

    def look(self, masks: Sequence[Tensor], blocks: Sequence[tuple[int, int]], step: int) -> None:
        """Count what is wrong now.

        Raises:
            MaskViolationError: something is, or was at an earlier look.
        """
        found = violations(self.views, masks, blocks)
        if not (found.device.type != "cpu" if self._deferred is None else self._deferred):
            if found.any():
                self._refuse(found.tolist(), step)
            return
        arrived = self._arrived is None or self._arrived.query()
        if self._read is not None and arrived:
            self._tell(self._read)
        if self._seen is None or self._seen.device != found.device:
            self._seen = torch.stack([torch.zeros_like(found), torch.full_like(found, -1)])
        counts, since = self._seen
        since = torch.where((counts == 0) & (found > 0), step, since)
        self._seen = torch.stack([torch.maximum(counts, found), since])
        if not arrived:  # a copy that is on its way is read before the next one sets out
            return
        if found.is_cuda:
            self._read, self._arrived = start_reading(self._seen)
        else:
            self._read = self._seen.cpu()

    def report(self) -> None:
        """Read everything back now.

        Raises:
            MaskViolationError: some layer broke its mask.
        """
        if self._seen is not None:
            self._tell(self._seen)

    def _tell(self, seen: Tensor) -> None:
        counts, since = seen.tolist()
        if any(counts):
            self._seen = self._read = None  # told once
            self._refuse(counts, min(step for step in since if step >= 0))

    def _refuse(self, counts: Sequence[int], step: int) -> None:
        names = [f"{view.name}{self._whose}" for view in self.views]
        refuse(dict(zip(names, counts, strict=True)), step)


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
            "pruner.apply_masks_() zeroes them again, pruner.masks.apply_(model) those of another model"
        )


def check_group(group: LayerGroup, recorded: Mapping[str, LayerCount], step: int) -> None:
    """Weights, counts and pattern of a group.

    Args:
        group: whose masks are looked at.
        recorded: what the last update counted, by layer name.
        step: optimizer steps done.

    Raises:
        MaskViolationError: one does not hold.
    """
    counts = violations(group.views, group.flat_masks, group.blocks).tolist()
    refuse({view.name: count for view, count in zip(group.views, counts, strict=True)}, step)
    check_counts(group.count(), recorded, step)
    check_pattern(group.broken_units(), group.pattern.label, step)
    check_unwritten(group.altered(), step)


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
    views = views_of(model, masks)
    kept = [mask.mask.to(view.parameter.device) for view, mask in zip(views, masks.values(), strict=True)]
    counts = violations(views, kept, [mask.block for mask in masks.values()]).tolist()
    refuse({view.name: count for view, count in zip(views, counts, strict=True)}, step)


def views_of(model: nn.Module, masks: Mapping[str, LayerMask]) -> list[WeightView]:
    """The layers of another model that have masks.

    Raises:
        MaskMismatchError: it lacks one, or has it in another shape.
    """
    modules = dict(plain_modules(model, remove_duplicate=False))
    views: list[WeightView] = []
    for name, mask in masks.items():
        view = WeightView.of(name, modules[name]) if name in modules else None
        if view is None or view.weight_shape != mask.weight_shape:
            found = "no such layer" if view is None else f"a weight of shape {list(view.weight_shape)}"
            raise MaskMismatchError(f"{name} has a mask for shape {list(mask.weight_shape)}; that model has {found}")
        views.append(view)
    return views


def check_unwritten(altered: Sequence[str], step: int) -> None:
    """Refuse masks that somebody has written to.

    Raises:
        MaskViolationError: with layers and step.
    """
    if altered:
        raise MaskViolationError(
            f"somebody wrote to the masks of {', '.join(altered[:5])}"
            + (f" and {len(altered) - 5} more layers" if len(altered) > 5 else "")
            + f" before step {step}; a pruner's masks change at its own updates only"
        )
