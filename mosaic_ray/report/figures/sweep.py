"""Draw a sweep's figures: methods, single knobs, all configurations, and stages that trials shared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...config.fields import short_names, shown
from ...config.resolve import KNOBS
from ...core.types import ROLES
from ..load import NotAvailable, SweepReport
from ..sweep_table import SHARED, shared_stages
from ..text import counted, duration, listed, percent
from .base import ReportFigure
from .style import (
    HEIGHT,
    ROLE_LOOKS,
    SERIES,
    STEPS,
    WIDTH,
    axes,
    bar_axes,
    colour,
    in_percent,
    label_bars,
    label_ends,
    log_ticks,
    styled,
)


def sharing_frame(sweep: SweepReport) -> pd.DataFrame:
    """Return by stage the trials that computed it and that found it, and the seconds spent and saved."""
    if not (rows := shared_stages(sweep.rows)):
        raise NotAvailable("no trial has ended yet")
    return pd.DataFrame(rows, columns=SHARED).set_index("stage")


@styled
def sharing(sweep: SweepReport) -> Figure:
    """Draw how many trials computed each stage, and how many found it in the store."""
    frame = sharing_frame(sweep)
    figure, over = axes(WIDTH, 0.65 + 0.31 * len(frame))
    places = np.arange(len(frame))
    over.barh(places, frame["computed"], 0.62, color=colour("s1"), label="computed")
    over.barh(
        places, frame["found"], 0.62, frame["computed"], facecolor="none", edgecolor=colour("s6"), ls=(0, (3, 2)),
        lw=1.2, label="found",
    )  # fmt: skip
    total = frame["computed"] + frame["found"]
    label_bars(over, total, places, [f"{row.computed} + {row.found}" for row in frame.itertuples()])
    bar_axes(over, list(frame.index), 1.25 * total.max())
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _sharing_words(sweep: SweepReport) -> str:
    frame = sharing_frame(sweep)
    return (
        f"Of {int(frame[['computed', 'found']].to_numpy().sum()):,} stages that trials asked for "
        f"{int(frame['found'].sum()):,} were found: {duration(frame['seconds spent'].sum())} were spent, "
        f"{duration(frame['seconds saved'].sum())} saved."
    )


OMEGA = "partition.omega"

#: With more values than this no line joins them; more series share a colour.
MOST_VALUES, MOST_SERIES = 8, len(SERIES)

#: Least ratio of a knob's largest to its smallest value for a logarithmic axis.
LOG_FROM = 20.0


def numeric(sweep: SweepReport) -> tuple[str, ...]:
    """Return the knobs that vary and are numbers."""
    return tuple(name for name in sweep.varying if KNOBS[name].type in (int, float))


def _kinds(sweep: SweepReport) -> list[str]:
    """Return the varying knobs that are no numbers and no conditions: method, optimiser, switches."""
    return [name for name in sweep.varying if name not in (*numeric(sweep), *sweep.conditions)]


def _label(values: Mapping[str, Any]) -> str:
    """Format knobs as ``name=value``, a method by its name alone."""
    short = short_names(values)
    return ", ".join(
        str(value) if name == "method" else f"{short[name]}={shown(value)}" for name, value in values.items()
    )


def _labelled(frame: pd.DataFrame, names: list[str]) -> pd.Series:
    return pd.Series([_label(row) for row in frame[names].to_dict("records")], index=frame.index, dtype=object)


def _done(sweep: SweepReport) -> pd.DataFrame:
    frame = sweep.done.dropna(subset=["accuracy_final"])
    if frame.empty:
        raise NotAvailable("no trial has ended yet")
    return frame


def _spread(frame: pd.DataFrame, by: list[str], column: str) -> pd.DataFrame:
    """Return mean, sample standard deviation and number of ``column`` by group, in order of appearance."""
    means = frame.groupby(by, sort=False, dropna=False)[column].agg(["mean", "std", "count"]).reset_index()
    return means.rename(columns={"std": "sd", "count": "trials"})


def _log(values: Any) -> bool:
    low, high = min(values), max(values)
    return low > 0 and high / low >= LOG_FROM


def _bars(over: Axes, means: pd.DataFrame, x: Any, look: tuple[str, str], line: bool, name: str = "") -> None:
    """Draw means with one standard deviation to either side."""
    tint, marker = look
    over.errorbar(
        x, means["mean"], means["sd"].fillna(0), color=colour(tint), marker=marker, ms=6, lw=1.8 if line else 0,
        elinewidth=1.4, capsize=3, label=name,
    )  # fmt: skip


# --- methods ---------------------------------------------------------------------------------------------------------


def methods_frame(sweep: SweepReport) -> pd.DataFrame:
    """Return mean, sd over seeds and gain over the control, by condition and method (or another name or switch)."""
    names, frame = _kinds(sweep), _done(sweep)
    if not names:
        raise NotAvailable("one method throughout")
    if others := [name for name in numeric(sweep) if name not in sweep.conditions]:
        raise NotAvailable(f"configurations differ in {listed(others)} too, so that methods alone do not compare")
    conditions = [name for name in sweep.conditions if name in sweep.varying]
    means = _spread(frame, [*conditions, *names], "accuracy_final")
    gains = frame.groupby([*conditions, *names], sort=False, dropna=False)["gain"].mean()
    means["gain over control"] = gains.to_numpy()
    return means


@styled
def methods(sweep: SweepReport) -> Figure:
    """Draw each method's final accuracy under each condition: every seed, the mean, one standard deviation."""
    means, names, frame = methods_frame(sweep), _kinds(sweep), _done(sweep)
    conditions = [name for name in sweep.conditions if name in sweep.varying]
    labels = list(dict.fromkeys(_labelled(means, names)))
    gaps = (
        means.groupby(conditions, sort=False, dropna=False).ngroup() if conditions else pd.Series(0, means.index)
    ) * 0.9
    places = np.arange(len(means)) + gaps.to_numpy()
    figure, over = axes(WIDTH, 0.75 + 0.31 * (places[-1] + 1))
    for place, row in zip(places, means.to_dict("records"), strict=True):
        same = np.all([frame[name] == row[name] for name in [*conditions, *names]], axis=0)
        tint, marker = SERIES[labels.index(_label({name: row[name] for name in names})) % MOST_SERIES]
        seeds = frame.loc[same, "accuracy_final"]
        over.plot(seeds, [place] * len(seeds), "|", color=colour(tint), ms=9, alpha=0.6)
        over.errorbar(
            row["mean"], place, xerr=0 if math.isnan(row["sd"]) else row["sd"], color=colour(tint), marker=marker,
            ms=7, elinewidth=1.6, capsize=3,
        )  # fmt: skip
    names_at = [_label({name: row[name] for name in names}) for row in means.to_dict("records")]
    over.set_yticks(places, names_at)
    over.tick_params(axis="y", labelcolor=colour("ink"), length=0)
    over.set(ylim=(places[-1] + 0.6, -1.0 if conditions else -0.6), xlabel="test accuracy, final model")
    if conditions:
        for _, rows in means.groupby(gaps, sort=False):
            words = _label({name: rows.iloc[0][name] for name in conditions})
            over.annotate(
                words, (0, places[rows.index[0]] - 0.62), xycoords=("axes fraction", "data"), size=9, va="center",
                color=colour("muted"),
            )  # fmt: skip
    over.grid(axis="y", visible=False)
    in_percent(over.xaxis)
    return figure


def _methods_words(sweep: SweepReport) -> str:
    means, names = methods_frame(sweep), _kinds(sweep)
    conditions = [name for name in sweep.conditions if name in sweep.varying]
    parts = []
    groups = means.groupby(conditions, sort=False, dropna=False) if conditions else [((), means)]
    for _, rows in groups:
        row = rows.loc[rows["mean"].idxmax()]
        under = f"at {_label({name: row[name] for name in conditions})} " if conditions else ""
        spread = "" if math.isnan(row["sd"]) else f" ± {100 * row['sd']:.1f}"
        parts.append(
            f"{under}{_label({name: row[name] for name in names})} is ahead with {100 * row['mean']:.1f}{spread} %"
        )
    return f"Final test accuracy: {'; '.join(parts)}. Ticks are seeds, bars one standard deviation."


# --- omega -----------------------------------------------------------------------------------------------------------


def ladder_frame(sweep: SweepReport) -> pd.DataFrame:
    """Return accuracy by omega and series: the methods where they vary, else the roles of one method."""
    if OMEGA not in sweep.varying:
        raise NotAvailable("omega does not vary")
    frame, kinds = _done(sweep), _kinds(sweep)
    if kinds:
        series = _labelled(frame, kinds)
        means = _spread(frame.assign(series=series), ["series", OMEGA], "accuracy_final")
    else:
        means = pd.concat(
            [
                _spread(frame.assign(series=role), ["series", OMEGA], f"accuracy_{role}")
                for role in ROLES if frame[f"accuracy_{role}"].notna().any()
            ],
            ignore_index=True,
        )  # fmt: skip
    return means.sort_values(OMEGA, kind="stable", ignore_index=True)


@styled
def ladder(sweep: SweepReport) -> Figure:
    """Draw accuracy against omega."""
    means, (figure, over) = ladder_frame(sweep), axes(height=3.1)
    order = [role for role in ROLES if role in set(means["series"])] or list(dict.fromkeys(means["series"]))
    ends = []
    for number, series in enumerate(order[:MOST_SERIES]):
        rows = means[means["series"] == series].dropna(subset=["mean"])
        look = ROLE_LOOKS.get(series, SERIES[number])
        _bars(over, rows, rows[OMEGA], look, True)
        ends.append((rows[OMEGA].iloc[-1], rows["mean"].iloc[-1], series, look[0]))
    over.set_xscale("log")
    log_ticks(over.xaxis, means[OMEGA])
    over.set(xlabel="omega (small is skewed)", ylabel="test accuracy")
    in_percent(over.yaxis)
    label_ends(over, ends)
    return figure


def _ladder_words(sweep: SweepReport) -> str:
    means = ladder_frame(sweep)
    low, high = means[OMEGA].min(), means[OMEGA].max()
    parts = []
    for series in dict.fromkeys(means["series"]):
        by_omega = means[means["series"] == series].set_index(OMEGA)["mean"]
        if {low, high} <= set(by_omega.index) and series != "initial":
            parts.append(f"{series} from {percent(by_omega[low])} to {percent(by_omega[high])}")
    return (
        f"From omega {low:g} to {high:g}, mean test accuracy goes: {', '.join(parts)}. Bars are one standard deviation."
    )


# --- single knobs ----------------------------------------------------------------------------------------------------


def _series_of(sweep: SweepReport, knob: str) -> list[str]:
    """Return the knobs by which the lines of a response plot differ: varying conditions, and methods."""
    return [name for name in (*sweep.conditions, *_kinds(sweep)) if name in sweep.varying and name != knob]


def response_frame(sweep: SweepReport, knob: str) -> pd.DataFrame:
    """Return final accuracy by condition and value of ``knob``, over seeds and all other knobs."""
    frame, by = _done(sweep), _series_of(sweep, knob)
    if frame[knob].nunique() < 2:
        raise NotAvailable(f"{knob} has taken one value so far")
    means = _spread(frame.assign(series=_labelled(frame, by) if by else "all"), ["series", knob], "accuracy_final")
    return means.sort_values(["series", knob], kind="stable", ignore_index=True)


@styled
def response(sweep: SweepReport, knob: str) -> Figure:
    """Draw final accuracy against one knob, with the spread over seeds and other knobs."""
    means, (figure, over) = response_frame(sweep, knob), axes(height=HEIGHT)
    frame, by = _done(sweep), _series_of(sweep, knob)
    names = list(dict.fromkeys(means["series"]))[:MOST_SERIES]
    trials = _labelled(frame, by) if by else pd.Series("all", frame.index)
    values = sorted(set(means[knob]))
    ends = []
    for name, look in zip(names, SERIES, strict=False):
        own, rows = frame[trials == name], means[means["series"] == name]
        over.plot(own[knob], own["accuracy_final"], look[1], color=colour(look[0]), ms=4, alpha=0.45, mew=0)
        _bars(over, rows, rows[knob], look, len(values) <= MOST_VALUES, name)
        if len(values) <= MOST_VALUES:
            ends.append((rows[knob].iloc[-1], rows["mean"].iloc[-1], name, look[0]))
    if _log(values):
        over.set_xscale("log")
    if len(values) <= MOST_VALUES:
        log_ticks(over.xaxis, values)
    over.set(xlabel=knob, ylabel="test accuracy, final")
    in_percent(over.yaxis)
    if len(names) > 1 and ends:
        label_ends(over, ends)
    elif len(names) > 1:
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _response_words(sweep: SweepReport, knob: str) -> str:
    means = response_frame(sweep, knob)
    parts = []
    for name in dict.fromkeys(means["series"]):
        rows = means[means["series"] == name]
        best, worst = rows.loc[rows["mean"].idxmax()], rows.loc[rows["mean"].idxmin()]
        where = "" if name == "all" else f"at {name} "
        parts.append(
            f"{where}best at {shown(best[knob])} ({percent(best['mean'])}), worst at {shown(worst[knob])} "
            f"({percent(worst['mean'])})"
        )
    return f"Mean final accuracy by {knob}: {'; '.join(parts)}. Small marks are trials, bars one standard deviation."


# --- all knobs at once -----------------------------------------------------------------------------------------------


def parallel_frame(sweep: SweepReport) -> pd.DataFrame:
    """Return a row per configuration: its varying knobs, and the means over seeds of selection, final and gain."""
    frame, knobs = _done(sweep), list(sweep.varying)
    if not knobs or frame["point"].nunique() < 2:
        raise NotAvailable("fewer than two configurations have ended")
    first = frame.groupby("point")[knobs].first()
    means = frame.groupby("point")[["selection", "accuracy_final", "gain"]].mean()
    return first.join(means)


@styled
def parallel(sweep: SweepReport) -> Figure:
    """Draw every configuration as a line through its knobs to its accuracy; a stronger line is a higher one."""
    frame, knobs = parallel_frame(sweep), list(sweep.varying)
    columns = [*knobs, *(name for name in ("selection", "accuracy_final") if frame[name].notna().all())]
    figure, over = axes(max(WIDTH, 1.3 * len(columns)), 3.4)
    heights = np.stack([_height(over, place, frame[name]) for place, name in enumerate(columns)], axis=1)
    rank = frame["accuracy_final"].rank(pct=True).to_numpy()
    for row in np.argsort(rank, kind="stable"):
        step = 3 + round(rank[row] * (STEPS - 4))
        over.plot(range(len(columns)), heights[row], color=colour(f"h{step}"), lw=1 + 1.2 * rank[row])
    heads = short_names(knobs) | {"selection": "selection", "accuracy_final": "final"}
    over.set(xlim=(-0.25, len(columns) - 0.45), ylim=(-0.08, 1.06))
    over.set_xticks(range(len(columns)), [heads[name] for name in columns])
    over.xaxis.tick_top()
    over.tick_params(axis="x", length=0, labelcolor=colour("ink"))
    over.set_yticks([])
    over.grid(axis="y", visible=False)
    over.spines[:].set_visible(False)
    return figure


def _height(over: Axes, place: int, values: pd.Series) -> np.ndarray:
    """Label the axis at ``place``, and return where the lines cross it, in [0, 1]."""
    if values.name in KNOBS and KNOBS[values.name].type not in (int, float):
        names = sorted(set(values.map(shown)))
        at = {name: (number + 0.5) / len(names) for number, name in enumerate(names)}
        height = values.map(shown).map(at).to_numpy()
        ticks = {at[name]: name for name in names}
    else:
        raw = values.to_numpy(dtype=float)
        scaled = np.log(raw) if values.name in KNOBS and _log(raw) else raw
        low, span = scaled.min(), np.ptp(scaled) or 1.0
        height = (scaled - low) / span
        say = shown if values.name in KNOBS else percent
        few = len(set(raw)) <= 5 and values.name in KNOBS
        ticks = {h: say(value) for h, value in zip(height, raw, strict=True) if few or value in (raw.min(), raw.max())}
    for at_height, text in ticks.items():
        over.annotate(
            text, (place, at_height), xytext=(4, 0), textcoords="offset points", va="center", size=8.5, zorder=4,
            bbox={"boxstyle": "square,pad=0.1", "fc": colour("paper"), "ec": "none"},
        )  # fmt: skip
    return height


def _parallel_words(sweep: SweepReport) -> str:
    frame = parallel_frame(sweep)
    best = frame.loc[frame["accuracy_final"].idxmax()]
    knobs = ", ".join(f"{name} = {shown(best[name])}" for name in sweep.varying)
    return (
        f"{counted(len(frame), 'configuration')}; final test accuracy from {percent(frame['accuracy_final'].min())} to "
        f"{percent(frame['accuracy_final'].max())}, the highest with {knobs}. Stronger and thicker is higher; "
        "configurations are chosen by selection, never by this."
    )


def figures_of(sweep: SweepReport) -> dict[str, list[ReportFigure]]:
    """Return the figures by section, with a response plot for each varying number (the ladder for omega)."""
    knobs = [name for name in numeric(sweep) if name != OMEGA]
    return {
        "Comparison": [
            ReportFigure("methods", "By method", methods, methods_frame, _methods_words),
            ReportFigure("ladder", "Accuracy against omega", ladder, ladder_frame, _ladder_words),
            *(
                ReportFigure(
                    f"response_{number}", f"Response to {knob}", partial(response, knob=knob),
                    partial(response_frame, knob=knob), partial(_response_words, knob=knob),
                )
                for number, knob in enumerate(knobs)
            ),
            ReportFigure("parallel", "All configurations", parallel, parallel_frame, _parallel_words, wide=True),
        ],
        "Cost": [ReportFigure("sharing", "Stages that trials shared", sharing, sharing_frame, _sharing_words)],
    }  # fmt: skip


#: By name, for ``api.Sweep.plot``; ``response`` takes ``knob=``.
PLOTS: Mapping[str, Callable[..., Figure]] = {
    "methods": methods, "ladder": ladder, "response": response, "parallel": parallel, "sharing": sharing,
}  # fmt: skip
