"""The same cases on a device; scripts/gpu runs these and fails if any is skipped."""

import pytest
import torch
from torch import nn

from tritprune import Pruner, kernels
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


def pruned(regrow=True):
    """Two layers, an optimizer and a pruner with a mask update at every step; gradients stay as they are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 130), nn.Linear(130, 2)).cuda()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(
        model, target_sparsity=0.6, initial_sparsity=0.3, end_step=1000, max_layer_sparsity=0.9, regrow=regrow
    ).attach(optimizer)
    return model, optimizer, pruner


@pytest.mark.parametrize("regrow", [False, True])
def test_a_step_of_a_pruner_does_not_synchronise(regrow):
    _, optimizer, pruner = pruned(regrow)
    events = []
    pruner.on_update(events.append)
    for _ in range(3):
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):  # each takes up the numbers of the update before it
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    assert pruner.last_event.step == 6
    assert pruner.last_event.sparsity == sum(mask.zeros() for mask in pruner.masks.values()) / (128 * 256 + 256 * 130)
    pruner.verify()


def test_a_step_of_a_pruner_is_captured_in_a_graph():
    model, optimizer, pruner = pruned()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    pruner.settle()
    state = [*model.parameters(), *pruner.scores.values()]
    start = [tensor.detach().clone() for tensor in state]
    read_by_the_graph = pruner.masks  # kept alive: a replay reads the masks that were in force
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    results = []
    for _ in range(2):
        with torch.no_grad():
            for tensor, old in zip(state, start, strict=True):
                tensor.copy_(old)
        graph.replay()
        results.append([tensor.detach().clone() for tensor in (*state, *(m.mask for m in pruner.masks.values()))])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    assert pruner.last_event.step == 4
    assert pruner.last_event.layers["0"].zeros == pruner.masks["0"].zeros()
    pruner.verify()
    assert len(read_by_the_graph) == 2


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
