"""Draw the teacher: the classes of synthetic images, and the weights of clients and experts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...core.health import SINGLE_OWNER_BELOW
from ..load import NotAvailable, RunReport
from ..text import counted, listed, percent
from .base import ReportFigure
from .heatmap import MOST_COLUMNS, MOST_ROWS, _numbers, heat_map
from .style import axes, colour, in_percent, styled

#: Least share of a synthetic batch for a class to count as seen.
SEEN = 0.01


def _counts(run: RunReport) -> np.ndarray:
    counts = run.diagnostic("distill", "synthetic_counts", 1)
    if not counts.sum():
        raise NotAvailable("the teacher was shown no synthetic images")
    return counts


def synthetic_classes_frame(run: RunReport) -> pd.DataFrame:
    """Return the images of one synthetic batch by the class that the teacher predicts."""
    counts = _counts(run)
    return pd.DataFrame({"images": counts, "share": counts / counts.sum()}).rename_axis("class")


@styled
def synthetic_classes(run: RunReport) -> Figure:
    """Draw the classes that the teacher predicts in one synthetic batch; the dashed line is an even share."""
    frame, (figure, over) = synthetic_classes_frame(run), axes()
    over.bar(frame.index, frame["share"], 0.7, color=colour("s3"))
    over.axhline(1 / len(frame), color=colour("muted"), lw=1, ls=(0, (3, 3)))
    over.set(xlabel="class", ylabel="share of synthetic images", xlim=(-0.6, len(frame) - 0.4))
    over.set_xticks(_numbers(len(frame), MOST_COLUMNS))
    over.grid(axis="x", visible=False)
    in_percent(over.yaxis)
    return figure


def _synthetic_words(run: RunReport) -> str:
    share = synthetic_classes_frame(run)["share"]
    missed = share.index[share < SEEN].tolist()
    text = f"In a batch of {_counts(run).sum():,} synthetic images the teacher names class {share.idxmax()} most "
    lacks = (
        f"under {100 * SEEN:.0f} % it names class {listed(missed)}"
        if missed
        else "it names every class at least once in a hundred"
    )
    return f"{text}({percent(share.max())}); {lacks}. Dashed: an even share."


def _expert_table(run: RunReport, name: str) -> np.ndarray:
    table = run.diagnostic("teacher", name, 2)
    if not np.isfinite(table).all() or not table.size:
        raise NotAvailable(f"the teacher's {name.replace('_', ' ')} are not all finite")
    return table


def _frame(run: RunReport, name: str) -> pd.DataFrame:
    table = _expert_table(run, name)
    if table.shape[1] <= MOST_COLUMNS:
        return pd.DataFrame(table).rename_axis(_row_name(name))
    top = table.argmax(axis=0)
    columns = {_row_name(name): top, "value": table[top, np.arange(table.shape[1])]}
    return pd.DataFrame(columns).rename_axis("class")


def _row_name(name: str) -> str:
    return "client" if name == "expert_weights" else "expert"


def _heat(run: RunReport, name: str) -> Figure:
    table = _expert_table(run, name)
    rows, columns = table.shape
    each = rows <= MOST_ROWS and columns <= MOST_COLUMNS
    top = float(table.max()) if name == "meta_gates" else 1.0
    figure, over = axes(1.0 + (0.4 * columns if each else 4.2), 0.75 + (0.28 * rows if each else 4.0))
    shares = table / (top or 1.0)
    texts = np.vectorize(lambda share: f"{share:.2f}".removeprefix("0"))(shares)
    heat_map(over, shares, texts if each else None, _row_name(name), size=7.5)
    return figure


@styled
def expert_weights(run: RunReport) -> Figure:
    """Draw the weight of each client's model in each class's expert."""
    return _heat(run, "expert_weights")


@styled
def meta_gates(run: RunReport) -> Figure:
    """Draw the meta model's weight of each expert for each class, on held-out prototypes; the largest is 1."""
    return _heat(run, "meta_gates")


def _weights_words(run: RunReport) -> str:
    table = _expert_table(run, "expert_weights")
    entropy = -(table * np.log(np.where(table > 0, table, 1))).sum(axis=0)
    alone = np.flatnonzero((np.exp(entropy) < SINGLE_OWNER_BELOW) & (table.max(axis=0) > 0)).tolist()
    text = f"Of {counted(table.shape[1], 'class expert')}, "
    if not alone:
        return f"{text}none comes from one client alone; the heaviest weight is {percent(float(table.max()))}."
    come = "comes" if len(alone) == 1 else "come"
    return f"{text}{len(alone)} {come} almost entirely from one client (class {listed(alone)})."


def _gates_words(run: RunReport) -> str:
    table = _expert_table(run, "meta_gates")
    own = table.shape[0] == table.shape[1] and float(np.mean(table.argmax(axis=0) == np.arange(len(table))))
    most = int(table.sum(axis=1).argmax())
    first = f"The meta model weights expert {most} most over all classes (the largest weight is 1)"
    return (
        f"{first}; for {percent(own)} of the classes their own expert counts most." if own is not False else f"{first}."
    )


FIGURES = [
    ReportFigure(
        "synthetic_classes", "Classes of synthetic images", synthetic_classes, synthetic_classes_frame, _synthetic_words
    ),
    ReportFigure(
        "expert_weights",
        "Clients in the class experts",
        expert_weights,
        partial(_frame, name="expert_weights"),
        _weights_words,
        wide=True,
    ),
    ReportFigure(
        "meta_gates",
        "Experts in the meta model",
        meta_gates,
        partial(_frame, name="meta_gates"),
        _gates_words,
        wide=True,
    ),
]
