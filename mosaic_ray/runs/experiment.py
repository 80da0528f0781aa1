"""One experiment, told in order, readable beside the paper's algorithm box."""

from __future__ import annotations

from typing import Any

from ..config.registry import METHODS
from ..core.types import ROLES
from ..methods.mosaic.client_uploads import generators_stage, prototypes_stage
from ..methods.mosaic.server import Host, distill_stage, student_of, teacher_stage
from ..methods.prototype_head import refit_stage
from ..pipeline.context import Run
from ..pipeline.evaluate import evaluate_stage
from ..pipeline.partition import partition_stage, refuse_small
from ..pipeline.rounds import closing_stage, warmup_stage


def run_experiment(run: Run, distil_on: Host) -> dict[str, Any]:
    """Partition, warm up, gather what clients upload, teach, distil, close and evaluate; returns the results.

    ``distil_on`` hosts the distillation loop. What it returns becomes summary.json (``launch`` adds the rest).
    """
    distiller, models, held_out = METHODS[run.config.method][0], {}, None

    # P. deal the images to the clients
    shards = partition_stage(run)
    refuse_small(shards)

    # W. federated rounds: the global model and each client's own
    warmup = warmup_stage(run, shards)
    student_key, student = warmup.key, warmup.weights
    models["initial"] = student_key, student

    if distiller == "mosaic":
        # G. a generator on every client, beside its frozen classifier
        generators = generators_stage(run, shards, warmup)
        # Q. class prototypes of every client
        prototypes_key, prototypes = prototypes_stage(run, shards, warmup)
        # A, M. class experts, and the meta model that speaks for them
        teacher_key, teacher = teacher_stage(run, shards, warmup, prototypes_key, prototypes, generators)
        # KD. the student learns from the teacher on synthetic batches
        taught = distill_stage(run, shards, warmup, prototypes, teacher_key, teacher, generators, distil_on)
        student_key, student = taught.key, student_of(taught)
        held_out = taught.facts["figures"]["held_out_after"]
        models["teacher"] = teacher_key, teacher
        models["distilled"] = student_key, student
    elif distiller == "prototype_head":
        # the floor under Mosaic: the head re-fitted on prototypes, no synthetic image
        prototypes_key, prototypes = prototypes_stage(run, shards, warmup)
        taught = refit_stage(run, shards, warmup, prototypes_key, prototypes)
        student_key, student = taught.key, student_of(taught)
        held_out = taught.facts["figures"]["held_out_accuracy"]
        models["distilled"] = student_key, student

    # FT. closing federated rounds on real data, and the control's: the same rounds without distillation
    final = closing_stage(run, "finetune", student_key, warmup.with_student(student), shards)
    models["final"] = final.key, student_of(final)
    control = closing_stage(run, "control", warmup.key, warmup.models, shards)
    models["control"] = control.key, student_of(control)

    # what each of them reaches on images that nobody trained on
    reached = evaluate_stage(run, shards, models)
    return {
        "accuracy": {role: reached.facts["test"].get(role) for role in ROLES},
        "validation_accuracy": reached.facts.get("validation"),
        "calibration": {r: {name: reached.facts[name][r] for name in ("nll", "ece")} for r in reached.facts["nll"]},
        "held_out_accuracy": held_out,
        "per_class_accuracy": reached.facts["per_class"],
        "label_counts": shards.counts.tolist(),
        "student": models["final"][1],
    }
