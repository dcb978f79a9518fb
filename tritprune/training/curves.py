"""The names and units of every curve, and the file that holds them.

The x axis is the optimizer step, counted on over the stages: the dense stage has steps 1 to D, pruning and recovery
D + 1 onwards. ``curves.jsonl`` has one JSON object a line; a line holds only the keys that were measured at its step.
"""

import json
import math
from pathlib import Path
from typing import Any

STEP = "step"
STAGE = "stage"
LOSS_TRAIN = "loss/train"
LOSS_EVAL = "loss/eval"
LEARNING_RATE = "lr"
SPARSITY = "sparsity/global"  # zeros / elements of the prunable layers, in [0, 1]
SPARSITY_TARGET = "sparsity/target"
FLIP_RATE = "masks/flip_rate"  # units whose mask changed / all units
SKIPPED_GRADIENTS = "masks/skipped_gradients"  # elements with a non-finite gradient since the last mask update
STEP_MS = "time/step_ms"
FORWARD_MS = "time/forward_ms"
BACKWARD_MS = "time/backward_ms"
SCORE_MS = "time/score_ms"
MASK_MS = "time/mask_ms"


def eval_metric(name: str) -> str:
    """The curve of a task's metric on its evaluation split: ``accuracy`` -> ``accuracy/eval``."""
    return f"{name}/eval"


def layer_sparsity(layer: str) -> str:
    """The curve of one layer's sparsity."""
    return f"sparsity/{layer}"


class CurveFile:
    """``curves.jsonl``: lines are appended and flushed, so that a killed run keeps all but the line being written.

    Args:
        path: the file; what it holds already is kept (a resumed run cuts it back with :meth:`keep_until`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Write one line; a value that JSON lacks (NaN, infinity) is written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(clean, allow_nan=False) + "\n")

    def keep_until(self, step: int) -> None:
        """Drop every line past ``step`` and a line that a kill cut short; the rest stays byte for byte."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)

    def records(self) -> list[dict[str, Any]]:
        """Every whole line."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)[STEP]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
