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
from matplotlib.ticker import FixedLocator, NullFormatter

from ...config.fields import short_names, shown
from ...config.resolve import KNOBS
from ...core.types import ROLES
from ..comparison import OMEGA, Comparison
from ..load import NotAvailable, SweepReport
from ..sweep_table import SHARED, shared_stages
from ..text import counted, duration, listed, percent
from .base import Drawing, ReportFigure
from .style import OUTLINE, ROLE_LOOKS, SERIES, STEPS, WIDTH, axes, bar_axes, colour, in_percent, label_bars, label_ends

#: With more values than this no line joins them; more series share a colour.
MOST_VALUES, MOST_SERIES = 8, len(SERIES)


def numeric(sweep: SweepReport) -> tuple[str, ...]:
    """Return the knobs that vary and are numbers."""
    return tuple(name for name in sweep.varying if KNOBS[name].kind in (int, float))


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
    """Return whether an axis of ``values`` is logarithmic: the largest is 20 times the smallest or more."""
    low, high = min(values), max(values)
    return low > 0 and high / low >= 20


def _log_ticks(axis: Any, values: Any) -> None:
    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(FixedLocator([]))


def _bars(over: Axes, means: pd.DataFrame, x: Any, look: tuple[str, str], line: bool, name: str = "") -> None:
    tint, marker = look
    over.errorbar(
        x, means["mean"], means["sd"].fillna(0), color=colour(tint), marker=marker, ms=6, lw=1.8 if line else 0,
        elinewidth=1.4, capsize=3, label=name,
    )  # fmt: skip


@partial(ReportFigure, "methods", "By method")
def methods(sweep: SweepReport) -> Drawing:
    """Draw each method's final accuracy under each condition: every seed, the mean, one standard deviation.

    The table has the gain over the control, too. Other names and switches compare as methods do.
    """
    names, frame = _kinds(sweep), _done(sweep)
    if not names:
        raise NotAvailable("one method throughout")
    if others := [name for name in numeric(sweep) if name not in sweep.conditions]:
        raise NotAvailable(f"configurations differ in {listed(others)} too, so that methods alone do not compare")
    conditions = [name for name in sweep.conditions if name in sweep.varying]
    means = _spread(frame, by := [*conditions, *names], "accuracy_final")
    means["gain over control"] = frame.groupby(by, sort=False, dropna=False)["gain"].mean().to_numpy()
    labels = _labelled(means, names)
    tints = {label: SERIES[number % MOST_SERIES] for number, label in enumerate(dict.fromkeys(labels))}
    groups = list(means.groupby(conditions, sort=False, dropna=False)) if conditions else [((), means)]
    gaps = np.concatenate([np.full(len(rows), 0.9 * number) for number, (_, rows) in enumerate(groups)])
    places = np.arange(len(means)) + gaps
    figure, over = axes(WIDTH, 0.75 + 0.31 * (places[-1] + 1))
    for place, label, row in zip(places, labels, means.to_dict("records"), strict=True):
        same = np.all([frame[name] == row[name] for name in by], axis=0)
        tint, marker = tints[label]
        seeds = frame.loc[same, "accuracy_final"]
        over.plot(seeds, [place] * len(seeds), "|", color=colour(tint), ms=9, alpha=0.6)
        over.errorbar(
            row["mean"], place, xerr=0 if math.isnan(row["sd"]) else row["sd"], color=colour(tint), marker=marker,
            ms=7, elinewidth=1.6, capsize=3,
        )  # fmt: skip
    over.set_yticks(places, labels)
    over.tick_params(axis="y", labelcolor=colour("ink"), length=0)
    over.set(ylim=(places[-1] + 0.6, -1.0 if conditions else -0.6), xlabel="test accuracy, final model")
    over.grid(axis="y", visible=False)
    in_percent(over.xaxis)
    parts = []
    for _, rows in groups:
        under = _label({name: rows.iloc[0][name] for name in conditions})
        if conditions:
            over.annotate(
                under, (0, places[rows.index[0]] - 0.62), xycoords=("axes fraction", "data"), size=9, va="center",
                color=colour("muted"),
            )  # fmt: skip
        best = rows["mean"].idxmax()
        mean, sd = 100 * rows.loc[best, ["mean", "sd"]]
        spread = "" if math.isnan(sd) else f" ± {sd:.1f}"
        parts.append(f"{f'at {under} ' if under else ''}{labels[best]} is ahead with {mean:.1f}{spread} %")
    words = f"Final test accuracy: {'; '.join(parts)}. Ticks are seeds, bars one standard deviation."
    return Drawing(figure, means, words)


@partial(ReportFigure, "comparison", "Methods side by side", wide=True)
def compared(sweep: SweepReport) -> Drawing:
    """Draw ``bars`` of a `mosaic compare`."""
    if sweep.comparison is None or not len(sweep.done):
        raise NotAvailable("no methods of a comparison have ended")
    return bars(sweep.comparison)


def bars(table: Comparison) -> Drawing:
    """Draw every method's mean final accuracy as a bar, one standard deviation as its error; a group for each omega."""
    names = list(dict.fromkeys(method.name for methods in table.sections.values() for method in methods))
    step, frame = 0.8 / len(names), []
    figure, over = axes(max(WIDTH, 0.8 + 0.28 * len(names) * len(table.sections)), 3.2 + 0.1 * len(names))
    for place, (omega, methods) in enumerate(table.sections.items()):
        for method in methods:
            number = names.index(method.name)
            frame.append({"omega": omega, "method": method.name, "mean": method.mean, "sd": method.sd})
            x = place + (number - (len(names) - 1) / 2) * step
            over.bar(
                x, method.mean or 0.0, step, color=colour(SERIES[number % MOST_SERIES][0]), ec=colour("paper"),
                hatch="///" if number >= MOST_SERIES else None, label=None if place else method.name,
            )  # fmt: skip
            if method.mean is not None and method.sd is not None:
                over.errorbar(x, method.mean, method.sd, color=colour("ink"), capsize=2, elinewidth=1.2)
    groups = [f"omega {shown(omega)}" if omega is not None else "" for omega in table.sections]
    over.set_xticks(range(len(groups)), groups)
    over.tick_params(axis="x", length=0)
    over.set(ylabel="test accuracy, final model")
    over.grid(axis="x", visible=False)
    in_percent(over.yaxis)
    figure.legend(loc="outside upper center", ncols=3)
    return Drawing(figure, pd.DataFrame(frame), "Mean final test accuracy; bars' errors are one standard deviation.")


@partial(ReportFigure, "ladder", "Accuracy against omega")
def ladder(sweep: SweepReport) -> Drawing:
    """Draw accuracy against omega: a line for each method where they vary, else for each role of one method."""
    if OMEGA not in sweep.varying:
        raise NotAvailable("omega does not vary")
    frame, by = _done(sweep), ["series", OMEGA]
    if kinds := _kinds(sweep):
        means = _spread(frame.assign(series=_labelled(frame, kinds)), by, "accuracy_final")
    else:
        roles = [role for role in ROLES if frame[f"accuracy_{role}"].notna().any()]
        means = pd.concat([_spread(frame.assign(series=role), by, f"accuracy_{role}") for role in roles])
    means = means.sort_values(OMEGA, kind="stable", ignore_index=True)
    figure, over = axes(height=3.1)
    low, high = means[OMEGA].min(), means[OMEGA].max()
    order = [role for role in ROLES if role in set(means["series"])] or list(dict.fromkeys(means["series"]))
    ends = []
    for number, series in enumerate(order[:MOST_SERIES]):
        rows = means[means["series"] == series].dropna(subset=["mean"])
        look = ROLE_LOOKS.get(series, SERIES[number])
        _bars(over, rows, rows[OMEGA], look, True)
        ends.append((rows[OMEGA].iloc[-1], rows["mean"].iloc[-1], series, look[0]))
    over.set_xscale("log")
    _log_ticks(over.xaxis, means[OMEGA])
    over.set(xlabel="omega (small is skewed)", ylabel="test accuracy")
    in_percent(over.yaxis)
    label_ends(over, ends)
    parts = []
    for series in dict.fromkeys(means["series"]):
        by_omega = means[means["series"] == series].set_index(OMEGA)["mean"]
        if {low, high} <= set(by_omega.index) and series != "initial":
            parts.append(f"{series} from {percent(by_omega[low])} to {percent(by_omega[high])}")
    where = f"From omega {low:g} to {high:g}, mean test accuracy goes"
    return Drawing(figure, means, f"{where}: {', '.join(parts)}. Bars are one standard deviation.")


def response(sweep: SweepReport, knob: str) -> Drawing:
    """Draw final accuracy against one knob, by condition and method, with the spread over seeds and other knobs."""
    frame, by = _done(sweep), [name for name in (*sweep.conditions, *_kinds(sweep)) if name in sweep.varying]
    if frame[knob].nunique() < 2:
        raise NotAvailable(f"{knob} has taken one value so far")
    by = [name for name in by if name != knob]
    frame = frame.assign(series=_labelled(frame, by) if by else "all")
    means = _spread(frame, ["series", knob], "accuracy_final")
    means = means.sort_values(["series", knob], kind="stable", ignore_index=True)
    figure, over = axes()
    names, values = list(dict.fromkeys(means["series"])), sorted(set(means[knob]))
    few = len(values) <= MOST_VALUES
    ends, parts = [], []
    for number, name in enumerate(names):
        own, rows = frame[frame["series"] == name], means[means["series"] == name]
        if number < MOST_SERIES:
            tint, marker = look = SERIES[number]
            over.plot(own[knob], own["accuracy_final"], marker, color=colour(tint), ms=4, alpha=0.45, mew=0)
            _bars(over, rows, rows[knob], look, few, name)
            ends.append((rows[knob].iloc[-1], rows["mean"].iloc[-1], name, tint))
        best, worst = (
            f"at {shown(row[knob])} ({percent(row['mean'])})"
            for row in (rows.loc[rows["mean"].idxmax()], rows.loc[rows["mean"].idxmin()])
        )
        parts.append(f"{'' if name == 'all' else f'at {name} '}best {best}, worst {worst}")
    if _log(values):
        over.set_xscale("log")
    if few:
        _log_ticks(over.xaxis, values)
    over.set(xlabel=knob, ylabel="test accuracy, final")
    in_percent(over.yaxis)
    if len(names) > 1 and few:
        label_ends(over, ends)
    elif len(names) > 1:
        figure.legend(loc="outside upper center", ncols=2)
    words = f"Mean final accuracy by {knob}: {'; '.join(parts)}. Small marks are trials, bars one standard deviation."
    return Drawing(figure, means, words)


@partial(ReportFigure, "parallel", "All configurations", wide=True)
def parallel(sweep: SweepReport) -> Drawing:
    """Draw every configuration as a line through its knobs to its accuracy; a stronger line is a higher one."""
    trials, knobs = _done(sweep), list(sweep.varying)
    if not knobs or trials["point"].nunique() < 2:
        raise NotAvailable("fewer than two configurations have ended")
    points = trials.groupby("point")
    frame = points[knobs].first().join(points[["selection", "accuracy_final", "gain"]].mean())
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
    final = frame["accuracy_final"]
    best = ", ".join(f"{name} = {shown(frame.loc[final.idxmax(), name])}" for name in knobs)
    words = (
        f"{counted(len(frame), 'configuration')}; final test accuracy from {percent(final.min())} to "
        f"{percent(final.max())}, the highest with {best}. Stronger and thicker is higher; "
        "configurations are chosen by selection, never by this."
    )
    return Drawing(figure, frame, words)


def _height(over: Axes, place: int, values: pd.Series) -> np.ndarray:
    """Label the axis at ``place``, and return where the lines cross it, in [0, 1]."""
    if values.name in KNOBS and KNOBS[values.name].kind not in (int, float):
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


@partial(ReportFigure, "sharing", "Stages that trials shared")
def sharing(sweep: SweepReport) -> Drawing:
    """Draw how many trials computed each stage, and how many found it in the store."""
    if not (rows := shared_stages(sweep.rows)):
        raise NotAvailable("no trial has ended yet")
    frame = pd.DataFrame(rows, columns=SHARED).set_index("stage")
    figure, over = axes(WIDTH, 0.65 + 0.31 * len(frame))
    places, total = np.arange(len(frame)), frame["computed"] + frame["found"]
    over.barh(places, frame["computed"], 0.62, color=colour("s1"), label="computed")
    over.barh(places, frame["found"], 0.62, frame["computed"], **OUTLINE, label="found")
    label_bars(over, total, places, [f"{row.computed} + {row.found}" for row in frame.itertuples()])
    bar_axes(over, list(frame.index), 1.25 * total.max())
    figure.legend(loc="outside upper center", ncols=2)
    words = (
        f"Of {total.sum():,} stages that trials asked for {frame['found'].sum():,} were found: "
        f"{duration(frame['seconds spent'].sum())} were spent, {duration(frame['seconds saved'].sum())} saved."
    )
    return Drawing(figure, frame, words)


def figures_of(sweep: SweepReport) -> dict[str, list[ReportFigure]]:
    """Return the figures by section, with a response plot for each varying number (the ladder for omega)."""
    responses = [
        ReportFigure(f"response_{number}", f"Response to {knob}", partial(response, knob=knob))
        for number, knob in enumerate(name for name in numeric(sweep) if name != OMEGA)
    ]
    side_by_side = [compared] if sweep.comparison else []
    return {"Comparison": [*side_by_side, methods, ladder, *responses, parallel], "Cost": [sharing]}


#: By name, for ``api.Sweep.plot``; ``response`` takes ``knob=``.
PLOTS: Mapping[str, Callable[..., Figure]] = {
    "comparison": compared.plot, "methods": methods.plot,
    "ladder": ladder.plot, "response": ReportFigure("response", "", response).plot,
    "parallel": parallel.plot, "sharing": sharing.plot,
}  # fmt: skip
