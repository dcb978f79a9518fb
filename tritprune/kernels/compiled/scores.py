"""Scores of units, compiled: each row of weights and gradients is read once, in pieces that fit the cache.

Sums of units of up to ``SMALL_UNIT`` elements follow the reference's order and round to fp32 at each step: the same
bits. Larger units are summed in fp64 and rounded once.
"""

# pyright: basic

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba.extending import overload
from torch import Tensor

from tritprune.kernels.compiled.work import bits_of, compiled, pieces, plain, run
from tritprune.kernels.reference import SMALL_UNIT, Block, Finish, Form, Reduce

_MAGNITUDE_BITS, _INFINITY_BITS = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
_FORMS = {"magnitude": 0, "gradient": 1, "snip": 2, "product": 3}
_REDUCTIONS = {"sum": 0, "mean": 1, "max": 2, "l2": 3}
_FINISHES = {"none": 0, "abs": 1, "square": 2}


def accumulate_unit_scores_(
    scores: Sequence[Tensor],
    skipped: Tensor,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
    blocks: Sequence[Block],
    *,
    form: Form,
    reduce: Reduce,
    alpha: float,
    beta: float,
    finish: Finish = "none",
) -> None:
    """See :func:`tritprune.kernels.reference.accumulate_unit_scores_`."""
    jobs: list[tuple[Any, ...]] = []
    layers: list[int] = []
    how = (_FORMS[form], _REDUCTIONS[reduce], _FINISHES[finish], np.float32(alpha), np.float32(beta))
    for layer, (score, weight, (n, m)) in enumerate(zip(scores, weights, blocks, strict=True)):
        own = plain(weight)
        gradient = own if gradients is None or form == "magnitude" else plain(gradients[layer])
        for first, last in pieces(score.shape[0], n * weight.shape[1]):
            jobs.append((bits_of(score), own, gradient, first, last, n, m, n * m <= SMALL_UNIT, *how))
            layers.append(layer)
    for layer, bad in zip(layers, run(_score_rows, jobs), strict=True):
        if bad:
            skipped[layer] += bad


@compiled
def _score_rows(score, weight, gradient, first, last, n, m, small, form, reduce, finish, alpha, beta):
    """Rows ``first`` to ``last`` of units; returns the elements with a non-finite gradient."""
    n_rows, n_cols = weight.shape
    values = np.empty(n_cols, np.float32)
    w_row, g_row = np.empty(n_cols, np.float32), np.empty(n_cols, np.float32)
    units = np.empty(score.shape[1], np.float32)
    sums = np.empty(score.shape[1], np.float64)
    old = np.empty(score.shape[1], np.float32)
    mean, largest, l2 = reduce == 1, reduce == 2, reduce == 3
    in_fp64 = not (small or largest)
    bad = 0
    for unit_row in range(first, last):
        top, bottom = unit_row * n, min((unit_row + 1) * n, n_rows)
        for row in range(top, bottom):
            w = _as_fp32(weight[row], w_row)
            g = w if form == 0 else _as_fp32(gradient[row], g_row)
            bad += _element_scores(values, w, g, form)
            if l2:
                for c in range(n_cols):
                    values[c] = values[c] * values[c]
            if m == 1:
                _add_row(units, sums, values, row == top, largest, in_fp64)
            else:
                _add_blocks(units, sums, values, m, row == top, largest, in_fp64)
        if in_fp64:
            for c in range(units.size):
                units[c] = np.float32(sums[c])
        if mean:
            height = np.float32(bottom - top)
            whole, rest = n_cols // m, n_cols % m
            size = height * np.float32(m)
            for c in range(whole):
                units[c] = units[c] / size
            if rest:
                units[whole] = units[whole] / (height * np.float32(rest))
        if l2:
            for c in range(units.size):
                units[c] = np.sqrt(units[c])
        if finish == 1:
            for c in range(units.size):
                units[c] = abs(units[c])
        elif finish == 2:
            for c in range(units.size):
                units[c] = units[c] * units[c]
        out = score[unit_row]
        if alpha == 0:
            for c in range(units.size):
                units[c] = units[c] * beta
        else:
            past = _as_fp32(out, old)
            for c in range(units.size):
                units[c] = past[c] * alpha + units[c] * beta
        _store(out, units)
    return bad


@compiled
def _add_row(units, sums, values, begins, largest, in_fp64):
    """Fold a row of element scores into units of one column each."""
    if in_fp64:
        for c in range(values.size):
            sums[c] = values[c] if begins else sums[c] + values[c]
    elif begins:
        for c in range(values.size):
            units[c] = values[c] + np.float32(0)  # a sum that starts from +0: it is never -0
    elif largest:
        for c in range(values.size):
            units[c] = values[c] if values[c] > units[c] or values[c] != values[c] else units[c]
    else:
        for c in range(values.size):
            units[c] += values[c]


@compiled
def _add_blocks(units, sums, values, m, begins, largest, in_fp64):
    """Fold a row of element scores into units of ``m`` columns."""
    for c in range(units.size):
        first, last = c * m, min((c + 1) * m, values.size)
        if in_fp64:
            total = 0.0 if begins else sums[c]
            for i in range(first, last):
                total += values[i]
            sums[c] = total
            continue
        unit = values[first] + np.float32(0) if begins else units[c]
        first += 1 if begins else 0
        if largest:
            for i in range(first, last):
                unit = values[i] if values[i] > unit or values[i] != values[i] else unit
        else:
            for i in range(first, last):
                unit += values[i]
        units[c] = unit


def _as_fp32(row, room):
    """A row of fp32 as it is; one of bf16, given as int16, as fp32 in ``room``. Chosen by type when compiled."""
    raise NotImplementedError(f"only compiled code calls this, with {row} and {room}")


@overload(_as_fp32)
def _as_fp32_by_type(row, room):
    def same(row, room):
        return row

    def widened(row, room):
        bits = room.view(np.int32)
        for c in range(row.size):
            bits[c] = np.int32(row[c]) << 16
        return room

    return same if row.dtype == numba.float32 else widened


def _store(out, values):
    """fp32 values as they are, or rounded to the nearest bf16 (ties to even) where ``out`` holds bf16 as int16."""
    raise NotImplementedError(f"only compiled code calls this, with {out} and {values}")


@overload(_store)
def _store_by_type(out, values):
    def same(out, values):
        for c in range(values.size):
            out[c] = values[c]

    def rounded(out, values):
        bits = values.view(np.uint32)
        for c in range(values.size):
            if values[c] != values[c]:
                out[c] = np.int16((bits[c] >> np.uint32(16)) | np.uint32(0x40))
            else:
                to_even = np.uint32(0x7FFF) + ((bits[c] >> np.uint32(16)) & np.uint32(1))
                out[c] = np.int16(np.uint16((bits[c] + to_even) >> np.uint32(16)))

    return same if out.dtype == numba.float32 else rounded


@compiled
def _element_scores(values, w, g, form):
    """``f(w, g)`` of a row; 0 where the gradient is not finite; returns how many those are."""
    if form == 0:
        for c in range(values.size):
            values[c] = abs(w[c])
        return 0
    bits = g.view(np.int32)
    largest = np.int32(0)  # as integers the absolute values of floats keep their order, with infinity and NaN on top
    if form == 1:
        for c in range(values.size):
            values[c] = abs(g[c])
            largest = max(largest, np.int32(bits[c] & _MAGNITUDE_BITS))
    elif form == 2:
        for c in range(values.size):
            values[c] = abs(w[c] * g[c])
            largest = max(largest, np.int32(bits[c] & _MAGNITUDE_BITS))
    else:
        for c in range(values.size):
            values[c] = w[c] * g[c]
            largest = max(largest, np.int32(bits[c] & _MAGNITUDE_BITS))
    bad = 0
    if largest >= _INFINITY_BITS:
        for c in range(values.size):
            if (bits[c] & _MAGNITUDE_BITS) >= _INFINITY_BITS:
                values[c] = np.float32(0)
                bad += 1
    return bad
