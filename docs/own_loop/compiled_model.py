"""python docs/own_loop/compiled_model.py

A model inside torch.compile: the pruner takes the wrapper or the plain model, and masks neither break the graph nor
compile it again.
"""

from itertools import cycle, islice

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import tritprune


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def make_batches():
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return cycle(zip(images[:1792].split(32), labels[:1792].split(32), strict=True))  # one shape: one graph


def train(steps, watch=lambda pruner: None):
    model = torch.compile(make_model(), backend="aot_eager")  # without backend=: the default, with a C++ compiler
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pruner = tritprune.Pruner(model, pattern="4x1", target_sparsity=0.8, start_step=1, end_step=int(0.7 * steps))
    pruner.attach(optimizer)
    for images, labels in islice(make_batches(), steps):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        watch(pruner)
    return model, pruner


if __name__ == "__main__":
    model, pruner = train(100)
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    print(f"sparsity {pruner.sparsity().prunable.sparsity:.4f}, masks {pruner.digest()[:12]}")
    print(f"{graphs} graph compiled, {breaks} graph breaks; layers {', '.join(layer.name for layer in pruner.layers)}")
