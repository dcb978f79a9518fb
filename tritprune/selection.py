"""Which units go: unit scores and a budget of elements -> unit masks, exactly.

The order in which units go is: score ascending; among equals the higher (layer, row-major index) first. What goes is
the longest prefix of that order whose elements do not exceed the budget. Caps and floors per layer are hard: units past
a layer's cap leave the order, units that a floor demands move to its front; the budget that this displaces is spent in
the same order on the other layers.

No backend copies the scores for it: masks of what has gone are read beside them, and a floor or a cap is one unit of
its layer. Beside its result a selection takes at most 64 MB, whatever the size of the layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import Tensor

from tritprune.errors import BudgetError, NonFiniteScoreError
from tritprune.kernels import UnitGrid, count_non_finite, crossing_units, kth_score, masks_from_threshold

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
    budget: int | Sequence[int],
    *,
    kept: Sequence[Tensor] | None = None,
    floors: Sequence[int | None] | None = None,
    caps: Sequence[int | None] | None = None,
    packed: bool = False,
    check: bool = True,
) -> list[Tensor]:
    """Which units stay.

    Args:
        scores: fp32, finite, one per layer, of the shape of its grid; high = keep. Read where they are if contiguous.
        grids: unit sizes in elements.
        budget: elements that may be pruned over all layers; or of each, which then does not compete with the others.
        kept: bool per layer, or packed: units that have not gone already. Those that have go first, whatever budget and
            caps say. None: none has.
        floors: elements that at least go per layer, by the fewest units that reach them; None: no floor.
        caps: elements that at most go per layer; None: no cap.
        packed: give packed masks.
        check: refuse non-finite scores (which reads one number back); without it the caller has checked.

    Returns:
        bool per layer, of the shape of its grid, True = keep; or packed. On the scores' device, without a host read.

    Raises:
        NonFiniteScoreError: a score is NaN or infinite.
    """
    if check:
        refuse_non_finite(count_non_finite(scores).tolist(), [f"layer {i}" for i in range(len(scores))])
    layers = list(scores), list(grids)
    bounds = _bounds(*layers, floors or [None] * len(grids), caps or [None] * len(grids), kept)
    threshold, remainder = kth_score(*layers, budget, kept=kept, bounds=bounds)
    return masks_from_threshold(*layers, threshold, remainder, kept=kept, bounds=bounds, packed=packed)


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


def refuse_non_finite(counts: Sequence[int], names: Sequence[str], step: int | None = None) -> None:
    """Raise where :func:`tritprune.kernels.count_non_finite` found something.

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


def _bounds(
    scores: Sequence[Tensor],
    grids: Sequence[UnitGrid],
    floors: Sequence[int | None],
    caps: Sequence[int | None],
    kept: Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor] | None:
    """The units at the floor and at the cap of every layer, all found in one search; None if no layer has either.

    A floor takes all up to the unit that passes one element less; a cap keeps all from the unit that passes it on.
    """
    if not any(floors) and not any(
        cap is not None and cap < grid.elements for cap, grid in zip(caps, grids, strict=True)
    ):
        return None
    budgets: list[int] = []
    for floor, cap, grid in zip(floors, caps, grids, strict=True):
        most = grid.elements if cap is None else max(0, cap)
        budgets += (min(floor, grid.elements) - 1 if floor else -1, most)
    both = [layer for layer in range(len(grids)) for _ in ("floor", "cap")]
    present = None if kept is None else [kept[layer] for layer in both]
    crossed = crossing_units([scores[layer] for layer in both], [grids[layer] for layer in both], budgets, kept=present)
    return crossed[0].view(-1, 2), crossed[1].view(-1, 2)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.4g}" if whole else "0"
