"""The Triton kernels without a GPU, interpreted, against the reference.

This needs a process of its own (the interpreter must be chosen before the kernels are imported): run_interpreted.py.
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
