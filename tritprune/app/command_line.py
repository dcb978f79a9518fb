"""The command line: hydra composes each job, jobs run one after the other, a sweep ends in one table.

Exit status: 0 all went well, 1 a run failed, 2 the input was refused before anything was spent, 130 and 143 a run was
stopped by Ctrl-C or SIGTERM with its state saved.
"""

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from tritprune.app.attempt import FAILED, REFUSED, run_and_tell
from tritprune.app.composition import renamed
from tritprune.registry import did_you_mean
from tritprune.report import sweep_table
from tritprune.training.checkpoint import RESULT


@dataclass
class CommandLine:
    """What one call of the program has done so far.

    Args:
        console: where messages go.
        status: the exit status that the call would end with now.
        sweep: the folder of the sweep, if this is one.
    """

    console: Console
    status: int = 0
    sweep: Path | None = None

    def job(self, config: DictConfig) -> None:
        """Run one composed config; hydra calls this once a job."""
        hydra_config = HydraConfig.get()
        overrides = list(hydra_config.overrides.task)
        in_sweep = hydra_config.mode == RunMode.MULTIRUN
        values: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        values["job"] = int(hydra_config.job.num) if in_sweep else None
        if in_sweep:
            self.sweep = Path(hydra_config.sweep.dir)
            values["run_dir"] = values["run_dir"] or str(self.sweep / hydra_config.sweep.subdir)
            swept_first = sorted(overrides, key=sys.argv.__contains__)  # what was swept was not typed as it is here
            self.console.rule(f"job {hydra_config.job.num}: {' '.join(swept_first)}", align="left")
        elif hydra_config.run.dir != ".":
            values["run_dir"] = values["run_dir"] or hydra_config.run.dir  # hydra's own word for the same
        status = run_and_tell(values, overrides, self.console)
        if status in (130, 143):
            sys.exit(status)
        self.status = max(self.status, FAILED if in_sweep and status else status)

    def finish_sweep(self) -> None:
        """One table over the jobs of a sweep, on the screen and in its folder; failed jobs are named."""
        if self.sweep is None:
            return
        found = sorted(self.sweep.glob(f"*/{RESULT}"), key=lambda p: (len(p.parent.name), p.parent.name))
        results = [json.loads(path.read_text(encoding="utf-8")) for path in found]
        table, markdown, csv = sweep_table(results)
        (self.sweep / "sweep.md").write_text(markdown, encoding="utf-8")
        (self.sweep / "sweep.csv").write_text(csv, encoding="utf-8")
        self.console.print(table)
        self.console.print(f"one table over the jobs: {self.sweep / 'sweep.md'}, {self.sweep / 'sweep.csv'}")
        failed = [
            f"{path.parent.name} ({' '.join(result.get('overrides') or [])}): {result.get('error')}"
            for path, result in zip(found, results, strict=True)
            if result["status"] != "finished"
        ]
        if failed:
            self.console.print(Text(f"{len(failed)} of {len(results)} jobs failed:", style="red"))
            for line in failed:
                self.console.print(Text(f"  job {line}", style="red"))


def main(config_tree: Path) -> int:
    """Compose and run what the command line asks for; the exit status."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then hands its errors over instead of printing them its own way
    line = CommandLine(make_console())
    try:
        hydra.main(config_path=str(config_tree), config_name="config", version_base="1.3")(line.job)()
    except (HydraException, OmegaConfBaseException) as error:
        if "debug=true" in sys.argv:
            traceback.print_exc()
        line.console.print(Text(f"error: {explain(error)}", style="red"))
        return REFUSED
    except OSError as error:  # hydra makes the folders that it is told itself
        said = f"error: the run folder {error.filename} cannot be written: {error.strerror or error}"
        line.console.print(Text(f"{said}; choose another with run_dir=...", style="red"))
        return REFUSED
    line.finish_sweep()
    return line.status


def make_console() -> Console:
    """Where messages go: a log gets lines of 100 columns, processes other than the first one say nothing."""
    console = Console(highlight=False, quiet=int(os.environ.get("RANK", "0")) != 0)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 100
    return console


def explain(error: BaseException) -> str:
    """Hydra's and OmegaConf's words, with the choices where they leave them out."""
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        if (said := renamed(str(cause.full_key))) is not None:
            return said
        known = [str(key) for key in cause.parent_node]
        return f"unknown key '{cause.full_key}'; {did_you_mean(str(cause.key), known)}"
    kept = [
        text
        for text in str(error).splitlines()
        if text.strip() and "full_key" not in text and "object_type" not in text
    ]
    return "\n".join(kept)
