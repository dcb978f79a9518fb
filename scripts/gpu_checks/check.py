"""What a section is given and what it gives."""

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Place:
    """Where a section runs.

    Args:
        device: CUDA or HIP; the CPU when dry.
        dry: whether Triton's interpreter stands in for a GPU, on little of everything.
        out: folder for what a section writes.
    """

    device: torch.device
    dry: bool
    out: Path

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, and how it went."""

    name: str
    passed: bool
    detail: str = ""
