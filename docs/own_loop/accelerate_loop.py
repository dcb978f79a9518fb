"""python docs/own_loop/accelerate_loop.py

Accelerate: what `prepare` returns goes to the pruner as it is, and `register_for_checkpointing` puts the pruner's state
into `save_state` and `load_state`. Interrupt it and run it again: it goes on from the last checkpoint to the same bits.
"""

from itertools import cycle, islice
from pathlib import Path

import torch
from accelerate import Accelerator
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


def train(steps, folder, watch=lambda pruner: None):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model = make_model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    pruner = tritprune.Pruner(model, pattern="4x1", target_sparsity=0.8, start_step=1, end_step=int(0.7 * steps))
    pruner.attach(optimizer)
    accelerator.register_for_checkpointing(pruner)
    if Path(folder).exists():
        accelerator.load_state(folder)
    first, last = ACCUMULATE * pruner.step, ACCUMULATE * steps
    for images, labels in islice(make_batches(), first, last):
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            watch(pruner)
            if pruner.step % 20 == 0:
                accelerator.save_state(folder)
    return accelerator.unwrap_model(model), pruner


if __name__ == "__main__":
    model, pruner = train(100, "outputs/accelerate_loop")
    print(f"sparsity {pruner.sparsity().prunable.sparsity:.4f}, masks {pruner.digest()[:12]}")
