"""Run the sections, say how they went, write results.json. Called by scripts/gpu."""

import argparse
import json
import os
import platform
import sys
import time
import traceback
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from check import Check, Place
from sections import SECTIONS


def main() -> int:
    """0: everything ran and passed. 1: something failed or was skipped. 2: there is no GPU."""
    listed = "\n".join(f"  {name:<14}{run.__doc__.splitlines()[0]}" for name, run in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/gpu",
        description=f"Everything that only a GPU can show. Sections, in this order:\n{listed}",
        epilog="Exit status: 0 all passed, 1 something failed or was skipped, 2 no GPU.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="default: all")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/gpu"), help="folder for results.json, tables and plots"
    )
    parser.add_argument(
        "--dry", action="store_true", help="a taste in Triton's interpreter, on the CPU; proves no kernel"
    )
    options = parser.parse_args()
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; sections: {', '.join(SECTIONS)}")
    if not options.dry and not torch.cuda.is_available():
        print(
            f"scripts/gpu: no GPU: torch {torch.__version__} sees no CUDA or HIP device here, so nothing was run.\n"
            "On this machine: scripts/test (interpreter and compile gates), scripts/bench (CPU), scripts/gpu --dry.",
            file=sys.stderr,
        )
        return 2
    place = Place(torch.device("cpu" if options.dry else "cuda"), options.dry, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    about = describe(place)
    print(f"{'DRY, no kernel is proved: ' if options.dry else ''}{about['device']}; torch {torch.__version__}")
    results: dict[str, Any] = {}
    started = time.perf_counter()
    for name in options.sections or SECTIONS:
        results[name] = run_section(name, place)
        write(options.out, about, results, time.perf_counter() - started)
    failed = [name for name, result in results.items() if not result["passed"]]
    print(f"\n{time.perf_counter() - started:.0f} s; results in {options.out}/results.json")
    print(f"FAILED: {', '.join(failed)}" if failed else f"passed: {', '.join(results)}")
    return 1 if failed else 0


def run_section(name: str, place: Place) -> dict[str, Any]:
    """The checks of one section; an error of the section itself is one that failed."""
    print(f"\n== {name}")
    started = time.perf_counter()
    checks: list[Check] = []
    try:
        for check in SECTIONS[name](place):
            checks.append(check)
            print(f"  {'ok' if check.passed else 'FAILED':<7}{check.name}{': ' + check.detail if check.detail else ''}")
    except Exception:
        checks.append(Check("the section itself", False, traceback.format_exc()))
        print(f"  FAILED {checks[-1].detail}")
    if not checks:
        checks.append(Check("anything at all", False, "the section ran no check"))
    return {
        "passed": all(check.passed for check in checks),
        "seconds": round(time.perf_counter() - started, 1),
        "checks": [asdict(check) for check in checks],
    }


def describe(place: Place) -> dict[str, Any]:
    """Device and versions."""
    import triton

    name = "Triton's interpreter on the CPU" if place.dry else torch.cuda.get_device_name(place.device)
    about = {
        "device": name,
        "dry": place.dry,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
    }
    if not place.dry:
        properties = torch.cuda.get_device_properties(place.device)
        about |= {"memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
        about["capability"] = list(torch.cuda.get_device_capability(place.device))
        about["cuda"], about["hip"] = torch.version.cuda, torch.version.hip
    return about


def write(folder: Path, about: dict[str, Any], results: dict[str, Any], seconds: float) -> None:
    """results.json, whole after every section."""
    temporary = folder / "results.tmp"
    content = {**about, "seconds": round(seconds, 1), "passed": all(r["passed"] for r in results.values())}
    temporary.write_text(json.dumps({**content, "sections": results}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "results.json")  # noqa: PTH105 (a move within the folder)


if __name__ == "__main__":
    sys.exit(main())
