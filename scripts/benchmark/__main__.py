"""Measure the kernels against the bytes that they must move, and against their rivals. Called by scripts/bench."""

import argparse
import sys
from pathlib import Path

import torch
from clock import copy_bandwidth, count, measure
from problems import SETS, Problems
from show import Row, machine, plot, save, table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> int:
    """Parse, check, measure, show, save."""
    options = _parser().parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shapes = SETS[options.set or ("bert" if device.type == "cuda" else "minilm")]
    problems = Problems(
        shapes,
        device,
        dtype=DTYPES[options.dtype],
        peers=options.what != "kernels",
        compiled=not options.no_compile,
    )
    size = f"{len(shapes)} layers, {problems.elements / 1e6:,.1f}M weights"
    title = f"{options.what}: {size}, {options.dtype}, on {device.type}"
    if options.what == "counts":
        return _counts(problems, title, options.only)
    about = machine(device)
    _say(f"{title}\nmeasuring the copy bandwidth")
    bandwidth = copy_bandwidth(device)
    rows: list[Row] = []
    for problem in problems.all(options.only):
        problem.check()
        own = next(iter(problem.contenders))
        contenders = {own: problem.contenders[own], f"{own} again": problem.contenders[own], **problem.contenders}
        done = 0

        def tick(name: str = problem.name, rounds: int = options.repeats) -> None:
            nonlocal done
            done += 1
            _say(f"\r  {name:<26} {done:>3} of {rounds} rounds", end="")

        times = measure(contenders, device, repeats=options.repeats, seconds=options.seconds, tick=tick)
        _say(f"\r  {problem.name:<26} ours {times[own].median:.3g} ms" + " " * 12)
        floor = 1e3 * problem.floor / bandwidth
        rows += [
            Row(problem.name, name, value, floor, problem.agreement.get(name, "")) for name, value in times.items()
        ]
    if not rows:
        _say(f"nothing is called {options.only}; names: {', '.join(p.name for p in problems.all())}")
        return 2
    print(table(rows, bandwidth, about, title))
    folder = Path(options.out)
    stem = f"{options.what}_{device.type}_{options.dtype}"
    save(rows, bandwidth, about, folder / f"{stem}.jsonl")
    try:
        plot(rows, about, folder / f"{stem}.png", title)
    except ModuleNotFoundError:
        _say("no plot: matplotlib is not installed")
    _say(f"written to {folder}/{stem}.*")
    return 0


def _counts(problems: Problems, title: str, only: list[str]) -> int:
    """What one run of every contender dispatches, reads back and allocates."""
    print(f"{title}\n{'':<24}{'':<27}{'ops':>8}{'host reads':>12}{'launches':>10}{'allocated MB':>14}")
    for problem in problems.all(only):
        for number, (name, run) in enumerate(problem.contenders.items()):
            if name == "compile":
                continue
            run()
            counts = count(run)
            print(
                f"{'' if number else problem.name:<24}{name:<27}{counts.ops:>8,}{counts.host_reads:>12,}"
                f"{counts.launches:>10,}{counts.allocated / 1e6:>14,.1f}"
            )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument(
        "what", choices=("kernels", "peers", "counts"), help="ours alone; beside rivals; operations instead of time"
    )
    parser.add_argument("--set", choices=SETS, help="layer shapes; default bert on a GPU, minilm on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and gradients")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="problems whose name holds one of these")
    parser.add_argument("--repeats", type=int, default=50, help="rounds a problem")
    parser.add_argument("--seconds", type=float, default=20.0, help="most time a problem may take")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it needs a C++ compiler)")
    parser.add_argument("--out", default="outputs/bench", help="folder for JSON lines and plot")
    return parser


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
