"""One run from its config: all is built and checked before anything is spent, and however it ends is recorded."""

import json
import shlex
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from rich.console import Console
from rich.text import Text

from tritprune.app.composition import PrunerMaker, composition, inline_files, renamed
from tritprune.app.foresight import foresee
from tritprune.app.plan_view import plan_view
from tritprune.app.signals import StopRequest, stop_signals
from tritprune.app.verdict_view import verdict_view
from tritprune.errors import CheckpointError, ConfigError, InterruptedRunError, RunFolderError, TritpruneError
from tritprune.export import require
from tritprune.kernels import set_backend
from tritprune.registry import did_you_mean
from tritprune.report import console_epilogue, console_table, write_report
from tritprune.slimming.graph import TRACERS
from tritprune.tasks import get_task
from tritprune.tracking import Tracker, get_tracker
from tritprune.training.checkpoint import RESULT, RunFolder, find_resumable, fingerprint, write_json
from tritprune.training.driver import Driver, Plan, starting_model
from tritprune.training.loop import Run, agree
from tritprune.training.progress import Progress
from tritprune.training.provenance import git_state
from tritprune.training.settings import TrainingSettings
from tritprune.training.verification import verify_run

REFUSED, FAILED = 2, 1
# A run's numbers do not depend on these, so that a resumed run may change them.
SLIMMER_KEYS = ("tracer", "save_as", "uniform", "round_to", "auto")
BESIDE_THE_NUMBERS = ("run_dir", "resume", "cache_dir", "debug", "tracker", "plugins", "job", "plan", "verify")


def run_and_tell(config: dict[str, Any], overrides: list[str], console: Console) -> int:
    """One run from a plain config: everything that goes wrong becomes a message and an exit status."""
    words = [word for word in overrides if not word.startswith("resume=")]
    if config["run_dir"] and not any(word.startswith("run_dir=") for word in words):
        words.append(f"run_dir={config['run_dir']}")  # a job of a sweep: alone, it goes on in its own folder
    command = shlex.join(["python", "-m", "tritprune", *words])
    attempt = Attempt(config, command, overrides, console)
    stop = StopRequest()
    try:
        if config["plan"]:
            attempt.show_plan()
            return 0
        if config["verify"]:
            return attempt.verify()
        with stop_signals(stop, console):
            attempt.execute(stop)
        return 0
    except InterruptedRunError as error:
        attempt.close("interrupted", str(error))
        console.print(Text(str(error), style="yellow"))
        return stop.status
    except KeyboardInterrupt:
        attempt.close("interrupted", "stopped at once by a second signal")
        console.print(
            Text(f"stopped at once; the last checkpoint is whole. Go on with:  {command} resume=auto", style="yellow")
        )
        return 130
    except Exception as error:  # the one place where everything ends: told to the user, kept in the run folder
        if config["debug"]:
            console.print_exception()
        known = isinstance(error, TritpruneError | OSError)
        text = str(error) if known else f"{type(error).__name__}: {error}"
        console.print(Text(f"error: {text}", style="red"))
        where = attempt.close("failed", text, traceback.format_exc())
        if not known:
            console.print(
                f"this is a defect of tritprune or of a plugin; the traceback is in {where} (or use debug=true)"
            )
        return FAILED if attempt.started_training or not known else REFUSED


class Attempt:
    """One run, from config to result.

    Args:
        config: the composed config, resolved.
        command: how to call it again.
        overrides: the command line's words.
        console: where messages go.
    """

    def __init__(self, config: dict[str, Any], command: str, overrides: list[str], console: Console) -> None:
        self.config, self.command, self.overrides, self.console = config, command, overrides, console
        self.started_training = False
        self._folder: RunFolder | None = None
        self._driver: Driver | None = None
        self._tracker: Tracker | None = None

    def execute(self, stop: StopRequest) -> None:
        """Build everything, check everything, then run."""
        config = self.config
        set_backend(config["kernels"]["backend"])
        settings = self._settings()
        if settings.threads:
            torch.set_num_threads(settings.threads)
        task = get_task(config["task"])
        tracker = get_tracker(config["tracker"])
        make_pruner = PrunerMaker(config, settings, task)
        plan = Plan(
            make_pruner=make_pruner,
            config=config,
            cache=Path(config["cache_dir"]),
            control=config["control"],
            tracer=config["slimmer"]["tracer"],
            init_from=Path(config["init_from"]) if config["init_from"] else None,
            round_to=config["slimmer"].get("round_to", 1),
            uniform=bool(config["slimmer"].get("uniform", False)),
            save_as=tuple(config["slimmer"].get("save_as") or ()),
        )
        AcceleratorState._reset_state()  # one process may run several jobs with different precisions
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(settings.precision, settings.precision),
            gradient_accumulation_steps=settings.accumulate,
            cpu=settings.resolve_device() == "cpu",
        )
        progress = Progress(self.console, silent=not accelerator.is_main_process)
        with progress.status("reading the data"):
            task.prepare()
            if plan.uniform and task.builder()["kind"] != "transformers":
                raise ConfigError(
                    f"slimmer.uniform=true is for models of transformers; task '{task.name}' has a model of its own, "
                    "which tritprune.load loads at any widths"
                )
            model = starting_model(task, config["seed"], plan.init_from)
            pruner = plan.make_pruner(model)
        self._folder = self._choose_folder(progress)
        self._folder.check_room_for(model, trains_after_slim=bool(settings.after_slim))
        self._folder.load_checkpoint("cpu")  # a damaged one is refused now, not after the dense stage
        if self._folder.read_state().get("status") == "finished":
            progress.say(f"already finished: {self._folder.path}")
            return
        run = Run(
            name=config["name"],
            command=self.command,
            overrides=self.overrides,
            job=config["job"],
            folder=self._folder,
            task=task,
            settings=settings,
            seed=config["seed"],
            tracker=tracker,
            progress=progress,
            accelerator=accelerator,
            stop_requested=lambda: stop.reason,
        )
        progress.say(composition(config, run, pruner, make_pruner.auto))
        self._driver = Driver(run, plan)
        self._tracker = tracker
        if accelerator.is_main_process:
            self._folder.write_state(status="running", fingerprint=self._fingerprint(), command=self.command)
            label = f"{config['name']}-{self._folder.path.name}"
            tracker.start(self._folder.path, config, name=label, tags=[task.name], git=git_state())
        self.started_training = True
        result = self._driver.execute()
        if accelerator.is_main_process:
            progress.say(console_table(result))
            tracker.finish()
            progress.say(console_epilogue(result, self._folder.path))

    def show_plan(self) -> None:
        """Say what the run would prune; no data is read, nothing is trained, no folder is made."""
        config = self.config
        _one_of("plan", config["plan"], (False, True, "json"))
        settings = self._settings()
        task = get_task(config["task"])
        init_from = Path(config["init_from"]) if config["init_from"] else None
        model = starting_model(task, config["seed"], init_from)
        plan = PrunerMaker(config, settings, task, ahead=True)(model).plan()
        foresights = foresee(model, plan, task.placeholder_inputs()) if config["slimmer"]["tracer"] else []
        if config["plan"] == "json":
            self.console.print_json(json.dumps({**asdict(plan), "slimmer": [asdict(one) for one in foresights]}))
            return
        words = [word for word in shlex.split(self.command) if not word.startswith("plan=")]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        for part in plan_view(plan, foresights, parameters, shlex.join(words)):
            self.console.print(part)

    def _settings(self) -> TrainingSettings:
        """Take in plugins and files, and refuse what is wrong by itself: of a run and of its plan alike."""
        config = self.config
        for plugin in config["plugins"]:
            _import_plugin(plugin)
        inline_files(config)
        settings = TrainingSettings.from_config(config["training"])
        _one_of("control", config["control"], (None, "random"))
        _check_slimmer(config["slimmer"], settings.after_slim)
        return settings

    def verify(self) -> int:
        """Hold a finished run against its records and show a verdict on each; the exit status."""
        for plugin in self.config["plugins"]:
            _import_plugin(plugin)
        folder = Path(str(self.config["verify"]))
        findings = verify_run(folder, tuple(self.config["plugins"]))
        self.console.print(verdict_view(folder, findings))
        return 0 if all(finding.holds for finding in findings) else FAILED

    def close(self, status: str, error: str, trace: str = "") -> Path | None:
        """Leave a run that did not finish in a state that says so; where the traceback is."""
        log = None if self._folder is None else self._folder / "error.log"
        try:
            if self._driver is None and self.config["job"] is not None:
                self._note_refusal(status, error)
            if self._folder is not None and log is not None:
                self._folder.write_state(status=status, error=error)
                if trace:
                    log.write_text(trace, encoding="utf-8")
                if self._driver is not None:
                    write_json(self._folder / RESULT, self._driver.describe(status, error))
                    write_report(self._folder.path)
        except OSError:
            pass  # the folder itself is what failed; the message on the screen has said so
        if self._tracker is not None:
            self._tracker.finish(failed=True)
        return log

    def _note_refusal(self, status: str, error: str) -> None:
        """A job of a sweep that was refused before it had a run: the sweep's table has to name it."""
        folder = RunFolder(Path(self.config["run_dir"]))
        record = {"format": 1, "name": self.config["name"], "command": self.command, "status": status, "error": error}
        write_json(folder / RESULT, {**record, "overrides": self.overrides, "job": self.config["job"]})

    def _fingerprint(self) -> str:
        return fingerprint({k: v for k, v in self.config.items() if k not in BESIDE_THE_NUMBERS})

    def _choose_folder(self, progress: Progress) -> RunFolder:
        """A new folder, or the one to resume; the same on every process."""
        config, wanted = self.config, self._fingerprint()
        parent = Path("outputs") / config["name"]
        given = Path(config["run_dir"]) if config["run_dir"] else None
        resume = config["resume"]
        if resume not in (None, "auto"):
            folder = RunFolder(Path(resume)) if Path(resume).is_dir() else None
            if folder is None or not folder.read_state():
                raise CheckpointError(
                    f"resume={resume}: no run is there; resume=auto finds the newest one of this config"
                )
            if folder.read_state().get("fingerprint") != wanted:
                raise ConfigError(
                    f"resume={resume}: that run was started with another config; call it as it was started:\n"
                    f"  {folder.read_state().get('command')} resume={resume}"
                )
            return folder
        if resume == "auto":
            found = given if given is not None else find_resumable(parent, wanted)
            if found is not None and found.is_dir() and RunFolder(found).read_state().get("fingerprint") == wanted:
                return RunFolder(agree(found))
            progress.say("resume=auto: no unfinished run of this config; starting a new one")
        path = agree(given or parent / time.strftime("%Y-%m-%d_%H-%M-%S"))
        if given is not None and (given / "run.json").exists():
            raise RunFolderError(
                f"run_dir={given} holds a run already; add resume=auto to go on with it, or choose another"
            )
        return RunFolder(path)


def _import_plugin(name: str) -> None:
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"plugins: cannot import '{name}' ({error}); it must be importable from here or installed"
        ) from error


def _check_slimmer(values: Mapping[str, Any], after_slim: int | str) -> None:
    """Refuse keys that a slimmer does not have, files that cannot be made here, and settings that contradict."""
    for key in values:
        if key not in SLIMMER_KEYS:
            raise ConfigError(
                renamed(f"slimmer.{key}") or f"slimmer has no key '{key}'; {did_you_mean(key, SLIMMER_KEYS)}"
            )
    _one_of("slimmer.tracer", values["tracer"], (None, *TRACERS))
    round_to = values.get("round_to", 1)
    if type(round_to) is not int or round_to < 1:
        raise ConfigError(f"slimmer.round_to is a whole number from 1 on, got {round_to!r}")
    kinds = values.get("save_as") or ()
    if isinstance(kinds, str):
        raise ConfigError(f"slimmer.save_as is a list, as in slimmer.save_as=[{kinds}]")
    for kind in kinds:
        require(str(kind))
    if after_slim and values["tracer"] is None:
        raise ConfigError(
            f"training.after_slim={after_slim} trains the slim model, and with slimmer=none there is none"
        )
    if after_slim and values.get("uniform"):
        raise ConfigError(
            f"slimmer.uniform=true pads with dead units, which training.after_slim={after_slim} would bring to life; "
            "leave one of them out"
        )


def _one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {name} '{value}'; {did_you_mean(str(value), [str(k) for k in known])}")
