"""Draw a run's figures: ``load_run(path).plot("rounds")``."""

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
from .base import Drawing, ReportFigure
from .heatmap import MOST_COLUMNS, heat_map
from .style import ROLE_LOOKS, WIDTH, axes, beside, colour, in_percent, label_ends


@partial(ReportFigure, "stages", "Accuracy by stage")
def stages(run: RunReport) -> Drawing:
    """Draw the test accuracy of each model."""
    reached = {role: value for role in ROLES if (value := run.accuracy(role)) is not None}
    if not reached:
        raise NotAvailable("the run ended before anything was evaluated")
    calibration = run.summary.calibration or {}
    frame = pd.DataFrame({"model": list(reached), "test accuracy": list(reached.values())})
    for name, head in (("nll", "NLL"), ("ece", "calibration error")):
        frame[head] = [(calibration.get(role) or {}).get(name, np.nan) for role in reached]
    figure, over = axes(WIDTH, 0.5 + 0.42 * len(frame))
    low, high = max(0.0, min(reached.values()) - 0.12), max(reached.values())
    if "control" in reached:  # gains are over the control
        over.axvline(reached["control"], color=colour(ROLE_LOOKS["control"][0]), lw=1, ls=(0, (3, 3)))
    for row, (role, value) in enumerate(reached.items()):
        tint, marker = ROLE_LOOKS[role]
        over.plot(value, row, marker, color=colour(tint), ms=8)
        box = {"boxstyle": "square,pad=0.1", "fc": colour("paper"), "ec": "none"}
        beside(over, percent(value), (value, row), 9, bbox=box)
    over.set(xlim=(low, high + 0.2 * (high - low)), ylim=(len(frame) - 0.5, -0.5))
    over.set_yticks(range(len(frame)), frame["model"])
    over.tick_params(axis="y", labelcolor=colour("ink"), labelsize=10, length=0)
    over.spines["left"].set_visible(False)
    in_percent(over.xaxis)
    text = ", ".join(f"{role} {percent(value)}" for role, value in reached.items())
    dashed = " The dashed line is the control." if "control" in reached else ""
    return Drawing(figure, frame, f"Test accuracy: {text}.{dashed}")


def rounds_frame(run: RunReport, begun: int) -> pd.DataFrame:
    """Return [line, round, test accuracy]: ``begun`` warm-up rounds, then the closing ones of student and control."""
    warmup = run.curve("warmup/accuracy")
    initial, distilled = run.accuracy("initial"), run.accuracy("distilled")
    rows = [("warm-up", step, value) for step, value in warmup.items()]
    if initial is not None and begun not in warmup.index:
        rows.append(("warm-up", begun, initial))
    for name, tag, start in (("final", "finetune", distilled), ("control", "control", initial)):
        start, curve = initial if start is None else start, run.curve(f"{tag}/accuracy")
        line = ({0: start} if start is not None else {}) | dict(curve.items())
        if (reached := run.accuracy(name)) is not None and curve.empty:
            line[_whole(run.knob("finetune.num_rounds"), 1)] = reached
        rows += [(name, begun + step, value) for step, value in line.items()] if len(line) > 1 else []
    if not rows:
        raise NotAvailable("no accuracy was measured between rounds (runtime.eval_rounds)")
    return pd.DataFrame(rows, columns=["line", "round", "test accuracy"])


def _whole(number: object, otherwise: int) -> int:
    return number if isinstance(number, int) else otherwise


@partial(ReportFigure, "rounds", "Accuracy over rounds")
def rounds(run: RunReport) -> Drawing:
    """Draw test accuracy over the federated rounds; a vertical line marks the distillation between them."""
    begun = _whole(run.knob("warmup.num_rounds"), int(max(run.curve("warmup/accuracy").index, default=0)))
    frame, (figure, over) = rounds_frame(run, begun), axes()
    teacher, distilled = run.accuracy("teacher"), run.accuracy("distilled")
    before = "initial" if distilled is None else "distilled"
    names = {"final": f"closing rounds take the {before} model", "control": "the control"}
    ends, parts = [], []
    for line, rows in frame.groupby("line", sort=False):
        tint, marker = ROLE_LOOKS["initial" if line == "warm-up" else line]
        values, few = rows["test accuracy"], len(rows) <= 40
        over.plot(rows["round"], values, color=colour(tint), marker=marker if few else None, ms=4)
        first, last = percent(values.iloc[0]), percent(values.iloc[-1])
        if line != "warm-up" or len(set(frame["line"])) == 1:
            ends.append((rows["round"].iloc[-1], values.iloc[-1], f"{line} {last}", tint))
        parts.append(f"The warm-up ends at {last}" if line == "warm-up" else f"{names[line]} from {first} to {last}")
    over.set_xlim(min(frame["round"]) - 0.3, max(max(frame["round"]), begun) + 0.3)
    if teacher is not None:
        tint, marker = ROLE_LOOKS["teacher"]
        over.plot(begun, teacher, marker, color=colour(tint), ms=8, zorder=3)
        beside(over, f"teacher {percent(teacher)}", (begun, teacher), -9, ha="right", size=9, color=colour(tint))
    if distilled is not None:
        over.axvline(begun, color=colour("muted"), lw=1, ls=(0, (3, 3)))
    over.set(xlabel="federated round", ylim=(0, 1.03))
    over.locator_params(axis="x", integer=True)
    in_percent(over.yaxis)
    label_ends(over, ends)
    between = " The dashed line is the distillation." if distilled is not None else ""
    return Drawing(figure, frame, f"{', '.join(parts)}.{between}")


@partial(ReportFigure, "per_class", "Accuracy by class")
def per_class(run: RunReport) -> Drawing:
    """Draw accuracy by class for initial model, teacher and final model; many classes as sorted curves."""
    found = run.summary.per_class_accuracy or {}
    shown = {role: found[role] for role in ("initial", "teacher", "final") if found.get(role)}
    if not shown or len({len(values) for values in shown.values()}) > 1:
        raise NotAvailable("the run ended before anything was evaluated by class")
    frame = pd.DataFrame(shown, dtype=float).rename_axis("class")  # NaN for a class without test images
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
        in_percent(over.yaxis)
    else:
        over.set(ylabel="class", xlim=(0, 1.0), ylim=(len(frame) - 0.5, -0.5))
        over.set_yticks(range(len(frame)), [run.class_label(c) for c in frame.index])
    in_percent(over.xaxis)
    figure.legend(loc="outside upper center", ncols=3, handletextpad=0.3, columnspacing=1.2)
    frame = frame.rename(index=run.class_labels)
    if not {"initial", "final"} <= set(frame):
        return Drawing(figure, frame, f"Accuracy of each of the {counted(len(frame), 'class', 'classes')}.")
    change = (frame["final"] - frame["initial"]).dropna()
    better, worse = change[change > 0.05], change[change < -0.05]
    parts = []
    for which, moved, pick in (("gain", better, change.idxmax), ("lose", worse, change.idxmin)):
        if len(moved):
            c = pick()
            most = f"class {c} from {percent(frame['initial'][c])} to {percent(frame['final'][c])}"
            some = f"{counted(len(moved), 'class', 'classes')} {which}{'s' if len(moved) == 1 else ''}"
            parts.append(f"{some} more than 5 points (most: {most})")
    parts = parts or ["no class moves by more than 5 points"]
    of = counted(len(change), "class", "classes")
    return Drawing(figure, frame, f"From the initial to the final model, of {of}: {'; '.join(parts)}.")


def confusion(run: RunReport, role: str = "final") -> Drawing:
    """Draw the confusion table of a role's model: rows are true classes, the colour is the share of the row."""
    table = run.confusion(role)
    count, many = len(table), len(table) > MOST_COLUMNS
    side = 4.9 if many else 0.95 + 0.36 * count
    figure, over = axes(side, side - 0.35)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    heat_map(over, shares, None if many else table, "true class", "predicted class")
    wrong = np.where(np.eye(count, dtype=bool), 0, table)
    order = np.argsort(-wrong, axis=None, kind="stable")
    mistakes = [(int(i) // count, int(i) % count, wrong.flat[i]) for i in order if wrong.flat[i] > 0]
    frame = pd.DataFrame(table).rename(index=run.class_labels, columns=run.class_labels).rename_axis("true class")
    if many:
        named = [(run.class_label(t), run.class_label(p), images) for t, p, images in mistakes[:MOST_COLUMNS]]
        frame = pd.DataFrame(named, columns=["true class", "taken for", "images"])
    elif run.class_names:
        over.set_yticks(range(count), [run.class_label(c) for c in range(count)])
    words = f"The {role} model is right on {int(np.trace(table)):,} of {counted(int(table.sum()), 'test image')}"
    if mistakes:
        t, p, images = mistakes[0]
        taken = f"class {run.class_label(t)} for {run.class_label(p)}"
        words += f"; most often it takes {taken} ({images:,} of {table[t].sum():,})"
    return Drawing(figure, frame, f"{words}.")


@partial(ReportFigure, "distillation", "Distillation")
def distillation(run: RunReport) -> Drawing:
    """Draw by step the accuracy on held-out prototypes, and the agreement with the teacher on synthetic images."""
    curves = {"held-out prototypes": "student/held_out_accuracy", "agreement with the teacher": "student/agreement"}
    found = {label: curve for label, tag in curves.items() if not (curve := run.curve(tag)).empty}
    if not found:
        raise NotAvailable("this run has no distillation on synthetic images")
    frame = pd.DataFrame({label: c[~c.index.duplicated(keep="last")] for label, c in found.items()}).rename_axis("step")
    figure, over = axes(height=2.9)
    low = float(np.nanmin(frame.to_numpy()))
    for (label, curve), (tint, marker) in zip(frame.items(), (("s1", "o"), ("s3", "D")), strict=False):
        few = len(curve) <= 40
        over.plot(curve.index, curve, color=colour(tint), marker=marker if few else None, ms=4, label=label)
    over.set(xlabel="distillation step", ylim=(max(0, low - 0.1), 1.01))
    in_percent(over.yaxis)
    figure.legend(loc="outside upper center", ncols=2, handletextpad=0.4, columnspacing=1.2)
    parts = [f"{label} from {percent(c.iloc[0])} to {percent(c.iloc[-1])}" for label, c in frame.items()]
    words = f"During distillation, {' and '.join(parts)}, steps {frame.index[0]} to {frame.index[-1]}."
    return Drawing(figure, frame, words)


FIGURES: dict[str, list[ReportFigure]] = {
    "Accuracy": [stages, rounds, per_class],
    "Confusion": [
        ReportFigure(f"confusion_{role}", f"{role.capitalize()} model", partial(confusion, role=role), wide=True)
        for role in ("initial", "teacher", "final")
    ],
    "Data and generators": [data.partition, data.coverage],
    "Teacher and distillation": [teacher.synthetic_classes, teacher.expert_weights, teacher.meta_gates, distillation],
    "Cost": [cost.time, cost.communication, cost.baselines],
}

#: By name, for ``api.Run.plot``.
PLOTS: Mapping[str, Callable[..., Figure]] = {
    **{figure.name: figure.plot for section in FIGURES.values() for figure in section},
    "samples": data.samples, "progress": data.progress,
}  # fmt: skip
