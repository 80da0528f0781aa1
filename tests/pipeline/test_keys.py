"""Stage keys: the knobs behind each, the chain of a run, and the work of many runs counted in distinct results."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ensembles import QUICK, tiny_knobs
from helpers import FACTS, TINY, stripes_dataset

from mosaic_ray.config.registry import DATASETS, METHODS
from mosaic_ray.config.resolve import KNOBS, flatten, override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.types import STAGES
from mosaic_ray.data.load import known_facts, load_dataset
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import StageWork, stage_keys, unique_work

ALL = set(STAGES)
AFTER_PARTITION = ALL - {"partition"}
AFTER_DISTILL = {"distill", "finetune", "evaluate"}
AFTER_TEACHER = {"teacher"} | AFTER_DISTILL

#: Knob or section -> the stages of Mosaic with keys that depend on it; the longest name counts.
FOLLOWS = {
    "method": set(), "algorithm": set(), "seed": ALL,
    "data": ALL, "data.root": set(), "data.download": set(),
    "partition": ALL,
    "model": AFTER_PARTITION, "model.student": {"server_student", "evaluate"}, "federation": AFTER_PARTITION,
    "federation.max_client_failures": set(),  # every client has to answer: see the test of those that may be left out
    "warmup": AFTER_PARTITION, "warmup.checkpoint_rounds": set(),
    "generator": {"generators"} | AFTER_DISTILL,
    "generator.judge": {"judge_statistics", "judge", "generators"} | AFTER_DISTILL,
    "prototypes": {"prototypes"} | AFTER_TEACHER,
    "prototypes.weighting": AFTER_TEACHER,
    "prototypes.rounds": AFTER_PARTITION,  # "all" has them made during the warm-up
    "meta": AFTER_TEACHER,
    "distill": AFTER_DISTILL,
    "finetune": {"finetune", "control", "evaluate"},
    "finetune.adapt_steps": {"final_models"},
    "finetune.head": {"finetune", "closing_statistics", "closing_head", "evaluate"},
    "student": set(),  # without model.student
    "rehearsal": set(), "rehearsal.weight": {"finetune", "evaluate"},  # the rest only above weight 0
    "rehearsal.candidates": {"trial_0", "trial_0.5", "rehearsal", "finetune", "evaluate"},
    "runtime": set(), "runtime.ceiling": {"ceiling", "evaluate"},
    "runtime.driver_threads": AFTER_TEACHER | {"own_models"}, "runtime.precision": AFTER_PARTITION,
    "runtime.cpus_per_client": AFTER_PARTITION, "runtime.device": AFTER_PARTITION,
    "runtime.clients_per_batch": AFTER_PARTITION,
}  # fmt: skip


def another(name: str) -> object:
    """A value of knob ``name`` that is allowed and is not TINY's."""
    value, meta = flatten(TINY)[name], KNOBS[name].metadata
    special = {
        "method": "mosaic", "distill.workers": 2, "runtime.cpus_per_client": 2.0, "model.classifiers": ("mobilenet",),
        "model.student": "mobilenet", "data.modalities": ("pix", "fou"), "partition.modalities": "each:2",
        "federation.strategy": "fedrolex", "runtime.device": "cuda", "runtime.gpus_per_client": 0.5,
    }  # fmt: skip
    if name in special:
        return special[name]
    if meta["choices"]:
        return next(choice for choice in meta["choices"] if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple):
        return (0.5,)
    if isinstance(value, int):
        return value + 1
    return value / 2 or 0.25


def changed(before: dict, after: dict) -> set[str]:
    """The stages whose keys differ, those that only ``after`` has included."""
    assert before.keys() <= after.keys()
    return {stage for stage in after if before.get(stage) != after[stage]}


@pytest.mark.parametrize("name", KNOBS)
def test_a_stages_key_changes_with_what_it_depends_on_and_nothing_else(name):
    names = [named for named in FOLLOWS if name == named or name.startswith(f"{named}.")]
    base = override(TINY, {"data.name": "mfeat"}) if name.endswith(".modalities") else TINY
    assert changed(stage_keys(base), stage_keys(override(base, {name: another(name)}))) == FOLLOWS[max(names, key=len)]


def test_rounds_before_a_new_head_do_not_follow_the_students_head():
    anew = {"finetune.head": "lda_head"}
    plain, own = (stage_keys(override(TINY, {"method": "fedavg"} | more)) for more in ({}, anew))
    assert plain["finetune"] == own["finetune"] == own["control"]
    plain, own = (stage_keys(override(TINY, {"method": "mosaic"} | more)) for more in ({}, anew))
    assert plain["finetune"] != own["finetune"] and plain["control"] == own["control"]


@pytest.mark.parametrize(
    "head, knob", [("prototype_head", {"prototypes.k": 3}), ("refit", {"prototypes.subsets": "all"})]
)
def test_the_choice_of_a_weight_follows_what_its_trials_heads_are_made_from(head, knob):
    knobs = {"method": "mosaic", "generator.family": "cvae", "distill.steps": 0, "rehearsal.candidates": (1.0,)}
    base = override(TINY, knobs | {"finetune.head": head})
    found = changed(stage_keys(base), stage_keys(override(base, knob)))
    assert "rehearsal" in found and "finetune" in found and not {"warmup", "generators", "trial_1"} & found


def test_kernels_that_sum_in_any_order_are_in_the_keys_of_gpus_alone():
    any_order = {"runtime.deterministic": False}
    assert stage_keys(TINY) == stage_keys(override(TINY, any_order))
    gpus = override(TINY, {"runtime.device": "cuda"})
    assert changed(stage_keys(gpus), stage_keys(override(gpus, any_order))) == AFTER_PARTITION


def test_failures_of_clients_matter_only_where_some_may_be_left_out():
    after = {"federation.max_client_failures": 4}
    failed_clients = override(TINY, {"federation.min_cohort": 1})
    assert changed(stage_keys(failed_clients), stage_keys(override(failed_clients, after))) == AFTER_PARTITION
    drops = override(TINY, {"federation.drop_rate": 0.25})
    assert changed(stage_keys(TINY), stage_keys(drops)) == AFTER_PARTITION


def test_generators_of_the_start_do_not_follow_the_warm_up():
    before = override(TINY, {"generator.stage": "before"})
    for name in ("warmup.lr", "warmup.batch_size"):
        after = override(before, {name: another(name)})
        assert changed(stage_keys(before), stage_keys(after)) == AFTER_PARTITION - {"generators"}
    fresh = override(before, {"generator.classifier_source": "fresh"})
    assert changed(stage_keys(fresh), stage_keys(override(fresh, {"warmup.lr": 0.04}))) == AFTER_PARTITION - {
        "generators"
    }
    assert changed(stage_keys(fresh), stage_keys(override(fresh, {"warmup.batch_size": 17}))) == AFTER_PARTITION


def test_conditional_generators_do_not_follow_the_diversity():
    before = override(TINY, {"generator.conditional": True})
    after = override(before, {"generator.lambda_d": 7.0, "generator.div_support": "all"})
    assert stage_keys(before) == stage_keys(after) != stage_keys(TINY)


def test_a_teacher_that_learns_from_synthetic_images_follows_the_generators():
    synthetic = override(TINY, {"meta.data": "synthetic"})
    after = override(synthetic, {"generator.lambda_e": 2.0})
    assert changed(stage_keys(synthetic), stage_keys(after)) == {"generators"} | AFTER_TEACHER


def test_one_train_worker_is_none_and_the_data_are_what_they_hold():
    assert stage_keys(TINY) == stage_keys(override(TINY, {"distill.workers": 1}))
    known = stage_keys(TINY, "stripes", FACTS)
    assert changed(known, stage_keys(TINY)) == ALL
    assert changed(known, stage_keys(TINY, "other", FACTS)) == ALL
    assert changed(known, stage_keys(TINY, "stripes", replace(FACTS, std=(0.5,)))) == ALL
    assert known == stage_keys(override(TINY, {"data.name": "mnist", "data.image_size": 16}), "stripes", FACTS)


def test_o15_the_inversion_term_is_in_the_keys_of_small_clients_alone():
    sizes = [99, 100, 101]  # tau is 100
    other = override(TINY, {"generator.lambda_i": 3.0})
    keys, others = (stage_keys(c, "stripes", FACTS, sizes)["generators"] for c in (TINY, other))
    assert [a == b for a, b in zip(keys, others, strict=True)] == [False, True, True]
    assert len(set(keys)) == 3
    off = override(TINY, {"generator.lambda_i": 0.0})
    for more in ({"generator.tau": 5}, {"generator.inversion_scale": 0.0}):
        assert stage_keys(off, sizes=sizes) == stage_keys(override(off, more), sizes=sizes)


CASES = [
    {"method": "mosaic"}, {"method": "prototype_head"}, {"method": "fedavg"},
    {"method": "lda_head"}, {"method": "ccvr"}, {"finetune.num_rounds": 0}, {"distill.workers": 1},
    {"generator.stage": "before"},
    {"generator.classifier_source": "fresh", "generator.classifier_epochs": 1}, {"prototypes.rounds": "all"},
    {"generator.lambda_i": 0.0}, {"meta.data": "synthetic"}, {"federation.cohort_size": 2},
    {"generator.family": "cvae", "distill.steps": 0, "rehearsal.candidates": (1.0,), "finetune.head": "refit"},
    {"finetune.head": "prototype_head"},
    *(tiny_knobs(method) for method in QUICK),
]  # fmt: skip


def test_the_chain_is_what_a_run_logs(tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    small = {"generator.steps": 2, "distill.steps": 2, "meta.updates": 2, "meta.feedforward": 4, "generator.tau": 80}
    quick = override(TINY, small | {"warmup.num_rounds": 1, "finetune.num_rounds": 1, "runtime.eval_rounds": 0})
    assert {case.get("method", "mosaic") for case in CASES} == set(METHODS)
    for case in CASES:
        config = override(quick, case)
        summary = runner.run(config, storage=str(tmp_path), progress=False)
        sizes = [sum(row) for row in summary["label_counts"]]
        chain = stage_keys(config, "stripes", FACTS, sizes)
        logged = {stage: entry["key"] for stage, entry in summary["stages"].items()}
        assert list(chain) == list(logged), case
        for stage, keys in chain.items():
            assert all((tmp_path / "objects" / key).is_dir() for key in keys), (case, stage)
            assert stage == "generators" or keys == (logged[stage],), (case, stage)


def test_keys_and_work_need_neither_torch_nor_ray():
    code = "import sys, mosaic_ray.runs.plan as w; print({'torch', 'ray', 'torchvision'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "set()\n"


# --- work ------------------------------------------------------------------------------------------------------------

GRID = [
    {"generator.lambda_e": e, "generator.lambda_d": d, "generator.lambda_i": i}
    for e, d, i in itertools.product((0.5, 1.0, 2.0), (2.0, 5.0, 10.0), (5.0, 10.0, 15.0))
]
WIDE = override(ExperimentConfig(), {"partition.num_clients": 100, "runtime.precision": "fp32"})


def work_of(configs: list[ExperimentConfig], sizes: list[int] | None = None) -> dict[str, StageWork]:
    chains = [stage_keys(config, sizes=sizes) for config in configs]
    return {row.stage: row for row in unique_work(chains, configs)}


@pytest.mark.parametrize("num_small", [0, 40, 100, None])
def test_the_grid_of_27_lambdas_counts_what_brute_force_counts(num_small):
    sizes = None if num_small is None else [WIDE.generator.tau - (k < num_small) for k in range(100)]
    configs = [override(WIDE, point) for point in GRID]
    rows = work_of(configs, sizes)

    def generator(point: dict, client: int) -> tuple:
        small = sizes is None or sizes[client] < WIDE.generator.tau
        return client, *(value for name, value in point.items() if small or name != "generator.lambda_i")

    sets = [tuple(generator(point, k) for k in range(100)) for point in GRID]
    generators, students = len(set(itertools.chain(*sets))), len(set(sets))
    assert (generators, students) == ((900, 9) if num_small == 0 else (900 + 18 * (num_small or 100), 27))
    expected = dict.fromkeys(("partition", "warmup", "prototypes", "teacher", "control", "own_models"), 1)
    expected |= {"generators": generators} | dict.fromkeys(AFTER_DISTILL, students)
    assert {stage: row.unique for stage, row in rows.items()} == expected
    assert tuple(rows) == STAGES
    assert {stage: row.asked for stage, row in rows.items()} == dict.fromkeys(STAGES, 27) | {"generators": 2700}
    closing = WIDE.finetune.num_rounds * 100
    assert {stage: row.work for stage, row in rows.items()} == {
        "partition": {"draws": 1},
        "warmup": {"client rounds": 3000, "local steps": 30_000},
        "generators": {"steps": 800 * generators},
        "prototypes": {"clients": 100},
        "teacher": {"updates": 500},
        "distill": {"steps": WIDE.distill.steps * students},
        "finetune": {"client rounds": closing * students, "local steps": 10 * closing * students},
        "control": {"client rounds": closing, "local steps": 10 * closing},
        "own_models": {"models": 100},
        "evaluate": {"models": 3 + 2 * students},  # after the warm-up, the teacher and the control: the same for all
    }


def test_omegas_and_seeds_share_nothing():
    configs = [
        override(TINY, point | {"partition.omega": omega, "seed": seed})
        for point, omega, seed in itertools.product(GRID[:4], (0.01, 1.0), (0, 1, 2))
    ]
    assert {stage: row.unique for stage, row in work_of(configs).items()} == {
        "partition": 6, "warmup": 6, "generators": 72, "prototypes": 6, "teacher": 6, "distill": 24, "finetune": 24,
        "control": 6, "own_models": 6, "evaluate": 24,
    }  # fmt: skip


def test_methods_share_a_warm_up_and_the_control_is_federated_averagings_own_closing():
    rows = work_of([override(TINY, {"method": method}) for method in METHODS])
    assert {stage: (row.asked, row.unique) for stage, row in rows.items()} == {
        "partition": (12, 1), "warmup": (12, 3), "control_warmup": (2, 0), "generators": (6, 3), "prototypes": (2, 1),
        "teacher": (1, 1), "class_statistics": (2, 2), "gate": (1, 1), "distill": (8, 8), "finetune": (12, 11),
        "control": (12, 0), "own_models": (12, 3), "evaluate": (12, 12),
    }  # fmt: skip
    pools, passes = 2 * 20 * (30 + 20), 5 * 63  # of DENSE and Co-Boosting; of FedCVAE
    assert rows["distill"].work == {"steps": 10 + pools + passes, "fits": 3, "server steps": 3 * 3 * 3}
    assert rows["control"].work == {}
    # warm-ups; teachers; students; closings, one the control's
    assert rows["evaluate"].work == {"models": 3 + 2 + 8 + 11}
    assert set(work_of([override(TINY, {"method": "fedavg"})])) == {
        "partition", "warmup", "finetune", "control", "own_models", "evaluate",
    }  # fmt: skip


def test_units_follow_the_knobs():
    config = override(
        TINY,
        {
            "federation.cohort_size": 2, "generator.epochs": 7, "generator.classifier_source": "fresh",
            "generator.classifier_epochs": 5, "prototypes.rounds": "all", "finetune.num_rounds": 0,
        },
    )  # fmt: skip
    work = {stage: row.work for stage, row in work_of([config]).items()}
    assert work["warmup"] == {"client rounds": 6, "local steps": 18}
    assert work["generators"] == {"epochs": 21, "classifier epochs": 15}
    assert work["prototypes"] == {"clients": 0}
    assert work["finetune"] == {"client rounds": 0, "local steps": 0}


# --- data sets that are not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, channels", [(0, 0), (16, 3), (28, 1)])
def test_facts_are_known_without_files_and_are_those_of_the_files(size, channels):
    data = override(TINY, {"data.image_size": size, "data.channels": channels}).data
    assert known_facts(data) == load_dataset(data).facts


def test_every_data_set_is_known_but_for_what_must_be_measured():
    data = TINY.data
    assert all(known_facts(replace(data, name=name)) for name in DATASETS)
    facts = known_facts(replace(data, name="cifar100"))
    assert (facts.num_classes, facts.channels, facts.image_size, len(facts.mean)) == (100, 3, 32, 3)
    assert known_facts(replace(data, name="cifar100", channels=1)) is None
    assert known_facts(replace(data, name="parquet:x")) is None
