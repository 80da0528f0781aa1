"""What methods share whose work is on the server: their common knobs, and stages that are computed in parts.

``distillation.ensemble`` has the loops. No torch here: keys and dry runs load every method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..config.fields import knob
from ..config.plugins import own_knobs, section_of
from ..core.errors import RequestError
from ..core.types import Finding, Weights
from ..pipeline.graph import Graph, KeyInputs, Knobs, Stage
from ..pipeline.stages import driver_knobs, student_network
from .base import Distilled, Method

if TYPE_CHECKING:
    from ..config.schema import ExperimentConfig
    from ..core.types import DataFacts
    from ..distillation.ensemble import Game, PoolRule, State
    from ..federated.client_models import Models
    from ..models.classifiers import Classifier
    from ..pipeline.context import Facts, RunContext
    from ..pipeline.rounds import FinishedRound, Warmup
    from ..storage.store import StageResult, StageWriter
    from ..tracking.progress import StageProgress

_HERE = "mosaic_ray.methods.server_side"
T = TypeVar("T")

#: The parts of the server's state that a result holds; optimizers and images are in checkpoints alone.
KEPT = {"global", "ensemble"}


@dataclass(frozen=True)
class GeneratorKnobs:
    """The server's generator (``models.generator``), and the student beside it."""

    latent_dim: int = knob(100, "size of z", low=1)
    channels: int = knob(32, "channels of the server's generator", low=1)
    batch_size: int = knob(64, "synthetic images of a step", low=2)
    bn: str = knob("frozen", "batch-norm statistics of the student meanwhile", choices=("frozen", "running"))


@dataclass(frozen=True)
class PoolKnobs(GeneratorKnobs):
    """Knobs of methods that teach from a pool of images."""

    bn: str = knob(
        "frozen", "batch-norm statistics of the student meanwhile; running with start = random",
        choices=("frozen", "running"),
    )  # fmt: skip
    start: str = knob(
        "global", "the student's first weights: the warm-up's, or as drawn at the start", choices=("global", "random")
    )
    epochs: int = knob(20, "epochs, each with a new generator and a new batch of images", low=1)
    generator_steps: int = knob(30, "steps of a generator and its latents", low=0)
    generator_lr: float = knob(1e-3, "Adam learning rate of both", above=0.0)
    bn_weight: float = knob(1.0, "weight of the batch norms' inversion loss", low=0.0)
    adversarial_weight: float = knob(1.0, "weight of the student's disagreement in the loss of images", low=0.0)
    student_steps: int = knob(20, "the student's steps an epoch, on images of the pool", low=1)
    lr: float = knob(5e-3, "SGD learning rate of the student", above=0.0)
    momentum: float = knob(0.9, "SGD momentum", low=0.0, high=0.999)
    weight_decay: float = knob(0.0, "SGD weight decay", low=0.0)
    temperature: float = knob(20.0, "T of the student's loss", above=0.0)


@dataclass(frozen=True)
class RoundKnobs(GeneratorKnobs):
    """Knobs of methods that fine-tune the global model after every round."""

    turns: int = knob(10, "turns of generator and student after a round", low=0)
    student_steps: int = knob(5, "the student's steps a turn", low=1)
    generator_lr: float = knob(0.01, "Adam learning rate of the generator", above=0.0)
    lr: float = knob(0.01, "SGD learning rate of the student", above=0.0)


def settled(own: T) -> T:
    """Return knobs with ``bn`` = running where the student starts as drawn, with no statistics of images."""
    return replace(own, bn="running") if own.start == "random" else own  # type: ignore[attr-defined, type-var]


def needs_rounds(method: Method, config: ExperimentConfig) -> None:
    """Raise ``RequestError`` where no client trains a model that could teach."""
    if not config.warmup.num_rounds:
        raise RequestError(
            f"method {method.name}: clients' models teach, so they have to train; set warmup.num_rounds above 0"
        )


def uploaded_models(warmup: Warmup) -> dict[int, Weights]:
    """Return the models that clients sent in the last round of the warm-up, by client."""
    clients = range(len(warmup.federation.classifiers))
    return {k: warmup.client(k) for k in clients if warmup.trained(k)}


def in_parts(
    ctx: RunContext, stage: Stage, begin: Callable[[], State], work: Callable[..., State], *arguments: Any,
    every: int, findings: tuple[Finding, ...] = (), network: str = "",
) -> StageResult:  # fmt: skip
    """Return a stage's result; compute it in parts of ``every`` units, with a checkpoint after each.

    ``work(context, state, begin, end, *arguments, report=...)`` runs on the server and returns the new state, whose
    parts ``KEPT`` are the result; ``begin()`` returns the first one. A run that was killed goes on at the last
    checkpoint and ends with the same numbers. ``network``: the student's architecture, if it is ``model.student``; the
    result then has the part ``student`` for it.
    """
    from ..pipeline.stored import check_entries, check_facts

    [key] = ctx.client_keys(stage)
    trained = network or ctx.config.model.classifier

    def compute(writer: StageWriter, progress: StageProgress) -> Facts:
        checkpoint, total = ctx.store.load_checkpoint(key), stage.total(ctx.config)
        state, done = begin() if checkpoint is None else {}, 0
        if checkpoint is not None:
            with checkpoint.read_as("checkpoint"):
                check_facts(checkpoint.facts)
                state, done = {part: checkpoint.load(part) for part in checkpoint.parts}, checkpoint.facts["done"]
                check_entries(state["global"], ctx.client_context.federation.entries(trained))
                if not 0 < done < total:
                    raise ValueError(f"it was made after {done} of {total}")
            progress.resume(checkpoint.facts["curve"], done)

        def report(step: int, metrics: Mapping[str, float]) -> None:
            nonlocal done
            for name, value in metrics.items():
                progress.scalar(f"{stage.kind or stage.name}/{name}", step, value)
            progress.advance(step - done, note=f"loss {metrics['loss']:.3f}")
            done = step

        while done < total:
            first, last = done, min(done + every, total)
            state = ctx.on_server(work, state, first, last, *arguments, report=report)
            state, done = {part: arrays for part, arrays in state.items() if arrays}, last
            if done < total:
                ctx.store.save_checkpoint(key, {"done": done, "curve": [list(r) for r in progress.recorded]}, state)
        for part in KEPT & state.keys():
            writer.add("student" if network and part == "global" else part, state[part])
        return {"findings": [finding.to_json() for finding in findings]}

    return ctx.find_or_compute(stage, compute)


def student_of(ctx: RunContext, stage: Stage, result: StageResult) -> Weights:
    """Return the student that a stage made, with its accuracy on validation images logged."""
    from ..pipeline.evaluate import log_validation

    student = result.load("global")
    log_validation(ctx, stage.name, stage.total(ctx.config), result.key, student)
    return student


class PoolMethod(Method):
    """A method after the warm-up that teaches from a pool of images (``ensemble.teach_from_pool``)."""

    knobs: type[PoolKnobs]
    images_only = True

    def __init__(self) -> None:
        self.stage = Stage(
            "distill", 1, self._knobs, f"{_HERE}:teach", upstream=("warmup",), kind=self.name, role="distilled",
            unit="epoch", total=lambda config: self.own(config).epochs, work=self._work,
        )  # fmt: skip
        self.new_student = Stage(
            "server_student", 1, self._new_knobs, f"{_HERE}:teach_new", upstream=("warmup",),
            kind=f"{self.name}_student", role="server_student", unit="epoch",
            total=lambda config: self.own(config).epochs, work=self._work,
        )  # fmt: skip
        self.stages = (self.stage,)

    def graph(self, config: ExperimentConfig) -> Graph:
        return (self.stage, self.new_student) if config.model.student else self.stages

    def own(self, config: ExperimentConfig) -> PoolKnobs:
        """Return its knobs."""
        return settled(section_of(config, self.name, self.knobs))

    def _knobs(self, inputs: KeyInputs) -> Knobs:
        return own_knobs(inputs.config, self.name) | {"seed": inputs.config.seed} | driver_knobs(inputs.config)

    def _new_knobs(self, inputs: KeyInputs) -> Knobs:
        return self._knobs(inputs) | student_network(inputs.config)

    def _work(self, config: ExperimentConfig) -> dict[str, int]:
        own = self.own(config)
        return {"steps": own.epochs * (own.generator_steps + own.student_steps)}

    def check(self, config: ExperimentConfig) -> None:
        needs_rounds(self, config)

    def check_networks(self, config: ExperimentConfig, facts: DataFacts) -> None:
        from ..models.classifiers import norm_depths

        names = dict.fromkeys((config.model.classifier, *config.model.classifiers))
        shape = facts.num_classes, facts.channels, facts.image_size
        if self.own(config).bn_weight and not any(norm_depths(config.model, *shape, name) for name in names):
            raise RequestError(
                f"model.classifier = {config.model.classifier}: it has no batch norm for the inversion loss to read; "
                f"set {self.name}.bn_weight=0"
            )

    def rule(self, config: ExperimentConfig) -> PoolRule:
        """Return its losses."""
        raise NotImplementedError

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled:
        student = ctx.run(self.stage, warmup, self)
        new = ctx.run(self.new_student, warmup, self) if ctx.config.model.student else None
        return Distilled(student, new_student=new)


def teach(ctx: RunContext, stage: Stage, warmup: Warmup, method: PoolMethod) -> Weights:
    """Return the student that the clients' ensemble taught."""
    from ..distillation.ensemble import first_student, teach_from_pool

    start = method.own(ctx.config).start

    def begin() -> State:
        return {"global": first_student(ctx.client_context, warmup.weights, start)}

    clients, rule = uploaded_models(warmup), method.rule(ctx.config)
    return student_of(ctx, stage, in_parts(ctx, stage, begin, teach_from_pool, clients, rule, every=5))


def teach_new(ctx: RunContext, stage: Stage, warmup: Warmup, method: PoolMethod) -> Classifier:
    """Return ``model.student``, which begins as drawn and which the clients' ensemble taught from a pool of its own."""
    from ..distillation.ensemble import teach_from_pool
    from ..distillation.server_student import first_weights

    network, rule = ctx.config.model.student, method.rule(ctx.config)
    rule = replace(rule, knobs=replace(rule.knobs, bn="running"))

    def begin() -> State:
        return {"global": first_weights(ctx.client_context)}

    clients = uploaded_models(warmup)
    result = in_parts(ctx, stage, begin, teach_from_pool, clients, rule, network, every=5, network=network)
    with result.read_as("student"):
        return ctx.client_context.classifier(result.load("student"), network)


def fine_tune(ctx: RunContext, finished: FinishedRound, game: Game, knobs: Any) -> tuple[Models, Weights]:
    """Let generator and student take turns after a round; other architectures' global models stay as they are."""
    from functools import partial

    from ..distillation.ensemble import take_turns

    federation = ctx.client_context.federation
    clients = {update.client_id: update.weights for update in finished.updates}
    if not clients or not knobs.turns:
        return finished.models, finished.state
    inside = ctx.tracker.inside("turn", units=0.0)
    student, state, _ = ctx.on_server(
        take_turns, game, knobs, finished.models[federation.student], finished.state, clients,
        ctx.shards.counts[list(clients)], finished.round_num, progress=partial(inside, 0),
    )  # fmt: skip
    inside.close()
    return finished.models | {federation.student: student}, state
