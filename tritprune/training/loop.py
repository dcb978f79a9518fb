"""One training phase, read top to bottom: batches, loss, step, curves, evaluation, checkpoint, stop signal.

Everything that a step depends on is a pure function of (seed, phase, step): which examples, and dropout's random
numbers. So a resumed phase goes on bit for bit where the interrupted one stopped, with no generator state to carry.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from tritprune.errors import InterruptedRunError, MaskMismatchError
from tritprune.pruners import MaskSet, PruneEvent, Pruner, RetrainFreePruner
from tritprune.tasks import Task
from tritprune.tracking import Tracker
from tritprune.training import curves
from tritprune.training.batches import BatchOrder, step_seed
from tritprune.training.checkpoint import RunFolder
from tritprune.training.clock import StepClock
from tritprune.training.progress import Progress
from tritprune.training.settings import Phase, TrainingSettings


@dataclass
class Run:
    """What all stages of a run share."""

    name: str
    command: str
    folder: RunFolder
    task: Task
    settings: TrainingSettings
    seed: int
    tracker: Tracker
    progress: Progress
    accelerator: Accelerator
    overrides: list[str] = field(default_factory=list)
    job: int | None = None
    stop_requested: Callable[[], str | None] = lambda: None

    @property
    def device(self) -> torch.device:
        """Where training runs."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.accelerator.is_main_process

    def curve_file(self) -> curves.CurveFile:
        """The run's ``curves.jsonl``."""
        return curves.CurveFile(self.folder / "curves.jsonl")

    def log(self, record: dict[str, Any]) -> None:
        """Send one step's values to ``curves.jsonl`` and to the tracker."""
        if self.is_main:
            self.curve_file().append(record)
            self.tracker.log(record[curves.STEP], {k: v for k, v in record.items() if k != curves.STEP})


def agree(value: Any) -> Any:
    """The main process's value, on every process."""
    box = [value]
    broadcast_object_list(box)
    return box[0]


class Loop:
    """A phase of training: the dense fine-tuning, or pruning with recovery.

    Args:
        run: what the stages share.
        model: trained in place.
        phase: steps, learning rate, optimizer.
        name: ``dense``, ``prune``, ``control`` or ``tune``; in the curves, ``prune`` becomes ``recover`` after the last
            mask update.
        offset: optimizer steps of earlier phases; the curves' x axis counts on.
        pruner: attached for the length of the phase.
        teacher: the model to distill from.
        part: the steps of the phase that are made here, with this model; None: all.
        order: whose examples and random numbers are gone on with; by default the phase's own, by its name.
        masks: held on the weights after every step, where there is no pruner.
        trained: names of the parameters of each of the optimizer's groups; by default all that want a gradient.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        phase: Phase,
        *,
        name: str,
        offset: int = 0,
        pruner: Pruner | None = None,
        teacher: nn.Module | None = None,
        part: range | None = None,
        order: str | None = None,
        masks: MaskSet | None = None,
        trained: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.run, self.phase, self.name, self.offset, self.pruner = run, phase, name, offset, pruner
        self.part = range(phase.steps) if part is None else part
        self.step, self.last = self.part.start, self.part.stop
        self.metrics: dict[str, float] = {}
        self.plain_model = model
        self._masks = None if masks is None else _placed(masks, run.device)
        self._order = order or name
        self._optimizer = optimizer_of(model, phase, trained)
        self._lr_schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, phase.lr_factor)
        self._model, self._stepper = run.accelerator.prepare(model, self._optimizer)
        self._batches = BatchOrder(
            run.task.n_train,
            batch_size=run.settings.batch_size,
            accumulate=run.settings.accumulate,
            rank=run.accelerator.process_index,
            world=run.accelerator.num_processes,
            seed=step_seed(run.seed, self._order),
        )
        self._dense = teacher
        self._teacher = teacher.to(run.device).eval() if teacher is not None and self._distills else None
        self._teacher_logits: Tensor | None = None
        self._event: PruneEvent | None = None
        self._recent_loss = self._sparsity = 0.0
        if pruner is not None:
            pruner.on_update(self._on_mask_update)

    @property
    def _distills(self) -> bool:
        return self.run.settings.distillation.weight > 0

    @property
    def stage(self) -> str:
        """The stage's name in the curves."""
        if self.name == "prune" and self.pruner is not None and self.step > self.pruner.final_step:
            return "recover"
        return self.name

    def fit(self) -> dict[str, float]:
        """Train to the end of the phase, or of this part of it; the metrics of the last evaluation.

        Raises:
            InterruptedRunError: a signal came; the state is saved.
            MaskMismatchError: processes disagree on a mask.
        """
        self._cache_teacher_logits()
        if self.pruner is not None:
            self.pruner.attach(self._optimizer)
            self._sparsity = self.pruner.sparsity().prunable.sparsity
        held = self._optimizer.register_step_post_hook(lambda *_: self._hold_masks())
        try:
            with self.run.progress.phase(self.name, self.last, self.step) as self._bar:
                while self.step < self.last:
                    self._train_step()
                    if self.step % self.run.settings.eval_every == 0 or self.step == self.last:
                        self._evaluate()
                    self._checkpoint_if_due()
                    self._stop_if_asked()
        finally:
            held.remove()
            if self.pruner is not None:
                self.pruner.detach()
            self.run.accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
        return self.metrics

    @torch.no_grad()
    def _hold_masks(self) -> None:
        if self._masks is not None:
            self._masks.apply_(self.plain_model)

    def _train_step(self) -> None:
        run, accelerator = self.run, self.run.accelerator
        clock = StepClock(run.device)
        torch.manual_seed(step_seed(run.seed, self._order, self.step, accelerator.process_index))
        calibrating = self.pruner is not None and self.pruner.calibrating
        self._model.train(not calibrating)  # no dropout, no clipping and no teacher in what calibrates
        self._event = None
        total = torch.zeros((), device=run.device)
        lr = self._lr_schedule.get_last_lr()[0]
        for indices in self._batches.micro_batches(self.step):
            with accelerator.accumulate(self._model):
                with clock.part("forward"):
                    loss = self._loss(indices, distill=not calibrating)
                with clock.part("backward"):
                    accelerator.backward(loss)
                if accelerator.sync_gradients and run.settings.clip is not None and not calibrating:
                    accelerator.clip_grad_norm_(self._model.parameters(), run.settings.clip)
                self._stepper.step()
                self._stepper.zero_grad()
            total += loss.detach() / run.settings.accumulate
        if not accelerator.optimizer_step_was_skipped:
            self._lr_schedule.step()
        self.step += 1
        if self.pruner is not None:
            self.pruner.settle()  # the loss is read here, too
        mean = accelerator.reduce(total, "mean")
        assert isinstance(mean, Tensor)
        self._log_step(mean.item(), float(lr), clock)
        if calibrating:
            self._tune_if_chosen()

    def _tune_if_chosen(self) -> None:
        """Once calibration has chosen the masks: its batches once more, all of them on every process."""
        pruner, task, dense = self.pruner, self.run.task, self._dense
        if not isinstance(pruner, RetrainFreePruner) or pruner.calibrating or not pruner.tunes or dense is None:
            return
        batches = [self._batches.global_batch(step) for step in range(pruner.final_step)]
        passes = itertools.count(1)

        def forward(model: nn.Module, indices: Tensor) -> None:
            self._bar.busy(f"scaling what is left by least squares, forward pass {next(passes):,}")
            batch = {k: v.to(self.run.device) for k, v in task.collate("train", indices).items()}
            model(**task.model_inputs(batch))

        errors = pruner.tune(batches, forward, dense.to(self.run.device)).values()
        if errors:
            before, after = (sum(error[side] for error in errors) / len(errors) for side in (0, 1))
            self.run.progress.say(
                f"tuned    {len(errors)} layers by least squares: squared error of their outputs {before:.1%} before, "
                f"{after:.1%} after"
            )

    def _loss(self, indices: Tensor, *, distill: bool) -> Tensor:
        task = self.run.task
        batch = {k: v.to(self.run.device) for k, v in task.collate("train", indices).items()}
        logits = task.logits(self._model(**task.model_inputs(batch)))
        loss = task.loss(logits, batch)
        if self._teacher is None or not distill:
            return loss
        settings = self.run.settings.distillation
        if self._teacher_logits is not None:
            teacher = self._teacher_logits[indices.to(self._teacher_logits.device)]
        else:
            with torch.no_grad():
                teacher = task.logits(self._teacher(**task.model_inputs(batch)))
        return (1 - settings.weight) * loss + settings.weight * distillation_loss(logits, teacher, settings.temperature)

    def _cache_teacher_logits(self) -> None:
        """Ask the teacher once per training example when this part of the phase would ask more than once.

        The batches are fixed, so that a resumed run gets the same bits.
        """
        run = self.run
        if self._teacher is None or len(self.part) * run.settings.batch_size < run.task.n_train:
            return
        parts = []
        with torch.inference_mode(), run.progress.bar("teacher", run.task.n_train) as bar:
            for indices in torch.arange(run.task.n_train).split(64):
                batch = {k: v.to(run.device) for k, v in run.task.collate("train", indices).items()}
                parts.append(run.task.logits(self._teacher(**run.task.model_inputs(batch))).float())
                bar.advance(len(indices))
        self._teacher_logits = torch.cat(parts).clone()

    def _on_mask_update(self, event: PruneEvent) -> None:
        assert self.pruner is not None
        self._event = event
        if self.run.accelerator.num_processes == 1:
            return
        digests = gather_object([self.pruner.digest()])
        if len(set(digests)) > 1:
            lines = ", ".join(f"process {i}: {digest[:12]}" for i, digest in enumerate(digests))
            raise MaskMismatchError(
                f"masks differ between processes at step {event.step}: {lines}; "
                "the gradients are not the same on all of them"
            )

    def _log_step(self, loss: float, lr: float, clock: StepClock) -> None:
        run = self.run
        if self.pruner is not None:
            self._sparsity = self._event.sparsity if self._event else self._sparsity
        self._recent_loss = loss
        self._show()
        if self.step % run.settings.log_every and self._event is None and self.step != self.last:
            return
        record: dict[str, Any] = {curves.STEP: self.offset + self.step, curves.STAGE: self.stage}
        record |= {curves.LOSS_TRAIN: loss, curves.LEARNING_RATE: lr, **clock.milliseconds()}
        if self.pruner is not None:
            timing = self.pruner.last_timing
            record[curves.SCORE_MS] = 1e3 * timing.get("score", 0.0)
            record[curves.MASK_MS] = 1e3 * timing.get("mask", 0.0)
            record[curves.SPARSITY] = self._sparsity
            record[curves.SPARSITY_TARGET] = self.pruner.target_at(self.step)
        if self._event is not None:
            record[curves.FLIP_RATE] = self._event.flip_rate
            record[curves.SKIPPED_GRADIENTS] = self._event.skipped_gradients
            for layer, count in self._event.layers.items():
                record[curves.layer_sparsity(layer)] = count.zeros / count.elements
            for warning in self._event.warnings:
                run.progress.note(warning)
        run.log(record)

    def _show(self) -> None:
        shown = {"loss": self._recent_loss, **self.metrics}
        if self.pruner is not None:
            shown["sparsity"] = self._sparsity
        self._bar.update(self.step, self.stage, shown)

    def _evaluate(self) -> None:
        run = self.run
        values = run.task.evaluate(self.plain_model, device=run.device)
        self.metrics = {run.task.primary_metric: values[run.task.primary_metric]}
        run.log(
            {curves.STEP: self.offset + self.step, curves.STAGE: self.stage}
            | {curves.eval_metric(name): value for name, value in values.items()}
        )
        self._show()
        self._bar.evaluated(self.step, self.stage, values, self._sparsity if self.pruner is not None else None)

    def _checkpoint_if_due(self) -> None:
        stage_ends = self.pruner is not None and self.step == self.pruner.final_step
        if stage_ends or self.step % self.run.settings.checkpoint_every == 0 or self.step == self.last:
            self.save()

    def _stop_if_asked(self) -> None:
        reason = agree(self.run.stop_requested())
        if reason:
            self.save()
            raise InterruptedRunError(
                f"stopped by {reason} at step {self.step} of {self.last} of '{self.stage}'; "
                f"the state is saved in {self.run.folder.path}\ngo on with:  {self.run.command} resume=auto"
            )

    def save(self) -> None:
        """Write the phase's state in one move."""
        if self.run.is_main:
            scaler = self.run.accelerator.scaler
            state = {
                "phase": self.name,
                "step": self.step,
                "offset": self.offset,
                "metrics": self.metrics,
                "model": self.plain_model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "lr_schedule": self._lr_schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else {},
                "pruner": self.pruner.state_dict() if self.pruner is not None else {},
            }
            self.run.folder.save_checkpoint(state)
            self.run.folder.write_state(stage=self.stage, step=self.offset + self.step)
        self.run.accelerator.wait_for_everyone()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a saved phase; the curves are cut back to its step."""
        self.step, self.metrics = state["step"], dict(state["metrics"])
        self.plain_model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._lr_schedule.load_state_dict(state["lr_schedule"])
        scaler = self.run.accelerator.scaler
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])
        if self.run.is_main:
            self.run.curve_file().keep_until(self.offset + self.step)


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over the batch (arXiv:1503.02531, section 2).

    Args:
        student: logits [B, classes].
        teacher: logits [B, classes].
        temperature: T.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def optimizer_of(
    model: nn.Module, phase: Phase, trained: Sequence[Sequence[str]] | None = None
) -> torch.optim.Optimizer:
    """The phase's optimizer; biases and norms (parameters of one dimension) do not decay.

    Args:
        model: whose parameters are trained.
        phase: which optimizer, at which rate.
        trained: names of the parameters of each group, in their order; by default all that want a gradient.
    """
    known = dict(model.named_parameters())
    if trained is None:
        wanted = [name for name, parameter in known.items() if parameter.requires_grad]
        trained = [[n for n in wanted if known[n].ndim > 1], [n for n in wanted if known[n].ndim <= 1]]
    decays = (phase.weight_decay, 0.0)
    groups = [
        {"params": [(name, known[name]) for name in names], "weight_decay": decay}
        for names, decay in zip(trained, decays, strict=False)
        if names
    ]
    if phase.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=phase.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=phase.lr, fused=True)


def trained_in(state: Mapping[str, Any]) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups of a checkpoint."""
    return [list(group["param_names"]) for group in state["optimizer"]["param_groups"]]


def _placed(masks: MaskSet, device: torch.device) -> MaskSet:
    return MaskSet({name: replace(layer, mask=layer.mask.to(device)) for name, layer in masks.items()})
