"""What a run leaves on disk, written so that a kill at any moment leaves the old file or the new one, never a half.

The run folder::

    run.json             fingerprint of the config, stage, status: enough to find and resume the run
    checkpoint.pt        weights, optimizer, pruner and position in the stage (gone when the run has finished)
    before_slim.pt       the same at the end of pruning, where training goes on after slimming (gone likewise)
    curves.jsonl         every measured value by step
    pruned/ slim/ tuned/ models, each loads with tritprune.load
    result.json ...      the outcome and its report
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritprune.errors import CheckpointError, RunFolderError

CHECKPOINT, BEFORE_SLIM = "checkpoint.pt", "before_slim.pt"
PRUNED, SLIM, PRUNING, CONTROL, SLIMMING = "pruned", "slim", "pruning.json", "control.json", "slimming.json"
MASKS, CERTIFICATE, RESULT, EXPORTS = "masks.safetensors", "certificate.json", "result.json", "exports.json"
STATE = "run.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one move: a temporary file beside it, then a rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def fingerprint(config: Mapping[str, Any]) -> str:
    """A short hash of what decides a run's numbers."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


class RunFolder:
    """The folder of one run.

    Args:
        path: created if it is missing.

    Raises:
        RunFolderError: it cannot be written, before any time is spent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".write-test"
            probe.write_bytes(b"tritprune")
            probe.unlink()
        except OSError as error:
            raise RunFolderError(
                f"the run folder {path} cannot be written: {error.strerror or error}; choose another with run_dir=..."
            ) from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def check_room_for(self, model: nn.Module, *, trains_after_slim: bool = False) -> None:
        """Refuse a disk on which the run could not end.

        Raises:
            RunFolderError: less is free than a run of this model writes; the message has both numbers.
        """
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        # Two checkpoints of weights, two optimizer states and scores, three models; one more of each for training on.
        needed = (17 if trains_after_slim else 12) * weights
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunFolderError(
                f"{self.path} has {free / 2**20:,.0f} MiB free and this run needs about {needed / 2**20:,.0f} MiB; "
                "make room or choose another folder with run_dir=..."
            )

    def read_state(self) -> dict[str, Any]:
        """``run.json``, or an empty dict where there is none yet."""
        try:
            return json.loads((self / STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self / STATE} is damaged ({error}); start the run anew without resume") from error

    def write_state(self, **values: Any) -> None:
        """Update ``run.json``."""
        write_json(self / STATE, {**self.read_state(), **values, "updated": time.strftime("%Y-%m-%dT%H:%M:%S")})

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint in one move.

        Raises:
            RunFolderError: the disk is full or the folder went away; the previous checkpoint is untouched.
        """
        temporary = self / (CHECKPOINT + ".tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self / CHECKPOINT)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            free = shutil.disk_usage(self.path).free / 2**20
            raise RunFolderError(
                f"the checkpoint could not be written to {self.path}: {error} ({free:.0f} MiB free); "
                "the previous checkpoint is whole: make room, then run the same command with resume=auto"
            ) from error

    def keep_checkpoint(self) -> None:
        """Keep a copy of the checkpoint, from which training goes on after slimming.

        Raises:
            RunFolderError: the disk is full or the folder went away.
        """
        temporary = self / (BEFORE_SLIM + ".tmp")
        try:
            shutil.copyfile(self / CHECKPOINT, temporary)
            temporary.replace(self / BEFORE_SLIM)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunFolderError(f"{self / BEFORE_SLIM} cannot be written: {error.strerror or error}") from error

    def load_checkpoint(self, device: str, name: str = CHECKPOINT) -> dict[str, Any] | None:
        """The checkpoint, or None where there is none.

        Raises:
            CheckpointError: it is there but damaged.
        """
        path = self / name
        if not path.exists():
            return None
        place = "cpu" if device.startswith("cpu:") else device  # as several processes call it; torch.load does not
        try:
            return torch.load(path, map_location=place, weights_only=True)
        except Exception as error:  # torch raises a different type for each way in which a file can be damaged
            size = path.stat().st_size
            raise CheckpointError(
                f"{path} is damaged ({size:,} bytes: {type(error).__name__}); "
                "remove it to begin the run's current stage anew, or start a new run without resume"
            ) from error

    def drop_checkpoint(self) -> None:
        """Remove the checkpoint of a finished stage: the saved models hold all that is worth keeping."""
        (self / CHECKPOINT).unlink(missing_ok=True)

    def drop_checkpoints(self) -> None:
        """Remove what a finished run has no more use for."""
        self.drop_checkpoint()
        (self / BEFORE_SLIM).unlink(missing_ok=True)


def find_resumable(parent: Path, wanted: str) -> Path | None:
    """The newest unfinished run folder below ``parent`` whose config fingerprint is ``wanted``."""
    found = []
    for state in parent.glob(f"*/{STATE}"):
        try:
            values = json.loads(state.read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue  # a damaged neighbour must not stop this search; it cannot be resumed anyway
        if values.get("fingerprint") == wanted and values.get("status") != "finished":
            found.append((values.get("updated", ""), state.parent))
    return max(found)[1] if found else None
