"""Values read from JSON as dataclasses: accepted values, and the place of a value that does not fit."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from mosaic_ray.core.serialization import from_json
from mosaic_ray.core.types import Finding


@dataclass(frozen=True, kw_only=True)
class Inner:
    key: str
    share: Annotated[float, (0.0, 1.0)] | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    flag: bool
    count: int = -1
    level: Literal["low", "high"] = "low"
    inner: dict[str, Inner] | None = None
    rows: list[list[int]] | None = None
    anything: Any = None


def test_fields_nest_and_missing_keys_and_nulls_take_the_default():
    content = {"flag": True, "count": None, "inner": {"a": {"key": "k", "share": 1}}, "rows": [[1], []], "new": 3}
    assert from_json(Outer, content) == Outer(flag=True, inner={"a": Inner(key="k", share=1)}, rows=[[1], []])


@pytest.mark.parametrize("value", [3, [], {"x": [None]}, "text", True])
def test_any_value_fits_any(value):
    assert from_json(Outer, {"flag": False, "anything": value}).anything == value


@pytest.mark.parametrize(
    "content, place",
    [
        ([], ""), ({}, "flag"), ({"flag": None}, "flag"), ({"flag": 1}, "flag"),
        ({"flag": True, "count": 1.0}, "count"), ({"flag": True, "count": True}, "count"),
        ({"flag": True, "level": "mid"}, "level"), ({"flag": True, "level": []}, "level"),
        ({"flag": True, "inner": []}, "inner"),
        ({"flag": True, "inner": {"a": 3}}, "inner.a"), ({"flag": True, "inner": {"a": {}}}, "inner.a.key"),
        ({"flag": True, "inner": {"a": {"key": "k", "share": 1.5}}}, "inner.a.share"),
        ({"flag": True, "inner": {"a": {"key": "k", "share": math.nan}}}, "inner.a.share"),
        ({"flag": True, "inner": {"a": {"key": "k", "share": "1"}}}, "inner.a.share"),
        ({"flag": True, "rows": [[1], [2, "x"]]}, "rows.1.1"), ({"flag": True, "rows": [3]}, "rows.0"),
        ({"flag": True, "inner": {"a\nb": 3}}, "inner.'a\\nb'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_fault_is_named_by_its_place_in_one_line(content, place):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the place is the whole text)
        from_json(Outer, content)
    assert str(refused.value) == place


@pytest.mark.parametrize("finding", [Finding("a", "info", "s", "m"), Finding("b", "error", "t", "m", 3, 0.5, 1.0, "x")])
def test_a_finding_survives_json(finding):
    assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding
    assert Finding.from_json({"code": "a", "severity": "info", "stage": "s", "message": "m", "client": -1}).client == -1
