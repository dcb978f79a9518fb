"""The sections of scripts/gpu: each gives its checks one by one."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from capture import capture
from check import Check, Place
from large import offsets
from races import races
from smoke import smoke

from tritprune.kernels import cases

ROOT = Path(__file__).parents[2]


def equivalence(place: Place) -> Iterator[Check]:
    """Every case of every operation on the device, with two poisons, bit for bit against the reference."""
    if place.dry:
        for op in ("mask_statistics", "masked_sgd_"):
            done = _run("tests/kernels/run_interpreted.py", op, seconds=300)
            yield Check(f"{op} in the interpreter", done.returncode == 0 and '": "' not in done.stdout, _tail(done))
        return
    report = place.out / "equivalence.xml"
    report.unlink(missing_ok=True)
    # neither this project's pytest settings nor its conftest: they ask for plugins that may not be here
    bare = ["-c", "/dev/null", "--rootdir", str(ROOT), "--confcutdir", "tests/kernels", "--import-mode=importlib"]
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests/kernels").glob("test_gpu*.py"))
    done = _run("-m", "pytest", *bare, "-q", "-m", "gpu", f"--junitxml={report}", *tests, seconds=300)
    if not report.is_file():
        yield Check("pytest", False, _tail(done))
        return
    found = list(ElementTree.parse(report).getroot().iter("testcase"))
    bad = {
        kind: [str(case.get("name")) for case in found if case.find(kind) is not None]
        for kind in ("failure", "error", "skipped")
    }
    least = 2 * len(cases.all_cases())
    yield Check("tests marked gpu", len(found) >= least, f"{len(found)} ran, at least {least} are expected")
    for kind, names in bad.items():
        shown = "; ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        yield Check(f"none with {kind}", not names, f"{len(names)}: {shown}" if names else "")
    yield Check("pytest's own verdict", done.returncode == 0, "" if done.returncode == 0 else _tail(done))


def bench(place: Place) -> Iterator[Check]:
    """Every operation against the bytes that it must move and against its rivals: tables, JSON lines, plots."""
    folder = place.out / "bench"
    if place.dry:
        runs = [
            (
                "kernels",
                "--set",
                "tiny",
                "--device",
                "cpu",
                "--repeats",
                "2",
                "--cached",
                "--only",
                "2:4 masks",
                "apply",
            )
        ]
    else:
        runs = [
            ("peers", "--set", "bert", "--dtype", "fp32", "--seconds", "3"),
            ("peers", "--set", "bert", "--dtype", "bf16", "--seconds", "2", "--no-compile"),
            ("counts", "--set", "tiny72"),
        ]
    for run in runs:
        done = _run("scripts/benchmark", *run, "--out", str(folder), seconds=200)
        name = "_".join(word for word in run if not word.startswith("--"))
        (folder / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(done.stdout, encoding="utf-8")
        print(done.stdout)
        yield Check(" ".join(run), done.returncode == 0, "" if done.returncode == 0 else _tail(done))
    if not place.dry and find_spec("matplotlib") is None:
        print("  no plots: matplotlib is not installed here; the JSON lines hold all that they would show")


SECTIONS: dict[str, Callable[[Place], Iterator[Check]]] = {
    "equivalence": equivalence,
    "capture": capture,
    "offsets": offsets,
    "races": races,
    "smoke": smoke,
    "bench": bench,
}


def _run(*arguments: str, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """A Python process of its own, from the root of the checkout; what ran too long has failed."""
    command = [sys.executable, *arguments]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as late:
        shown = [part.decode() if isinstance(part, bytes) else part or "" for part in (late.stdout, late.stderr)]
        return subprocess.CompletedProcess(command, 124, shown[0], f"{shown[1]}\nstopped after {seconds:.0f} s")


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    return "" if done.returncode == 0 else (done.stdout[-1500:] + done.stderr[-2500:]).strip()
