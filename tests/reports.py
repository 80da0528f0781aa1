"""Write runs and sweeps to disk for reports, without training."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from trials import grid

from mosaic_ray.config.resolve import as_dict, override, to_toml
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.types import ROLES, STAGES
from mosaic_ray.runs.provenance import client_keys, joint_keys
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps.results import TrialResult, results_files, results_table

COUNTS = np.array([[40, 0, 3], [0, 20, 20], [5, 30, 0]])
ACCURACY = {"initial": 0.5, "teacher": 0.875, "distilled": 0.75, "final": 0.8125, "control": 0.5625}
FINDING = {
    "code": "generator.low_coverage", "severity": "warning", "stage": "generators", "client": 1, "value": 0.25,
    "threshold": 0.5, "message": "it shows 1 of its 2 classes", "advice": "raise generator.steps",
}  # fmt: skip
CONFIG = override(
    ExperimentConfig(),
    {"partition.num_clients": 3, "warmup.num_rounds": 3, "finetune.num_rounds": 2, "runtime.precision": "fp32"},
)


def _key(stage: str) -> str:
    return f"{stage}-{'0123456789' * 2}"


def make_run(storage: Path, name: str = "one", **changes: Any) -> Path:
    """The folder of a finished run below ``storage``, with all that its stages store; ``changes`` go into the summary,
    None takes a fact out."""
    store, draws = Store(storage), np.random.default_rng(0)
    stages = {
        stage: {"seconds": 2.0, "computed_seconds": 8.0, "cached": stage == "warmup", "key": _key(stage)}
        for stage in STAGES
    }
    before = {stage: facts["key"] for stage, facts in stages.items()}
    keys = client_keys(CONFIG, "generators", COUNTS.sum(axis=1), before)
    stages["generators"]["key"] = joint_keys(CONFIG, "generators", keys)
    for key in keys:
        parts = {
            "samples": {"images": draws.integers(0, 256, (16, 1, 8, 8), np.uint8)},
            "progress": {"images": draws.integers(0, 256, (2, 4, 1, 8, 8), np.uint8), "steps": np.array([5, 10])},
        }
        store.put(key, {"figures": {"coverage": 0.5}}, parts)
    weights = (COUNTS / COUNTS.sum(axis=0)).astype(np.float32)
    gates = np.array([[2, 0.5, 0.1], [0.25, 1, 0], [0.5, 0, 3]], np.float32)
    store.put(_key("teacher"), {"figures": {}}, {"diagnostics": {"expert_weights": weights, "meta_gates": gates}})
    store.put(_key("distill"), {"figures": {}}, {"diagnostics": {"synthetic_counts": np.array([60, 39, 1])}})
    table = {f"{role}/test": np.array([[8, 2, 0], [0, 9, 1], [3, 0, 7]]) for role in ROLES}
    store.put(_key("evaluate"), {}, {"confusion": table})
    summary: dict[str, Any] = {
        "status": "done", "method": "mosaic", "seed": 0, "accuracy": ACCURACY, "stages": stages,
        "per_class_accuracy": {role: [0.5, 1.0, 0.25] if role == "initial" else [0.75, 0.75, None] for role in ROLES},
        "calibration": {role: {"nll": 0.5, "ece": 0.1} for role in ROLES},
        "communication_bytes": {"uplink": {"weights": 3 << 20, "counts": 100}, "downlink": {"weights": 2 << 20}},
        "communication": {
            "predicted": {"uplink": {"weights": 3 << 20, "counts": 100}, "downlink": {"weights": 2 << 20}},
            "baselines": {"fedavg": {"uplink": {"weights": 2 << 20}, "downlink": {"weights": 2 << 20}}},
        },
        "health": [FINDING], "config": as_dict(CONFIG), "versions": {"mosaic-ray": "0.1.0"},
        "label_counts": COUNTS.tolist(),
    }  # fmt: skip
    summary = {what: value for what, value in (summary | changes).items() if value is not None}
    return write_run(storage / "runs" / name, summary)


def write_run(folder: Path, summary: dict[str, Any] | None) -> Path:
    """A run's files, without a store."""
    folder.mkdir(parents=True)
    rows = [("warmup", "warmup/accuracy", r, r / 8) for r in (1, 2, 3)]
    rows += [("finetune", "finetune/accuracy", r, 0.75 + r / 32) for r in (1, 2)]
    rows += [("control", "control/accuracy", r, 0.5 + r / 32) for r in (1, 2)]
    rows += [("distill", f"student/{tag}", s, s / 40) for tag in ("agreement", "held_out_accuracy") for s in (10, 20)]
    rows += [("generators", "generator/coverage", k, (k + 1) / 4) for k in range(3)]
    rows += [("generators", "generator/owned_classes", k, 2.0) for k in range(3)]
    lines = [json.dumps(dict(zip(("stage", "tag", "step", "value"), row, strict=True))) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "config.toml").write_text(to_toml(CONFIG))
    (folder / "command.txt").write_text("mosaic run --storage here\n")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_sweep(folder: Path, results: list[TrialResult] | None = None, **plan: Any) -> Path:
    """The folder of a sweep with ``results`` (two omegas, twelve points each, three seeds by default)."""
    results = grid() if results is None else results
    folder.mkdir(parents=True)
    points = {result.point: dict(result.knobs) for result in results}
    facts = {
        "space": "smoke", "search": "grid", "samples": None, "seeds": sorted({r.seed for r in results}) or [0],
        "scheduler": "fifo", "knobs": {name: "..." for point in points.values() for name in point},
        "points": list(points.values()), "base": as_dict(ExperimentConfig()), "session": None, "precision": "fp32",
    }  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(facts | plan))
    for name, data in results_files(results_table(results)).items():
        (folder / name).write_bytes(data)
    return folder


VOID = {"meta", "br", "img", "link", "input", "hr"}


class Reader(HTMLParser):
    """Read a page: (tag, attributes) in order, text by tag, and whether every tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: dict[str, list[str]] = {}
        self.labels: dict[str, str] = {}
        self._ids: list[str | None] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
            self._ids.append(attributes.get("id"))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()
        self._ids.pop()

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.words.setdefault(tag, []).append(data)
        for name in filter(None, self._ids):
            self.labels[name] = self.labels.get(name, "") + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for found, attributes in self.tags if found == tag]

    def text(self, tag: str = "body") -> str:
        return " ".join(" ".join(self.words.get(tag, [])).split())
