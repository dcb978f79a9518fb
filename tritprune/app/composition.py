"""From config values to objects, and what was composed in a dozen lines."""

from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table
from torch import nn

from tritprune.errors import ConfigError
from tritprune.pruners import Pruner, get_pruner
from tritprune.schedules import resolve_step
from tritprune.tasks import Task
from tritprune.training.loop import Run
from tritprune.training.settings import TrainingSettings


class PrunerMaker:
    """model -> pruner, from the config's pruner, criterion, pattern and schedule."""

    def __init__(self, config: Mapping[str, Any], settings: TrainingSettings, task: Task) -> None:
        self._config, self._settings, self._task = config, settings, task

    def __call__(self, model: nn.Module, **replaced: Any) -> Pruner:
        """Build the pruner; ``criterion=`` replaces the composed one in every group.

        Raises:
            ConfigError, BudgetError: settings that are unknown, out of range or contradict each other.
        """
        values = {key: self._config[key] for key in ("criterion", "pattern", "schedule")} | dict(self._config["pruner"])
        values |= {"seed": self._config["seed"]} | replaced
        total = self._settings.prune.steps
        per_epoch = max(1, self._task.n_train // self._settings.batch_size)
        for settings in (values, *(dict(g) for g in values.get("groups") or ())):
            for key in ("start_step", "end_step"):
                if settings.get(key) is not None:
                    settings[key] = resolve_step(settings[key], total_steps=total, steps_per_epoch=per_epoch)
                    if settings[key] > total:
                        raise ConfigError(
                            f"pruner.{key}={settings[key]} is past the end of training, training.prune.steps={total}"
                        )
        if replaced and values.get("groups"):
            values["groups"] = [{**group, **replaced} for group in values["groups"]]
        return get_pruner(values, model=model)


def composition(config: Mapping[str, Any], run: Run, pruner: Pruner) -> Table:
    """What was composed, in a dozen lines."""
    settings, chosen = run.settings, config["pruner"]
    table = Table(
        title=f"tritprune {config['name']}", title_justify="left", show_header=False, box=None, padding=(0, 2)
    )
    table.add_column(style="bold")
    table.add_column()
    task = run.task
    table.add_row("task", f"{task.description}")
    table.add_row(
        "data",
        f"{task.n_train:,} to train on, {task.n_eval:,} held out, {len(task.labels)} classes, "
        f"hash {task.data_hash[:12]}",
    )
    for group in chosen["groups"] or [{}]:
        merged = {**config, **chosen, **group}
        label = f"prune {group['name']}" if group.get("name") else "prune"
        table.add_row(
            label,
            f"{_brief(merged['criterion'])}, pattern {_brief(merged['pattern'])}, {merged['scope']} scope, "
            f"target sparsity {merged['target_sparsity']:g}, {_brief(merged['schedule'])} schedule",
        )
    elements = sum(layer.elements for layer in pruner.layers)
    table.add_row(
        "layers", f"{len(pruner.layers)} with {elements:,} weights are pruned, {len(pruner.excluded)} left out"
    )
    end = pruner.final_step
    distillation = f", distilled (weight {settings.distillation.weight:g})" if settings.distillation.weight else ""
    table.add_row(
        "steps",
        f"{settings.dense.steps} dense, {end} prune, {settings.prune.steps - end} recover, "
        f"batch {settings.batch_size}{distillation}",
    )
    slimmer = "slim by traced graph, with certificate" if config["slimmer"]["tracer"] else "no slimming"
    table.add_row("then", slimmer + (", random-mask control" if config["control"] else ""))
    processes = f", {run.accelerator.num_processes} processes" if run.accelerator.num_processes > 1 else ""
    table.add_row(
        "on", f"{run.device}, {settings.precision}, {torch.get_num_threads()} threads, seed {run.seed}{processes}"
    )
    table.add_row("folder", str(run.folder.path))
    return table


def _brief(part: Any) -> str:
    """A group's config in a word or two: its name and what makes it special."""
    if not isinstance(part, Mapping):
        return str(part)
    if part["name"] == "block":
        return f"{part['n']}x{part['m']}"
    if part["name"] == "n_in_m":
        return f"{part['n']}:{part['m']}"
    return str(part["name"])
