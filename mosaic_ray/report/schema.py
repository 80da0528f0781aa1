"""Whether summary.json and plan.json hold what a run and a sweep write there, as far as a report reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..core.errors import RequestError

Test = Callable[[Any], bool]


def check_summary(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    """``summary``, if its facts have the shapes that a report reads; ``RequestError`` names the first that has not."""
    return _check(summary, _SUMMARY, path)


def check_plan(plan: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same of a sweep's plan."""
    if not isinstance(plan.get("knobs"), dict) or not _text(plan.get("space")):
        raise RequestError(f"{path}: it is no sweep's plan")
    return _check(plan, _PLAN, path)


def _check(facts: dict[str, Any], shape: Mapping[str, Test], path: Path) -> dict[str, Any]:
    for name, holds in shape.items():
        if facts.get(name) is not None and not holds(facts[name]):
            raise RequestError(
                f"{path}: its {name} is not what a run or sweep writes; the same command writes it again"
            )
    return facts


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _amount(value: Any) -> bool:
    return value is None or (_number(value) and 0 <= value < math.inf)


def _share(value: Any) -> bool:
    return value is None or (_number(value) and 0 <= value <= 1)


def _by_name(holds: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(map(holds, value.values()))


def _list(holds: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(holds, value))


def _anything(value: Any) -> bool:
    return True


def _stage(value: Any) -> bool:
    return (
        isinstance(value, dict) and _text(value.get("key")) and isinstance(value.get("cached"), bool)
        and all(_amount(value.get(name)) for name in ("seconds", "computed_seconds", "waited_seconds"))
    )  # fmt: skip


def _finding(value: Any) -> bool:
    return (
        isinstance(value, dict) and all(_text(value.get(name)) for name in ("code", "stage", "message"))
        and value.get("severity") in ("info", "warning", "error")
        and _number(value.get("client"))
    )  # fmt: skip


def _ledger(value: Any) -> bool:
    moved = _by_name(_by_name(_amount))
    return (
        isinstance(value, dict)
        and moved(value.get("predicted") or {})
        and _by_name(moved)(value.get("baselines") or {})
    )


_SUMMARY: dict[str, Test] = {
    "status": _text, "error": _text, "method": _text, "stage": _text, "accuracy": _by_name(_share),
    "per_class_accuracy": _by_name(_list(_share)), "stages": _by_name(_stage),
    "communication_bytes": _by_name(_by_name(_amount)), "health": _list(_finding), "versions": _by_name(_text),
    "config": _by_name(_anything), "selection": _by_name(_anything),
    "calibration": _by_name(_by_name(_number)),
    "communication": _ledger,
}  # fmt: skip
_PLAN: dict[str, Test] = {
    "space": _text, "search": _text, "scheduler": _text, "knobs": _by_name(_anything), "seeds": _list(_number),
    "points": _list(_by_name(_anything)), "base": _by_name(_anything),
}  # fmt: skip
