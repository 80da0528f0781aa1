"""Clients' compute: of a whole run, and of the control that gets more rounds for generators' or longer steps' cost.

The cost is counted, not timed: multiplications and additions of the convolutions and matrix products of one step, from
the shapes of the networks alone (docs/algorithm.md 1.12). Nothing is computed and no image is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.plugins import load, parts, trains_generators
from ..config.resolve import override
from ..config.schema import ExperimentConfig, GeneratorConfig
from ..core.errors import RequestError
from ..core.seeding import seeded
from ..core.types import DataFacts
from ..data.load import known_facts, load_dataset, shape_of
from ..pipeline.stages import rehearses, rehearses_early
from .plan import graph_of

#: Values of knobs by dotted name.
Point = Mapping[str, Any]

#: Beginnings of knobs that nothing reads without generators.
GENERATORS_ONLY = ("generator.", "rehearsal.", "distill.", "meta.", "student.")

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.classifiers import Classifier


def extra_rounds(config: ExperimentConfig, facts: DataFacts | None = None) -> int:
    """Return the rounds of local training that cost the clients as much as their generators, rounded up.

    All clients' costs are added up. A cohort makes a round cheaper, a strategy may make it dearer. ``facts``: the
    images', where they are at hand; those of a user's data may have to be read otherwise. ``RequestError`` where the
    number of steps follows from a client's images, or a network cannot be built without them.
    """
    section = config.generator
    for name in ("epochs",) + (("classifier_epochs",) if section.classifier_source == "fresh" else ()):
        if getattr(section, name):
            raise RequestError(
                f"generator.{name} = {getattr(section, name)}: equal client compute needs a number of steps that does "
                f"not follow from a client's images; set generator.{name}=0"
            )
    facts = facts or known_facts(config.data) or load_dataset(config.data).facts
    generators, step = client_costs(config, facts)
    asked = config.federation.cohort_size or config.partition.num_clients
    a_round = config.warmup.local_steps * step * asked / config.partition.num_clients * (_local_step(config) or 1.0)
    return math.ceil(section.steps * generators / a_round)


def longer_steps(config: ExperimentConfig) -> int:
    """Return the rounds of federated averaging that cost the clients what their strategy adds to it, rounded up.

    0 where its steps cost no more, or their cost is not known.
    """
    warmup, closing = config.warmup, config.finetune
    steps = warmup.num_rounds * warmup.local_steps + closing.num_rounds * closing.local_steps
    return math.ceil(((_local_step(config) or 1.0) - 1.0) * steps / warmup.local_steps - 1e-9)


def client_steps(config: ExperimentConfig) -> float | None:
    """Return what a run of ``config`` costs a client, in steps of plain local training: the mean over the clients.

    Counted are local steps (with what a strategy adds to each), generators' steps, and for rehearsal the synthetic
    images' part of a step, as if every client rehearsed. Passes over a client's images that train nothing (prototypes,
    statistics, scores) are not. None where the count does not follow from the configuration: epochs of generators,
    plug-ins' stages and objectives, rounds that train other networks, images of unknown shape.
    """
    from .communication import COMPARISONS

    each, clients, total = _local_step(config), config.partition.num_clients, 0.0
    # one count for all methods, seeds and omegas
    same = replace(config, seed=0, method="fedavg", partition=replace(config.partition, omega=1.0))
    try:
        if each is None or (facts := _shape(config)) is None:
            return None
        generators, step = client_costs(same, facts)
        synthetic = 0.0
        if rehearses(config) and trains_generators(config):
            synthetic = config.rehearsal.ratio * (1 + clients * _drawing(same, facts) / step)
        for stage in graph_of(config):
            work = {} if stage.name in COMPARISONS else stage.work(config)
            if stage.compute and not stage.compute.startswith("mosaic_ray."):
                return None
            if stage.name == "generators":
                if work.keys() != {"steps"}:
                    return None
                total += work["steps"] * generators / step
            elif stage.kind in ("warmup", "rounds"):
                early = stage.name == "warmup" and rehearses_early(config)
                rehearsed = synthetic if early or (stage.kind == "rounds" and stage.name != "trial_0") else 0.0
                answers = work.get("local steps", 0) * (1 - config.federation.drop_rate)
                total += (each + rehearsed) * answers / clients
            elif {"client rounds", "local steps"} & work.keys():
                return None
    except RequestError:
        return None
    return total


def _local_step(config: ExperimentConfig) -> float | None:
    """Return the operations of a local step under the strategy of ``config``, in those of plain training."""
    from ..federated.strategies.base import Strategy

    costs = [
        1.0 if each.step_cost is None and type(each).objective is Strategy.objective else each.step_cost
        for each in (load("strategies", word) for word in parts(config.federation.strategy))
    ]
    return None if None in costs else 1.0 + sum(cost - 1.0 for cost in costs)


def _shape(config: ExperimentConfig) -> DataFacts | None:
    """Return the form of the samples without reading any, as far as a count needs it; None where it is not known."""
    facts = known_facts(config.data)
    if facts and facts.modalities:
        return facts
    shape, data = shape_of(config.data), config.data
    if shape is None or not (side := data.image_size or shape.side):
        return None
    return DataFacts("", shape.classes, data.channels or shape.channels, side, (), ())


@lru_cache(maxsize=32)
def _drawing(config: ExperimentConfig, facts: DataFacts) -> int:
    """Return the operations of drawing one mini-batch of synthetic images."""
    import torch

    from ..distillation.generator_training import generator_for

    knobs, count = config.generator, config.warmup.batch_size
    with torch.device("meta"):
        generator = generator_for(knobs, facts)
        z, labels = torch.empty(count, knobs.latent_dim), torch.empty(count, dtype=torch.long)
    return operations(lambda: generator(z, *((labels,) if knobs.labelled else ())))


@lru_cache(maxsize=32)
def client_costs(config: ExperimentConfig, facts: DataFacts) -> tuple[int, int]:
    """Return the operations of one step of every client's generator, and of one step of its classifier, summed up."""
    from ..execution.actor_pool import first_line
    from ..federated.client_models import Federation

    federation = Federation(config, facts)
    layouts = list(zip(federation.classifiers, federation.widths, strict=True))
    try:
        costs = {layout: _costs(config, facts, federation, *layout) for layout in dict.fromkeys(layouts)}
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise RequestError(f"equal client compute: a step cannot be counted: {first_line(error)}") from error
    generators, steps = (sum(costs[layout][part] for layout in layouts) for part in (0, 1))
    return generators, steps


def _costs(config: ExperimentConfig, facts: DataFacts, federation: Any, name: str, width: float) -> tuple[int, int]:
    from ..models.classifiers import build_classifier
    from ..models.submodel import fit

    with seeded(0, "counted"):  # the global stream stays as it was
        shape = facts.num_classes, facts.channels, facts.image_size
        model = build_classifier(config.model, *shape, name, facts.modalities)
    if width < 1:
        model = fit(model, {n: np.zeros(*entry) for n, entry in federation.entries(name, width).items()})
    model, share = model.to("meta"), config.generator.matching_global
    if config.generator.family == "condensed":
        known, random = (operations(partial(_condensed_step, config, facts, each)) for each in (model, None))
        generator = round(share * known + (1 - share) * random)
    else:
        generator = operations(lambda: _generator_step(config, facts, model))
    return generator, operations(lambda: _classifier_step(config, facts, model))


def operations(step: Callable[[], None]) -> int:
    """Return the floating-point operations of the convolutions and matrix products in ``step``."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def _images(facts: DataFacts, count: int) -> Tensor:
    import torch

    return torch.empty(count, *facts.input_shape, device="meta")


def _classifier_step(config: ExperimentConfig, facts: DataFacts, model: Classifier) -> None:
    """Do what ``federated.local_training`` does in a step, as far as it costs operations."""
    model.requires_grad_(True).train()
    model(_images(facts, config.warmup.batch_size)).sum().backward()


def _condensed_step(config: ExperimentConfig, facts: DataFacts, model: Classifier | None) -> None:
    """Do what ``distillation.condensation`` does in a step; in the features of ``model``, or of a random network."""
    import torch

    from ..distillation.condensation import global_features, matching_loss, random_features, random_network
    from ..models.state_dict import freeze

    knobs, real = config.generator, _images(facts, config.generator.batch_size)
    with torch.device("meta"):
        network = random_network(facts.channels, knobs.matching_channels, facts.image_size)
        made = torch.empty(knobs.images_per_class, *facts.input_shape, requires_grad=True)
    plain = replace(facts, mean=(0.0,) * facts.channels, std=(1.0,) * facts.channels)  # known without the images
    features = random_features(network) if model is None else global_features(freeze(model), plain)
    matching_loss(features, real, made, torch.Generator()).backward()


def _generator_step(config: ExperimentConfig, facts: DataFacts, model: Classifier) -> None:
    """Do what ``distillation.generator_training`` or ``cvae_training`` does in a step, as in ``_classifier_step``."""
    import torch

    from ..models.discriminator import SharedTrunkDiscriminator, build_discriminator
    from ..models.encoder import build_encoder
    from ..models.generator import build_generator
    from ..models.multimodal_generator import MultimodalEncoder, MultimodalGenerator
    from ..models.state_dict import freeze

    knobs, shape = config.generator, (facts.channels, facts.image_size, facts.num_classes)
    real, labels = _images(facts, knobs.batch_size), torch.empty(knobs.batch_size, dtype=torch.long, device="meta")
    z = torch.empty(knobs.batch_size, knobs.latent_dim, device="meta")
    with torch.device("meta"):
        if facts.modalities and knobs.family != "cvae":
            _joint_step(knobs, facts, freeze(model), real, labels, z)
            return
        if facts.modalities:
            mean, spread = MultimodalEncoder(knobs, facts.modalities, facts.num_classes)(real, labels)
            parts = MultimodalGenerator(knobs, facts.modalities, facts.num_classes).parts(mean + spread * z, labels)
            torch.cat([part.flatten(1) for part in parts.values()], 1).sum().backward()
            return
        generator = build_generator(knobs, *shape)
        if knobs.family == "cvae":
            mean, spread = build_encoder(knobs, *shape)(real, labels)
            drawn = generator(mean + spread * z, labels)
            if knobs.feature_weight:
                with torch.no_grad():
                    model.features(real)
                drawn = freeze(model).features(drawn)
            drawn.sum().backward()
            return
        freeze(model)
        judge = (
            build_discriminator(knobs, *shape) if knobs.discriminator == "dcgan"
            else SharedTrunkDiscriminator(model, generator.num_classes)
        )  # fmt: skip
    asked = (labels,) if knobs.labelled else ()
    fake = generator(z, *asked)
    (judge(real, *asked) + judge(fake.detach(), *asked)).sum().backward()
    (judge(fake, *asked).sum() + model(fake).sum()).backward()


def _joint_step(
    knobs: GeneratorConfig, facts: DataFacts, model: Classifier, rows: Tensor, labels: Tensor, z: Tensor
) -> None:
    """Do what a step of a GAN for several modalities does; all of it is on the device meta."""
    from ..distillation.generator_training import relaxed
    from ..models.joint_discriminator import JointDiscriminator, read_samples, relaxed_texts
    from ..models.multimodal_generator import MultimodalGenerator

    generator = MultimodalGenerator(knobs, facts.modalities, facts.num_classes)
    judge = JointDiscriminator(knobs, facts.modalities, facts.num_classes)
    real, found = read_samples(rows, facts.modalities), generator.parts(z, labels)
    fake, texts = relaxed(found, real, len(z), facts)
    (judge(real, labels) + judge(fake.detach(), labels)).sum().backward()
    with relaxed_texts(model, texts):
        seen = model(generator.rows(found, len(z)))
    (judge(fake, labels).sum() + seen.sum()).backward()


def with_controls(config: ExperimentConfig, points: Sequence[Point]) -> tuple[Point, ...]:
    """Return ``points`` and the control of each that costs clients more than federated averaging.

    Where generators do, it is the same strategy with ``extra_rounds`` more; where the strategy's steps do, it is plain
    averaging with ``longer_steps`` more. Points change knobs of ``config``. ``RequestError`` where none costs more.
    """
    controls = list[Point]()
    for point in points:
        there = override(config, point)
        rounds = there.warmup.num_rounds
        if trains_generators(there):
            plain = {name: value for name, value in point.items() if not name.startswith(GENERATORS_ONLY)}
            controls.append({**plain, "method": "fedavg", "warmup.num_rounds": rounds + extra_rounds(there)})
        elif more := longer_steps(there):
            plain = {name: value for name, value in point.items() if name != "federation.strategy"}
            plain |= {} if config.federation.strategy == "fedavg" else {"federation.strategy": "fedavg"}
            controls.append({**plain, "method": "fedavg", "warmup.num_rounds": rounds + more})
    if not controls:
        raise RequestError("--equal-compute: none of --methods trains generators on the clients, or takes longer steps")
    return (*points, *(control for i, control in enumerate(controls) if control not in controls[:i]))


def label(more: int) -> str:
    """Return the name of the control with ``more`` rounds."""
    return f"fedavg, equal client compute (+{more} rounds)"
