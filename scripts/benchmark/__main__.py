"""Measure the kernels against the bytes that they must move, and against their rivals. Called by scripts/bench."""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from clock import Counts, copy_bandwidth, count, forced_backend, in_a_graph, measure, product_rate
from problem import Problem
from problems import SETS, Problems
from show import Progress, Row, machine, plot, save, table, write_whole
from steps import Steps

import tritprune
from tritprune import kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    """Parse, check, measure, show, save."""
    options = _parser().parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.threads:
        torch.set_num_threads(options.threads)
    name = options.set or ("bert" if device.type == "cuda" else "minilm")
    shapes = SETS[name]
    elements = sum(rows * cols for rows, cols in shapes)
    title = f"{options.what}: {len(shapes)} layers, {elements / 1e6:,.1f}M weights, {options.dtype}, on {device.type}"
    if options.what == "counts":
        return _counts(Steps(shapes, device), title, name, options)
    if options.what == "steps":
        problems = Steps(shapes, device)
        if problems.theirs is None:
            _say(
                "Neural Compressor is not installed here; experiments/2026-11_kernels/run.sh makes a place where it is"
            )
    else:
        problems = Problems(
            shapes,
            device,
            dtype=DTYPES[options.dtype],
            peers=options.what == "peers",
            compiled=not options.no_compile,
        )
    about = machine(device) | {"set": name, "layers": len(shapes), "weights": elements}
    _say(f"{title}\nmeasuring the copy bandwidth")
    bandwidth = copy_bandwidth(device)
    if device.type == "cuda":
        about["product_flops"] = product_rate(device)
    rows: list[Row] = []
    progress = Progress(len(problems.names(options.only)), options.seconds)
    with _called_ops() as called:
        for problem in problems.all(options.only):
            problem.check()
            rows += _measured(problem, device, bandwidth, options, progress)
    if not rows:
        _say(f"nothing is called {options.only}; names: {', '.join(problems.names())}")
        return 2
    print(table(rows, bandwidth, about, title))
    missing = sorted({op.name for op in vars(kernels).values() if isinstance(op, kernels.Op)} - called)
    if missing and options.what != "steps" and not options.only:
        print(f"\nnot measured: {', '.join(missing)}")
    folder = Path(options.out)
    stem = f"{options.what}_{device.type}_{options.dtype}"
    save(rows, bandwidth, about, folder / f"{stem}.jsonl")
    try:
        plot(rows, about, folder / f"{stem}.png", title)
    except ModuleNotFoundError:
        _say("no plot: matplotlib is not installed")
    _say(f"written to {folder}/{stem}.*")
    return 0


def _measured(
    problem: Problem, device: torch.device, bandwidth: float, options: argparse.Namespace, progress: Progress
) -> list[Row]:
    """One row a contender; the first one runs under two names."""
    own = next(iter(problem.contenders))
    contenders = {own: problem.contenders[own], f"{own} again": problem.contenders[own], **problem.contenders}
    if device.type == "cuda" and problem.in_a_graph:
        graph = in_a_graph(problem.contenders[own])
        contenders |= {f"{own}, in a graph": graph} if graph else {}
    progress.begin(problem.name, options.repeats)
    counts = _counted(problem, device) if options.what in ("kernels", "peers") else {}
    cold = not options.cached and problem.floor < 240e6
    times = measure(contenders, device, repeats=options.repeats, seconds=options.seconds, cold=cold, tick=progress.tick)
    progress.end(f"ours {times[own].median:.3g} ms")
    floor = 1e3 * problem.floor / bandwidth
    return [
        Row(problem.name, name, value, floor, problem.floor, problem.agreement.get(name, ""), counts.get(name))
        for name, value in times.items()
    ]


def _counted(problem: Problem, device: torch.device) -> dict[str, dict[str, int]]:
    """What one run of each dispatches, reads back, launches and allocates; ours on the CPU also as on a GPU."""
    found: dict[str, dict[str, int]] = {}
    own = next(iter(problem.contenders))
    problem.contenders[own]()  # what it keeps from call to call is there
    for name, run in problem.contenders.items():
        if name != "compile":  # not to be traced again under a dispatch mode
            found[name] = asdict(count(run))
    if device.type == "cpu" and find_spec("triton") and "TRITON_INTERPRET" not in os.environ:
        with forced_backend("triton"):
            count(problem.contenders[own], stub=True)
            found[own]["launches_on_a_gpu"] = count(problem.contenders[own], stub=True).launches
    return found


def _counts(steps: Steps, title: str, of: str, options: argparse.Namespace) -> int:
    """What a plain step and a mask update dispatch, read back, launch and allocate; a table and JSON lines."""
    print(f"{title}\n{'':<16}{'':<36}{'ops':>8}{'host reads':>12}{'launches':>10}{'allocated MB':>14}")
    entries: list[dict[str, Any]] = []
    for problem in steps.all(options.only):
        found: dict[str, Counts] = {}
        for name, run in problem.contenders.items():
            if not found:
                run()  # theirs has run before
            found[name] = count(run)
        if steps.device.type == "cpu":  # what a GPU would be given, counted where there is none
            with forced_backend("triton"), mock.patch.object(tritprune.Pruner, "_reads_later", True):
                count(problem.contenders["tritprune"], stub=True)
                found["tritprune on a GPU, not run"] = count(problem.contenders["tritprune"], stub=True)
        for number, (name, counts) in enumerate(found.items()):
            print(
                f"{'' if number else problem.name:<16}{name:<36}{counts.ops:>8,}{counts.host_reads:>12,}"
                f"{counts.launches:>10,}{counts.allocated / 1e6:>14,.1f}"
            )
            about = machine(steps.device) | {"set": of}
            entries.append({"problem": problem.name, "contender": name, **asdict(counts), **about})
    folder = Path(options.out)
    write_whole(folder / f"counts_{steps.device.type}.jsonl", "".join(json.dumps(entry) + "\n" for entry in entries))
    return 0


@contextmanager
def _called_ops() -> Iterator[set[str]]:
    """Names of the operations that were dispatched inside."""
    names: set[str] = set()
    call = kernels.Op.__call__

    def named(op: Any, *arguments: Any, **keywords: Any) -> Any:
        names.add(op.name)
        return call(op, *arguments, **keywords)

    with mock.patch.object(kernels.Op, "__call__", named):
        yield names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "what",
        choices=("kernels", "peers", "steps", "counts"),
        help="our operations alone; beside rivals; whole steps beside Neural Compressor; their operations, not time",
    )
    parser.add_argument("--set", choices=SETS, help="layer shapes; default bert on a GPU, minilm on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and gradients")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="problems whose name holds one of these")
    parser.add_argument("--repeats", type=int, default=50, help="rounds a problem")
    parser.add_argument("--seconds", type=float, default=20.0, help="most time a problem may take")
    parser.add_argument("--cached", action="store_true", help="do not clear the cache before a run")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as many as torch takes")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it needs a C++ compiler)")
    parser.add_argument("--out", default="outputs/bench", help="folder for JSON lines and plot")
    return parser


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
