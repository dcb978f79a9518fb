"""The compile gates: what the machine code of every launch must be like, on GPUs that need not be there.

    python tests/kernels/gates.py                    # as scripts/test: is the record of these kernels, is it true
    python tests/kernels/gates.py --update           # compile what has changed, write gates.json, say what is different
    python tests/kernels/gates.py --all              # compile everything anew: some 8 minutes of one core

Every variant is recorded for sm_90 under the installed Triton, and a covering choice of them for four GPUs under three
Tritons, each with the fingerprint of all that decides its machine code. Four questions. Is a variant recorded as it is
now? Does the record keep the limits below? Variants that go over one for a reason have it under ``waived`` in
gates.json. Is the record true: a choice of variants, in which every kernel meets every Triton, is compiled again and
must give the recorded figures to the digit. And where the installed Triton is not the recorded one, is a figure worse
by more than a tolerance? So a compiler upgrade that doubles something fails, whatever the limit. Test helper, not a
test module; it needs neither torch nor Triton itself.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORD = HERE / "gates.json"
STORE = ROOT / ".venv" / "triton"

VERSIONS = {"installed": None, "oldest": "3.5.0", "newest": "3.9.0"}
"""Which Tritons judge: the one of this environment, and the ends of what pyproject.toml allows."""

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

WHOLE = "installed sm_90"
"""Where every variant is compiled; elsewhere a choice that covers what the kernels do."""

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
Measured = dict[str, Any]
"""What compile_ahead.py prints: ``triton``, ``fingerprints`` of all variants, ``covering``, ``figures`` of some."""

Names = dict[str, list[str]]
"""Target -> variants."""


def measure(names: Names, version: str = "installed") -> Measured:
    """The fingerprints of all variants, and the figures of some, under one of the :data:`VERSIONS`.

    Raises:
        RuntimeError: it fails, or this Triton is not here and cannot be installed.
    """
    return _compile_ahead(version, given=json.dumps(names))


def probe(*targets: str) -> dict[str, dict[str, Figures]]:
    """Target -> gate -> the figures of the probe that the gate must refuse."""
    return _compile_ahead("installed", "--probes", *targets)


def _compile_ahead(version: str, *arguments: str, given: str = "") -> dict[str, Any]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    paths = [str(ROOT)]
    if VERSIONS[version]:
        paths.insert(0, str(installed(VERSIONS[version])))
    variables |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": str(STORE / "cache")}
    command = [sys.executable, str(HERE / "compile_ahead.py"), *arguments]
    done = subprocess.run(command, env=variables, input=given, capture_output=True, text=True, check=False)
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


def sample(record: dict[str, Any], version: str) -> Names:
    """Which recorded variants are compiled again: of every kernel one, the targets taking turns.

    A kernel meets a target and a variant under each Triton, not the same ones; a Triton that is not the recorded one
    meets every kernel on every target.
    """
    kernels = list(dict.fromkeys(map(kernel_of, record["recorded"])))
    turn = list(VERSIONS).index(version)
    chosen: Names = {}
    for place, target in enumerate(TARGETS):
        there = recorded_at(record, f"{version} {target}")
        chosen[target] = []
        for number, kernel in enumerate(kernels):
            variants = [name for name in there if kernel_of(name) == kernel]
            mine = (number + turn) % len(TARGETS) == place
            if variants and (mine or here(version) != record["tritons"].get(version)):
                chosen[target].append(variants[len(variants) * (turn + place) // (len(VERSIONS) + len(TARGETS))])
    return chosen


def recorded_at(record: dict[str, Any], where: str) -> list[str]:
    """The variants that have figures of one ``version target``."""
    return [name for name, entry in record["recorded"].items() if where in entry]


def here(version: str) -> str:
    """The number of the Triton that one of the :data:`VERSIONS` is in this environment."""
    return VERSIONS[version] or metadata.version("triton")


def stale(record: dict[str, Any], fingerprints: Mapping[str, str]) -> list[str]:
    """Variants that are not recorded as they are now: new, changed, or recorded and no longer launched."""
    recorded = {name: entry["fingerprint"] for name, entry in record["recorded"].items()}
    return [name for name in sorted({*recorded, *fingerprints}) if recorded.get(name) != fingerprints.get(name)]


def judge_record(record: dict[str, Any], measured: Measured) -> list[str]:
    """What is wrong with the record itself: one line each. Compiles nothing."""
    lines, fingerprints = [], measured["fingerprints"]
    for name in stale(record, fingerprints):
        state = "gone" if name not in fingerprints else "changed" if name in record["recorded"] else "new"
        lines.append(f"{name}: {state} since the record was made")
    for name, entry in record["recorded"].items():
        lines += [f"{where}, {name}: not recorded" for where in places(measured, name) if where not in entry]
        for where in [place for place in entry if place != "fingerprint"]:
            figures = dict(zip(COLUMNS, entry[where], strict=True))
            lines += [f"{where}, {name}: {text}" for text in unwaived(record, name, where, figures)]
    return lines


def judge(version: str, measured: Measured, record: dict[str, Any]) -> list[str]:
    """What is wrong with variants that were compiled under a version: one line each."""
    lines: list[str] = []
    same = measured["triton"] == record["tritons"].get(version)
    for target, variants in measured["figures"].items():
        for name, figures in variants.items():
            where = f"{version} {target}"
            faults = unwaived(record, name, where, figures)
            recorded = record["recorded"].get(name, {}).get(where)
            now = [figures.get(column) for column in COLUMNS]
            if recorded is None:
                faults.append("not recorded")
            elif not same:
                faults += worse_than_recorded(figures, recorded).values()
            elif now != recorded and "error" not in figures:
                faults.append(f"{now}, recorded {recorded} of {', '.join(COLUMNS)}")
            lines += [f"{where}, {name}: {text}" for text in faults]
    return lines


def unwaived(record: dict[str, Any], name: str, where: str, figures: Figures) -> list[str]:
    """The limits that a variant goes over without a reason."""
    waived = record["waived"].get(kernel_of(name), {})
    return [text for gate, text in over_limit(name, where.split()[1], figures).items() if gate not in waived]


def kernel_of(name: str) -> str:
    """``module.kernel`` of a variant."""
    return name.partition("(")[0]


def places(measured: Measured, name: str) -> list[str]:
    """Where a variant is to be recorded: ``version target``, of each."""
    if name in measured["covering"]:
        return [f"{version} {target}" for version in sorted(VERSIONS) for target in sorted(TARGETS)]
    return [WHOLE] if name in measured["fingerprints"] else []


def outdated(record: dict[str, Any], measured: Measured, version: str) -> Names:
    """What must be compiled under a version so that the record is of these kernels and of that Triton."""
    changed = {*stale(record, measured["fingerprints"])}
    if here(version) != record["tritons"].get(version):
        changed |= measured["fingerprints"].keys()
    wanted: Names = {}
    for target in TARGETS:
        where = f"{version} {target}"
        named = [name for name in measured["fingerprints"] if where in places(measured, name)]
        wanted[target] = [name for name in named if name in changed or where not in record["recorded"][name]]
    return wanted


def updated(record: dict[str, Any], measured: Mapping[str, Measured]) -> tuple[dict[str, Any], list[str]]:
    """The record with what was measured in it, and what is different; waivers that nothing needs are dropped."""
    first = next(iter(measured.values()))
    fingerprints = first["fingerprints"]
    entries: dict[str, dict[str, Any]] = {}
    changes = [f"gone: {name}" for name in record["recorded"] if name not in fingerprints]
    for name in sorted(fingerprints):
        before = record["recorded"].get(name, {})
        kept = before if before.get("fingerprint") == fingerprints[name] else {}
        entry = {where: kept[where] for where in places(first, name) if where in kept}
        for version, found in measured.items():
            for where in [place for place in places(first, name) if place.split()[0] == version]:
                figures = found["figures"].get(where.split()[1], {}).get(name)
                if figures is None:
                    continue
                now = [figures.get(column) for column in COLUMNS]
                if where in before and before[where] != now:
                    changes.append(f"{where}, {name}: {before[where]} -> {figures.get('error', now)}")
                entry.pop(where, None)
                entry |= {} if "error" in figures else {where: now}
        changes += [] if before else [f"new: {name}"]
        entries[name] = {"fingerprint": fingerprints[name], **{where: entry[where] for where in sorted(entry)}}
    needed: set[tuple[str, str]] = set()
    for name, entry in entries.items():
        for where in [place for place in entry if place != "fingerprint"]:
            figures = dict(zip(COLUMNS, entry[where], strict=True))
            needed |= {(kernel_of(name), gate) for gate in over_limit(name, where.split()[1], figures)}
    waived: dict[str, dict[str, str]] = {}
    for kernel, gates in record["waived"].items():
        kept = {gate: reason for gate, reason in gates.items() if (kernel, gate) in needed}
        changes += [f"waiver no longer needed: {kernel}, {gate}" for gate in gates if gate not in kept]
        waived |= {kernel: kept} if kept else {}
    tritons = {version: found["triton"] for version, found in measured.items()}
    return {"columns": list(COLUMNS), "tritons": tritons, "waived": waived, "recorded": entries}, changes


def load() -> dict[str, Any]:
    """What gates.json says."""
    if not RECORD.is_file():
        return {"columns": list(COLUMNS), "tritons": {}, "waived": {}, "recorded": {}}
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["columns"] != list(COLUMNS):
        raise ValueError(f"{RECORD} has columns {record['columns']}, expected {list(COLUMNS)}")
    return record


def save(record: dict[str, Any]) -> None:
    """Write gates.json, one line a waiver and a variant."""

    def lines(entries: dict[str, Any]) -> str:
        return ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in entries.items())

    text = (
        f'{{\n  "columns": {json.dumps(record["columns"])},\n  "tritons": {json.dumps(record["tritons"])},\n'
        f'  "waived": {{\n{lines(record["waived"])}\n  }},\n  "recorded": {{\n{lines(record["recorded"])}\n  }}\n}}\n'
    )
    temporary = RECORD.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    shutil.move(temporary, RECORD)


def measure_all(wanted: Mapping[str, Names]) -> dict[str, Measured]:
    """Measure under each version what is wanted of it, two processes at a time; many variants are shared out."""

    def part(piece: tuple[str, Names]) -> Measured:
        (version, names), began = piece, time.monotonic()
        measured = measure(names, version)
        count, where = sum(map(len, names.values())), ", ".join(names)
        took = time.monotonic() - began
        print(f"{version} Triton {here(version)}, {where}: {count} compiled, {took:.0f} s", file=sys.stderr)
        return measured

    pieces: list[tuple[str, Names]] = []
    for version, names in wanted.items():
        many = sum(map(len, names.values())) > 100
        pieces += [(version, {target: names[target]}) for target in names] if many else [(version, names)]
    merged: dict[str, Measured] = {}
    with ThreadPoolExecutor(2) as pool:
        for (version, _), found in zip(pieces, pool.map(part, pieces), strict=True):
            merged.setdefault(version, {**found, "figures": {}})["figures"] |= found["figures"]
    return merged


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write what has changed to gates.json")
    parser.add_argument("--all", action="store_true", help="compile every variant, changed or not")
    options = parser.parse_args(arguments)
    record = load()
    variants = measure({})

    def wanted(version: str) -> Names:
        if options.all:
            return {
                t: [n for n in variants["fingerprints"] if f"{version} {t}" in places(variants, n)] for t in TARGETS
            }
        return outdated(record, variants, version) if options.update else sample(record, version)

    measured = measure_all({version: wanted(version) for version in VERSIONS})
    if options.update:
        record, changes = updated(record, measured)
        save(record)
        print("\n".join(changes) or "nothing changed")
    faults = judge_record(record, variants)
    for version, found in measured.items():
        faults += [line for line in judge(version, found, record) if line not in faults]
    compiled = sum(len(names) for found in measured.values() for names in found["figures"].values())
    print("\n".join(faults) or f"{len(variants['fingerprints'])} variants pass; {compiled} were compiled")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
