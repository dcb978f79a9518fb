"""A run folder as a run of ``experiment=bert_4x1`` would leave it: 36 layers, 650 steps, plausible numbers."""

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

DENSE_STEPS, PRUNE_STEPS, RECOVER_STEPS = 250, 240, 160
PARTS = (
    ("attention.self.query", 384, 384, 0.93),
    ("attention.self.key", 384, 384, 0.93),
    ("attention.self.value", 384, 384, 0.86),
    ("attention.output.dense", 384, 384, 0.85),
    ("intermediate.dense", 1536, 384, 0.90),
    ("output.dense", 384, 1536, 0.915),
)


def cubic(x: float) -> float:
    return 1 - (1 - min(max(x, 0.0), 1.0)) ** 3


def make_layers() -> list[dict[str, Any]]:
    layers = []
    for block in range(6):
        for part, rows, columns, share in PARTS:
            units = rows // 4 * columns
            kept = units - round(units * (share - 0.003 + 0.012 * (block - 2.5)))
            zeros = (units - kept) * 4
            layers.append(
                {
                    "name": f"bert.encoder.layer.{block}.{part}",
                    "group": "all",
                    "pattern": "4x1",
                    "shape": [rows, columns],
                    "elements": rows * columns,
                    "unit": "4x1",
                    "units": units,
                    "kept_units": kept,
                    "zeros": zeros,
                    "sparsity": zeros / (rows * columns),
                }
            )
    last, total = layers[-1], sum(layer["elements"] for layer in layers)
    missing = math.floor(0.9 * total / 4) - sum(layer["zeros"] for layer in layers) // 4
    last["kept_units"] -= missing
    last["zeros"] += 4 * missing
    last["sparsity"] = last["zeros"] / last["elements"]
    return layers


def make_curves(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    noise = random.Random(0)
    lines: list[dict[str, Any]] = []
    for step in range(1, DENSE_STEPS + PRUNE_STEPS + RECOVER_STEPS + 1):
        pruned = step - DENSE_STEPS
        stage = "dense" if pruned <= 0 else "prune" if pruned <= PRUNE_STEPS else "recover"
        settled = 3.1 * math.exp(-step / 70) + 0.42
        target = 0.9 * cubic(pruned / PRUNE_STEPS)
        hurt = 0.9 * target**4 * math.exp(-max(0, pruned - PRUNE_STEPS) / 60)
        line: dict[str, Any] = {
            "step": step,
            "stage": stage,
            "loss/train": (settled + hurt) * noise.lognormvariate(0, 0.16),
            "lr": 2e-4 * (1 - (step % 250) / 260),
        }
        forward = 68 * noise.lognormvariate(0, 0.06)
        line |= {"time/forward_ms": forward, "time/backward_ms": forward * 1.9, "time/step_ms": forward * 3.15}
        if stage != "dense":
            line |= {"sparsity/target": target, "sparsity/global": math.floor(target * 2654208) / 2654208}
        if stage == "prune":
            line |= {"time/score_ms": 5.9, "time/mask_ms": 8.4, "time/step_ms": forward * 3.15 + 88}
            line["masks/flip_rate"] = 0.9 * (cubic(pruned / PRUNE_STEPS) - cubic((pruned - 1) / PRUNE_STEPS))
            reach = cubic(pruned / PRUNE_STEPS)
            line |= {
                f"sparsity/{layer['name']}": layer["sparsity"] * reach ** (1.3 - layer["sparsity"]) for layer in layers
            }
        if step % 25 == 0:
            line["loss/eval"] = (settled + hurt) * 1.22
            dense = 0.737 * (1 - math.exp(-step / 55))
            line["accuracy/eval"] = round((dense - 0.16 * hurt / 0.6 - 0.03 * (target > 0.6)) * 400) / 400
        lines.append(line)
    return lines


def make_result() -> dict[str, Any]:
    layers = make_layers()
    total = sum(layer["elements"] for layer in layers)
    zeros = sum(layer["zeros"] for layer in layers)

    def sparsity(gone: int, removed: int = 0) -> dict[str, Any]:
        return {
            "prunable": {"zeros": gone, "total": total - removed},
            "linear_conv": {"zeros": gone, "total": total - removed + 9216 + 147456},
            "parameters": {"zeros": gone, "total": 22713216 - removed},
        }

    def latency(one: float, many: float) -> dict[str, Any]:
        return {
            "1": {"median_ms": one, "p10_ms": one * 0.97, "p90_ms": one * 1.06, "repeats": 50},
            "32": {"median_ms": many, "p10_ms": many * 0.98, "p90_ms": many * 1.04, "repeats": 50},
        }

    attention = [f"bert.encoder.layer.{block}.attention" for block in range(6)]
    return {
        "format": 1,
        "name": "bert_4x1",
        "command": "python -m tritprune experiment=bert_4x1",
        "status": "finished",
        "started": "2026-11-21T09:14:03+00:00",
        "finished": "2026-11-21T09:20:51+00:00",
        "seconds": {"dense": 73.1, "prune": 96.4, "recover": 52.7, "slim": 8.2, "export": 0.9, "report": 2.1},
        "config": {
            "experiment": "bert_4x1",
            "seed": 0,
            "pruner": {
                "name": "iterative",
                "target_sparsity": 0.9,
                "criterion": {"name": "snip_momentum", "alpha": 0.9, "beta": 1.0},
                "pattern": "4x1",
                "schedule": "cubic",
                "scope": "global",
                "exclude": [],
                "groups": None,
            },
            "training": {"lr": 3e-4, "batch_size": 16, "distillation": {"temperature": 2.0, "weight": 0.7}},
            "tracker": {"name": "wandb", "mode": "auto"},
        },
        "versions": {
            "tritprune": "0.1.0",
            "torch": "2.13.0",
            "triton": "3.7.1",
            "transformers": "5.23.0",
            "python": "3.11.7",
        },
        "git": {"commit": "3f9c1d2a7b8e4f50a1c2d3e4f5a6b7c8d9e0f1a2", "dirty": True},
        "seed": 0,
        "machine": {"cpu": "AMD EPYC 9B14", "cores": 2, "threads": 2, "gpu": None},
        "data": {
            "task": "pydocs",
            "hash": "9d1c6b0f5e2a47c3b8f0d4e6a1b2c3d4e5f60718293a4b5c6d7e8f9012345678",
            "n_train": 1600,
            "n_eval": 400,
            "labels": 24,
            "description": "which of 24 standard-library modules a docstring comes from",
        },
        "dense_cached": False,
        "rows": [
            {
                "model": "dense",
                "metrics": {"accuracy": 0.737, "loss": 0.941},
                "sparsity": sparsity(0),
                "parameters": 22713216,
                "bytes": 90868376,
                "latency": latency(9.42, 148.0),
            },
            {
                "model": "pruned",
                "metrics": {"accuracy": 0.697, "loss": 1.082},
                "sparsity": sparsity(zeros),
                "parameters": 22713216,
                "bytes": 90868376,
                "latency": latency(9.45, 147.1),
            },
            {
                "model": "slim",
                "metrics": {"accuracy": 0.697, "loss": 1.082},
                "sparsity": sparsity(zeros - 4571136, 4571136),
                "parameters": 22713216 - 4571136,
                "bytes": 72583832,
                "latency": latency(7.79, 113.9),
            },
            {
                "model": "random control",
                "metrics": {"accuracy": 0.512, "loss": 1.73},
                "sparsity": sparsity(zeros),
                "parameters": 22713216,
                "bytes": 90868376,
                "latency": None,
            },
        ],
        "layers": layers,
        "excluded": [
            {"name": "classifier", "reason": "classifier head"},
            {"name": "bert.pooler.dense", "reason": "matched by exclude: bert.pooler.*"},
        ],
        "slim": {
            "found": [{"kind": "feed-forward", "where": f"bert.encoder.layer.{block}"} for block in range(6)],
            "cuts": [
                {
                    "kind": "feed-forward channels",
                    "where": f"bert.encoder.layer.{block}.intermediate.dense",
                    "before": 1536,
                    "after": 544 + 61 * block,
                    "unit": "channel",
                }
                for block in range(6)
            ]
            + [{"kind": "heads", "where": attention[5], "before": 12, "after": 11, "unit": "head"}],
            "refused": [
                {
                    "kind": "heads",
                    "where": where,
                    "reason": "no head is dead: every head keeps at least one unit of its value rows",
                }
                for where in attention[:5]
            ]
            + [
                {
                    "kind": "residual width",
                    "where": "bert.embeddings",
                    "reason": "the output is added to 13 residual branches; cutting it would change all of them",
                }
            ],
            "certificate": {
                "holds": True,
                "max_abs_difference": 3.8e-6,
                "tolerance": 1e-4,
                "inputs": 3,
                "outputs_sha256": "5b7a1e0c9d8f7a6b5c4d3e2f1a0b9c8d7e6f5a4b3c2d1e0f9a8b7c6d5e4f3a2b",
            },
        },
        "artifacts": {
            "report": "report.html",
            "curves": "curves.jsonl",
            "masks": "masks.safetensors",
            "certificate": "certificate.json",
            "slim": "slim/",
            "wandb": "wandb/offline-run-20261121_091403-3f9c1d2a",
        },
    }


def write_folder(folder: Path, result: Mapping[str, Any] | None, curves: list[dict[str, Any]] | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    if curves is not None:
        (folder / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in curves))
    return folder


@pytest.fixture
def result() -> dict[str, Any]:
    """A fresh copy for each test to damage."""
    return make_result()


@pytest.fixture(scope="session")
def curves() -> list[dict[str, Any]]:
    return make_curves(make_layers())


@pytest.fixture(scope="session")
def full_run(curves: list[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Result and curves to read, not to change."""
    return make_result(), curves


@pytest.fixture(scope="session")
def fresh_result() -> Callable[[], dict[str, Any]]:
    """Makes a result for each example of a property."""
    return make_result


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder: ``run_folder(result, curves)``; None leaves the file out."""

    def write(result: Mapping[str, Any] | None, curves: list[dict[str, Any]] | None = None) -> Path:
        return write_folder(tmp_path / "run", result, curves)

    return write
