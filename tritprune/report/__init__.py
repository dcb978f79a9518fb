"""What a run says about itself: a page to show, a table for the terminal, one table for a sweep."""

from tritprune.report.console import console_epilogue, console_table, sweep_table
from tritprune.report.page import heatmap_png, write_report

__all__ = ["console_epilogue", "console_table", "heatmap_png", "sweep_table", "write_report"]
