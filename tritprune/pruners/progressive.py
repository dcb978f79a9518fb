"""Units that fade: between two mask updates the elements of what goes next are pruned a few at a time.

    at the prune step t_i      the masks of t_(i+1) are chosen; they take away E elements more than those in force
    after j of p equal shares  floor(j E / p) of these elements are pruned, smallest abs(w) first
    at t_(i+1)                 the chosen masks are in force: whole units, the sparsity that the schedule asks for

So every mask in between is really partial (some elements of a 4x1 block, one of the two of a 2:4 group), and the last
one is of its pattern and hits the target. The idea is that of Neural Compressor's progressive pruner.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.errors import ConfigError, MaskMismatchError
from tritprune.kernels import UnitGrid
from tritprune.pruners.base import Pruner, register_pruner
from tritprune.pruners.group import LayerGroup, Proposal
from tritprune.pruners.guard import Verification, refuse, violations
from tritprune.pruners.masks import LayerMask, MaskSet, apply_to_weights_, pack, unpack
from tritprune.pruners.reports import LayerCount, PruneEvent
from tritprune.pruners.update import Read, Update, put_in_force, read_proposals
from tritprune.registry import check_arguments
from tritprune.selection import select


@register_pruner("progressive")
class ProgressivePruner(Pruner):
    """Prunes along the schedule, the way between two mask updates in ``progressive_steps`` partial ones.

    Args:
        model: as for :class:`Pruner`.
        progressive_steps: equal shares of that way, at least 2.
        settings: as for :class:`Pruner`; ``frequency`` is at least ``progressive_steps``, and is that by default.

    Raises:
        ConfigError: fewer than 2 shares, a frequency with fewer steps than shares, ``regrow``, or anything that
            :class:`Pruner` refuses.
    """

    _may_read_later = False  # how much fades is counted on the host

    def __init__(self, model: nn.Module, *, progressive_steps: int = 4, **settings: Any) -> None:
        check_arguments("pruner 'progressive'", Pruner, {"model": model, **settings})
        if type(progressive_steps) is not int or progressive_steps < 2:
            raise ConfigError(f"progressive_steps is a whole number of at least 2, got {progressive_steps!r}")
        super().__init__(model, **{"frequency": progressive_steps, **settings})
        self._fades = {group.name: _Fade(group, progressive_steps) for group in self._groups}

    @property
    def masks(self) -> MaskSet:
        """The masks in force, by layer name; of single elements where units fade."""
        partial = {name: mask for fade in self._fades.values() for name, mask in fade.layer_masks().items()}
        return MaskSet({name: partial.get(name, mask) for name, mask in self._whole_masks().items()})

    def apply_masks_(self) -> None:
        """Zero what is pruned, in place and in the same storage."""
        super().apply_masks_()
        for fade in self._fades.values():
            fade.follow_device()
            fade.apply_()

    def verify(self, model: nn.Module | None = None) -> Verification:
        """As :meth:`Pruner.verify`; the elements that have faded so far have to be zero, too."""
        found = super().verify(model)
        if model is None:
            for fade in self._fades.values():
                fade.follow_device()
                fade.verify(self.step)
        return found

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Pruner.state_dict`, and what fades."""
        return {**super().state_dict(), "fades": {name: fade.state_dict() for name, fade in self._fades.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        if set(state.get("fades", ())) != set(self._fades):
            raise MaskMismatchError(
                "the pruner's state does not fit: it is not of a progressive pruner of these groups"
            )
        for fade in self._fades.values():
            fade.forget()
        super().load_state_dict(state)
        for name, fade in self._fades.items():
            fade.load_state_dict(state["fades"][name])
        self.apply_masks_()

    def _held(self, group: LayerGroup) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Masks of elements where units fade."""
        self._fades[group.name].follow_device()
        partial = self._fades[group.name].partial
        return (partial, [(1, 1)] * len(partial)) if partial else super()._held(group)

    def _choose(self, due: list[LayerGroup]) -> Update:
        """Whole masks: those chosen at the update before, or of now at the first; then those of the next update."""
        fades = [self._fades[group.name] for group in due]
        for fade in fades:
            fade.follow_device()
        ready = [fade.now() or read_proposals([fade.group], [self.step], self.step)[0] for fade in fades]
        upcoming = [(fade, step) for fade in fades if (step := fade.group.times.next(self.step)) is not None]
        for fade in fades:
            fade.forget()
        update = put_in_force(due, ready, self.step)
        if upcoming:
            groups = [fade.group for fade, _ in upcoming]
            chosen = read_proposals(groups, [step for _, step in upcoming], self.step)
            for (fade, step), read in zip(upcoming, chosen, strict=True):
                fade.begin(read, self.step, step)
        return update

    def _apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        for fade in self._fades.values():
            fade.follow_device()
        advanced = [fade for fade in self._fades.values() if fade.advance(self.step)]
        super()._apply(optimizer)
        for fade in self._fades.values():
            fade.apply_()
            if optimizer is not None:
                fade.reset_state_(optimizer)
        if advanced:
            self._tell(self._partial_event())

    def _partial_event(self) -> PruneEvent:
        """What the partial masks prune, for the curves; units count as whole until they have gone."""
        counts = {name: replace(count, changed=0) for name, count in self._counts.items()}
        for fade in self._fades.values():
            counts |= fade.counts(counts)
        return PruneEvent(
            step=self.step,
            target=self.target_at(self.step),
            sparsity=sum(count.zeros for count in counts.values()) / sum(count.elements for count in counts.values()),
            flip_rate=0.0,
            layers=counts,
            skipped_gradients=0,
            warnings=(),
        )


class _Fade:
    """One group on its way from the masks in force to those that are chosen.

    Args:
        group: the layers.
        shares: into how many parts the way is cut.

    Raises:
        ConfigError: the group's updates are closer together than that, or it regrows.
    """

    def __init__(self, group: LayerGroup, shares: int) -> None:
        times, settings = group.times, group.settings
        if settings.regrow:
            raise ConfigError("pruner 'progressive' does not regrow: what fades is gone")
        if times.end > times.start and min(times.frequency, times.end - times.start) < shares:
            raise ConfigError(
                f"progressive_steps={shares} needs as many optimizer steps between two mask updates; group "
                f"'{group.name}' has frequency={times.frequency} from step {times.start} to {times.end}"
            )
        self.group, self._shares = group, shares
        self.forget()

    def forget(self) -> None:
        """Nothing fades."""
        self.chosen: Read | None = None
        self._first, self._last, self._share, self._elements = 0, 0, 0, 0
        self.partial: list[Tensor] = []

    def begin(self, chosen: Read, first: int, last: int) -> None:
        """Fade from the masks in force at step ``first`` to ``chosen`` at step ``last``."""
        zeros = sum(count.zeros for count in self.group.counts_of(*chosen).values())
        self.chosen, self._first, self._last, self._share = chosen, first, last, 0
        self._elements = zeros - sum(count.zeros for count in self.group.count().values())
        self.partial = []

    def follow_device(self) -> None:
        """Bring what was chosen and what has faded to where the weights, and with them the group's masks, are now."""
        self.group.follow_device()
        device = self.group.device
        self.partial = [mask.to(device) for mask in self.partial]
        if self.chosen is not None and self.chosen[0].numbers.device != device:
            chosen, numbers = self.chosen
            keep, masks = (
                [kept.to(device) for kept in chosen.keep],
                [[m.to(device) for m in own] for own in chosen.masks],
            )
            self.chosen = Proposal(keep, masks, chosen.numbers.to(device)), numbers

    def now(self) -> Read | None:
        """What was chosen, with the gradient elements that were skipped since."""
        return None if self.chosen is None else (self.chosen[0], [*self.chosen[1][:-1], self.group.skipped()])

    def advance(self, step: int) -> bool:
        """Prune the share of elements that is due at ``step``; whether there was one."""
        if self.chosen is None or step >= self._last:
            return False
        share = (step - self._first) * self._shares // (self._last - self._first)
        if share <= self._share:
            return False
        self._share = share
        now, then = self._elements_kept(self.group.flat_masks), self._elements_kept(self._chosen_masks())
        fading = [kept & ~stays for kept, stays in zip(now, then, strict=True)]
        sizes = [view.to_2d(view.parameter.detach()).abs().float() for view in self.group.views]
        keep = select(
            [size.masked_fill(~going, math.inf) for size, going in zip(sizes, fading, strict=True)],
            [UnitGrid.of_blocks(view.shape, (1, 1)) for view in self.group.views],
            self._elements * share // self._shares,
            kept=[partial | ~kept for kept, partial in zip(now, self.partial or now, strict=True)],
            check=False,
        )
        self.partial = [kept & stays for kept, stays in zip(now, keep, strict=True)]
        return True

    def apply_(self) -> None:
        """Zero what has faded, in place."""
        if self.partial:
            apply_to_weights_(self.group.views, self.partial, [(1, 1)] * len(self.partial))

    def reset_state_(self, optimizer: torch.optim.Optimizer) -> None:
        """As :meth:`LayerGroup.reset_state_`, for what has faded."""
        if self.partial:
            self.group.reset_state_(optimizer, self.partial, [(1, 1)] * len(self.partial))

    def verify(self, step: int) -> None:
        """Refuse faded elements that are not zero."""
        if self.partial:
            counts = violations(self.group.views, self.partial, [(1, 1)] * len(self.partial)).tolist()
            refuse({view.name: count for view, count in zip(self.group.views, counts, strict=True)}, step)

    def layer_masks(self) -> dict[str, LayerMask]:
        """Masks of elements by layer name; none while nothing has faded."""
        return {
            view.name: LayerMask(mask, (1, 1), view.kind, view.weight_shape)
            for view, mask in zip(self.group.views, self.partial, strict=False)
        }

    def counts(self, whole: Mapping[str, LayerCount]) -> dict[str, LayerCount]:
        """``whole`` with the zeros of the partial masks."""
        if not self.partial:
            return {}
        zeros = torch.stack([(~mask).sum() for mask in self.partial]).tolist()
        return {v.name: replace(whole[v.name], zeros=n) for v, n in zip(self.group.views, zeros, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain Python only."""
        if self.chosen is None:
            return {}
        return {
            "numbers": self.chosen[1],
            "chosen": [pack(mask) for mask in self._chosen_masks()],
            "partial": [pack(mask) for mask in self.partial],
            "way": [self._first, self._last, self._share, self._elements],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self.forget()
        if not state:
            return
        group, bits = self.group, iter(state["chosen"])
        masks = [[unpack(next(bits), _shape(mask)).to(group.device) for mask in own] for own in group.masks]
        keep = [group.pattern.kept_units(site, own) for site, own in zip(group.sites, masks, strict=True)]
        self.chosen = (Proposal(keep, masks, torch.tensor(state["numbers"], device=group.device)), state["numbers"])
        self._first, self._last, self._share, self._elements = state["way"]
        self.partial = [
            unpack(packed, view.shape).to(group.device)
            for packed, view in zip(state["partial"], group.views, strict=False)
        ]

    def _chosen_masks(self) -> list[Tensor]:
        assert self.chosen is not None
        return [mask for masks in self.chosen[0].masks for mask in masks]

    def _elements_kept(self, masks: list[Tensor]) -> list[Tensor]:
        """Masks of blocks as masks of elements: bool ``[R, C]``."""
        spread: list[Tensor] = []
        for view, block, mask in zip(self.group.views, self.group.blocks, masks, strict=True):
            rows, columns = (
                torch.arange(size, device=mask.device) // n for size, n in zip(view.shape, block, strict=True)
            )
            spread.append(mask[rows][:, columns])
        return spread


def _shape(mask: Tensor) -> tuple[int, int]:
    return mask.shape[0], mask.shape[1]
