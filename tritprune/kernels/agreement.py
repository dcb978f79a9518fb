"""When two backends agree: one exact rule and one error model, both of which raise.

* Masks, counts, thresholds, stored zeros, and scores of small units: equal bit for bit (NaN equals NaN; the sign of a
  zero counts).
* Scores that are sums in another order: the error against fp64 is at most twice that of the reference, or two units in
  the last place of fp32: what the four roundings after the sum may cost.
"""

import torch
from torch import Tensor

from tritprune.kernels import reference
from tritprune.kernels.cases import Arguments, Case
from tritprune.kernels.units import UnitGrid

_TWO_ULP = 2.0**-22


def assert_agrees(case: Case, actual: list[Tensor], expected: list[Tensor]) -> None:
    """Hold a backend's results of a case against those of the reference.

    Raises:
        AssertionError: they differ; the message has the case, the result, and the first difference.
    """
    if len(actual) != len(expected):
        raise AssertionError(f"{case}: {len(actual)} results, expected {len(expected)}")
    truth = None if case.exact else [*exact_unit_scores(case.arguments()), expected[-1].double()]
    for number, (result, wanted) in enumerate(zip(actual, expected, strict=True)):
        where = f"{case}, result {number}"
        if truth is not None and result.dtype == torch.float32:
            assert_as_accurate(where, result, wanted, truth[number])
        else:
            assert_same_bits(where, result, wanted)


def assert_same_bits(where: str, actual: Tensor, expected: Tensor) -> None:
    """Equal type, shape and bits; any NaN equals any other.

    Raises:
        AssertionError: with the number of differences and the first one.
    """
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{where}: got {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    different = actual != expected
    if actual.is_floating_point():
        different &= ~(actual.isnan() & expected.isnan())
        different |= actual.signbit() != expected.signbit()
        different &= ~(actual.isnan() & expected.isnan())
    _refuse(where, different, actual, expected)


def assert_as_accurate(where: str, actual: Tensor, expected: Tensor, truth: Tensor) -> None:
    """``|actual - truth| <= 2 max |expected - truth|``, or two units in the last place; non-finite values as expected.

    Raises:
        AssertionError: with the number of differences and the first one.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{where}: got {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    if actual.numel() == 0:
        return
    finite = expected.isfinite()
    assert_same_bits(f"{where} (non-finite values)", actual.where(~finite, 0.0), expected.where(~finite, 0.0))
    own_error = (expected.double() - truth).abs().where(finite, 0.0).max()
    allowed = torch.maximum(2 * own_error, truth.abs() * _TWO_ULP)
    error = (actual.double() - truth).abs()
    _refuse(where, finite & ~(error <= allowed), actual, expected)


def exact_unit_scores(arguments: Arguments) -> list[Tensor]:
    """The scores of ``accumulate_unit_scores_`` in fp64, written down once more without any thought of speed."""
    results: list[Tensor] = []
    form, reduce, alpha, beta, finish = (arguments[name] for name in ("form", "reduce", "alpha", "beta", "finish"))
    gradients = arguments["gradients"] or arguments["weights"]
    for score, weight, gradient, block in zip(
        arguments["scores"], arguments["weights"], gradients, arguments["blocks"], strict=True
    ):
        w, g = weight.double(), gradient.double()
        values = {"magnitude": w, "gradient": g, "snip": w * g, "product": w * g}[form]
        values = values if form == "product" else values.abs()
        if form != "magnitude":
            values = values.where(g.isfinite(), 0.0)
        n, m = block
        grid = UnitGrid.of_blocks((weight.shape[0], weight.shape[1]), block)
        fresh = torch.zeros(grid.shape, dtype=torch.float64)
        for row in range(grid.rows):
            for col in range(grid.cols):
                unit = values[row * n : (row + 1) * n, col * m : (col + 1) * m]
                fresh[row, col] = {"mean": unit.mean, "sum": unit.sum, "max": unit.amax, "l2": unit.norm}[reduce]()
        fresh = {"none": fresh, "abs": fresh.abs(), "square": fresh.square()}[finish]
        results.append(beta * fresh + (alpha * score.double() if alpha else 0.0))
    return results


def expected_results(case: Case) -> list[Tensor]:
    """What the reference gives on the CPU."""
    return case.run(getattr(reference, case.op))


def _refuse(where: str, different: Tensor, actual: Tensor, expected: Tensor) -> None:
    if bool(different.any()):
        first = tuple(int(place) for place in different.nonzero()[0])
        raise AssertionError(
            f"{where}: {int(different.sum())} of {different.numel()} differ; at {list(first)} "
            f"got {actual[first].item()!r}, expected {expected[first].item()!r}"
        )
