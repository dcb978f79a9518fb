"""Every launch compiled for GPUs that are not there, by three Tritons, and held to limits: see gates.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import gates

LEAN = {"registers": 20, "spilled": 0, "shared": 0, "barriers": 0, "load": 16, "instructions": 100, "per_byte": 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("version", gates.VERSIONS)
def test_every_launch_keeps_the_limits_and_its_recorded_figures(version):
    measured = gates.measure(*gates.TARGETS[version], version=version)
    assert set(measured) == {target.partition(":")[0] for target in gates.TARGETS[version]}
    assert all(len(variants) >= 20 for variants in measured.values())
    faults = gates.judge(version, measured, gates.load())
    if any("not recorded" in line for line in faults):
        faults.append("figures of new and changed kernels are recorded by: python tests/kernels/gates.py --update")
    assert not faults, "\n".join(faults)


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
    measured = gates.measure("--probes", "sm_90", "gfx942")
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


def test_what_is_not_recorded_and_what_is_waived_in_vain():
    record = {"columns": list(gates.COLUMNS), "waived": {"a.kernel": {"shared": "why", "load": "why"}}, "recorded": {}}
    measured = {"sm_90": {"a.kernel(N=4)": LEAN | {"shared": 16}, "b.kernel(ALIGNED=False)": LEAN | {"load": 4}}}
    shut = gates.judge("installed", measured, record)
    assert [line.rpartition(": ")[2] for line in shut] == ["not recorded", "not recorded"]
    record, changes = gates.update(record, {"installed": measured})
    assert record["waived"] == {"a.kernel": {"shared": "why"}}
    assert "waiver no longer needed: a.kernel, load" in changes
    assert gates.judge("installed", measured, record) == []
    measured["sm_90"]["b.kernel(ALIGNED=True)"] = measured["sm_90"].pop("b.kernel(ALIGNED=False)")
    assert any("loads 4 bytes at a time" in line for line in gates.judge("installed", measured, record))


def test_a_triton_that_cannot_be_installed_is_an_error_that_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gates, "STORE", tmp_path / "triton")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"need triton 3.5.0 in .*pip cannot install it there"):
        gates.installed("3.5.0")
    assert list((tmp_path / "triton").iterdir()) == []
