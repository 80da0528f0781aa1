"""Colours, axes and heat map cells that all figures share.

Every colour is a role with a light and a dark value. Figures are styled with the light ones; ``inline_svg`` replaces
them by CSS custom properties, so that one drawing fits both themes. Series colours differ under the three common kinds
of colour blindness, and labels, markers or order always carry the same meaning as a colour.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

#: Number of colours of a heat map.
STEPS = 9

#: Inches of a chart as wide as a phone, where 1/72 inch is about one CSS pixel.
WIDTH, HEIGHT = 4.7, 2.9

T = TypeVar("T")


def _ramp(low: str, high: str) -> list[str]:
    between = LinearSegmentedColormap.from_list("ramp", [low, high])
    return [to_hex(between(t)) for t in np.linspace(0, 1, STEPS)]


def luminance(colour: str) -> float:
    """Return the relative luminance in [0, 1] (WCAG 2.2)."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio in [1, 21] (WCAG 2.2)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _palette() -> dict[str, tuple[str, str]]:
    """Return role -> (light, dark). All light values differ, because ``inline_svg`` finds roles by them."""
    colours = {
        "paper": ("#fefefe", "#14171c"), "raised": ("#f2f4f8", "#1d2128"), "ink": ("#1b1f26", "#e8eaee"),
        "muted": ("#565d69", "#a6adb9"), "rule": ("#d9dde3", "#353b46"),
        "s1": ("#1d5fc4", "#7fb2ff"), "s2": ("#b45a09", "#f2a65a"), "s3": ("#0d7a68", "#4fd0b6"),
        "s4": ("#a12f83", "#d873c4"), "s5": ("#6f6204", "#d8c455"), "s6": ("#6b7280", "#9aa3b0"),
        "s7": ("#6a45c4", "#b9a3ff"), "s8": ("#b0261f", "#ff9188"),
    }  # fmt: skip
    ramps = zip(_ramp("#dfeaf8", "#0b2c66"), _ramp("#1c2c47", "#c4dcff"), strict=True)
    for step, (light, dark) in enumerate(ramps):
        on_light, on_dark = (
            "black" if contrast(c, "#000000") > contrast(c, "#ffffff") else "white" for c in (light, dark)
        )
        colours[f"h{step}"] = (light, dark)
        colours[f"t{step}"] = (
            f"#00000{step + 1}" if on_light == "black" else f"#fffff{step}",  # matplotlib does not write pure black
            "#000000" if on_dark == "black" else "#ffffff",
        )  # fmt: skip
    return colours


PALETTE = _palette()
_ROLE_OF = {light: role for role, (light, _) in PALETTE.items()}


def colour(role: str) -> str:
    """Return the light value of a role."""
    return PALETTE[role][0]


#: Role of a model -> (role of its colour, marker).
ROLE_LOOKS = {
    "initial": ("s6", "o"), "teacher": ("s3", "D"), "distilled": ("s4", "s"), "final": ("s1", "o"),
    "control": ("s2", "^"),
}  # fmt: skip
SERIES = tuple(zip(("s1", "s2", "s3", "s4", "s7", "s5", "s8", "s6"), "o^Dsv<>P", strict=True))

_STYLE = {
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
def _style() -> Iterator[None]:
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def styled(draw: Callable[..., T]) -> Callable[..., T]:
    """Let ``draw`` use the report's style, independent of matplotlib's global settings."""

    @functools.wraps(draw)
    def in_style(*args: Any, **options: Any) -> T:
        with _style():
            return draw(*args, **options)

    return in_style


def axes(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return a figure of ``width`` by ``height`` [inches] and its axes."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots()


def in_percent(axis: Any) -> None:
    """Label ``axis`` in percent, with as many decimals as its ticks need."""
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Put ticks at ``values`` of a logarithmic ``axis``, as plain numbers."""
    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(FixedLocator([]))


def label_ends(over: Axes, ends: Sequence[tuple[float, float, str, str]], lines: float = 0.075) -> None:
    """Label line ends (x, y, text, role) on their right, at least ``lines`` of the axes' height apart."""
    low, high = over.get_ylim()
    gap, floor = lines * (high - low), -np.inf
    for x, y, text, role in sorted(ends, key=lambda end: end[1]):
        floor = max(y, floor + gap)
        over.annotate(
            text, (x, floor), xytext=(6, 0), textcoords="offset points", va="center", size=9, color=colour(role),
            annotation_clip=False,
        )  # fmt: skip


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
        over.annotate(text, (length, place), xytext=(5, 0), textcoords="offset points", va="center", size=9)
