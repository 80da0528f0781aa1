"""Format numbers and lists for the report."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.text import visible

#: Most names in a list; the others are counted.
MOST_NAMED = 6

#: What the model of each role is.
ROLE_NAMES = {
    "final": "after the closing rounds", "control": "FedAvg after the same rounds",
    "distilled": "the distilled student", "teacher": "experts and meta model", "initial": "after the warm-up",
    "ceiling": "linear probe; reads all clients' images, not a federated method",
    "server_student": "a network that no client holds, trained on synthetic images",
}  # fmt: skip


def percent(share: float | None) -> str:
    """Format a share in [0, 1] as ``95.3 %``."""
    return "–" if share is None or share != share else f"{100 * share:.1f} %"


def points(difference: float | None) -> str:
    """Format a difference in [-1, 1] as percentage points: ``+8.6``."""
    return "–" if difference is None or difference != difference else f"{100 * difference:+.1f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Format seconds as ``5 min 20 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def counted(number: int, noun: str, plural: str = "") -> str:
    """Format a number with its noun: ``1 class``, ``3 classes``."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def listed(names: Sequence[object]) -> str:
    """Format names as ``0, 3 and 7``; of many only the first."""
    words = [str(name) for name in names]
    if len(words) > MOST_NAMED:
        return f"{', '.join(words[:MOST_NAMED])} and {len(words) - MOST_NAMED} more"
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def labels_of(class_names: Sequence[str]) -> list[str]:
    """Return each class's label: its name, cut short, and its number."""
    names = (visible(name, "") for name in class_names)
    return [f"{name if len(name) <= 20 else name[:19] + '…'} ({c})" for c, name in enumerate(names)]


def address(stage: str | None, round: int | None, client: int | None) -> str:
    """Format the place of a failure as ``stage warmup, round 3, client 0``; leave out arguments that are None."""
    places = {"stage": stage, "round": round, "client": client}
    return ", ".join(f"{name} {value}" for name, value in places.items() if value is not None)
