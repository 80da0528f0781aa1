"""The method ``fedcvae``: FedCVAE-Ens (Heinbaugh, Luz-Ricca and Shao, "Data-Free One-Shot Federated Learning Under Very
High Statistical Heterogeneity", ICLR 2023). The server trains on images with labels from the clients' decoders.

Every client trains a conditional variational autoencoder and sends its decoder: the stage ``generators`` of Mosaic with
``generator.family=cvae``, and the two methods share its results. The server asks decoder k for n_k / n of all images,
with labels drawn from the client's label shares and z from N(0, I) cut off at -1 and 1, and minimises cross-entropy
(docs/algorithm.md 3.21).

Defaults: the command of the authors' README and ``servers/server_fed_cvae_kd.py`` (ceh-2000/fed_cvae): five passes of
Adam over batches of 32, 1,000 images for MNIST (2,000 here). Adam's rate of 1e-3 is torch's default. Where it differs:
with ``fedcvae.start`` = global the student begins at the warm-up's model, and at a network as drawn with ``random``, as
theirs does; decoder and encoder are this package's; labels are a systematic sample of the shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.fields import knob
from ..config.plugins import own_knobs, section_of
from ..core.about import About, Paper
from ..core.errors import RequestError
from ..pipeline.graph import Graph, KeyInputs, Knobs, Stage
from ..pipeline.stages import driver_knobs, rehearses
from .base import Distilled, Method
from .mosaic.graph import GENERATORS, generator_stages
from .server_side import in_parts, settled, student_of

if TYPE_CHECKING:
    from ..config.schema import ExperimentConfig
    from ..core.types import Weights
    from ..distillation.ensemble import State
    from ..federated.client import ClientContext
    from ..pipeline.context import RunContext
    from ..pipeline.rounds import Warmup
    from .mosaic.client_uploads import Generators


@dataclass(frozen=True)
class FedCvaeKnobs:
    start: str = knob(
        "global", "the student's first weights: the warm-up's, or as drawn at the start", choices=("global", "random")
    )
    samples: int = knob(2000, "images drawn from all decoders together", low=1, high=10_000_000)
    truncation: float = knob(1.0, "largest absolute value of an entry of z; 0: no limit", low=0.0)
    epochs: int = knob(5, "passes over these images", low=1)
    batch_size: int = knob(32, "images of a step", low=2)
    lr: float = knob(1e-3, "Adam learning rate", above=0.0)
    bn: str = knob(
        "frozen", "batch-norm statistics of the student meanwhile; running with start = random",
        choices=("frozen", "running"),
    )  # fmt: skip


def _knobs(inputs: KeyInputs) -> Knobs:
    return own_knobs(inputs.config, "fedcvae") | {"seed": inputs.config.seed} | driver_knobs(inputs.config)


def _own(config: ExperimentConfig) -> FedCvaeKnobs:
    return settled(section_of(config, "fedcvae", FedCvaeKnobs))


def _steps(config: ExperimentConfig) -> dict[str, int]:
    own = _own(config)
    return {"steps": own.epochs * -(-own.samples // own.batch_size)}


LEARN = Stage(
    "distill", 1, _knobs, "mosaic_ray.methods.fedcvae:learn", upstream=("partition", "warmup", "generators"),
    kind="fedcvae", role="distilled", unit="pass", total=lambda config: _own(config).epochs, work=_steps,
)  # fmt: skip


class FedCvae(Method):
    """The server learns from decoders' images and the labels that they were asked for."""

    name = "fedcvae"
    images_only = True
    about = About(
        rounds="once, after the warm-up", generators=True, label_counts="on the server",
        papers=(Paper(
            "heinbaugh2023data",
            "Data-Free One-Shot Federated Learning Under Very High Statistical Heterogeneity", "ICLR", 2023,
            "Clare Elizabeth Heinbaugh, Emilio Luz-Ricca, Huajie Shao", url="https://openreview.net/forum?id=_hb4vM3jspB",
        ),),
    )  # fmt: skip
    knobs = FedCvaeKnobs
    stages = (GENERATORS, LEARN)

    def graph(self, config: ExperimentConfig) -> Graph:
        return (*generator_stages(config), LEARN)

    def check(self, config: ExperimentConfig) -> None:
        if config.generator.family != "cvae":
            raise RequestError(
                f"method fedcvae: its clients train variational autoencoders, and generator.family = "
                f"{config.generator.family}; set generator.family=cvae"
            )

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled:
        generators = ctx.run(GENERATORS, warmup)
        student = ctx.run(LEARN, warmup, generators)
        return Distilled(student, shared=generators.shared(ctx) if rehearses(ctx.config) else None)


def learn(ctx: RunContext, stage: Stage, warmup: Warmup, generators: Generators) -> Weights:
    """Return the student that learnt from the decoders' images."""
    from ..distillation.ensemble import first_student, learn_labels
    from ..distillation.generator_training import allocate

    own, start = _own(ctx.config), first_student(ctx.client_context, warmup.weights, _own(ctx.config).start)

    def begin() -> State:
        sizes = ctx.shards.sizes[generators.clients]
        counts = allocate(sizes / sizes.sum(), own.samples)
        drawn = [(k, w, int(n)) for k, w, n in zip(generators.clients, generators.weights(), counts, strict=True)]
        return {"global": start, "images": ctx.on_server(draw_images, drawn, own.truncation)}

    result = in_parts(ctx, stage, begin, learn_labels, own, "fedcvae", every=1)
    return student_of(ctx, stage, result)


def draw_images(context: ClientContext, decoders: list[tuple[int, Weights, int]], truncation: float) -> Weights:
    """Draw images (uint8) and labels from ``decoders``: (client, weights, number of images).

    Entries of z are drawn by the inverse of the normal distribution cut off at -truncation and truncation.
    """
    import numpy as np
    import torch

    from ..core.seeding import stream
    from ..distillation.generator_training import draw, load_generator, to_pixels
    from ..models.state_dict import use_precision

    config, facts = context.config, context.facts
    images, labels = [], []
    for done, (client_id, weights, count) in enumerate(decoders, 1):
        if count:
            decoder = load_generator(config.generator, facts, weights).to(context.device)
            draws = stream(config.seed, "fedcvae", "z", client_id)
            z, asked = draw(decoder, count, draws, context.device)
            if truncation:
                inside = torch.special.ndtr(torch.tensor(truncation, dtype=torch.float64)) * 2 - 1
                uniform = torch.rand(z.shape, generator=draws, dtype=torch.float64) * 2 - 1
                z = torch.special.ndtri((uniform * inside + 1) / 2).float().to(context.device)
            with torch.no_grad(), use_precision(config.runtime.precision, context.device):
                drawn = [decoder(*part).float() for part in zip(z.split(500), asked.split(500), strict=True)]
            images.append(to_pixels(torch.cat(drawn), config.generator.gan_range, facts))
            labels.append(asked.cpu().numpy())
        context.progress(done, len(decoders))
    return {"images": np.concatenate(images), "labels": np.concatenate(labels)}


FEDCVAE = FedCvae()
