"""Pruning in Hugging Face's Trainer.

The pruner's state is ``tritprune.pt`` in each of the Trainer's checkpoint folders, beside ``optimizer.pt``. A callback
is not told which folder the Trainer resumes from, so the file has the SHA-256 of the weights that it belongs to, and
only one that fits the weights that were loaded is taken.
"""

import hashlib
import logging
import os
import pickle
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tritprune.errors import CheckpointError, ConfigError
from tritprune.integrations.late import LatePruner, unfinished
from tritprune.pruners import Pruner

STATE_FILE = "tritprune.pt"

_log = logging.getLogger(__name__)
_at_work: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[TransformersPruning]]" = weakref.WeakKeyDictionary()


class TransformersPruning(TrainerCallback):
    """Prunes the model of a ``transformers.Trainer`` while it trains, and resumes with it bit for bit.

    Sparsity is in the Trainer's logs as ``sparsity`` and ``sparsity_target``. With :meth:`add_to` it is there before
    wandb, TensorBoard and the like are told; as one of ``Trainer(callbacks=[...])`` it comes after them, and is in
    ``state.log_history`` and on the console.

    Args:
        pruner: a pruner's name, or a pruner made from the Trainer's model.
        resume_from: the folder of the checkpoint, where it is neither ``output_dir/checkpoint-N`` nor
            ``args.resume_from_checkpoint``.
        settings: those of the pruner; ``start_step`` and ``end_step`` are optimizer steps, fractions of training (0.6)
            or epochs (``"2ep"``).

    Raises:
        UnknownNameError: no pruner of that name.
        ConfigError: settings beside a pruner that has its own.

    Example:
        >>> pruning = TransformersPruning(pattern="4x1", target_sparsity=0.9, start_step=0.1, end_step=0.7)
        >>> Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        pruner: str | Pruner = "iterative",
        *,
        resume_from: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        self._late = LatePruner("TransformersPruning", pruner, settings)
        self._resume_from = resume_from
        self._still: Any = None
        self.pruner: Pruner | None = None
        """The pruner, from the beginning of training on."""

    def add_to(self, trainer: Trainer) -> "TransformersPruning":
        """Put this before the callbacks that report, so that they are told the sparsity."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make the pruner, take up its state where the Trainer resumes, and attach it.

        Raises:
            ConfigError: a second use, a step past ``max_steps``, an optimizer without the layers, a way of training
                that cannot be followed.
            CheckpointError: the Trainer resumes, and there is no state of the pruner that fits.
        """
        self._check_use(args, state, model)
        self.pruner = self._late.make(
            model,
            total_steps=state.max_steps,
            steps_per_epoch=_steps_per_epoch(args, train_dataloader),
            total_is="the Trainer's max_steps",
        )
        if self.pruner.calibrating and args.max_grad_norm:
            raise ConfigError(
                "pruner 'retrain_free' calibrates on the gradients of the first steps, which the Trainer clips: set "
                "max_grad_norm=0, or call pruner.calibrate(...) before training"
            )
        if state.global_step:
            self._restore(args, state)
        self.pruner.attach(optimizer)
        _at_work[model] = weakref.ref(self)
        if self.pruner.calibrating:  # the Trainer sets training mode right before each forward pass
            self._still = model.register_forward_pre_hook(_evaluate)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave evaluation mode to the Trainer again once calibration has chosen the masks."""
        if self.pruner is not None and not self.pruner.calibrating:
            self._stir()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the sparsity."""
        if self.pruner is None or not self.pruner.attached:
            return
        values = {
            "sparsity": self.pruner.current_sparsity_ratio,
            "sparsity_target": self.pruner.target_at(self.pruner.step),
        }
        for record in (logs, *state.log_history[-1:]):
            if record is not None:
                record.update(values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the pruner's state into the checkpoint folder, in one move."""
        if self.pruner is not None and args.should_save:
            _write(self.pruner, _checkpoint(args, state) / STATE_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach, with the masks of the weights that the Trainer leaves behind.

        Raises:
            CheckpointError: the best model was loaded, and the state of its masks cannot be.
        """
        self._stir()
        if self.pruner is None:
            return
        self.pruner.detach()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.pruner.load_state_dict(_read(Path(state.best_model_checkpoint) / STATE_FILE)["pruner"])
            if self.pruner.step < self.pruner.final_step:
                _log.warning("load_best_model_at_end chose a model that was not pruned to the end yet")
        sentence = unfinished(self.pruner)
        if sentence is not None:
            _log.warning(sentence)

    def _stir(self) -> None:
        """No longer keep the model in evaluation mode."""
        if self._still is not None:
            self._still.remove()
            self._still = None

    def _check_use(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Refuse what would go wrong later."""
        self._stir()  # an interrupted training did not come to its end
        if self.pruner is not None:
            if not state.global_step:
                raise ConfigError(
                    f"this TransformersPruning has pruned already, up to step {self.pruner.step}; "
                    "make a new one for another training, and list it once"
                )
            self.pruner.detach()  # an interrupted training that resumes from a checkpoint
        other = _at_work[model]() if model in _at_work else None
        if other is not None and other is not self and other.pruner is not None and other.pruner.attached:
            raise ConfigError(
                "another TransformersPruning is at work on this model; one with groups=[...] prunes layers differently"
            )
        for what, used in (
            ("DeepSpeed", args.deepspeed),
            ("FSDP", args.fsdp),
            ("auto_find_batch_size (it begins training anew on the model as it is then)", args.auto_find_batch_size),
            ("a hyperparameter search (each of its trials needs a pruner of its own)", state.is_hyper_param_search),
        ):
            if used:
                raise ConfigError(f"TransformersPruning does not work with {what}")

    def _restore(self, args: TrainingArguments, state: TrainerState) -> None:
        """Take up the state that belongs to the weights that the Trainer has loaded."""
        assert self.pruner is not None
        given = [self._resume_from, args.resume_from_checkpoint]
        folders = [Path(folder) for folder in given if isinstance(folder, str | os.PathLike)]
        weights, found = fingerprint(self.pruner), []
        for path in dict.fromkeys(folder / STATE_FILE for folder in (*folders, _checkpoint(args, state))):
            if not path.is_file():
                found.append(f"{path} is not there")
                continue
            saved = _read(path)
            if saved["weights"] == weights:
                self.pruner.load_state_dict(saved["pruner"])
                return
            found.append(f"{path} is of other weights")
        pattern = f"{PREFIX_CHECKPOINT_DIR}-*/{STATE_FILE}"
        whole = sorted(str(path.parent) for path in Path(args.output_dir or ".").glob(pattern))
        raise CheckpointError(
            f"the Trainer resumes at step {state.global_step} and the pruner's state for it was not found: "
            f"{'; '.join(found)}. That checkpoint was written without this callback, or not to its end. "
            f"Checkpoints with a pruner's state: {', '.join(whole) or 'none'}; resume from one of them, or name "
            "another folder with TransformersPruning(resume_from=...)"
        )


def fingerprint(pruner: Pruner) -> str:
    """SHA-256 over the names and bits of the weights that are pruned."""
    digest = hashlib.sha256()
    for name, module in pruner.modules.items():
        weight = getattr(module, "weight").detach().cpu().contiguous()  # noqa: B009 (a Tensor or a Module, to types)
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(memoryview(weight.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _evaluate(module: nn.Module, inputs: Any) -> None:
    """A forward pre-hook: no dropout in what a pruner calibrates on."""
    module.eval()


def _steps_per_epoch(args: TrainingArguments, loader: Any) -> int | None:
    """As the Trainer counts them; None if its data has no length."""
    try:
        batches = len(loader)
    except TypeError:
        return None
    return max(1, -(-batches // args.gradient_accumulation_steps))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _write(pruner: Pruner, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save({"weights": fingerprint(pruner), "pruner": pruner.state_dict()}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read(path: Path) -> dict[str, Any]:
    """What :func:`_write` wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return {key: saved[key] for key in ("weights", "pruner")}
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the pruner's state at {path} cannot be read: {error}") from error
