"""One layer group while it is pruned: its scores, its masks, and what a mask update would be."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.criteria import get_criterion
from tritprune.errors import ConfigError
from tritprune.kernels import UnitGrid, count_non_finite
from tritprune.optim import WeightMask
from tritprune.patterns import Block, WeightView, get_pattern, set_reduction
from tritprune.pruners.budget import GroupBudget
from tritprune.pruners.layers import Exclusion
from tritprune.pruners.masks import apply_to_tensors_, apply_to_weights_
from tritprune.pruners.regularizers import get_regularizer
from tritprune.pruners.reports import LayerCount, measure, read_counts
from tritprune.pruners.settings import SCORE_DTYPES, GroupSettings
from tritprune.schedules import get_schedule
from tritprune.selection import normalize_scores

_SAMPLED_STEPS = 1000


@dataclass(frozen=True)
class Proposal:
    """New masks of a group, on its device, not yet in force.

    Args:
        keep: units that stay, per site.
        masks: per site, one mask per view.
        numbers: everything that the host wants to know, int64 ``[k]``: :func:`measure`'s counts, then the non-finite
            scores of each site, then the gradient elements skipped since the last update.
    """

    keep: list[Tensor]
    masks: list[list[Tensor]]
    numbers: Tensor


class LayerGroup:
    """A group of layers with one criterion, pattern, schedule and budget.

    Args:
        settings: what the user set.
        views: the layers.
        model: for patterns that look at how layers belong together.
        seed: for criteria that draw random numbers.

    Raises:
        ConfigError: settings that do not fit the layers or each other.
        BudgetError: floors or caps that contradict the target.
    """

    def __init__(self, settings: GroupSettings, views: list[WeightView], model: nn.Module, seed: int) -> None:
        self.settings, self.name, self.times, self._seed = settings, settings.name, settings.times, seed
        self.criterion = get_criterion(settings.criterion)
        self.schedule = get_schedule(settings.schedule)
        self.pattern = copy.copy(get_pattern(settings.pattern))  # its reduction is this group's own
        set_reduction(self.pattern, settings.reduce)
        self.sites = self.pattern.sites(views, model)
        self.views = [view for site in self.sites for view in site.views]
        used = {view.name for view in self.views}
        self.excluded = [
            Exclusion(view.name, f"pattern {self.pattern.label} has no unit in it")
            for view in views
            if view.name not in used
        ]
        if not self.sites:
            raise ConfigError(
                f"pattern {self.pattern.label} has no unit in any layer of group '{self.name}': "
                + ", ".join(f"{view.name} [{view.shape[0]}, {view.shape[1]}]" for view in views[:5])
            )
        self.elements = sum(site.elements for site in self.sites)
        self._regularizer = get_regularizer(settings.regularizer)
        self._check_settings()
        self._budget = GroupBudget(settings, self.sites)
        self.masks = [
            [
                torch.ones(_grid(view, block).shape, dtype=torch.bool, device=view.parameter.device)
                for view, block in zip(site.views, site.blocks, strict=True)
            ]
            for site in self.sites
        ]
        self._seal()
        self.scores: list[list[Tensor]] | None = None
        self.prunes = False
        self.without_gradient: set[str] = set()
        self._skipped = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.views[0].parameter.device

    @property
    def blocks(self) -> list[Block]:
        """``(n, m)`` of every view."""
        return [block for site in self.sites for block in site.blocks]

    @property
    def flat_masks(self) -> list[Tensor]:
        """The mask of every view."""
        return [mask for masks in self.masks for mask in masks]

    def target_at(self, step: int) -> float:
        """The sparsity that the last prune step at or before ``step`` asks for; 0 before the first."""
        latest = self.times.latest(step)
        if latest is None:
            return 0.0
        if latest >= self.times.last:
            return self.settings.target_sparsity
        value = self.schedule.sparsity(
            self.times.progress(latest), self.settings.initial_sparsity, self.settings.target_sparsity
        )
        return min(value, self.settings.target_sparsity)

    def scores_due(self, step: int) -> bool:
        """Whether the optimizer step that makes ``step`` steps feeds the scores."""
        if step > self.times.last:
            return False
        return self.criterion.every_step or self.times.due(step)

    def update_scores_(self, gradient_scale: Tensor | None = None) -> None:
        """Fold the present weights and gradients into the scores.

        Args:
            gradient_scale: what the gradients were multiplied by; None: nothing.
        """
        if self.scores is None:
            self.scores = [
                [
                    self.criterion.initial_scores(view.name, _grid(view, block), self.device, self._seed).to(
                        SCORE_DTYPES[self.settings.score_dtype]
                    )
                    for view, block in zip(site.views, site.blocks, strict=True)
                ]
                for site in self.sites
            ]
        flat = [score for scores in self.scores for score in scores]
        needs = self.criterion.needs_gradient
        present = [i for i, view in enumerate(self.views) if not needs or view.parameter.grad is not None]
        self.without_gradient = {view.name for i, view in enumerate(self.views) if i not in set(present)}
        if not present:
            return
        gradients = [self.gradient_of(self.views[i], gradient_scale) for i in present] if needs else None
        skipped = torch.zeros(len(present), dtype=torch.int64, device=self.device)
        self.criterion.accumulate_(
            [flat[i] for i in present],
            skipped,
            [self.views[i].to_2d(self.views[i].parameter.detach()) for i in present],
            gradients,
            [self.blocks[i] for i in present],
            self.pattern.reduce,
        )
        self.note_skipped(skipped)

    def note_skipped(self, skipped: Tensor) -> None:
        """Count gradient elements that were left out: int64 ``[T]``."""
        self._skipped += skipped.sum()

    def propose(self, step: int) -> Proposal:
        """The masks that the schedule, the budget and the scores of ``step`` ask for. Nothing is read back."""
        assert self.scores is not None
        regrow = self.settings.regrow
        whole = torch.ones((), dtype=torch.bool, device=self.device)
        known = [[whole.expand(mask.shape) for mask in masks] for masks in self.masks] if regrow else self.masks
        unit_scores = normalize_scores(
            [score.float() for score in self.pattern.all_unit_scores(self.sites, self.scores, known)],
            self.settings.normalize,
        )
        before = self.kept_units()
        keep = self.select_units(step, unit_scores, before)
        masks = self.pattern.all_layer_masks(self.sites, keep, self.scores, known)
        return self.proposal(keep, masks, unit_scores, before)

    def kept_units(self) -> list[Tensor]:
        """Units that the masks in force keep: bool of the grid's shape, per site."""
        return [self.pattern.kept_units(site, masks) for site, masks in zip(self.sites, self.masks, strict=True)]

    def select_units(self, step: int, unit_scores: list[Tensor], before: list[Tensor]) -> list[Tensor]:
        """The units of ``before`` that stay by the budget of ``step``: bool of the grid's shape, per site."""
        kept = before if self.prunes and not self.settings.regrow else None
        held = [any(view.name in self.without_gradient for view in site.views) for site in self.sites]
        return self._budget.select(self.target_at(step), unit_scores, kept, held)

    def proposal(
        self, keep: list[Tensor], masks: list[list[Tensor]], unit_scores: list[Tensor], before: list[Tensor]
    ) -> Proposal:
        """Units that stay and their masks, with everything about them that the host will want to know."""
        counts = measure(self.sites, keep, before, masks)
        return Proposal(
            keep, masks, torch.cat([counts.flatten(), count_non_finite(unit_scores), self._skipped.view(1)])
        )

    @property
    def non_finite(self) -> slice:
        """Which of a proposal's numbers count non-finite scores per site."""
        return slice(-1 - len(self.sites), -1)

    def put_in_force(self, proposal: Proposal, step: int) -> None:
        """Make a proposal the masks; after the last prune step the scores are freed. Nothing is read back."""
        self.masks = proposal.masks
        self._seal()
        self.prunes = True  # until told() knows
        self._skipped.zero_()
        if step >= self.times.last:
            self.forget_scores()

    def told(self, proposal: Proposal, numbers: list[int]) -> tuple[dict[str, LayerCount], int, int]:
        """Take up the numbers of a proposal that is in force, or was.

        Args:
            proposal: the masks.
            numbers: its numbers on the host.

        Returns:
            counts by layer, changed units, gradient elements skipped since the last update.
        """
        counts = self.counts_of(proposal, numbers)
        if self.masks is proposal.masks:
            self.prunes = any(count.zeros for count in counts.values())
        changed = sum(changed for _, changed in self._rows(numbers)[: len(self.sites)])
        return counts, changed, numbers[-1]

    def counts_of(self, proposal: Proposal, numbers: list[int]) -> dict[str, LayerCount]:
        """Counts by layer, if the proposal were in force."""
        return read_counts(self.sites, proposal.masks, proposal.keep, self._rows(numbers))

    def _rows(self, numbers: list[int]) -> list[tuple[int, int]]:
        """Kept and changed, as :func:`measure` left them."""
        return list(zip(*[iter(numbers[: -1 - len(self.sites)])] * 2, strict=True))

    def forget_scores(self) -> None:
        """Free the scores: after the last prune step nothing asks for them."""
        self.scores = None

    def apply_(self) -> None:
        """Zero what is pruned, in place."""
        if self.prunes:
            apply_to_weights_(self.views, self.flat_masks, self.blocks)

    def step_masks(self) -> dict[Tensor, WeightMask]:
        """What an optimizer needs to end its step with the masks: by weight, where its view is no copy of it."""
        if not self.prunes:
            return {}
        reset = self.settings.reset_state
        return {
            view.parameter: WeightMask(mask, block, view.to_2d, reset)
            for view, mask, block in zip(self.views, self.flat_masks, self.blocks, strict=True)
            if view.to_2d(view.parameter.detach()).data_ptr() == view.parameter.data_ptr()
        }

    def skipped(self) -> int:
        """Gradient elements left out of scores since the last update because they were not finite."""
        return int(self._skipped)

    def reset_state_(
        self,
        optimizer: torch.optim.Optimizer,
        masks: Sequence[Tensor] | None = None,
        blocks: Sequence[Block] | None = None,
    ) -> None:
        """Zero the optimizer's state (momentum) of what is pruned, or of what other masks prune, in place."""
        if not ((self.prunes or masks) and self.settings.reset_state):
            return
        for view, mask, block in zip(self.views, masks or self.flat_masks, blocks or self.blocks, strict=True):
            weight = view.parameter
            state = optimizer.state.get(weight, {}).values()
            tensors = [t for t in state if isinstance(t, Tensor) and t.shape == weight.shape and t.is_floating_point()]
            apply_to_tensors_([view] * len(tensors), tensors, [mask] * len(tensors), [block] * len(tensors))

    @torch.no_grad()
    def regularize_(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Pull units towards zero while masks are still to come, in place."""
        if self._regularizer is None or not self.times.start <= step <= self.times.last:
            return
        rates = {id(p): held["lr"] for held in optimizer.param_groups for p in held["params"]}
        blocks = [block for site in self.sites for block in self.pattern.lasso_blocks(site)]
        held = [(view, block) for view, block in zip(self.views, blocks, strict=True) if id(view.parameter) in rates]
        self._regularizer.shrink_(
            [view for view, _ in held], [block for _, block in held], [rates[id(view.parameter)] for view, _ in held]
        )

    def broken_units(self) -> dict[str, int]:
        """Units of the masks in force that are not of the pattern, by site."""
        counts = [self.pattern.broken_units(site, masks) for site, masks in zip(self.sites, self.masks, strict=True)]
        return dict(zip([site.name for site in self.sites], torch.stack(counts).tolist(), strict=True))

    def altered(self) -> list[str]:
        """Layers whose masks have been written to since they were put in force. Nothing is read."""
        present = [(id(mask), mask._version) for mask in self.flat_masks]
        return [view.name for view, now, then in zip(self.views, present, self._sealed, strict=True) if now != then]

    def _seal(self) -> None:
        """Remember the masks as they are."""
        self._sealed = [(id(mask), mask._version) for mask in self.flat_masks]

    def follow_device(self) -> None:
        """Bring masks and scores to where the weights are now.

        Raises:
            ConfigError: the group's weights are on several devices.
        """
        devices = {view.parameter.device for view in self.views}
        if len(devices) > 1:
            raise ConfigError(
                f"layers of group '{self.name}' are on several devices ({', '.join(sorted(map(str, devices)))}); "
                "make one group per device"
            )
        if self._skipped.device != self.device:
            altered = self.altered()
            self.masks = [[mask.to(self.device) for mask in masks] for masks in self.masks]
            if not altered:
                self._seal()
            if self.scores is not None:
                self.scores = [[score.to(self.device) for score in scores] for scores in self.scores]
            self._skipped = self._skipped.to(self.device)

    def load_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Put stored masks in force: bool ``[rows, cols]`` by layer name."""
        self.masks = [[masks[view.name].to(self.device) for view in site.views] for site in self.sites]
        self._seal()
        self.prunes = any(count.zeros for count in self.count().values())

    def count(self) -> dict[str, LayerCount]:
        """Count the masks in force, by layer name."""
        keep = self.kept_units()
        return read_counts(self.sites, self.masks, keep, measure(self.sites, keep, keep, self.masks).tolist())

    def state_dict(self) -> dict[str, Any]:
        """Scores, criterion state and counters: tensors and plain Python only."""
        scores = {}
        if self.scores is not None:
            flat = (score for scores in self.scores for score in scores)
            scores = {view.name: score.clone() for view, score in zip(self.views, flat, strict=True)}
        return {"scores": scores, "criterion": self.criterion.state_dict(), "skipped": int(self._skipped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave; masks come from the pruner."""
        self.criterion.load_state_dict(state["criterion"])
        self._skipped.fill_(state["skipped"])
        scores = state["scores"]
        self.scores = (
            [[scores[view.name].to(self.device, copy=True) for view in site.views] for site in self.sites]
            if scores
            else None
        )

    def _check_settings(self) -> None:
        settings = self.settings
        if settings.reduce not in self.criterion.reductions:
            known = ", ".join(self.criterion.reductions)
            raise ConfigError(
                f"criterion {type(self.criterion).__name__} cannot be reduced by '{settings.reduce}': its sum over a "
                f"unit has a sign; known: {known}"
            )
        if settings.target_sparsity > self.pattern.max_sparsity:
            raise ConfigError(
                f"target_sparsity={settings.target_sparsity:g} is above {self.pattern.max_sparsity:g}, "
                f"the most that pattern {self.pattern.label} can prune"
            )
        first, last = self.times.start, self.times.last
        if first == 0 and self.criterion.needs_gradient and self.target_at(0) > 0:
            raise ConfigError(
                f"a prune step at step 0 (start_step=0, sparsity {self.target_at(0):g}) has no gradient yet, "
                f"and criterion {type(self.criterion).__name__} needs one; "
                "start at step 1, or begin with initial_sparsity=0"
            )
        stride = max(1, (last - first) // _SAMPLED_STEPS)
        for step in range(first, last + 1, stride):
            value = self.schedule.sparsity(
                self.times.progress(step), settings.initial_sparsity, settings.target_sparsity
            )
            if not 0 <= value <= settings.target_sparsity + 1e-9:
                raise ConfigError(
                    f"schedule {type(self.schedule).__name__} asks for sparsity {value:g} at step {step}; "
                    f"it must stay between 0 and target_sparsity={settings.target_sparsity:g}"
                )

    def gradient_of(self, view: WeightView, scale: Tensor | None) -> Tensor:
        """A view's gradient ``[R, C]``, divided by what it was multiplied by."""
        gradient = view.parameter.grad
        assert gradient is not None
        gradient = view.to_2d(gradient.detach())
        return gradient if scale is None else gradient / scale.to(gradient.device)


def _grid(view: WeightView, block: Block) -> UnitGrid:
    return UnitGrid.of_blocks(view.shape, block)
