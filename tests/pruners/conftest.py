"""Small models and a training loop whose batches are a function of the step."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Net(nn.Module):
    """Two linears whose sizes no block divides, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(13, 10)
        self.second = nn.Linear(10, 7)
        self.classifier = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.second(F.relu(self.first(x)))))


class ConvNet(nn.Module):
    """Convolutions of several kinds and no Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.grouped = nn.Conv2d(6, 8, 2, groups=2)
        self.point = nn.Conv2d(8, 4, 1)
        self.signal = nn.Conv1d(4, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.signal(self.point(self.grouped(self.stem(x)).relu()).flatten(2)).mean(-1)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def conv_net():
    torch.manual_seed(0)
    return ConvNet()


@pytest.fixture
def make_net():
    def make(seed=0):
        torch.manual_seed(seed)
        return Net()

    return make


@pytest.fixture
def sgd():
    def make(model, **settings):
        return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **settings})

    return make


@pytest.fixture
def train():
    """``train(model, optimizer, steps, first=0)``: step i sees the batch of seed i."""

    def run(model, optimizer, steps, first=0, shape=(8, 13), accumulate=1):
        for step in range(first, first + steps):
            optimizer.zero_grad()
            batch = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            for part in batch.chunk(accumulate):
                (model(part).square().mean() / accumulate).backward()
            optimizer.step()

    return run
