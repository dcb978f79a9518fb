"""Pruning in Lightning's Trainer, whichever of its two names it is used by, with automatic or manual optimization.

The pruner's state is the callback's own in Lightning's checkpoints. It is there before the optimizer is, so it waits
until :meth:`LightningPruning.on_fit_start`.
"""

import logging
import math
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import nn

from tritprune.errors import CheckpointError, ConfigError
from tritprune.integrations.late import LatePruner, unfinished
from tritprune.pruners import Pruner

_NAMES = ("lightning.pytorch", "pytorch_lightning")
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")

_log = logging.getLogger(__name__)


def _callback_classes() -> tuple[type, ...]:
    """``Callback`` of each name of Lightning that is in use; where none is yet, of the first that is installed.

    Raises:
        ModuleNotFoundError: none is.
    """
    names = [name for name in _NAMES if sys.modules.get(name) is not None]
    if not names:
        names = [name for name in _NAMES if find_spec(name.partition(".")[0]) is not None][:1]
    if not names:
        raise ModuleNotFoundError("neither lightning nor pytorch_lightning is installed", name="lightning")
    return tuple(import_module(name).Callback for name in names)


class LightningPruning(*_callback_classes()):
    """Prunes a LightningModule while it trains, and resumes with it bit for bit.

    Sparsity is logged as ``sparsity`` and ``sparsity_target``.

    Args:
        pruner: a pruner's name, or a pruner made from the LightningModule.
        total_steps: optimizer steps of the whole training; needed for fractions with manual optimization, where only
            the module knows when it steps.
        settings: those of the pruner; ``start_step`` and ``end_step`` are optimizer steps, fractions of training (0.6)
            or epochs (``"2ep"``).

    Raises:
        UnknownNameError: no pruner of that name.
        ConfigError: settings beside a pruner that has its own.

    Example:
        >>> pruning = LightningPruning(pattern="4x1", target_sparsity=0.9, start_step=0.1, end_step=0.7)
        >>> Trainer(max_epochs=3, callbacks=[pruning]).fit(module, data)  # doctest: +SKIP
    """

    def __init__(self, pruner: str | Pruner = "iterative", *, total_steps: int | None = None, **settings: Any) -> None:
        super().__init__()
        self._late = LatePruner("LightningPruning", pruner, settings)
        self._total_steps = total_steps
        self._waiting: Mapping[str, Any] | None = None
        self._modes: dict[nn.Module, bool] = {}
        self.pruner: Pruner | None = None
        """The pruner, from the beginning of training on."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget a state that a validation or a test has loaded."""
        self._waiting = None

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state."""
        return {} if self.pruner is None else {"pruner": self.pruner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what :meth:`state_dict` gave until the optimizer is there."""
        self._waiting = state_dict.get("pruner")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the pruner, take up its state where Lightning resumes, and attach it to the optimizer of its layers.

        Raises:
            ConfigError: a second use, a step past the end, no optimizer with the layers, sharded weights.
        """
        if self.pruner is not None and self._waiting is None:
            raise ConfigError(
                f"this LightningPruning has pruned already, up to step {self.pruner.step}; make a new one for another "
                "training"
            )
        strategy = type(trainer.strategy).__name__
        if strategy in _SHARDED:
            raise ConfigError(f"LightningPruning does not work with {strategy}, which shards the weights")
        total, per_epoch, total_is = self._lengths(trainer, pl_module)
        self.pruner = self._late.make(pl_module, total_steps=total, steps_per_epoch=per_epoch, total_is=total_is)
        if self.pruner.calibrating and trainer.gradient_clip_val:
            raise ConfigError(
                "pruner 'retrain_free' calibrates on the gradients of the first steps, which Lightning clips: set "
                "gradient_clip_val=None, or call pruner.calibrate(...) before training"
            )
        if self._waiting is not None:
            self.pruner.load_state_dict(self._waiting)
        self.pruner.attach(trainer.optimizers)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning has loaded its checkpoint by now: the pruner's state must have been in it.

        Raises:
            CheckpointError: it was not.
        """
        if trainer.global_step and self._waiting is None:
            raise CheckpointError(
                f"Lightning resumes at step {trainer.global_step} from a checkpoint without a pruner's state: it was "
                "written without LightningPruning"
            )
        self._waiting = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Evaluation mode, without dropout, for what the pruner calibrates on."""
        assert self.pruner is not None
        if self.pruner.calibrating and not self._modes:
            self._modes = {module: module.training for module in pl_module.modules()}
            pl_module.eval()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the sparsity; after the last batch of a calibration the modules get their own modes back."""
        assert self.pruner is not None
        if not self.pruner.calibrating:
            self._restore_modes()
        values = {
            "sparsity": self.pruner.current_sparsity_ratio,
            "sparsity_target": self.pruner.target_at(self.pruner.step),
        }
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Detach."""
        assert self.pruner is not None
        self._restore_modes()
        self.pruner.detach()
        sentence = unfinished(self.pruner)
        if sentence is not None:
            _log.warning(sentence)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Detach, so that training can go on from a checkpoint."""
        self._restore_modes()
        if self.pruner is not None:
            self.pruner.detach()

    def _restore_modes(self) -> None:
        for module, training in self._modes.items():
            module.training = training
        self._modes = {}

    def _lengths(self, trainer: Any, pl_module: Any) -> tuple[int | None, int | None, str]:
        """Optimizer steps of training and of an epoch, as far as they are known, and what the first is called."""
        if self._total_steps is not None:
            return self._total_steps, None, "total_steps"
        if not pl_module.automatic_optimization:
            return None, None, "total_steps"
        total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
        per_epoch = None if math.isinf(batches) else max(1, math.ceil(batches / trainer.accumulate_grad_batches))
        return None if math.isinf(total) else int(total), per_epoch, "the Trainer's optimizer steps"
