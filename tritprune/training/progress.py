"""What a person sees while a run goes on: one live bar per phase, or plain lines where there is no terminal."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich import progress as rp
from rich.console import Console
from rich.text import Text


@dataclass
class Progress:
    """The run's voice on the terminal.

    Args:
        console: where to write.
        silent: processes other than the main one say nothing.
    """

    console: Console = field(default_factory=Console)
    silent: bool = False

    def say(self, message: object) -> None:
        """Print a renderable or a line."""
        if not self.silent:
            self.console.print(message)

    def note(self, message: str) -> None:
        """A remark that a user should see but that stops nothing."""
        self.say(Text(f"note: {message}", style="yellow"))

    @contextmanager
    def status(self, message: str) -> Iterator[None]:
        """A spinner while something takes a moment."""
        if self.silent or not self.console.is_terminal:
            yield
        else:
            with self.console.status(message):
                yield

    def phase(self, name: str, total: int, done: int) -> "PhaseBar":
        """A bar over the optimizer steps of a training phase."""
        return PhaseBar(self, name, total, done)

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator["Counter"]:
        """A transient bar over anything that can be counted."""
        with self._live(transient=True) as live:
            yield Counter(live, live.add_task(name, total=total, status=""))

    def _live(self, *, transient: bool) -> rp.Progress:
        return rp.Progress(
            rp.TextColumn("[bold]{task.description:<8}"),
            rp.BarColumn(bar_width=24),
            rp.MofNCompleteColumn(),
            rp.TextColumn("{task.fields[status]}"),
            rp.TimeElapsedColumn(),
            rp.TextColumn("[dim]left"),
            rp.TimeRemainingColumn(),
            console=self.console,
            transient=transient,
            disable=self.silent or not self.console.is_terminal,
        )


@dataclass
class Counter:
    """A running count on a transient bar."""

    live: rp.Progress
    task: rp.TaskID

    def advance(self, by: int) -> None:
        """Count on."""
        self.live.advance(self.task, by)


class PhaseBar:
    """One phase's live line: loss, metric, sparsity and time left; without a terminal, a line per evaluation."""

    def __init__(self, progress: Progress, name: str, total: int, done: int) -> None:
        self._progress, self._total = progress, total
        self._live = progress._live(transient=False)
        self._task = self._live.add_task(name, total=total, completed=done, status="")

    def __enter__(self) -> "PhaseBar":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, step: int, stage: str, shown: Mapping[str, float]) -> None:
        """Move to ``step`` and show the values."""
        status = "  ".join(f"{name} {_short(name, value)}" for name, value in shown.items())
        self._live.update(self._task, completed=step, description=stage, status=status)

    def busy(self, with_what: str) -> None:
        """Say what takes its time between two steps."""
        self._live.update(self._task, status=with_what)

    def evaluated(self, step: int, stage: str, values: Mapping[str, float], sparsity: float | None) -> None:
        """An evaluation was made: a line where no bar can be shown."""
        if self._progress.silent or self._progress.console.is_terminal:
            return
        parts = [f"{name} {_short(name, value)}" for name, value in values.items()]
        if sparsity is not None:
            parts.append(f"sparsity {sparsity:.4f}")
        self._progress.say(f"{stage:<8} {step:>5}/{self._total}  " + "  ".join(parts))


def _short(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "sparsity" else f"{value:.3f}"
