"""Every launch compiled for GPUs that are not there, by three Tritons, and held to limits: see gates.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import gates

LEAN = {"registers": 20, "spilled": 0, "shared": 0, "barriers": 0, "load": 16, "instructions": 100, "per_byte": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("version", gates.VERSIONS)
def test_every_launch_keeps_the_limits_and_its_recorded_figures(version, request):
    record = gates.load()
    whole = {target: gates.recorded_at(record, f"{version} {target}") for target in gates.TARGETS}
    names = whole if request.config.getoption("--gates") == "all" else gates.sample(record, version)
    measured = gates.measure(names, version)
    assert {target: list(found) for target, found in measured["figures"].items()} == names
    faults = [*gates.judge_record(record, measured), *gates.judge(version, measured, record)]
    if gates.stale(record, measured["fingerprints"]):
        faults.append("new and changed kernels are compiled and recorded by: python tests/kernels/gates.py --update")
    assert not faults, "\n".join(faults)


def test_every_kernel_is_compiled_again_under_each_triton_and_every_target_has_its_turn():
    record = gates.load()
    kernels = {gates.kernel_of(name) for name in record["recorded"]}
    assert len(kernels) >= 15
    places = set()
    for version in gates.VERSIONS:
        record["tritons"][version] = gates.here(version)
        chosen = gates.sample(record, version)
        assert sorted(gates.kernel_of(name) for names in chosen.values() for name in names) == sorted(kernels)
        places |= {(version, target) for target, names in chosen.items() if len(names) >= len(kernels) // 4}
    assert len(places) == len(gates.VERSIONS) * len(gates.TARGETS)
    record["tritons"]["installed"] = "0.1"  # measured by another Triton: every kernel on every target
    assert {len(names) for names in gates.sample(record, "installed").values()} == {len(kernels)}


def test_each_gate_refuses_its_probe():
    shut = {
        "compiles": {"compiles"},
        "spilled": {"spilled", "registers"},
        "registers": {"registers"},
        "shared": {"shared", "barriers"},
        "load": {"load"},
        "per_byte": {"per_byte"},
    }
    assert set().union(*shut.values()) == {"compiles", *gates.LIMITS}
    measured = gates.probe("sm_90", "gfx942")
    for probe, wanted in shut.items():
        figures = measured["sm_90"][probe]
        assert set(gates.over_limit("a.kernel()", "sm_90", figures)) == wanted, figures
    for probe in ("compiles", "shared"):
        assert set(gates.over_limit("a.kernel()", "gfx942", measured["gfx942"][probe])) == shut[probe]
    # the count of instructions in the ELF file is the disassembler's
    figures = measured["sm_90"]["per_byte"]
    assert figures["instructions"] == figures["disassembled"] > 300


@pytest.mark.parametrize("column", gates.COLUMNS)
def test_a_compiler_that_doubles_a_figure_is_found(column):
    recorded = [LEAN[name] for name in gates.COLUMNS]
    assert gates.worse_than_recorded(LEAN, recorded) == {}
    worse = LEAN | {column: LEAN[column] / 2 if column == "load" else 2 * LEAN[column] + gates.SLACK[column] + 1}
    assert set(gates.worse_than_recorded(worse, recorded)) == {column}


A_RECORD = {"columns": list(gates.COLUMNS), "tritons": {}, "recorded": {}, "waived": {}}
A_RECORD["waived"] = {"a.kernel": {"shared": "why", "load": "why"}}


def measured(triton="3.7.1", **kernels):
    """A launch of each named kernel, everywhere."""
    figures = {f"{kernel}.kernel(ALIGNED=True)": LEAN | changed for kernel, changed in kernels.items()}
    fingerprints = {name: f"{sum(bytes(name, 'ascii')):016x}" for name in figures}
    return {
        "triton": triton,
        "fingerprints": fingerprints,
        "covering": [name for name in figures if not name.startswith("few")],
        "figures": dict.fromkeys(gates.TARGETS, figures),
    }


def test_what_is_not_recorded_is_found_and_what_is_waived_in_vain():
    found = measured(a={"shared": 16}, b={})
    assert [line.rpartition(": ")[2] for line in gates.judge("oldest", found, A_RECORD)] == ["not recorded"] * 8
    assert [line[9:] for line in gates.judge_record(A_RECORD, found)] == [
        "ALIGNED=True): new since the record was made"
    ] * 2
    record, changes = gates.updated(A_RECORD, dict.fromkeys(gates.VERSIONS, found))
    assert record["waived"] == {"a.kernel": {"shared": "why"}}
    assert "waiver no longer needed: a.kernel, load" in changes
    assert gates.judge("oldest", found, record) == gates.judge_record(record, found) == []
    del record["recorded"]["b.kernel(ALIGNED=True)"]["oldest gfx942"]
    assert gates.judge_record(record, found) == ["oldest gfx942, b.kernel(ALIGNED=True): not recorded"]


def test_a_record_that_is_changed_by_hand_or_of_other_kernels_is_found():
    found = measured(a={}, b={"load": 4, "shared": 16})
    record, _ = gates.updated(A_RECORD, dict.fromkeys(gates.VERSIONS, found))
    kept = gates.judge_record(record, found)
    assert len(kept) == 24  # each limit of b in each place
    assert any("loads 4 bytes at a time" in line for line in kept)
    record["recorded"]["a.kernel(ALIGNED=True)"]["oldest sm_80"][0] -= 1
    assert any(line.startswith("oldest sm_80, a.kernel") for line in gates.judge("oldest", found, record))
    # of another Triton the same figures need only be no worse
    assert all("b.kernel" in line for line in gates.judge("oldest", found | {"triton": "4.0"}, record))
    fingerprints = found["fingerprints"] | {"a.kernel(ALIGNED=True)": "another", "c.kernel()": "one"}
    del fingerprints["b.kernel(ALIGNED=True)"]
    assert gates.judge_record(record, found | {"fingerprints": fingerprints})[:3] == [
        "a.kernel(ALIGNED=True): changed since the record was made",
        "b.kernel(ALIGNED=True): gone since the record was made",
        "c.kernel(): new since the record was made",
    ]


def test_an_update_compiles_what_changed_and_drops_what_no_longer_compiles():
    found = measured(a={}, b={}, few={})
    record, _ = gates.updated(A_RECORD, dict.fromkeys(gates.VERSIONS, found))
    record["tritons"] = {version: gates.here(version) for version in gates.VERSIONS}
    a, b, few = found["fingerprints"]
    assert [len(record["recorded"][name]) - 1 for name in (a, b, few)] == [12, 12, 1]
    nothing = {target: [] for target in gates.TARGETS}
    for version in gates.VERSIONS:
        assert gates.outdated(record, found, version) == nothing
    changed = found | {"fingerprints": found["fingerprints"] | {a: "another"}}
    assert gates.outdated(record, changed, "newest") == {target: [a] for target in gates.TARGETS}
    del record["recorded"][b]["newest sm_80"]
    assert gates.outdated(record, found, "newest") == nothing | {"sm_80": [b]}
    record["tritons"] = {}
    assert gates.outdated(record, found, "newest") == {target: [a, b] for target in gates.TARGETS}
    everything = {target: [a, b] for target in gates.TARGETS} | {"sm_90": [a, b, few]}
    assert gates.outdated(record, found, "installed") == everything
    broken = changed | {"triton": "3.9.0", "figures": {"sm_80": {a: {"error": "no"}}}}
    record, changes = gates.updated(record, {"newest": broken})
    assert set(record["recorded"][a]) == {"fingerprint"}  # what was measured of the old kernel is not of the new one
    assert any("-> no" in line for line in changes)
    assert len(record["recorded"][b]) == 12


def test_a_triton_that_cannot_be_installed_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gates, "STORE", tmp_path / "triton")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"need triton 3.5.0 in .*pip cannot install it there"):
        gates.installed("3.5.0")
    assert list((tmp_path / "triton").iterdir()) == []
