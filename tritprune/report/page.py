"""``report.html``: one run on one page that opens anywhere, without a network and without a script."""

import os
import tempfile
from importlib.resources import files
from pathlib import Path

from tritprune.errors import RunFolderError
from tritprune.report.heatmap import heat_map_png
from tritprune.report.markup import Html, join, tag
from tritprune.report.origin import again, moment, total_seconds
from tritprune.report.records import (
    Curves,
    Result,
    final_row,
    metric_of,
    number,
    part,
    primary_metric,
    read_run,
    row_of,
)
from tritprune.report.sections import curves_section, layers_section, results, slimming, title
from tritprune.report.words import (
    MISSING,
    TIMES,
    batches,
    count,
    decimal,
    difference,
    digits,
    duration,
    latency,
    percent,
    share,
    sparsity,
    speed,
    three,
    verdict,
)


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` from what the run folder holds; whatever is missing is left out.

    Args:
        run_folder: holds ``result.json``, ``curves.jsonl`` or both.

    Returns:
        The path of the report. It is replaced at once, so a reader never sees half a page.

    Raises:
        RunFolderError: the folder holds neither file, or cannot be written.
    """
    folder = Path(run_folder)
    result, curves = read_run(folder)
    text = page(result, curves, folder)
    return write_atomically(folder / "report.html", text.encode())


def heatmap_png(run_folder: str | os.PathLike[str]) -> Path | None:
    """Write ``heatmap.png``, the sparsity of each layer over the steps; None if no layer has a curve.

    Raises:
        RunFolderError: the folder is no run folder, or cannot be written.
    """
    folder = Path(run_folder)
    image = heat_map_png(*read_run(folder))
    return None if image is None else write_atomically(folder / "heatmap.png", image)


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file beside its place and move it there.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def page(result: Result, curves: Curves, run_folder: Path) -> str:
    """The whole page."""
    name = str(result.get("name") or run_folder.name or "run")
    style = files("tritprune.report").joinpath("style.css").read_text(encoding="utf-8")
    sections = (
        _head(result, name),
        results(result),
        curves_section(result, curves),
        layers_section(result, curves),
        slimming(result),
        again(result, run_folder),
    )
    head = join(
        (
            Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
            Html('<meta name="color-scheme" content="light dark">'),
            tag("title", f"{name}: tritprune"),
            tag("style", Html(style)),
        )
    )
    body = tag("body", tag("main", *sections))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n{body}</html>\n'


def _head(result: Result, name: str) -> Html:
    data = part(result, "data", "task")
    seed = result.get("seed")
    kicker = [
        "tritprune",
        data and f"task {data}",
        seed is not None and f"seed {seed}",
        moment(result.get("started")),
        total and duration(total) if (total := total_seconds(result)) else None,
    ]
    return tag(
        "header",
        tag("p", " · ".join(str(word) for word in kicker if word), class_="kicker"),
        tag("h1", name),
        _alert(result),
        tag("p", verdict(result), class_="lead"),
        _figures(result),
    )


def _alert(result: Result) -> Html | None:
    status = result.get("status")
    if status == "finished":
        return None
    words = {
        "failed": "This run failed.",
        "interrupted": "This run was interrupted; its state is saved and it can go on.",
    }
    message = words.get(str(status), f"This run has no end on record (status {status or 'unknown'}).")
    error = result.get("error")
    return tag(
        "div",
        tag("strong", message),
        " Everything below is what was recorded until then.",
        tag("pre", error) if error else None,
        class_="alert",
        role="alert",
    )


def _figures(result: Result) -> Html | None:
    dense, final = row_of(result, "dense"), final_row(result)
    if final is None:
        return None
    shown: list[tuple[str, str, str]] = []
    if (value := metric_of(result, final)) is not None:
        before = metric_of(result, dense)
        note = f"dense {decimal(before)}, {difference(result, final)}" if before is not None else ""
        shown.append((title(primary_metric(result)), decimal(value), note))
    if zeros := sparsity(row_of(result, "pruned") or final):
        shown.append(("Sparsity", percent(share(zeros)), f"{digits(zeros[0])} of {digits(zeros[1])} prunable weights"))
    if (after := number(final.get("parameters"))) is not None:
        before = number(part(dense, "parameters"))
        note = (
            f"of {count(before)}: {percent(1 - after / before)} fewer" if before and after < before else "none removed"
        )
        shown.append(("Parameters", count(after), note))
    for batch in batches(result)[:1]:
        if rate := speed(result, batch):
            times = [latency(row, batch) for row in (final, dense)]
            note = " ms against ".join(three(time[0]) for time in times if time) + " ms dense"
            kind = {"faster": "", "slower": "slower here: ", "as fast": "no faster here: "}[rate[1]]
            shown.append((f"Speed at batch {batch}", f"{rate[0]:.2f}{TIMES}", kind + note))
    cells = (tag("div", tag("dt", title), tag("dd", value), tag("dd", note or MISSING)) for title, value, note in shown)
    return tag("dl", *cells, class_="figures") if shown else None
