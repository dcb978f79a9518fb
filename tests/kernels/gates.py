"""The compile gates: what the machine code of every launch must be like, on GPUs that need not be there.

    python tests/kernels/gates.py                     # check with the installed Triton, the oldest and the newest one
    python tests/kernels/gates.py oldest              # with one of them
    python tests/kernels/gates.py --update            # measure all three, write gates.json, say what changed

Two questions. Does a variant keep the limits below? Those that go over one for a reason have it under ``waived`` in
gates.json; a limit that is waived is still bounded by the next question. Is a figure worse than the recorded one by
more than the tolerance? So a compiler upgrade that doubles something fails, whatever the limit. Test helper, not a test
module; it needs neither torch nor Triton itself.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD = HERE / "gates.json"
STORE = ROOT / ".venv" / "triton"

VERSIONS = {"installed": None, "oldest": "3.5.0", "newest": "3.9.0"}
"""Which Tritons judge: the one of this environment, and the ends of what pyproject.toml allows."""

TARGETS = {
    "installed": ("sm_90", "sm_80:lean", "sm_100:lean", "gfx942:lean"),
    "oldest": ("sm_90:lean", "gfx942:lean"),
    "newest": ("sm_90:lean", "gfx942:lean"),
}

COLUMNS = ("registers", "spilled", "shared", "barriers", "load", "instructions", "per_byte")

LIMITS = {"spilled": 0, "registers": 64, "shared": 0, "barriers": 0, "load": 8, "per_byte": 7.8}
"""At most; ``load`` at least. 7.8: thread instructions that an H200 issues in the time that it copies a byte."""

EVERYWHERE = ("spilled", "registers")
"""Limits for layers of odd sizes and addresses, too; the others are for the kernels that well-aligned layers take."""

NOT_ON_AMD = ("registers", "per_byte")
"""Limits that come from NVIDIA's register file and clock."""

SLACK = {"registers": 8, "spilled": 0, "shared": 512, "barriers": 1, "instructions": 32, "per_byte": 0.5}
FACTOR = 1.5
"""A figure may be ``FACTOR`` times the recorded one plus its ``SLACK``; a load may not be narrower."""

Figures = dict[str, Any]
Measured = dict[str, dict[str, Figures]]


def measure(*arguments: str, version: str = "installed") -> dict[str, Any]:
    """What compile_ahead.py prints under one of the :data:`VERSIONS`.

    Raises:
        RuntimeError: it fails, or this Triton is not here and cannot be installed.
    """
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT)]
    if VERSIONS[version]:
        paths.insert(0, str(installed(VERSIONS[version])))
    variables |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(STORE / "cache")}
    command = [sys.executable, str(HERE / "compile_ahead.py"), *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def installed(version: str) -> Path:
    """The folder of a Triton beside the environment's own; installed there if it is not.

    Raises:
        RuntimeError: with what pip said.
    """
    folder = STORE / version
    if folder.is_dir():
        return folder
    STORE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=STORE, prefix="installing-") as made:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{made}/site"]
        done = subprocess.run([*pip, f"triton=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"the compile gates need triton {version} in {folder}, and pip cannot install it there:\n"
                f"{(done.stderr or done.stdout)[-1500:]}\n"
                f"With an index at hand: {sys.executable} -m pip install --no-deps --target {folder} triton=={version}"
            )
        try:
            Path(made, "site").rename(folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder


def over_limit(variant: str, target: str, figures: Figures) -> dict[str, str]:
    """Gate -> what is wrong, of the limits that hold for this variant."""
    if "error" in figures:
        return {"compiles": f"does not compile: {figures['error']}"}
    faults: dict[str, str] = {}
    for gate, limit in LIMITS.items():
        value = figures[gate]
        if target.startswith("gfx") and gate in NOT_ON_AMD:
            continue
        if gate not in EVERYWHERE and "ALIGNED=False" in variant:
            continue
        if gate == "load" and 0 < value < limit:
            faults[gate] = f"loads {value} bytes at a time, {limit} are wanted"
        elif gate != "load" and value > limit:
            faults[gate] = f"{gate} {value}, at most {limit}"
    return faults


def worse_than_recorded(figures: Figures, recorded: list[float] | None) -> dict[str, str]:
    """Column -> what is wrong, beyond the tolerance."""
    if "error" in figures:
        return {}
    if recorded is None:
        return {"recorded": "not recorded"}
    faults: dict[str, str] = {}
    for column, before in zip(COLUMNS, recorded, strict=True):
        now = figures[column]
        if column == "load":
            if 0 < now < before:
                faults[column] = f"loads {now} bytes at a time, recorded {before}"
        elif now > FACTOR * before + SLACK[column]:
            faults[column] = f"{column} {now}, recorded {before}"
    return faults


def judge(version: str, measured: Measured, record: dict[str, Any]) -> list[str]:
    """Everything that is wrong with what was measured under a version: one line each."""
    lines: list[str] = []
    for target, variants in measured.items():
        for variant, figures in variants.items():
            waived = record["waived"].get(variant.partition("(")[0], {})
            limits = over_limit(variant, target, figures)
            faults = {gate: text for gate, text in limits.items() if gate not in waived}
            recorded = record["recorded"].get(variant, {}).get(f"{version} {target}")
            faults |= worse_than_recorded(figures, recorded)
            lines += [f"{version} Triton, {target}, {variant}: {text}" for text in faults.values()]
    return lines


def update(record: dict[str, Any], measured: dict[str, Measured]) -> tuple[dict[str, Any], list[str]]:
    """The record of what was measured, and what is different in it; waivers that nothing needs are dropped."""
    entries: dict[str, dict[str, list[float]]] = {}
    needed: set[tuple[str, str]] = set()
    changes: list[str] = []
    for version, targets in measured.items():
        for target, variants in targets.items():
            for variant, figures in variants.items():
                needed |= {(variant.partition("(")[0], gate) for gate in over_limit(variant, target, figures)}
                if "error" in figures:
                    continue
                where = f"{version} {target}"
                before = record["recorded"].get(variant, {}).get(where)
                now = [figures[column] for column in COLUMNS]
                entries.setdefault(variant, {})[where] = now
                if before is None:
                    changes.append(f"new: {where}, {variant}")
                elif before != now:
                    changes.append(f"{where}, {variant}: {before} -> {now}")
    changes += [f"gone: {variant}" for variant in record["recorded"] if variant not in entries]
    waived: dict[str, dict[str, str]] = {}
    for kernel, gates in record["waived"].items():
        kept = {gate: reason for gate, reason in gates.items() if (kernel, gate) in needed}
        changes += [f"waiver no longer needed: {kernel}, {gate}" for gate in gates if gate not in kept]
        if kept:
            waived[kernel] = kept
    return {"columns": list(COLUMNS), "waived": waived, "recorded": dict(sorted(entries.items()))}, changes


def load() -> dict[str, Any]:
    """What gates.json says."""
    if not RECORD.is_file():
        return {"columns": list(COLUMNS), "waived": {}, "recorded": {}}
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["columns"] != list(COLUMNS):
        raise ValueError(f"{RECORD} has columns {record['columns']}, expected {list(COLUMNS)}")
    return record


def save(record: dict[str, Any]) -> None:
    """Write gates.json, one line a waiver and a measured variant."""

    def lines(entries: dict[str, Any]) -> str:
        return ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())

    text = (
        f'{{\n  "columns": {json.dumps(record["columns"])},\n  "waived": {{\n{lines(record["waived"])}\n  }},\n'
        f'  "recorded": {{\n{lines(record["recorded"])}\n  }}\n}}\n'
    )
    temporary = RECORD.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    shutil.move(temporary, RECORD)


def main() -> int:
    """Check or update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", choices=[*VERSIONS, []], metavar="|".join(VERSIONS))
    parser.add_argument("--update", action="store_true", help="write what is measured to gates.json")
    options = parser.parse_args()
    versions = list(VERSIONS) if options.update or not options.versions else options.versions
    measured: dict[str, Measured] = {}
    for version in versions:
        print(f"{version} Triton {VERSIONS[version] or ''}: {', '.join(TARGETS[version])}", file=sys.stderr, flush=True)
        measured[version] = measure(*TARGETS[version], version=version)
    record = load()
    if options.update:
        record, changes = update(record, measured)
        save(record)
        print("\n".join(changes) or "nothing changed")
    faults = [line for version in versions for line in judge(version, measured[version], record)]
    print("\n".join(faults) or f"{sum(len(v) for m in measured.values() for v in m.values())} variants pass")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
