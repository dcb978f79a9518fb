"""Which examples a step sees: a pure function of (seed, step), so that a resumed run needs no sampler state."""

import hashlib

import torch
from torch import Tensor

from tritprune.errors import ConfigError


def step_seed(*parts: object) -> int:
    """A 63-bit seed that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


class BatchOrder:
    """The examples of each micro-batch of each process.

    Epoch e is a permutation drawn from (seed, e); batches run on over the end of an epoch, so that every batch is full.
    The global batch is the same for any number of processes and micro-batches; each takes its slice.

    Args:
        n_examples: size of the training split.
        batch_size: examples per optimizer step, over all processes and micro-batches.
        accumulate: micro-batches per step and process.
        rank: this process.
        world: number of processes.
        seed: decides every permutation.

    Raises:
        ConfigError: the batch does not divide by processes x micro-batches.
    """

    def __init__(self, n_examples: int, *, batch_size: int, accumulate: int, rank: int, world: int, seed: int) -> None:
        if batch_size % (world * accumulate):
            raise ConfigError(
                f"training.batch_size={batch_size} must be a multiple of processes x training.accumulate = "
                f"{world} x {accumulate}"
            )
        self._n, self._batch, self._accumulate = n_examples, batch_size, accumulate
        self._rank, self._world, self._seed = rank, world, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def global_batch(self, step: int) -> Tensor:
        """The example indices [batch_size] of optimizer step ``step`` (from 0)."""
        positions = range(step * self._batch, (step + 1) * self._batch)
        return torch.stack([self._permutation(p // self._n)[p % self._n] for p in positions])

    def micro_batches(self, step: int) -> tuple[Tensor, ...]:
        """This process's share of the global batch, in ``accumulate`` equal parts."""
        share = self._batch // self._world
        mine = self.global_batch(step)[self._rank * share : (self._rank + 1) * share]
        return mine.split(share // self._accumulate)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(step_seed(self._seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(self._n, generator=generator)
        return self._order
