"""The Triton kernels without a GPU: interpreted against the reference, and compiled for the GPUs that are not there.

Both need a process of their own (the interpreter must be chosen before the kernels are imported); see
run_interpreted.py and compile_ahead.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tritprune.kernels import cases

HERE = Path(__file__).parent
OPS = sorted({case.op for case in cases.all_cases()})


def run(script, *arguments, **environment):
    """The JSON object that a script of this folder prints."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, HERE / script, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", OPS)
def test_interpreter_agrees_with_the_reference(op):
    verdicts = run("run_interpreted.py", op, TRITON_INTERPRET="1")
    assert set(verdicts) == {case.name for case in cases.cases_of(op)}
    wrong = [f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict is not None]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_launch_compiles_without_spills(target, tmp_path):
    scope = () if target == "sm_90" else ("--representative",)
    variants = run("compile_ahead.py", target, *scope, TRITON_CACHE_DIR=str(tmp_path))
    assert len(variants) >= 30
    wrong = [f"{name}: {figures['fault']}" for name, figures in variants.items() if figures["fault"] is not None]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("probe", "fault"), [("spill", "spills: {'STACK': "), ("broken", "does not compile: ")])
def test_the_compile_check_can_fail(probe, fault, tmp_path):
    (figures,) = run("compile_ahead.py", "sm_90", "--probe", probe, TRITON_CACHE_DIR=str(tmp_path)).values()
    assert figures["fault"].startswith(fault)
