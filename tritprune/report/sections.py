"""The middle of the page: the models side by side, curves, layers, and what slimming cut."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from tritprune.report import charts
from tritprune.report.heatmap import heat_map_svg
from tritprune.report.markup import Html, fold, join, table, tag
from tritprune.report.records import (
    Curves,
    Result,
    final_row,
    items,
    metric_of,
    names,
    number,
    part,
    primary_metric,
    row_of,
)
from tritprune.report.words import (
    MISSING,
    TIMES,
    agreement,
    batches,
    count,
    decimal,
    difference,
    digits,
    evened_out,
    latency,
    pace,
    percent,
    sampling_note,
    share,
    size_on_disk,
    sparsity,
    speed,
    three,
)

MODELS = {
    "dense": "as trained, nothing pruned",
    "pruned": "masked, zeros still stored",
    "slim": "dead units cut away",
    "tuned": "slim, trained further",
    "random control": "random units, same budget",
}


PLACES = {"feed-forward": "feed-forward block", "channels": "channel group", "stream": "residual stream"}
"""Kinds of places that slimming looks at, in the singular."""


def results(result: Result) -> Html | None:
    """The models side by side."""
    rows = items(result, "rows")
    if not rows:
        return None
    sizes = batches(result)
    metrics = dict.fromkeys(name for row in rows for name in names(row, "metrics"))
    primary = primary_metric(result)
    others = [name for name in metrics if name != primary]
    heads = [
        tag("th", "Model"),
        tag("th", title(primary)),
        *(tag("th", title(name)) for name in others),
        tag("th", "Sparsity", class_="left"),
        tag("th", "Parameters"),
        tag("th", "On disk"),
        *(tag("th", "Latency,", Html("<br>"), f"batch {batch}") for batch in sizes),
    ]
    final = final_row(result)
    body = []
    for row in rows:
        model = str(row.get("model"))
        cells = [
            tag("td", model, tag("small", MODELS.get(model, ""))),
            tag("td", decimal(metric_of(result, row)), tag("small", difference(result, row))),
            *(tag("td", decimal(part(row, "metrics", name))) for name in others),
            _zeros_cell(row),
            tag("td", count(row.get("parameters")), tag("small", _fewer(result, row))),
            tag("td", size_on_disk(row.get("bytes"))),
            *(_latency_cell(row, batch, pace(speed(result, batch)) if row is final else "") for batch in sizes),
        ]
        body.append(tag("tr", *cells, class_="chosen" if row is final else None))
    return join((tag("h2", "Results"), table(heads, body), tag("p", _results_note(result), class_="note")))


def _results_note(result: Result) -> str:
    notes = ["Sparsity is zeros / weights; each line names its denominator."]
    if row_of(result, "slim"):
        notes.append("The slim model has lost its dead units, so its zeros stand against fewer weights.")
    repeats = {
        number(part(row, "latency", batch, "repeats")) for row in items(result, "rows") for batch in batches(result)
    }
    machine = part(result, "machine", "gpu") or part(result, "machine", "cpu")
    threads = number(part(result, "machine", "threads"))
    where = f" on {machine}" if machine else ""
    where += f", {threads:.0f} thread{'s' * (threads != 1)}" if threads and not part(result, "machine", "gpu") else ""
    if timed := sorted(int(found) for found in repeats if found is not None):
        notes.append(f"Latency in ms{where}: median of {timed[-1]} runs, p10 to p90 below.")
        if number(part(final_row(result), "latency", batches(result)[0], "ratio")) is not None:
            notes.append("Faster or slower: the median over rounds in which the models took turns.")
    if sampling := sampling_note(result):
        notes.append(f"{sampling}; one seed." if len(sampling) else "")
    return " ".join(notes)


def _zeros_cell(row: Mapping[str, Any]) -> Html:
    lines = []
    for of, words in (
        ("prunable", "prunable"),
        ("linear_conv", "linear and conv"),
        ("parameters", "parameters"),
    ):
        if zeros := sparsity(row, of):
            text = f"{percent(share(zeros))} of {count(zeros[1])} {words}"
            lines.append(tag("small" if lines else "span", text, title=f"{digits(zeros[0])} of {digits(zeros[1])}"))
    return tag("td", *lines or MISSING, class_="left")


def _fewer(result: Result, row: Mapping[str, Any]) -> str:
    before, after = number(part(row_of(result, "dense"), "parameters")), number(row.get("parameters"))
    return f"{percent(1 - after / before)} fewer" if before and after is not None and after < before else ""


def _latency_cell(row: Mapping[str, Any], batch: str, verdict: str) -> Html:
    found = latency(row, batch)
    if found is None:
        return tag("td", MISSING)
    spread = tag("small", f"{three(found[1])} to {three(found[2])}")
    return tag("td", three(found[0]), spread, tag("small", verdict, class_="verdict") if verdict else None)


def curves_section(result: Result, curves: Curves) -> Html | None:
    """Metric, sparsity, loss, mask changes and step time over the run."""
    shown = (
        (f"{title(primary_metric(result))}, held out", charts.accuracy_chart(result, curves), ""),
        ("Sparsity of the prunable weights", charts.sparsity_chart(curves), ""),
        ("Loss", charts.loss_chart(curves), " ".join(filter(None, (_distilled(result), _lost(curves))))),
        ("Units whose mask changed, per update", charts.flip_chart(curves), ""),
        ("Where a step's time goes", charts.time_chart(curves), ""),
    )
    figures = [_figure(title, drawing, note) for title, drawing, note in shown if drawing]
    if times := _time_table(curves):
        figures.append(times)
    if curves.unreadable:
        lines = f"{curves.unreadable} line{'s' * (curves.unreadable > 1)}"
        figures.append(tag("p", f"{lines} of curves.jsonl could not be read and are left out.", class_="note"))
    return join((tag("h2", "Curves"), tag("div", *figures, class_="charts"))) if figures else None


def _time_table(curves: Curves) -> Html | None:
    stages = charts.time_parts(curves)
    if not stages:
        return None
    order = [*(name for name, *_ in charts.TIMES), "other", "step"]
    names = [name for name in order if any(name in parts for parts in stages.values())]
    rows = [
        tag("tr", tag("td", name), *(tag("td", three(parts.get(name))) for parts in stages.values())) for name in names
    ]
    heads = [tag("th", "Part of the step"), *(tag("th", stage) for stage in stages)]
    note = charts.time_note(curves)
    return tag(
        "figure",
        tag("h3", "The same in numbers (mean, ms)"),
        table(heads, rows, class_="dense"),
        tag("figcaption", note, class_="note") if note else None,
    )


def _distilled(result: Result) -> str:
    """What else than training or the labels is in the training loss."""
    if part(result, "config", "pruner", "name") == "retrain_free":
        return "While it calibrates, no weight moves: the loss is that of the dense model on each batch."
    weight = number(part(result, "config", "training", "distillation", "weight"))
    if not weight:
        return ""
    return f"From the prune stage on, distillation from the dense model has weight {weight:g} in the training loss."


def _lost(curves: Curves) -> str:
    lost = {key: curves.non_finite(key) for key in ("loss/train", "loss/eval")}
    words = [f"{times} value{'s' * (times > 1)} of {key}" for key, times in lost.items() if times]
    return f"Not drawn because they are NaN or infinite: {', '.join(words)}." if words else ""


def _figure(title: str, drawing: str, note: str = "", *, wide: bool = False) -> Html:
    return tag(
        "figure",
        tag("h3", title),
        tag("div", Html(drawing), class_="scroll"),
        tag("figcaption", note, class_="note") if note else None,
        class_="wide" if wide else None,
    )


def layers_section(result: Result, curves: Curves) -> Html | None:
    """The heat map, each pruned layer, and the layers that were left out."""
    heat = heat_map_svg(result, curves)
    layers = items(result, "layers")
    excluded = items(result, "excluded")
    if not (heat or layers or excluded):
        return None
    parts: list[Html | None] = [tag("h2", "Layers")]
    if heat:
        parts.append(_figure("Sparsity of each layer while it was pruned", heat, wide=True))
    if layers:
        body = _layer_table(layers)
        title = f"{len(layers)} pruned layers"
        parts.append(
            tag("div", fold(title, body) if len(layers) > 60 else join((tag("h3", title), body)), class_="block")
        )
    if excluded:
        rows = [
            tag("tr", tag("td", tag("code", item.get("name"))), tag("td", item.get("reason"), class_="left wrap"))
            for item in excluded
        ]
        heads = (tag("th", "Layer"), tag("th", "Reason", class_="left"))
        title = f"{len(excluded)} layer{'s' * (len(excluded) != 1)} left out"
        parts.append(tag("div", tag("h3", title), table(heads, rows, class_="dense"), class_="block"))
    return join(parts)


def _layer_table(layers: list[Mapping[str, Any]]) -> Html:
    groups = len({str(layer.get("group")) for layer in layers}) > 1
    rows = []
    for layer in layers:
        zeros = number(layer.get("sparsity"))
        bar = Html(f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, zeros or 0.0)):.1f}%"></i></span>')
        shape = layer.get("shape")
        rows.append(
            tag(
                "tr",
                tag("td", tag("code", layer.get("name"))),
                tag("td", layer.get("group"), class_="left") if groups else None,
                tag("td", f" {TIMES} ".join(map(str, shape)) if isinstance(shape, list) else MISSING),
                tag("td", layer.get("unit") or layer.get("pattern") or MISSING),
                tag("td", f"{digits(layer.get('kept_units'))} of {digits(layer.get('units'))}"),
                tag("td", digits(layer.get("zeros"))),
                tag("td", percent(zeros)),
                tag("td", bar, class_="left"),
            )
        )
    heads = ["Layer", "Shape", "Unit", "Units kept", "Zeros", "Sparsity", ""]
    if groups:
        heads.insert(1, "Group")
    cells = [tag("th", head, class_="left" if head == "Group" else None) for head in heads]
    return table(cells, rows, class_="dense")


def slimming(result: Result) -> Html | None:
    """The certificate, what was cut, and what was refused for which reason."""
    slim = part(result, "slim")
    if not isinstance(slim, Mapping) or not slim:
        return None
    parts = [
        tag("h2", "Slimming"),
        _certificate(
            part(slim, "certificate"),
            "; ".join(filter(None, (str(part(slim, "loads") or ""), evened_out(result)))),
            items(result, "exports"),
            number(result.get("after_slim")) or 0,
        ),
    ]
    parts.append(tag("div", _cuts(slim), _refused(slim), class_="two block"))
    return join(parts)


def _certificate(certificate: Any, loads: str, exports: list[Mapping[str, Any]], after: float) -> Html | None:
    if not isinstance(certificate, Mapping):
        return None
    holds = bool(certificate.get("holds"))
    claim = (
        "Certified: the slim model gives the masked model's outputs"
        if holds
        else "Not certified: the slim model's outputs differ from the masked model's"
    )
    difference_, tolerance = (number(certificate.get(key)) for key in ("max_abs_difference", "tolerance"))
    entries = {
        "Largest difference": None
        if difference_ is None
        else f"{difference_:.1e}" + ("" if tolerance is None else f", tolerance {tolerance:.1e}"),
        "Compared on": None
        if certificate.get("inputs") is None
        else f"{certificate.get('inputs')} fixed inputs, every output",
        "Outputs, SHA-256": certificate.get("outputs_sha256"),
        "About": f"slim/ as it was cut; tuned/ is slim/ after {digits(after)} more steps of training" if after else "",
        "Loads with": loads,
        "Also as": "; ".join(_exported(made) for made in exports),
    }
    rows = (
        join((tag("dt", key), tag("dd", tag("code", value) if "SHA" in key else value)))
        for key, value in entries.items()
        if value
    )
    return tag("dl", tag("strong", claim), *rows, class_="certificate" if holds else "certificate broken")


def _exported(made: Mapping[str, Any]) -> str:
    return f"{made.get('kind')}: {made.get('path')} ({size_on_disk(made.get('bytes'))}, {agreement(made)})"


def _cuts(slim: Mapping[str, Any]) -> Html:
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for cut in items(slim, "cuts"):
        kinds.setdefault(str(cut.get("kind")), []).append(cut)
    blocks: list[Html] = []
    for kind, cuts in kinds.items():
        before, after = (sum(number(cut.get(key)) or 0 for cut in cuts) for key in ("before", "after"))
        places = f"{len(cuts)} place{'s' * (len(cuts) != 1)}"
        rows = [
            tag(
                "tr",
                tag("td", tag("code", cut.get("where"))),
                tag("td", f"{digits(cut.get('before'))} → {digits(cut.get('after'))}{_block(cut)}"),
            )
            for cut in cuts
        ]
        title = join((tag("strong", kind), f": {digits(before)} → {digits(after)} in {places}"))
        blocks.append(
            fold(title, table(("Where", f"{cuts[0].get('unit') or 'unit'}s, before → after"), rows, class_="dense"))
        )
    found = Counter(str(item.get("kind")) for item in items(slim, "found"))
    looked = [f"{times} {PLACES.get(kind, kind)}{'s' * (times != 1)}" for kind, times in found.items()]
    lead = f"Looked at: {', '.join(looked)}." if found else ""
    empty = None if blocks else tag("p", "Nothing: no unit of this mask is dead as a whole.")
    return tag("div", tag("h3", "Cut"), tag("p", lead, class_="note") if lead else None, empty, *blocks, class_="block")


def _block(cut: Mapping[str, Any]) -> str:
    return ", block removed" if cut.get("after") == 0 else ""


def _refused(slim: Mapping[str, Any]) -> Html | None:
    reasons: dict[tuple[str, str], list[str]] = {}
    for refusal in items(slim, "refused"):
        key = (str(refusal.get("kind")), str(refusal.get("reason")))
        reasons.setdefault(key, []).append(str(refusal.get("where")))
    if not reasons:
        return None
    blocks = [
        fold(
            join((tag("strong", kind), f": {reason} ({len(places)} place{'s' * (len(places) != 1)})")),
            tag("ul", *(tag("li", tag("code", place)) for place in places)),
        )
        for (kind, reason), places in reasons.items()
    ]
    return tag("div", tag("h3", "Refused, and why"), *blocks, class_="block")


def title(name: str) -> str:
    """A metric's name as a heading: "eval_loss" -> "Eval loss"."""
    return name.replace("_", " ").capitalize()
