"""The stages that every run has: partition, warm-up, closing rounds, evaluation; and the knobs in their keys.

A key names all that a result depends on and nothing else. Knobs at their default are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from ..config.fields import changed_knobs
from ..config.plugins import identity, parts, trains_generators
from ..config.registry import sampler_kind
from ..config.schema import ExperimentConfig
from ..config.user_code import digest_of
from ..storage.hashing import stage_key
from .graph import Graph, KeyInputs, Knobs, Stage, Work

#: The version of ``evaluated_key``'s results.
EVALUATED = 1

#: The most images that the ceiling's linear probe is trained on.
MOST_PROBED = 12_000


def model_knobs(config: ExperimentConfig) -> Knobs:
    """Return the networks' knobs, and the digests of networks that are user code."""
    names = sorted({config.model.classifier, *config.model.classifiers})
    sources = {name: source for name in names if (source := digest_of(name, f"model.classifier = {name}"))}
    return changed_knobs(config.model, "student") | ({"sources": sources} if sources else {})


def federation_knobs(config: ExperimentConfig) -> Knobs:
    """Return the knobs of rounds; knobs about failed clients count only if some clients may be left out."""
    section = config.federation
    strict = () if section.min_cohort else ("min_cohort", "max_client_failures")  # then a failure shows in no result
    without = (*strict, *(() if section.drop_rate else ("drop_rate",)), "strategy")
    used = [identity("strategies", word, config) for word in parts(section.strategy)]
    plain = len(used) == 1 and used[0] == {"name": "fedavg", "version": 1}
    return changed_knobs(section, *without) | ({} if plain else {"strategies": used})


def numbers_depend_on(config: ExperimentConfig) -> Knobs:
    """Return the runtime's knobs that can show in the last bit of a client's result."""
    from ..execution.backend import client_threads

    device = config.runtime.device if config.runtime.device != "auto" else "cpu"
    known = {"precision": config.runtime.precision, "threads": client_threads(config), "device": device}
    any_order = device == "cuda" and not config.runtime.deterministic
    together = config.runtime.clients_per_batch
    batches = {"clients_per_batch": together} if together not in (1, "auto") else {}
    return known | batches | ({"deterministic": False} if any_order else {})


def prototype_split(config: ExperimentConfig) -> Knobs:
    """Return the knobs that divide prototypes into kept and held out, and weigh them."""
    # these show in the prototypes themselves
    making = ("k", "model", "rounds", "samples", "augment", "cap", "split", "subsets")
    return changed_knobs(config.prototypes, *making) | {"seed": config.seed} | driver_knobs(config)


def prototype_knobs(config: ExperimentConfig) -> Knobs:
    """Return the knobs that prototypes are made with."""
    section = config.prototypes
    judging = {"judging": section.judging} if section.judging else {}
    return changed_knobs(section, "held_out", "weighting", "split") | judging


def subset_knobs(config: ExperimentConfig) -> Knobs:
    """Return the sets of modalities that class statistics are taken of, where they are not those held."""
    return {"subsets": "all"} if config.prototypes.subsets == "all" else {}


def driver_knobs(config: ExperimentConfig) -> Knobs:
    """Return the driver's threads, which show in the last bit, where they are not one."""
    return changed_knobs(config.runtime, *(name for name in vars(config.runtime) if name != "driver_threads"))


def _partition_knobs(inputs: KeyInputs) -> Knobs:
    """Without the data's identity a stand-in that no run has, different for different data."""
    config = inputs.config
    data = inputs.identity or {"unseen": changed_knobs(config.data, "root", "download")}
    facts = inputs.facts and inputs.facts.to_json()
    knobs = {"data": data, "facts": facts, "partition": changed_knobs(config.partition), "seed": config.seed}
    sampler = config.partition.sampler
    kind = sampler_kind(sampler)
    if kind == "plugin":
        knobs["source"] = digest_of(sampler, f"partition.sampler = {sampler}")
    elif kind:  # what is dealt counts, not the path or the column's name
        knobs["partition"] = changed_knobs(config.partition, "sampler") | {"sampler": kind}
        knobs["groups"] = inputs.groups.get(sampler) or (_file_digest(sampler) if kind == "file" else sampler)
    return knobs


def _file_digest(sampler: str) -> str:
    from ..data.groups import read_rows  # needs numpy

    return read_rows(sampler).digest


PARTITION = Stage(
    "partition", 1, _partition_knobs, unit="draw", work=lambda config: {"draws": 1},
    messages="mosaic_ray.pipeline.partition:statistics_messages",
)  # fmt: skip


def _rounds_work(config: ExperimentConfig, num_rounds: int, local_steps: int) -> Work:
    clients, asked = config.partition.num_clients, config.federation.cohort_size
    client_rounds = num_rounds * min(asked or clients, clients)
    return {"client rounds": client_rounds, "local steps": client_rounds * local_steps}


def _common(config: ExperimentConfig) -> Knobs:
    return {
        "model": model_knobs(config), "federation": federation_knobs(config), "seed": config.seed,
        "runtime": numbers_depend_on(config),
    }  # fmt: skip


def _warmup_knobs(inputs: KeyInputs) -> Knobs:
    config = inputs.config
    knobs = _common(config) | {"warmup": changed_knobs(config.warmup, "checkpoint_rounds")}
    if config.prototypes.rounds == "all":  # they are then uploaded during the warm-up
        knobs["prototypes"] = prototype_knobs(config)
    return knobs


def _method_rounds_knobs(inputs: KeyInputs) -> Knobs:
    return _warmup_knobs(inputs) | {"method": identity("methods", inputs.config.method, inputs.config)}


def _rehearsed_rounds_knobs(inputs: KeyInputs) -> Knobs:
    section = changed_knobs(inputs.config.rehearsal, "begins", "candidates", "trial_rounds", "held_back")
    return _warmup_knobs(inputs) | {"rehearsal": section}


def _warmup(
    name: str, knobs: Callable[[KeyInputs], Knobs] = _warmup_knobs, role: str = "", reads: tuple[str, ...] = ()
) -> Stage:
    return Stage(
        name, 3, knobs, upstream=("partition", *reads), kind="warmup", role=role,
        total=lambda config: config.warmup.num_rounds,
        work=lambda config: _rounds_work(config, config.warmup.num_rounds, config.warmup.local_steps),
        messages="mosaic_ray.pipeline.round_messages:warmup_messages" if role else "",
    )  # fmt: skip


WARMUP = _warmup("warmup", role="initial")
#: The warm-up of a method that changes the global model after every round, and the plain one that its control needs.
METHOD_WARMUP = _warmup("warmup", _method_rounds_knobs, role="initial")
CONTROL_WARMUP = _warmup("control_warmup")
#: The warm-up of clients that rehearse in it.
REHEARSED_WARMUP = _warmup("warmup", _rehearsed_rounds_knobs, role="initial", reads=("generators",))


def _closing_knobs(inputs: KeyInputs) -> Knobs:
    config = inputs.config
    warmup = changed_knobs(config.warmup, "checkpoint_rounds", "num_rounds", "local_steps", "lr", "lr_decay", "bn")
    return _common(config) | {"finetune": changed_knobs(config.finetune, "head", "adapt_steps"), "warmup": warmup}


def _student_knobs(inputs: KeyInputs, start: str) -> Knobs:
    """Return the knobs of rounds that begin at the student's model, the result of the stage ``start``.

    Where the head is made anew after the rounds, they begin with the warm-up's: large weights, such as LDA gives, would
    damage the features.
    """
    anew = inputs.config.finetune.head != "keep" and start != "warmup"
    return _closing_knobs(inputs) | ({"begins with": "the warm-up's head"} if anew else {})


def _rehearsing_knobs(inputs: KeyInputs, start: str) -> Knobs:
    section, found = inputs.config.rehearsal, _student_knobs(inputs, start)
    if not rehearses(inputs.config):
        return found
    # with trials the stage that chooses a weight is upstream
    without = ("weight",) if weights_tried(inputs.config) else ("trial_rounds", "held_back", "candidates")
    return found | {"rehearsal": changed_knobs(section, "begins", *without)}


def closing(name: str, role: str, start: str) -> Stage:
    """Return the closing rounds that begin at the model of the stage ``start``; equal starts share one result.

    In the student's (``finetune``) clients may rehearse on generators' images; the control's have none.
    """
    own = name == "finetune"

    def upstream(config: ExperimentConfig) -> tuple[str, ...]:
        chosen = (CHOICE,) if weights_tried(config) else ()
        return ("partition", start, *(("generators", *chosen) if own and rehearses(config) else ()))

    knobs = partial(_rehearsing_knobs, start=start) if own else _closing_knobs
    return Stage(
        name, 3, knobs, upstream=upstream, kind="rounds", role=role,
        total=lambda config: config.finetune.num_rounds,
        work=lambda config: _rounds_work(config, config.finetune.num_rounds, config.finetune.local_steps),
        messages="mosaic_ray.pipeline.round_messages:closing_messages" if own else "",
    )  # fmt: skip


#: The stage that chooses the rehearsal weight.
CHOICE = "rehearsal"


def weights_tried(config: ExperimentConfig) -> tuple[float, ...]:
    """Return the weights of rehearsal that are tried, 0 first; none without candidates, or without generators."""
    section = config.rehearsal
    return tuple(sorted({0.0, *section.candidates})) if section.candidates and trains_generators(config) else ()


def rehearses(config: ExperimentConfig) -> bool:
    """Return whether clients rehearse in the closing rounds, or may choose to."""
    return bool(config.rehearsal.weight or weights_tried(config))


def rehearses_early(config: ExperimentConfig) -> bool:
    """Return whether clients rehearse in the warm-up's rounds, too."""
    early = config.rehearsal.begins == "warmup" and config.generator.stage == "before"
    return early and config.rehearsal.weight > 0 and trains_generators(config)


def rehearsal_trials(config: ExperimentConfig, start: str) -> dict[float, Stage]:
    """Return the stage of trial rounds for each of ``weights_tried``."""
    return {weight: _trial(weight, start) for weight in weights_tried(config)}


def _trial(weight: float, start: str) -> Stage:
    def knobs(inputs: KeyInputs) -> Knobs:
        section, found = inputs.config.rehearsal, _student_knobs(inputs, start)
        found["finetune"].pop("num_rounds", None)
        without = ("begins", "weight", "candidates", *(() if weight else ("ratio", "classes")))
        return found | {"rehearsal": changed_knobs(section, *without) | {"trial": weight}}

    return Stage(
        f"trial_{weight:g}", 1, knobs, upstream=("partition", start, *(("generators",) if weight else ())),
        kind="rounds", total=lambda config: config.rehearsal.trial_rounds,
        work=lambda config: _rounds_work(config, config.rehearsal.trial_rounds, config.finetune.local_steps),
        messages="mosaic_ray.pipeline.round_messages:trial_messages",
    )  # fmt: skip


def ceiling(name: str = "ceiling", after: str = "warmup", role: str = "ceiling") -> Stage:
    """Return the linear probe of the model of the stage ``after``. It sends nothing: a federation cannot compute it."""
    return Stage(
        name, 1, lambda inputs: {"images": MOST_PROBED, "seed": inputs.config.seed} | driver_knobs(inputs.config),
        "mosaic_ray.pipeline.ceiling:probe", upstream=("partition", after), kind="ceiling", role=role, unit="fit",
        work=lambda config: {"fits": 1},
    )  # fmt: skip


#: The evaluation of clients' own models, where the strategy has them.
PERSONAL = Stage(
    "personal", 1, lambda inputs: driver_knobs(inputs.config), "mosaic_ray.pipeline.personal:evaluate_personal",
    upstream=("partition", "warmup"), unit="client", total=lambda config: config.partition.num_clients,
    work=lambda config: {"models": config.partition.num_clients},
)  # fmt: skip


#: The evaluation of every client's model of the warm-up's last round, under any other strategy.
OWN_MODELS = replace(PERSONAL, name="own_models", compute="mosaic_ray.pipeline.personal:evaluate_own")


def final_models(after: str) -> Stage:
    """Return the evaluation of final models at the clients, as far as that of the student (stage ``after``) lacks it.

    It adapts them (``finetune.adapt_steps``), and evaluates those of other networks.
    """

    def knobs(inputs: KeyInputs) -> Knobs:
        return driver_knobs(inputs.config) | {"adapt_steps": inputs.config.finetune.adapt_steps}

    return replace(
        PERSONAL, name="final_models", knobs=knobs, compute="mosaic_ray.pipeline.personal:evaluate_final",
        upstream=tuple(dict.fromkeys(("partition", "finetune", after))),
    )  # fmt: skip


def student_network(config: ExperimentConfig) -> Knobs:
    """Return the part of a key that names ``model.student``, with a digest of the source of a user's network."""
    source = digest_of(config.model.student, f"model.student = {config.model.student}")
    found: Knobs = {"network": config.model.student, "width": config.model.width}
    return found | ({"source": source} if source else {})


def server_student(after: str) -> Stage:
    """Return the training of ``model.student`` on synthetic images, taught by the model of the stage ``after``."""

    def knobs(inputs: KeyInputs) -> Knobs:
        config = inputs.config
        own = {"seed": config.seed, "student": changed_knobs(config.student), "runtime": numbers_depend_on(config)}
        return student_network(config) | own | driver_knobs(config)

    return Stage(
        "server_student", 1, knobs, "mosaic_ray.pipeline.server_student:train",
        upstream=("partition", "generators", after), role="server_student", unit="fit",
        work=lambda config: {"student steps": config.student.steps},
    )  # fmt: skip


def evaluated_key(config: ExperimentConfig, partition: str, model: str, split: str) -> str:
    """Return the key of a model's accuracy on the images of ``split``; runs and stages that share a model share it."""
    knobs = {"split": split, "threads": config.runtime.driver_threads}
    return stage_key("judged", EVALUATED, knobs, [partition, model])


def _evaluate(graph: Graph) -> Stage:
    roles = [(stage.name, stage.role) for stage in graph if stage.role]
    return Stage(
        "evaluate", 3, lambda inputs: {"roles": [role for _, role in roles]} | driver_knobs(inputs.config),
        upstream=("partition", *(name for name, _ in roles)), total=lambda config: len(roles), unit="model",
    )  # fmt: skip


def models_of(graph: Graph, keys: Mapping[str, str]) -> dict[str, str]:
    """Return role -> key of each model that a run evaluates; ``keys`` by stage."""
    return {stage.role: keys[stage.name] for stage in graph if stage.role and stage.name in keys}


def student_of(own: Graph) -> str:
    """Return the name of the stage that makes the student: of a method's stages ``own``, else the warm-up."""
    return next((stage.name for stage in reversed(own) if stage.role == "distilled"), "warmup")


def whole_graph(
    own: Graph,
    start: str,
    distils_in_rounds: bool = False,
    trials: Graph = (),
    head: Graph = (),
    further: Graph = (),
    early: bool = False,
) -> Graph:
    """Return all stages of a run, in order: ``own`` are the method's.

    ``start``: the stage at whose model the closing rounds begin.
    ``trials``: stages that choose the weight of rehearsal.
    ``early``: clients rehearse in the warm-up, which needs the generators first; its control needs one without.
    ``head``: stages that make the student's head anew after the closing rounds; the last makes the final model.
    A method that distils in every round changes the warm-up itself, so its control needs a warm-up without it.
    ``further``: stages before the evaluation on which no other depends.
    """
    first: Graph = (PARTITION, METHOD_WARMUP, CONTROL_WARMUP) if distils_in_rounds else (PARTITION, WARMUP)
    if early:
        before = tuple(stage for stage in own if stage.name == "generators")
        first = (PARTITION, *before, REHEARSED_WARMUP, CONTROL_WARMUP)
        own = tuple(stage for stage in own if stage.name != "generators")
    control = closing("control", "control", "control_warmup" if distils_in_rounds or early else "warmup")
    graph = (*first, *own, *trials, closing("finetune", "" if head else "final", start), *head, control, *further)
    return (*graph, _evaluate(graph))
