"""Numbers and sentences: the same in the terminal, on the page and in tables of a sweep."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tritprune.report.records import (
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

MISSING = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
LEAST_ROUNDS = 6  # the whole range of five ratios holds their median in 93.8% of cases: no 95% interval


def count(value: Any) -> str:
    """22713216 -> "22.7M"."""
    size = number(value)
    if size is None:
        return MISSING
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(size) >= scale:
            return f"{size / scale:.1f}{unit}"
    return f"{size:.0f}"


def digits(value: Any) -> str:
    """22713216 -> "22,713,216"."""
    size = number(value)
    return MISSING if size is None else f"{size:,.0f}"


def size_on_disk(value: Any) -> str:
    """90868376 -> "90.9 MB" (decimal units)."""
    size = number(value)
    if size is None:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} B"


def percent(value: Any, places: int = 1) -> str:
    """0.9 -> "90.0%"."""
    share = number(value)
    return MISSING if share is None else f"{100 * share:.{places}f}%"


def short_percent(value: float) -> str:
    """0.9 -> "90%", 0.875 -> "87.5%"."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


def decimal(value: Any, places: int = 3) -> str:
    """A metric with a fixed number of decimals."""
    amount = number(value)
    return MISSING if amount is None else f"{amount:.{places}f}"


def three(value: Any) -> str:
    """A measured time with three significant digits: 4.31, 43.1, 431."""
    amount = number(value)
    if amount is None:
        return MISSING
    places = 2 if abs(amount) < 10 else 1 if abs(amount) < 100 else 0
    return f"{amount:,.{places}f}"


def signed(value: float, places: int = 1) -> str:
    """-4.04 -> "−4.0", with a minus sign that is as wide as the plus."""
    text = f"{value:+.{places}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else text[1:]


def duration(seconds: Any) -> str:
    """452.3 -> "7 min 32 s"."""
    amount = number(seconds)
    if amount is None:
        return MISSING
    if amount < 60:
        return f"{amount:.1f} s" if amount < 10 else f"{amount:.0f} s"
    minutes, rest = divmod(round(amount), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def sparsity(row: Mapping[str, Any] | None, of: str = "prunable") -> tuple[int, int] | None:
    """(zeros, total) of a row in one denominator: "prunable", "linear_conv" or "parameters"."""
    zeros, total = (number(part(row, "sparsity", of, key)) for key in ("zeros", "total"))
    return (int(zeros), int(total)) if zeros is not None and total else None


def share(zeros_total: tuple[int, int] | None) -> float | None:
    """Zeros / total."""
    return None if zeros_total is None else zeros_total[0] / zeros_total[1]


def pattern_label(result: Result) -> str:
    """What was pruned, as the config would say it: "4x1", "2:4", "heads + channelx1"."""
    return " + ".join(_by_pattern(result)) or str(result.get("name") or "the model")


def pruned_share(result: Result) -> str:
    """The same with its sparsity: "4x1 at 90%", "heads at 33.3% and channelx1 at 50%"."""
    found = _by_pattern(result)
    shares = {label: share((zeros, elements)) for label, (zeros, elements) in found.items() if elements}
    if len(found) > 1 and len(shares) == len(found):
        return join([f"{label} at {short_percent(at or 0.0)}" for label, at in shares.items()])
    at = share(sparsity(row_of(result, "pruned") or final_row(result)))
    return f"{pattern_label(result)} at {short_percent(at)}" if at is not None else pattern_label(result)


def _by_pattern(result: Result) -> dict[str, tuple[int, int]]:
    """Label of a pattern -> its zeros and its elements, over the layers."""
    found: dict[str, tuple[int, int]] = {}
    for layer in items(result, "layers"):
        pattern, unit = str(layer.get("pattern") or ""), str(layer.get("unit") or "")
        spelled = re.fullmatch(r"\w+x\w+|\d+:\d+|heads", pattern) is not None
        label = "heads" if pattern == "head" else pattern if spelled or not unit else unit
        zeros, elements = found.get(label, (0, 0))
        more = (number(layer.get("zeros")) or 0, number(layer.get("elements")) or 0)
        if label:
            found[label] = (zeros + int(more[0]), elements + int(more[1]))
    return found


def latency(row: Mapping[str, Any] | None, batch: str) -> tuple[float, float, float] | None:
    """(median, p10, p90) in milliseconds of a row at one batch size."""
    found = [number(part(row, "latency", batch, key)) for key in ("median_ms", "p10_ms", "p90_ms")]
    if found[0] is None:
        return None
    return found[0], found[0] if found[1] is None else found[1], found[0] if found[2] is None else found[2]


def batches(result: Result) -> list[str]:
    """The batch sizes that were timed, ascending; 1 and 32 if nothing was."""
    found = {batch for row in items(result, "rows") for batch in names(row, "latency")}
    return sorted(found, key=lambda batch: (not batch.isdigit(), int(batch) if batch.isdigit() else 0, batch)) or [
        "1",
        "32",
    ]


def speed(result: Result, batch: str) -> tuple[float, str] | None:
    """How the final model's latency compares with the dense one's at ``batch``.

    The models are timed in turn, so each round has a ratio of its own: its median is given, and "faster" or "slower"
    only where the 95% interval of that median leaves 1 out; fewer than six rounds have none. Of records without ratios,
    the medians are compared, and each has to lie outside the other's p10-p90.

    Returns:
        Time of dense / time of final, and "faster", "slower" or "as fast". None where one of the two was not timed.
    """
    before, after = latency(row_of(result, "dense"), batch), latency(final_row(result), batch)
    if before is None or after is None or not after[0] > 0:
        return None
    keys = ("ratio", "ratio_low", "ratio_high")
    factor, low, high = (number(part(final_row(result), "latency", batch, key)) for key in keys)
    if factor is None or low is None or high is None:
        factor = before[0] / after[0]
        apart = not (before[1] <= after[0] <= before[2]) and not (after[1] <= before[0] <= after[2])
    else:
        rounds = number(part(final_row(result), "latency", batch, "repeats"))
        apart = not low <= 1 <= high and (rounds is None or rounds >= LEAST_ROUNDS)
    return factor, ("faster" if factor > 1 else "slower") if apart else "as fast"


def agreement(made: Mapping[str, Any]) -> str:
    """How an exported file was compared: "same outputs on 3 inputs", "differs by at most 9.5e-07 on 3 inputs"."""
    apart = number(made.get("max_abs_difference"))
    if apart is None:
        return "not compared"
    said = f"differs by at most {apart:.1e}" if apart else "same outputs"
    return f"{said} on {digits(made.get('inputs'))} inputs"


def evened_out(result: Result) -> str:
    """What padding to the same widths put back: "evened out to intermediate_size 1485: 4,490,190 parameters back"."""
    widths, back = (
        part(result, "slim", "uniform", "widths"),
        number(part(result, "slim", "uniform", "parameters_put_back")),
    )
    if not isinstance(widths, Mapping) or back is None:
        return ""
    said = ", ".join(f"{name} {digits(value).replace(',', '')}" for name, value in widths.items())
    return f"evened out{' to ' + said if said else ''}: {digits(back)} parameters put back"


def pace(rate: tuple[float, str] | None) -> str:
    """What :func:`speed` found, as a verdict: "1.36x faster", "slower here: 0.90x", "no faster here: 1.01x"."""
    if rate is None:
        return ""
    factor, kind = rate
    words = {"faster": f"{factor:.2f}x faster", "slower": f"slower here: {factor:.2f}x"}
    return words.get(kind, f"no faster here: {factor:.2f}x")


def difference(result: Result, row: Mapping[str, Any] | None) -> str:
    """The primary metric against dense: "−4.0 points", or "" for the dense row and where one is missing."""
    before, after = metric_of(result, row_of(result, "dense")), metric_of(result, row)
    if before is None or after is None or row is None or row.get("model") == "dense":
        return ""
    return f"{signed(100 * (after - before))} points"


def verdict(result: Result) -> str:
    """What came out, in plain sentences computed from the numbers and from nothing else."""
    metric = primary_metric(result).replace("_", " ")
    dense, final = row_of(result, "dense"), final_row(result)
    before, after = metric_of(result, dense), metric_of(result, final)
    if after is None:
        if before is None:
            return "Nothing was measured before the run ended."
        return f"Dense {metric} {decimal(before)}; the run ended before a pruned model was measured."
    sentences = [f"{pruned_share(result)}: {metric} {decimal(after)}"]
    if before is not None:
        sentences[0] += f" against {decimal(before)} dense ({difference(result, final)})"
    sentences.append(_size_and_speed(result))
    sentences.append(_trained_on(result))
    if part(result, "slim", "certificate", "holds") is False:
        sentences.append("But its outputs differ from the pruned model's: do not use it")
    control = metric_of(result, row_of(result, "random control"))
    if control is not None:
        sentences.append(f"Random masks at the same budget reach {decimal(control)}")
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def _size_and_speed(result: Result) -> str:
    slim = row_of(result, "slim")
    if slim is None:
        return "The zeros are stored like any weight: without slimming the model is neither smaller nor faster"
    before, after = number(part(row_of(result, "dense"), "parameters")), number(slim.get("parameters"))
    size = ""
    if before and after is not None:
        size = (
            f"has {count(after)} of {count(before)} parameters"
            if after < before
            else f"is no smaller ({count(after)} parameters)"
        )
    rates = {batch: rate for batch in batches(result) if (rate := speed(result, batch)) is not None}
    pace = join(_speed_words(rates))
    rest = " and ".join(filter(None, (size, f"is {pace}" if pace else "")))
    return f"The slim model {rest}" if rest else ""


def _trained_on(result: Result) -> str:
    """What training after slimming was worth."""
    steps, slim, tuned = number(result.get("after_slim")), row_of(result, "slim"), row_of(result, "tuned")
    before, after = metric_of(result, slim), metric_of(result, tuned)
    if not steps or before is None or after is None:
        return ""
    metric = primary_metric(result).replace("_", " ")
    return f"{digits(steps)} steps after slimming took its {metric} from {decimal(before)} to {decimal(after)}"


def _speed_words(rates: Mapping[str, tuple[float, str]]) -> list[str]:
    words: list[str] = []
    last = ""
    for batch, (factor, kind) in rates.items():
        if kind == "as fast":
            text = f"no faster here ({factor:.2f}x, within the spread)"
        elif kind == "faster":
            text = f"{factor:.2f}x" + ("" if last == kind else " faster")
        else:
            text = f"slower here ({factor:.2f}x)" if last != kind else f"{factor:.2f}x"
        words.append(f"{text} at batch {batch}")
        last = kind
    return words


def join(words: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def sampling_note(result: Result) -> str:
    """How far chance alone moves the metric on this much data, so that a small difference is not over-read."""
    examples, value = number(part(result, "data", "n_eval")), metric_of(result, row_of(result, "dense"))
    if primary_metric(result) != "accuracy" or not examples or value is None or not 0 <= value <= 1:
        return ""
    error = 100 * (value * (1 - value) / examples) ** 0.5
    return f"{digits(examples)} held-out examples: the standard error of one accuracy is about {error:.1f} points"
