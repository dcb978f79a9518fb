"""The control: what any criterion has to beat."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from tritprune.criteria.base import Criterion, Reduce, register_criterion
from tritprune.kernels import UnitGrid


@register_criterion("random")
class Random(Criterion):
    """Uniform scores in [0, 1), drawn once per unit.

    The generator is seeded by (seed, layer name) and draws on the CPU, so that a layer's scores depend neither on the
    device nor on the other layers, and a resumed run needs no generator state.

    Args:
        seed: of the draw; None: the pruner's seed.
    """

    needs_gradient = False

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def initial_scores(self, layer: str, grid: UnitGrid, device: torch.device, seed: int) -> Tensor:
        """The scores for good: fp32 ``[rows, cols]``."""
        seed = seed if self.seed is None else self.seed
        digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.rand(grid.shape, generator=generator, dtype=torch.float32).to(device)

    def accumulate_(
        self,
        scores: Sequence[Tensor],
        skipped: Tensor,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor] | None,
        blocks: Sequence[tuple[int, int]],
        reduce: Reduce,
    ) -> None:
        """Nothing: the first draw stays."""
