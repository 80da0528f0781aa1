"""Pictures of a partition. Drawn by Agg through matplotlib's objects, so nothing global is touched."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ...config.schema import ExperimentConfig
from ...core.errors import RequestError
from ...storage.filesystem import write_whole
from ...storage.uri import reason

#: More rows or columns than this, and they are no longer named and counted one by one.
MOST_ROWS, MOST_COLUMNS = 40, 20
_INK = "#30343b"
#: From a tint that is told from white (no sample at all) to nearly black.
_SHADES = ListedColormap(colormaps["YlGnBu"](np.linspace(0.15, 1.0, 256)))


def default_name(config: ExperimentConfig) -> str:
    """The file name of a partition's picture: what it is of, and no folder."""
    data = "".join(c if c.isalnum() else "_" for c in config.data.name.rstrip("/").rpartition("/")[2])
    room = config.partition
    return f"{data}-{room.sampler}-omega{room.omega:g}-{room.num_clients}clients-s{config.seed}.png"


def heading(config: ExperimentConfig) -> str:
    """What a picture of ``config``'s partition is of, with the knob that its sampler looks at."""
    room = config.partition
    knobs = {"iid": "", "pathological": f", {room.classes_per_client} classes each"}
    knob = knobs.get(room.sampler, f", omega {room.omega:g}")
    return f"{config.data.name}, {room.num_clients} clients; sampler {room.sampler}{knob}, seed {config.seed}"


def skew_in_words(skewness: float, num_classes: int) -> str:
    """``skewness`` in nats, and the most that it could be: one class for each client."""
    return f"skew {skewness:.2f} of {np.log(num_classes):.2f} nats"


def save_png(place: str, picture: bytes) -> None:
    """Write ``picture`` whole; ``RequestError`` where ``place`` cannot be written."""
    try:
        write_whole(Path(place).expanduser().absolute(), picture)
    except OSError as error:
        why = "its folder is a file" if isinstance(error, FileExistsError | NotADirectoryError) else reason(error)
        raise RequestError(f"--png {place}: {why}; name a file in a folder that can be written") from None


def partition_heatmap(counts: np.ndarray, title: str, class_names: Sequence[str] = ()) -> bytes:
    """``counts`` [clients, classes] as PNG: clients down, classes across.

    Colour is the share of the client's samples, on a root scale from 0 to 100 % that is the same in every picture;
    white is none at all. Beside it stand the clients' sizes. ``class_names`` [C] are shown where there is room.
    """
    counts = np.asarray(counts)
    num_clients, num_classes = counts.shape
    sizes = counts.sum(axis=1)
    shares = counts / np.maximum(sizes, 1)[:, None]
    width, height = np.clip(0.52 * num_classes, 4.2, 11.0), np.clip(0.3 * num_clients, 3.0, 10.0)
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, int(9 * (width + 3.4)))]
    with style.context("default"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # a name in another script
        figure = Figure((width + 3.4, height + 1.2 + 0.2 * len(lines)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        cells, bars = figure.subplots(1, 2, sharey=True, width_ratios=(width, 1.5))
        image = cells.imshow(
            np.ma.masked_equal(shares, 0.0),
            aspect="auto", cmap=_SHADES, norm=PowerNorm(0.5, 0.0, 1.0),
            interpolation="nearest" if num_clients <= 1000 else "auto",
        )  # fmt: skip
        edge = num_clients / 400  # or the frame would cover the first of a thousand clients
        cells.set_ylim(num_clients - 0.5 + edge, -0.5 - edge)
        _name(cells, num_clients, num_classes, class_names)
        if num_clients <= MOST_ROWS and num_classes <= MOST_COLUMNS:
            for client, c in zip(*np.nonzero(counts), strict=True):
                ink = "white" if shares[client, c] > 0.25 else _INK
                cells.text(c, client, str(counts[client, c]), ha="center", va="center", size=8, color=ink)
        _sizes(bars, sizes)
        bar = figure.colorbar(
            image, ax=bars, ticks=[0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0], fraction=0.1, aspect=height / 0.16, pad=0.12
        )
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        bar.set_label("share of the client's samples\n(white: none)")
        figure.suptitle("\n".join(lines), size=11, parse_math=False)
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()


def _name(cells: Axes, num_clients: int, num_classes: int, class_names: Sequence[str]) -> None:
    """Clients and classes by number, all of them where there is room, and then classes by name as well."""
    cells.set_xlabel("class")
    cells.set_ylabel("client")
    cells.tick_params(length=0)
    clients, classes = _numbers(num_clients, MOST_ROWS), _numbers(num_classes, MOST_COLUMNS)
    cells.set_yticks(clients)
    cells.set_xticks(classes)
    if num_classes <= MOST_COLUMNS and list(class_names) not in ([], [str(c) for c in classes]):
        named = [f"{name if len(name) <= 20 else name[:19] + '…'} ({c})" for c, name in enumerate(class_names)]
        slanted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "parse_math": False}
        cells.set_xticks(classes, named, **slanted)


def _numbers(count: int, most: int) -> list[int]:
    """0 to ``count`` - 1, or round numbers among them where there are more than ``most``."""
    if count <= most:
        return list(range(count))
    round_ones = MaxNLocator(10, steps=[1, 2, 5, 10], integer=True).tick_values(0, count - 1)
    return [int(number) for number in round_ones if 0 <= number < count]


def _sizes(bars: Axes, sizes: np.ndarray) -> None:
    """The clients' sizes as horizontal bars."""
    bars.stairs(sizes, np.arange(len(sizes) + 1) - 0.5, orientation="horizontal", fill=True, color="#8a94a3")
    bars.set_xlabel(f"samples\n(at least {sizes.min():,})")
    bars.set_xticks([0, sizes.max()], ["0", f"{sizes.max():,}"])
    bars.tick_params(axis="y", length=0, labelleft=False)
    bars.spines[["top", "right"]].set_visible(False)
