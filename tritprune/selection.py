"""Which units go: unit scores and a budget of elements -> unit masks, exactly.

The order in which units go is: score ascending; among equals the higher (layer, row-major index) first. What goes is
the longest prefix of that order whose elements do not exceed the budget. Caps and floors per layer are hard: units past
a layer's cap leave the order, units that a floor demands move to its front; the budget that this displaces is spent in
the same order on the other layers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from tritprune.errors import BudgetError, NonFiniteScoreError
from tritprune.kernels import UnitGrid, kth_score, masks_from_threshold

Normalize = Literal["none", "l2", "max"]

_WRITTEN = 10**6


def exact_budget(sparsity: float, elements: int) -> int:
    """The most elements that ``sparsity`` allows: ``floor(sparsity * elements)`` in exact arithmetic.

    ``exact_budget(0.29, 100)`` is 29, where ``int(0.29 * 100)`` is 28; ``exact_budget(1 / 3, 30)`` is 10.

    Args:
        sparsity: fraction of zeros; what a float means is :func:`meant_by`.
        elements: how many there are.
    """
    return math.floor(meant_by(sparsity) * elements)


def at_least(sparsity: float, elements: int) -> int:
    """The fewest elements that reach ``sparsity``: ``ceil(sparsity * elements)`` in exact arithmetic."""
    return math.ceil(meant_by(sparsity) * elements)


def meant_by(sparsity: float) -> Fraction:
    """The fraction that was written: of denominator up to 10^6 if one gives this float, else the shortest decimal."""
    plain = Fraction(float(sparsity)).limit_denominator(_WRITTEN)
    return plain if float(plain) == float(sparsity) else Fraction(str(float(sparsity)))


def largest_unit(grid: UnitGrid) -> int:
    """The size in elements of a grid's largest unit."""
    heights = (grid.last_row_size, grid.row_size if grid.rows > 1 else 0)
    widths = (grid.last_col_size, grid.col_size if grid.cols > 1 else 0)
    return max(heights) * max(widths)


def select(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    budget: int,
    *,
    pruned: Sequence[Tensor] | None = None,
    floors: Sequence[int | None] | None = None,
    caps: Sequence[int | None] | None = None,
    check: bool = True,
) -> list[Tensor]:
    """Which units stay.

    Args:
        scores: fp32, finite, one per layer, of the shape of its grid; high = keep.
        grids: unit sizes in elements.
        budget: elements that may be pruned over all layers.
        pruned: bool per layer, units that have gone already; they go first, whatever budget and caps say.
        floors: elements that at least go per layer, by the fewest units that reach them; None: no floor.
        caps: elements that at most go per layer; None: no cap.
        check: refuse non-finite scores (which reads one number back); without it the caller has checked.

    Returns:
        bool per layer, of the shape of its grid, True = keep. On the scores' device, without a host read.

    Raises:
        NonFiniteScoreError: a score is NaN or infinite.
    """
    if check:
        refuse_non_finite(count_non_finite(scores).tolist(), [f"layer {i}" for i in range(len(scores))])
    order = [score.float() for score in scores]
    if pruned is not None:
        order = [score.masked_fill(gone, -math.inf) for score, gone in zip(order, pruned, strict=True)]
    order = _bounded(order, grids, floors or [None] * len(grids), caps or [None] * len(grids))
    forced = pruned is not None or any(floors or ())
    masks = _longest_prefix(order, grids, budget)
    return [mask & (score != -math.inf) for mask, score in zip(masks, order, strict=True)] if forced else masks


def normalize_scores(scores: Sequence[Tensor], normalize: Normalize) -> list[Tensor]:
    """Bring every layer's scores to one scale before layers compete; the order within a layer does not turn.

    ``l2``: ``s / sqrt(sum s^2)``; ``max``: ``s / max |s|``, over the layer's finite scores. Signs stay, zeros stay
    zeros, and -inf, inf and NaN stay what they are. Nothing is read by the host. The norm and the quotient are fp64,
    rounded to fp32 once: ``max`` gives the same bits on every device; ``l2`` sums in the device's order, so there the
    last bit may differ between devices. Neighbouring scores may round to a tie.

    Args:
        scores: fp32 or bf16 of any shape, one tensor a layer.
        normalize: ``none`` gives the tensors themselves, without a copy.

    Returns:
        Tensors of the shapes of ``scores``; fp32 unless ``normalize`` is ``none``.

    Raises:
        ValueError: ``normalize`` is none of the three.
    """
    if normalize not in ("none", "l2", "max"):
        raise ValueError(f"normalize is none, l2 or max, got {normalize!r}")
    if normalize == "none":
        return list(scores)
    results: list[Tensor] = []
    for score in scores:
        values = score.double()
        finite = values.where(values.isfinite(), 0.0).abs().flatten()
        largest = finite.max() if finite.numel() else finite.sum()
        norm = finite.square().sum().sqrt() if normalize == "l2" else largest
        results.append((values / norm.where(norm > 0, 1.0)).float())
    return results


def count_non_finite(scores: Sequence[Tensor]) -> Tensor:
    """NaNs and infinities of every layer, on its device: int64 ``[T]``."""
    if not scores:
        return torch.zeros(0, dtype=torch.int64)
    return torch.stack([(~torch.isfinite(score)).sum() for score in scores])


def refuse_non_finite(counts: Sequence[int], names: Sequence[str], step: int | None = None) -> None:
    """Raise where :func:`count_non_finite` found something.

    Raises:
        NonFiniteScoreError: the message names layer, number of units and step.
    """
    bad = [f"{name} ({count} units)" for name, count in zip(names, counts, strict=True) if count]
    if bad:
        where = "" if step is None else f" at step {step}"
        raise NonFiniteScoreError(
            f"scores are NaN or infinite{where} although their gradients were finite or not used: {', '.join(bad[:5])}"
            + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
            + "; a weight is not finite, or a product of weight and gradient overflows fp32"
        )


@dataclass(frozen=True)
class Demand:
    """What is asked of one layer, for :func:`check_feasible`.

    Args:
        name: of the layer.
        elements: the denominator of its sparsity.
        grid: its units.
        floor: elements that at least go; None: no floor.
        cap: elements that at most go; None: no cap.
    """

    name: str
    elements: int
    grid: UnitGrid
    floor: int | None = None
    cap: int | None = None

    @property
    def least(self) -> int:
        """The fewest elements that whole units can prune and reach the floor (with ragged units: at least that)."""
        if not self.floor:
            return 0
        unit = self.grid.uniform_size
        return -(-self.floor // unit) * unit if unit else self.floor

    @property
    def most(self) -> int:
        """The most elements that whole units can prune within the cap (with ragged units: at most that)."""
        if self.cap is None or self.cap >= self.grid.elements:
            return self.grid.elements
        unit = self.grid.uniform_size
        return self.cap // unit * unit if unit else self.cap


def check_feasible(demands: Sequence[Demand], budget: int, target: float) -> None:
    """Refuse floors and caps that contradict each other or the target, before anything is spent.

    Exact where all units have one size; with units of several sizes only certain contradictions are refused, and the
    rest is decided within one unit.

    Args:
        demands: one per layer that competes for the budget.
        budget: elements to prune over these layers.
        target: the sparsity that the budget stands for, for the message.

    Raises:
        BudgetError: no choice of units meets floors, caps and target; the message has the numbers.
    """
    for demand in demands:
        if demand.least > demand.most:
            limit = "cap" if demand.most < demand.grid.elements else "pattern"
            raise BudgetError(
                f"{demand.name}: the floor asks for at least {demand.least} of {demand.elements} elements in whole "
                f"units ({_share(demand.least, demand.elements)}), the {limit} allows {demand.most} "
                f"({_share(demand.most, demand.elements)})"
            )
    elements = sum(demand.elements for demand in demands)
    least, most = sum(demand.least for demand in demands), sum(demand.most for demand in demands)
    sizes = {demand.grid.uniform_size for demand in demands}
    unit = sizes.pop() if len(sizes) == 1 else None
    # The pattern's own limit (a ragged last group of N:M) is no contradiction: all that it can prune is pruned.
    wanted = min(budget, sum(demand.grid.elements for demand in demands))
    wanted = wanted // unit * unit if unit else wanted
    if least > wanted:
        raise BudgetError(
            f"target sparsity {target:g} prunes {wanted} of {elements} elements, but floors ask for {least} "
            f"({_share(least, elements)}) in whole units; lower min_layer_sparsity or raise the target"
        )
    slack = 0 if unit else max((largest_unit(demand.grid) for demand in demands), default=0)
    if most < wanted - slack:
        raise BudgetError(
            f"target sparsity {target:g} prunes {wanted} of {elements} elements, but caps allow {most} "
            f"({_share(most, elements)}) in whole units; raise max_layer_sparsity or lower the target"
        )


def _bounded(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], floors: Sequence[int | None], caps: Sequence[int | None]
) -> list[Tensor]:
    """Scores with -inf for the units that floors demand and +inf for those past caps: one search for all of either."""
    bounded = list(scores)
    capped = {
        layer: max(0, cap)
        for layer, (cap, grid) in enumerate(zip(caps, grids, strict=True))
        if cap is not None and cap < grid.elements
    }
    for layer, keep in _prefix_of_each(scores, grids, capped):
        bounded[layer] = bounded[layer].masked_fill(keep & (scores[layer] != -math.inf), math.inf)
    floored: dict[int, int] = {}
    for layer, (floor, grid) in enumerate(zip(floors, grids, strict=True)):
        if floor and grid.units:
            unit = grid.uniform_size or 1
            floored[layer] = -(-floor // unit) * unit  # equal units: the prefix itself reaches the floor
    for layer, keep in _prefix_of_each(scores, grids, floored):
        score, grid = scores[layer], grids[layer]
        if grid.uniform_size is None:
            gone = grid.sizes(score.device).masked_fill(keep, 0).sum()
            keep = keep & ~_next_unit(score, keep, short=gone < floored[layer])
        bounded[layer] = bounded[layer].masked_fill(~keep, -math.inf)
    return bounded


def _prefix_of_each(
    scores: Sequence[Tensor], grids: Sequence[UnitGrid], budgets: Mapping[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """For each layer with a budget of its own, the units past the longest prefix within it: (layer, keep)."""
    if not budgets:
        return
    chosen, own = [scores[layer].contiguous() for layer in budgets], [grids[layer] for layer in budgets]
    thresholds, remainders = kth_score(chosen, own, list(budgets.values()))
    yield from zip(budgets, masks_from_threshold(chosen, own, thresholds, remainders), strict=True)


def _next_unit(score: Tensor, keep: Tensor, short: Tensor) -> Tensor:
    """The first unit of the order among ``keep``, if the prefix before it falls ``short``: bool like ``keep``."""
    left = score.masked_fill(~keep, math.inf)
    tied = keep & (left == left.amin())
    index = torch.arange(keep.numel(), device=keep.device).view(keep.shape)
    last = index.masked_fill(~tied, -1).amax()
    return (index == last) & short


def _longest_prefix(scores: Sequence[Tensor], grids: Sequence[UnitGrid], budget: int) -> list[Tensor]:
    """Units past the longest prefix of the order within the budget: bool per layer, True = keep."""
    if budget >= sum(grid.elements for grid in grids):
        return [score == math.inf for score in scores]  # nothing to search for: all goes that may
    scores = [score.contiguous() for score in scores]
    threshold, remainder = kth_score(scores, list(grids), budget)
    return masks_from_threshold(scores, list(grids), threshold, remainder)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.4g}" if whole else "0"
