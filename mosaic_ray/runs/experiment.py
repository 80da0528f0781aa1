"""One experiment, stage by stage: federated rounds, the method, closing rounds and their control, evaluation."""

from __future__ import annotations

from typing import Any

from ..config.plugins import load
from ..core.types import ROLES
from ..methods.base import Method
from ..methods.closing_head import closing_head
from ..methods.rehearsal_choice import choose_weight
from ..pipeline.context import RunContext
from ..pipeline.evaluate import Model, evaluate
from ..pipeline.graph import Stage
from ..pipeline.partition import deal
from ..pipeline.personal import client_accuracy
from ..pipeline.rounds import close, load_models, warm_up
from ..pipeline.stages import models_of, rehearses_early
from ..storage.store import StageResult
from .checks import check_owned
from .plan import graph_of


def run_experiment(ctx: RunContext) -> dict[str, Any]:
    """Run all stages of ``ctx.config``; returns the results that ``runs.summary`` makes summary.json of."""
    method: Method = load("methods", ctx.config.method)
    stages = {stage.name: stage for stage in graph_of(ctx.config)}

    # P. deal the images to the clients
    shards = deal(ctx)
    if "teacher" in stages:
        check_owned(ctx.config, ctx.dataset.facts, shards.counts)

    # W. federated rounds: the global model and each client's own; generators come first where clients rehearse in them
    early = ctx.run(stages["generators"], None) if rehearses_early(ctx.config) else None
    warmup = warm_up(ctx, stages["warmup"], method.after_round, early)
    plain = warm_up(ctx, stages["control_warmup"]) if "control_warmup" in stages else warmup

    # the method teaches the student
    distilled = method.run(ctx, warmup)
    student = distilled.student if distilled else warmup.weights

    # FT. closing federated rounds on real data; the control's are the same rounds without the method
    shared, head = distilled.shared if distilled else None, closing_head(ctx.config)
    start = warmup.with_student(student | warmup.head if head else student)
    if head and method.head_only:
        start = warmup.models  # then all such methods and the control share these rounds
    weight = choose_weight(ctx, stages, start, shared)
    same = shared is not None and not weight and student is plain.weights  # they are the control's
    done = _stored(ctx, stages["control"]) if same else None
    closed = close(ctx, stages["finetune"], start, shared, weight, same=done)
    final = head.renew(ctx, load_models(warmup.federation, closed)) if head else closed.load("global")
    control = close(ctx, stages["control"], plain.models, same=closed if same else None).load("global")

    # the accuracy of each of them on test images
    models: dict[str, Model] = {"initial": warmup.weights, "distilled": student, "final": final, "control": control}
    if distilled and distilled.teacher is not None:
        models["teacher"] = distilled.teacher
    if "ceiling" in stages:
        models["ceiling"] = ctx.run(stages["ceiling"], warmup.weights)
    if distilled and distilled.new_student is not None:
        models["server_student"] = distilled.new_student
    elif "server_student" in stages:
        assert shared is not None  # the configuration was checked
        models["server_student"] = ctx.run(stages["server_student"], final, shared)
    personal = ctx.run(stages["personal"], warmup) if "personal" in stages else None
    own = personal["clients"] if personal else ctx.run(stages["own_models"], warmup)
    at_clients = {}
    if "final_models" in stages:
        everyones = load_models(warmup.federation, closed) | {warmup.federation.student: final}
        at_clients = ctx.run(stages["final_models"], everyones)
    keys = models_of(tuple(stages.values()), ctx.keys)
    reached = evaluate(ctx, stages["evaluate"], {role: (keys[role], models[role]) for role in ROLES if role in keys})
    clients = client_accuracy(ctx, own, reached.facts["per_class"]["final"], at_clients)
    with reached.read_as():
        return {
            "accuracy": {role: reached.facts["test"].get(role) for role in ROLES},
            "personal_accuracy": personal,
            "client_accuracy": clients,
            "validation_accuracy": reached.facts.get("validation"),
            "calibration": {r: {n: reached.facts[n][r] for n in ("nll", "ece")} for r in reached.facts["nll"]},
            "held_out_accuracy": distilled.held_out if distilled else None,
            "per_class_accuracy": reached.facts["per_class"],
            "subset_accuracy": reached.facts.get("subsets"),
            "label_counts": ctx.shards.counts.tolist(),
            "student": final,
        }


def _stored(ctx: RunContext, stage: Stage) -> StageResult | None:
    """Return a result that is stored before the stage runs; None with several modalities, whose rounds send more."""
    [key] = ctx.client_keys(stage)
    found = None if ctx.dataset.facts.modalities else ctx.store.get(key)
    return found and ctx.checked(found)
