"""A task of a few integers whose gradients are exactly representable: sums and means of them do not round."""

from typing import Any

import torch
from torch import Tensor, nn

from tritprune.registry import models
from tritprune.tasks import Task, register_task
from tritprune.tasks.base import TaskData


@models.register("toy")
class Toy(nn.Module):
    """Two linears without biases; dropout can be asked for, so that random numbers matter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(self.first(x)))


@register_task("toy")
class ToyTask(Task):
    """Random small integers; with ``linear_loss`` the gradient of the second layer holds only dyadic fractions."""

    name = "toy"

    def __init__(self, dropout: float = 0.0, linear_loss: bool = False) -> None:
        self.dropout, self.linear_loss = dropout, linear_loss

    def load(self) -> TaskData:
        generator = torch.Generator().manual_seed(0)

        def columns(n: int) -> dict[str, Tensor]:
            x = torch.randint(-4, 5, (n, 8), generator=generator).float()
            return {"x": x, "labels": (x.sum(1) > 0).long() + 2 * (x[:, 0] > 0).long()}

        return TaskData(columns(64), columns(32), ("a", "b", "c", "d"), "toy", "toy", "sums of small integers")

    def build_model(self, seed: int) -> nn.Module:
        model = Toy(self.dropout)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randint(-8, 9, parameter.shape, generator=generator) / 8)
        return model

    def builder(self) -> dict[str, Any]:
        return {"kind": "registered", "name": "toy", "arguments": {"dropout": self.dropout}}

    def loss(self, logits: Tensor, batch: Any) -> Tensor:
        if not self.linear_loss:
            return super().loss(logits, batch)
        signs = 2.0 * nn.functional.one_hot(batch["labels"], 4) - 1
        return (logits * signs).sum(1).mean()
