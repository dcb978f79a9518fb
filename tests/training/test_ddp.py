"""Two gloo processes: the same masks on both at every update, and those of one process with the same global batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).parent / "ddp_run.py"


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=240, env=environment, check=False
    )


@pytest.mark.slow
def test_masks_agree_between_processes_and_with_one_process(tmp_path):
    for processes in (1, 2):
        done = torchrun(processes, str(tmp_path / str(processes)))
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / str(n) / "run" / "masks.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_masks_that_differ_are_an_error_that_names_the_step(tmp_path):
    done = torchrun(2, str(tmp_path), "break")
    assert done.returncode != 0
    assert "masks differ between processes at step" in done.stderr
