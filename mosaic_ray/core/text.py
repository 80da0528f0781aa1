"""Text that others chose, such as names and messages, in a form that cannot act on a terminal or a spreadsheet."""

from __future__ import annotations

import re

#: Control characters, line ends of Unicode, marks that turn the direction of text around, halves of surrogate pairs.
_ACTIVE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "\n\t") -> str:
    """Return ``text`` with an escape such as ``\\x1b`` for each active character that is not in ``keep``."""
    return _ACTIVE.sub(lambda c: c[0] if c[0] in keep else c[0].encode("unicode_escape").decode(), text)


def csv_cell(text: str) -> str:
    """Return ``text`` so that a spreadsheet does not read it as a formula: a quote stands before ``=+-@`` and a tab."""
    return f"'{visible(text)}" if text[:1] in tuple("=+-@\t") else visible(text)
