"""The stages of Mosaic: generators and prototypes on the clients, teacher and distillation on the server."""

from __future__ import annotations

from ...config.client_layout import any_partial_width, groups
from ...config.fields import changed_knobs
from ...config.schema import ExperimentConfig
from ...pipeline.graph import Graph, KeyInputs, Knobs, Stage, Work
from ...pipeline.stages import (
    driver_knobs,
    federation_knobs,
    model_knobs,
    numbers_depend_on,
    prototype_knobs,
    prototype_split,
)
from ..statistics_heads import JUDGE

#: Knobs that act where the inversion loss does.
INVERSION = ("tau", "lambda_i", "inversion_scale", "inversion_network")

_HERE = "mosaic_ray.methods.mosaic"


def _generator_knobs(inputs: KeyInputs) -> Knobs:
    config = inputs.config
    common = {"model": model_knobs(config), "seed": config.seed, "runtime": numbers_depend_on(config)}
    if config.generator.classifier_source == "fresh":
        common["fresh"] = [config.warmup.batch_size, config.warmup.shuffle]
    if any_partial_width(config):  # which channels a client holds shows in no upstream key of "start"
        common["federation"] = federation_knobs(config)
    return common


def _client_knobs(inputs: KeyInputs, client_id: int) -> Knobs:
    """A client with n_k >= tau never meets the inversion term: its key leaves the term out (O15)."""
    section = inputs.config.generator
    small = inputs.sizes is None or inputs.sizes[client_id] < section.tau
    gan = section.family in ("dcgan", "cgan")
    inverts = gan and small and section.lambda_i * section.inversion_scale != 0
    without = ("family", "conditional", *(() if inverts else INVERSION))
    if section.labelled:  # the label takes the place of diversity
        without = (*without, "lambda_d", "div_support")
    family: Knobs = {"conditional": True} if section.labelled else {}
    family |= {} if gan else {"family": section.family}
    return {"client": client_id, "inverts": inverts, "generator": changed_knobs(section, *without) | family}


def _generator_work(config: ExperimentConfig) -> Work:
    section = config.generator
    own = {"epochs": section.epochs} if section.epochs else {"steps": section.steps}
    return own | ({"classifier epochs": section.classifier_epochs} if section.classifier_source == "fresh" else {})


def _generators_read(config: ExperimentConfig) -> tuple[str, ...]:
    judge = ("judge",) if config.generator.judge == "calibrated" else ()
    return ("partition",) if config.generator.stage == "before" else ("partition", "warmup", *judge)


def generator_stages(config: ExperimentConfig) -> Graph:
    """Return the stages that end with all clients' generators."""
    return (*(JUDGE.stages if config.generator.judge == "calibrated" else ()), GENERATORS)


GENERATORS = Stage(
    "generators", 2, _generator_knobs, f"{_HERE}.client_uploads:train_generators", upstream=_generators_read,
    kind="generator", per_client=_client_knobs, unit="client", total=lambda config: config.partition.num_clients,
    work=_generator_work, messages=f"{_HERE}.client_uploads:generator_messages",
)  # fmt: skip


PROTOTYPES = Stage(
    "prototypes", 2, lambda inputs: {"prototypes": prototype_knobs(inputs.config)},
    f"{_HERE}.client_uploads:collect_prototypes", upstream=("warmup",), unit="client",
    total=lambda config: config.partition.num_clients,
    # prototypes of all rounds came with the warm-up
    work=lambda config: {"clients": config.partition.num_clients if config.prototypes.rounds == "last" else 0},
    messages=f"{_HERE}.client_uploads:prototype_messages",
)  # fmt: skip


def _teacher_knobs(inputs: KeyInputs) -> Knobs:
    several = inputs.facts is not None and bool(inputs.facts.modalities)
    found = {"meta": changed_knobs(inputs.config.meta), "split": prototype_split(inputs.config)}
    return found | ({"experts": "by modality"} if several and inputs.config.model.fusion != "zero_fill" else {})


TEACHER = Stage(
    "teacher", 4, _teacher_knobs,
    f"{_HERE}.server:train_teacher",
    # generators matter where the meta model learns from their images
    upstream=lambda config: (
        ("warmup", "prototypes") if config.meta.data == "prototypes" else ("warmup", "prototypes", "generators")
    ),
    role="teacher", unit="update", total=lambda config: config.meta.updates * len(groups(config)),
    work=lambda config: {"updates": config.meta.updates},
)  # fmt: skip


def _distill_knobs(inputs: KeyInputs) -> Knobs:
    section = changed_knobs(inputs.config.distill)
    if inputs.config.distill.train_workers < 2:  # 0 (in process) and 1 are the same arithmetic; more differ in rounding
        section.pop("workers", None)
    # several teachers are weighed by the label asked for (``MixedTeacher``)
    asked = inputs.config.generator.labelled and len(groups(inputs.config)) > 1
    found = {"distill": section, "split": prototype_split(inputs.config)} | driver_knobs(inputs.config)
    return found | ({"teachers": "by label"} if asked else {})


DISTILL = Stage(
    "distill", 3, _distill_knobs, f"{_HERE}.server:distill", upstream=("teacher", "generators"), role="distilled",
    unit="step", total=lambda config: config.distill.steps, work=lambda config: {"steps": config.distill.steps},
    messages=f"{_HERE}.server:distill_messages",
)  # fmt: skip
