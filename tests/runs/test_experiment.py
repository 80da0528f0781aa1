"""Whole runs: equal numbers from every host, caching, repair, and the stages that each switch changes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from ensembles import QUICK, tiny_knobs
from helpers import FACTS, TASKS, TINY, assert_same, stripes_dataset
from safetensors.numpy import load_file

from mosaic_ray.config.presets import ALGORITHMS
from mosaic_ray.config.registry import METHODS
from mosaic_ray.config.resolve import flatten, override, resolve
from mosaic_ray.core.errors import RequestError, RunError
from mosaic_ray.core.types import ROLES, STAGES
from mosaic_ray.runs import runner
from mosaic_ray.storage.store import Store


@pytest.fixture(autouse=True)
def stripes_as_data(monkeypatch):
    """Every run of this module trains on the tiny data set."""
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())


def go(tmp_path: Path, knobs: dict | None = None, **options) -> dict:
    return runner.run(override(TINY, knobs or {}), storage=str(tmp_path), progress=False, **options)


def student(summary: dict) -> dict[str, np.ndarray]:
    return load_file(Path(summary["paths"]["run"]) / "student.safetensors")


def computed(summary: dict) -> set[str]:
    return {name for name, stage in summary["stages"].items() if not stage["cached"]}


def test_a_run_writes_what_the_contract_promises(tmp_path):
    summary = go(tmp_path, name="one")
    folder = tmp_path / "runs" / "one"
    files = {p.name for p in folder.iterdir()}
    assert {
        "config.toml",
        "summary.json",
        "metrics.jsonl",
        "label_counts.json",
        "tensorboard",
        "student.safetensors",
    } <= files
    saved = json.loads((folder / "summary.json").read_text())
    assert saved == json.loads(json.dumps(summary))
    assert set(saved["accuracy"]) == set(ROLES)
    assert tuple(saved["stages"]) == STAGES
    assert all({"seconds", "cached", "key"} <= stage.keys() for stage in saved["stages"].values())
    weights = saved["communication_bytes"]["uplink"]["weights"]
    size = sum(v.nbytes for v in student(summary).values())
    assert weights == 3 * (TINY.warmup.num_rounds + TINY.finetune.num_rounds) * size
    assert saved["communication_bytes"]["uplink"]["generators"] > 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"warmup/client_loss", "student/loss", "meta/held_out_accuracy"} <= {line["tag"] for line in lines}


def test_a_second_run_computes_nothing_and_ends_with_the_same_files(tmp_path):
    first = go(tmp_path)
    metrics = (Path(first["paths"]["run"]) / "metrics.jsonl").read_text()
    weights = student(first)
    second = go(tmp_path)
    assert computed(first) == set(first["stages"])
    assert computed(second) == set()
    assert second["accuracy"] == first["accuracy"]
    assert second["health"] == first["health"]
    assert_same(student(second), weights)
    assert sorted((Path(second["paths"]["run"]) / "metrics.jsonl").read_text().splitlines()) == sorted(
        metrics.splitlines()
    )


def test_a_run_reads_no_result_from_the_store_twice(tmp_path, monkeypatch):
    read: list[str] = []
    get = Store.get

    def watched(store, key):
        found = get(store, key)
        read.extend([key] if found else [])
        return found

    monkeypatch.setattr(Store, "get", watched)
    go(tmp_path)
    assert len(read) == len(set(read))  # one that it computed is held, not read
    read.clear()
    stages = go(tmp_path)["stages"]
    assert len(read) == len(set(read))
    assert {stage["key"] for name, stage in stages.items() if name != "generators"} <= set(read)


@pytest.mark.parametrize(
    "knob, value, anew",
    [
        ("generator.lambda_e", 0.5, {"generators", "distill", "finetune", "evaluate"}),
        ("meta.updates", 12, {"teacher", "distill", "finetune", "evaluate"}),
        ("distill.lr", 5e-4, {"distill", "finetune", "evaluate"}),
        ("finetune.lr", 5e-4, {"finetune", "control", "evaluate"}),
        ("prototypes.k", 3, {"prototypes", "teacher", "distill", "finetune", "evaluate"}),
        ("warmup.lr", 0.04, set(STAGES) - {"partition"}),
        ("runtime.max_hosts", 1, set()),
        ("warmup.checkpoint_rounds", 1, set()),
    ],
)  # fmt: skip
def test_a_changed_knob_computes_anew_what_follows_and_nothing_before(tmp_path, tiny_in_storage, knob, value, anew):
    assert computed(go(tmp_path, {knob: value})) == anew


def test_o15_clients_at_or_above_tau_share_their_generators_between_lambda_i(tmp_path, tiny_in_storage):
    sizes = [sum(row) for row in tiny_in_storage["label_counts"]]
    tau = sorted(sizes)[1]
    go(tmp_path, {"generator.tau": tau})
    other = go(tmp_path, {"generator.tau": tau, "generator.lambda_i": 3.0})
    assert other["stages"]["generators"]["cached_clients"] == sum(size >= tau for size in sizes)


def test_fresh_computes_everything_again_and_ends_the_same(tmp_path, tiny_in_storage):
    again = go(tmp_path, fresh=True)
    assert computed(again) == set(again["stages"])
    assert again["accuracy"] == tiny_in_storage["accuracy"]


@pytest.mark.parametrize("stage", ["warmup", "teacher", "distill", "evaluate"])
@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_a_damaged_result_is_logged_and_computed_again(tmp_path, tiny_in_storage, capsys, stage, harm):
    folder = tmp_path / "objects" / tiny_in_storage["stages"][stage]["key"]
    path = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    if harm == "truncate":
        del data[len(data) // 2 :]
    else:
        data[-3] ^= 0xFF
    path.write_bytes(data)
    second = go(tmp_path)
    assert computed(second) == {stage}
    assert second["accuracy"] == tiny_in_storage["accuracy"]
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs_and_its_control_is_the_same(tmp_path, method):
    summary = go(tmp_path, tiny_knobs(method) if method in QUICK else {"method": method})
    reached = summary["accuracy"]
    assert (reached["teacher"] is None) == (method not in ("mosaic", "fens"))
    assert (reached["distilled"] is None) == (method in ("fedavg", "fedftg", "dfrd", "fens"))
    if method == "fedavg":
        assert reached["final"] == reached["control"]
    assert go(tmp_path, {"method": "fedavg"})["accuracy"]["control"] == reached["control"]


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_algorithm_preset_runs_to_the_end(tmp_path, algorithm):
    knobs = {k: v for k, v in ALGORITHMS[algorithm][0].items() if k not in {"meta.updates", "partition.max_tries"}}
    knobs |= {"generator.classifier_epochs": 1, "prototypes.samples": 20 if algorithm == "reference" else 0}
    if algorithm == "reference":
        knobs["meta.expert_fallback"] = "global"
    if algorithm == "fixed":
        knobs |= {"rehearsal.trial_rounds": 1, "finetune.num_rounds": 2}
    summary = go(tmp_path, knobs)
    assert 0 <= summary["accuracy"]["final"] <= 1
    assert (summary["accuracy"]["teacher"] is None) == (algorithm == "fixed")
    if algorithm == "fixed":
        assert summary["communication"]["measured_over_predicted"] == 1


def test_p3_prototypes_of_every_round_are_kept_where_asked(tmp_path):
    last = go(tmp_path, {"generator.steps": 1, "distill.steps": 1})
    every = go(tmp_path, {"generator.steps": 1, "distill.steps": 1, "prototypes.rounds": "all"})
    sent = [s["communication_bytes"]["uplink"]["prototypes"] for s in (last, every)]
    assert sent[1] == TINY.warmup.num_rounds * sent[0]


def test_o31_the_seed_changes_everything_and_repeats_it(tmp_path):
    first, again = go(tmp_path / "a"), go(tmp_path / "b")
    other = go(tmp_path / "a", {"seed": 1})
    assert_same(student(first), student(again))
    assert other["label_counts"] != first["label_counts"]
    assert {s["key"] for s in other["stages"].values()}.isdisjoint(s["key"] for s in first["stages"].values())


def test_validation_images_are_taken_from_clients_and_reported(tmp_path, undisturbed_tiny):
    summary = go(tmp_path, {"partition.validation_fraction": 0.2})
    assert set(summary["validation_accuracy"]) == set(ROLES) - {"ceiling", "server_student"}
    assert sum(map(sum, summary["label_counts"])) < 240
    assert undisturbed_tiny["validation_accuracy"] is None


def test_a_name_in_use_by_another_configuration_is_kept_aside(tmp_path):
    go(tmp_path, name="x")
    kept = (tmp_path / "runs" / "x" / "summary.json").read_text()
    go(tmp_path, {"distill.lr": 5e-4}, name="x")
    assert (tmp_path / "runs" / "x.1" / "summary.json").read_text() == kept


def test_partial_participation_draws_reproducible_cohorts(tmp_path, undisturbed_tiny):
    knobs = {"federation.cohort_size": 2}
    first, again = go(tmp_path / "a", knobs), go(tmp_path / "b", knobs)
    assert_same(student(first), student(again))
    partial, whole = (summary["communication_bytes"]["uplink"]["weights"] for summary in (first, undisturbed_tiny))
    assert partial < whole


def test_a_class_that_nobody_holds_is_an_error_only_where_asked(tmp_path, monkeypatch):
    data = stripes_dataset()
    keep = data.train.take(np.flatnonzero(data.train.labels != 2))
    monkeypatch.setattr(
        "mosaic_ray.data.load.load_dataset",
        lambda config: type(data)(FACTS, keep, data.test, data.class_names, "two-classes"),
    )
    summary = go(tmp_path)
    assert "partition.empty_class" in {f["code"] for f in summary["health"]}
    with pytest.raises(RequestError, match=r"no client holds class 2"):
        go(tmp_path, {"meta.expert_fallback": "error"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_where_none_is_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(RequestError, match=r"runtime\.gpus_per_client = 0\.5: there are 0 GPUs"):
        go(tmp_path, {"runtime.gpus_per_client": 0.5})
    assert not list(tmp_path.iterdir())


def test_networks_are_refused_before_an_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: pytest.fail("images were read"))
    knobs = {"data.name": "tiny_imagenet", "federation.optimiser": "fedrolex", "federation.widths": (1.0, 0.01)}
    with pytest.raises(RequestError, match=r"0\.01"):
        go(tmp_path, knobs)


def test_storage_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="--storage"):
        go(tmp_path / "file" / "below")


@pytest.mark.parametrize("name", ["../x", "", "a/b"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(RequestError, match="--name"):
        go(tmp_path, name=name)


def test_a_client_that_fails_is_named_with_stage_and_round(tmp_path, monkeypatch):
    from mosaic_ray.federated.client import TrainTask

    train = TrainTask.run

    def broken(task, context, shard, client_id, *inputs):
        if client_id == 2 and task.round_num == 1:
            raise ZeroDivisionError("no such thing")
        return train(task, context, shard, client_id, *inputs)

    monkeypatch.setattr(TrainTask, "run", broken)
    with pytest.raises(RunError, match="stage warmup, round 1, client 2: ZeroDivisionError: no such thing") as caught:
        go(tmp_path, name="x")
    log = tmp_path / "runs" / "x" / "error.log"
    assert caught.value.__notes__ == [f"log: {log}"]
    assert "in broken" in log.read_text()
    saved = json.loads((log.parent / "summary.json").read_text())
    assert (saved["status"], saved["stage"], saved["round"], saved["client"]) == ("failed", "warmup", 1, 2)


def test_every_switch_of_the_algorithm_is_a_knob_with_its_presets_value():
    """The table of docs/algorithm.md section 2."""
    reference, repaired, paper = (flatten(resolve(f"demo+{name}")) for name in ("reference", "distilled", "paper"))
    table = {
        "generator.stage": ("before", "after_warmup", "after_warmup"),
        "generator.classifier_source": ("fresh", "client", "client"),
        "generator.classifier_mode": ("train", "eval", "eval"),
        "generator.discriminator": ("dcgan", "shared_trunk", "dcgan"),
        "generator.lambda_e": (0.0, 1.0, 1.0),
        "generator.lambda_d": (5.0, 5.0, 5.0),
        "generator.lambda_i": (0.0, 10.0, 10.0),
        "generator.gan_range": ("model_norm", "pm1_then_renorm", "pm1_then_renorm"),
        "prototypes.rounds": ("all", "last", "last"),
        "prototypes.weighting": ("uniform", "uniform", "size"),
        "prototypes.held_out": (0.0, 0.0, 0.25),
        "distill.start": ("global", "global", "refit"),
        "meta.input": ("full", "full", "head"),
        "meta.expert_embedding": (False, False, True),
        "meta.ema_bias_correction": (False, False, True),
        "distill.jsd": ("bhattacharyya", "true", "true"),
        "distill.gen_sampling": ("uniform", "uniform", "quality"),
        "distill.guard": (False, False, True),
    }
    for name, values in table.items():
        assert (reference[name], paper[name], repaired[name]) == values, name


# --- Ray -------------------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.mark.ray
@pytest.mark.parametrize("hosts", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_serial_and_ray_end_with_the_same_bits_for_any_number_of_actors(
    tmp_path, ray_up, monkeypatch, undisturbed_tiny, hosts
):
    """Clients do not import torchvision either: they decode no images."""
    monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", _watched())
    on_ray = go(tmp_path, {"runtime.host": "ray", "runtime.max_hosts": hosts})
    assert computed(on_ray) == set(on_ray["stages"])
    assert on_ray["accuracy"] == undisturbed_tiny["accuracy"]
    assert_same(student(on_ray), student(undisturbed_tiny))
    for name in ("warmup", "generators", "prototypes", "finetune"):
        assert 0 < on_ray["stages"][name]["client_seconds"] < hosts * on_ray["stages"][name]["seconds"], name


def _watched() -> type:
    """Return a ClientActor that fails if torchvision is imported."""
    from mosaic_ray.execution.backend import ClientActor

    class Watched(ClientActor):
        def work(self, common, client_id, *rest):
            import sys

            done = super().work(common, client_id, *rest)
            assert "torchvision" not in sys.modules, "torchvision was imported in a client"
            return done

    return Watched


@pytest.mark.ray
@pytest.mark.parametrize(
    "work", ["train", *(pytest.param(work, marks=pytest.mark.slow) for work in ("generate", "prototypes"))]
)
def test_an_actor_killed_in_mid_work_costs_that_work_alone(tmp_path, ray_up, work, monkeypatch, undisturbed_tiny):
    """SIGKILL from within, at the moment when client 1's work begins; the run ends with the same bits."""
    marker = tmp_path / "died"
    monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", _dying(work, marker))
    on_ray = go(tmp_path / "ray", {"runtime.host": "ray", "runtime.max_hosts": 2})
    assert marker.exists()
    assert_same(student(on_ray), student(undisturbed_tiny))


def _dying(work: str, marker: Path) -> type:
    """Return a ClientActor; the first one that gets ``work`` of client 1 dies of SIGKILL."""
    from mosaic_ray.execution.backend import ClientActor

    class Dying(ClientActor):
        def work(self, common, client_id, *rest):
            if isinstance(common[2], TASKS[work]) and client_id == 1 and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().work(common, client_id, *rest)

    return Dying


@pytest.mark.ray
def test_an_actor_that_can_never_do_it_ends_the_run_with_an_address(tmp_path, ray_up, monkeypatch):
    from mosaic_ray.execution.backend import ClientActor

    class Doomed(ClientActor):
        def work(self, common, client_id, *rest):
            if client_id == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().work(common, client_id, *rest)

    monkeypatch.setattr("mosaic_ray.execution.backend.ClientActor", Doomed)
    with pytest.raises(RunError, match="stage warmup, client 1: its actor died"):
        go(tmp_path, {"runtime.host": "ray", "runtime.max_hosts": 2, "federation.max_client_failures": 2})


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_train_workers_end_where_the_process_ends(tmp_path, ray_up, workers):
    knobs = {"runtime.host": "ray", "runtime.max_hosts": 2}
    alone = student(go(tmp_path, knobs))
    spread = student(go(tmp_path, knobs | {"distill.workers": workers}))
    if workers == 1:
        assert_same(spread, alone)
    for name, value in alone.items():
        np.testing.assert_allclose(spread[name], value, atol=2e-4, err_msg=name)
