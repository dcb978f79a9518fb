"""HTML that is escaped by construction: a plain string is text, only :class:`Html` is markup."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any


class Html(str):
    """A string that is markup already."""

    __slots__ = ()


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """``<name attributes>children</name>``; children that are no :class:`Html` are escaped, None is left out.

    ``class_="x"`` gives ``class="x"``; ``open=True`` gives a bare attribute; None and False leave it out.
    """
    head = name
    for key, value in attributes.items():
        if value is True:
            head += f" {key}"
        elif value is not None and value is not False:
            head += f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
    return Html(f"<{head}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Html:
    """Parts one after the other, each escaped unless it is markup; None is left out."""
    return Html("".join(part if isinstance(part, Html) else escape(str(part)) for part in parts if part is not None))


def table(heads: Iterable[Any], rows: Iterable[Html], **attributes: Any) -> Html:
    """A table that scrolls sideways on a narrow screen; ``rows`` are ready ``<tr>`` elements."""
    head = tag("thead", tag("tr", *(cell if isinstance(cell, Html) else tag("th", cell) for cell in heads)))
    return tag("div", tag("table", head, tag("tbody", *rows), **attributes), class_="scroll")


def pairs(entries: Mapping[str, Any]) -> Html:
    """A list of terms and values; entries that are None or empty are left out."""
    shown = [(key, value) for key, value in entries.items() if value not in (None, "")]
    return tag("dl", *(join((tag("dt", key), tag("dd", value))) for key, value in shown), class_="pairs")


def fold(summary: Any, *children: Any) -> Html:
    """A part that opens on a click, and is open on paper."""
    return tag("details", tag("summary", summary), *children)
