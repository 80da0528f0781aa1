"""Mosaic, data-free knowledge distillation via mixture-of-experts (arXiv 2505.19699): the method in its own order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...config.fields import shown
from ...config.schema import ExperimentConfig, GeneratorConfig
from ...core.about import About, Paper
from ...core.errors import RequestError
from ...core.types import DataFacts
from ...pipeline.graph import Graph
from ...pipeline.stages import rehearses
from ..base import Distilled, Method
from .graph import DISTILL, GENERATORS, PROTOTYPES, TEACHER, generator_stages

if TYPE_CHECKING:
    from ...pipeline.context import RunContext
    from ...pipeline.rounds import Warmup


class Mosaic(Method):
    """Generators on the clients, class experts and a meta model on the server, a student taught by both.

    With ``distill.steps = 0`` there is no teacher: the generators serve rehearsal in the closing rounds alone, which
    begin at the warm-up's model (docs/algorithm.md 1.10).
    """

    name = "mosaic"
    about = About(
        rounds="once, after the warm-up, and in the closing rounds", generators=True,
        statistics="class statistics or prototypes", label_counts="on the server",
        papers=(Paper(
            "liu2025mosaic",
            "Mosaic: Data-Free Knowledge Distillation via Mixture-of-Experts for Heterogeneous Distributed "
                "Environments",
            "", 2025,
            "Junming Liu, Yanting Gao, Siyuan Meng, Yifei Sun, Aoqi Wu, Yufei Jin, Yirong Chen, Ding Wang, "
                "Guosun Zeng",
            arxiv="2505.19699",
        ),),
    )  # fmt: skip
    stages = (GENERATORS, PROTOTYPES, TEACHER, DISTILL)

    def graph(self, config: ExperimentConfig) -> Graph:
        first = generator_stages(config)
        return (*first, *self.stages[1:]) if config.distill.steps else first

    def check(self, config: ExperimentConfig) -> None:
        if not config.distill.steps and not rehearses(config):
            raise RequestError(
                "distill.steps = 0: without distillation the generators serve rehearsal alone; set rehearsal.weight "
                "above 0, or rehearsal.candidates"
            )

    def check_networks(self, config: ExperimentConfig, facts: DataFacts) -> None:
        from ...models.classifiers import norm_depths
        from ...models.image_bank import check_image_scale

        section = config.generator
        if facts.modalities:
            _check_joint(section)
            return
        if section.family == "condensed":
            check_image_scale(section, facts.image_size)
        if section.family in ("cvae", "condensed") or not (config.generator.lambda_i > 0 and config.generator.tau > 0):
            return
        for name in dict.fromkeys((config.model.classifier, *config.model.classifiers)):
            shape = facts.num_classes, facts.channels, facts.image_size
            if not norm_depths(config.model, *shape, name, facts.modalities):
                raise RequestError(
                    f"model.classifier = {name}: it has no batch norm, and the generators' inversion loss reads its "
                    "statistics; give it one, or set generator.lambda_i=0"
                )

    def run(self, ctx: RunContext, warmup: Warmup) -> Distilled:
        # G. every client trains a generator beside its frozen classifier
        generators = ctx.run(GENERATORS, warmup)
        shared = generators.shared(ctx) if rehearses(ctx.config) else None
        if not ctx.config.distill.steps:
            return Distilled(warmup.weights, shared=shared)
        # Q. every client sends the prototypes of its classes
        prototypes = ctx.run(PROTOTYPES, warmup)
        # A, M. the server averages class experts, and trains the meta model that weighs their answers
        teacher = ctx.run(TEACHER, warmup, prototypes, generators)
        # KD. the student learns from the teacher on the generators' images
        student, held_out = ctx.run(DISTILL, warmup, prototypes, teacher, generators)
        return Distilled(student, held_out, teacher, shared)


def _check_joint(section: GeneratorConfig) -> None:
    """Raise ``RequestError`` where a client's generator cannot draw samples of several modalities."""
    for knob, wrong, instead in (
        ("family", not section.labelled or section.family == "condensed", "cvae or cgan"),
        ("feature_weight", section.feature_weight, "0"),
        ("diff_augment", section.diff_augment, "false"),
        ("discriminator", section.family != "cvae" and section.discriminator != "dcgan", "dcgan"),
        ("gan_range", section.family != "cvae" and section.gan_range == "model_norm", "pm1_then_renorm"),
    ):  # fmt: skip
        if wrong and section.steps + section.epochs:
            raise RequestError(
                f"generator.{knob} = {shown(getattr(section, knob))}: samples have several modalities, which "
                f"generators draw with generator.{knob}={instead} alone"
            )


MOSAIC = Mosaic()
