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
