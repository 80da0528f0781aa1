"""Draw a run's figures: ``load_run(path).plot("rounds")``. Each function takes the run and returns a figure.

Beside each figure stand the frame that it shows and a sentence about it; the page has all three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...core.types import ROLES
from ..load import NotAvailable, RunReport
from ..text import counted, percent
from . import cost, data, teacher
from .base import ReportFigure
from .heatmap import MOST_COLUMNS, heat_map
from .style import ROLE_LOOKS, WIDTH, axes, colour, in_percent, label_ends, styled

#: Least change of a class's accuracy, in [0, 1], that the text mentions.
NOTABLE = 0.05


# --- accuracy --------------------------------------------------------------------------------------------------------


def stages_frame(run: RunReport) -> pd.DataFrame:
    """Return test accuracy by role."""
    reached = {role: run.accuracy(role) for role in ROLES if run.accuracy(role) is not None}
    if not reached:
        raise NotAvailable("the run ended before anything was evaluated")
    calibration = run.summary.calibration or {}
    frame = pd.DataFrame({"model": list(reached), "test accuracy": list(reached.values())})
    for name, head in (("nll", "NLL"), ("ece", "calibration error")):
        frame[head] = [(calibration.get(role) or {}).get(name, np.nan) for role in reached]
    return frame


@styled
def stages(run: RunReport) -> Figure:
    """Draw the test accuracy of each model."""
    frame = stages_frame(run)
    figure, over = axes(WIDTH, 0.5 + 0.42 * len(frame))
    reached = frame["test accuracy"].to_numpy()
    low = max(0.0, min(reached) - 0.12)
    if run.accuracy("control") is not None:  # gains are over the control
        over.axvline(run.accuracy("control"), color=colour(ROLE_LOOKS["control"][0]), lw=1, ls=(0, (3, 3)))
    for row, (role, value) in enumerate(zip(frame["model"], reached, strict=True)):
        tint, marker = ROLE_LOOKS[role]
        over.plot(value, row, marker, color=colour(tint), ms=8)
        over.annotate(
            percent(value), (value, row), xytext=(9, 0), textcoords="offset points", va="center",
            bbox={"boxstyle": "square,pad=0.1", "fc": colour("paper"), "ec": "none"},
        )  # fmt: skip
    over.set(xlim=(low, max(reached) + 0.2 * (max(reached) - low)), ylim=(len(frame) - 0.5, -0.5))
    over.set_yticks(range(len(frame)), frame["model"])
    over.tick_params(axis="y", labelcolor=colour("ink"), labelsize=10, length=0)
    over.spines["left"].set_visible(False)
    in_percent(over.xaxis)
    return figure


def _stages_words(run: RunReport) -> str:
    reached = dict(stages_frame(run)[["model", "test accuracy"]].to_numpy())
    text = ", ".join(f"{role} {percent(value)}" for role, value in reached.items())
    return f"Test accuracy: {text}.{' The dashed line is the control.' if 'control' in reached else ''}"


def rounds_frame(run: RunReport) -> pd.DataFrame:
    """Return [line, round, test accuracy] of the warm-up and of the closing rounds of student and control."""
    warmup = run.curve("warmup/accuracy")
    begun = _warmup_rounds(run, warmup)
    rows = [("warm-up", step, value) for step, value in warmup.items()]
    if run.accuracy("initial") is not None and begun not in warmup.index:
        rows.append(("warm-up", begun, run.accuracy("initial")))
    before = run.accuracy("initial") if run.accuracy("distilled") is None else run.accuracy("distilled")
    for name, start in (("final", before), ("control", run.accuracy("initial"))):
        curve = run.curve(f"{'finetune' if name == 'final' else name}/accuracy")
        line = ({0: start} if start is not None else {}) | dict(curve.items())
        if run.accuracy(name) is not None and curve.empty:
            line[_whole(run.knob("finetune.num_rounds"), 1)] = run.accuracy(name)
        rows += [(name, begun + step, value) for step, value in line.items()] if len(line) > 1 else []
    if not rows:
        raise NotAvailable("no accuracy was measured between rounds (runtime.eval_rounds)")
    return pd.DataFrame(rows, columns=["line", "round", "test accuracy"])


def _warmup_rounds(run: RunReport, warmup: pd.Series) -> int:
    return _whole(run.knob("warmup.num_rounds"), int(max(warmup.index, default=0)))


def _whole(number: object, otherwise: int) -> int:
    return number if isinstance(number, int) else otherwise


@styled
def rounds(run: RunReport) -> Figure:
    """Draw test accuracy over the federated rounds; a vertical line marks the distillation between them."""
    frame, (figure, over) = rounds_frame(run), axes()
    looks = {"warm-up": ROLE_LOOKS["initial"], **ROLE_LOOKS}
    ends = []
    for line, rows in frame.groupby("line", sort=False):
        tint, marker = looks[line]
        few = len(rows) <= 40
        over.plot(rows["round"], rows["test accuracy"], color=colour(tint), marker=marker if few else None, ms=4)
        last = rows.iloc[-1]
        if line != "warm-up" or len(set(frame["line"])) == 1:
            ends.append((last["round"], last["test accuracy"], f"{line} {percent(last['test accuracy'])}", tint))
    begun = _warmup_rounds(run, run.curve("warmup/accuracy"))
    over.set_xlim(min(frame["round"]) - 0.3, max(max(frame["round"]), begun) + 0.3)
    if run.accuracy("teacher") is not None:
        tint, marker = ROLE_LOOKS["teacher"]
        over.plot(begun, run.accuracy("teacher"), marker, color=colour(tint), ms=8, zorder=3)
        over.annotate(
            f"teacher {percent(run.accuracy('teacher'))}", (begun, run.accuracy("teacher")), xytext=(-9, 0),
            textcoords="offset points", ha="right", va="center", size=9, color=colour(tint),
        )  # fmt: skip
    if run.accuracy("distilled") is not None:
        over.axvline(begun, color=colour("muted"), lw=1, ls=(0, (3, 3)))
    over.set(xlabel="federated round", ylim=(0, 1.03))
    over.xaxis.get_major_locator().set_params(integer=True)
    in_percent(over.yaxis)
    label_ends(over, ends)
    return figure


def _rounds_words(run: RunReport) -> str:
    frame = rounds_frame(run)
    before = "initial" if run.accuracy("distilled") is None else "distilled"
    names = {
        "warm-up": "The warm-up ends",
        "final": f"closing rounds take the {before} model",
        "control": "the control",
    }
    parts = []
    for line, rows in frame.groupby("line", sort=False):
        first, last = (percent(rows["test accuracy"].iloc[row]) for row in (0, -1))
        parts.append(f"{names[line]} at {last}" if line == "warm-up" else f"{names[line]} from {first} to {last}")
    between = " The dashed line is the distillation." if run.accuracy("distilled") is not None else ""
    return f"{', '.join(parts)}.{between}"


# --- by class --------------------------------------------------------------------------------------------------------


def per_class_frame(run: RunReport) -> pd.DataFrame:
    """Return test accuracy by class and role (NaN for a class without test images)."""
    found = run.summary.per_class_accuracy or {}
    shown = {role: found[role] for role in ("initial", "teacher", "final") if found.get(role)}
    if not shown or len({len(values) for values in shown.values()}) > 1:
        raise NotAvailable("the run ended before anything was evaluated by class")
    frame = pd.DataFrame(shown, dtype=float)
    return frame.rename_axis("class")


@styled
def per_class(run: RunReport) -> Figure:
    """Draw accuracy by class for initial model, teacher and final model; many classes as sorted curves."""
    frame = per_class_frame(run)
    many = len(frame) > MOST_COLUMNS
    figure, over = axes(WIDTH, 3.2 if many else 0.9 + 0.27 * len(frame))
    for number, role in enumerate(frame):
        tint, marker = ROLE_LOOKS[role]
        if many:
            values = np.sort(frame[role].dropna())
            over.plot(np.linspace(0, 1, len(values)), values, color=colour(tint), label=role)
        else:
            face = "none" if role == "initial" else colour(tint)
            rows = frame.index + 0.24 * (number - (frame.shape[1] - 1) / 2)  # apart, so that all are visible
            over.plot(frame[role], rows, marker, color=colour(tint), mfc=face, ms=6, label=role, clip_on=False)
    if many:
        over.set(xlabel="share of classes that do worse", ylim=(0, 1.03))
        in_percent(over.xaxis)
        in_percent(over.yaxis)
    else:
        over.set(ylabel="class", xlim=(0, 1.0), ylim=(len(frame) - 0.5, -0.5))
        over.set_yticks(range(len(frame)))
        in_percent(over.xaxis)
    figure.legend(loc="outside upper center", ncols=3, handletextpad=0.3, columnspacing=1.2)
    return figure


def _per_class_words(run: RunReport) -> str:
    frame = per_class_frame(run)
    if not {"initial", "final"} <= set(frame):
        return f"Accuracy of each of the {counted(len(frame), 'class', 'classes')}."
    change = (frame["final"] - frame["initial"]).dropna()
    better, worse = change[change > NOTABLE], change[change < -NOTABLE]
    parts = []
    for which, moved, pick in (("gain", better, change.idxmax), ("lose", worse, change.idxmin)):
        if len(moved):
            c = pick()
            most = f"class {c} from {percent(frame['initial'][c])} to {percent(frame['final'][c])}"
            parts.append(
                f"{counted(len(moved), 'class', 'classes')} {which}{'s' if len(moved) == 1 else ''} more than "
                f"5 points (most: {most})"
            )
    parts = parts or ["no class moves by more than 5 points"]
    return f"From the initial to the final model, of {counted(len(change), 'class', 'classes')}: {'; '.join(parts)}."


def _confusion_frame(run: RunReport, role: str) -> pd.DataFrame:
    table = run.confusion(role)
    if len(table) > MOST_COLUMNS:
        rows = [(t, p, table[t, p]) for t, p in _mistakes(table)[:MOST_COLUMNS]]
        return pd.DataFrame(rows, columns=["true class", "taken for", "images"])
    return pd.DataFrame(table).rename_axis("true class")


def _mistakes(table: np.ndarray) -> list[tuple[int, int]]:
    wrong = np.where(np.eye(len(table), dtype=bool), 0, table)
    order = np.argsort(-wrong, axis=None, kind="stable")
    return [(int(i) // len(table), int(i) % len(table)) for i in order if wrong.flat[i] > 0]


@styled
def confusion(run: RunReport, role: str = "final") -> Figure:
    """Draw the confusion table of a role's model: rows are true classes, the colour is the share of the row."""
    table = run.confusion(role)
    count = len(table)
    side = 0.95 + 0.36 * count if count <= MOST_COLUMNS else 4.9
    figure, over = axes(side, side - 0.35)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    heat_map(over, shares, table if count <= MOST_COLUMNS else None, "true class", "predicted class")
    return figure


def _confusion_words(run: RunReport, role: str) -> str:
    table = run.confusion(role)
    right = f"The {role} model is right on {int(np.trace(table)):,} of {counted(int(table.sum()), 'test image')}"
    mistakes = _mistakes(table)
    if not mistakes:
        return f"{right}."
    t, p = mistakes[0]
    return f"{right}; most often it takes class {t} for {p} ({table[t, p]:,} of {table[t].sum():,})."


# --- distillation ----------------------------------------------------------------------------------------------------


def distillation_frame(run: RunReport) -> pd.DataFrame:
    """Return by step the accuracy on held-out prototypes, and the agreement with the teacher on synthetic images."""
    curves = {"held-out prototypes": "student/held_out_accuracy", "agreement with the teacher": "student/agreement"}
    found = {label: curve for label, tag in curves.items() if not (curve := run.curve(tag)).empty}
    if not found:
        raise NotAvailable("this run has no distillation on synthetic images")
    return pd.DataFrame({label: c[~c.index.duplicated(keep="last")] for label, c in found.items()}).rename_axis("step")


@styled
def distillation(run: RunReport) -> Figure:
    """Draw the student's curves during distillation."""
    frame, (figure, over) = distillation_frame(run), axes(height=2.9)
    low = float(np.nanmin(frame.to_numpy()))
    for (label, curve), (tint, marker) in zip(frame.items(), (("s1", "o"), ("s3", "D")), strict=False):
        over.plot(
            curve.index, curve, color=colour(tint), marker=marker if len(curve) <= 40 else None, ms=4, label=label
        )
    over.set(xlabel="distillation step", ylim=(max(0, low - 0.1), 1.01))
    in_percent(over.yaxis)
    figure.legend(loc="outside upper center", ncols=2, handletextpad=0.4, columnspacing=1.2)
    return figure


def _distillation_words(run: RunReport) -> str:
    frame = distillation_frame(run)
    parts = [f"{label} from {percent(c.iloc[0])} to {percent(c.iloc[-1])}" for label, c in frame.items()]
    return f"During distillation, {' and '.join(parts)}, steps {frame.index[0]} to {frame.index[-1]}."


FIGURES: dict[str, list[ReportFigure]] = {
    "Accuracy": [
        ReportFigure("stages", "Accuracy by stage", stages, stages_frame, _stages_words),
        ReportFigure("rounds", "Accuracy over rounds", rounds, rounds_frame, _rounds_words),
        ReportFigure("per_class", "Accuracy by class", per_class, per_class_frame, _per_class_words),
    ],
    "Confusion": [
        ReportFigure(
            f"confusion_{role}", f"{role.capitalize()} model", partial(confusion, role=role),
            partial(_confusion_frame, role=role), partial(_confusion_words, role=role), wide=True,
        )
        for role in ("initial", "teacher", "final")
    ],
    "Data and generators": data.FIGURES,
    "Teacher and distillation": [
        *teacher.FIGURES,
        ReportFigure("distillation", "Distillation", distillation, distillation_frame, _distillation_words),
    ],
    "Cost": cost.FIGURES,
}  # fmt: skip

#: By name, for ``api.Run.plot``.
PLOTS: Mapping[str, Callable[..., Figure]] = {
    **{figure.name: figure.draw for section in FIGURES.values() for figure in section},
    "samples": data.samples, "progress": data.progress,
}  # fmt: skip
