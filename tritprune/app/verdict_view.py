"""What verify= says: one line a check, and the verdict."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tritprune.training.verification import Finding


def verdict_view(folder: Path, findings: Sequence[Finding]) -> RenderableType:
    """A table of the checks, then the verdict in one line, which names the first that does not hold."""
    table = Table(title=f"verify {folder}", title_justify="left", box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        word = Text("holds", style="green") if finding.holds else Text("does not hold", style="bold red")
        table.add_row(finding.what, word, Text(finding.detail, style="dim" if finding.holds else ""))
    broken = [finding for finding in findings if not finding.holds]
    if not broken:
        return Group(table, Text(f"\nverified: all {len(findings)} checks hold", style="green"))
    line = f"\nnot verified: {len(broken)} of {len(findings)} checks do not hold; first: {broken[0].detail}"
    return Group(table, Text(line, style="bold red"))
