"""Draw the cost of a run: bytes sent, and time by stage."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...core.types import STAGES
from ..load import NotAvailable, RunReport
from ..text import duration, percent, size
from .base import ReportFigure
from .style import WIDTH, axes, bar_axes, colour, label_bars, styled

#: Length of the axis over the longest bar; the labels of the bars fill the rest.
_AXIS = 1.42


def traffic(run: RunReport) -> dict[str, dict[str, float]]:
    """Return direction -> kind -> bytes."""
    moved = run.summary.communication_bytes or {}
    return {way: {kind: count or 0 for kind, count in (moved.get(way) or {}).items()} for way in ("uplink", "downlink")}


def communication_frame(run: RunReport) -> pd.DataFrame:
    """Return bytes by kind, from the clients (uplink) and to them (downlink)."""
    frame = pd.DataFrame(traffic(run)).fillna(0).astype("int64")
    if frame.empty:
        raise NotAvailable("the run ended before its traffic was added up")
    largest_first = frame.sum(axis=1).sort_values(ascending=False, kind="stable").index
    return frame.loc[largest_first].rename_axis("kind")


@styled
def communication(run: RunReport) -> Figure:
    """Draw bytes by kind and direction."""
    frame = communication_frame(run)
    figure, over = axes(WIDTH, 0.75 + 0.5 * len(frame))
    places, most = np.arange(len(frame)), frame.to_numpy().max() or 1
    for offset, (way, tint) in zip((-0.19, 0.19), (("uplink", "s1"), ("downlink", "s2")), strict=True):
        over.barh(places + offset, frame[way], 0.34, color=colour(tint), label=f"{way} ({size(frame[way].sum())})")
        label_bars(over, frame[way], places + offset, [size(count) if count else "" for count in frame[way]])
    bar_axes(over, [kind.replace("_", " ") for kind in frame.index], _AXIS * most)
    figure.legend(loc="outside upper center", ncols=2, columnspacing=1.2)
    return figure


def _communication_words(run: RunReport) -> str:
    frame = communication_frame(run)
    up, down = frame["uplink"].sum(), frame["downlink"].sum()
    largest = frame.sum(axis=1).idxmax().replace("_", " ")
    share = frame.sum(axis=1).max() / max(up + down, 1)
    both = f"Clients send {size(up)} and receive {size(down)}"
    return f"{both}; {percent(share)} of both is {largest}. The control's rounds are left out."


def baselines_frame(run: RunReport) -> pd.DataFrame:
    """Return bytes by direction: of this run, measured and predicted, and of FedAvg and FedRolex in the same rounds."""
    sent, record = traffic(run), run.summary.communication
    if record is None or record.baselines is None or not any(sent.values()):
        raise NotAvailable("the run keeps no comparison of its traffic; an older version made it")
    rows = {"this run": sent, "predicted": record.predicted or {}, **record.baselines}
    names = {"fedavg": "FedAvg", "fedrolex": "FedRolex"}
    frame = pd.DataFrame(
        {
            names.get(name, name): {way: sum((ways.get(way) or {}).values()) for way in ("uplink", "downlink")}
            for name, ways in rows.items() if ways
        }
    ).T.astype("int64")  # fmt: skip
    return frame.rename_axis("method")


@styled
def baselines(run: RunReport) -> Figure:
    """Draw all bytes of this run beside the bytes of FedAvg and FedRolex in as many rounds."""
    frame = baselines_frame(run).drop(index="predicted", errors="ignore")
    figure, over = axes(WIDTH, 0.6 + 0.4 * len(frame))
    places, total = np.arange(len(frame)), frame.sum(axis=1)
    over.barh(places, frame["uplink"], 0.62, color=colour("s1"), label="uplink")
    over.barh(places, frame["downlink"], 0.62, frame["uplink"], color=colour("s2"), label="downlink")
    label_bars(over, total, places, map(size, total))
    bar_axes(over, list(frame.index), _AXIS * (total.max() or 1))
    figure.legend(loc="outside upper center", ncols=2, columnspacing=1.2)
    return figure


def _baselines_words(run: RunReport) -> str:
    total = baselines_frame(run).sum(axis=1)
    parts = [
        f"{total['this run'] / max(total[name], 1):.2f} times what {name} sends"
        for name in total.index if name not in ("this run", "predicted")
    ]  # fmt: skip
    off = abs(total["this run"] / max(total["predicted"], 1) - 1) if "predicted" in total.index else None
    agree = "" if off is None else f" Arithmetic predicts it {'to the byte' if off == 0 else f'within {percent(off)}'}."
    return f"In as many rounds the run sends {' and '.join(parts)}.{agree}"


def time_frame(run: RunReport) -> pd.DataFrame:
    """Return seconds per stage: spent, waiting for another run, and when the result was computed."""
    records = run.summary.stages or {}
    rows = [
        {
            "stage": name, "state": "cached" if record.cached else "computed", "seconds": record.seconds or 0.0,
            "waited": record.waited_seconds or 0.0, "when computed": record.computed_seconds or 0.0,
        }
        for name in STAGES if (record := records.get(name))
    ]  # fmt: skip
    if not rows:
        raise NotAvailable("the run ended before its first stage did")
    return pd.DataFrame(rows).set_index("stage")


@styled
def time(run: RunReport) -> Figure:
    """Draw seconds per stage; a cached stage is an outline as long as its computation took."""
    frame = time_frame(run)
    cached = frame["state"] == "cached"
    length = frame["seconds"].where(~cached, frame["when computed"])
    figure, over = axes(WIDTH, 0.3 + 0.33 * len(frame))
    places = np.arange(len(frame))
    over.barh(places[~cached], length[~cached], 0.62, color=colour("s1"))
    over.barh(places[cached], length[cached], 0.62, facecolor="none", edgecolor=colour("s6"), ls=(0, (3, 2)), lw=1.2)
    texts = length.map(duration)
    label_bars(over, length, places, texts.where(~cached, "cached (" + texts + ")"))
    bar_axes(over, list(frame.index), _AXIS * (length.max() or 1))
    return figure


def _time_words(run: RunReport) -> str:
    frame = time_frame(run)
    computed, cached = frame[frame["state"] == "computed"], frame[frame["state"] == "cached"]
    total = computed["seconds"].sum()
    text = "Nothing was computed in this run"
    if not computed.empty:
        longest = computed["seconds"].idxmax()
        text = f"{duration(total)} computing, {percent(computed['seconds'].max() / (total or 1))} of it {longest}"
    if cached.empty:
        return f"{text}; no stage was found in the store."
    saved = duration(cached["when computed"].sum())
    return f"{text}; {len(cached)} of {len(frame)} stages (outlined) came from the store, which saved {saved}."


FIGURES = [
    ReportFigure("time", "Time by stage", time, time_frame, _time_words),
    ReportFigure("communication", "Communication by kind", communication, communication_frame, _communication_words),
    ReportFigure("baselines", "Communication beside other methods", baselines, baselines_frame, _baselines_words),
]
