"""matplotlib figures as inline SVG.

A figure is drawn once, in stand-in colours; :func:`to_svg` turns those into CSS variables, so that one inline SVG
follows the page from light to dark. Text stays text, ids are unique on the page, and the output is the same bytes for
the same numbers.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

P = ParamSpec("P")


@dataclass(frozen=True)
class Palette:
    """Colours by role: Okabe and Ito's, which stay apart for colour-blind readers."""

    ink: str = "#1c1f23"
    muted: str = "#6b7076"
    hair: str = "#d9d7d0"
    wash: str = "#f1efe9"
    paper: str = "#fdfcfa"
    blue: str = "#0072b2"
    sky: str = "#56b4e9"
    green: str = "#009e73"
    orange: str = "#d55e00"
    gold: str = "#e69f00"
    dark: str = "#14202b"


STAND_IN = Palette(*(f"#00fe{index:02x}" for index, _ in enumerate(fields(Palette))))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "axes.linewidth": 0.8,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "text.parse_math": False,
    "axes.unicode_minus": True,
}


@contextmanager
def drawing() -> Iterator[None]:
    """The house style; and no warning about a script that matplotlib's font lacks: text is written as text."""
    import matplotlib as mpl

    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def chart(name: str, description: str) -> "Callable[[Callable[P, Figure | None]], Callable[P, str | None]]":
    """Decorator: a function that draws becomes one that gives inline SVG, or None where there is nothing to draw."""

    def decorate(draw: "Callable[P, Figure | None]") -> Callable[P, str | None]:
        @wraps(draw)
        def svg(*args: P.args, **kwargs: P.kwargs) -> str | None:
            with drawing():
                figure = draw(*args, **kwargs)
                return None if figure is None else to_svg(figure, name, description)

        return svg

    return decorate


def to_svg(figure: "Figure", name: str, description: str) -> str:
    """A figure as inline SVG: themed by CSS variables, no ids that another chart has, no outside references."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": f"tritprune {name}"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text).replace("xlink:href", "href")
    text = re.sub(
        r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, count=1, flags=re.DOTALL
    )  # it says it to all "*"
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", r"font-size: \2px", text)
    for role in fields(Palette):
        text = text.replace(f": {getattr(STAND_IN, role.name)}", f": var(--{role.name})")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", text[: text.index(">")])
    return f'{head} role="img" aria-label="{description}" class="chart"' + text[text.index(">") :].rstrip()
