"""Write a comparison's files: table.md, table.tex, figure.pdf, and a page of TensorBoard's text view."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

from ..core.text import visible
from ..sweeps.results import event_file
from .comparison import Comparison

#: Characters that LaTeX reads as commands.
_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"$<$", ">": r"$>$",
}  # fmt: skip

#: Characters that Markdown, or HTML in it, reads as markup.
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|&#])")


def files(table: Comparison) -> dict[str, bytes]:
    """Return the content of a comparison's files by name, in the folder of its sweep."""
    from torch.utils.tensorboard.summary import text

    from .figures.style import style
    from .figures.sweep import bars

    figure, page = io.BytesIO(), markdown(table)
    with style():
        bars(table).figure.savefig(figure, format="pdf", metadata={"CreationDate": None})
    return {
        "table.md": page.encode(), "table.tex": latex(table).encode(), "figure.pdf": figure.getvalue(),
        "table/events.out.tfevents.9999999999.table": event_file(text("comparison", page)),
    }  # fmt: skip


def markdown(table: Comparison) -> str:
    """Return the table in Markdown, a part for each omega."""
    parts = []
    for omega, methods in table.sections.items():
        lines = [f"**{table.title(omega)}**\n"] if omega is not None else []
        lines += [_md_row(map(_md, table.heads)), _md_row(["---", *["---:"] * (len(table.heads) - 1)])]
        for method in methods:
            name, final, *rest = map(_md, table.cells(method))
            bold = method.name in table.best(omega)
            lines.append(_md_row([name, f"**{final}**" if bold else final, *rest]))
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, _md(f"{' '.join(table.caption)} Bold: the highest mean.") + "\n"])


def _md(text: str) -> str:
    return _MARKDOWN.sub(r"\\\1", visible(text, ""))


def _md_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def latex(table: Comparison) -> str:
    """Return the table as a LaTeX float, which needs the package booktabs."""
    heads = table.heads
    lines = [
        "% Needs \\usepackage{booktabs}.", r"\begin{table}", r"\centering",
        rf"\caption{{{tex(' '.join([*table.caption, 'Bold: the highest mean.']))}}}", r"\label{tab:comparison}",
        rf"\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"\toprule", rf"{' & '.join(map(tex, heads))} \\",
    ]  # fmt: skip
    for omega, methods in table.sections.items():
        lines.append(r"\midrule")
        if omega is not None:
            lines.append(rf"\multicolumn{{{len(heads)}}}{{l}}{{$\omega = {omega:g}$}} \\")
        for method in methods:
            name, final, *rest = table.cells(method)
            cells = [tex(name), _number(final, method.name in table.best(omega)), *map(_number, rest)]
            lines.append(rf"{' & '.join(cells)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def tex(text: str) -> str:
    """Return ``text`` with LaTeX's special characters escaped."""
    return "".join(_TEX.get(character, character) for character in visible(text, ""))


def _number(text: str, bold: bool = False) -> str:
    """Return a cell: a number, perhaps with its deviation and mark, in math mode."""
    found = re.fullmatch(r"([<+-]?[\d.]+(?: ± [\d.]+)?)(\*?)", text)
    if not found:
        return "--" if text == "-" else tex(text)
    value, mark = found[1].replace("±", r"\pm"), "^{*}" if found[2] else ""
    return f"$\\mathbf{{{value}}}{mark}$" if bold else f"${value}{mark}$"
