"""Whether a whole prune step reads nothing back, and replays from a CUDA graph to the same bits."""

from collections.abc import Iterator

import torch
from check import Check, Place
from torch import Tensor

from tritprune import kernels
from tritprune.kernels import UnitGrid

SHAPES = [(768, 768), (3072, 768), (768, 3072), (130, 77)]
SPARSITY = 0.8


class PruneStep:
    """Scores, threshold, masks, zeros and statistics of a few layers, 4x1, in tensors that stay where they are."""

    def __init__(self, shapes: list[tuple[int, int]], device: torch.device) -> None:
        self.shapes, self.device = shapes, device
        self.grids = [UnitGrid.of_blocks(shape, (4, 1)) for shape in shapes]
        self.blocks = [(4, 1)] * len(shapes)
        self.weights, self.gradients = ([torch.empty(shape, device=device) for shape in shapes] for _ in range(2))
        self.scores = [torch.empty(grid.shape, device=device) for grid in self.grids]
        self.skipped = torch.zeros(len(shapes), dtype=torch.int64, device=device)
        self.before = [torch.ones(grid.shape, dtype=torch.bool, device=device) for grid in self.grids]
        self.budget = int(SPARSITY * sum(grid.elements for grid in self.grids))

    def fill(self, seed: int) -> None:
        """New values in the same memory, made on the CPU: the same everywhere."""
        generator = torch.Generator().manual_seed(seed)
        for tensor in (*self.weights, *self.gradients, *self.scores):
            tensor.copy_(torch.randn(tensor.shape, generator=generator).abs_())

    def run(self) -> tuple[list[Tensor], Tensor]:
        """One prune step: the masks, and how many units stay and change."""
        options = {"form": "snip", "reduce": "mean", "alpha": 0.9, "beta": 1.0}
        kernels.accumulate_unit_scores_(self.scores, self.skipped, self.weights, self.gradients, self.blocks, **options)
        threshold, remainder = kernels.kth_score(self.scores, self.grids, self.budget)
        masks = kernels.masks_from_threshold(self.scores, self.grids, threshold, remainder)
        kernels.apply_masks_(self.weights, masks, self.blocks)
        return masks, kernels.mask_statistics(masks, self.before)

    def expected(self, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """Masks and weights of the reference on the CPU."""
        other = PruneStep(self.shapes, torch.device("cpu"))
        other.fill(seed)
        with kernels.use_backend("torch"):
            masks, _ = other.run()
        return masks, other.weights

    def agrees(self, masks: list[Tensor], seed: int) -> bool:
        """Whether masks and weights are those of the reference."""
        wanted_masks, wanted_weights = self.expected(seed)
        mine = [tensor.cpu() for tensor in (*masks, *self.weights)]
        return all(torch.equal(a, b) for a, b in zip(mine, (*wanted_masks, *wanted_weights), strict=True))


def capture(place: Place) -> Iterator[Check]:
    """A whole prune step without a host synchronisation, and replayed from a CUDA graph to the same bits."""
    step = PruneStep([(32, 24), (10, 7)] if place.dry else SHAPES, place.device)
    if place.dry:
        step.fill(0)
        with kernels.use_backend("triton"):
            masks, _ = step.run()
        yield Check("a prune step in the interpreter (no graph)", step.agrees(masks, 0))
        return
    for seed in (0, 1):  # the second time everything is compiled and every table is on the device
        step.fill(seed)
        masks, _ = step.run()
        yield Check(f"a prune step, run {seed + 1}", step.agrees(masks, seed))
    step.fill(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        masks, statistics = step.run()
        problem = ""
    except RuntimeError as error:
        problem = f"{error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield Check("no host synchronisation in a prune step", not problem, problem)
    graph = torch.cuda.CUDAGraph()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step.run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            masks, statistics = step.run()
    except RuntimeError as error:
        yield Check("captured in a CUDA graph", False, f"{error}")
        return
    yield Check("captured in a CUDA graph", True)
    for seed in (3, 4, 5):
        step.fill(seed)
        graph.replay()
        place.wait()
        kept = int(statistics[:, 0].sum()) == sum(int(mask.sum()) for mask in masks)
        yield Check(f"replay {seed - 2} is the reference's step", kept and step.agrees(masks, seed))
