"""Numbers on their way from a device to the host, which goes on meanwhile."""

import torch
from torch import Tensor


class Reading:
    """A copy that is under way from now on.

    On CUDA it goes into pinned memory beside the work, and an event says when it is there. While a CUDA graph is
    captured nothing can be copied that a replay would not copy again: the numbers stay on the device and are read there
    once they are asked for, after a replay.

    Args:
        numbers: integers, on their device; not written to any more.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._numbers = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda and not capturing():
            self._numbers, self._arrived = start_reading(numbers)

    def wait(self) -> list[int]:
        """The numbers; waits for the copy if it is still under way."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.cpu().numpy().tolist()


def start_reading(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy of CUDA numbers that is under way into pinned memory, and the event that says when it is there."""
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(numbers.device))  # their device need not be the current one
    return copy, arrived


def capturing() -> bool:
    """Whether a CUDA graph is being captured here."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
