"""What is measured: a problem is one job, the bytes that it must move, and everybody who does it.

The inputs of a contender are made on the CPU from one seed, so that all contenders and all machines see the same.
Before its time is taken, our own result is held bit for bit against the reference; a rival's is compared and the
comparison printed, because not every rival computes the same (ties, masks that are one k off).
"""

from collections.abc import Callable, Iterator, Sequence

import rivals
import torch
from masked_steps import MaskedSteps
from problem import Problem, difference, require, same
from torch import Tensor

from tritprune import kernels
from tritprune.kernels import UnitGrid, reference

SETS: dict[str, list[tuple[int, int]]] = {
    "tiny": [(48, 48)] * 4 + [(192, 48), (48, 192)],
    "small": [(384, 384)] * 4 + [(1536, 384), (384, 1536)],
    "minilm": ([(384, 384)] * 4 + [(1536, 384), (384, 1536)]) * 6,
    "bert": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)]) * 12,
    "tiny72": ([(48, 48)] * 4 + [(192, 48), (48, 192)]) * 12,
    "7b": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32,
}
"""Layer shapes: next to nothing; a layer of MiniLM; all of MiniLM (10.6M weights); BERT-base (84.9M in 72 layers); 72
layers of a 256th of that, to count what no size changes; Llama-7B (6.48B)."""

SPARSITY = 0.8
SNIP = {"form": "snip", "reduce": "mean", "alpha": rivals.ALPHA, "beta": rivals.BETA}


class Problems:
    """Makes the problems of a set of layers on a device.

    Args:
        shapes: of the layers.
        device: where.
        dtype: of weights and gradients.
        peers: whether rivals are measured beside our own operations.
        compiled: whether ``torch.compile`` is among the rivals.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        peers: bool = True,
        compiled: bool = True,
    ) -> None:
        self.shapes, self.device, self.dtype = list(shapes), device, dtype
        self.peers, self.compiled = peers, peers and compiled
        self.elements = sum(rows * cols for rows, cols in shapes)
        self.weights, self.gradients = self._random(1), self._random(2)

    def names(self, only: Sequence[str] = ()) -> list[str]:
        """What :meth:`all` gives."""
        return [name for name in self._makers() if not only or any(part in name for part in only)]

    def all(self, only: Sequence[str] = ()) -> Iterator[Problem]:
        """The problems whose name holds one of ``only``; every one if it is empty."""
        for name in self.names(only):
            yield self._makers()[name]()

    def _makers(self) -> dict[str, Callable[[], Problem]]:
        makers: dict[str, Callable[[], Problem]] = {
            "score 1x1": lambda: self._score((1, 1)),
            "score 4x1": lambda: self._score((4, 1)),
            "k-th of elements": lambda: self._kth((1, 1)),
            "k-th of 4x1 units": lambda: self._kth((4, 1)),
            "2:4 masks": self._two_in_four,
            "threshold to 4x1 masks": self._threshold,
            "2:4 group scores": self._group_scores,
            "apply 4x1 masks": self._apply,
            "count violations, 4x1": self._violations,
            "caps of layers, 4x1": self._crossing,
            "count non-finite, 4x1": self._non_finite,
            "restore 4x1 masks": self._restore,
            "whole 4x1 update": self._update,
        }
        if self.dtype == torch.float32:  # masked optimizers step on no other weights
            steps = MaskedSteps(self.weights, self.gradients, SPARSITY, peers=self.peers)
            makers |= {"AdamW step, 4x1 mask": steps.adamw, "SGD step, 4x1 mask": steps.sgd}
        return makers

    def _random(self, seed: int, shapes: Sequence[tuple[int, int]] | None = None) -> list[Tensor]:
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(shape, generator=generator, device=self.device).to(self.dtype)
            for shape in shapes or self.shapes
        ]

    def _unit_scores(self, block: tuple[int, int], seed: int = 3) -> list[Tensor]:
        shapes = [UnitGrid.of_blocks(shape, block).shape for shape in self.shapes]
        generator = torch.Generator(self.device).manual_seed(seed)
        return [torch.rand(shape, generator=generator, device=self.device) for shape in shapes]

    def _grids(self, block: tuple[int, int]) -> list[UnitGrid]:
        return [UnitGrid.of_blocks(shape, block) for shape in self.shapes]

    def _score(self, block: tuple[int, int]) -> Problem:
        size = self.dtype.itemsize
        units = block[0] * block[1]
        blocks = [block] * len(self.shapes)
        skipped = torch.zeros(len(self.shapes), dtype=torch.int64, device=self.device)
        own = self._unit_scores(block)

        def run() -> None:
            kernels.accumulate_unit_scores_(own, skipped, self.weights, self.gradients, blocks, **SNIP)

        def check() -> None:
            mine, theirs = self._unit_scores(block, 4)[:3], self._unit_scores(block, 4)[:3]
            arguments = (skipped[:3], self.weights[:3], self.gradients[:3], blocks[:3])
            kernels.accumulate_unit_scores_(mine, *arguments, **SNIP)
            reference.accumulate_unit_scores_(theirs, *arguments, **SNIP)
            same("scores", mine, theirs)

        contenders: dict[str, Callable[[], object]] = {"tritprune": run}
        if self.peers:
            rival = rivals.snip_momentum_eager if block == (1, 1) else rivals.snip_momentum_4x1_eager
            theirs = self._unit_scores(block)
            contenders["neural_compressor"] = lambda: rival(theirs, self.weights, self.gradients)
            if block == (1, 1):
                foreach = self._unit_scores(block)
                contenders["foreach"] = lambda: rivals.snip_momentum_foreach(foreach, self.weights, self.gradients)
        if self.compiled:
            layer = rivals.snip_momentum_1x1_layer if block == (1, 1) else rivals.snip_momentum_4x1_layer
            step = torch.compile(layer, dynamic=False)
            state = self._unit_scores(block)

            def compiled() -> None:
                for score, weight, gradient in zip(state, self.weights, self.gradients, strict=True):
                    step(score, weight, gradient)

            contenders["compile"] = compiled
        floor = self.elements * 2 * size + 8 * self.elements // units
        return Problem(f"score {block[0]}x{block[1]}", floor, contenders, check, {})

    def _kth(self, block: tuple[int, int]) -> Problem:
        scores, grids = self._unit_scores(block), self._grids(block)
        units = sum(grid.units for grid in grids)
        k = int(SPARSITY * units)
        budget = k * block[0] * block[1]

        def check() -> None:
            threshold, remainder = kernels.kth_score(scores, grids, budget)
            lower = sum(int((score < threshold).sum()) for score in scores)
            equal = sum(int((score == threshold).sum()) for score in scores)
            require(lower <= k < lower + equal, f"k-th: {lower} lower, {equal} equal, k = {k}")
            require(int(remainder) == (k - lower) * block[0] * block[1], f"k-th: remainder {int(remainder)}")

        contenders: dict[str, Callable[[], object]] = {"tritprune": lambda: kernels.kth_score(scores, grids, budget)}
        if self.peers:
            contenders["kthvalue"] = lambda: rivals.kth_by_kthvalue(scores, k)
            if units <= 2**31 - 1:
                contenders["topk"] = lambda: rivals.kth_by_topk(scores, k)
                contenders["sort"] = lambda: rivals.kth_by_sort(scores, k)
        what = "elements" if block == (1, 1) else f"{block[0]}x{block[1]} units"
        return Problem(f"k-th of {what}", 4 * units, contenders, check, {})

    def _two_in_four(self) -> Problem:
        scores = self._unit_scores((1, 1))

        def check() -> None:
            same("2:4", kernels.n_in_m_masks(scores[:3], 2, 4), reference.n_in_m_masks(scores[:3], 2, 4))

        contenders: dict[str, Callable[[], object]] = {"tritprune": lambda: kernels.n_in_m_masks(scores, 2, 4)}
        agreement: dict[str, str] = {}
        if self.peers:
            expected = kernels.n_in_m_masks(scores, 2, 4)
            for name, rival in {
                "neural_compressor": rivals.two_in_four_neural_compressor,
                "asp": rivals.two_in_four_asp,
                "topk": rivals.two_in_four_topk,
            }.items():
                contenders[name] = lambda rival=rival: rival(scores)
                agreement[name] = difference(rival(scores), expected)
            if self.device.type == "cuda":
                halves = [score.bfloat16() for score in scores]
                contenders["torch tile, bf16, both ways"] = lambda: rivals.two_in_four_tile(halves)
        return Problem("2:4 masks", 5 * self.elements, contenders, check, agreement)

    def _group_scores(self) -> Problem:
        scores = self._unit_scores((1, 1))

        def check() -> None:
            arguments = (scores[:3], 2, 4)
            same("costs", kernels.n_in_m_group_scores(*arguments), reference.n_in_m_group_scores(*arguments))

        contenders: dict[str, Callable[[], object]] = {"tritprune": lambda: kernels.n_in_m_group_scores(scores, 2, 4)}
        if self.peers:
            contenders["topk"] = lambda: rivals.group_scores_by_topk(scores)
            contenders["sort"] = lambda: rivals.group_scores_by_sort(scores)
        return Problem("2:4 group scores", 5 * self.elements, contenders, check, {})

    def _threshold(self) -> Problem:
        scores, grids = self._unit_scores((4, 1)), self._grids((4, 1))
        units = sum(grid.units for grid in grids)
        threshold, remainder = kernels.kth_score(scores, grids, 4 * int(SPARSITY * units))

        def check() -> None:
            arguments = (scores[:3], grids[:3], threshold, remainder)
            same("masks", kernels.masks_from_threshold(*arguments), reference.masks_from_threshold(*arguments))

        contenders: dict[str, Callable[[], object]] = {
            "tritprune": lambda: kernels.masks_from_threshold(scores, grids, threshold, remainder)
        }
        if self.peers:
            contenders["eager, ties wrong"] = lambda: [score > threshold for score in scores]
        return Problem("threshold to 4x1 masks", 5 * units, contenders, check, {})

    def _apply(self) -> Problem:
        blocks = [(4, 1)] * len(self.shapes)
        masks = [score >= SPARSITY for score in self._unit_scores((4, 1))]
        own = [weight.clone() for weight in self.weights]

        def check() -> None:
            mine, theirs = ([weight.clone() for weight in self.weights[:3]] for _ in range(2))
            kernels.apply_masks_(mine, masks[:3], blocks[:3])
            reference.apply_masks_(theirs, masks[:3], blocks[:3])
            same("applied", mine, theirs)

        contenders: dict[str, Callable[[], object]] = {"tritprune": lambda: kernels.apply_masks_(own, masks, blocks)}
        if self.peers:
            spread = [mask.repeat_interleave(4, 0) for mask in masks]
            floats = [mask.to(self.dtype) for mask in spread]
            theirs = [weight.clone() for weight in self.weights]
            contenders["neural_compressor"] = lambda: rivals.apply_by_product(theirs, spread)
            contenders["mul_(bool)"] = lambda: rivals.apply_by_mul_(theirs, spread)
            contenders["foreach"] = lambda: rivals.apply_by_foreach(theirs, floats)
        written = int(SPARSITY * self.elements) * self.dtype.itemsize
        return Problem("apply 4x1 masks", self.elements // 4 + written, contenders, check, {})

    def _violations(self) -> Problem:
        blocks = [(4, 1)] * len(self.shapes)
        masks = [score >= SPARSITY for score in self._unit_scores((4, 1))]
        tensors = [weight.clone() for weight in self.weights]
        kernels.apply_masks_(tensors, masks, blocks)

        def check() -> None:
            clean = kernels.count_violations(tensors, masks, blocks)
            require(not clean.any(), f"violations: {int(clean.sum())} in weights that have none")
            arguments = (self.weights[:3], masks[:3], blocks[:3])
            same("violations", [kernels.count_violations(*arguments)], [reference.count_violations(*arguments)])

        contenders: dict[str, Callable[[], object]] = {
            "tritprune": lambda: kernels.count_violations(tensors, masks, blocks)
        }
        if self.peers:
            spread = [~mask.repeat_interleave(4, 0) for mask in masks]
            contenders["product, count_nonzero"] = lambda: rivals.violations_by_product(tensors, spread)
            contenders["nonzero and mask"] = lambda: rivals.violations_by_comparison(tensors, spread)
        read = int(SPARSITY * self.elements) * self.dtype.itemsize
        return Problem("count violations, 4x1", self.elements // 4 + read, contenders, check, {})

    def _crossing(self) -> Problem:
        scores, grids = self._unit_scores((4, 1)), self._grids((4, 1))
        units = [int(SPARSITY * grid.units) for grid in grids]
        budgets = [4 * k for k in units]

        def check() -> None:
            arguments = (scores[:3], grids[:3], budgets[:3])
            same("crossings", kernels.crossing_units(*arguments), reference.crossing_units(*arguments))

        contenders: dict[str, Callable[[], object]] = {
            "tritprune": lambda: kernels.crossing_units(scores, grids, budgets)
        }
        if self.peers:
            pairs = list(zip(scores, units, strict=True))
            contenders["kthvalue a layer"] = lambda: [rivals.kth_by_kthvalue([score], k) for score, k in pairs]
        return Problem("caps of layers, 4x1", self.elements, contenders, check, {})

    def _non_finite(self) -> Problem:
        scores = self._unit_scores((4, 1))

        def check() -> None:
            ugly = [score.clone().log_() for score in scores[:3]]
            ugly[0].view(-1)[::7] = torch.inf
            same("counts", [kernels.count_non_finite(ugly)], [reference.count_non_finite(ugly)])

        contenders: dict[str, Callable[[], object]] = {"tritprune": lambda: kernels.count_non_finite(scores)}
        if self.peers:
            contenders["isfinite"] = lambda: torch.stack([(~score.isfinite()).sum() for score in scores])
        return Problem("count non-finite, 4x1", self.elements, contenders, check, {})

    def _restore(self) -> Problem:
        before = [score >= SPARSITY for score in self._unit_scores((4, 1))]
        masks = [score >= SPARSITY for score in self._unit_scores((4, 1), 4)]
        condition = torch.ones((), dtype=torch.int64, device=self.device)

        def check() -> None:
            for number, wanted in ((0, masks[:3]), (1, before[:3])):
                mine = [mask.clone() for mask in masks[:3]]
                kernels.restore_masks_(mine, before[:3], condition * number)
                same("masks", mine, wanted)

        contenders: dict[str, Callable[[], object]] = {
            "tritprune": lambda: kernels.restore_masks_(masks, before, condition)
        }
        if self.peers:
            pairs = list(zip(before, masks, strict=True))
            contenders["where"] = lambda: [torch.where(condition != 0, old, mask) for old, mask in pairs]
        return Problem("restore 4x1 masks", self.elements // 2, contenders, check, {})

    def _update(self) -> Problem:
        scores, grids = self._unit_scores((4, 1)), self._grids((4, 1))
        blocks = [(4, 1)] * len(self.shapes)
        budget = 4 * int(SPARSITY * sum(grid.units for grid in grids))
        before = [torch.ones(grid.shape, dtype=torch.bool, device=self.device) for grid in grids]
        own = [weight.clone() for weight in self.weights]

        def run() -> Tensor:
            threshold, remainder = kernels.kth_score(scores, grids, budget)
            masks = kernels.masks_from_threshold(scores, grids, threshold, remainder)
            kernels.apply_masks_(own, masks, blocks)
            return kernels.mask_statistics(masks, before)

        def check() -> None:
            kept = int(run()[:, 0].sum())
            wanted = sum(grid.units for grid in grids) - budget // 4
            require(kept == wanted, f"update: {kept} units stay, {wanted} should")

        contenders: dict[str, Callable[[], object]] = {"tritprune": run}
        if self.peers:
            theirs = [weight.clone() for weight in self.weights]

            def rewritten() -> None:
                threshold = rivals.kth_by_kthvalue(scores, budget // 4)
                rivals.apply_by_product(theirs, [(score > threshold).repeat_interleave(4, 0) for score in scores])

            contenders["kthvalue, repeat, product"] = rewritten
        units = self.elements // 4
        floor = 4 * units + 5 * units + units + int(SPARSITY * self.elements) * self.dtype.itemsize
        return Problem("whole 4x1 update", floor, contenders, check, {})
