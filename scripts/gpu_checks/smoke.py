"""From a dense model to a smaller one: train, prune while training, slim, and hold the outputs against each other."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from check import Check, Place
from torch import Tensor, nn
from torch.nn import functional as F

import tritprune
from tritprune import kernels

NEEDED = ("hydra", "omegaconf", "wandb", "rich", "accelerate", "safetensors", "matplotlib", "yaml", "sklearn")


def smoke(place: Place) -> Iterator[Check]:
    """Train on synthetic data, also with a masked step, prune, slim, compare; experiment=smoke too where hydra is."""
    with kernels.use_backend("triton" if place.dry else "auto"):
        for pattern in ("4x1", "2:4", "1xchannel"):
            yield from _train_and_prune(place, pattern)
    if place.dry:
        return
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"  the command line is not run: {', '.join(missing)} not installed; the Python interface was")
        return
    command = [
        sys.executable,
        "-m",
        "tritprune",
        "experiment=smoke",
        "tracker=none",
        f"hydra.run.dir={place.out}/smoke",
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120, check=False
    )
    yield Check("experiment=smoke", done.returncode == 0, "" if done.returncode == 0 else done.stderr[-2000:])


def _train_and_prune(place: Place, pattern: str) -> Iterator[Check]:
    target = 0.5 if pattern == "2:4" else 0.8
    width, steps = (16, 8) if place.dry else (512, 120)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    teacher = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    model, teacher = model.to(place.device), teacher.to(place.device)
    kind = tritprune.MaskedAdamW if pattern == "4x1" else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=1e-2 if place.dry else 2e-3)
    criterion = "magnitude" if pattern == "2:4" else "snip_momentum"
    pruner = tritprune.Pruner(
        model,
        criterion=criterion,
        pattern=pattern,
        target_sparsity=target,
        start_step=1,
        end_step=steps // 2,
        scope="local" if pattern == "2:4" else "global",
    ).attach(optimizer)
    losses = [_step(model, teacher, optimizer, place, number) for number in range(steps)]
    pruner.verify()
    zeros, elements = (sum(row[key] for row in pruner.layer_report()) for key in ("zeros", "elements"))
    largest = max(row["elements"] // row["units"] for row in pruner.layer_report())
    yield Check(
        f"{pattern}: sparsity",
        int(target * elements) - largest < zeros <= int(target * elements),
        f"{zeros:,} of {elements:,} elements, asked for {target}",
    )
    early, late = (float(torch.stack(part).mean()) for part in (losses[:4], losses[-4:]))
    yield Check(f"{pattern}: loss falls while pruning", late < early, f"{early:.4f} to {late:.4f}")
    pruner.detach()
    if pattern == "1xchannel":
        inputs = torch.randn(8, 16, device=place.device)
        dense = sum(parameter.numel() for parameter in model.parameters())
        slim = tritprune.slim(model, (inputs,))
        left = sum(parameter.numel() for parameter in slim.parameters())
        with torch.no_grad():
            difference = float((slim(inputs) - model(inputs)).abs().max())
        yield Check("slim: smaller", left < dense, f"{dense:,} to {left:,} parameters")
        yield Check("slim: same outputs", difference < 1e-4, f"largest difference {difference:.2g}")


def _step(model: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, place: Place, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(64, 16, generator=generator).to(place.device)
    with torch.no_grad():
        wanted = teacher(inputs)
    optimizer.zero_grad()
    loss = F.mse_loss(model(inputs), wanted)
    loss.backward()
    optimizer.step()
    return loss.detach()
