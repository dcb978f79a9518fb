"""The same result in the terminal: one table and what to look at next; and one table over the jobs of a sweep."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table, box
from rich.text import Text

from tritprune.report.origin import reload_snippet, resume_command, short_path
from tritprune.report.records import Result, final_row, items, metric_of, number, part, primary_metric, row_of
from tritprune.report.words import (
    MISSING,
    agreement,
    batches,
    count,
    decimal,
    difference,
    digits,
    evened_out,
    latency,
    percent,
    sampling_note,
    share,
    size_on_disk,
    sparsity,
    speed,
    three,
    verdict,
)

WHAT = {
    "dense": "as trained",
    "pruned": "zeros stored",
    "slim": "zeros cut away",
    "tuned": "slim, trained on",
    "random control": "same budget",
}


def console_table(result: Result) -> Table:
    """The models of a run side by side, within 100 columns.

    Each sparsity names its denominator: the weights of the prunable layers, and all parameters of the model.
    """
    sizes = batches(result)[:2]
    table = _table(title=Text(verdict(result), style="bold"), caption=_caption(result))
    metric = primary_metric(result).replace("_", " ")
    for head in ("", metric, "sparsity of\nprunable / all", "parameters", "on disk"):
        table.add_column(head, justify="left" if not head else "right", no_wrap=True, vertical="top")
    for batch in sizes:
        table.add_column(f"ms, batch {batch}", justify="right", no_wrap=True)
    final = final_row(result)
    for row in items(result, "rows"):
        model = str(row.get("model"))
        table.add_row(
            _cell(model, WHAT.get(model, "")),
            _cell(decimal(metric_of(result, row)), difference(result, row)),
            _sparsity_cell(row),
            Text(count(row.get("parameters"))),
            Text(size_on_disk(row.get("bytes"))),
            *(_latency_cell(row, batch) for batch in sizes),
            style="bold" if row is final else "",
        )
    return table


def console_epilogue(result: Result, run_folder: str | os.PathLike[str]) -> RenderableType:
    """What to look at next: report, curves, model, and how to go on or run it again."""
    folder = Path(run_folder)
    artifacts = part(result, "artifacts")
    artifacts = artifacts if isinstance(artifacts, Mapping) else {}
    command = str(result.get("command") or "")
    lines: list[tuple[str, str]] = []
    status = result.get("status")
    if status != "finished":
        lines.append((str(status or "unknown"), str(result.get("error") or "the run has no end on record")))
    if report := artifacts.get("report"):
        lines.append(("report", short_path(folder / str(report))))
    if wandb := str(artifacts.get("wandb") or ""):
        online = wandb.startswith(("http://", "https://"))
        lines.append(("curves", wandb if online else f"wandb sync {short_path(folder / wandb)}"))
    elif curves := artifacts.get("curves"):
        lines.append(("curves", short_path(folder / str(curves))))
    if slim := artifacts.get("tuned") or artifacts.get("slim"):
        lines.append(("model", "; ".join(filter(None, reload_snippet(folder / str(slim)).splitlines()))))
        if loads := part(result, "slim", "loads"):
            lines.append(("", str(loads)))
        if evened := evened_out(result):
            lines.append(("", evened))
    for made in items(result, "exports"):
        lines.append((str(made.get("kind")), f"{short_path(folder / str(made.get('path')))} ({agreement(made)})"))
    if command and status == "finished":
        lines.append(("again", command))
    elif command:
        lines.append(("go on", resume_command(command)))
    width = max((len(word) for word, _ in lines), default=0)
    texts = [
        Text.assemble((f"{word:<{width}}  ", "bold red" if word == status else "dim"), text, overflow="fold")
        for word, text in lines
    ]
    return Padding(Group(*texts), (0, 0, 0, 1))


def sweep_table(results: Sequence[Result]) -> tuple[Table, str, str]:
    """One row a job: what was set, what came out, or why nothing did.

    Args:
        results: ``result.json`` of each job, with "overrides" (["criterion=snip", ...]), "status" and "error", and
            "job" where the job's number is not its place in the list.

    Returns:
        The table for the terminal, the same as Markdown, and as CSV with full numbers.
    """
    overrides = [_overrides(result) for result in results]
    first = overrides[0] if len(results) > 1 else {}
    shared = {key: value for key, value in first.items() if all(job.get(key) == value for job in overrides)}
    varied = list(dict.fromkeys(key for job in overrides for key in job if key not in shared))
    last = [key.split(".")[-1] for key in varied]
    names = [short if last.count(short) == 1 else key for key, short in zip(varied, last, strict=True)]
    metric = primary_metric(results[0]) if results else "accuracy"
    sizes = list(dict.fromkeys(batch for result in results for batch in batches(result)))[:2] or ["1", "32"]
    heads = ["job", *names, metric, "dense", "sparsity", "parameters", *(f"ms, batch {batch}" for batch in sizes)]
    left = {"job", "status", *names}
    rows = [
        [str(result.get("job", index)), *(job.get(key, "") for key in varied), *_job(result, sizes)]
        for index, (job, result) in enumerate(zip(overrides, results, strict=True))
    ]
    title = " ".join(f"{key}={value}" for key, value in shared.items())
    status = [str(result.get("status") or "unknown") for result in results]
    errors = [" ".join(str(result.get("error") or "").split()) for result in results]

    unfinished = sum(word != "finished" for word in status)
    notes = [f"{len(results)} jobs, {unfinished} of them not finished. {_SWEEP_NOTE}"]
    notes += [f"job {row[0]}: {error}" for row, error in zip(rows, errors, strict=True) if error]
    table = _table(title=Text(title, style="bold") if title else None, caption=Text("\n".join(notes)))
    for head in [*heads, "status"]:
        broken = head.replace("_", "_\n").replace(", ", ",\n")
        table.add_column(broken, justify="left" if head in left else "right", overflow="fold")
    for row, word in zip(rows, status, strict=True):
        table.add_row(*map(Text, row), word, style="" if word == "finished" else "red")

    markdown = [f"`{title}`\n"] if title else []
    markdown.append(_markdown_row([*heads, "status"]))
    markdown.append("|" + "|".join("---" if head in left else "--:" for head in [*heads, "status"]) + "|")
    for row, word, error in zip(rows, status, errors, strict=True):
        markdown.append(_markdown_row([*row, f"{word}: {error}" if error else word]))
    markdown.append(f"\n{_SWEEP_NOTE}")
    return table, "\n".join(markdown) + "\n", _csv(results, metric, sizes)


def _overrides(result: Result) -> dict[str, str]:
    words = part(result, "overrides")
    pairs = [str(word).partition("=") for word in words] if isinstance(words, Sequence) else []
    return {key.lstrip("+~"): value for key, _, value in pairs}


_SWEEP_NOTE = (
    "Each row is the final model: tuned, slim or pruned; sparsity is zeros / prunable weights before slimming."
)


def _job(result: Result, sizes: Sequence[str]) -> list[str]:
    row = final_row(result)
    return [
        decimal(metric_of(result, row)),
        decimal(metric_of(result, row_of(result, "dense"))),
        percent(share(sparsity(row_of(result, "pruned") or row)), 2),
        count(part(row, "parameters")),
        *(three(found[0]) if (found := latency(row, batch)) else MISSING for batch in sizes),
    ]


def _csv(results: Sequence[Result], metric: str, sizes: Sequence[str]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    timed = [f"latency_{batch}_{key}" for batch in sizes for key in ("median_ms", "p10_ms", "p90_ms")]
    heads = ["overrides", "status", "model", f"dense_{metric}", metric, "zeros", "prunable", "parameters", "bytes"]
    writer.writerow([*heads, *timed, "error"])
    for result in results:
        row = final_row(result)
        overrides = [f"{key}={value}" for key, value in _overrides(result).items()]
        known = [metric_of(result, row_of(result, "dense")), metric_of(result, row)]
        zeros = sparsity(row_of(result, "pruned") or row) or ("", "")
        model = [number(part(row, key)) for key in ("parameters", "bytes")]
        times = [value for batch in sizes for value in latency(row, batch) or ("", "", "")]
        start = [" ".join(overrides), result.get("status"), part(row, "model")]
        writer.writerow([*start, *known, *zeros, *model, *times, result.get("error")])
    return buffer.getvalue()


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _table(**arguments: Any) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        header_style="dim",
        title_justify="left",
        caption_justify="left",
        caption_style="dim",
        pad_edge=False,
        collapse_padding=True,
        **arguments,
    )


def _cell(first: str, second: str) -> Text:
    return Text.assemble(first, (f"\n{second}", "not bold dim")) if second else Text(first)


def _sparsity_cell(row: Mapping[str, Any]) -> Text:
    lines = [
        f"{percent(share(zeros))} of {count(zeros[1])}"
        for of in ("prunable", "parameters")
        if (zeros := sparsity(row, of))
    ]
    return _cell(lines[0], "\n".join(lines[1:])) if lines else Text(MISSING)


def _latency_cell(row: Mapping[str, Any], batch: str) -> Text:
    found = latency(row, batch)
    return Text(MISSING) if found is None else _cell(three(found[0]), f"{three(found[1])} to {three(found[2])}")


def _caption(result: Result) -> str:
    notes = ["Sparsity = zeros / weights, of the prunable layers and of all parameters."]
    zeros = sparsity(row_of(result, "pruned"))
    if zeros:
        notes.append(f"Pruned: {digits(zeros[0])} of {digits(zeros[1])}.")
    if any(speed(result, batch) for batch in batches(result)):
        notes.append("Latency: median, p10 to p90 below.")
    if sampling := sampling_note(result):
        notes.append(f"{sampling}.")
    return " ".join(notes)
