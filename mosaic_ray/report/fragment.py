"""Parts of HTML for the output cell of a notebook; every text is escaped."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from markupsafe import Markup, escape

from ..core.text import visible


def text_of(value: Any) -> Markup:
    """Return ``value`` as HTML text; ``Markup`` stays as it is."""
    return value if isinstance(value, Markup) else escape(visible(str(value)))


def paragraph(text: str, tag: str = "p") -> Markup:
    """Return ``text`` in an element."""
    return Markup("<{0}>{1}</{0}>").format(Markup(tag), text_of(text))


def html_table(
    heads: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", bold: Container[int] = ()
) -> Markup:
    """Return a table; the first cell of a row is its head, ``bold`` has the numbers of bold rows."""
    head = Markup("").join(paragraph(name, "th") for name in heads)
    body = Markup("").join(
        Markup('<tr{}><th>{}</th>{}</tr>').format(
            Markup(' style="font-weight: bold"') if number in bold else "", text_of(row[0]),
            Markup("").join(paragraph(cell, "td") for cell in row[1:]),
        )
        for number, row in enumerate(rows)
    )  # fmt: skip
    caption = paragraph(title, "caption") if title else ""
    return Markup("<table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(caption, head, body)
