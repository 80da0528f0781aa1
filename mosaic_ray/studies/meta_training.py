"""`mosaic experiment meta-training`: a meta model trained on prototypes, beside ones trained on synthetic images.

The arms are ``meta.data``'s: prototypes; synthetic images labelled by the model of their generator's client; and
synthetic images labelled by the experts' vote. Each arm has the same meta model, random start, number of updates and
number of training vectors, and returns its last state (``tune_spaces/meta_training`` has the reasons). The teachers'
results on test images are compared seed by seed.

``auc`` measures how well a linear classifier separates an arm's training vectors from the clients' prototypes. A
prototype is a mean of images, so even features of real images differ from prototypes: ``real images`` is that floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..config.validate import check as check_config
from ..core.errors import RequestError
from ..core.seeding import numpy_stream
from ..core.types import Dataset, ImageSet, Prototypes, Weights
from .harness import Row, Study, StudyContext, measured, uploads

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..federated.client import ClientContext
    from ..methods.mosaic.client_uploads import Generators
    from ..pipeline.context import RunContext, Shards
    from ..pipeline.rounds import Warmup
    from ..storage.store import StageResult

ARMS = ("prototypes", "synthetic", "synthetic_vote")
#: Defaults below --config and --set: no arm may start from, or be selected by, prototypes.
BASE: dict[str, Any] = {
    "algorithm": "distilled", "meta.init": "random", "meta.select": False, "runtime.eval_rounds": 0,
}  # fmt: skip


def check(config: ExperimentConfig, dataset: Dataset, options: Mapping[str, Any]) -> None:
    """``RequestError`` where the arms could not differ in ``meta.data`` alone."""
    for name, wanted in {"init": "random", "select": False, "data": "prototypes"}.items():
        if (value := getattr(config.meta, name)) != wanted:
            shown = f"meta.{name} = {str(value).lower()}"
            raise RequestError(f"{shown}: this experiment sets meta.{name} itself; leave it out")
    for arm in ARMS:
        check_config(override(config, {"meta.data": arm}))


def measure(context: StudyContext, config: ExperimentConfig) -> StageResult:
    """Train a teacher for each arm on the clients' uploads, and evaluate it on test images."""
    from ..distillation.image_quality import domain_auc
    from ..distillation.prototypes import split_held_out
    from ..methods.mosaic.graph import PROTOTYPES, TEACHER
    from ..pipeline.evaluate import evaluated

    with context.run(config) as run:
        shards, warmup, generators = uploads(run)
        prototypes = run.run(PROTOTYPES, warmup)
        reached, keys, looks = {}, [], {}
        for arm in ARMS:
            at = run.with_config(override(config, {"meta.data": arm}))
            teacher = at.run(TEACHER, warmup, prototypes, generators)
            keys.append(at.keys["teacher"])
            reached[arm] = evaluated(at, keys[-1], teacher, "test", run.dataset.test).facts
            looks[arm] = at, teacher

        def compute() -> tuple[list[Row], dict[str, np.ndarray]]:
            own = prototypes[warmup.federation.student]
            kept = split_held_out(own, config.prototypes.held_out, config.seed)[0]  # what the meta model trains on
            rows, num_classes = [], run.dataset.facts.num_classes
            for arm in ARMS:
                facts = reached[arm]
                row = {"learns_from": arm} | {name: facts[name] for name in ("accuracy", "nll", "ece")}
                for name in ("accuracy", "nll", "ece"):
                    pair = (facts[name], reached["prototypes"][name])
                    row[f"{name}_difference"] = None if arm == "prototypes" or None in pair else pair[0] - pair[1]
                if arm != "prototypes":
                    made = _synthetic(*looks[arm], warmup, generators, kept)
                    shares = [np.bincount(p.labels, p.sizes, num_classes) / p.sizes.sum() for p in (kept, made)]
                    row |= {
                        "auc": domain_auc(kept.vectors, made.vectors, config.seed),
                        "label_distance": float(np.abs(shares[0] - shares[1]).sum() / 2),
                        "num_classes": len(np.unique(made.labels)),
                    }
                rows.append(row)
            real = _real_features(run, shards, warmup, kept)
            rows.append({"learns_from": "real images", "auc": domain_auc(kept.vectors, real, config.seed)})
            return rows, {"kept": kept.vectors}

        return measured(run, STUDY, {}, [*keys, generators.key], compute)


def _synthetic(run: RunContext, teacher: Any, warmup: Warmup, generators: Generators, kept: Prototypes) -> Prototypes:
    """Draw again the vectors and labels that an arm's meta model trained on in place of ``kept``."""
    makers = zip(generators.clients, generators.results, strict=True)
    sources = ((k, warmup.client(k), made.load("generator")) for k, made in makers)
    return run.on_server(_drawn, warmup.weights, teacher.experts, teacher.index, sources, kept)


def _drawn(
    context: ClientContext, start: Weights, experts: tuple[Weights, ...], index: np.ndarray, sources: Any, kept: Any
) -> Prototypes:
    from ..distillation.teacher_training import expert_mean_logits, synthetic_prototypes

    return synthetic_prototypes(context, start, sources, expert_mean_logits(context, experts, index), kept)


def _features(context: ClientContext, weights: Weights, data: ImageSet) -> np.ndarray:
    from ..distillation.prototypes import extract_features

    shard = context.shard(data.images, data.labels)
    return extract_features(context.classifier(weights), shard, context.facts, context.config.runtime.precision)


def _real_features(run: RunContext, shards: Shards, warmup: Warmup, kept: Prototypes) -> np.ndarray:
    """Extract features of as many real images of each client as it has prototypes, with the model that made those."""
    by_client = run.config.prototypes.model == "client" and run.config.prototypes.rounds == "last"
    parts = []
    for client_id, count in zip(*np.unique(kept.clients, return_counts=True), strict=True):
        draws = numpy_stream(run.config.seed, "meta-training", "real", int(client_id))
        rows = draws.permutation(shards.train[client_id])[:count]
        data = run.dataset.train.take(rows)
        weights = warmup.client(int(client_id)) if by_client else warmup.weights
        parts.append(run.on_server(_features, weights, data))
    return np.concatenate(parts)


def figure(figure: Figure, rows: Sequence[Row], arrays: Mapping[str, np.ndarray]) -> None:
    """Draw the metrics of every seed by arm; a line joins the arms of one seed."""
    shown = {"accuracy": "test accuracy", "nll": "NLL, nats", "ece": "ECE", "auc": "AUC against prototypes"}
    for axes, (name, label) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        lacking = {row["learns_from"] for row in rows if row.get(name) is None}
        arms = [arm for arm in dict.fromkeys(row["learns_from"] for row in rows) if arm not in lacking]
        for seed in dict.fromkeys(row["seed"] for row in rows):
            found = {row["learns_from"]: row.get(name) for row in rows if row["seed"] == seed}
            axes.plot(range(len(arms)), [found[arm] for arm in arms], "o-", lw=0.8, mfc="none", label=f"seed {seed}")
        axes.set_xticks(range(len(arms)), [arm.replace("_", "\n").replace(" ", "\n") for arm in arms])
        axes.set(title=label, xlim=(-0.4, len(arms) - 0.6))
    axes.set_ylim(top=1.02)
    axes.axhline(0.5, color="0.6", lw=0.8)
    axes.legend(frameon=False)


STUDY = Study(
    "meta-training", measure, "learns_from",
    {
        "accuracy": ("test accuracy", ".1%"), "accuracy_difference": ("paired difference, points", "+.1%"),
        "nll": ("NLL", ".2f"), "ece": ("ECE", ".3f"), "auc": ("AUC", ".2f"),
        "label_distance": ("labels' distance", ".2f"),
    },
    figure, check,
)  # fmt: skip
