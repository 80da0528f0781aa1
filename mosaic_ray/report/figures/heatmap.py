"""Draw the heat map of a partition: clients by classes."""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ...config.registry import sampler_kind
from ...config.schema import ExperimentConfig
from ...core.errors import RequestError
from ...core.text import visible
from ...storage.filesystem import write_whole
from ...storage.uri import reason
from ..text import labels_of
from .style import STEPS, beside, colour, style

#: With more rows or columns than this, not every one has a label and no cell its number.
MOST_ROWS, MOST_COLUMNS = 40, 20


def default_name(config: ExperimentConfig) -> str:
    """Return the file name of a partition's PNG, without a folder."""
    data = "".join(c if c.isalnum() else "_" for c in config.data.name.rstrip("/").rpartition("/")[2])
    section = config.partition
    sampler = re.sub(r"\W", "_", re.split("[:/]", section.sampler)[-1])
    return f"{data}-{sampler}-omega{section.omega:g}-{section.num_clients}clients-s{config.seed}.png"


def heading(config: ExperimentConfig) -> str:
    """Return the title for ``config``'s partition, with the knob that its sampler uses."""
    section = config.partition
    knobs = {"iid": "", "pathological": f", {section.classes_per_client} classes each"}
    given = sampler_kind(section.sampler) in ("file", "natural")
    knob = "" if given else knobs.get(section.sampler, f", omega {section.omega:g}")
    return f"{config.data.name}, {section.num_clients} clients; sampler {section.sampler}{knob}, seed {config.seed}"


def skew_in_words(skewness: float, num_classes: int) -> str:
    """Format ``skewness`` [nats] beside its largest value, which one class per client would have."""
    return f"skew {skewness:.2f} of {np.log(num_classes):.2f} nats"


def save_png(place: str, picture: bytes) -> None:
    """Write ``picture`` to the file ``place``; ``RequestError`` where it cannot be written."""
    try:
        write_whole(Path(place).expanduser().absolute(), picture)
    except OSError as error:
        why = "its folder is a file" if isinstance(error, FileExistsError | NotADirectoryError) else reason(error)
        raise RequestError(f"--png {place}: {why}; name a file in a folder that can be written") from None


def heat_map(
    over: Axes, shares: np.ndarray, texts: np.ndarray | None, ylabel: str, xlabel: str = "class", size: float = 8
) -> None:
    """Draw ``shares`` [rows, columns] in [0, 1] as coloured cells with ``texts``; the cells of zeros stay blank.

    The colour follows the square root of the share. Without ``texts`` (for many cells) it is one image of one colour,
    more opaque for larger shares, which fits a light and a dark page alike.
    """
    rows, columns = shares.shape
    roots = np.sqrt(np.clip(shares, 0, 1))
    over.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xlabel=xlabel, ylabel=ylabel)
    over.set_xticks(_numbers(columns, MOST_COLUMNS))
    over.set_yticks(_numbers(rows, MOST_ROWS))
    over.grid(False)
    over.tick_params(length=0)
    over.spines[:].set_visible(False)
    if texts is None:
        picture = np.full((rows, columns, 4), (64, 128, 208, 0), np.uint8)
        picture[..., 3] = np.where(shares > 0, np.rint(30 + 225 * roots), 0)
        over.imshow(picture, aspect="auto", interpolation="nearest" if rows <= 1000 else "auto")
        return
    for row, column in np.argwhere(shares > 0):
        step = min(int(roots[row, column] * STEPS), STEPS - 1)
        over.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, color=colour(f"h{step}"), lw=0))
        over.text(column, row, texts[row, column], ha="center", va="center", size=size, color=colour(f"t{step}"))


@style()
def partition_figure(
    counts: np.ndarray,
    least: tuple[float, float] = (0.0, 0.0),
    names: Sequence[str] = (),
    held: Mapping[str, Sequence[bool]] = {},
) -> Figure:
    """Draw ``counts`` [clients, classes] as a heat map, with the clients' sizes as bars on its right.

    The colour is the share of the client's samples, on a root scale from 0 to 1 that is the same in every figure; a
    class without samples stays blank. ``least``: the least width and height of the map [inches]. ``names`` [C] label
    few classes. ``held``: modality -> whether each client holds it, which is marked in a map between the two.
    """
    num_clients, num_classes = counts.shape
    sizes = counts.sum(axis=1)
    each = num_clients <= MOST_ROWS and num_classes <= MOST_COLUMNS
    width = max(0.31 * num_classes if each else 4.2, least[0])
    height = max(0.28 * num_clients if each else 4.0, least[1])
    wide = [0.31 * len(held)] if held else []
    figure = Figure((width + sum(wide) + 1.45, height + 0.75), layout="constrained")
    table, *marks, bars = figure.subplots(1, 2 + len(wide), sharey=True, width_ratios=(width, *wide, 0.9))
    heat_map(table, counts / np.maximum(sizes, 1)[:, None], counts if each else None, "client")
    if names and num_classes <= MOST_COLUMNS:
        table.set_xticks(range(num_classes), names, rotation=40, ha="right", rotation_mode="anchor")
    for over in marks:
        marked = np.array([*held.values()], float).T
        heat_map(over, marked, np.full(marked.shape, "") if each else None, "", "modality")
        labels = [visible(name)[:12] for name in held]
        over.set_xticks(range(len(held)), labels, rotation=40, ha="right", rotation_mode="anchor")
        over.tick_params(axis="y", labelleft=False)
    bars.stairs(sizes, np.arange(num_clients + 1) - 0.5, orientation="horizontal", fill=True, color=colour("s6"), lw=0)
    bars.set(xlabel="images", xlim=(0, (2.0 if each else 1.4) * max(sizes.max(), 1)))
    bars.set_xticks([] if each else [0, sizes.max()], [] if each else ["0", f"{sizes.max():,}"])
    for client, count in enumerate(sizes if each else []):
        beside(bars, f"{count:,}", (count, client), 3, size=8)
    bars.tick_params(axis="y", length=0, labelleft=False)
    bars.spines["left"].set_visible(False)
    bars.spines["bottom"].set_visible(False)
    bars.grid(False)
    return figure


@style()
def partition_heatmap(
    counts: np.ndarray, title: str, class_names: Sequence[str] = (), held: Mapping[str, Sequence[bool]] = {}
) -> bytes:
    """Draw ``counts`` [clients, classes] as PNG below ``title``; ``class_names`` [C] that are no numbers label few.

    ``held``: modality -> whether each client holds it, where samples have several.
    """
    own = list(class_names) != [str(c) for c in range(np.shape(counts)[1])]
    figure = partition_figure(np.asarray(counts), (4.2, 3.0), labels_of(class_names) if own else (), held)
    text = f"{title}\ncolour: share of the client's images (root scale)"
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, int(13 * figure.get_figwidth()))]
    figure.set_figheight(figure.get_figheight() + 0.2 * len(lines))
    figure.suptitle("\n".join(lines), size=10)
    FigureCanvasAgg(figure)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a name in another script
        figure.savefig(out, format="png", dpi=min(300, 1800 / figure.get_figheight()))  # 1800 rows fit a screen
    return out.getvalue()


def _numbers(count: int, most: int) -> list[int]:
    """Return 0 to ``count`` - 1, or only round numbers among them if ``count`` exceeds ``most``."""
    if count <= most:
        return list(range(count))
    round_ones = MaxNLocator(10, steps=[1, 2, 5, 10], integer=True).tick_values(0, count - 1)
    return [int(number) for number in round_ones if 0 <= number < count]
