"""The same cases on a device; scripts/gpu runs these and fails if any is skipped."""

import pytest
import torch

from tritprune import kernels
from tritprune.kernels import UnitGrid, agreement, cases
from tritprune.kernels import triton as launchers

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


def test_a_whole_mask_update_does_not_synchronise():
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(256, 128), (130, 77)]
    weights, gradients = (
        [torch.randn(shape, device="cuda", generator=generator) for shape in shapes] for _ in range(2)
    )
    blocks = [(4, 1)] * 2
    grids = [UnitGrid.of_blocks(shape, (4, 1)) for shape in shapes]
    scores = [torch.zeros(grid.shape, device="cuda") for grid in grids]
    skipped = torch.zeros(2, dtype=torch.int64, device="cuda")
    previous = [torch.ones(grid.shape, dtype=torch.bool, device="cuda") for grid in grids]

    def update():
        options = {"form": "snip", "reduce": "mean", "alpha": 0.9, "beta": 1.0}
        kernels.accumulate_unit_scores_(scores, skipped, weights, gradients, blocks, **options)
        threshold, remainder = kernels.kth_score(scores, grids, sum(grid.elements for grid in grids) // 2)
        masks = kernels.masks_from_threshold(scores, grids, threshold, remainder)
        kernels.apply_masks_(weights, masks, blocks)
        return kernels.mask_statistics(masks, previous)

    update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics = update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < int(statistics[:, 1].sum()) < sum(grid.units for grid in grids)


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
