"""A run's figures, by name: ``load_run(path).plot("rounds")``. Each takes the run and gives a matplotlib figure.

Beside each stand the frame that it shows and a sentence that says what is to be seen; the page has all three.
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
from .heatmap import MOST_COLUMNS, _numbers
from .style import ROLE_LOOKS, WIDTH, axes, cells, colour, drawn, in_percent, label_ends

#: Points by which a class's accuracy must change to be spoken of.
NOTABLE = 0.05


# --- accuracy --------------------------------------------------------------------------------------------------------


def stages_frame(run: RunReport) -> pd.DataFrame:
    """Test accuracy by role."""
    reached = {role: run.accuracy(role) for role in ROLES if run.accuracy(role) is not None}
    if not reached:
        raise NotAvailable("the run ended before anything was evaluated")
    calibration = run.summary.calibration or {}
    frame = pd.DataFrame({"model": list(reached), "test accuracy": list(reached.values())})
    for name, head in (("nll", "NLL"), ("ece", "calibration error")):
        frame[head] = [(calibration.get(role) or {}).get(name, np.nan) for role in reached]
    return frame


@drawn
def stages(run: RunReport) -> Figure:
    """What each model reaches on test images."""
    frame = stages_frame(run)
    figure, over = axes(WIDTH, 0.5 + 0.42 * len(frame))
    reached = frame["test accuracy"].to_numpy()
    low = max(0.0, min(reached) - 0.12)
    if run.accuracy("control") is not None:  # what gains are quoted against
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
    told = ", ".join(f"{role} {percent(value)}" for role, value in reached.items())
    return f"Test accuracy: {told}.{' The dashed line is the control.' if 'control' in reached else ''}"


def rounds_frame(run: RunReport) -> pd.DataFrame:
    """[line, round, test accuracy]: the warm-up, then the closing rounds of the student and of the control."""
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
        raise NotAvailable("no accuracy was looked at on the way (runtime.eval_rounds)")
    return pd.DataFrame(rows, columns=["line", "round", "test accuracy"])


def _warmup_rounds(run: RunReport, warmup: pd.Series) -> int:
    return _whole(run.knob("warmup.num_rounds"), int(max(warmup.index, default=0)))


def _whole(number: object, otherwise: int) -> int:
    return number if isinstance(number, int) else otherwise


@drawn
def rounds(run: RunReport) -> Figure:
    """Test accuracy over the federated rounds; what lies between warm-up and closing rounds is one vertical line."""
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
    told = []
    for line, rows in frame.groupby("line", sort=False):
        first, last = (percent(rows["test accuracy"].iloc[row]) for row in (0, -1))
        told.append(f"{names[line]} at {last}" if line == "warm-up" else f"{names[line]} from {first} to {last}")
    between = " The dashed line is where the student is taught." if run.accuracy("distilled") is not None else ""
    return f"{', '.join(told)}.{between}"


# --- by class --------------------------------------------------------------------------------------------------------


def per_class_frame(run: RunReport) -> pd.DataFrame:
    """Test accuracy of each class (NaN where the test set has none of it) by role."""
    found = run.summary.per_class_accuracy or {}
    shown = {role: found[role] for role in ("initial", "teacher", "final") if found.get(role)}
    if not shown or len({len(values) for values in shown.values()}) > 1:
        raise NotAvailable("the run ended before anything was evaluated by class")
    frame = pd.DataFrame(shown, dtype=float)
    return frame.rename_axis("class")


@drawn
def per_class(run: RunReport) -> Figure:
    """Accuracy by class from the initial model over the teacher to the final one; of many classes, in sorted order."""
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
            rows = frame.index + 0.24 * (number - (frame.shape[1] - 1) / 2)  # so that none hides another
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
    told = []
    for which, moved, pick in (("gain", better, change.idxmax), ("lose", worse, change.idxmin)):
        if len(moved):
            c = pick()
            most = f"class {c} from {percent(frame['initial'][c])} to {percent(frame['final'][c])}"
            told.append(
                f"{counted(len(moved), 'class', 'classes')} {which}{'s' if len(moved) == 1 else ''} more than "
                f"5 points (most: {most})"
            )
    told = told or ["no class moves by more than 5 points"]
    return f"From the initial to the final model, of {counted(len(change), 'class', 'classes')}: {'; '.join(told)}."


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


@drawn
def confusion(run: RunReport, role: str = "final") -> Figure:
    """Which classes a role's model takes for which: rows are true classes, colour is the share of the row."""
    table = run.confusion(role)
    count = len(table)
    side = 0.95 + 0.36 * count if count <= MOST_COLUMNS else 4.9
    figure, over = axes(side, side - 0.35)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    cells(over, shares, table if count <= MOST_COLUMNS else None)
    over.set(xlabel="predicted class", ylabel="true class")
    over.set_xticks(_numbers(count, MOST_COLUMNS))
    over.set_yticks(_numbers(count, MOST_COLUMNS))
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
    """By step: accuracy on held-out prototypes, and how often student and teacher agree on synthetic images."""
    curves = {"held-out prototypes": "student/held_out_accuracy", "agreement with the teacher": "student/agreement"}
    found = {label: curve for label, tag in curves.items() if not (curve := run.curve(tag)).empty}
    if not found:
        raise NotAvailable("this run has no distillation on synthetic images")
    return pd.DataFrame({label: c[~c.index.duplicated(keep="last")] for label, c in found.items()}).rename_axis("step")


@drawn
def distillation(run: RunReport) -> Figure:
    """The student while it is taught."""
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
    told = [f"{label} from {percent(c.iloc[0])} to {percent(c.iloc[-1])}" for label, c in frame.items()]
    return f"While the student is taught, {' and '.join(told)}, steps {frame.index[0]} to {frame.index[-1]}."


EXHIBITS: dict[str, list[ReportFigure]] = {
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
    "Data and generators": data.EXHIBITS,
    "Teacher and distillation": [
        *teacher.EXHIBITS,
        ReportFigure("distillation", "Distillation", distillation, distillation_frame, _distillation_words),
    ],
    "Cost": cost.EXHIBITS,
}  # fmt: skip

#: By name, for ``RunReport.plot``.
FIGURES: Mapping[str, Callable[..., Figure]] = {
    **{exhibit.name: exhibit.draw for section in EXHIBITS.values() for exhibit in section},
    "samples": data.samples, "progress": data.progress,
}  # fmt: skip
