"""Draw the cost of a run: bytes sent, and time by stage."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd

from ...core.units import size
from ...runs.summary import Traffic
from ..load import NotAvailable, RunReport
from ..text import duration, percent
from .base import Drawing, ReportFigure
from .style import OUTLINE, WIDTH, axes, bar_axes, colour, label_bars

#: Length of the axis over the longest bar; the labels of the bars fill the rest.
_AXIS = 1.42


def traffic(run: RunReport) -> dict[str, dict[str, float]]:
    """Return direction -> kind -> bytes."""
    moved = run.summary.communication_bytes or {}
    return {way: {kind: count or 0 for kind, count in (moved.get(way) or {}).items()} for way in ("uplink", "downlink")}


@partial(ReportFigure, "communication", "Communication by kind")
def communication(run: RunReport) -> Drawing:
    """Draw bytes by kind, from the clients (uplink) and to them (downlink)."""
    frame = pd.DataFrame(traffic(run)).fillna(0).astype("int64")
    if frame.empty:
        raise NotAvailable("the run ended before its traffic was added up")
    total = frame.sum(axis=1).sort_values(ascending=False, kind="stable")
    frame = frame.loc[total.index].rename_axis("kind")
    kinds = [kind.replace("_", " ") for kind in frame.index]
    figure, over = axes(WIDTH, 0.75 + 0.5 * len(frame))
    places, most = np.arange(len(frame)), frame.to_numpy().max() or 1
    for offset, (way, tint) in zip((-0.19, 0.19), (("uplink", "s1"), ("downlink", "s2")), strict=True):
        over.barh(places + offset, frame[way], 0.34, color=colour(tint), label=f"{way} ({size(frame[way].sum())})")
        label_bars(over, frame[way], places + offset, [size(count) if count else "" for count in frame[way]])
    bar_axes(over, kinds, _AXIS * most)
    figure.legend(loc="outside upper center", ncols=2, columnspacing=1.2)
    share = percent(total.iloc[0] / max(total.sum(), 1))
    both = f"Clients send {size(frame['uplink'].sum())} and receive {size(frame['downlink'].sum())}"
    return Drawing(figure, frame, f"{both}; {share} of both is {kinds[0]}. The control's rounds are left out.")


@partial(ReportFigure, "baselines", "Communication beside other methods")
def baselines(run: RunReport) -> Drawing:
    """Draw all bytes of this run, measured and predicted, and FedAvg's and FedRolex's bytes in as many rounds."""
    sent, record = traffic(run), run.summary.communication
    if record is None or record.baselines is None or not any(sent.values()):
        raise NotAvailable("the run keeps no comparison of its traffic; an older version made it")
    rows: dict[str, Traffic] = {"this run": sent, "predicted": record.predicted or {}, **record.baselines}
    names = {"fedavg": "FedAvg", "fedrolex": "FedRolex"}
    frame = pd.DataFrame(
        {
            names.get(name, name): {way: sum((ways.get(way) or {}).values()) for way in ("uplink", "downlink")}
            for name, ways in rows.items() if ways
        }
    ).T.astype("int64").rename_axis("method")  # fmt: skip
    shown = frame.drop(index="predicted", errors="ignore")
    figure, over = axes(WIDTH, 0.6 + 0.4 * len(shown))
    places, total = np.arange(len(shown)), shown.sum(axis=1)
    over.barh(places, shown["uplink"], 0.62, color=colour("s1"), label="uplink")
    over.barh(places, shown["downlink"], 0.62, shown["uplink"], color=colour("s2"), label="downlink")
    label_bars(over, total, places, map(size, total))
    bar_axes(over, list(shown.index), _AXIS * (total.max() or 1))
    figure.legend(loc="outside upper center", ncols=2, columnspacing=1.2)
    own, others = total["this run"], total.drop("this run")
    parts = [f"{own / max(other, 1):.2f} times what {name} sends" for name, other in others.items()]
    words = f"In as many rounds the run sends {' and '.join(parts)}."
    if "predicted" in frame.index:
        off = abs(own / max(frame.loc["predicted"].sum(), 1) - 1)
        words += f" Arithmetic predicts it {'to the byte' if off == 0 else f'within {percent(off)}'}."
    return Drawing(figure, frame, words)


@partial(ReportFigure, "time", "Time by stage")
def time(run: RunReport) -> Drawing:
    """Draw seconds per stage; a cached stage is an outline as long as its computation took."""
    frame = time_frame(run)
    cached = frame["state"] == "cached"
    length = frame["seconds"].where(~cached, frame["when computed"])
    figure, over = axes(WIDTH, 0.3 + 0.33 * len(frame))
    places = np.arange(len(frame))
    over.barh(places[~cached], length[~cached], 0.62, color=colour("s1"))
    over.barh(places[cached], length[cached], 0.62, **OUTLINE)
    texts = length.map(duration)
    label_bars(over, length, places, texts.where(~cached, "cached (" + texts + ")"))
    bar_axes(over, list(frame.index), _AXIS * (length.max() or 1))
    spent, saved = length[~cached], length[cached]
    words = "Nothing was computed in this run"
    if len(spent):
        share = percent(spent.max() / (spent.sum() or 1))
        words = f"{duration(spent.sum())} computing, {share} of it {spent.idxmax()}"
    if len(saved):
        found = f"{len(saved)} of {len(frame)} stages (outlined) came from the store"
        words += f"; {found}, which saved {duration(saved.sum())}."
    else:
        words += "; no stage was found in the store."
    return Drawing(figure, frame, words)


def time_frame(run: RunReport) -> pd.DataFrame:
    """Return seconds per stage: spent, waiting for another run, and when the result was computed."""
    rows = [
        {
            "stage": name, "state": "cached" if record.cached else "computed", "seconds": record.seconds or 0.0,
            "waited": record.waited_seconds or 0.0, "when computed": record.computed_seconds or 0.0,
        }
        for name, record in (run.summary.stages or {}).items()
    ]  # fmt: skip
    if not rows:
        raise NotAvailable("the run ended before its first stage did")
    return pd.DataFrame(rows).set_index("stage")
