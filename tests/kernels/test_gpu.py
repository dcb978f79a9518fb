"""The same cases on a device; scripts/gpu runs these and fails if any is skipped."""

import pytest
import torch

from tritprune import kernels
from tritprune.kernels import UnitGrid, agreement, cases
from tritprune.kernels import triton as launchers
from tritprune.kernels.sampling import Sampling, use_sampling

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", cases.all_cases(), ids=str)
@pytest.mark.parametrize("poison", [0x00, 0xFF])
def test_kernels_agree_with_the_reference(case, poison, monkeypatch):
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.numel():
            tensor.view(-1).view(torch.uint8).fill_(poison)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    expected = agreement.expected_results(case)
    actual = case.run(getattr(launchers, case.op), "cuda")
    agreement.assert_agrees(case, actual, expected)
    again = case.run(getattr(launchers, case.op), "cuda")
    for first, second in zip(actual, again, strict=True):
        agreement.assert_same_bits(f"{case}, run twice", second, first)


class Update:
    """A whole prune step on fixed tensors: scores, threshold, masks, apply, statistics."""

    def __init__(self, shapes=((256, 128), (130, 77)), packed=False):
        generator = torch.Generator("cuda").manual_seed(0)
        self.packed = packed
        self.start, self.gradients = (
            [torch.randn(shape, device="cuda", generator=generator) for shape in shapes] for _ in range(2)
        )
        self.weights = [weight.clone() for weight in self.start]
        self.blocks = [(4, 1)] * len(shapes)
        self.grids = [UnitGrid.of_blocks(shape, (4, 1)) for shape in shapes]
        self.scores = [torch.zeros(grid.shape, device="cuda") for grid in self.grids]
        self.skipped = torch.zeros(len(shapes), dtype=torch.int64, device="cuda")
        self.previous = [torch.ones(grid.shape, dtype=torch.bool, device="cuda") for grid in self.grids]
        if packed:
            self.previous = [kernels.pack_mask(mask) for mask in self.previous]

    def __call__(self):
        options = {"form": "snip", "reduce": "mean", "alpha": 0.9, "beta": 1.0}
        kernels.accumulate_unit_scores_(self.scores, self.skipped, self.weights, self.gradients, self.blocks, **options)
        budget = sum(grid.elements for grid in self.grids) // 2
        threshold, remainder = kernels.kth_score(self.scores, self.grids, budget)
        masks = kernels.masks_from_threshold(self.scores, self.grids, threshold, remainder, packed=self.packed)
        kernels.apply_masks_(self.weights, masks, self.blocks)
        return kernels.mask_statistics(masks, self.previous)

    def begin(self):
        """Scores and weights as at the start, in the same memory."""
        for tensor in (*self.scores, self.skipped):
            tensor.zero_()
        for weight, start in zip(self.weights, self.start, strict=True):
            weight.copy_(start)


SAMPLED = Sampling(least=1, units_per_sample=8, smallest=64, programs=4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["bytes", "sampled"])
def test_a_whole_mask_update_does_not_synchronise(packed, sampling):
    update = Update(packed=packed)
    with use_sampling(sampling):
        update()
        torch.cuda.set_sync_debug_mode("error")
        try:
            statistics = update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert 0 < int(statistics[:, 1].sum()) < sum(grid.units for grid in update.grids)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["bytes", "sampled"])
def test_a_whole_mask_update_is_captured_in_a_graph(packed, sampling):
    update = Update(packed=packed)
    with use_sampling(sampling):
        expected = update().clone()
        wanted = [weight.clone() for weight in update.weights]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                update()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            statistics = update()
    for _ in range(3):  # tables are uploaded by every replay
        update.begin()
        graph.replay()
        assert torch.equal(statistics, expected)
        for weight, want in zip(update.weights, wanted, strict=True):
            assert torch.equal(weight, want)


def test_scores_of_more_than_32_bits_are_searched_within_64_mib():
    free, _ = torch.cuda.mem_get_info()
    units = 2**31 + 2**20
    if free < 6 * units:
        units = free // 8 // 2**20 * 2**20
    score = torch.empty(1, units, device="cuda").uniform_(generator=torch.Generator("cuda").manual_seed(0))
    grid = UnitGrid.of_blocks((1, units), (1, 1))
    budget = units // 5 * 4
    kernels.kth_score([score[:, : 2**23]], [UnitGrid.of_blocks((1, 2**23), (1, 1))], 2**22)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    threshold, remainder = kernels.kth_score([score], [grid], budget)
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20
    below = sum(int((part < threshold).sum()) for part in score.split(2**28, 1))
    equal = sum(int((part == threshold).sum()) for part in score.split(2**28, 1))
    assert below <= budget < below + equal
    assert int(remainder) == budget - below


def test_offsets_beyond_32_bits():
    storage = torch.zeros(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    weight = torch.as_strided(storage, (2, 1024), (2**31, 1))
    weight.fill_(1.0)
    score = torch.zeros(2, 1024, device="cuda")
    skipped = torch.zeros(1, dtype=torch.int64, device="cuda")
    options = {"form": "magnitude", "reduce": "sum", "alpha": 0.0, "beta": 1.0}
    kernels.accumulate_unit_scores_([score], skipped, [weight], None, [(1, 1)], **options)
    assert float(score.sum()) == 2048.0
    kernels.apply_masks_([weight], [torch.zeros(2, 1, dtype=torch.bool, device="cuda")], [(1, 1024)])
    assert float(storage.sum()) == 0.0
