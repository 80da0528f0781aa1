"""Health of experts, meta model and student: every rule fires for its cause and is silent otherwise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers import FACTS, TINY, make_teacher, prototypes, shard_of, stripes

from mosaic_ray.config.resolve import override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.health import SINGLE_OWNER_BELOW, closing_findings, distill_findings, teacher_findings
from mosaic_ray.core.seeding import seeded
from mosaic_ray.core.types import Finding, Prototypes, Weights
from mosaic_ray.distillation.experts import effective_owners, form_experts, redundancy
from mosaic_ray.distillation.meta_model import Teacher, gates
from mosaic_ray.distillation.student_training import DistContext, DistillTask, distil, inspect_student, make_task
from mosaic_ray.distillation.teacher import build_teacher, head_logits, shift
from mosaic_ray.distillation.teacher_training import inspect_teacher
from mosaic_ray.federated.client import ClientContext, initial_weights
from mosaic_ray.federated.local_training import LocalTrainingConfig, train_locally
from mosaic_ray.models.generator import build_generator
from mosaic_ray.models.state_dict import load_weights, to_weights

CPU = torch.device("cpu")
CONTEXT = ClientContext(TINY, FACTS, CPU)
COUNTS = np.array([[30, 20, 0], [10, 0, 20], [0, 10, 20]])


def _quiet(step, metrics):
    pass


@dataclasses.dataclass(frozen=True)
class Federation:
    """A global model that knows its classes, clients that went on from it, and prototypes of its features."""

    whole: Weights
    clients: list[Weights]
    found: Prototypes


@pytest.fixture(scope="module")
def federation() -> Federation:
    def went_on(start: Weights, client: int, steps: int, momentum: float = 0.0) -> Weights:
        model = CONTEXT.classifier(start)
        plan, data = LocalTrainingConfig(steps, 16, 0.05, momentum=momentum), stripes(90, client)
        own = data.take(np.flatnonzero(COUNTS[client, data.labels] > 0)) if client < len(COUNTS) else data
        train_locally(model, shard_of(own), plan, FACTS, (0, "test", 0, client), "fp32")
        return to_weights(model)

    whole = went_on(initial_weights(CONTEXT), 9, 30, 0.9)
    found = [prototypes(CONTEXT, shard_of(stripes(60, k)), k, whole) for k in range(3)]
    return Federation(whole, [went_on(whole, k, 6) for k in range(3)], Prototypes.concatenate(found))


def taught(federation: Federation, knobs: dict, counts: np.ndarray = COUNTS, found: Prototypes | None = None):
    """(config, state, findings, arrays) of a teacher."""
    config, found = override(TINY, knobs), found or federation.found
    clients = list(enumerate(federation.clients))
    state, figures = make_teacher(config, FACTS, federation.whole, clients, counts, found, _quiet)
    looked, arrays = inspect_teacher(ClientContext(config, FACTS, CPU), state, counts, found)
    owners = effective_owners(counts)
    alone = [int(c) for c in np.flatnonzero((owners > 0) & (owners < SINGLE_OWNER_BELOW))]
    return config, state, teacher_findings(figures | looked, 3, alone), arrays


def codes(findings: list[Finding]) -> list[str]:
    return [f"{finding.code} {finding.severity}" for finding in findings]


# --- experts and meta model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs, found",
    [
        ({}, []),
        ({"meta.lr": 1e6, "meta.select": False, "meta.init": "random"}, ["meta.diverged error"]),
        ({"meta.lr": 1e9, "meta.select": False, "meta.init": "random"}, ["meta.diverged error"]),
    ],
)  # fmt: skip
def test_a_diverging_meta_model_is_the_only_finding(federation, knobs, found):
    assert codes(taught(federation, knobs)[2]) == found


@pytest.mark.parametrize(
    "loss, found", [(2.1, []), (2.3, ["meta.diverged warning"]), (np.nan, ["meta.diverged warning"])]
)
def test_a_training_that_diverges_is_a_warning_where_the_state_before_is_handed_on(loss, found):
    figures = {"meta_held_out_accuracy": 0.9, "meta_held_out_loss": 0.1, "student_held_out_accuracy": 0.8}
    assert codes(teacher_findings(figures | {"meta_train_loss": loss}, 3, [])) == found


@pytest.mark.parametrize("evaluated, found", [(3.0, ["meta.diverged error"]), (1.0, [])])
def test_a_teacher_that_names_one_class_is_an_error_where_there_are_several(evaluated, found):
    figures = {"meta_held_out_accuracy": 0.5, "meta_held_out_loss": 1.0, "student_held_out_accuracy": 0.5}
    looked = {"meta_classes_named": 1.0, "classes_judged": evaluated}
    assert codes(teacher_findings(figures | looked, 3, [])) == found


def test_a_teacher_that_learnt_from_wrong_labels_is_below_its_student(federation):
    """It is trained on labels moved by one; the student's head is re-fitted on the true ones."""
    true, rows = federation.found, np.arange(len(federation.found))
    kept, held = true.take(rows[rows % 2 == 0]), true.take(rows[rows % 2 == 1])
    config, state, _, _ = taught(federation, {}, found=dataclasses.replace(kept, labels=(kept.labels + 1) % 3))
    meta = load_weights(Teacher(3, 3, config.meta, kept.vectors.shape[1]), state.meta).eval()
    logits = meta(head_logits(state.experts, state.index)(torch.tensor(held.vectors)), torch.tensor(held.vectors))
    reached = float((logits.argmax(1).numpy() == held.labels).mean())
    figures = {"meta_held_out_accuracy": reached, "meta_held_out_loss": 1.0, "student_held_out_accuracy": 0.9}
    (finding,) = teacher_findings(figures, 3, [])
    assert (finding.code, finding.value, finding.threshold) == ("teacher.below_student", reached, 0.9)
    assert teacher_findings(figures | {"student_held_out_accuracy": reached}, 3, []) == []


def test_identical_clients_make_redundant_experts_and_different_ones_do_not(federation):
    same = dataclasses.replace(federation, clients=[federation.clients[0]] * 3)
    assert codes(taught(same, {})[2]) == ["experts.redundant warning"]
    alike = np.full((3, 3), 20)  # different models, each class held alike by all
    assert codes(taught(federation, {}, alike)[2]) == ["experts.redundant warning"]
    assert codes(taught(federation, {})[2]) == []


def test_a_single_owner_is_a_fact_and_no_redundancy(federation):
    counts = np.array([[30, 20, 0], [0, 0, 20], [0, 0, 0]])
    _, _, (finding,), arrays = taught(federation, {}, counts)
    assert (finding.code, finding.severity, finding.value) == ("experts.single_owner", "info", 3)
    assert "classes 0, 1, 2 are each" in finding.message
    assert arrays["expert_weights"].tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert arrays["expert_of_class"].tolist() == [0, 0, 1]


def test_effective_owners_and_redundancy_by_hand():
    counts = np.array([[1, 2, 0, 0, 6], [1, 0, 0, 2, 0], [0, 0, 0, 2, 0]])
    np.testing.assert_allclose(effective_owners(counts), [2, 1, 0, 2, 1])
    clients = [(k, {"head.weight": np.full((2, 2), 1 + step, np.float32)}) for k, step in enumerate((0.0, 1e-4, 1.0))]
    experts, index = form_experts(clients, counts, {"head.weight": np.zeros((2, 2), np.float32)})
    # of the pairs of 0, 1, 3 and 4 (but 1 and 4, one client's): 0 is near 1 and 4, 3 is far from all
    assert redundancy(experts, index, counts) == pytest.approx(2 / 5)
    assert redundancy(experts[1:2], np.zeros(5, np.int64), np.eye(1, 5, dtype=np.int64)) == 0


def test_no_prototype_to_hold_out_is_reported_where_some_are_requested(federation):
    _, _, found, _ = taught(federation, {"prototypes.held_out": 0.0})
    assert codes(found) == ["prototypes.too_few warning"]
    figures = {
        "num_held_out": 0.0,
        "meta_held_out_accuracy": 1,
        "student_held_out_accuracy": 1,
        "meta_held_out_loss": 0,
    }
    assert teacher_findings(figures, 3, [], holds_out=False) == []


def test_gates_name_the_experts_that_the_meta_model_uses():
    """If a meta model returns twice expert 1's logit of the class, only expert 1 has a gate."""

    class Listener(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.meta = torch.nn.Module()
            self.meta.out, self.meta.max_rows, self.meta.num_experts = torch.nn.Linear(1, 3), 2, 3

        def forward(self, expert_logits, features):
            return 2 * expert_logits[:, 1]

    rows = torch.tensor([[[0.0, 0, 0], [3.0, 0, 0], [9.0, 9, 9]]]).expand(3, -1, -1)
    found = gates(Listener(), lambda features: rows[: len(features)], torch.zeros(3, 1), torch.tensor([0, 0, 1]))
    np.testing.assert_allclose(found, [[0, 0, 0], [4, 2, 0], [0, 0, 0]])
    assert found.dtype == np.float32


# --- the student ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(federation) -> DistillTask:
    """Distillation from untrained generators of many latents: their images are nearly noise."""
    config, state, _, _ = taught(federation, {"distill.steps": 24, "distill.guard": False, "generator.lr": 1e-3})
    with seeded(0, "test", "generator"):
        made = tuple(to_weights(build_generator(config.generator, 1, 8, 3)) for _ in range(3))
    figures = [{"coverage": 1.0, "owned_mass": 1.0}] * 3
    return make_task(config, FACTS, federation.whole, state, made, figures, COUNTS.sum(1), federation.found)


def with_knobs(task: DistillTask, knobs: dict) -> DistillTask:
    return dataclasses.replace(task, config=override(task.config, knobs))


def contrary(task: DistillTask) -> DistillTask:
    """The teacher's logits are the student's, negated."""
    head = {f"skip.{name}": -task.student[f"head.{name}"] for name in ("weight", "bias")}
    meta = task.teacher.meta | head | {"gain": np.zeros((), np.float32)}
    return dataclasses.replace(task, teacher=dataclasses.replace(task.teacher, meta=meta))


def test_a_learning_rate_of_nothing_is_a_plateau(task):
    still = with_knobs(contrary(task), {"distill.lr": 1e-12})
    _, figures = distil(still, CPU, DistContext(), _quiet)
    assert figures["late_agreement"] < 0.9
    sound = {"class_coverage": 1.0, "num_classes": 3.0}
    assert codes(distill_findings(figures | sound, 1.0)) == ["distill.plateau warning"]
    _, moved = distil(
        with_knobs(contrary(task), {"distill.lr": 0.05, "distill.guard": True}), CPU, DistContext(), _quiet
    )
    assert moved["improvement"] > 0.01
    assert "distill.plateau warning" not in codes(distill_findings(moved | sound, 1.0))


def test_a_contrary_teacher_makes_an_unguarded_student_forget(task):
    wild = with_knobs(contrary(task), {"distill.lr": 5.0, "distill.anchor_weight": 0.0})
    _, figures = distil(wild, CPU, DistContext(), _quiet)
    (finding,) = distill_findings(figures | {"class_coverage": 1.0}, 1.0)
    assert (finding.code, finding.value) == (
        "distill.forgetting",
        figures["held_out_before"] - figures["held_out_after"],
    )
    _, guarded = distil(with_knobs(wild, {"distill.guard": True}), CPU, DistContext(), _quiet)
    assert not [f for f in distill_findings(guarded, 1.0) if f.code == "distill.forgetting"]


def test_workers_report_the_same_end_as_one_process(task):
    """The windows are sums over workers, as the loss is."""
    _, figures = distil(task, CPU, DistContext(), _quiet)
    doubled = DistContext(0, 1, lambda tensor: tensor.mul_(2) if tensor.shape == (4,) else None)
    _, summed = distil(task, CPU, doubled, _quiet)
    assert summed["improvement"] == pytest.approx(figures["improvement"])
    assert summed["late_agreement"] == pytest.approx(figures["late_agreement"])


def test_the_student_is_looked_at_on_a_batch_of_its_own_and_left_as_it_was(task):
    figures, counts = inspect_student(task, task.student, CPU)
    again, _ = inspect_student(task, task.student, CPU)
    assert figures == again
    assert counts.shape == (3,) and counts.sum() == task.counts.sum()
    assert figures["shift"] == 0
    assert all(0 <= figures[name] <= 1 + 1e-6 for name in ("teacher_entropy", "class_entropy", "agreement"))


def test_a_teacher_that_names_one_class_for_all_images_is_an_error(task):
    bias = task.teacher.meta | {"skip.bias": np.array([0, 1e3, 0], np.float32)}
    one = dataclasses.replace(task, teacher=dataclasses.replace(task.teacher, meta=bias))
    weights, figures = distil(with_knobs(one, {"distill.guard": True}), CPU, DistContext(), _quiet)
    looked, counts = inspect_student(one, weights, CPU)
    assert counts.tolist() == [0, counts.sum(), 0]
    found = [f for f in distill_findings(figures | looked, 1.0) if f.severity != "info"]
    assert codes(found)[0] == "generator.low_coverage error"
    assert {f.code for f in found} == {"generator.low_coverage"}


def test_a_teachers_two_paths_are_compared(federation):
    """The experts' trunks give zero features while their heads stay, so the two paths differ."""
    config: ExperimentConfig = override(
        TINY, {"meta.input": "full", "meta.init": "random", "meta.select": True, "meta.updates": 60, "meta.lr": 1e-2}
    )
    clients = list(enumerate(federation.clients))
    state, _ = make_teacher(config, FACTS, federation.whole, clients, COUNTS, federation.found, _quiet)
    images = torch.tensor(stripes(60, 5).images).float() / 255
    images = (images - FACTS.mean[0]) / FACTS.std[0]
    whole = build_teacher(config, FACTS, state)
    assert len(whole.by_heads(images).argmax(1).unique()) > 1
    blind = [{n: v if n.startswith("head") else 0 * v for n, v in e.items()} for e in state.experts]
    parted = shift(build_teacher(config, FACTS, dataclasses.replace(state, experts=tuple(blind))), images)
    assert parted > 0.2
    same = [federation.whole | {n: e[n] for n in ("head.weight", "head.bias")} for e in state.experts]
    assert shift(build_teacher(config, FACTS, dataclasses.replace(state, experts=tuple(same))), images) == 0
    figures = {"class_coverage": 1.0, "held_out_before": 0.5, "held_out_after": 0.6, "step": 5.0, "shift": parted}
    assert codes(distill_findings(figures, 1.0)) == ["meta.shift warning"]


@pytest.mark.parametrize(
    "figures, held, found",
    [
        ({}, 1.0, []),
        ({"class_coverage": 0.4}, 1.0, ["generator.low_coverage warning"]),
        ({"class_coverage": 0.4}, 0.5, []),  # of five classes that clients hold, four
        ({"class_coverage": 0.1}, 1.0, ["generator.low_coverage error"]),
        ({"class_coverage": 0.1}, 0.1, []),
        ({"improvement": 0.005, "late_agreement": 0.8}, 1.0, ["distill.plateau warning"]),
        ({"improvement": 0.005, "late_agreement": 0.95}, 1.0, []),
        ({"held_out_after": 0.895}, 1.0, []),
        ({"held_out_after": 0.85, "improvement": -3.0, "late_agreement": 0.1}, 1.0, ["distill.forgetting warning"]),
        ({"step": 0.0}, 1.0, ["distill.guarded info"]),
        ({"shift": 0.3}, 1.0, ["meta.shift warning"]),
        ({"teacher_entropy": float("nan"), "class_coverage": 0.1}, 1.0, []),
    ],
)  # fmt: skip
def test_rules_for_distillation(figures, held, found):
    sound = {"class_coverage": 0.9, "num_classes": 10.0, "held_out_before": 0.9, "held_out_after": 0.95, "step": 20.0}
    assert codes(distill_findings(sound | figures, held)) == found


@pytest.mark.parametrize(
    "losses, told",
    [([1.61, 1.93, 2.30], True), ([1.61, 1.9], False), ([2.0, 1.0, 0.5], False), ([1.0], False), ([], False)],
)
def test_closing_rounds_that_undo_what_was_learnt(losses, told):
    found = closing_findings(losses)
    assert [f.code for f in found] == ["finetune.forgetting"] * told
    if told:
        assert "from 1.61 in the first closing round to 2.3 in the last" in found[0].message
        assert found[0].value == pytest.approx(2.30 / 1.61)
