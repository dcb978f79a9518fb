"""What torch.compile makes of the operations: one graph, one node each, the results of a plain call."""

import pytest
import torch

from tritprune import kernels
from tritprune.kernels import UnitGrid

BLOCKS = [(4, 1), (2, 2)]


def inputs():
    generator = torch.Generator().manual_seed(0)
    weights, gradients = ([torch.randn(shape, generator=generator) for shape in ((8, 6), (7, 5))] for _ in range(2))
    grids = [UnitGrid.of_blocks(tuple(w.shape), block) for w, block in zip(weights, BLOCKS, strict=True)]
    masks = [torch.rand(grid.shape, generator=generator) < 0.5 for grid in grids]
    scores = [torch.rand(grid.shape, generator=generator) for grid in grids]
    return scores, torch.zeros(2, dtype=torch.int64), weights, gradients, masks


def step(scores, skipped, weights, gradients, masks):
    """A step as a training loop has it, with torch's own work before, between and after."""
    weights = [weight * 2 for weight in weights]
    for form in ("snip", "magnitude"):
        read = gradients if form == "snip" else None
        options = {"form": form, "reduce": "mean", "alpha": 0.9, "beta": 1.0}
        kernels.accumulate_unit_scores_(scores, skipped, weights, read, BLOCKS, **options)
    kernels.apply_masks_(weights, masks, BLOCKS)
    return sum(weight.sum() for weight in weights) + scores[0].sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_is_one_graph_and_the_same(backend):
    plain, traced = inputs(), inputs()
    expected = step(*plain)
    actual = torch.compile(step, fullgraph=True, backend=backend)(*traced)
    assert torch.equal(actual, expected)
    for mine, theirs in zip(traced[0], plain[0], strict=True):
        assert torch.equal(mine, theirs)


def test_a_traced_call_is_checked_when_it_runs():
    def wrong(tensor, mask):
        kernels.apply_masks_([tensor], [mask], [(4, 1)])

    compiled = torch.compile(wrong, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"mask of shape \[2, 6\], got bool \[3, 6\]"):
        compiled(torch.ones(8, 6), torch.ones(3, 6, dtype=torch.bool))


def whole_step(scores, skipped, weights, gradients, masks):
    """Scores, threshold, masks, zeros and what they say: a prune step."""
    grids = [UnitGrid.of_blocks(tuple(w.shape), block) for w, block in zip(weights, BLOCKS, strict=True)]
    options = {"form": "snip", "reduce": "mean", "alpha": 0.9, "beta": 1.0}
    kernels.accumulate_unit_scores_(scores, skipped, weights, gradients, BLOCKS, **options)
    bad = kernels.count_non_finite(scores)
    floor, cap = (kernels.crossing_units(scores, grids, budgets, kept=masks) for budgets in ([5, 5], [40, 30]))
    bounds = (torch.stack([floor[0], cap[0]], 1), torch.stack([floor[1], cap[1]], 1))
    threshold, remainder = kernels.kth_score(scores, grids, 30, kept=masks, bounds=bounds)
    new = kernels.masks_from_threshold(scores, grids, threshold, remainder, kept=masks, bounds=bounds)
    kernels.restore_masks_(new, masks, bad.sum())
    kernels.apply_masks_(weights, new, BLOCKS)
    violations = kernels.count_violations(weights, new, BLOCKS)
    return *new, kernels.mask_statistics(new, masks), violations, threshold + 1, bad


def n_in_m_step(scores, skipped, weights, gradients, masks):
    absolute = [weight.abs() for weight in weights]
    several = kernels.kth_score(absolute, [UnitGrid.of_blocks(tuple(w.shape), (1, 1)) for w in weights], [3, 4])
    packed = kernels.n_in_m_masks(absolute, 2, 4, packed=True)
    return *kernels.n_in_m_masks(absolute, 2, 4), *kernels.n_in_m_group_scores(absolute, 2, 4), *packed, *several


@pytest.mark.parametrize("each", [whole_step, n_in_m_step])
def test_a_whole_prune_step_is_one_graph_and_the_same(each):
    plain, traced = inputs(), inputs()
    expected = each(*plain)
    actual = torch.compile(each, fullgraph=True, backend="aot_eager")(*traced)
    for mine, theirs in zip((*actual, *traced[2]), (*expected, *plain[2]), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


def test_what_is_registered_passes_the_checks_of_torch():
    scores, skipped, weights, gradients, masks = inputs()
    flat, grids = [4, 1, 2, 2], [2, 6, 4, 4, 1, 1, 4, 3, 2, 1, 2, 1]
    positive = [weight.abs() for weight in weights]
    threshold, remainder = kernels.kth_score(
        scores, [UnitGrid.of_blocks((8, 6), (4, 1)), UnitGrid.of_blocks((7, 5), (2, 2))], 30
    )
    calls = {
        "accumulate_unit_scores_": (scores, skipped, weights, gradients, flat, "snip", "mean", 0.9, 1.0, "none"),
        "apply_masks_": (weights, masks, flat),
        "kth_score": (scores, grids, [30], False, masks, []),
        "masks_from_threshold": (scores, grids, threshold, remainder, masks, [], True),
        "crossing_units": (scores, grids, [5, 5], masks),
        "count_non_finite": (scores,),
        "n_in_m_masks": (positive, 2, 4, False),
        "n_in_m_group_scores": (positive, 2, 4),
        "count_violations": (weights, masks, flat),
        "mask_statistics": (masks, masks),
        "restore_masks_": (masks, [~mask for mask in masks], torch.tensor(1)),
    }
    traced = {op.name for op in vars(kernels).values() if isinstance(op, kernels.Op) and op.traced is not None}
    assert calls.keys() == traced
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.tritprune, name).default, arguments)
