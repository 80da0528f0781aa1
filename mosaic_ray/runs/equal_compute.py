"""The control with equal client compute: federated averaging with more rounds, as many as the generators cost.

The cost is counted, not timed: multiplications and additions of the convolutions and matrix products of one step, from
the shapes of the networks alone (docs/algorithm.md 1.12). Nothing is computed and no image is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.plugins import trains_generators
from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.seeding import seeded
from ..core.types import DataFacts
from ..data.load import known_facts, load_dataset

#: Values of knobs by dotted name.
Point = Mapping[str, Any]

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.classifiers import Classifier


def extra_rounds(config: ExperimentConfig, facts: DataFacts | None = None) -> int:
    """Return the rounds of local training that cost the clients as much as their generators, rounded up.

    All clients' costs are added up. A cohort makes a round cheaper. ``facts``: the images', where they are at hand;
    those of a user's data may have to be read otherwise. ``RequestError`` where the number of steps follows
    from a client's images, or a network cannot be built without them.
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
    a_round = config.warmup.local_steps * step * asked / config.partition.num_clients
    return math.ceil(section.steps * generators / a_round)


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
        model = build_classifier(config.model, facts.num_classes, facts.channels, facts.image_size, name)
    if width < 1:
        model = fit(model, {n: np.zeros(*entry) for n, entry in federation.entries(name, width).items()})
    model = model.to("meta")
    return operations(lambda: _generator_step(config, facts, model)), operations(
        lambda: _classifier_step(config, facts, model)
    )


def operations(step: Callable[[], None]) -> int:
    """Return the floating-point operations of the convolutions and matrix products in ``step``."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def _images(facts: DataFacts, count: int) -> Tensor:
    import torch

    return torch.empty(count, facts.channels, facts.image_size, facts.image_size, device="meta")


def _classifier_step(config: ExperimentConfig, facts: DataFacts, model: Classifier) -> None:
    """Do what ``federated.local_training`` does in a step, as far as it costs operations."""
    model.requires_grad_(True).train()
    model(_images(facts, config.warmup.batch_size)).sum().backward()


def _generator_step(config: ExperimentConfig, facts: DataFacts, model: Classifier) -> None:
    """Do what ``distillation.generator_training`` or ``cvae_training`` does in a step, as in ``_classifier_step``."""
    import torch

    from ..models.discriminator import SharedTrunkDiscriminator, build_discriminator
    from ..models.encoder import build_encoder
    from ..models.generator import build_generator
    from ..models.state_dict import freeze

    knobs, shape = config.generator, (facts.channels, facts.image_size, facts.num_classes)
    real, labels = _images(facts, knobs.batch_size), torch.empty(knobs.batch_size, dtype=torch.long, device="meta")
    z = torch.empty(knobs.batch_size, knobs.latent_dim, device="meta")
    with torch.device("meta"):
        generator = build_generator(knobs, *shape)
        if knobs.family == "cvae":
            mean, spread = build_encoder(knobs, *shape)(real, labels)
            generator(mean + spread * z, labels).sum().backward()
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


def with_controls(config: ExperimentConfig, points: Sequence[Point]) -> tuple[Point, ...]:
    """Return ``points`` and the control of each that trains generators: federated averaging with ``extra_rounds`` more.

    Points change knobs of ``config``. ``RequestError`` where none trains generators.
    """
    configs = [override(config, point) for point in points]
    controls = [
        {**point, "method": "fedavg", "warmup.num_rounds": config.warmup.num_rounds + extra_rounds(there)}
        for point, there in zip(points, configs, strict=True) if trains_generators(there)
    ]  # fmt: skip
    if not controls:
        raise RequestError("--equal-compute: none of --methods trains generators on the clients")
    return (*points, *(control for i, control in enumerate(controls) if control not in controls[:i]))


def control_labels(points: Sequence[Point], num_rounds: int) -> dict[int, str]:
    """Return the names of the controls among the points of a comparison, by number; others have ``num_rounds``."""
    rounds = {number: point["warmup.num_rounds"] for number, point in enumerate(points) if "warmup.num_rounds" in point}
    return {number: label(found - num_rounds) for number, found in rounds.items()}


def label(more: int) -> str:
    """Return the name of the control with ``more`` rounds."""
    return f"fedavg, equal client compute (+{more} rounds)"
