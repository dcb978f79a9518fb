"""Layers of more than 2^31 elements: offsets that 32 bits do not hold."""

from collections.abc import Iterator

import torch
from check import Check, Place

from tritprune import kernels
from tritprune.kernels import UnitGrid, reference

GIGABYTES = 30
COLS = 32768
ROWS = 2**31 // COLS + 16


def offsets(place: Place) -> Iterator[Check]:
    """Layers of more than 2^31 elements: scores, threshold, masks, N:M, zeros, at offsets past 32 bits."""
    rows, cols = (24, 64) if place.dry else (ROWS, COLS)
    if not place.dry:
        free = torch.cuda.mem_get_info(place.device)[0] / 1e9
        yield Check("memory", free >= GIGABYTES, f"{free:.0f} GB are free, {GIGABYTES} are needed")
        if free < GIGABYTES:
            return
    with kernels.use_backend("triton"):
        yield from _selection(place, rows, cols)
        yield from _patterns(place, rows, cols)
        yield from _weights(place, rows, cols)


def _selection(place: Place, rows: int, cols: int) -> Iterator[Check]:
    """Units of one element: the threshold by counting, and the masks that it gives."""
    generator = torch.Generator(place.device).manual_seed(0)
    score = torch.rand(rows, cols, generator=generator, device=place.device)
    grid = UnitGrid.of_blocks((rows, cols), (1, 1))
    budget = int(0.7 * grid.units)
    threshold, remainder = kernels.kth_score([score], [grid], budget)
    lower = sum(int((part < threshold).sum()) for part in score.split(4096))
    equal = sum(int((part == threshold).sum()) for part in score.split(4096))
    detail = f"{lower:,} lower, {equal:,} equal, budget {budget:,}, remainder {int(remainder):,}"
    yield Check("threshold", lower <= budget < lower + equal and int(remainder) == budget - lower, detail)
    (mask,) = kernels.masks_from_threshold([score], [grid], threshold, remainder)
    gone = sum(int((~part).sum()) for part in mask.split(4096))
    last = score[-8:] > threshold
    differing = int((mask[-8:] != last).sum())
    yield Check("masks", gone == budget and differing <= equal, f"{gone:,} units go, {budget:,} should")
    (counts,) = kernels.mask_statistics([mask], [torch.ones_like(mask)]).tolist()
    yield Check("statistics", counts == [grid.units - budget, budget], f"{counts}")


def _patterns(place: Place, rows: int, cols: int) -> Iterator[Check]:
    """2:4 of the last rows against the reference."""
    generator = torch.Generator(place.device).manual_seed(1)
    score = torch.rand(rows, cols, generator=generator, device=place.device)
    (mask,) = kernels.n_in_m_masks([score], 2, 4)
    (wanted,) = reference.n_in_m_masks([score[-8:].cpu()], 2, 4)
    kept = sum(int(part.sum()) for part in mask.split(4096))
    yield Check("2:4 masks", torch.equal(mask[-8:].cpu(), wanted) and kept == rows * cols // 2)


def _weights(place: Place, rows: int, cols: int) -> Iterator[Check]:
    """4x1 scores and zeros of a bf16 weight."""
    weight = torch.ones(rows, cols, dtype=torch.bfloat16, device=place.device)
    weight[-4:] = 3.0
    score = torch.zeros(rows // 4, cols, device=place.device)
    skipped = torch.zeros(1, dtype=torch.int64, device=place.device)
    options = {"form": "magnitude", "reduce": "sum", "alpha": 0.0, "beta": 1.0}
    kernels.accumulate_unit_scores_([score], skipped, [weight], None, [(4, 1)], **options)
    whole = bool((score[:-1] == 4.0).all()) and bool((score[-1] == 12.0).all())
    yield Check("4x1 scores", whole)
    mask = torch.ones(rows // 4, cols, dtype=torch.bool, device=place.device)
    mask[-1, ::2] = False
    kernels.apply_masks_([weight], [mask], [(4, 1)])
    tail = weight[-4:].float()
    clean = bool((tail[:, ::2] == 0).all()) and bool((tail[:, 1::2] == 3).all())
    zeros = rows * cols - sum(int(part.count_nonzero()) for part in weight.split(4096))
    yield Check("masks applied", clean and zeros == 2 * cols, f"{zeros:,} zeros, {2 * cols:,} should be")
    (found,) = kernels.count_violations([weight.add_(1)], [mask], [(4, 1)]).tolist()
    yield Check("violations counted", found == 2 * cols)
