"""Builds a Run without hydra, for tests of the loop and the driver."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from tritprune.pruners import Pruner
from tritprune.tasks import Task
from tritprune.tracking import get_tracker
from tritprune.training.checkpoint import RunFolder
from tritprune.training.driver import Driver, Plan
from tritprune.training.loop import Run
from tritprune.training.progress import Progress
from tritprune.training.settings import Distillation, Phase, TrainingSettings


def settings(**changes: Any) -> TrainingSettings:
    """Tiny phases with plain SGD at a dyadic rate."""
    values: dict[str, Any] = {
        "dense": Phase(steps=6, lr=0.125, optimizer="sgd", warmup=0.0, lr_schedule="constant", weight_decay=0.0),
        "prune": Phase(steps=16, lr=0.125, optimizer="sgd", warmup=0.0, lr_schedule="constant", weight_decay=0.0),
        "batch_size": 8,
        "clip": None,
        "eval_every": 8,
        "checkpoint_every": 4,
        "device": "cpu",
        "latency_repeats": 2,
        "latency_batches": (1,),
        "distillation": Distillation(),
    }
    return TrainingSettings(**{**values, **changes})


def make_run(folder: Path, task: Task, options: TrainingSettings, *, seed: int = 0, stop: Any = None) -> Run:
    """A run that says nothing and tracks nothing."""
    return Run(
        name="test",
        command="python -m tritprune",
        folder=RunFolder(folder),
        task=task,
        settings=options,
        seed=seed,
        tracker=get_tracker("none"),
        progress=Progress(Console(quiet=True)),
        accelerator=Accelerator(
            cpu=True,
            gradient_accumulation_steps=options.accumulate,
            mixed_precision={"fp32": "no"}.get(options.precision, options.precision),
        ),
        stop_requested=stop or (lambda: None),
    )


def make_driver(
    run: Run, cache: Path, *, tracer: str | None = None, control: str | None = None, **pruner: Any
) -> Driver:
    """A driver with a 2x1 pruner of three quarters."""
    values = {
        "pattern": "2x1",
        "target_sparsity": 0.75,
        "end_step": 12,
        "frequency": 2,
        "exclude_head": False,
        **pruner,
    }

    def make_pruner(model: Any, **replaced: Any) -> Pruner:
        return Pruner(model, **{**values, **replaced})

    return Driver(run, Plan(make_pruner=make_pruner, config={}, cache=cache, tracer=tracer, control=control))
