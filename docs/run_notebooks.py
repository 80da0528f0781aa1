"""Run the notebooks in examples/ and keep what their cells show: `make notebooks`.

Each runs in an empty folder. Bars of progress, times and paths are left out of what is kept, so that files change only
where results do.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def executed(path: Path, folder: str | Path) -> Any:
    """Run the notebook at ``path`` in ``folder``, but for cells tagged skip-execution, and return it with outputs."""
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            shown = [output for output in cell.outputs if output.output_type != "display_data"]  # bars of progress
            cell.outputs = [kept(output, str(folder)) for output in shown]
    book.metadata.pop("language_info", None)  # has this Python's version
    return book


def kept(output: Any, folder: str) -> Any:
    """Return ``output`` with one form of what it shows, and without the folder in which it ran."""
    if "text" in output:
        output.text = output.text.replace(folder, ".")
    elif "data" in output:
        best = next(kind for kind in ("image/png", "text/html", "text/plain") if kind in output.data)
        output.data = {best: output.data[best].replace(folder, ".")}
        output.metadata = {}
    return output


if __name__ == "__main__":
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, folder), path)
        print(path.name)
