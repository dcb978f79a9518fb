"""Inputs for every operation, ugly on purpose: they drive the tests of each backend, the compile check and benchmarks.

A case makes its tensors anew on every call (in-place operations spoil them) and the same ones every time.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from tritprune.kernels import reference
from tritprune.kernels.packing import pack_mask
from tritprune.kernels.reference import Block
from tritprune.kernels.sampling import Sampling, use_sampling
from tritprune.kernels.units import UnitGrid

Arguments = dict[str, Any]
Shape = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One call of one operation.

    Args:
        op: name of the operation.
        name: what is special about the case; unique within the operation.
        make: makes the keyword arguments on the CPU, from a generator seeded by the name.
        exact: whether every backend must give the same bits (scores of large units are summed in another order).
        sampling: sizes under which it runs, so that a small input takes the paths of a large one; None: the usual ones.
    """

    op: str
    name: str
    make: Callable[[torch.Generator], Arguments]
    exact: bool = True
    sampling: Sampling | None = None

    def arguments(self, device: torch.device | str = "cpu") -> Arguments:
        """Fresh keyword arguments on ``device``, with the strides and the alignment that the case asks for."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.op}: {self.name}".encode()))
        return {name: _moved(value, torch.device(device)) for name, value in self.make(generator).items()}

    def run(self, function: Callable[..., Any], device: torch.device | str = "cpu") -> list[Tensor]:
        """Call ``function`` on fresh arguments; everything that it returned or wrote, on the CPU."""
        arguments = self.arguments(device)
        with use_sampling(self.sampling):
            returned = function(**arguments)
        if self.op == "accumulate_unit_scores_":
            results = [*arguments["scores"], arguments["skipped"]]
        elif self.op == "restore_masks_":
            results = list(arguments["masks"])
        elif self.op == "apply_masks_":
            results = list(arguments["tensors"])
        elif self.op in ("masked_adamw_", "masked_sgd_"):
            written = ("weights", "firsts", "seconds", "momenta")
            results = [tensor for name in written for tensor in arguments.get(name) or ()]
        else:
            results = [returned] if isinstance(returned, Tensor) else list(cast("Sequence[Tensor]", returned))
        return [result.cpu() for result in results]

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


UGLY: tuple[Shape, ...] = ((8, 16), (10, 7), (1, 1), (0, 5), (5, 0), (3, 130), (37, 33))
"""Empty, one element, odd, ragged for every block, more than one tile."""

LONG: tuple[Shape, ...] = ((37, 33), (20, 130), (0, 21), (17, 40))
"""Sizes whose channels are large units."""

RAGGED: tuple[Shape, ...] = ((10, 7), (37, 33))
"""Ragged for every block, small and of several tiles."""

RAGGED_GRIDS = [UnitGrid.of_blocks((37, 33), (4, 5)), UnitGrid.of_blocks((50, 90), (3, 1))]
"""Units of several sizes."""

WIDE: tuple[Shape, ...] = ((32, 64), (16, 128))
"""Sizes that the aligned kernels take."""


def all_cases() -> list[Case]:
    """Every case of every operation."""
    return [
        *_score_cases(),
        *_n_in_m_cases(),
        *_kth_cases(),
        *_threshold_cases(),
        *_crossing_cases(),
        *_non_finite_cases(),
        *_apply_cases(),
        *_violation_cases(),
        *_statistics_cases(),
        *_restore_cases(),
        *_optimizer_cases(),
    ]


def cases_of(op: str) -> list[Case]:
    """The cases of one operation."""
    return [case for case in all_cases() if case.op == op]


# --- scores


def _score_cases() -> Iterator[Case]:
    for form in ("magnitude", "gradient", "snip"):
        for reduce in ("mean", "sum", "max"):
            yield _scores(f"{form} {reduce} 4x1", UGLY, (4, 1), form=form, reduce=reduce)
    for block in ((1, 1), (1, 4), (2, 2), (3, 5), (16, 1)):
        yield _scores(f"{block[0]}x{block[1]}", UGLY, block)
    for block in ((4, 1), (1, 1), (1, 4)):
        yield _scores(f"aligned {block[0]}x{block[1]}", WIDE, block)
    for reduce in ("mean", "max"):
        for block in ((5, 7), (16, 16), (40, 30)):
            yield _scores(f"large {block[0]}x{block[1]} {reduce}", UGLY, block, reduce=reduce, exact=reduce == "max")
        for block in (("R", 1), (1, "C"), ("R", "C")):
            yield _scores(f"large {block[0]}x{block[1]} {reduce}", LONG, block, reduce=reduce, exact=reduce == "max")
        for block in ((16, 16), ("R", 1), (1, "C")):
            name = f"large aligned {block[0]}x{block[1]} {reduce}"
            yield _scores(name, WIDE, block, reduce=reduce, exact=reduce == "max")
    for block in ((4, 1), ("R", 1), (16, 16), (5, 7)):
        for layout in ("transposed", "strided"):
            shapes = LONG if "R" in block else UGLY
            yield _scores(f"{layout} {block[0]}x{block[1]}", shapes, block, layout=layout, exact=block == (4, 1))
    yield _scores("transposed 2x3", UGLY, (2, 3), layout="transposed")
    yield _scores("transposed aligned 1x1", WIDE, (1, 1), layout="transposed")
    yield _scores("transposed aligned 1x4", WIDE, (1, 4), layout="transposed")
    yield _scores("unaligned address", WIDE, (4, 1), layout="offset")
    yield _scores("gradient of another layout", UGLY, (4, 1), layout="mixed")
    for w_type, g_type in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, None)):
        name = f"{w_type} x {g_type or torch.float32}".replace("torch.", "")
        types = (w_type, g_type or torch.float32)
        yield _scores(name, (*UGLY, *WIDE), (4, 1), types=types)
        yield _scores(f"{name}, large", WIDE, (16, 16), types=types, exact=False)
        for block in ((1, 1), (1, 4)):
            yield _scores(f"{name}, {block[0]}x{block[1]}", WIDE, block, types=types)
        yield _scores(f"{name}, channels", WIDE, ("R", 1), types=types, exact=False)
    for finish in ("none", "abs", "square"):
        for block in ((4, 1), (3, 5)):
            yield _scores(f"product {block[0]}x{block[1]} {finish}", RAGGED, block, form="product", finish=finish)
        name = f"product channels {finish}"
        yield _scores(name, RAGGED, ("R", 1), form="product", finish=finish, exact=False)
    yield _scores("product, reduce sum", WIDE, (4, 1), form="product", reduce="sum", beta=-1.0, alpha=1.0)
    yield _scores("product, signed zeros", RAGGED, (1, 1), form="product", values="signed zeros", alpha=0.0, beta=-1.0)
    yield _scores("product, non-finite gradients", UGLY, (4, 1), form="product", values="non-finite", finish="abs")
    for block in ((4, 1), (1, 4)):
        yield _scores(f"l2 {block[0]}x{block[1]}", (*RAGGED, WIDE[0]), block, reduce="l2")
        yield _scores(f"bf16 scores {block[0]}x{block[1]}", (*RAGGED, WIDE[0]), block, state=torch.bfloat16)
    for block in ((4, 1), (1, 4), (4, 4)):
        types = (torch.bfloat16, torch.bfloat16)
        yield _scores(f"bf16 throughout, {block[0]}x{block[1]}", WIDE, block, types=types, state=torch.bfloat16)
    for block in (("R", 1), (16, 16)):
        yield _scores(f"l2 {block[0]}x{block[1]}", RAGGED, block, reduce="l2", exact=False)
    yield _scores("bf16 scores, transposed", RAGGED, (4, 1), state=torch.bfloat16, layout="transposed")
    yield _scores("bf16 scores, channels of maxima", RAGGED, ("R", 1), state=torch.bfloat16, reduce="max")
    yield _scores("bf16 scores that are not finite", RAGGED, (1, 1), state=torch.bfloat16, values="nan weights")
    yield _scores("bf16 scores that overflow", RAGGED, (1, 1), state=torch.bfloat16, values="overflow")
    yield _scores("no layers", (), (4, 1))
    yield _scores("without the old score", UGLY, (4, 1), alpha=0.0, old=math.inf)
    yield _scores("zeros", UGLY, (4, 1), values="zero")
    yield _scores("denormal", UGLY, (4, 1), values="denormal")
    yield _scores("denormal magnitude", UGLY, (4, 1), values="denormal", form="magnitude", reduce="max")
    yield _scores("denormal mean", UGLY, (4, 1), values="denormal", form="magnitude", alpha=0.0)
    yield _scores("denormal squares", UGLY, (4, 1), values="tiny", form="magnitude", reduce="l2", alpha=0.0)
    yield _scores("non-finite gradients", UGLY, (4, 1), values="non-finite")
    yield _scores("non-finite gradients, max", UGLY, (4, 1), values="non-finite", reduce="max")
    yield _scores("non-finite gradients, large", UGLY, (5, 7), values="non-finite", exact=False)
    yield _scores("products that overflow", UGLY, (4, 1), values="overflow")
    yield _scores("NaN weights", UGLY, (4, 1), values="nan weights", reduce="max")
    yield _scores("NaN weights, large", UGLY, (5, 7), values="nan weights", reduce="max")
    blocks = [(4, 1), (1, 4), (16, 16), (37, 1), (1, 130), (4, 1)]
    shapes = [(12, 9), (4, 16), (40, 33), (37, 20), (6, 130), (9, 2)]
    yield Case("accumulate_unit_scores_", "a block a layer", lambda g: _score_arguments(g, shapes, blocks), exact=False)


def _scores(
    name: str, shapes: Sequence[Shape], block: tuple[int | str, int | str], *, exact: bool = True, **options: Any
) -> Case:
    blocks = [_resolve(block, shape) for shape in shapes]
    return Case("accumulate_unit_scores_", name, lambda g: _score_arguments(g, shapes, blocks, **options), exact=exact)


def _score_arguments(
    generator: torch.Generator,
    shapes: Sequence[Shape],
    blocks: Sequence[Block],
    *,
    form: str = "snip",
    reduce: str = "mean",
    alpha: float = 0.9,
    beta: float = 1.1,
    old: float | None = None,
    layout: str = "plain",
    values: str = "normal",
    types: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    finish: str = "none",
    state: torch.dtype = torch.float32,
) -> Arguments:
    weights = [_values(generator, shape, values if values != "non-finite" else "normal") for shape in shapes]
    gradients = [_values(generator, shape, values if values != "nan weights" else "normal") for shape in shapes]
    gradient_layout = {"mixed": "transposed"}.get(layout, layout)
    grids = [UnitGrid.of_blocks(shape, block) for shape, block in zip(shapes, blocks, strict=True)]
    return {
        "scores": [
            (torch.rand(g.shape, generator=generator) if old is None else torch.full(g.shape, old)).to(state)
            for g in grids
        ],
        "skipped": torch.arange(len(shapes)),
        "weights": [_laid_out(weight.to(types[0]), layout) for weight in weights],
        "gradients": None
        if form == "magnitude"
        else [_laid_out(gradient.to(types[1]), gradient_layout) for gradient in gradients],
        "blocks": list(blocks),
        "form": form,
        "reduce": reduce,
        "alpha": alpha,
        "beta": beta,
        "finish": finish,
    }


# --- N:M


def _n_in_m_cases() -> Iterator[Case]:
    shapes = [*UGLY, *WIDE]
    for op in ("n_in_m_masks", "n_in_m_group_scores"):
        for n, m in ((2, 4), (1, 4), (5, 8), (3, 7), (9, 20)):
            yield _n_in_m(op, f"{n}:{m}", n, m, shapes if m <= 8 else ((3, 45),))
        yield _n_in_m(op, "31:32", 31, 32, ((2, 45),))
        yield _n_in_m(op, "ties", 2, 4, shapes, values="ties")
        yield _n_in_m(op, "both signs", 2, 4, shapes, values="normal")
        yield _n_in_m(op, "ties of both signs", 3, 8, shapes, values="signed ties")
        yield _n_in_m(op, "zeros of both signs", 2, 4, shapes, values="signed zeros")
        yield _n_in_m(op, "all equal", 3, 8, shapes, values="zero")
        yield _n_in_m(op, "infinities", 2, 4, shapes, values="one infinity")
        yield _n_in_m(op, "transposed", 2, 4, shapes, layout="transposed")
        yield _n_in_m(op, "strided", 2, 4, shapes, layout="strided")
        yield _n_in_m(op, "unaligned address", 2, 4, WIDE, layout="offset")
        yield _n_in_m(op, "no layers", 2, 4, ())
    for n, m in ((2, 4), (3, 8), (3, 7)):
        yield _n_in_m("n_in_m_masks", f"packed {n}:{m}", n, m, shapes, packed=True)
    for op in ("n_in_m_masks", "n_in_m_group_scores"):
        for n, m in ((1, 2), (2, 4), (5, 8), (8, 16)):
            yield _n_in_m(op, f"whole groups {n}:{m}", n, m, ((6, 80), (64, 64)), values="signed ties")
    for n, m in ((1, 2), (2, 4), (5, 8), (8, 16)):
        yield _n_in_m("n_in_m_masks", f"packed whole groups {n}:{m}", n, m, ((6, 80), (64, 64)), packed=True)


def _n_in_m(
    op: str,
    name: str,
    n: int,
    m: int,
    shapes: Sequence[Shape],
    values: str = "positive",
    layout: str = "plain",
    **options: Any,
) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        scores = [_laid_out(_values(generator, shape, values), layout) for shape in shapes]
        return {"scores": scores, "n": n, "m": m, **options}

    return Case(op, name, make)


# --- thresholds


def _each_layer_inputs() -> Iterator[tuple[str, Callable[[torch.Generator], Arguments]]]:
    shapes = ((37, 33), (0, 5), (50, 90), (64, 64), (3, 5), (32, 32))
    grids = [UnitGrid.of_blocks(shape, (4, 1)) for shape in shapes]
    for values in ("positive", "signed ties", "infinities"):

        def make(generator: torch.Generator, values: str = values) -> Arguments:
            scores = [_values(generator, grid.shape, values) for grid in grids]
            shares = (0.5, 0.5, 0.0, 0.31, 1.2, 0.97)
            budgets = [int(share * grid.elements) for share, grid in zip(shares, grids, strict=True)]
            return {"scores": scores, "grids": grids, "budget": budgets}

        yield f"a budget a layer: {values}", make


def _search_inputs() -> Iterator[tuple[str, Callable[[torch.Generator], Arguments]]]:
    """Searches in which units have gone and layers have floors and caps."""
    even = [UnitGrid.of_blocks(shape, (4, 1)) for shape in (*WIDE, (64, 128))]
    mixed = [UnitGrid.of_blocks((37, 33), (4, 5)), *even[:2], UnitGrid(1, 12, 99, 64, 7, 7), *_EMPTY, *even[2:]]
    for name, grids, share, kept, bounded, values in (
        ("units have gone", even, 0.5, "bool", False, "positive"),
        ("packed units have gone", even, 0.5, "packed", False, "positive"),
        ("units have gone, unaligned address", mixed, 0.6, "offset", False, "positive"),
        ("packed units have gone, mixed sizes", mixed, 0.6, "packed", False, "positive"),
        ("more has gone than should", mixed, 0.1, "packed", False, "positive"),
        ("floors and caps", even, 0.5, "none", True, "positive"),
        ("floors and caps, units have gone", mixed, 0.6, "bool", True, "positive"),
        ("floors and caps, packed units have gone", even, 0.6, "packed", True, "positive"),
        ("ties at floors and caps, units have gone", mixed, 0.5, "bool", True, "ties"),
    ):
        yield name, _search_input(grids, share, values=values, kept=kept, bounded=bounded)
        if name.startswith("floors and caps,"):
            own = _search_input(grids, share, values=values, kept=kept, bounded=bounded, each=True)
            yield f"a budget a layer: {name}", own


_EMPTY = [UnitGrid.of_blocks((0, 5), (4, 1))]


def _search_input(
    grids: Sequence[UnitGrid],
    share: float,
    *,
    values: str = "positive",
    kept: str = "none",
    bounded: bool = False,
    each: bool = False,
) -> Callable[[torch.Generator], Arguments]:
    def make(generator: torch.Generator) -> Arguments:
        scores = [_values(generator, grid.shape, values) for grid in grids]
        marks = [torch.rand(grid.shape, generator=generator) < 0.7 for grid in grids]
        if kept == "offset":
            marks = [_laid_out(mark, "offset") for mark in marks]
        if kept == "packed":
            marks = [pack_mask(mark) for mark in marks]
        present = None if kept == "none" else marks
        bounds = None
        if bounded:
            pairs = [(2 * layer, grid) for layer, grid in enumerate(grids)]
            budgets = [
                (int((0.1 * place % 1) * grid.elements) - 1, int((1 - 0.15 * place % 0.9) * grid.elements))
                for place, grid in pairs
            ]
            found = [
                reference.crossing_units(scores, grids, [pair[end] for pair in budgets], kept=present) for end in (0, 1)
            ]
            bounds = tuple(torch.stack([one[part] for one in found], 1).contiguous() for part in (0, 1))
        budget = [int(share * grid.elements) for grid in grids]
        return {
            "scores": scores,
            "grids": list(grids),
            "budget": budget if each else sum(budget),
            "kept": present,
            "bounds": bounds,
        }

    return make


def _crossing_cases() -> Iterator[Case]:
    for kept in ("none", "bool", "packed"):
        for name, make in (
            ("mixed sizes", _search_input([*RAGGED_GRIDS, *_EMPTY], 0.5, kept=kept)),
            (
                "ties",
                _search_input([*RAGGED_GRIDS, UnitGrid.of_blocks((64, 64), (1, 1))], 0.5, kept=kept, values="ties"),
            ),
            ("all equal", _search_input([UnitGrid.of_blocks((64, 128), (4, 1))] * 3, 0.5, kept=kept, values="zero")),
        ):
            for shares in ((-1.0, 0.5, 1.5, 0.25), (0.0, 1.0, -1.0, 0.9)):

                def with_budgets(
                    generator: torch.Generator,
                    make: Callable[..., Arguments] = make,
                    shares: tuple[float, ...] = shares,
                ) -> Arguments:
                    arguments = make(generator)
                    grids = arguments["grids"]
                    budgets = [int(shares[n % 4] * max(grid.elements, 1)) for n, grid in enumerate(grids)]
                    return {
                        "scores": arguments["scores"],
                        "grids": grids,
                        "budgets": budgets,
                        "kept": arguments["kept"],
                    }

                sampling = Sampling(tiles=2) if name == "ties" else None
                called = f"{name}, kept {kept}, {shares[0]:g} of the first"
                yield Case("crossing_units", called, with_budgets, sampling=sampling)


def _non_finite_cases() -> Iterator[Case]:
    for layout in ("plain", "offset", "transposed"):
        for dtype in (torch.float32, torch.bfloat16):
            for values in ("non-finite", "denormal"):

                def make(
                    generator: torch.Generator, layout: str = layout, dtype: torch.dtype = dtype, values: str = values
                ) -> Arguments:
                    shapes = (*UGLY, *WIDE)
                    return {"scores": [_laid_out(_values(generator, s, values).to(dtype), layout) for s in shapes]}

                name = f"{values}, {str(dtype).removeprefix('torch.')}, {layout}"
                yield Case("count_non_finite", name, make)


SAMPLED = Sampling(least=1, units_per_sample=8, smallest=64, programs=4)
"""A bracket for small inputs: what it takes in is a few percent."""


def _kth_cases() -> Iterator[Case]:
    for name, make in (*_threshold_inputs(), *_each_layer_inputs(), *_search_inputs()):
        yield Case("kth_score", name, make)
    for name, make in _search_inputs():
        if not name.startswith("a budget a layer"):
            yield Case("kth_score", f"sampled: {name}", make, sampling=SAMPLED)
    even, flat = [UnitGrid.of_blocks((160, 48), (4, 1))], [UnitGrid.of_blocks((40, 48), (1, 1))]
    several = [UnitGrid.of_blocks((9, 16), (1, 1)), *flat, UnitGrid.of_blocks((33, 40), (1, 1))]
    mixed = [*flat, UnitGrid.of_blocks((71, 50), (4, 3)), UnitGrid(1, 12, 99, 64, 7, 7)]
    for name, grids, share, values in (
        ("the threshold is inside", even, 0.8, "positive"),
        ("few of many go", several, 0.001, "positive"),
        ("nearly all go", several, 0.999, "positive"),
        ("mixed sizes", mixed, 0.5, "positive"),
        ("mixed sizes of both signs", mixed, 0.9, "normal"),
        ("ties", mixed, 0.65, "ties"),
        ("all equal", even, 0.5, "zero"),
        ("two values", several, 0.5, "two values"),
        ("ascending", several, 0.3, "ascending"),
        ("denormal", even, 0.6, "denormal"),
        ("pruned and protected", mixed, 0.5, "infinities"),
        ("just above the pruned", several, 0.302, "infinities"),
        ("budget reaches the protected", several, 0.97, "infinities"),
        ("candidates in one of many layers", [*even, *flat], 0.3, "layers apart"),
    ):
        yield Case("kth_score", f"sampled: {name}", _threshold_input(grids, share, values), sampling=SAMPLED)
    for name, sampling in (
        ("segments overflow", replace(SAMPLED, room=256)),
        ("the bracket is too narrow", replace(SAMPLED, deviations=-1.2)),
    ):
        yield Case("kth_score", f"sampled: {name}", _threshold_input(several, 0.5), sampling=sampling)


def _threshold_cases() -> Iterator[Case]:
    packed = (
        "a budget a layer: signed ties",
        "packed units have gone",
        "floors and caps, packed units have gone",
        "ragged",
        "even sizes",
        "several tiles of ties",
        "ties in mixed sizes",
        "unaligned address",
        "no layers",
    )
    for name, make in (*_threshold_inputs(), *_each_layer_inputs(), *_search_inputs()):

        def with_threshold(generator: torch.Generator, make: Callable[..., Arguments] = make) -> Arguments:
            arguments = make(generator)
            threshold, remainder = reference.kth_score(**arguments)
            del arguments["budget"]
            return {**arguments, "threshold": threshold, "remainder": remainder}

        yield Case("masks_from_threshold", name, with_threshold)
        if name in packed:
            yield Case("masks_from_threshold", f"packed: {name}", lambda g, m=with_threshold: m(g) | {"packed": True})
        if name == "several tiles of ties":
            yield Case("masks_from_threshold", f"large tiles: {name}", with_threshold, sampling=Sampling(tiles=2))


def _threshold_inputs() -> Iterator[tuple[str, Callable[[torch.Generator], Arguments]]]:
    ugly = [UnitGrid.of_blocks(shape, (4, 1)) for shape in UGLY]
    even = [UnitGrid.of_blocks(shape, (4, 1)) for shape in WIDE]
    elements = [UnitGrid.of_blocks((100, 110), (1, 1)), UnitGrid.of_blocks((7, 3), (1, 1))]
    mixed = [
        UnitGrid.of_blocks((37, 33), (4, 5)),
        UnitGrid.of_blocks((50, 90), (3, 1)),
        UnitGrid(1, 12, 99, 64, 7, 7),
        UnitGrid.of_blocks((30, 10), (30, 1)),
        UnitGrid.of_blocks((3, 5), (8, 8)),
    ]
    for share in (0.0, 0.5, 1.0):
        yield f"mixed sizes, {share}", _threshold_input(mixed, share)
    yield "ragged", _threshold_input(ugly, 0.3)
    yield "even sizes", _threshold_input(even, 0.8)
    yield "several tiles", _threshold_input(elements, 0.8)
    yield "several tiles of ties", _threshold_input(elements, 0.65, "ties")
    yield "ties in mixed sizes", _threshold_input(mixed, 0.45, "ties")
    yield "all equal", _threshold_input([*even, *ugly], 0.5, "zero")
    yield "zeros of both signs", _threshold_input([*even, *ugly], 0.37, "signed zeros")
    yield "denormal", _threshold_input(ugly, 0.6, "denormal")
    yield "negative", _threshold_input(mixed, 0.4, "normal")
    yield "ties of both signs", _threshold_input(mixed, 0.4, "signed ties")
    yield "pruned and protected", _threshold_input([*even, *mixed], 0.5, "infinities")
    yield "budget reaches the protected", _threshold_input(mixed, 0.97, "infinities")
    yield "more than everything", _threshold_input(mixed, 1.5)
    yield "everything pruned already", _threshold_input(mixed, 0.5, "minus infinity")
    yield "everything protected", _threshold_input(mixed, 0.5, "plus infinity")
    yield "transposed", _threshold_input(mixed, 0.5, layout="transposed")
    yield "unaligned address", _threshold_input(even, 0.5, layout="offset")
    yield "no layers", _threshold_input([], 0.5)
    yield "only empty layers", _threshold_input([UnitGrid.of_blocks((0, 5), (4, 1))], 0.5)


def _threshold_input(
    grids: Sequence[UnitGrid], share: float, values: str = "positive", layout: str = "plain"
) -> Callable[[torch.Generator], Arguments]:
    def make(generator: torch.Generator) -> Arguments:
        scores = [_laid_out(_values(generator, grid.shape, values), layout) for grid in grids]
        return {"scores": scores, "grids": list(grids), "budget": int(share * sum(grid.elements for grid in grids))}

    return make


# --- masks


def _apply_cases() -> Iterator[Case]:
    for block in ((4, 1), (1, 1), (1, 4), (3, 5), (16, 16), ("R", 1), (1, "C"), (5, 7)):
        yield _apply(f"{block[0]}x{block[1]}", block)
    for dtype in (torch.bfloat16, torch.float16):
        yield _apply(f"{dtype}".removeprefix("torch."), (4, 1), dtype=dtype)
    for layout in ("transposed", "strided", "offset"):
        yield _apply(f"{layout} 4x1", (4, 1), layout=layout)
        yield _apply(f"{layout} 5x7", (5, 7), layout=layout)
    for values in ("non-finite", "signed zeros"):
        yield _apply(values, (4, 1), values=values)
    yield _apply("transposed masks", (4, 1), mask_layout="transposed")
    yield _apply("nothing pruned", (4, 1), kept=1.0)
    yield _apply("everything pruned", (4, 1), kept=0.0, values="non-finite")
    for block in ((4, 1), (1, 1), (1, 4), (5, 7), ("R", 1)):
        yield _apply(f"packed {block[0]}x{block[1]}", block, packed=True)
    yield _apply("packed transposed", (4, 1), layout="transposed", packed=True)
    yield _apply("packed bfloat16", (4, 1), dtype=torch.bfloat16, packed=True)
    yield Case("apply_masks_", "no layers", lambda _: {"tensors": [], "masks": [], "blocks": []})


def _apply(
    name: str,
    block: tuple[int | str, int | str],
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "plain",
    mask_layout: str = "plain",
    values: str = "normal",
    kept: float = 0.4,
    packed: bool = False,
) -> Case:
    shapes = [*UGLY, *WIDE]
    blocks = [_resolve(block, shape) for shape in shapes]

    def make(generator: torch.Generator) -> Arguments:
        grids = [UnitGrid.of_blocks(shape, block) for shape, block in zip(shapes, blocks, strict=True)]
        tensors = [_laid_out(_values(generator, shape, values).to(dtype), layout) for shape in shapes]
        masks = [_laid_out(torch.rand(grid.shape, generator=generator) < kept, mask_layout) for grid in grids]
        masks = [pack_mask(mask) for mask in masks] if packed else masks
        return {"tensors": tensors, "masks": masks, "blocks": blocks}

    return Case("apply_masks_", name, make)


def _violation_cases() -> Iterator[Case]:
    for block in ((4, 1), (1, 1), (3, 5), ("R", 1)):
        yield _violations(f"{block[0]}x{block[1]}", block)
    for layout in ("transposed", "strided", "offset"):
        yield _violations(layout, (4, 1), layout=layout)
    for values in ("non-finite", "signed zeros", "zero"):
        yield _violations(values, (4, 1), values=values)
    yield _violations("bfloat16", (4, 1), dtype=torch.bfloat16)
    yield _violations("nothing pruned", (4, 1), kept=1.0)
    for block in ((4, 1), (3, 5)):
        yield _violations(f"packed {block[0]}x{block[1]}", block, packed=True)
    yield Case("count_violations", "no layers", lambda _: {"tensors": [], "masks": [], "blocks": []})


def _violations(name: str, block: tuple[int | str, int | str], **options: Any) -> Case:
    return Case("count_violations", name, _apply(name, block, **options).make)


def _statistics_cases() -> Iterator[Case]:
    for layout in ("plain", "transposed", "strided", "offset"):
        yield _statistics(layout, [*UGLY, *WIDE, (90, 110)], layout)
    yield _statistics("packed", [*UGLY, *WIDE, (90, 110)], "plain", packed=True)
    yield _statistics("no layers", (), "plain")


def _statistics(name: str, shapes: Sequence[Shape], layout: str, *, packed: bool = False) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        masks = [[torch.rand(shape, generator=generator) < kept for shape in shapes] for kept in (0.3, 0.5)]
        if packed:
            masks = [[pack_mask(mask) for mask in several] for several in masks]
            return {"masks": masks[0], "previous": masks[1]}
        return {"masks": [_laid_out(mask, layout) for mask in masks[0]], "previous": masks[1]}

    return Case("mask_statistics", name, make)


def _restore_cases() -> Iterator[Case]:
    for layout, packed in (("plain", False), ("offset", False), ("plain", True)):
        for condition in (0, 3):
            both = _statistics(layout, [*UGLY, *WIDE, (90, 110)], layout, packed=packed)

            def make(generator: torch.Generator, both: Case = both, condition: int = condition) -> Arguments:
                return both.make(generator) | {"condition": torch.tensor(condition)}

            name = f"{'packed' if packed else layout}, {'put back' if condition else 'left'}"
            yield Case("restore_masks_", name, make)


# --- optimizers


def _optimizer_cases() -> Iterator[Case]:
    adamw: dict[str, Any] = {"lr": 0.02, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "weight_decay": 0.1, "step": 3}
    sgd: dict[str, Any] = {
        "lr": 0.1,
        "momentum": 0.9,
        "dampening": 0.1,
        "weight_decay": 0.01,
        "nesterov": False,
        "first": False,
    }
    several: list[tuple[str, dict[str, Any]]] = [
        ("4x1", {}),
        ("1x1 packed", {"block": (1, 1), "packed": True}),
        ("5x7 packed, reset", {"block": (5, 7), "packed": True, "reset": True}),
        ("transposed", {"layout": "transposed", "packed": True}),
        ("unaligned address", {"layout": "offset", "reset": True}),
        ("no mask", {"kept": None}),
    ]
    for name, options in several:
        yield _optimizer("masked_adamw_", name, **adamw, **options)
    several = [
        ("first step", {"step": 1, "weight_decay": 0.0}),
        ("beta1 below a half", {"beta1": 0.3}),
        ("of all sizes, no eps", {"values": "of all sizes", "eps": 0.0}),
        ("denormal, no eps", {"values": "denormal", "eps": 0.0}),
        ("zeros, no eps", {"values": "zero", "eps": 0.0}),
        ("non-finite", {"values": "non-finite"}),
    ]
    for name, options in several:
        yield _optimizer("masked_adamw_", name, **(adamw | options))
    several = [
        ("momentum 4x1", {}),
        ("first step", {"first": True, "weight_decay": 0.0}),
        ("nesterov, 1x1 packed, reset", {"nesterov": True, "block": (1, 1), "packed": True, "reset": True}),
        ("without momentum", {"momentum": 0.0, "layout": "strided"}),
        ("no mask", {"kept": None}),
        ("of all sizes", {"values": "of all sizes", "nesterov": True}),
        ("denormal", {"values": "denormal"}),
        ("non-finite", {"values": "non-finite"}),
    ]
    for name, options in several:
        yield _optimizer("masked_sgd_", name, **(sgd | options))


def _optimizer(
    op: str,
    name: str,
    *,
    block: Block = (4, 1),
    packed: bool = False,
    kept: float | None = 0.4,
    layout: str = "plain",
    values: str = "normal",
    **numbers: Any,
) -> Case:
    shapes = (*RAGGED, (0, 5), WIDE[0])

    def make(generator: torch.Generator) -> Arguments:
        def tensors(kind: str) -> list[Tensor]:
            return [_laid_out(_values(generator, shape, kind), layout) for shape in shapes]

        masks: list[Tensor | None] = [None] * len(shapes)
        if kept is not None:
            grids = [UnitGrid.of_blocks(shape, block) for shape in shapes]
            drawn = [torch.rand(grid.shape, generator=generator) < kept for grid in grids]
            masks = [pack_mask(mask) if packed else mask for mask in drawn]
        if op == "masked_adamw_":
            states = {"firsts": tensors(values), "seconds": [second.abs_() for second in tensors(values)]}
        else:
            states = {"momenta": tensors(values) if numbers["momentum"] else None}
        given = {"weights": tensors(values), "gradients": tensors(values), "masks": masks}
        return {**given, **states, "blocks": [block] * len(shapes), "rounding": "cuda", **numbers}

    return Case(op, name, make)


# --- tensors


def _values(generator: torch.Generator, shape: Shape, kind: str) -> Tensor:
    """fp32 values of a kind, of a shape."""
    normal = torch.randn(shape, generator=generator)
    some = torch.rand(shape, generator=generator)
    special = {
        "normal": lambda: normal,
        "positive": lambda: normal.abs(),
        "zero": lambda: torch.zeros(shape),
        "ties": lambda: (normal.abs() * 2).floor(),
        "two values": lambda: (some < 0.5).float(),
        "ascending": lambda: torch.arange(normal.numel()).view(shape).float(),
        "layers apart": lambda: some + shape[0],
        "signed ties": lambda: (normal * 2).round(),
        "signed zeros": lambda: torch.where(some < 0.5, -0.0, 0.0),
        "denormal": lambda: normal * 1e-39,
        "tiny": lambda: normal * 1e-20,
        "overflow": lambda: normal * 1e19,
        "of all sizes": lambda: (normal.double() * 2.0 ** torch.randint(-140, 127, shape, generator=generator)).float(),
        "non-finite": lambda: (
            normal.masked_fill(some < 0.06, math.inf)
            .masked_fill(some < 0.04, -math.inf)
            .masked_fill(some < 0.02, math.nan)
        ),
        "nan weights": lambda: normal.masked_fill(some < 0.05, math.nan),
        "one infinity": lambda: normal.masked_fill(some < 0.1, math.inf),
        "infinities": lambda: normal.masked_fill(some < 0.3, -math.inf).masked_fill(some > 0.9, math.inf),
        "minus infinity": lambda: torch.full(shape, -math.inf),
        "plus infinity": lambda: torch.full(shape, math.inf),
    }
    return special[kind]()


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values ``[R, C]`` in other memory: rows adjacent, gaps in both directions, or one element further on."""
    rows, cols = tensor.shape
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "strided":
        view = tensor.new_ones(2 * rows, 3 * cols)[::2, 1::3]
    elif layout == "offset":
        view = tensor.new_ones(rows * cols + 1)[1:].view(rows, cols)
    else:
        return tensor.contiguous()
    return view.copy_(tensor)


def _resolve(block: tuple[int | str, int | str], shape: Shape) -> Block:
    """A block in which R and C stand for the whole dimension."""
    n, m = (max(shape[axis], 1) if isinstance(size, str) else size for axis, size in enumerate(block))
    return n, m


def _moved(value: Any, device: torch.device) -> Any:
    """A list or tuple of tensors, or a tensor, on another device with its strides and its offset."""
    if isinstance(value, list):
        return [_moved(entry, device) for entry in cast("list[Any]", value)]
    if isinstance(value, tuple):
        return tuple(_moved(entry, device) for entry in cast("tuple[Any, ...]", value))
    if not isinstance(value, Tensor) or device.type == "cpu":
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())
    return storage.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
