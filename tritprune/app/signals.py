"""Ctrl-C and SIGTERM: finish the step, save, say how to go on."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text


@dataclass
class StopRequest:
    """What a signal has asked for."""

    reason: str | None = None
    status: int = 130


@contextmanager
def stop_signals(stop: StopRequest, console: Console) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a request that is honoured after the current step; a second one stops at once."""

    def ask(number: int, _frame: object) -> None:
        if stop.reason is not None:
            raise KeyboardInterrupt
        stop.reason = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        stop.status = 128 + number
        console.print(Text("stopping after this step and saving; once more stops at once", style="yellow"))

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
