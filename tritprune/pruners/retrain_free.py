"""Post-training pruning of channels and heads: calibration batches choose the masks, no weight is trained.

    pruner = RetrainFreePruner(model, pattern="channelx1", include=["**.output.dense"], target_sparsity=0.5)
    pruner.calibrate(batches, lambda model, batch: model(**batch).loss)

    1. mask gradients   g_b = dL/dm of every unit and batch, at m = 1: the sum of w g over the unit, signs included
    2. mask search      the units with the smallest sum_b g_b^2 go, within budget, scope, floors and caps
    3. rearrangement    in every layer units are exchanged while the layer's whole Fisher block says that it pays
    4. tuning           with tune=True what is left is scaled by least squares, layer by layer, in running order

Kwon et al. 2022, arXiv:2204.09656, section 4. Their tuning fits a layer together with the residual stream around it;
here each output linear is fitted to its own dense outputs, so that no layer's surroundings have to be known.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from tritprune.criteria import Criterion, RetrainFree, get_criterion
from tritprune.errors import ConfigError, MaskMismatchError
from tritprune.patterns import Pattern
from tritprune.pruners.attachment import still_others
from tritprune.pruners.base import Pruner, register_pruner
from tritprune.pruners.calibration import Calibration
from tritprune.pruners.group import LayerGroup
from tritprune.pruners.mask_tuning import Columns, columns_of, tune_
from tritprune.pruners.reports import PruneEvent
from tritprune.pruners.settings import check_groups
from tritprune.pruners.update import Read, Update, put_in_force, read
from tritprune.registry import did_you_mean
from tritprune.selection import Normalize, normalize_scores

_log = logging.getLogger(__name__)

OF_A_GROUP = (
    "name", "pattern", "scope", "target_sparsity", "include", "exclude", "exclude_head", "min_layer_sparsity",
    "max_layer_sparsity", "reduce", "normalize", "reset_state",
)  # fmt: skip
"""What a layer group may set for itself."""


@register_pruner("retrain_free")
class RetrainFreePruner(Pruner):
    """Prunes channels or heads after training: Fisher mask search on calibration batches (arXiv:2204.09656, section 4).

    Either :meth:`calibrate` runs the batches, or :meth:`attach` takes the first ``end_step`` steps of a training loop
    as calibration: their gradients are kept from every optimizer, so that no weight and no optimizer state moves. What
    comes after is training with fixed masks. A loop of one's own sets ``model.eval()`` for these steps, so that
    gradients are those of the model without dropout; the callbacks and the command line do so themselves.

    Args:
        model: as for :class:`Pruner`.
        end_step: calibration batches of a training loop; :meth:`calibrate` takes all that it is given.
        pattern: ``channelx1``, ``1xchannel``, ``heads``: whatever has one block per unit.
        rearrange: exchange units within a layer after the search; without it the diagonal decides alone.
        tune: after the masks are chosen, scale what is left by least squares: :meth:`calibrate` and the command line do
            so themselves, a loop of one's own calls :meth:`tune`.
        target_sparsity: as for :class:`Pruner`, reached at once.
        scope: as for :class:`Pruner`.
        include: as for :class:`Pruner`.
        exclude: as for :class:`Pruner`.
        exclude_head: as for :class:`Pruner`.
        min_layer_sparsity: as for :class:`Pruner`.
        max_layer_sparsity: as for :class:`Pruner`.
        reduce: sum: the Fisher information of whole units; mean: of their mask gradient over their size.
        normalize: as for :class:`Pruner`.
        reset_state: as for :class:`Pruner`.
        guard: as for :class:`Pruner`.
        groups: as for :class:`Pruner`, of these settings but ``end_step`` and ``rearrange``.
        criterion: ``retrain_free``; or one without gradients (``random``, ``magnitude``), as a control in the same
            place, which is not rearranged.
        frequency: taken, as an experiment may set it, and not used: there is one mask update.
        seed: for criteria that draw random numbers.

    Raises:
        ConfigError: a pattern without a block per unit, more units than can be kept per batch, a criterion with
            gradients other than ``retrain_free``, or anything that :class:`Pruner` refuses.
    """

    fixes: ClassVar[dict[str, str]] = {"criterion": "retrain_free", "schedule": "one_shot"}
    _may_read_later = False  # masks are searched on the host

    def __init__(
        self,
        model: nn.Module,
        *,
        end_step: int = 32,
        pattern: str | Mapping[str, Any] | Pattern = "channelx1",
        rearrange: bool = True,
        tune: bool = False,
        target_sparsity: float = 0.5,
        scope: str = "global",
        include: Sequence[str] = ("**",),
        exclude: Sequence[str] = (),
        exclude_head: bool = True,
        min_layer_sparsity: float = 0.0,
        max_layer_sparsity: float = 1.0,
        reduce: str = "sum",
        normalize: Normalize = "none",
        reset_state: bool = False,
        guard: str = "off",
        groups: Sequence[Mapping[str, Any]] | None = None,
        criterion: str | Mapping[str, Any] | Criterion = "retrain_free",
        frequency: int = 1,
        seed: int = 0,
    ) -> None:
        del frequency
        check_groups(groups)
        if end_step is None or end_step == 0:
            raise ConfigError("pruner 'retrain_free' needs calibration batches: end_step=32, at least 1")
        for key, value in (("rearrange", rearrange), ("tune", tune)):
            if not isinstance(value, bool):
                raise ConfigError(f"{key} is true or false, got {value!r}")
        self._calibrates = _check_criterion(criterion)
        shared = {"criterion": criterion, "end_step": end_step}
        super().__init__(
            model,
            criterion=criterion,
            schedule="one_shot",
            start_step=end_step,
            end_step=end_step,
            pattern=pattern,
            target_sparsity=target_sparsity,
            scope=scope,
            include=include,
            exclude=exclude,
            exclude_head=exclude_head,
            min_layer_sparsity=min_layer_sparsity,
            max_layer_sparsity=max_layer_sparsity,
            reduce=reduce,
            normalize=normalize,
            reset_state=reset_state,
            guard=guard,
            groups=[_own_settings(group, shared) for group in groups] if groups else None,
            seed=seed,
        )
        self.rearranges = rearrange
        self.fisher_losses: dict[str, tuple[float, float]] = {}
        """By layer or attention: the loss that its Fisher block gives the searched mask, and the rearranged one."""
        self.tuning_errors: dict[str, tuple[float, float]] = {}
        """By tuned layer: the squared error of its outputs over their squared norm, before and after tuning."""
        self._calibrations = {group.name: Calibration(group) for group in self._groups}
        self.tunes = tune
        if tune:
            self._columns()  # refused before time is spent

    @property
    def calibrating(self) -> bool:
        """Whether optimizer steps still only show gradients."""
        return self.step < self.final_step

    @property
    def scores(self) -> dict[str, Tensor]:
        """The mask's Fisher information so far, ``sum_b g_b^2`` per unit: fp32, by layer name."""
        found: dict[str, Tensor] = {}
        for calibration in self._calibrations.values():
            found |= calibration.diagonals()
        return found

    def calibrate(self, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor]) -> PruneEvent:
        """Choose the masks from these batches and put them in force. Weights change only where they become zero.

        The model runs in evaluation mode (no dropout), and is afterwards in the mode in which it was. Gradients that
        were there are gone.

        Args:
            batches: whatever ``loss_fn`` takes; a few dozens of them.
            loss_fn: ``(model, batch)`` -> the scalar loss.

        Returns:
            The event of the mask update.

        Raises:
            ConfigError: no batch, or masks have been chosen already.
            NonFiniteScoreError: a mask gradient is NaN or infinite; no mask is put in force.
        """
        if not self.calibrating:
            raise ConfigError("the masks are chosen already; make a new pruner to calibrate again")
        if self.tunes:
            batches = list(batches)
        step, seen = self.step, {name: calibration.state_dict() for name, calibration in self._calibrations.items()}
        dense = copy.deepcopy(self.model) if self.tunes else None
        try:
            self.step = max(step + self._observe(batches, loss_fn), self.final_step)
            with torch.no_grad():
                event = self._update_masks(list(self._groups))
            assert event is not None
        except BaseException:  # as if it had not begun: a second try counts no batch twice
            self.step = step
            for name, calibration in self._calibrations.items():
                calibration.load_state_dict(seen[name])
            raise
        with torch.no_grad():
            self._apply()
        if dense is not None:
            self.tune(list(batches), loss_fn, dense)
        self._tell(event)
        return event

    def _observe(self, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor]) -> int:
        """Take in the mask gradients of each batch; how many there were."""
        done = 0
        with _evaluating(self.model):
            for batch in batches:
                self.model.zero_grad(set_to_none=True)
                with torch.enable_grad():
                    loss_fn(self.model, batch).backward()
                with torch.no_grad():
                    self._update_scores(None)
                done += 1
            self.model.zero_grad(set_to_none=True)
        if not done:
            raise ConfigError("calibrate() was given no batch")
        return done

    def tune(
        self, batches: Sequence[Any], forward: Callable[[nn.Module, Any], object], dense: nn.Module
    ) -> dict[str, tuple[float, float]]:
        """Scale the columns that stay, so that every layer's outputs come near the dense ones on these batches.

        :meth:`calibrate` and the command line do so with ``tune=True``. Two forward passes per layer and batch.

        Args:
            batches: whatever ``forward`` takes.
            forward: ``(model, batch)`` runs a model on a batch; what it returns is not looked at.
            dense: the model as it was before masks were applied.

        Returns:
            :attr:`tuning_errors`.

        Raises:
            ConfigError: masks have not been chosen yet, no batch, or units that cannot be tuned.
        """
        if self.calibrating or not batches:
            raise ConfigError("tune() needs batches, and masks that are chosen: calibrate first")
        with _evaluating(self.model), _evaluating(dense):
            self.tuning_errors = tune_(self.model, dense, self._columns(), batches, forward)
        return self.tuning_errors

    def _columns(self) -> list[Columns]:
        return [
            columns_of(site, self._calibrations[group.name].mask_view(number), keep, group.pattern.label)
            for group in self._groups
            for number, (site, keep) in enumerate(zip(group.sites, group.kept_units(), strict=True))
        ]

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`Pruner.state_dict`, and the mask gradients of the batches so far."""
        kept = {name: calibration.state_dict() for name, calibration in self._calibrations.items()}
        return {**super().state_dict(), "calibration": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave."""
        if set(state.get("calibration", ())) != set(self._calibrations):
            raise MaskMismatchError("the pruner's state does not fit: it has no calibration of these groups")
        super().load_state_dict(state)
        for name, calibration in self._calibrations.items():
            calibration.load_state_dict(state["calibration"][name])

    def attach(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> Pruner:
        """As :meth:`Pruner.attach`; while calibration is to come, to one optimizer only.

        Raises:
            ConfigError: several optimizers, of which the others would train while this one calibrates.
        """
        if self.calibrating and isinstance(optimizer, Sequence) and len(optimizer) > 1:
            raise ConfigError(
                f"pruner 'retrain_free' was given {len(optimizer)} optimizers, and the others would train while it "
                "calibrates: call calibrate() first, or give it the only one"
            )
        super().attach(optimizer)
        if self.calibrating and self._optimizer is not None:
            self._handles += still_others(self, self._optimizer)
        return self

    @torch.no_grad()
    def _score(self, optimizer: torch.optim.Optimizer | None) -> None:
        calibrating = self.calibrating
        if calibrating and "random" not in self._record.warned and (names := _random_modules(self.model)):
            self._record.warned.add("random")
            _log.warning(
                "calibration sees %s in training mode (%d modules, first %s): its gradients are not those of the model "
                "as it is used; set model.eval() for the first %d steps",
                type(self.model.get_submodule(names[0])).__name__, len(names), names[0], self.final_step,
            )  # fmt: skip
        super()._score(optimizer)
        if calibrating and not self._skips_step:  # a weight without a gradient is left alone by every optimizer
            for parameter in {*self.model.parameters(), *(() if optimizer is None else _parameters(optimizer))}:
                parameter.grad = None

    def _update_scores(self, gradient_scale: Tensor | None) -> None:
        if not self.calibrating:
            return
        for group in self._groups:
            group.follow_device()
            if self._calibrates:
                self._calibrations[group.name].observe(gradient_scale)
            elif group.scores is None:
                group.update_scores_()

    def _choose(self, due: list[LayerGroup]) -> Update:
        if not self._calibrates:
            return super()._choose(due)
        chosen: list[Read] = []
        for group in due:
            calibration = self._calibrations[group.name]
            searched = calibration.unit_scores()
            before = group.kept_units()
            keep = group.select_units(self.step, normalize_scores(searched, group.settings.normalize), before)
            if self.rearranges:
                keep = calibration.rearranged(keep, before, self.fisher_losses)
            masks = group.pattern.all_layer_masks(group.sites, keep, calibration.block_scores(), group.masks)
            chosen += read([group], [group.proposal(keep, masks, searched, before)], self.step)
        update = put_in_force(due, chosen, self.step)
        for group in due:
            self._calibrations[group.name].forget()
        return update


def _check_criterion(criterion: str | Mapping[str, Any] | Criterion) -> bool:
    """Whether calibration decides; False: a criterion without gradients does."""
    found = get_criterion(criterion)
    if found.needs_gradient and not isinstance(found, RetrainFree):
        raise ConfigError(
            f"pruner 'retrain_free' is calibrated by criterion retrain_free, got {type(found).__name__}; "
            "pruner 'one_shot' takes any criterion"
        )
    return isinstance(found, RetrainFree)


def _random_modules(model: nn.Module) -> list[str]:
    """Names of modules in training mode whose outputs depend on chance or on the rest of the batch."""
    return [
        name
        for name, module in model.named_modules()
        if module.training and (isinstance(module, _BatchNorm) or (isinstance(module, _DropoutNd) and module.p > 0))
    ]


def _own_settings(group: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings beside those that all share."""
    own = dict(group)
    for key, value in shared.items():
        if own.pop(key, value) != value:
            raise ConfigError(f"all groups of pruner 'retrain_free' share {key}={value}, a group has {group[key]}")
    for key in own:
        if key not in OF_A_GROUP:
            raise ConfigError(
                f"a group of pruner 'retrain_free' has no key '{key}'; {did_you_mean(str(key), OF_A_GROUP)}"
            )
    return own


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
