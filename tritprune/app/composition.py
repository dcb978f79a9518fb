"""From config values to objects, and what was composed in a dozen lines."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table
from torch import nn

from tritprune.errors import ConfigError
from tritprune.neural_compressor.reading import read
from tritprune.pruners import Pruner, get_pruner, pruners
from tritprune.registry import check_arguments
from tritprune.schedules import resolve_steps
from tritprune.slimming import AutoSlimConfig, parse_auto_slim_config
from tritprune.tasks import Task
from tritprune.training.loop import Run
from tritprune.training.settings import TrainingSettings

STEPS = ("start_step", "end_step")
AXES = ("criterion", "pattern", "schedule")
NEURAL_COMPRESSOR = "neural_compressor"
RENAMED = {"slimmer.export": "slimmer.save_as"}


def renamed(key: str) -> str | None:
    """What to say of a key that has another name now."""
    return f"{key} is called {RENAMED[key]} now" if key in RENAMED else None


def inline_files(config: dict[str, Any]) -> None:
    """Put the contents of a Neural Compressor file in the place of its path: they are part of what the run is.

    Raises:
        ConfigError: the file cannot be read, or has a key that cannot be honoured.
    """
    chosen = config["pruner"]
    if chosen["name"] == NEURAL_COMPRESSOR and isinstance(chosen.get("config"), str):
        shared, groups = read(chosen["config"])
        config["pruner"] = {**chosen, "config": {**shared, "pruning_configs": groups}}


class PrunerMaker:
    """model -> pruner, from the config's pruner, criterion, pattern and schedule.

    Args:
        config: the composed config.
        settings: the training's.
        task: whose model is pruned.
        ahead: a look ahead, for which no data are read: what slimmer=auto runs the model on is made up.
    """

    def __init__(
        self, config: Mapping[str, Any], settings: TrainingSettings, task: Task, *, ahead: bool = False
    ) -> None:
        self._config, self._settings, self._task, self._ahead = config, settings, task, ahead
        self.auto: AutoSlimConfig | None = None

    def __call__(self, model: nn.Module, **replaced: Any) -> Pruner:
        """Build the pruner; ``criterion=`` replaces the composed one in every group.

        Raises:
            ConfigError, BudgetError: settings that are unknown, out of range or contradict each other.
        """
        chosen = dict(self._config["pruner"])
        total = self._settings.prune.steps
        if chosen["name"] == NEURAL_COMPRESSOR:
            if self._config["slimmer"].get("auto"):
                raise ConfigError("slimmer=auto and pruner=neural_compressor both say what is pruned; use slimmer=jit")
            length = {"total_steps": total, "steps_per_epoch": self._epoch()}
            own = {"name": NEURAL_COMPRESSOR, "config": chosen.get("config"), "seed": self._config["seed"]}
            return get_pruner({**own, **length, **replaced}, model)
        if any(key in _fixed(chosen["name"]) and not _names(chosen["name"], key) for key in replaced):
            chosen["name"] = "iterative"  # a control: the same settings but for what is replaced
        values = {key: self._config[key] for key in AXES if _takes(chosen["name"], key)} | chosen
        values |= {"seed": self._config["seed"]} | replaced
        if self._config["slimmer"].get("auto"):
            values["groups"] = [dict(group) for group in self._derived(model, chosen.get("groups"))]
        per_epoch = self._epoch() if _in_epochs(values) else None  # it takes the data, which a look ahead leaves unread
        values = resolve_steps(values, total_steps=total, steps_per_epoch=per_epoch, total_is="training.prune.steps")
        if replaced and values.get("groups"):
            values["groups"] = [{**group, **replaced} for group in values["groups"]]
        return get_pruner(values, model=model)

    def _epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return max(1, self._task.n_train // self._settings.batch_size)

    def _derived(self, model: nn.Module, groups: Any) -> AutoSlimConfig:
        """The groups that slimmer=auto finds in the graph, the same for every model of this run."""
        if groups:
            raise ConfigError("slimmer=auto derives the groups from the graph; leave out pruner.groups, or the auto")
        if self.auto is None:
            settings = dict(self._config["slimmer"]["auto"])
            check_arguments("slimmer.auto", parse_auto_slim_config, {"model": model, **settings})
            device = next(model.parameters()).device
            example = self._task.placeholder_inputs() if self._ahead else self._task.example_inputs(2)
            example = None if example is None else {k: v.to(device) for k, v in example.items()}
            tracer = self._config["slimmer"]["tracer"]
            self.auto = parse_auto_slim_config(model, example_inputs=example, tracer=tracer, **settings)
        return self.auto


def composition(config: Mapping[str, Any], run: Run, pruner: Pruner, auto: AutoSlimConfig | None = None) -> Table:
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
    for group in pruner.groups:
        table.add_row(
            "prune" if len(pruner.groups) == 1 else f"prune {group.name}",
            f"{_brief(group.criterion)}, pattern {_brief(group.pattern)}, {group.scope} scope, "
            f"target sparsity {group.target_sparsity:g}, {_brief(group.schedule)} schedule",
        )
    if chosen["name"] == NEURAL_COMPRESSOR:
        besides = [*AXES, *(key for key in chosen if key not in ("name", "config"))]
        table.add_row("", f"as the Neural Compressor config says; {', '.join(besides)} of this config do not count")
    if auto is not None:
        refused = "; ".join(f"{refusal.where} ({refusal.reason})" for refusal in auto.refused)
        table.add_row("", f"as the graph allows{': all but ' + refused if refused else ', nothing refused'}")
    elements = sum(layer.elements for layer in pruner.layers)
    table.add_row(
        "layers", f"{len(pruner.layers)} with {elements:,} weights are pruned, {len(pruner.excluded)} left out"
    )
    end, after = pruner.final_step, settings.steps_after_slim(task.n_train)
    does = "calibrate" if pruner.calibrating else "prune"
    distillation = f", distilled (weight {settings.distillation.weight:g})" if settings.distillation.weight else ""
    table.add_row(
        "steps",
        f"{settings.dense.steps} dense, {end} {does}, {settings.prune.steps - end} recover, "
        f"{f'{after} more after slimming, ' if after else ''}batch {settings.batch_size}{distillation}",
    )
    slimmer = "slim by traced graph, with certificate" if config["slimmer"]["tracer"] else "no slimming"
    table.add_row("then", slimmer + (", random-mask control" if config["control"] else ""))
    processes = f", {run.accelerator.num_processes} processes" if run.accelerator.num_processes > 1 else ""
    table.add_row(
        "on",
        f"{run.device}, {settings.precision}, {_count(torch.get_num_threads(), 'thread')}, seed {run.seed}{processes}",
    )
    table.add_row("folder", str(run.folder.path))
    return table


def _takes(name: str, key: str) -> bool:
    """Whether a pruner takes this part of the config, rather than having one of its own."""
    parameters = inspect.signature(pruners.get(name)).parameters.values()
    return key not in _fixed(name) and any(p.name == key or p.kind is p.VAR_KEYWORD for p in parameters)


def _names(name: str, key: str) -> bool:
    """Whether a pruner has an argument of this very name."""
    return key in inspect.signature(pruners.get(name)).parameters


def _fixed(name: str) -> Mapping[str, Any]:
    return getattr(pruners.get(name), "fixes", {})


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _in_epochs(values: Mapping[str, Any]) -> bool:
    """Whether a step is said in epochs."""
    said = [settings.get(key) for settings in (values, *(values.get("groups") or ())) for key in STEPS]
    return any(isinstance(step, str) for step in said)


def _brief(part: Any) -> str:
    """A group's config in a word or two: its name and what makes it special."""
    if not isinstance(part, Mapping):
        return str(part)
    if part["name"] == "block":
        return f"{part['n']}x{part['m']}"
    if part["name"] == "n_in_m":
        return f"{part['n']}:{part['m']}"
    return str(part["name"])
