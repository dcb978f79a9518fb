"""Layer by step: where in the model the zeros came to lie, and when."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tritprune.report.charts import blank
from tritprune.report.records import Curves, Result, layer_series
from tritprune.report.svg import STAND_IN, Palette, chart, drawing
from tritprune.report.words import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RAMP = ("#f0efe9", "#c3e2d3", "#62bb9a", "#00815e", "#04382b")
"""0% to 100% zeros, even steps of lightness; the dark page inverts it by CSS."""


def heat_map(result: Result, curves: Curves, palette: Palette) -> "Figure | None":
    """Sparsity of each layer (rows, in the model's order) over the optimizer steps (columns)."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    ramp = LinearSegmentedColormap.from_list("zeros", RAMP)
    ramp.set_bad(alpha=0.0)
    layers = list(layer_series(result, curves))
    if not layers:
        return None
    first = min(series.steps[0] for _, series in layers)
    last = max(series.steps[-1] for _, series in layers)
    columns = np.linspace(first, last, min(max(last - first + 1, 2), 480))
    cells = np.full((len(layers), len(columns)), np.nan)
    for line, (_, series) in enumerate(layers):
        at = np.searchsorted(np.asarray(series.steps), columns, side="right") - 1
        cells[line] = np.where(at >= 0, np.asarray(series.values)[np.maximum(at, 0)], np.nan)
    names = short_names([name for name, _ in layers])
    row_height = 15.0 if len(layers) <= 48 else max(3.0, 680 / len(layers))
    label_width = min(280, 14 + 6.4 * max(map(len, names)))
    width, height = 1120, 64 + row_height * len(layers)
    figure = blank(width, height)
    body = (label_width / width, 40 / height, 1 - (label_width + 64) / width, 1 - 64 / height)
    axes = figure.add_axes(body)
    axes.imshow(
        cells,
        aspect="auto",
        interpolation="nearest",
        cmap=ramp,
        vmin=0,
        vmax=1,
        extent=(first - 0.5, last + 0.5, len(layers) - 0.5, -0.5),
    )
    for side in axes.spines.values():
        side.set_visible(False)
    every = max(1, -int(-12.5 // row_height))
    axes.set_yticks(range(0, len(layers), every), names[::every])
    axes.tick_params(length=0, colors=palette.muted, pad=5, labelsize=10)
    axes.set_xlabel("optimizer step", color=palette.muted, fontsize=10)
    for line, series in enumerate(series for _, series in layers):
        if line % every == 0:
            axes.text(
                1.006,
                line,
                percent(series.values[-1], 0),
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=10,
                color=palette.ink,
            )
    scale = figure.add_axes((body[0], 1 - 14 / height, 180 / width, 8 / height))
    scale.imshow(np.linspace(0, 1, 180)[None], aspect="auto", cmap=ramp, vmin=0, vmax=1)
    scale.set_axis_off()
    figure.text(body[0] + 188 / width, 1 - 10 / height, "0% to 100% zeros", color=palette.muted, va="center", size=10)
    figure.text(1 - 58 / width, 1 - 10 / height, "at the end", color=palette.muted, va="center", size=10)
    return figure


@chart("heatmap", "Sparsity of each layer over optimizer steps")
def heat_map_svg(result: Result, curves: Curves) -> "Figure | None":
    """The heat map for the page."""
    return heat_map(result, curves, STAND_IN)


def heat_map_png(result: Result, curves: Curves) -> bytes | None:
    """The heat map as a PNG on white, for wandb and slides."""
    with drawing():
        figure = heat_map(result, curves, Palette())
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144, facecolor="white", metadata={"Software": None})
        return buffer.getvalue()


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the dotted beginning that all of them share."""
    split = [name.split(".") for name in names]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split] if len(names) > 1 else list(names)
