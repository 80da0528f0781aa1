"""What trials of a sweep shared, and what that spared."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..records import STAGES
from .drawing import WIDTH, axes, colour, drawn
from .exhibits import Exhibit
from .loading import Absent, SweepReport
from .wording import duration


def sharing_frame(sweep: SweepReport) -> pd.DataFrame:
    """By stage: in how many trials it was computed and found, and the seconds that cost and spared."""
    rows = []
    for stage in STAGES:
        known = sweep.results.dropna(subset=[f"cached_{stage}"])
        found = known[f"cached_{stage}"].astype(bool)
        seconds = known[f"seconds_{stage}"].fillna(0.0)
        if len(known):
            rows.append((stage, int((~found).sum()), int(found.sum()), seconds[~found].sum(), seconds[found].sum()))
    if not rows:
        raise Absent("no trial has ended yet")
    return pd.DataFrame(rows, columns=["stage", "computed", "found", "seconds spent", "seconds spared"]).set_index(
        "stage"
    )


@drawn
def sharing(sweep: SweepReport) -> Figure:
    """How many trials computed each stage, and how many found it in the store."""
    frame = sharing_frame(sweep)
    figure, over = axes(WIDTH, 0.65 + 0.31 * len(frame))
    places = np.arange(len(frame))
    over.barh(places, frame["computed"], 0.62, color=colour("s1"), label="computed")
    over.barh(
        places, frame["found"], 0.62, frame["computed"], facecolor="none", edgecolor=colour("s6"), ls=(0, (3, 2)),
        lw=1.2, label="found",
    )  # fmt: skip
    for place, row in enumerate(frame.itertuples()):
        over.annotate(
            f"{row.computed} + {row.found}", (row.computed + row.found, place), xytext=(5, 0),
            textcoords="offset points", va="center", size=9,
        )  # fmt: skip
    over.set(xlim=(0, 1.25 * (frame["computed"] + frame["found"]).max()), ylim=(len(frame) - 0.5, -0.5))
    over.set_yticks(places, frame.index)
    over.tick_params(axis="y", labelcolor=colour("ink"), length=0)
    over.set_xticks([])
    over.grid(False)
    over.spines["bottom"].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _words(sweep: SweepReport) -> str:
    frame = sharing_frame(sweep)
    return (
        f"Of {int(frame[['computed', 'found']].to_numpy().sum()):,} stages that trials asked for "
        f"{int(frame['found'].sum()):,} were found: {duration(frame['seconds spent'].sum())} were spent, "
        f"{duration(frame['seconds spared'].sum())} spared."
    )


SHARING = Exhibit("sharing", "Stages that trials shared", sharing, sharing_frame, _words)
