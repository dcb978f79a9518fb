"""The road of a run: dense -> prune -> recover -> slim -> (tune) -> export -> report.

Each stage leaves an artifact in the run folder; a resumed run takes up the artifacts that are there and goes on at the
first stage that is missing one. What a stage does is in the method of its name, in the order in which they run.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritprune.errors import CertificateError, ConfigError, InterruptedRunError, TritpruneError
from tritprune.export import EXPORTERS, FILES, Artifact, even_widths, load_model, loads_with, save_model
from tritprune.pruners import MaskSet, Pruner, SparsityReport, sparsity_of
from tritprune.report import heatmap_png, write_report
from tritprune.slimming import SlimResult, certify, check_saved, slim_model
from tritprune.slimming.latency import measure_together
from tritprune.tasks import Task
from tritprune.training import provenance
from tritprune.training.after_slim import PHASE, SLIM_MASKS, TUNED, TUNING, hand_over, save_tuned
from tritprune.training.checkpoint import (
    CERTIFICATE,
    CONTROL,
    EXPORTS,
    MASKS,
    PRUNED,
    PRUNING,
    RESULT,
    SLIM,
    SLIMMING,
    write_json,
)
from tritprune.training.dense_cache import DenseCache
from tritprune.training.loop import Loop, Run, agree, trained_in


@dataclass(frozen=True)
class Plan:
    """What the driver is to do beside training.

    Args:
        make_pruner: model -> pruner; keyword ``criterion`` replaces the composed criterion (for the control).
        config: the composed config, for the records.
        cache: where dense models are kept.
        control: ``random`` repeats pruning and recovery with random masks at the same budget.
        tracer: how the slimmer reads the model; None leaves out the slimming.
        init_from: folder of a saved model that takes the place of the fine-tuned dense one.
        save_as: further files to make of the slim model: ``onnx``, ``torch_export``.
        round_to: widths that are cut stay multiples of this number.
        uniform: pad the slim model's layers to the same widths, so that ``from_pretrained`` loads it.
    """

    make_pruner: Callable[..., Pruner]
    config: dict[str, Any]
    cache: Path
    control: str | None = None
    tracer: str | None = "jit"
    init_from: Path | None = None
    round_to: int = 1
    uniform: bool = False
    save_as: tuple[str, ...] = ()


def starting_model(task: Task, seed: int, init_from: Path | None) -> nn.Module:
    """The task's fresh model, with the weights of a saved one if there is one to start from.

    Raises:
        CheckpointError: the folder is not a saved model.
        ConfigError: the saved model has other layers or widths (a slim one has).
    """
    model = task.build_model(seed)
    if init_from is not None:
        try:
            model.load_state_dict(load_model(init_from).state_dict())
        except RuntimeError as error:
            if isinstance(error, TritpruneError):
                raise
            raise ConfigError(
                f"init_from={init_from} does not fit task '{task.name}': {' '.join(str(error).split()[:40])}; "
                "start from a dense or pruned/ model of the same task, not from slim/"
            ) from None
    return model


class Driver:
    """Runs the stages.

    Args:
        run: task, settings, folder, tracker and console.
        plan: pruner, cache, control, slimmer.
    """

    def __init__(self, run: Run, plan: Plan) -> None:
        self.run, self.plan = run, plan
        self._seconds: dict[str, float] = {}
        self._started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._cached = False
        self._result: dict[str, Any] = {}

    @property
    def _after_slim(self) -> int:
        """Optimizer steps after slimming."""
        return self.run.settings.steps_after_slim(self.run.task.n_train) if self.plan.tracer else 0

    def execute(self) -> dict[str, Any]:
        """Run every stage; the content of ``result.json``.

        Raises:
            InterruptedRunError: a signal came; the state is saved and the message says how to go on.
            TritpruneError: whatever a stage refuses; ``result.json`` and the report say so.
        """
        dense, dense_metrics = self._timed("dense", self.dense)
        pruned = self._timed("prune", self.prune, dense)
        if self.plan.control:
            self._timed("control", self.control, dense)
        models = {"dense": dense, PRUNED: pruned}
        if self.plan.tracer:
            models[SLIM] = self._timed("slim", self.slim, pruned)
            if self._after_slim:
                models[TUNED] = self._timed("tune", self.tune, dense)
        if self.run.is_main:
            if self.plan.save_as:
                self._timed("export", self.export, *list(models.items())[-1])
            self._timed("report", self.report, models, dense_metrics)
        self.run.accelerator.wait_for_everyone()
        return self._result

    def dense(self) -> tuple[nn.Module, dict[str, float]]:
        """Fine-tune the dense model, or take it from the cache or from where the user says."""
        if self.plan.init_from is not None:
            model = starting_model(self.run.task, self.run.seed, self.plan.init_from)
            self.run.progress.say(f"dense    none: this run starts from {self.plan.init_from}")
            return model.eval(), self.run.task.evaluate(model.to(self.run.device), device=self.run.device)
        run, cache = self.run, DenseCache(self.plan.cache)
        key = cache.key(run.task, run.settings, run.seed, run.accelerator.num_processes)
        known = cache.load(key) if agree(cache.path(key).exists()) else None
        if known is not None:
            self._cached = True
            run.progress.say(f"dense    taken from {cache.path(key)} (same task, data, seed and settings)")
            return known
        model = run.task.build_model(run.seed)
        loop = Loop(run, model, run.settings.dense, name="dense")
        self._restore(loop)
        loop.fit()
        metrics = run.task.evaluate(model, device=run.device)
        if run.is_main:
            cache.save(key, model, run.task, metrics)
            run.folder.drop_checkpoint()
        run.accelerator.wait_for_everyone()
        return model.eval(), metrics

    def prune(self, dense: nn.Module) -> nn.Module:
        """Prune while training, then recover with the masks fixed; leaves ``pruned/`` and the masks."""
        run = self.run
        if agree((run.folder / PRUNING).exists()):
            run.progress.say("prune    done already: taken from the run folder")
            return load_model(run.folder / PRUNED)
        model, pruner = self._pruning_phase(dense, "prune", criterion=None)
        if run.is_main:
            metrics = run.task.evaluate(model, device=run.device)
            pruner.masks.save(run.folder / MASKS)
            save_model(model, run.folder / PRUNED, builder=run.task.builder(), extra={"metrics": metrics})
            if self._after_slim:
                run.folder.keep_checkpoint()
            write_json(run.folder / PRUNING, _pruning_record(pruner, metrics))
            run.folder.drop_checkpoint()
        run.accelerator.wait_for_everyone()
        return model.eval()

    def control(self, dense: nn.Module) -> None:
        """The same budget, schedule and number of steps with random masks: what the criterion is worth."""
        run = self.run
        if agree((run.folder / CONTROL).exists()):
            return
        model, pruner = self._pruning_phase(dense, "control", criterion=self.plan.control)
        if run.is_main:
            metrics = run.task.evaluate(model, device=run.device)
            write_json(run.folder / CONTROL, _pruning_record(pruner, metrics))
            run.folder.drop_checkpoint()
        run.accelerator.wait_for_everyone()

    def _pruning_phase(self, dense: nn.Module, name: str, criterion: str | None) -> tuple[nn.Module, Pruner]:
        run = self.run
        model = run.task.build_model(run.seed)
        model.load_state_dict(dense.state_dict())
        pruner = self.plan.make_pruner(model.to(run.device), **({"criterion": criterion} if criterion else {}))
        phase, offset = run.settings.prune_and_after(run.task.n_train), run.settings.dense.steps
        part = range(phase.steps - self._after_slim)
        if name == "control":
            part, offset = range(phase.steps), offset + phase.steps
        loop = Loop(run, model, phase, name=name, offset=offset, pruner=pruner, teacher=dense, part=part)
        self._restore(loop)
        loop.fit()
        return model, pruner

    def _restore(self, loop: Loop) -> None:
        """Take up this phase where an interrupted run left it; another phase's checkpoint is not for this one."""
        state = self.run.folder.load_checkpoint(str(self.run.device))
        if state is not None and state["phase"] == loop.name:
            loop.restore(state)
            if loop.step > loop.part.start:
                self.run.progress.say(f"{loop.stage:<8} resumed at step {loop.step} of {loop.last}")

    def slim(self, pruned: nn.Module) -> nn.Module:
        """Cut what is dead and prove that the outputs stay the same; leaves ``slim/`` and the certificate.

        What is handed on is the saved model, loaded afresh and held against the certificate: what is delivered was
        proved.
        """
        run = self.run
        if run.is_main and not self._is_cut():
            self._cut(pruned.cpu().eval())
        run.accelerator.wait_for_everyone()
        model = load_model(run.folder / SLIM)
        if not check_saved(model, run.folder.path):
            raise CertificateError(
                f"the model saved in {run.folder / SLIM} does not give the outputs of its certificate, "
                f"{run.folder / CERTIFICATE}"
            )
        return model

    def _is_cut(self) -> bool:
        """Whether an interrupted run has cut already, and left what training goes on from."""
        folder = self.run.folder
        if not (folder / SLIMMING).exists() or not self._after_slim or (folder / TUNING).exists():
            return (folder / SLIMMING).exists()
        state = folder.load_checkpoint("cpu")
        return state is not None and state["phase"] == PHASE

    def _cut(self, model: nn.Module) -> None:
        run, task = self.run, self.run.task
        example = task.model_inputs(task.example_inputs(2))
        result = slim_model(model, example, tracer=self.plan.tracer or "jit", round_to=self.plan.round_to)
        evened: dict[str, Any] | None = None
        if self.plan.uniform:
            result, evened = _evened(model, result)
        save_model(result.model, run.folder / SLIM, builder=task.builder(), widths=result.widths)
        result.certificate.save(run.folder.path, files=[MASKS, *(f"{name}/manifest.json" for name in (PRUNED, SLIM))])
        loads = loads_with(run.folder / SLIM)
        if self._after_slim:
            carried = hand_over(run.folder, model, result, run.settings.prune)
            if carried.approximate:
                named = ", ".join(carried.approximate[:3]) + ", ..." * (len(carried.approximate) > 3)
                run.progress.note(
                    f"{named} took up constants of cut units, which train on as a sum and not one by one as in the "
                    "masked model"
                )
        write_json(run.folder / SLIMMING, _slimming_record(result) | {"loads": loads, "uniform": evened})

    def tune(self, dense: nn.Module) -> nn.Module:
        """Go on training in the slim model where pruning and recovery stopped in the masked one; leaves ``tuned/``."""
        run = self.run
        if agree((run.folder / TUNING).exists()):
            return load_model(run.folder / TUNED)
        state = run.folder.load_checkpoint(str(run.device))
        assert state is not None  # slimming left one
        model, phase = load_model(run.folder / SLIM).to(run.device), run.settings.prune_and_after(run.task.n_train)
        loop = Loop(
            run, model, phase, name=PHASE, offset=run.settings.dense.steps, teacher=dense,
            part=range(phase.steps - self._after_slim, phase.steps), order="prune",
            masks=MaskSet.load(run.folder / SLIM_MASKS), trained=trained_in(state),
        )  # fmt: skip
        self._restore(loop)
        loop.fit()
        if run.is_main:
            metrics = run.task.evaluate(model, device=run.device)
            save_tuned(run.folder, model, builder=run.task.builder(), metrics=metrics)
            run.folder.drop_checkpoint()
        run.accelerator.wait_for_everyone()
        return model.eval()

    def export(self, name: str, model: nn.Module) -> None:
        """Write the final model as the further files that were asked for."""
        made: list[Artifact] = []
        for kind in self.plan.save_as:
            path = self.run.folder / FILES[kind].replace(SLIM, name)
            with self.run.progress.status(f"writing {path.name}"):
                inputs = self.run.task.model_inputs(self.run.task.example_inputs(2))
                made.append(replace(EXPORTERS[kind](model, inputs, path), path=path.name))
        write_json(self.run.folder / EXPORTS, {"files": [vars(artifact) for artifact in made]})

    def report(self, models: dict[str, nn.Module], dense_metrics: dict[str, float]) -> dict[str, Any]:
        """Measure the models side by side and write ``result.json`` and ``report.html``."""
        run, folder, started = self.run, self.run.folder, time.perf_counter()
        pruning = json.loads((folder / PRUNING).read_text(encoding="utf-8"))
        layers = [layer["name"] for layer in pruning["layers"]]
        metrics = {"dense": dense_metrics, "pruned": pruning["metrics"]}
        if SLIM in models:
            metrics[SLIM] = run.task.evaluate(models[SLIM].to(run.device), device=run.device)
        if TUNED in models:
            metrics[TUNED] = json.loads((folder / TUNING).read_text(encoding="utf-8"))["metrics"]
        latency = self._latency(models)
        key = DenseCache(self.plan.cache)
        saved = {
            "dense": self.plan.init_from
            or key.path(key.key(run.task, run.settings, run.seed, run.accelerator.num_processes)),
            **{name: folder / name for name in (PRUNED, SLIM, TUNED)},
        }
        rows = [
            {
                "model": name,
                "metrics": metrics[name],
                "sparsity": _denominators(sparsity_of(model, layers)),
                "parameters": sum(p.numel() for p in model.parameters()),
                "bytes": (saved[name] / "model.safetensors").stat().st_size,
                "latency": latency[name],
            }
            for name, model in models.items()
        ]
        if (folder / CONTROL).exists():
            control = json.loads((folder / CONTROL).read_text(encoding="utf-8"))
            rows.append({"model": "random control", "metrics": control["metrics"], "sparsity": control["sparsity"]})
        slimming, exports = folder / SLIMMING, folder / EXPORTS
        self._seconds["report"] = time.perf_counter() - started
        self._result = {
            **self.describe("finished"),
            "rows": rows,
            "layers": pruning["layers"],
            "excluded": pruning["excluded"],
            "slim": json.loads(slimming.read_text(encoding="utf-8")) if slimming.exists() else None,
            "after_slim": self._after_slim,
            "exports": json.loads(exports.read_text(encoding="utf-8"))["files"] if exports.exists() else [],
        }
        self._publish()
        folder.drop_checkpoints()
        folder.write_state(status="finished", stage="report")
        return self._result

    def describe(self, status: str, error: str | None = None) -> dict[str, Any]:
        """The part of ``result.json`` that every run has, however it ended."""
        run = self.run
        return {
            "format": 1,
            "name": run.name,
            "command": run.command,
            "overrides": run.overrides,
            "job": run.job,
            "status": status,
            "error": error,
            "started": self._started,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": {name: round(value, 2) for name, value in self._seconds.items()},
            "config": self.plan.config,
            "versions": provenance.versions(),
            "git": provenance.git_state(),
            "seed": run.seed,
            "machine": provenance.machine(),
            "data": {
                "task": run.task.name,
                "hash": run.task.data_hash,
                "n_train": run.task.n_train,
                "n_eval": run.task.n_eval,
                "labels": len(run.task.labels),
                "description": run.task.description,
            },
            "dense_cached": self._cached,
            "artifacts": self._artifacts(),
            "rows": [],
            "layers": [],
        }

    def _latency(self, models: dict[str, nn.Module]) -> dict[str, dict[str, Any]]:
        """Milliseconds per forward pass, the models in turn within one run."""
        run, task = self.run, self.run.task
        placed = {name: model.to(run.device).eval() for name, model in models.items()}

        def inputs(batch: int) -> dict[str, torch.Tensor]:
            return {k: v.to(run.device) for k, v in task.model_inputs(task.example_inputs(batch)).items()}

        batches = run.settings.latency_batches
        sizes = " and ".join(map(str, batches))
        with run.progress.status(f"timing {', '.join(models)} in turn, at batch {sizes}"):
            measured = measure_together(placed, inputs, batches=batches, repeats=run.settings.latency_repeats)
        return {
            name: {str(batch): vars(value) for batch, value in by_batch.items()} for name, by_batch in measured.items()
        }

    def _publish(self) -> None:
        """Write the result, the heat map and the report, and hand them to the tracker."""
        run, folder, result = self.run, self.run.folder, self._result
        write_json(folder / RESULT, result)
        heatmap = heatmap_png(folder.path)
        report = write_report(folder.path)
        if result["layers"]:
            columns = list(result["layers"][0])
            run.tracker.table("layers", columns, [[_cell(layer[c]) for c in columns] for layer in result["layers"]])
        if heatmap is not None:
            run.tracker.image("sparsity/heatmap", heatmap)
        run.tracker.artifact("masks", "masks", [folder / MASKS])
        run.tracker.artifact("report", "report", [report, folder / RESULT])
        run.tracker.summary(
            {
                f"{row['model']}/{key}": value
                for row in result["rows"]
                for key, value in {
                    **row["metrics"],
                    "sparsity": row["sparsity"]["prunable"]["zeros"] / max(1, row["sparsity"]["prunable"]["total"]),
                    **({"parameters": row["parameters"], "bytes": row["bytes"]} if "parameters" in row else {}),
                }.items()
            }
        )

    def _artifacts(self) -> dict[str, str]:
        names = {
            "report": "report.html",
            "curves": "curves.jsonl",
            "masks": MASKS,
            "certificate": CERTIFICATE,
            "pruned": PRUNED,
            "slim": SLIM,
            "tuned": TUNED,
            **FILES,
            **{f"{kind}, tuned": file.replace(SLIM, TUNED) for kind, file in FILES.items()},
        }
        found = {name: path for name, path in names.items() if name == "report" or (self.run.folder / path).exists()}
        return found | ({"wandb": self.run.tracker.location} if self.run.tracker.location else {})

    def _timed(self, name: str, stage: Callable[..., Any], *arguments: Any) -> Any:
        reason = self.run.stop_requested()
        if reason:
            raise InterruptedRunError(
                f"stopped by {reason} before the stage '{name}'; what is done is saved in {self.run.folder.path}\n"
                f"go on with:  {self.run.command} resume=auto"
            )
        start = time.perf_counter()
        try:
            return stage(*arguments)
        finally:
            self._seconds[name] = time.perf_counter() - start


def _cell(value: Any) -> Any:
    """A table's cell: a shape is shown as 384x384, everything else as it is."""
    return "x".join(map(str, value)) if isinstance(value, list) else value


def _denominators(report: SparsityReport) -> dict[str, dict[str, int]]:
    counts = {"prunable": report.prunable, "linear_conv": report.linear_conv, "parameters": report.parameters}
    return {name: {"zeros": count.zeros, "total": count.total} for name, count in counts.items()}


def _pruning_record(pruner: Pruner, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "metrics": metrics,
        "layers": pruner.layer_report(),
        "excluded": [{"name": e.name, "reason": e.reason} for e in pruner.excluded],
        "sparsity": _denominators(pruner.sparsity()),
        "digest": pruner.digest(),
    }


def _evened(masked: nn.Module, result: SlimResult) -> tuple[SlimResult, dict[str, Any]]:
    """The slim model with its layers padded to the same widths, proved again; the widths and what they cost."""
    even, said = even_widths(result.model, type(result.model))
    parameters = sum(parameter.numel() for parameter in even.parameters())
    padded = replace(
        result,
        model=even,
        widths={"layers": {}, "attributes": {}},
        certificate=certify(masked, even, result.certificate.given),
        parameters_after=parameters,
    )
    return padded, {"widths": said, "parameters_put_back": parameters - result.parameters_after}


def _slimming_record(result: SlimResult) -> dict[str, Any]:
    return {
        "found": result.found,
        "cuts": [vars(cut) for cut in result.cuts],
        "refused": [vars(refusal) for refusal in result.refused],
        "certificate": result.certificate.summary(),
        "parameters_before": result.parameters_before,
        "parameters_after": result.parameters_after,
    }
