"""The report's figures: small, labelled at the line, the same in every reader's colours."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from tritprune.report.records import Curves, Result, Series, metric_of, primary_metric, row_of
from tritprune.report.svg import STAND_IN, chart
from tritprune.report.words import percent, three

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 512
"""Of a chart in CSS pixels: two stand side by side on the page."""

POINTS = 400
"""A longer curve is drawn through the means of this many buckets."""


TIMES = (
    ("forward", "time/forward_ms", "blue", "paper"),
    ("backward", "time/backward_ms", "sky", "dark"),
    ("score", "time/score_ms", "gold", "dark"),
    ("mask", "time/mask_ms", "orange", "paper"),
)
"""Parts of a step: name, key of the curve, colour of the bar, colour of the text on it."""


@chart("accuracy", "Accuracy on the held-out part over optimizer steps")
def accuracy_chart(result: Result, curves: Curves) -> "Figure | None":
    """The evaluated metric over the steps, with the dense value as the line to come back to."""
    metric = primary_metric(result)
    found = curves.series(f"{metric}/eval")
    control = curves.series(f"{metric}/eval", control=True)
    if not found and not control:
        return None
    figure, axes = _new(curves, (found, control), with_control=bool(control))
    dense = metric_of(result, row_of(result, "dense"))
    if dense is not None:
        axes.axhline(dense, color=STAND_IN.muted, lw=0.9, ls=(0, (4, 3)), zorder=1)
    labels = _lines(axes, [(found, metric.replace("_", " "), STAND_IN.blue), (control, "random", STAND_IN.orange)])
    if dense is not None:
        labels.append((dense, f"dense {dense:.3f}", STAND_IN.muted))
    _label_ends(axes, labels)
    return figure


@chart("loss", "Loss over optimizer steps, in training and held out")
def loss_chart(curves: Curves) -> "Figure | None":
    """Training loss (faint, with its running median) and evaluation loss over the steps."""
    train, held_out = curves.series("loss/train"), curves.series("loss/eval")
    if not train and not held_out:
        return None
    figure, axes = _new(curves, (train, held_out))
    if train:
        thin = _thin(train)
        axes.plot(thin.steps, thin.values, color=STAND_IN.blue, lw=0.8, alpha=0.3)
    _label_ends(
        axes,
        _lines(
            axes,
            [(_running_median(train), "train", STAND_IN.blue), (held_out, "held out", STAND_IN.orange)],
            dots=False,
        ),
    )
    return figure


@chart("sparsity", "Target and achieved sparsity over optimizer steps")
def sparsity_chart(curves: Curves) -> "Figure | None":
    """What the schedule asked for and what the masks have, over the steps."""
    target, achieved = curves.series("sparsity/target"), curves.series("sparsity/global")
    if not target and not achieved:
        return None
    figure, axes = _new(curves, (target, achieved), bottom=0.0)
    labels = []
    if achieved:
        thin = _thin(achieved)
        axes.plot(thin.steps, thin.values, color=STAND_IN.green, lw=2.2, drawstyle="steps-post")
        labels.append((thin.values[-1], f"achieved {percent(achieved.values[-1])}", STAND_IN.green))
    if target:
        thin = _thin(target)
        axes.plot(thin.steps, thin.values, color=STAND_IN.ink, lw=1.1, ls=(0, (2, 2)))
        labels.append((thin.values[-1], f"target {percent(target.values[-1])}", STAND_IN.ink))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    _label_ends(axes, labels)
    return figure


@chart("flips", "Share of units whose mask changed, over optimizer steps")
def flip_chart(curves: Curves) -> "Figure | None":
    """The share of units whose mask changed at each update."""
    found = curves.series("masks/flip_rate")
    if not found:
        return None
    figure, axes = _new(curves, (found,), bottom=0.0)
    thin = _thin(found)
    if len(thin) == 1:  # a single update makes no line
        axes.vlines(thin.steps, 0, thin.values, color=STAND_IN.orange, lw=1.4, clip_on=False)
    axes.plot(thin.steps, thin.values, color=STAND_IN.orange, lw=1.4)
    axes.fill_between(thin.steps, thin.values, color=STAND_IN.orange, alpha=0.15, lw=0)
    top = max(found.values, default=0.0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.{0 if top >= 0.05 else 2}f}%")
    peak = max(range(len(found)), key=found.values.__getitem__)
    note = f"peak {percent(found.values[peak])} at step {found.steps[peak]}"
    first, last = axes.get_xlim()
    right = found.steps[peak] < (first + last) / 2
    axes.annotate(
        note,
        (found.steps[peak], found.values[peak]),
        xytext=(6 if right else -6, -1),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        color=STAND_IN.orange,
    )
    return figure


def time_parts(curves: Curves) -> dict[str, dict[str, float]]:
    """Stage -> {"forward": ms, ..., "other": ms, "step": ms}: means over the stage's recorded steps.

    Means, because they add up. "other" is what the step has beyond its named parts: the optimizer, data, distillation.
    """
    steps = curves.mean_by_stage("time/step_ms", "time/step_ms")
    named = {name: curves.mean_by_stage(key, "time/step_ms") for name, key, *_ in TIMES}
    found: dict[str, dict[str, float]] = {}
    for stage, whole in steps.items():
        parts = {name: stages[stage] for name, stages in named.items() if stage in stages}
        found[stage] = {**parts, "other": max(0.0, whole - sum(parts.values())), "step": whole}
    return found


@chart("time", "Mean time of a step by stage, split into its parts")
def time_chart(curves: Curves) -> "Figure | None":
    """Where a step's time goes: one bar a stage, from the means over its steps."""
    stages = {stage: parts for stage, parts in time_parts(curves).items() if parts["step"] > 0}
    if not stages:
        return None
    shown = [(name, *colors) for name, _, *colors in TIMES if any(parts.get(name) for parts in stages.values())]
    shown.append(("other", "muted", "paper"))
    height = 66 + 40 * len(stages)
    figure = blank(WIDTH, height)
    axes = figure.add_axes((72 / WIDTH, 30 / height, (WIDTH - 72 - 64) / WIDTH, (height - 62) / height))
    _bare(axes)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.set_xticks([])
    longest = max(parts["step"] for parts in stages.values())
    for line, parts in enumerate(stages.values()):
        left = 0.0
        for name, color, text_color in shown:
            width = parts.get(name) or 0.0
            axes.barh(line, width, left=left, height=0.62, color=getattr(STAND_IN, color), lw=0)
            if width > 0.09 * longest:
                axes.text(
                    left + width / 2, line, three(width), ha="center", va="center", color=getattr(STAND_IN, text_color)
                )
            left += width
        axes.text(left + 0.012 * longest, line, f"{three(parts['step'])} ms", va="center", color=STAND_IN.ink)
    axes.set_yticks(range(len(stages)), list(stages))
    axes.set_ylim(len(stages) - 0.5, -0.5)
    axes.set_xlim(0, longest)
    position = 72.0
    for name, color, _ in shown:
        figure.text(position / WIDTH, 1 - 13 / height, "■ ", color=getattr(STAND_IN, color), va="center")
        figure.text((position + 14) / WIDTH, 1 - 13 / height, name, color=STAND_IN.muted, va="center")
        position += 30 + 7.2 * len(name)
    return figure


def _new(
    curves: Curves, drawn: Sequence[Series], *, bottom: float | None = None, with_control: bool = False
) -> "tuple[Figure, Axes]":
    """An empty chart over the optimizer steps, with the stages marked above."""
    width, height, right = WIDTH, 244, 116
    figure = blank(width, height)
    axes = figure.add_axes((46 / width, 36 / height, (width - 46 - right) / width, (height - 36 - 26) / height))
    _bare(axes)
    stages = [stage for stage in curves.stages() if with_control or stage[0] != "control"]
    steps = [step for series in drawn for step in series.steps] + [step for _, *span in stages for step in span]
    low, high = min(steps), max(steps)
    axes.set_xlim(low, high if high > low else low + 1)
    values = [value for series in drawn for value in series.values]
    least, most = min(values) if bottom is None else min(bottom, *values), max(values)
    room = 0.06 * (most - least) or abs(most) * 0.1 or 1.0
    axes.set_ylim(least - (room if bottom is None or least < bottom else 0), most + room)
    axes.set_xlabel("optimizer step", color=STAND_IN.muted, fontsize=10)
    for index, (name, first, last) in enumerate(stages):
        if index:
            axes.axvline(first, color=STAND_IN.hair, lw=0.9, zorder=0)
        if last - first > 0.06 * (high - low):
            axes.text(
                first + 0.008 * (high - low) * bool(index),
                1.03,
                name,
                transform=axes.get_xaxis_transform(),
                color=STAND_IN.muted,
                fontsize=10,
            )
    return figure, axes


def blank(width: float, height: float) -> "Figure":
    """A figure of so many CSS pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def _bare(axes: "Axes") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(STAND_IN.hair)
    axes.patch.set_visible(False)
    axes.tick_params(length=3, width=0.8, color=STAND_IN.hair, labelcolor=STAND_IN.muted, labelsize=10)
    axes.grid(axis="y", color=STAND_IN.hair, lw=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=5)


def _lines(
    axes: "Axes", drawn: Sequence[tuple[Series, str, str]], *, dots: bool = True
) -> list[tuple[float, str, str]]:
    """Draw curves; returns what stands at their ends."""
    ends: list[tuple[float, str, str]] = []
    for series, name, color in drawn:
        if series:
            thin = _thin(series)
            dotted = len(thin) == 1 or (dots and len(thin) <= 40)  # one point makes no line
            marker: dict[str, Any] = {"marker": "o", "ms": 3.4, "clip_on": False} if dotted else {}
            axes.plot(thin.steps, thin.values, color=color, lw=1.8, **marker)
            ends.append((thin.values[-1], f"{name} {series.values[-1]:.3f}", color))
    return ends


def _label_ends(axes: "Axes", labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each label right of the plot at its value, pushed apart where they would touch."""
    low, high = axes.get_ylim()
    gap = 0.085 * (high - low)
    heights: list[float] = []
    ordered = sorted(labels)
    for value, _, _ in ordered:
        heights.append(max(value, heights[-1] + gap) if heights else value)
    ceiling = high
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    for at, (_, text, color) in zip(heights, ordered, strict=True):
        axes.text(1.015, at, text, transform=axes.get_yaxis_transform(), va="center", color=color)


def _thin(series: Series) -> Series:
    """At most POINTS points: means over equal runs of neighbours, the last point kept as it is."""
    if len(series) <= POINTS:
        return series
    edges = [len(series) * index // POINTS for index in range(POINTS + 1)]
    steps = [series.steps[end - 1] for _, end in pairwise(edges)]
    values = [sum(series.values[start:end]) / (end - start) for start, end in pairwise(edges)]
    return Series(tuple(steps), (*values[:-1], series.values[-1]))


def _running_median(series: Series) -> Series:
    """The median over a window of a twentieth of the curve, so that single steps do not hide the trend."""
    thin = _thin(series)
    half = max(1, len(thin) // 40)
    values = tuple(median(thin.values[max(0, i - half) : i + half + 1]) for i in range(len(thin)))
    return Series(thin.steps, values)


def time_note(curves: Curves) -> str:
    """What pruning itself costs: score and mask as a share of the prune stage's mean step."""
    parts: Mapping[str, float] = time_parts(curves).get("prune") or {}
    own = [parts[name] for name in ("score", "mask") if name in parts]
    if not own or not parts["step"]:
        return ""
    return f"Scores and masks take {three(sum(own))} of {three(parts['step'])} ms ({percent(sum(own) / parts['step'])})"
