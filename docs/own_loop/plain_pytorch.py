"""python docs/own_loop/plain_pytorch.py

Plain PyTorch with gradient accumulation and mixed precision. The pruner counts optimizer steps: neither micro-batches
nor the steps that the GradScaler skips. The first scale is too large on purpose, so that some are.
"""

from itertools import cycle

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import tritprune

ACCUMULATE = 2


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def make_batches():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return cycle(zip(images.split(32), labels.split(32), strict=True))


def train(steps, watch=lambda pruner: None):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pruner = tritprune.Pruner(model, pattern="4x1", target_sparsity=0.8, start_step=1, end_step=int(0.7 * steps))
    pruner.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    batches, i = make_batches(), 0
    while pruner.step < steps:
        images, labels = next(batches)
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(images), labels) / ACCUMULATE
        scaler.scale(loss).backward()
        i += 1
        if i % ACCUMULATE == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            watch(pruner)
    return model, pruner, i // ACCUMULATE - steps


if __name__ == "__main__":
    model, pruner, skipped = train(100)
    print(f"sparsity {pruner.sparsity().prunable.sparsity:.4f}, masks {pruner.digest()[:12]}, {skipped} steps skipped")
