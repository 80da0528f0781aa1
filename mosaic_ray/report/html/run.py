"""Build a run's page: its accuracies, its health findings and its cost."""

from __future__ import annotations

import base64
import io
import shlex

import numpy as np
from PIL import Image

from ...config.resolve import override, to_toml
from ...config.schema import ExperimentConfig
from ...core.errors import RequestError
from ...core.units import size
from ...data.image_ops import image_grid
from ..figures.cost import time_frame, traffic
from ..figures.data import progress_of, samples_of
from ..figures.run import FIGURES
from ..load import NotAvailable, RunReport, read_text
from ..tables import SEVERITIES, client_rows, subset_rows, worst_first
from ..text import ROLE_NAMES, address, counted, duration, percent, points
from .blocks import Card, Gallery, Page, Picture, Section, Table, Text

#: Most findings on the page; summary.json has all.
MOST_FINDINGS = 40

def run_page(run: RunReport) -> Page:
    """Return the page of ``run``, which may be unfinished."""
    sections = [health(run)]
    for title, figures in FIGURES.items():
        section = Section(title).show(figures, run)
        if title == "Accuracy" and (found := run.summary.client_accuracy):
            section.tables.append(Table("Accuracy at the clients", *client_rows(found)))
        if title == "Accuracy" and run.summary.subset_accuracy:
            rows = subset_rows(run.summary.subset_accuracy)
            section.tables.append(Table("Accuracy by the modalities that are there", *rows))
        if title.startswith("Data"):
            _galleries(section, run)
        if section.figures or section.galleries or run.status == "done":
            sections.append(section)
    return Page(run.name, about(run), verdict(run), _cards(run), [*sections, _reproduce(run)], _failure(run))


def about(run: RunReport) -> str:
    words = [str(run.summary.method or run.knob("method") or "a run")]
    shapes = {
        "data.name": "on {}", "partition.num_clients": "{} clients", "partition.omega": "omega {}",
        "partition.sampler": "sampler {}", "seed": "seed {}",
    }  # fmt: skip
    words += [shape.format(run.knob(name)) for name, shape in shapes.items() if run.knob(name) is not None]
    named = run.summary.preset or run.knob("preset")
    return ", ".join([*words, *([f"schedule {named}"] if named else [])])


def verdict(run: RunReport) -> str:
    """Return the result of the run in one sentence."""
    final, control, teacher, gain = *(run.accuracy(role) for role in ("final", "control", "teacher")), run.gain
    if run.status == "failed":
        return "The run failed; its results until then are below."
    if run.status != "done":
        return f"The run is {run.status}: its results so far are below."
    if final is None:
        return "The run is done and reports no final accuracy."
    text = f"The final model is right on {percent(final)} of the test images"
    if gain is None:
        return f"{text}; there is no control to compare it with."
    against = f"the control, plain federated averaging with the same closing rounds ({percent(control)})"
    if abs(gain) < 0.0005:  # less than the last digit shows
        text = f"{text}, exactly as many as {against}"
    else:
        text = f"{text}, {points(abs(gain)).strip('+')} points {'more' if gain > 0 else 'fewer'} than {against}"
    return text + (f"; the teacher reaches {percent(teacher)}." if teacher is not None else ".")


def _failure(run: RunReport) -> tuple[str, str] | None:
    if run.status != "failed":
        return None
    place = address(run.summary.stage, run.summary.round, run.summary.client)
    log = "; error.log has the traceback" if (run.folder / "error.log").is_file() else ""
    return f"Failed{f' in {place}' if place else ''}", f"{run.summary.error or 'no reason was kept'}{log}."


def _cards(run: RunReport) -> list[Card]:
    cards = []
    if run.gain is not None:
        cards.append(Card("gain over control", points(run.gain), "points of test accuracy, final − control"))
    cards += [Card(r, percent(run.accuracy(r)), what) for r, what in ROLE_NAMES.items() if run.accuracy(r) is not None]
    if (own := run.summary.personal_accuracy) is not None:
        cards.append(Card("clients' own", percent(own.own), "own models after the warm-up, on own classes; mean"))
    if run.summary.stages:
        frame = time_frame(run)
        cached = int((frame["state"] == "cached").sum())
        cards.append(Card("time", duration(frame["seconds"].sum()), f"{cached} of {len(frame)} stages cached"))
    moved = traffic(run)
    if any(moved.values()):
        up, down = (sum(moved[way].values()) for way in ("uplink", "downlink"))
        cards.append(Card("bytes sent", size(up + down), f"{size(up)} up, {size(down)} down"))
    if run.summary.health is not None:
        found: list[str] = [finding.severity for finding in run.summary.health]
        counts = {kind: found.count(kind) for kind in SEVERITIES if kind in found}
        words = [f"{count} info" if kind == "info" else counted(count, kind) for kind, count in counts.items()]
        words = words or ["sound", "no findings"]
        cards.append(Card("health", words[0], ", ".join(words[1:])))
    return cards or [Card("status", run.status)]


def health(run: RunReport) -> Section:
    if run.summary.health is None:
        return Section("Health", "Findings are listed once a run is done.")
    findings = worst_first(run.summary.health)
    section = Section("Health", "" if findings else "Nothing looked unwell.")
    for finding in findings[:MOST_FINDINGS]:
        numbers = {"value": finding.value, "threshold": finding.threshold}
        measured = [f"{what} {number:.4g}" for what, number in numbers.items() if number is not None]
        message = finding.message[:1].upper() + finding.message[1:]
        section.findings.append(
            {
                "severity": finding.severity, "code": finding.code, "message": message,
                "where": finding.stage + (f", client {finding.client}" if finding.client >= 0 else ""),
                "advice": finding.advice, "measured": ", ".join(measured),
            }
        )  # fmt: skip
    if len(findings) > MOST_FINDINGS:
        section.lead = f"The worst {MOST_FINDINGS} of {len(findings)} findings; all are in summary.json."
    return section


def _galleries(section: Section, run: RunReport) -> None:
    """Add galleries of synthetic images; real ones are never shown."""
    drawn = "Drawn by each client's generator from random latents; no real image is in this file."
    rows = "The same latents in every row, from early in training to its end."
    makers = {"Synthetic images by client": (drawn, _samples), "Synthetic images over time": (rows, _progress)}
    for title, (words, make) in makers.items():
        try:
            pictures = make(run)
        except NotAvailable as absent:
            section.absent.append((title, str(absent)))
            continue
        left = len(run.generators) - len(pictures)
        more = f" {counted(left, 'client')} more are not shown." if left > 0 else ""
        section.galleries.append(Gallery(title, words + more, pictures))


def _samples(run: RunReport) -> list[Picture]:
    return [
        _picture(
            image_grid(images, 8), f"{len(images)} synthetic images by the generator of client {k}",
            f"client {k}, which holds {_held(run, k)}",
        )
        for k, images in samples_of(run).items()
    ]  # fmt: skip


def _held(run: RunReport, client_id: int) -> str:
    assert run.label_counts is not None
    row = run.label_counts[client_id]
    most = [int(c) for c in np.argsort(-row, kind="stable") if row[c]]
    text = ", ".join(f"{run.class_label(c)}: {row[c]:,}" if run.class_names else f"{c} ({row[c]:,})" for c in most[:3])
    return f"class {text}" + (f" and {len(most) - 3} more" if len(most) > 3 else "")


def _progress(run: RunReport) -> list[Picture]:
    return [
        _picture(grid, f"client {k}'s generator at {steps}: the same latents", f"client {k}, {steps}")
        for k, (steps, grid) in progress_of(run).items()
    ]


def _picture(grid: np.ndarray, alt: str, caption: str) -> Picture:
    """Return an image uint8 [C, H, W] as PNG in a data URI."""
    out = io.BytesIO()
    Image.fromarray(grid[0] if len(grid) == 1 else grid.transpose(1, 2, 0)).save(out, "png", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
    return Picture(uri, grid.shape[2], grid.shape[1], alt, caption)


def _reproduce(run: RunReport) -> Section:
    section = Section("Reproduce")
    toml = read_text(run.folder / "config.toml")
    if toml is None:
        try:
            toml = to_toml(override(ExperimentConfig(), run.config))
        except RequestError:
            toml = ""
    if run.command:
        section.lead = "The command of this run; with the same storage it finds the stored results."
        section.texts.append(Text("Command", run.command))
    elif toml:
        section.lead = "No command was kept; the configuration is a whole request."
        section.texts.append(Text("Command", shlex.join(["mosaic", "run", "--config", "config.toml"])))
    if toml:
        section.texts.append(Text("Configuration, config.toml", toml, folded=True))
    if versions := run.summary.versions:
        section.texts.append(Text("Versions", "\n".join(f"{name} {number}" for name, number in versions.items())))
    return section
