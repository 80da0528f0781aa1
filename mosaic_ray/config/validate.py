"""Checks across knobs: ``RequestError`` where two of them contradict each other."""

from __future__ import annotations

import re

from ..core.errors import RequestError, neighbours
from .fields import changed_knobs, shown
from .schema import ExperimentConfig

#: Knobs of generators that only a GAN's training reads.
GAN_ONLY = {
    "classifier_source", "classifier_mode", "classifier_epochs", "discriminator", "gan_range", "lambda_e", "lambda_d",
    "lambda_i", "inversion_scale", "tau", "div_support", "diff_augment", "beta1", "beta2",
}  # fmt: skip
#: And those that only condensed images have.
CONDENSED_ONLY = {"images_per_class", "image_scale", "least_images", "matching_channels", "matching_global"}


def check(config: ExperimentConfig) -> ExperimentConfig:
    """Raise ``RequestError`` where knobs contradict each other; return ``config``."""
    from .client_layout import any_partial_width, modality_rule
    from .plugins import load, strategy_named, trains_generators
    from .registry import CLASSIFIERS, DATASET_PREFIXES, DATASETS, STRATEGIES

    def need(holds: object, message: str) -> None:
        if not holds:
            raise RequestError(message)

    name = config.data.name
    need(
        name in DATASETS or re.fullmatch(rf"({'|'.join(DATASET_PREFIXES)}):.+|([\w.]+|.+\.py):\w+", name),
        f"data.name = {name}: unknown data set; "
        f"{neighbours(name, [*DATASETS, 'parquet:PATH', 'folder:PATH', 'hf:OWNER/NAME', 'module:name'])}",
    )
    need(config.data.channels != 2, "data.channels = 2: it may be 1 or 3, or 0 for the data set's own")
    need(
        config.data.image_size in (0, 8, 16, 28, 32, 64),
        f"data.image_size = {config.data.image_size}: it may be 8, 16, 28, 32 or 64, or 0 for the data set's own",
    )
    _check_modalities(config)
    modality_rule(config)
    strategy, partial_width = strategy_named(config.federation.strategy), any_partial_width(config)
    if partial_width and not strategy.partial_widths:
        takes = [name for name in STRATEGIES if load("strategies", name).partial_widths]
        raise RequestError(
            f"federation.widths = {shown(config.federation.widths)}: {config.federation.strategy} trains whole models, "
            f"so every width must be 1.0; these take narrow clients: {', '.join(takes)}"
        )
    strategy.check(config)
    load("methods", config.method).check(config)
    cohort, clients = config.federation.cohort_size, config.partition.num_clients
    student, mixed = config.model.classifier, config.model.classifiers
    for classifier in (student, *mixed):
        need(
            classifier in CLASSIFIERS or re.fullmatch(r"[\w.]+:\w+", classifier),
            f"model.classifier = {classifier}: unknown; {neighbours(classifier, [*CLASSIFIERS, 'module:function'])}",
        )
    new = config.model.student
    if new:
        need(
            new in CLASSIFIERS or re.fullmatch(r"[\w.]+:\w+", new),
            f"model.student = {new}: unknown; {neighbours(new, [*CLASSIFIERS, 'module:function'])}",
        )
        need(
            new not in (student, *mixed),
            f"model.student = {new}: clients hold this network; name one that none of them holds",
        )
        shares = config.rehearsal.weight or config.rehearsal.candidates
        taught = any(stage.role == "server_student" for stage in load("methods", config.method).graph(config))
        need(
            taught or (trains_generators(config) and config.generator.labelled and shares),
            f"model.student = {new}: it learns from generators that take labels and are shared for rehearsal, and "
            f"method {config.method} has none; take --method mosaic with generator.family=cvae, cgan or condensed and "
            "rehearsal, or --method dense",
        )
    need(
        not mixed or clients % len(mixed) == 0,
        f"model.classifiers = {shown(mixed)}: {len(mixed)} networks for {clients} clients; name one for each, or a "
        "number of them that divides the clients'",
    )
    need(
        not mixed or student in mixed,
        f"model.classifier = {student}: the student begins at the average of the clients that hold its network, so it "
        f"must be one of model.classifiers = {shown(mixed)}",
    )
    whole = not partial_width and len(set(mixed)) < 2
    need(
        whole or config.prototypes.model == "global",
        "prototypes.model = client: clients of several widths or networks have no feature space in common; take global",
    )
    need(
        whole or config.prototypes.rounds == "last",
        "prototypes.rounds = all: with clients of several widths or networks they are uploaded once; take last",
    )
    need(
        whole or config.meta.data == "prototypes",
        f"meta.data = {config.meta.data}: with clients of several widths or networks it takes prototypes",
    )
    need(
        not config.generator.labelled or not config.generator.drop_class0_bug,
        f"generator.{'conditional = true' if config.generator.conditional else f'family = {config.generator.family}'}: "
        "the class that generator.drop_class0_bug leaves out could not be drawn",
    )
    rehearsal, trains = config.rehearsal, trains_generators(config)
    for knob, value in (("weight", rehearsal.weight), ("candidates", rehearsal.candidates)):
        needs = f"rehearsal.{knob} = {shown(value)}: it needs generators"
        need(not value or trains or knob == "candidates", f"{needs}, and method {config.method} trains none")
        need(
            not value or not trains or config.generator.labelled,
            f"{needs} that take labels; set generator.family=cvae, cgan or condensed, not {config.generator.family}",
        )
    early = f"rehearsal.begins = {rehearsal.begins}: "
    need(
        rehearsal.begins == "closing" or not trains or rehearsal.weight,
        f"{early}the warm-up's rounds have rehearsal.weight, and it is 0; set it above 0",
    )
    need(
        rehearsal.begins == "closing" or not trains or config.generator.stage == "before",
        f"{early}generators are trained before the warm-up; set generator.stage=before",
    )
    need(
        not trains or config.generator.labelled or not config.distill.label_weight,
        f"distill.label_weight = {config.distill.label_weight:g}: generators of {config.generator.family} take no "
        "labels; set generator.family=cvae, cgan or condensed",
    )
    judged = not trains or config.generator.judge == "client"
    need(
        judged or whole,
        "generator.judge = calibrated: clients of several widths or networks have no feature space in common; take "
        "client",
    )
    need(
        judged or (config.generator.stage == "after_warmup" and config.generator.classifier_source == "client"),
        "generator.judge = calibrated: it is the warmed-up model with a new head; it takes "
        "generator.stage=after_warmup and generator.classifier_source=client",
    )
    need(
        config.generator.family == "cvae" or not config.generator.feature_weight,
        f"generator.feature_weight: it weighs a reconstruction, and generator.family = {config.generator.family} has "
        "none; take generator.family=cvae",
    )
    bank = config.generator.family == "condensed"
    unread = set() if bank else changed_knobs(config.generator).keys() & CONDENSED_ONLY
    need(
        not unread,
        f"generator.{min(unread, default='')}: only condensed images have it, and generator.family = "
        f"{config.generator.family}; take generator.family=condensed",
    )
    if config.generator.family in ("cvae", "condensed"):
        without = changed_knobs(config.generator).keys() & GAN_ONLY
        need(
            not without,
            f"generator.{min(without, default='')}: only a GAN has it, and generator.family = "
            f"{config.generator.family}; take "
            "generator.family=dcgan, or --algorithm distilled for the whole path of the paper",
        )
    need(cohort <= clients, f"federation.cohort_size = {cohort}: there are {clients} clients (partition.num_clients)")
    least, asked = config.federation.min_cohort, cohort or clients
    need(
        least <= asked,
        f"federation.min_cohort = {least}: only {asked} clients are asked in a round "
        f"({'federation.cohort_size' if cohort else 'partition.num_clients'})",
    )
    need(
        config.meta.init == "random" or config.meta.input == "head",
        f"meta.init = {config.meta.init}: a re-fitted head needs meta.input = head (or take meta.init = random)",
    )
    cpus = config.runtime.cpus_per_client
    need(
        cpus < 1 or float(cpus).is_integer(),
        f"runtime.cpus_per_client = {cpus:g}: Ray takes a fraction below 1 or a whole number",
    )
    device, gpus = config.runtime.device, config.runtime.gpu_share
    need(
        not (device == "cpu" and gpus),
        f"runtime.device = cpu: clients on CPUs take no GPU, but runtime.gpus_per_client = {gpus:g}; give one of them",
    )
    need(
        device != "cuda" or config.runtime.gpus_per_client == "auto" or gpus,
        "runtime.device = cuda: runtime.gpus_per_client = 0 keeps clients on CPUs; give one of them",
    )
    need(
        gpus <= 1 or float(gpus).is_integer(),
        f"runtime.gpus_per_client = {gpus:g}: Ray takes a fraction up to 1 or a whole number",
    )
    return config


def _check_modalities(config: ExperimentConfig) -> None:
    """Raise ``RequestError`` where the data set has no columns to choose, or several modalities cannot be meant."""
    from .registry import DATASET_PREFIXES, DATASETS, MULTIMODAL

    data, names = config.data, config.data.modalities
    what, kind = f"data.modalities = {shown(names)}", data.name.partition(":")[0]
    takes = data.name in MULTIMODAL or (":" in data.name and kind not in ("folder", "imported"))
    if names and not takes:
        raise RequestError(f"{what}: {data.name} has images alone; {', '.join(MULTIMODAL)}, parquet: and hf: take it")
    for name in names:
        if not name or "+" in name or names.count(name) > 1:
            why = "is there twice" if names.count(name) > 1 else "has a +, which joins names" if name else "is no name"
            raise RequestError(f'{what}: "{name}" {why}')
    if names and data.image_column:
        raise RequestError(f"data.image_column = {data.image_column}: data.modalities names the columns; give one")
    several = len(names) > 1 or (not names and data.name in MULTIMODAL)
    if config.partition.modalities and not several and (data.name in DATASETS or kind in DATASET_PREFIXES):
        raise RequestError(
            f"partition.modalities = {shown(config.partition.modalities)}: samples of {data.name} have one modality; "
            "data.modalities names several"
        )
