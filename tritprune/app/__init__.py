"""The only composer: a hydra config becomes objects, the objects become a run, errors become one clear message."""

from tritprune.app.command_line import main

__all__ = ["main"]
