"""Draw the partition, and the synthetic images of the clients' generators."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...data.image_ops import image_grid
from ...data.partition import skew
from ..load import NotAvailable, RunReport
from ..text import counted, listed, percent
from .base import Drawing, ReportFigure
from .heatmap import MOST_COLUMNS, MOST_ROWS, partition_figure, skew_in_words
from .style import axes, colour, label_bars, style

#: Largest number of clients with images, and of images per client.
MOST_CLIENTS, MOST_SAMPLES = 12, 32


@partial(ReportFigure, "partition", "Images by client and class", wide=True)
def partition(run: RunReport) -> Drawing:
    """Draw images by client and class; the table of many classes has only their number and the largest one."""
    if (counts := run.label_counts) is None:
        raise NotAvailable("the run ended before its partition, or keeps no label counts")
    sizes, held = counts.sum(axis=1), (counts > 0).sum(axis=1)
    largest = {"classes": held, "largest class": counts.argmax(axis=1)}
    frame = pd.DataFrame(counts if counts.shape[1] <= MOST_COLUMNS else largest).rename(columns=run.class_labels)
    frame = frame.replace({"largest class": run.class_labels}).assign(images=sizes).rename_axis("client")
    modalities, marked = run.summary.modalities or [], {}
    if run.facts and len(modalities) == len(counts):
        marked = {part.name: [part.name in own for own in modalities] for part in run.facts.modalities}
        frame = frame.assign(modalities=["+".join(own) for own in modalities])
    words = (
        f"{counted(len(counts), 'client')} hold {sizes.min():,} to {sizes.max():,} training images of {held.min()} to "
        f"{held.max()} of {counted(counts.shape[1], 'class', 'classes')}; "
        f"{skew_in_words(skew(counts), counts.shape[1])}. Colour is the share of the client's images."
    )
    drawn = partition_figure(counts, names=[*run.class_labels.values()], held=marked)
    return Drawing(drawn, frame, words)


@partial(ReportFigure, "coverage", "Generators' coverage")
def coverage(run: RunReport) -> Drawing:
    """Draw the share of each client's classes that its generator covers."""
    tags = {"coverage": "coverage", "classes": "owned_classes", "confidence": "confidence"}
    frame = pd.DataFrame({name: run.curve(f"generator/{tag}") for name, tag in tags.items()})
    frame = frame[~frame.index.duplicated(keep="last")].dropna(subset=["coverage"]).rename_axis("client")
    if frame.empty:
        raise NotAvailable("this run trained no generators")
    findings = run.summary.health or []
    low = sorted({f.client for f in findings if f.code == "generator.low_coverage" and f.client >= 0})
    if len(frame) > MOST_ROWS:
        figure, over = axes()
        over.hist(frame["coverage"], np.linspace(0, 1, 11).tolist(), color=colour("s7"), rwidth=0.9)
        over.set(xlabel="share of the client's classes shown", ylabel="clients")
    else:
        figure, over = axes(height=0.8 + 0.28 * len(frame))
        places = np.arange(len(frame))
        over.barh(places, frame["coverage"], 0.62, color=[colour("s2" if k in low else "s7") for k in frame.index])
        texts = [
            f"{round(share * owned)} of {int(owned)}" if math.isfinite(owned) else percent(share)
            for share, owned in zip(frame["coverage"], frame["classes"], strict=True)
        ]
        label_bars(over, frame["coverage"], places, texts)
        over.set(xlim=(0, 1.18), ylim=(len(frame) - 0.5, -0.5), ylabel="client", xlabel="share of its classes shown")
        over.set_yticks(places, frame.index)
        over.grid(axis="y", visible=False)
    over.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    least, most = percent(frame["coverage"].min()), percent(frame["coverage"].max())
    text = f"health warns of client {listed(low)}" if low else "health finds none too low"
    return Drawing(figure, frame, f"The generators show {least} to {most} of their clients' classes; {text}.")


def samples_of(run: RunReport) -> dict[int, np.ndarray]:
    """Return client -> the synthetic images uint8 [N, C, H, W] that are shown."""
    return {k: images[:MOST_SAMPLES] for k, images in list(run.samples().items())[:MOST_CLIENTS]}


def progress_of(run: RunReport) -> dict[int, tuple[str, np.ndarray]]:
    """Return client -> (its steps as text, a grid uint8 [C, H, W] with a row per step) for shown clients."""
    return {
        k: (f"steps {listed(steps.tolist())}", image_grid(images.reshape(-1, *images.shape[2:]), images.shape[1]))
        for k, (steps, images) in list(run.progress().items())[:MOST_CLIENTS]
    }


def samples(run: RunReport) -> Figure:
    """Draw synthetic images of each client's generator."""
    return _pictures({f"client {k}": image_grid(images, 8) for k, images in samples_of(run).items()})


def progress(run: RunReport) -> Figure:
    """Draw images of the same latents while the generators train: a row per snapshot, the last at the bottom."""
    return _pictures({f"client {k}, {steps}": grid for k, (steps, grid) in progress_of(run).items()})


@style()
def _pictures(pictures: dict[str, np.ndarray]) -> Figure:
    columns = min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure((3.2 * columns, 2.2 * rows), layout="constrained")
    for place in figure.subplots(rows, columns, squeeze=False).flat:
        place.set_axis_off()
    for place, (title, picture) in zip(figure.axes, pictures.items(), strict=False):
        place.imshow(picture.transpose(1, 2, 0), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        place.set_title(title, size=9)
    return figure
