"""The pruner: hooks into an optimizer, counts its steps, updates masks when they are due and applies them always.

    loss.backward()
    optimizer.step()  -- before: scores from weights and gradients of the forward pass, until the last prune step
                      -- the step itself
                      -- after: if due, unit scores -> selection -> masks; masks are applied in place, at every step

So gradient accumulation, evaluation and skipped mixed-precision steps count as they should, and nothing is put into the
model: it can be saved and copied while the pruner is attached.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritprune.criteria import Criterion
from tritprune.errors import ConfigError
from tritprune.patterns import Pattern
from tritprune.pruners.attachment import after_closure, claim, release, torch_optimizer
from tritprune.pruners.group import LayerGroup
from tritprune.pruners.grouping import group_layers
from tritprune.pruners.guard import Guard, Verification, check_group, check_other
from tritprune.pruners.hand_over import HandOver
from tritprune.pruners.masks import LayerMask, MaskSet, pack, unpack
from tritprune.pruners.plan import PruningPlan, plan_of
from tritprune.pruners.record import Record
from tritprune.pruners.registered import get_pruner, pruners, register_pruner
from tritprune.pruners.regularizers import Regularizer
from tritprune.pruners.reports import LayerCount, PruneEvent, SparsityReport, layer_rows, sparsity_of
from tritprune.pruners.spec_names import SpecNames
from tritprune.pruners.state import FORMAT, check_state
from tritprune.pruners.update import Update, begin_update, update_masks
from tritprune.schedules import Schedule
from tritprune.selection import Normalize

__all__ = ["Pruner", "get_pruner", "pruners", "register_pruner"]


@register_pruner("iterative")
class Pruner(SpecNames):
    """Prunes a model while it trains.

    ``groups`` are settings per layer group over the other arguments; without them all chosen layers are one group.

    Args:
        model: whose Linear, Conv and Conv1D layers are pruned, in place.
        end_step: optimizer step of the last mask update; it asks for exactly the target.
        criterion: scores of weights: a name, a mapping with ``name``, or a Criterion.
        pattern: units: ``4x1``, ``channelx1``, ``2:4``, ``heads``, a mapping with ``name``, or a Pattern.
        schedule: how sparsity grows from ``start_step`` to ``end_step``.
        scope: ``global``: the units of a group's layers compete; ``local``: within their layer.
        target_sparsity: zeros / elements of the prunable layers in the end, in [0, 1).
        initial_sparsity: the same, asked for at ``start_step``.
        start_step: optimizer step of the first mask update; 0 is before the first step (in :meth:`attach`).
        frequency: optimizer steps between mask updates.
        include: exact dotted layer names or globs: ``*`` is one part of a name, ``**`` any number of parts.
        exclude: the same, stronger than ``include``.
        exclude_head: leave the classifier head out.
        min_layer_sparsity: hard floor of every layer, reached with the target; until then it grows as the target does.
        max_layer_sparsity: hard cap of every layer.
        reduce: mean, sum, max or l2 norm of a unit's elements.
        normalize: unit scores over their layer's l2 norm or maximum before layers compete: none, l2 or max.
        score_dtype: fp32, or bf16 for running scores of half the memory; selection stays exact on what is stored.
        regularizer: what pulls units to zero between start_step and end_step: null, ``group_lasso``, or a mapping with
            ``name`` and ``coeff``.
        regrow: a pruned unit may come back, from zero; without it masks only shrink.
        reset_state: keep the optimizer's state (momentum) of pruned weights at zero.
        guard: ``on``: before every optimizer step, check that what is pruned is zero and masks are as the last update
            left them, whatever happened since the step before (a loaded checkpoint, averaged weights, a conversion).
        groups: mappings that override any of criterion to reset_state for the layers that they include; each may
            have a ``name``.
        seed: for criteria that draw random numbers.

    Raises:
        UnknownNameError: an unknown criterion, pattern or schedule.
        ConfigError: a setting out of range, settings that contradict each other, a glob without a match, a layer in
            two groups.
        BudgetError: caps or floors that contradict the target.

    Example:
        >>> pruner = Pruner(model, target_sparsity=0.9, end_step=1000).attach(optimizer)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        end_step: int,
        criterion: str | Mapping[str, Any] | Criterion = "snip_momentum",
        pattern: str | Mapping[str, Any] | Pattern = "4x1",
        schedule: str | Mapping[str, Any] | Schedule = "cubic",
        scope: str = "global",
        target_sparsity: float = 0.9,
        initial_sparsity: float = 0.0,
        start_step: int = 0,
        frequency: int = 1,
        include: Sequence[str] = ("**",),
        exclude: Sequence[str] = (),
        exclude_head: bool = True,
        min_layer_sparsity: float = 0.0,
        max_layer_sparsity: float = 1.0,
        reduce: str = "mean",
        normalize: Normalize = "none",
        score_dtype: str = "fp32",
        regularizer: str | Mapping[str, Any] | Regularizer | None = None,
        regrow: bool = False,
        reset_state: bool = False,
        guard: str = "off",
        groups: Sequence[Mapping[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        settings = dict(locals())  # the arguments, by name: those of GroupSettings
        for name in ("self", "model", "groups", "seed", "guard", "__class__"):
            settings.pop(name, None)
        grouping = group_layers(model, settings, groups, seed)
        self.model = model
        self.layers, self.excluded = grouping.layers, grouping.excluded
        self._groups = grouping.groups
        self._views = [view for group in self._groups for view in group.views]
        self.step = 0
        self.last_timing: dict[str, float] = {"score": 0.0, "mask": 0.0}
        self._record = Record(self.layers, sum(site.grid.units for group in self._groups for site in group.sites))
        self._guard = Guard(guard, self._groups)
        self._hand_over = HandOver(self._groups)
        self._begun = False
        self._skips_step = False
        self._handles: list[Any] = []
        self._optimizer: torch.optim.Optimizer | None = None

    _may_read_later = True

    @property
    def masks(self) -> MaskSet:
        """The masks in force, by layer name in registration order."""
        self.settle()
        return self._whole_masks()

    @property
    def last_event(self) -> PruneEvent | None:
        """The last mask update; None before the first."""
        self.settle()
        return self._record.last_event

    @property
    def _counts(self) -> dict[str, LayerCount]:
        """Of every layer, as its last update left it."""
        self.settle()
        return self._record.counts

    @_counts.setter
    def _counts(self, counts: dict[str, LayerCount]) -> None:
        self._record.counts = counts

    def _whole_masks(self) -> MaskSet:
        """The masks of whole units."""
        masks = {
            view.name: LayerMask(mask, block, view.kind, view.weight_shape)
            for group in self._groups
            for view, mask, block in zip(group.views, group.flat_masks, group.blocks, strict=True)
        }
        return MaskSet({layer.name: masks[layer.name] for layer in self.layers})

    @property
    def scores(self) -> dict[str, Tensor]:
        """The scores of every layer's blocks while there are any: fp32, by layer name."""
        return {
            view.name: score
            for group in self._groups
            if group.scores is not None
            for site, scores in zip(group.sites, group.scores, strict=True)
            for view, score in zip(site.views, scores, strict=True)
        }

    @property
    def calibrating(self) -> bool:
        """Whether optimizer steps only show gradients to the pruner and leave the weights alone."""
        return False

    @property
    def final_step(self) -> int:
        """The last step at which a mask can change."""
        return max(group.times.last for group in self._groups)

    def target_at(self, step: int) -> float:
        """The sparsity over all prunable layers that is asked for after ``step`` optimizer steps."""
        elements = sum(group.elements for group in self._groups)
        if len(self._groups) == 1:
            return self._groups[0].target_at(step)
        return sum(group.target_at(step) * group.elements for group in self._groups) / elements

    @property
    def attached(self) -> bool:
        """Whether an optimizer's steps are being followed."""
        return self._optimizer is not None

    def attach(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> "Pruner":
        """Go to work at every step of ``optimizer``; a prune step at step 0 happens now.

        Args:
            optimizer: torch's, one in a wrapper, or several, of which one has the weights to prune.

        Raises:
            ConfigError: attached already, the optimizer has none of the pruned weights, or another pruner is at work on
                one of the layers.
            NonFiniteScoreError: at a prune step at step 0.
        """
        if self._optimizer is not None:
            raise ConfigError("the pruner is attached already; detach() it first")
        inner = torch_optimizer(optimizer, self._views)
        for group in self._groups:
            group.follow_device()
        claim(self, self._views)
        self._optimizer = inner
        self._handles = [
            inner.register_step_pre_hook(self._before_step),
            inner.register_step_post_hook(self._after_step),
        ]
        try:
            self._begin()
        except BaseException:
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Stop working; masks stay as they are and are no longer applied. Does nothing if not attached.

        Raises:
            NonFiniteScoreError: at the last mask update.
        """
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._hand_over.end(self._optimizer)
        self._optimizer = None
        release(self, self._views)
        self.settle()

    def on_update(self, callback: Callable[[PruneEvent], None]) -> None:
        """Call ``callback`` with the event of every mask update, after the masks are in force.

        At once on the CPU. On a GPU nobody waits for an update's numbers: its event comes before the optimizer step
        after it, or as soon as anything is asked of the pruner (:meth:`settle`).
        """
        self._record.callbacks.append(callback)

    def settle(self) -> None:
        """Wait for the numbers of the last mask update, if they are on their way from a GPU, and tell its event.

        Everything that a pruner is asked does so first. Does nothing while a CUDA graph is captured.

        Raises:
            NonFiniteScoreError: a score was NaN or infinite at that update; the masks before it have stayed in force.
        """
        self._record.settle()

    @torch.no_grad()
    def apply_masks_(self) -> None:
        """Zero what is pruned, in place and in the same storage."""
        for group in self._groups:
            group.follow_device()
            group.apply_()

    @torch.no_grad()
    def verify(self, model: nn.Module | None = None) -> Verification:
        """Check that pruned weights are zero, masks are of their pattern, and counts are those of the last update.

        Args:
            model: hold this model (averaged weights, a loaded copy) against the masks instead of the pruned one.

        Raises:
            MaskViolationError: something is not; the message names layer, step and count.
            MaskMismatchError: ``model`` has other layers.
        """
        if model is not None:
            check_other(model, self.masks, self.step)
            return Verification(self.step, len(self.layers), sum(c.zeros for c in self._counts.values()))
        for group in self._groups:
            group.follow_device()
            check_group(group, self._counts, self.step)
        self._guard.report()
        return Verification(self.step, len(self.layers), sum(count.zeros for count in self._counts.values()))

    def watch(self, model: nn.Module) -> None:
        """Let the guard look at another model, too: an average of the weights that is updated beside training.

        An average keeps a little of what is pruned now: ``pruner.masks.apply_(model)`` after each update takes it away.

        Raises:
            ConfigError: the guard is off, or the model is on another device.
            MaskMismatchError: the model has other layers.
        """
        self._guard.watch(model, self._whole_masks())

    def sparsity(self) -> SparsityReport:
        """The zeros that the model's weights have now, over three denominators."""
        return sparsity_of(self.model, [layer.name for layer in self.layers])

    def plan(self) -> PruningPlan:
        """What will be pruned, when, how exactly and at what cost in memory; nothing is trained for it."""
        return plan_of(self._groups, self.excluded, self._counts, [layer.name for layer in self.layers])

    def layer_report(self) -> list[dict[str, Any]]:
        """One row a layer: name, group, pattern, shape, elements, unit, units, kept_units, zeros, sparsity.

        Zeros are those of the mask.
        """
        return layer_rows(self.layers, {view.name: view.shape for view in self._views}, self._counts)

    def digest(self) -> str:
        """SHA-256 of all masks, equal on every device and process that has the same ones."""
        return self.masks.digest()

    def state_dict(self) -> dict[str, Any]:
        """Everything that pruning needs to go on bit for bit: tensors and plain Python only."""
        self.settle()
        return {
            "format": FORMAT,
            "step": self.step,
            "begun": self._begun,
            "warned": sorted(self._record.warned),
            "masks": {name: {"bits": pack(m.mask), **m.describe()} for name, m in self._whole_masks().items()},
            "groups": {group.name: group.state_dict() for group in self._groups},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, and apply its masks to the model's weights.

        Raises:
            CheckpointError: not a pruner's state.
            MaskMismatchError: the state is of other layers, blocks or groups.
        """
        self.settle()
        own = self._whole_masks()
        check_state(state, own, [group.name for group in self._groups])
        for group in self._groups:
            group.follow_device()
            bits = {name: state["masks"][name]["bits"] for name in (view.name for view in group.views)}
            group.load_masks({name: unpack(packed, own[name].grid.shape) for name, packed in bits.items()})
            group.load_state_dict(state["groups"][group.name])
            self._counts |= group.count()
        self.step, self._begun, self._record.warned = state["step"], state["begun"], set(state["warned"])
        self.apply_masks_()
        if self._guard.on:
            self.verify()

    def _begin(self) -> None:
        """The prune step at step 0, once."""
        if self._begun:
            return
        due = [group for group in self._groups if self.step == 0 and group.times.due(0) and group.target_at(0) > 0]
        if due:
            with torch.no_grad():
                for group in due:
                    group.update_scores_()
                event = self._update_masks(due)
                self._apply()
            if event is not None:
                self._tell(event)
            self.settle()  # what step 0 has to say is said where it was asked for, on a GPU too
        self._begun = True

    def _before_step(self, optimizer: torch.optim.Optimizer | None, args: Any, kwargs: dict[str, Any]) -> Any:
        """Scores: from the weights before the update; where the step is given a closure, from the gradients it makes.

        Returns:
            None, or the arguments of the step with the closure replaced.
        """
        self.settle()
        if optimizer is not self._optimizer:  # whom the event was told has detached the pruner
            return None
        self._guard.look(self._held, self.step)
        self._skips_step = False
        arguments = after_closure(args, kwargs, lambda: self._score(optimizer))
        if arguments is None:
            self._score(optimizer)
        return arguments

    @torch.no_grad()
    def _score(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Fold weights and gradients into the scores, only while a mask update is still to come."""
        started = time.perf_counter()
        # A fused optimizer is given the loss scale and decides on the device whether to skip: then both are read here.
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        self._skips_step = isinstance(found_inf, Tensor) and bool(found_inf)
        if not self._skips_step:
            self._update_scores(scale)
        self._hand_over.begin(optimizer)
        self.last_timing = {"score": time.perf_counter() - started, "mask": 0.0}

    def _update_scores(self, gradient_scale: Tensor | None) -> None:
        for group in self._groups:
            group.follow_device()
            if group.scores_due(self.step + 1):
                group.update_scores_(gradient_scale)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Masks: updated if due, applied always."""
        if self._skips_step:
            return
        started = time.perf_counter()
        self.step += 1
        for group in self._groups:
            group.regularize_(optimizer, self.step)
        due = [group for group in self._groups if group.times.due(self.step)]
        if due and not self._reads_later:
            self._guard.report()
        for group in due:
            if group.settings.regrow:  # what comes back starts from zero, not from what the optimizer made of it
                group.apply_()
        event = self._update_masks(due) if due else None
        self._apply(optimizer)
        self.last_timing["mask"] = time.perf_counter() - started
        if event is not None:
            self._tell(event)

    def _held(self, group: LayerGroup) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """The masks that the weights of a group must hold, and their blocks; none while nothing is pruned."""
        return (group.flat_masks, group.blocks) if group.prunes else ([], [])

    def _apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        for group in self._groups:
            if optimizer is not None and self._hand_over.has_applied(group):
                continue
            group.apply_()
            if optimizer is not None:
                group.reset_state_(optimizer)

    def _tell(self, event: PruneEvent) -> None:
        self._record.tell(event)

    @property
    def _reads_later(self) -> bool:
        """Whether the numbers of a mask update are read one step later: where waiting for them costs."""
        return self._may_read_later and any(group.device.type != "cpu" for group in self._groups)

    def _update_masks(self, due: list[LayerGroup]) -> PruneEvent | None:
        """New masks in force; the event, or None where it comes later."""
        target = self.target_at(self.step)
        if self._reads_later:
            self._record.expect(begin_update(due, self.step), target)
            return None
        return self._record.note(self._choose(due), target)

    def _choose(self, due: list[LayerGroup]) -> Update:
        """Which masks are in force from now on."""
        return update_masks(due, self.step)
