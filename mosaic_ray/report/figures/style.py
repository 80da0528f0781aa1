"""Colours, axes and heat map cells that all figures share.

Every colour is a role with a light and a dark value. Figures are drawn with the light ones; ``inline_svg`` replaces
them by CSS custom properties, so that one drawing fits both themes. Series colours differ under the three common kinds
of colour blindness, and labels, markers or order always carry the same meaning as a colour.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

#: Number of colours of a heat map.
STEPS = 9

#: Inches of a chart as wide as a phone, where 1/72 inch is about one CSS pixel.
WIDTH, HEIGHT = 4.7, 2.9

#: Role -> (light, dark): h0 to h8 are the cells of a heat map, t0 to t8 the text in them. All light values differ,
#: because ``inline_svg`` finds roles by them. None is pure black, which matplotlib does not write.
PALETTE = {
    "paper": ("#fefefe", "#14171c"), "raised": ("#f2f4f8", "#1d2128"), "ink": ("#1b1f26", "#e8eaee"),
    "muted": ("#565d69", "#a6adb9"), "rule": ("#d9dde3", "#353b46"),
    "s1": ("#1d5fc4", "#7fb2ff"), "s2": ("#b45a09", "#f2a65a"), "s3": ("#0d7a68", "#4fd0b6"),
    "s4": ("#a12f83", "#d873c4"), "s5": ("#6f6204", "#d8c455"), "s6": ("#6b7280", "#9aa3b0"),
    "s7": ("#6a45c4", "#b9a3ff"), "s8": ("#b0261f", "#ff9188"),
    "h0": ("#dfeaf8", "#1c2c47"), "t0": ("#000001", "#ffffff"), "h1": ("#c4d2e6", "#31425e"),
    "t1": ("#000002", "#ffffff"), "h2": ("#aabad3", "#465875"), "t2": ("#000003", "#ffffff"),
    "h3": ("#8fa2c1", "#5b6e8c"), "t3": ("#000004", "#ffffff"), "h4": ("#758baf", "#7084a3"),
    "t4": ("#000005", "#000000"), "h5": ("#5a739c", "#859aba"), "t5": ("#fffff5", "#000000"),
    "h6": ("#3f5b8a", "#9ab1d2"), "t6": ("#fffff6", "#000000"), "h7": ("#254378", "#b0c7e9"),
    "t7": ("#fffff7", "#000000"), "h8": ("#0b2c66", "#c4dcff"), "t8": ("#fffff8", "#000000"),
}  # fmt: skip
_ROLE_OF = {light: role for role, (light, _) in PALETTE.items()}


def colour(role: str) -> str:
    """Return the light value of a role."""
    return PALETTE[role][0]


#: Role of a model -> (role of its colour, marker).
ROLE_LOOKS = {
    "initial": ("s6", "o"), "teacher": ("s3", "D"), "distilled": ("s4", "s"), "final": ("s1", "o"),
    "control": ("s2", "^"), "ceiling": ("s5", "v"), "server_student": ("s7", "P"),
}  # fmt: skip
SERIES = tuple(zip(("s1", "s2", "s3", "s4", "s7", "s5", "s8", "s6"), "o^Dsv<>P", strict=True))

#: A bar that stands for a result found in the store.
OUTLINE: dict[str, Any] = {"facecolor": "none", "edgecolor": colour("s6"), "ls": (0, (3, 2)), "lw": 1.2}

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "text.parse_math": False, "text.color": colour("ink"),
    "axes.edgecolor": colour("rule"), "axes.labelcolor": colour("muted"), "axes.titlesize": 10, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": colour("paper"),
    "figure.facecolor": colour("paper"), "figure.dpi": 110, "grid.color": colour("rule"), "grid.linewidth": 0.6,
    "xtick.color": colour("rule"), "ytick.color": colour("rule"), "xtick.labelcolor": colour("muted"),
    "ytick.labelcolor": colour("muted"), "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.frameon": False,
    "legend.fontsize": 9, "legend.labelcolor": colour("ink"), "lines.linewidth": 1.8, "lines.markersize": 5,
    "svg.fonttype": "none", "svg.hashsalt": "mosaic", "hatch.linewidth": 0.8, "axes.formatter.useoffset": False,
}  # fmt: skip


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Use the report's style, independent of matplotlib's global settings, in a block or as a decorator."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def axes(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return a figure of ``width`` by ``height`` [inches] and its axes."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def in_percent(axis: Any) -> None:
    """Label ``axis`` in percent, with as many decimals as its ticks need."""
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def beside(over: Axes, text: str, at: tuple[Any, float], gap: float = 5, **options: Any) -> None:
    """Write ``text`` ``gap`` points to the right of the point ``at``."""
    over.annotate(text, at, xytext=(gap, 0), textcoords="offset points", va="center", **options)


def label_ends(over: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Label line ends (x, y, text, role) on their right, at least 0.075 of the axes' height apart."""
    low, high = over.get_ylim()
    floor = -np.inf
    for x, y, text, role in sorted(ends, key=lambda end: end[1]):
        floor = max(y, floor + 0.075 * (high - low))
        beside(over, text, (x, floor), 6, size=9, color=colour(role), annotation_clip=False)


def bar_axes(over: Axes, names: Sequence[str], most: float) -> None:
    """Set up axes for horizontal bars with labels behind them; ``most`` is the length of the axis."""
    over.set(xlim=(0, most), ylim=(len(names) - 0.5, -0.5))
    over.set_yticks(range(len(names)), names)
    over.tick_params(axis="y", labelcolor=colour("ink"), length=0)
    over.set_xticks([])
    over.grid(False)
    over.spines["bottom"].set_visible(False)


def label_bars(over: Axes, lengths: Iterable[float], places: Iterable[float], texts: Iterable[str]) -> None:
    """Write ``texts`` behind horizontal bars."""
    for length, place, text in zip(lengths, places, texts, strict=True):
        beside(over, text, (length, place), size=9)
