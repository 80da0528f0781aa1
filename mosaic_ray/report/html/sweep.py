"""Build a sweep's page: best configurations and their spread, failures, and shared stages."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

import tomli_w
from markupsafe import Markup

from ...config.fields import short_names, shown
from ...config.plugins import ALIASES
from ...core.units import size
from ...sweeps.results import Point
from ...sweeps.space import list_spaces
from ...sweeps.state import PlanFile
from ..comparison import OMEGA, Comparison
from ..figures.sweep import figures_of
from ..load import SweepReport
from ..sweep_table import ended, mean_and_sd, measures, shared_stages
from ..tables import CEILING
from ..text import address, counted, duration, listed, percent, points
from .blocks import FILE, Card, Page, Section, Table, Text

#: Most configurations in a table of the best, and most trials in the list of all.
MOST_POINTS, MOST_TRIALS = 20, 500


def sweep_page(sweep: SweepReport, beside: Path) -> Page:
    """Return the page of ``sweep``, which may be unfinished; links are relative to the folder ``beside``."""
    best = sweep.best() if sweep.rows and len(sweep.done) and not sweep.comparison else []
    sections = [methods_of(sweep.comparison) if sweep.comparison else best_of(sweep, best)]
    if failed := [row for row in sweep.rows if row["status"] == "failed"]:
        sections.append(_failures(failed))
    sections += [Section(title).show(figures, sweep) for title, figures in figures_of(sweep).items()]
    sections += [_trials(sweep, beside), _reproduce(sweep)]
    return Page(sweep.name, about(sweep), verdict(sweep, best), _cards(sweep, best), sections, _failure(failed))


def about(sweep: SweepReport) -> str:
    plan, data = sweep.plan, (sweep.plan.base or {}).get("data")
    name = f" on {data['name']}" if isinstance(data, dict) and "name" in data else ""
    seeds = plan.seeds or []
    name += f", schedule {plan.preset}" if plan.preset else ""
    search = f"{plan.search or 'no'} search{f' by optuna {plan.optuna}' if plan.optuna else ''}"
    what = f"space {plan.space}{name}, {search} over {listed(sweep.swept) or 'nothing'}"
    return f"{what}; seed{'s' if len(seeds) != 1 else ''} {listed(seeds)}, scheduler {plan.scheduler or 'fifo'}"


def _mean(point: Point, column: str) -> float | None:
    values = [row[column] for row in point if row[column] is not None]
    return fmean(values) if values else None


def _chosen(best: list[tuple[str, list[str], list[Point]]]) -> list[tuple[str, list[str], Point]]:
    """Return the sections in which a configuration was chosen, with that configuration."""
    return [(title, knobs, section[0]) for title, knobs, section in best if "best by" in title]


def _leaders(table: Comparison) -> str:
    """Return the methods with the highest mean under each condition."""
    parts = []
    for omega, methods in table.sections.items():
        leading = [method for method in methods if method.name in table.best(omega)]
        for method in leading[:1]:
            over = f", {points(fmean(method.differences))} points over {table.against}" if method.differences else ""
            under = f"at omega {shown(omega)} " if omega is not None else ""
            names = listed([method.name for method in leading])
            parts.append(f"{under}the highest mean is that of {names}: {percent(method.mean)} on test images{over}")
    words = "; ".join(parts)
    return f"{words[:1].upper()}{words[1:]}."


def methods_of(table: Comparison) -> Section:
    if not table.seeds:
        return Section("Methods", "Nothing to compare yet.")
    section = Section("Methods", " ".join(table.caption))
    for omega, methods in table.sections.items():
        rows = [table.cells(method) for method in methods]
        for method, row in zip(methods, rows, strict=True):
            row[1] = Markup("<b>{}</b>").format(row[1]) if method.name in table.best(omega) else row[1]
        section.tables.append(Table(table.title(omega) or "Final accuracy and cost", table.heads, rows))
    return section


def verdict(sweep: SweepReport, best: list[tuple[str, list[str], list[Point]]]) -> str:
    if not len(sweep.done):
        return "No trial has ended well yet." if sweep.rows else "No trial has ended yet."
    if sweep.comparison:
        return _leaders(sweep.comparison)
    parts = []
    for title, knobs, point in _chosen(best)[:3]:
        under, short = title.rpartition(", best by")[0], short_names(knobs)
        values = ", ".join(f"{short[name]} = {shown(point[0][name])}" for name in knobs)
        gain = _mean(point, "gain")
        over = f", {points(gain)} points over the control" if gain is not None else ""
        parts.append(
            f"{f'At {under}, ' if under else ''}{values or 'the one configuration'} was chosen, with "
            f"{percent(_mean(point, 'accuracy_final'))} on test images{over}"
        )
    if not parts:
        reached = sweep.done["accuracy_final"].dropna()
        between = f"{percent(reached.min())} to {percent(reached.max())}"
        return f"{counted(len(reached), 'finished trial')} reach {between} on test images."
    return "; ".join([parts[0], *(words[0].lower() + words[1:] for words in parts[1:])]) + "."


def _cards(sweep: SweepReport, best: list[tuple[str, list[str], list[Point]]]) -> list[Card]:
    planned = len(sweep.plan.points or []) * len(sweep.plan.seeds or [])
    of = f" of {planned:,}" if planned > len(sweep.rows) else ""
    seeds = f"{counted(len(sweep.plan.seeds or [0]), 'seed')} each"
    cards = [
        Card("trials", f"{len(sweep.rows):,}{of}", ended(sweep.rows) or "none has ended"),
        Card("configurations", f"{len({row['point'] for row in sweep.rows}):,}", seeds),
    ]
    if chosen := _chosen(best):
        gains = [gain for *_, point in chosen if (gain := _mean(point, "gain")) is not None]
        if gains:
            spread = f"{points(min(gains))} to {points(max(gains))}" if len(gains) > 1 else points(gains[0])
            cards.append(Card("gain of the chosen", spread, "points over the control"))
        value = [v for *_, point in chosen if (v := _mean(point, "accuracy_final")) is not None]
        if value:
            note = "the highest of the chosen" if len(value) > 1 else "test accuracy"
            cards.append(Card("final, chosen", percent(max(value)), note))
    if shared := shared_stages(sweep.rows):
        *_, spent, saved = map(sum, list(zip(*shared, strict=True))[1:])
        cards.append(Card("time spent", duration(spent), f"{duration(saved)} saved by sharing"))
    moved = [sum(row[f"communication_{way}"] or 0 for row in sweep.rows) for way in ("uplink", "downlink")]
    if any(moved):
        cards.append(Card("bytes sent", size(sum(moved)), f"{size(moved[0])} up, {size(moved[1])} down, all trials"))
    codes = Counter(code for row in sweep.rows for code in (row["health"] or "").split(",") if code)
    if len(sweep.done):
        most = ((code.replace(".", ".\u200b").replace("_", "_\u200b"), count) for code, count in codes.most_common(2))
        worst = ", ".join(f"{code} in {counted(count, 'trial')}" for code, count in most)  # names may break there
        cards.append(Card("health", counted(len(codes), "code"), f"most: {worst}" if worst else "no findings"))
    return cards


def _failure(failed: list[dict[str, Any]]) -> tuple[str, str] | None:
    if not failed:
        return None
    names, them = listed([row["trial"] for row in failed]), "it" if len(failed) == 1 else "them"
    return f"{counted(len(failed), 'trial')} failed", f"{names}; the same command tries {them} again."


def best_of(sweep: SweepReport, best: list[tuple[str, list[str], list[Point]]]) -> Section:
    if not best:
        return Section("Best configurations", "Nothing to compare yet.")
    seeds = max(len(point) for *_, points_there in best for point in points_there)
    spread = f", mean ± sd of {seeds} seeds" if seeds > 1 else ""
    lead = (
        f"Percent{spread}. Configurations are chosen by selection, which no test image enters; final, control and gain "
        "(final − control) are on test images, for reporting."
    )
    if any("ceiling" in measures(there) for *_, there in best):
        lead += f" {CEILING.capitalize()}."
    section = Section("Best configurations", lead)
    for title, knobs, there in best:
        short = short_names(knobs)
        reached = measures(there)
        heads = ["configuration", *short.values(), "seeds", *reached]
        rows = [
            [
                point[0]["trial"].rpartition("s")[0],
                *(shown(point[0][name]) for name in knobs), str(len(point)),
                *(mean_and_sd(point, column, "+" if head == "gain" else "") for head, column in reached.items()),
            ]
            for point in there[:MOST_POINTS]
        ]  # fmt: skip
        left = f"the first {MOST_POINTS} of {len(there)}" if len(there) > MOST_POINTS else ""
        section.tables.append(Table(title, heads, rows, left, best="best by" in title))
    return section


def _failures(failed: list[dict[str, Any]]) -> Section:
    rows = [
        [
            row["trial"], address(row["error_stage"], row["error_round"], row["error_client"]) or "–",
            row["error"] or "no reason was kept",
        ]
        for row in failed
    ]  # fmt: skip
    return Section("Failed trials", tables=[Table("Errors", ["trial", "where", "error"], rows)])


def _trials(sweep: SweepReport, beside: Path) -> Section:
    names = [name for name in sweep.varying if name != "seed"]
    files = [sweep.folder / "trials" / Path(row["trial"]).name / FILE for row in sweep.rows[:MOST_TRIALS]]
    to = Markup('<a href="{}">report</a>')
    pages = [to.format(Path(os.path.relpath(file, beside)).as_posix()) if file.is_file() else "" for file in files]
    heads = ["trial", *short_names(names).values(), "seed", "status", "final", "gain", "health"]
    rows = [
        [
            row["trial"], *(shown(row[name]) for name in names), str(row["seed"]), row["status"] or "–",
            percent(row["accuracy_final"]), points(row["gain"]), (row["health"] or "–").replace(",", ", "),
            *([page or "–"] if any(pages) else []),
        ]
        for row, page in zip(sweep.rows, pages, strict=False)
    ]  # fmt: skip
    heads += ["page"] if any(pages) else []
    left = f"the first {MOST_TRIALS} of {len(sweep.rows)}" if len(sweep.rows) > MOST_TRIALS else ""
    lead = (
        "A trial is a run: `mosaic report` on its folder below trials/ makes its own page, which is then linked here."
    )
    return Section("Trials", lead, tables=[Table("All trials", heads, rows, left)] if rows else [])


def _compared(plan: PlanFile) -> list[str]:
    """Return the words of the `mosaic compare` that made a plan; empty for any other sweep."""
    names, tried = ("method", "federation.strategy", *ALIASES), plan.points or []
    controls = [point for point in tried if "warmup.num_rounds" in point]
    tried = [point for point in tried if point not in controls]
    if plan.space != "compare" or not all({"method"} <= set(point) <= {OMEGA, *names} for point in tried):
        return []
    methods = dict.fromkeys("+".join(point[name] for name in names if name in point) for point in tried)
    words = ["--methods", ",".join(methods), *(["--equal-compute"] if controls else [])]
    if omegas := dict.fromkeys(str(point[OMEGA]) for point in tried if OMEGA in point):
        words += ["--omegas", ",".join(omegas)]
    return words + (["--against", plan.against] if plan.against else [])


def _reproduce(sweep: SweepReport) -> Section:
    plan = sweep.plan
    methods = _compared(plan)
    what = ["compare", *methods] if methods else ["sweep", "--space", plan.space]
    if plan.space == "--grid":
        what = ["sweep", *(f"--grid={name}={values}" for name, values in plan.knobs.items())]
    words = ["mosaic", *what, "--config", "base.toml", "--name", sweep.name]
    for option in () if methods else ("search", "samples", "scheduler"):
        if (value := getattr(plan, option)) is not None:
            words += [f"--{option}", str(value)]
    if plan.seeds:
        words += ["--seeds", ",".join(map(str, plan.seeds))]
    knobs = [f"{name}: {domain}" for name, domain in plan.knobs.items()]
    if methods:
        knobs = [f"methods: {', '.join(methods[1].split(','))}"]
    texts = [Text("Command", shlex.join(words)), Text("Plan", "\n".join(knobs) or "points listed by the space")]
    if plan.base is not None:
        base = ({"preset": plan.preset} if plan.preset else {}) | plan.base
        texts.append(Text("What all trials share, base.toml", tomli_w.dumps(base), folded=True))
    lead = "With what all trials share saved as base.toml, this asks for the same trials."
    if not methods and plan.space not in [*list_spaces(), "--grid"]:
        lead += " The space does not ship with the package: --space takes its path, or module:function."
    return Section("Reproduce", lead, texts=texts)
