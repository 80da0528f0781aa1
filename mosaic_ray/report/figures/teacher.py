"""Draw the teacher: the classes of synthetic images, and the weights of clients and experts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...core.health import SINGLE_OWNER_BELOW
from ..load import NotAvailable, RunReport
from ..text import counted, listed, percent
from .base import Drawing, ReportFigure
from .heatmap import MOST_COLUMNS, MOST_ROWS, _numbers, heat_map
from .style import axes, colour, in_percent


@partial(ReportFigure, "synthetic_classes", "Classes of synthetic images")
def synthetic_classes(run: RunReport) -> Drawing:
    """Draw the classes that the teacher predicts in one synthetic batch; the dashed line is an even share."""
    counts = run.diagnostic("distill", "synthetic_counts", 1)
    if not counts.sum():
        raise NotAvailable("the teacher was shown no synthetic images")
    share = counts / counts.sum()
    frame, (figure, over) = pd.DataFrame({"images": counts, "share": share}).rename_axis("class"), axes()
    frame = frame.rename(index=run.class_labels)
    over.bar(range(len(frame)), share, 0.7, color=colour("s3"))
    over.axhline(1 / len(frame), color=colour("muted"), lw=1, ls=(0, (3, 3)))
    over.set(xlabel="class", ylabel="share of synthetic images", xlim=(-0.6, len(frame) - 0.4))
    over.set_xticks(_numbers(len(frame), MOST_COLUMNS))
    over.grid(axis="x", visible=False)
    in_percent(over.yaxis)
    lacks = "it names every class at least once in a hundred"
    if missed := np.flatnonzero(share < 0.01).tolist():
        lacks = f"under 1 % it names class {listed([run.class_label(c) for c in missed])}"
    words = (
        f"In a batch of {counts.sum():,} synthetic images the teacher names class "
        f"{run.class_label(int(share.argmax()))} most ({percent(share.max())}); {lacks}. Dashed: an even share."
    )
    return Drawing(figure, frame, words)


@partial(ReportFigure, "expert_weights", "Clients in the class experts", wide=True)
def expert_weights(run: RunReport) -> Drawing:
    """Draw the weight of each client's model in each class's expert."""
    table = _expert_table(run, "expert_weights")
    entropy = -(table * np.log(np.where(table > 0, table, 1))).sum(axis=0)
    alone = np.flatnonzero((np.exp(entropy) < SINGLE_OWNER_BELOW) & (table.max(axis=0) > 0)).tolist()
    if alone:
        come = "comes" if len(alone) == 1 else "come"
        names = listed([run.class_label(c) for c in alone])
        text = f"{len(alone)} {come} almost entirely from one client (class {names})."
    else:
        text = f"none comes from one client alone; the heaviest weight is {percent(float(table.max()))}."
    words = f"Of {counted(table.shape[1], 'class expert')}, {text}"
    return Drawing(_heat(table, "client"), _frame(table, "client"), words)


@partial(ReportFigure, "meta_gates", "Experts in the meta model", wide=True)
def meta_gates(run: RunReport) -> Drawing:
    """Draw the meta model's weight of each expert for each class, on held-out prototypes; the largest is 1."""
    table = _expert_table(run, "meta_gates")
    most = int(table.sum(axis=1).argmax())
    words = f"The meta model weights expert {most} most over all classes (the largest weight is 1)"
    if table.shape[0] == table.shape[1]:
        own = float(np.mean(table.argmax(axis=0) == np.arange(len(table))))
        words += f"; for {percent(own)} of the classes their own expert counts most"
    return Drawing(_heat(table / (float(table.max()) or 1.0), "expert"), _frame(table, "expert"), f"{words}.")


def _expert_table(run: RunReport, name: str) -> np.ndarray:
    table = run.diagnostic("teacher", name, 2)
    if not np.isfinite(table).all() or not table.size:
        raise NotAvailable(f"the teacher's {name.replace('_', ' ')} are not all finite")
    return table


def _frame(table: np.ndarray, row: str) -> pd.DataFrame:
    """Return ``table`` [rows, classes]; for many classes only the largest value of each and its row."""
    if table.shape[1] <= MOST_COLUMNS:
        return pd.DataFrame(table).rename_axis(row)
    return pd.DataFrame({row: table.argmax(axis=0), "value": table.max(axis=0)}).rename_axis("class")


def _heat(shares: np.ndarray, row: str) -> Figure:
    rows, columns = shares.shape
    each = rows <= MOST_ROWS and columns <= MOST_COLUMNS
    figure, over = axes(1.0 + (0.4 * columns if each else 4.2), 0.75 + (0.28 * rows if each else 4.0))
    texts = np.vectorize(lambda share: f"{share:.2f}".removeprefix("0"))(shares) if each else None
    heat_map(over, shares, texts, row, size=7.5)
    return figure
