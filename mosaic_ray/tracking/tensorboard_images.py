"""Write images and texts to TensorBoard, drawn from the stored results of finished stages.

Nothing is drawn unless TensorBoard is on. A cached stage has the same images as a computed one, because both come from
the store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..config.resolve import to_toml
from ..config.schema import ExperimentConfig
from ..core.types import Dataset
from ..data.image_ops import image_grid
from ..storage.store import StageResult
from .tracker import Tracker

#: Pixels: most of a cell's side, least height and width of a cell with a number, and the gap between parts.
CELL, FIT, GAP = 28, (14, 26), 8

_INK = "#30343b"
#: Colours of a share near 0, which differs from white, and of 1.
_LIGHT, _DARK = np.array([226, 240, 247]), np.array([12, 52, 102])

#: Most letters of a class's name.
LONGEST_NAME = 16

#: Role -> tag of the confusion tables that are shown.
SHOWN = {"initial": "student/confusion_initial", "teacher": "teacher/confusion", "final": "student/confusion_final"}

#: TensorBoard's page "Custom Scalars": title -> [kind of chart, tags (regular expressions)].
LAYOUT = {
    "run": {
        "accuracy on test images, by warm-up round": ["Multiline", ["^warmup/(validation_)?accuracy$"]],
        "accuracy in the closing rounds, and the control's": ["Multiline", ["^(finetune|control)/accuracy$"]],
        "accuracy on all test images, by rounds until then": ["Multiline", ["^(student|teacher)/accuracy$"]],
        "generators: share of its classes that each client's covers": ["Multiline", ["^generator/coverage$"]],
        "agreement of student and teacher on synthetic images": ["Multiline", ["^student/agreement$"]],
        "accuracy on held-out prototypes": ["Multiline", ["^(meta|student)/held_out_accuracy$"]],
        "loss over clients: median, least and most": [
            "Margin", ["warmup/client_loss_median", "warmup/client_loss_min", "warmup/client_loss_max"],
        ],
    },
}  # fmt: skip


@dataclass
class TensorBoardImages:
    """Writes the images of each finished stage of a run once, in ``catch_up``.

    ``results`` by stage and ``generators`` by client are the run's own mappings, which it fills.
    """

    tracker: Tracker
    config: ExperimentConfig
    dataset: Dataset
    results: Mapping[str, StageResult]
    generators: Mapping[int, StageResult]
    done: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Write the configuration as text, and the layout of combined charts."""
        self.tracker.layout(LAYOUT)
        self.tracker.text("run/config", f"```toml\n{to_toml(self.config)}```")

    def catch_up(self) -> None:
        """Write the images of stages that have ended since the last call."""
        if not self.tracker.draws:
            return
        shown = {"partition": self._partition, "teacher": self._teacher, "evaluate": self._evaluate}
        for stage in [name for name in shown if name in self.results and name not in self.done]:
            self.done.add(stage)
            with self.results[stage].read_as():
                shown[stage](self.results[stage])
        if self.generators and "generators" not in self.done:
            self.done.add("generators")
            self._show_generators()

    def _partition(self, result: StageResult) -> None:
        counts = result.load("shards")["counts"]
        picture = partition_picture(counts, "training images by client and class", self.dataset.class_names)
        self.tracker.image("partition/label_counts", 0, picture)

    def _show_generators(self) -> None:
        figures: dict[str, list[float]] = {}
        for client_id, result in self.generators.items():
            for name, value in result.facts["figures"].items():
                figures.setdefault(name, []).append(value)
            if client_id >= 50:  # so many have synthetic images
                continue
            progress = result.load("progress")
            with result.read_as("progress"):
                for step, images in zip(progress["steps"], progress["images"], strict=True):
                    self.tracker.image(f"synthetic/client_{client_id:03d}", int(step), image_grid(images, 4))
        for name, values in figures.items():
            self.tracker.histogram(f"clients/generator_{name}", 0, np.array(values, np.float64))

    def _teacher(self, result: StageResult) -> None:
        """Write the meta model's weight of each expert, one image per architecture."""
        for part in result.parts:
            group, found, _ = part.partition("diagnostics")
            if found and "meta_gates" in (arrays := result.load(part)):
                picture = gates_picture(arrays["meta_gates"], self.dataset.class_names)
                self.tracker.image(f"meta/{group}expert_weights", 0, picture)

    def _evaluate(self, result: StageResult) -> None:
        tables = result.load("confusion")
        for role, tag in SHOWN.items():
            if f"{role}/test" in tables:
                self.tracker.image(tag, 0, confusion_picture(tables[f"{role}/test"], role, self.dataset.class_names))


def partition_picture(counts: np.ndarray, title: str, names: Sequence[str]) -> np.ndarray:
    """Draw label counts int64 [clients, classes] as uint8 [3, H, W]; the colour is the share of the client's images."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return matrix(shares, title, ("client", "class"), (), names, counts, top=1.0)


def confusion_picture(table: np.ndarray, role: str, names: Sequence[str]) -> np.ndarray:
    """Draw a confusion table int64 [C, C] (rows: true classes) as uint8 [3, H, W], coloured by the share of the row."""
    right, count = int(np.trace(table)), int(table.sum())
    title = f"{role}: {right / max(1, count):.1%} of {count:,} test images"
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    return matrix(shares, title, ("true", "predicted"), names, names, table, top=1.0)


def gates_picture(gates: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Draw the meta model's weights [experts, classes] as uint8 [3, H, W], in percent of each class's sum."""
    gates = np.nan_to_num(gates, posinf=0.0, neginf=0.0).astype(np.float64)  # it may have diverged
    shares = gates / np.maximum(gates.sum(0, keepdims=True), np.finfo(np.float64).tiny)
    title = "meta model: weight of each expert, %"
    return matrix(shares, title, ("expert", "class"), (), names, np.rint(100 * shares).astype(int))


def matrix(
    values: np.ndarray,
    title: str,
    axes: tuple[str, str],
    row_names: Sequence[str],
    column_names: Sequence[str],
    numbers: np.ndarray,
    *,
    top: float | None = None,
) -> np.ndarray:
    """Draw ``values`` [rows, columns] as coloured cells, uint8 [3, H, W]: 0 is white, ``top`` (the largest) darkest.

    The colour follows the square root, so that small values are visible. Integer ``numbers`` stand in the cells where
    they fit. Pillow draws it, because loading matplotlib would take 1 % of the time of a demo run.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = values.shape
    share = np.clip(values / (top or float(values.max()) or 1.0), 0.0, 1.0)
    high, wide = (int(np.clip(900 // count, 1, CELL)) for count in (rows, columns))  # pixels of a cell
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    shown = [_shown(row_names, rows, high), _shown(column_names, columns, wide)]
    left, below = (GAP * 5 + int(max(map(small.getlength, names.values()))) for names in shown)
    above, height = 4 * GAP, 4 * GAP + rows * high + below
    width = int(max(left + columns * wide + GAP, GAP + font.getlength(title) + GAP))

    image = Image.new("RGB", (width, height), "white")
    colours = np.rint(_LIGHT + (_DARK - _LIGHT) * np.sqrt(share)[..., None]).astype(np.uint8)
    colours[values == 0] = 255
    image.paste(Image.fromarray(colours.repeat(high, 0).repeat(wide, 1)), (left, above))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 1, above - 1, left + columns * wide, above + rows * high), outline=_INK)
    draw.text((GAP, GAP), title, _INK, font)
    draw.text((left + columns * wide // 2, height - GAP), axes[1], _INK, font, anchor="ms")
    _upright(image, axes[0], (GAP, above + rows * high // 2), font, "middle")
    for row, name in shown[0].items():
        draw.text((left - GAP, above + row * high + high // 2), name, _INK, small, anchor="rm")
    for column, name in shown[1].items():
        _upright(image, name, (left + column * wide + wide // 2 - 8, above + rows * high + GAP), small, "top")
    if high >= FIT[0] and wide >= FIT[1]:
        for (row, column), number in np.ndenumerate(numbers):
            if number:
                place = left + column * wide + wide // 2, above + row * high + high // 2
                text = str(number) if number < 10_000 else f"{number / 1000:.0f}k"
                draw.text(place, text, "white" if share[row, column] > 0.22 else _INK, small, anchor="mm")
    return np.asarray(image).transpose(2, 0, 1)


def _shown(names: Sequence[str], count: int, cell: int) -> dict[int, str]:
    """Return labels of rows or columns by index: numbers without ``names``, fewer where cells are small."""
    step = -(-14 // cell)
    wanted = list(names) or [str(index) for index in range(count)]
    short = [name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…" for name in wanted]
    return {index: short[index] for index in range(0, count, step)}


def _upright(image: Any, text: str, place: tuple[int, int], font: Any, anchor: str) -> None:
    """Write ``text`` upwards; ``place`` is the left of its upper end, or of its middle."""
    from PIL import Image, ImageDraw

    strip = Image.new("L", (int(font.getlength(text)) + 2, 16), 0)
    ImageDraw.Draw(strip).text((0, 0), text, 255, font)
    strip = strip.rotate(90, expand=True)
    top = place[1] - (strip.height // 2 if anchor == "middle" else 0)
    image.paste(Image.new("RGB", strip.size, _INK), (place[0], top), strip)
