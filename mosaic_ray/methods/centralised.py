"""The method ``centralised``: NOT FEDERATED. An upper bound: the student trained on all clients' images in one place.

It is the warm-up with one client that holds all images: as many rounds, with as many steps a round as all clients of a
round take together, the same loss, batch size, learning rate and its decay, from the same first weights. No federation
could do it, so it sends nothing in the count of bytes; in truth every image would go up. The finding
``method.not_federated`` says so in each result. Read its accuracy as ``distilled``; the closing rounds are federated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..core.about import About
from ..core.health import NOT_FEDERATED
from ..pipeline.graph import KeyInputs, Knobs, Stage
from ..pipeline.stages import driver_knobs, model_knobs, numbers_depend_on
from .base import Distilled, Method
from .server_side import in_parts, student_of

if TYPE_CHECKING:
    from ..config.schema import ExperimentConfig
    from ..core.types import ImageSet, Weights
    from ..distillation.ensemble import Report, State
    from ..federated.client import ClientContext
    from ..pipeline.context import RunContext
    from ..pipeline.rounds import Warmup


def _steps(config: ExperimentConfig) -> int:
    """Return the steps of a round."""
    clients = config.partition.num_clients
    return config.warmup.local_steps * min(config.federation.cohort_size or clients, clients)


def _knobs(inputs: KeyInputs) -> Knobs:
    from ..config.fields import changed_knobs

    config = inputs.config
    return {
        "warmup": changed_knobs(config.warmup, "checkpoint_rounds", "local_steps", "bn"), "steps": _steps(config),
        "model": model_knobs(config), "seed": config.seed, "runtime": numbers_depend_on(config),
    } | driver_knobs(config)  # fmt: skip


POOLED = Stage(
    "distill", 1, _knobs, "mosaic_ray.methods.centralised:train", upstream=("partition",), kind="centralised",
    role="distilled", total=lambda config: config.warmup.num_rounds,
    work=lambda config: {"server steps": config.warmup.num_rounds * _steps(config)},
)  # fmt: skip


class Centralised(Method):
    """Training on all images in one place: not federated."""

    name = "centralised"
    about = About(rounds="once; it is not federated", data_free=False)
    stages = (POOLED,)

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled:
        return Distilled(ctx.run(POOLED))


def train(ctx: RunContext, stage: Stage) -> Weights:
    """Return the student trained on all clients' training images."""
    import numpy as np

    from ..federated.client import initial_weights

    rows = np.sort(np.concatenate(ctx.shards.train)).astype(np.int64)

    finding = NOT_FEDERATED.finding("the student was trained on all clients' images in one place", len(rows))

    def begin() -> State:
        return {"global": initial_weights(ctx.client_context)}

    result = in_parts(
        ctx, stage, begin, train_rounds, ctx.dataset.train.take(rows), every=ctx.config.warmup.checkpoint_rounds,
        findings=(finding,),
    )  # fmt: skip
    return student_of(ctx, stage, result)


def train_rounds(
    context: ClientContext, state: State, begin: int, end: int, images: ImageSet, report: Report
) -> State:
    """Do the rounds ``begin`` to ``end``."""
    from ..federated.local_training import LocalTrainingConfig, train_locally
    from ..models.state_dict import to_weights

    config, section = context.config, context.config.warmup
    shard, steps = context.shard(images.images, images.labels), _steps(config)
    model = context.classifier(state["global"])
    for number in range(begin, end):
        plan = LocalTrainingConfig(
            steps, section.batch_size, section.lr * section.lr_decay**number, section.weight_decay, section.momentum,
            section.shuffle, loss=section.loss,
        )  # fmt: skip
        address = config.seed, "centralised", number, 0
        metrics = train_locally(
            model, shard, plan, context.facts, address, config.runtime.precision, progress=context.progress
        )
        report(number + 1, {"loss": metrics["loss"], "accuracy": metrics["accuracy"]})
    return {"global": to_weights(model)}


CENTRALISED = Centralised()
