"""How many clients share a GPU: measured or estimated, capped, and halved where memory runs out."""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runner import refused_by
from helpers import FACTS, TINY, stripes, stripes_dataset

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import OutOfGpuMemory, RunError
from mosaic_ray.execution import backend, devices, gpu_memory
from mosaic_ray.execution.backend import ClientActor, run_task, take_device
from mosaic_ray.execution.devices import halved, settle, share_for, with_estimate, with_measurement
from mosaic_ray.execution.gpu_memory import (
    CONTEXT_BYTES,
    GpuFacts,
    estimated_bytes,
    is_out_of_memory,
    largest,
    least_bytes,
    measure,
    run_twice,
    steps_of,
    surely_taken,
    work_of,
)
from mosaic_ray.execution.placement import Placement
from mosaic_ray.execution.ray_session import RAY_ENVIRONMENT, Resources
from mosaic_ray.execution.server import ServerActor
from mosaic_ray.federated.client import Task, TrainTask
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps import runner as sweep_runner
from mosaic_ray.sweeps import tune as tuning
from mosaic_ray.sweeps.console import SweepView
from mosaic_ray.sweeps.queue import TrialQueue
from mosaic_ray.sweeps.search import FixedTrials
from mosaic_ray.sweeps.space import Choice, SweepPlan
from mosaic_ray.sweeps.state import SweepState, make_trials

GIB = 2**30
ON_RAY = override(TINY, {"runtime.host": "ray", "runtime.cpus_per_client": 0.25})
STATION = Resources(16, 2, 64.0 * GIB, gpu_bytes=8.0 * GIB)


def work(samples: int = 240, **knobs: Any):
    return work_of(override(ON_RAY, {name.replace("__", "."): value for name, value in knobs.items()}), FACTS, samples)


# --- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs, kinds",
    [
        ({}, ["TrainTask", "GeneratorTask", "GeneratorTask", "PrototypesTask"]),  # with the inversion loss and without
        ({"generator__lambda_i": 0.0}, ["TrainTask", "GeneratorTask", "PrototypesTask"]),
        ({"generator__classifier_source": "fresh"}, ["TrainTask", "GeneratorTask", "GeneratorTask", "PrototypesTask"]),
        ({"method": "fedavg"}, ["TrainTask"]),
        ({"method": "fedavg", "federation__strategy": "scaffold"}, ["TrainTask"]),
        ({"method": "fedavg", "federation__strategy": "fedrolex", "federation__widths": (1.0, 0.5)}, ["TrainTask"]),
        ({"method": "fedavg", "model__classifiers": ("cnn", "resnet18", "cnn")}, ["TrainTask", "TrainTask"]),
    ],
)  # fmt: skip
def test_every_kind_of_a_clients_work_runs_for_a_few_steps(knobs, kinds):
    steps = list(steps_of(work(**knobs), torch.device("cpu")))
    assert [step.func.__self__.__class__.__name__ for step in steps] == kinds
    for step in steps:
        step()


def test_a_client_that_keeps_a_state_trains_with_it_too(monkeypatch):
    given, train = [], TrainTask.run

    def watched(task, context, shard, client_id, broadcast, own):
        given.append(sorted(own.state))
        return train(task, context, shard, client_id, broadcast, own)

    monkeypatch.setattr(TrainTask, "run", watched)
    for strategy in ("fedavg", "moon"):
        [step] = steps_of(work(method="fedavg", federation__strategy=strategy), torch.device("cpu"))
        run_twice(step)
    assert [bool(state) for state in given] == [False, False, True]


def test_a_shard_is_larger_than_an_equal_share_but_no_larger_than_the_data():
    assert work_of(override(TINY, {"partition.num_clients": 10}), FACTS, 1000).samples == 400
    assert work_of(override(TINY, {"partition.num_clients": 2}), FACTS, 1000).samples == 1000
    assert work_of(TINY, FACTS, 0).samples == 1


def looked(monkeypatch, works, answers, there=STATION, up=True):
    """Return the resources after a measurement that ``answers``, the lines that were said, and what was measured."""
    said, asked = [], []
    monkeypatch.setattr(devices, "connect", lambda address: there)
    monkeypatch.setattr(devices, "gpu_kinds", lambda: ([], up))
    monkeypatch.setattr(devices, "measure", lambda works, kinds, **how: asked.append((works, how)) or answers)
    return with_measurement(there, works, "local", said.append), said, asked


@pytest.mark.parametrize(
    "peak, clients", [(1, 16), (GIB, 7), (3 * GIB, 2), (5 * GIB, 1), (20 * GIB, 1)]
)  # of 95 % of 8 GiB
def test_the_share_is_what_the_measured_peak_leaves_room_for(monkeypatch, peak, clients):
    there, said, _ = looked(monkeypatch, [work()], [GpuFacts(peak, 8 * GIB, True)])
    assert there.share == share_for(clients) and int(1 / there.share) == clients
    assert said == []


def test_the_smallest_kind_of_gpu_counts(monkeypatch):
    answers = [GpuFacts(GIB, 80 * GIB, True), GpuFacts(GIB, 4 * GIB, False)]
    there, _, _ = looked(monkeypatch, [work()], answers)
    assert (there.share, there.gpu_bytes) == (share_for(3), 4 * GIB)


@pytest.mark.parametrize("answers", [[], [GpuFacts(0, 8 * GIB, True, "a reason")], [GpuFacts(0, 0, False, "a reason")]])
def test_a_measurement_that_fails_is_one_line_and_an_estimate(monkeypatch, answers):
    there, [line], _ = looked(monkeypatch, [work()], answers)
    assert there.share == with_estimate(STATION, [work()]).share > 0
    assert ("a reason" in line) == bool(answers)
    assert "estimated" in line and "\n" not in line


def test_gpus_that_torch_cannot_use_are_left_alone(monkeypatch):
    there, [line], _ = looked(monkeypatch, [work()], [None])
    assert "torch cannot use them" in line
    assert settle(ON_RAY, there).runtime.device == "cpu"
    assert "runtime.device = cuda" in refused_by(settle, override(ON_RAY, {"runtime.device": "cuda"}), there)


@pytest.mark.parametrize(
    "knobs, there",
    [
        ({}, replace(STATION, gpus=0.0)), ({"runtime__device": "cpu"}, STATION), ({"runtime__host": "serial"}, STATION),
        ({"runtime__gpus_per_client": 0.5}, STATION), ({"runtime__gpus_per_client": 2.0}, STATION),
    ],
)  # fmt: skip
def test_nothing_is_measured_where_no_share_is_to_be_found(monkeypatch, knobs, there):
    found, said, asked = looked(monkeypatch, [work(**knobs)], [], there)
    assert (found, said, asked) == (there, [], [])


def test_a_sweep_measures_the_largest_of_its_clients(monkeypatch):
    works = [work(model__width=width, seed=seed) for seed in range(9) for width in (4, 64, 8)]
    _, _, [(asked, _)] = looked(monkeypatch, works, [GpuFacts(GIB, 8 * GIB, True)])
    assert [one.config.model.width for one in asked] == [64, 8, 4]
    many = [work(warmup__batch_size=size) for size in range(1, 60)]
    assert largest(many)[0].config.warmup.batch_size == 59 and len(largest(many)) < 10


def test_it_waits_for_a_machine_that_is_yet_to_start(monkeypatch):
    answer = [GpuFacts(GIB, 8 * GIB, True)]
    _, [line], [(_, how)] = looked(monkeypatch, [work()], answer, up=False)
    assert "waiting" in line and how == {"wait_for_machines": True}
    assert looked(monkeypatch, [work()], answer)[2][0][1] == {"wait_for_machines": False}


def test_precision_follows_the_gpus_and_not_what_was_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    auto = work(runtime__precision="auto")
    for bf16 in (True, False):
        there, _, _ = looked(monkeypatch, [auto], [GpuFacts(GIB, 8 * GIB, bf16)])
        assert settle(auto.config, there).runtime.precision == ("bf16" if bf16 else "fp32")
        explicit = work(runtime__precision="auto", runtime__gpus_per_client=0.5)
        there, _, [(asked, _)] = looked(monkeypatch, [explicit], [GpuFacts(0, 8 * GIB, bf16)])
        assert (there.bf16, asked) == (bf16, [])
    monkeypatch.setattr(devices, "gpu_kinds", lambda: (["accelerator_type:A100", "accelerator_type:V100"], True))
    monkeypatch.setattr(devices, "measure", lambda *_, **how: [GpuFacts(GIB, 8 * GIB, True)])
    assert with_measurement(STATION, [auto], "local", print).bf16 is False  # whichever kind answered


# --- estimated -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [{"model__width": 64}, {"warmup__batch_size": 4096}, {"generator__batch_size": 8192}, {"generator__ngf": 256}],
)  # fmt: skip
def test_a_larger_client_is_estimated_to_take_more(knobs):
    assert estimated_bytes(work(**knobs)) > estimated_bytes(work()) > CONTEXT_BYTES
    assert least_bytes(work()) < estimated_bytes(work())


def test_condensed_images_are_estimated_by_their_number_and_at_any_size():
    family = {"generator__family": "condensed", "generator__image_scale": 1}
    few, many = (work(**family, generator__images_per_class=count) for count in (200, 40_000))
    assert estimated_bytes(many) > estimated_bytes(few) > CONTEXT_BYTES
    knobs, needs = surely_taken(many)["generators"]
    pixels = 4 * many.facts.num_classes * 40_000 * math.prod(many.facts.input_shape)
    assert knobs == ("generator.images_per_class", "generator.batch_size") and needs >= 4 * pixels
    odd = replace(few, facts=replace(few.facts, image_size=20))  # no GAN draws 20 pixels a side
    assert surely_taken(odd)["generators"][1] > surely_taken(few)["generators"][1]


def test_an_estimate_is_near_what_shapes_add_up_to():
    one = work(method="fedavg", warmup__batch_size=32)
    model = torch.nn.Sequential(*backend_classifier(one))
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert estimated_bytes(one) > CONTEXT_BYTES + 4 * weights
    double = estimated_bytes(work(method="fedavg", warmup__batch_size=64)) - estimated_bytes(one)
    again = estimated_bytes(work(method="fedavg", warmup__batch_size=96)) - estimated_bytes(one)
    assert again == 2 * double > 0  # linear in the batch


def backend_classifier(one):
    from mosaic_ray.federated.client import ClientContext

    return [ClientContext(one.config, one.facts, torch.device("cpu")).classifier()]


@pytest.mark.parametrize("name", ["cnn", "resnet18", "mobilenet"])
def test_one_image_on_a_real_network_counts_as_a_batch_without_memory(name, monkeypatch):
    counted = []
    for most in (0, gpu_memory.MOST_BUILT):
        monkeypatch.setattr(gpu_memory, "MOST_BUILT", most)
        gpu_memory._shapes_of_classifier.cache_clear()
        gpu_memory._shapes_of_pair.cache_clear()
        gpu_memory._shapes_of_generator.cache_clear()
        counted.append((gpu_memory._classifier(TINY, FACTS, name, 16), gpu_memory._generator_pair(TINY, FACTS)))
    assert counted[0] == counted[1] and counted[0][0].outputs > 0


def test_a_network_without_shapes_gets_the_usual_share():
    broken = work(model__classifier="math:sqrt")
    assert with_estimate(STATION, [broken]).share == devices.USUAL_SHARE
    assert with_estimate(STATION, []).share == devices.USUAL_SHARE


def test_a_share_that_cannot_hold_one_client_is_refused(monkeypatch):
    def small(share: float):
        return work(model__classifier="resnet18", model__width=64, runtime__gpus_per_client=share)

    line = refused_by(lambda: looked(monkeypatch, [small(0.001)], []))
    assert line.startswith("runtime.gpus_per_client = 0.001: ")
    for share in (0.5, 1.0, 2.0, 0.0):
        looked(monkeypatch, [small(share)], [])
    looked(monkeypatch, [small(0.001)], [], replace(STATION, gpu_bytes=0.0))  # the GPU is not known


@pytest.mark.parametrize("clients", range(1, 17))
def test_a_gpu_holds_as_many_shares_as_it_is_divided_into(clients):
    share = share_for(clients)
    assert round(share * 10_000) * clients <= 10_000  # as Ray counts them
    assert int(1 / share + 1e-9) == clients
    assert int(1 / halved(share) + 1e-9) == max(1, clients // 2)
    assert halved(2.0) == 2.0


# --- capped ----------------------------------------------------------------------------------------------------------


def test_an_actors_memory_is_capped_by_its_share(monkeypatch):
    caps = []
    card = type("Card", (), {"total_memory": 8 * GIB})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    assert [take_device(share) for share in (0.0, 0.25, 0.0625, 0.5, 1.0)] == ["cpu", *["cuda"] * 4]
    assert caps == [pytest.approx(0.25 - 600 / 8192), pytest.approx(0.03125)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RunError, match="torch finds no CUDA device"):
        take_device(0.25)


# --- out of memory ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fails(Task[None, None, None]):
    """Fails as torch does."""

    error: Exception

    def run(self, context, shard, client_id, broadcast, own):
        raise self.error


NO_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


@pytest.mark.parametrize("error", [*NO_MEMORY, RuntimeError("CUDA error: an illegal memory access"), ValueError("no")])
def test_an_error_for_lack_of_gpu_memory_is_known_as_such(error):
    assert is_out_of_memory(error) == (error in NO_MEMORY)
    shard = stripes(3)
    with pytest.raises(RunError) as caught:
        run_task(TINY, FACTS, "cpu", Fails(error), 1, (shard.images, shard.labels), None, None)
    assert isinstance(caught.value, OutOfGpuMemory) == (error in NO_MEMORY)
    assert caught.value.client == 1
    again = pickle.loads(pickle.dumps(caught.value)).at("warmup")
    assert (type(again), again.client, again.stage) == (type(caught.value), 1, "warmup")


@dataclass(frozen=True)
class Count(Task[int, int, Any]):
    """Returns what it was sent."""

    def run(self, context, shard, client_id, broadcast, own):
        return client_id, broadcast + own


def hungry(needs: float) -> type:
    """Actors on the CPU whose tasks run out of memory below a share of ``needs``."""

    class Client(ClientActor):
        def __init__(self, share: float) -> None:
            super().__init__(0.0)
            self._share = share

        def work(self, common, client_id, *rest):
            import ray

            held = ray.get_runtime_context().get_assigned_resources()["GPU"]
            assert held == pytest.approx(self._share, abs=1e-4)
            if client_id % 3 == 1 and self._share < needs:
                fails = Fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
                common = (*common[:2], fails, common[3])
            return super().work(common, client_id, *rest)

    return Client


on_ray = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[Any]:
    """Ray with two pretended GPUs."""
    import ray

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="mg", dir="/tmp") as folder:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        ray.init(
            address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR", _temp_dir=folder, object_store_memory=100 * 2**20,
        )  # fmt: skip
        module = sys.modules[__name__]
        ray.cloudpickle.register_pickle_by_value(module)  # workers cannot import what tests share
        try:
            yield ray
        finally:
            ray.cloudpickle.unregister_pickle_by_value(module)
            ray.shutdown()


def results(monkeypatch, needs: float, share: float, clients: int = 8, **knobs: Any):
    """Map ``Count`` over clients on two GPUs; return the results and the lines that were said."""
    monkeypatch.setattr(backend, "ClientActor", hungry(needs))
    said: list[str] = []
    asked = {"partition.num_clients": clients, "runtime.device": "cuda", "runtime.gpus_per_client": share} | knobs
    config = override(ON_RAY, asked)
    hosts = Placement().backend(config, FACTS, lambda client_id: stripes(3), said.append)
    try:
        found = [dict(hosts.map(Count(), range(clients), 100, lambda k: k)) for _ in range(2)]
    finally:
        hosts.close()
    assert found[0].keys() == found[1].keys()
    return found[0], [line for line in said if "memory" in line]


@pytest.mark.ray
@on_ray
def test_out_of_memory_halves_the_clients_of_a_gpu_and_loses_nothing(two_gpus, monkeypatch):
    found, said = results(monkeypatch, needs=0.5, share=0.125)
    assert found == {k: (k, 100 + k) for k in range(8)}
    assert [line.partition("; ")[2] for line in said] == [
        "going on with 4 clients a GPU", "going on with 2 clients a GPU",
    ]  # fmt: skip
    assert all(line.startswith("client ") and "out of GPU memory" in line for line in said)


@pytest.mark.ray
@on_ray
def test_with_one_client_a_gpu_it_is_that_clients_failure(two_gpus, monkeypatch):
    found, said = results(monkeypatch, needs=2.0, share=0.5, clients=4)
    assert {k: v for k, v in found.items() if k != 1} == {k: (k, 100 + k) for k in (0, 2, 3)}
    failure = found[1]
    assert failure.failures == ON_RAY.federation.max_client_failures
    assert str(failure.error).startswith("client 1: out of GPU memory: lower warmup.batch_size")
    assert len(said) == 1 and said[0].endswith("going on with 1 client a GPU")


@pytest.mark.ray
@on_ray
def test_after_the_servers_work_ran_out_fewer_clients_share_a_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(backend, "ClientActor", hungry(0.0))  # it checks its share
    said: list[str] = []
    config = override(ON_RAY, {"partition.num_clients": 2, "runtime.device": "cuda", "runtime.gpus_per_client": 0.25})
    hosts = Placement().backend(config, FACTS, lambda client_id: stripes(3), said.append)
    try:
        hosts.release(OutOfGpuMemory("too large"))  # before clients were at work
        for _ in range(2):
            assert dict(hosts.map(Count(), range(2), 100, lambda k: k)) == {k: (k, 100 + k) for k in range(2)}
            hosts.release(OutOfGpuMemory("too large"))
    finally:
        hosts.close()
    assert [line for line in said if "memory" in line] == [
        f"the server's work: out of GPU memory; going on with {count} a GPU" for count in ("2 clients", "1 client")
    ]


@pytest.mark.ray
@on_ray
def test_a_gpu_that_torch_cannot_use_says_so(two_gpus):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert measure([], [], wait_for_machines=False) == [None]


@pytest.mark.ray
@on_ray
@pytest.mark.parametrize(
    "needs, server_needs, failed",
    [
        pytest.param(0.5, 0.0, False, marks=pytest.mark.slow),
        (2.0, 0.0, True),
        pytest.param(0.0, 0.5, False, marks=pytest.mark.slow),
    ],
)
def test_a_sweeps_trials_run_again_with_fewer_clients_a_gpu(
    two_gpus, monkeypatch, tmp_path, capsys, needs, server_needs, failed
):
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    monkeypatch.setattr("mosaic_ray.execution.ray_session.local_resources", lambda: Resources(4, 2, 8.0 * GIB))
    monkeypatch.setattr(devices, "measure", lambda *_, **how: [GpuFacts(GIB, 4 * GIB, False)])
    monkeypatch.setattr(backend, "ClientActor", hungry(needs))
    monkeypatch.setattr(tuning, "start_hosts", backend.start_hosts)
    run_trial = tuning.run_trial

    class OnCPU(ServerActor):
        def __init__(self, gpu: bool) -> None:
            super().__init__(False)

        def call(self, function, *rest):
            import ray

            def too_large(context, *inputs, **more):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

            held = ray.get_runtime_context().get_assigned_resources()["GPU"]
            return super().call(too_large if held < server_needs else function, *rest)

    def pretended_trial(knobs, context):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mosaic_ray.execution.server.ServerActor", OnCPU)
            run_trial(knobs, context)

    two_gpus.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # trials cannot import it
    monkeypatch.setattr(tuning, "run_trial", pretended_trial)
    request = sweep_runner.SweepRequest(
        override(ON_RAY, {"method": "fedavg"}), "x",
        SweepPlan("x", knobs={"warmup.lr": Choice((0.05, 0.02, 0.01))}), max_concurrent=2,
    )  # fmt: skip
    outcome = sweep_runner.run(request, storage=str(tmp_path), progress=False)
    assert [r.summary["status"] for r in outcome.results] == ["failed" if failed else "done"] * 3
    said = [line for line in capsys.readouterr().err.splitlines() if "out of GPU memory" in line and "again" in line]
    if failed:
        assert said[-1].endswith("again, with 1 client a GPU") and len(said) <= 2
        assert all("lower warmup.batch_size" in r.summary["error"] for r in outcome.results)
    else:
        assert len(said) == 1 and said[0].endswith("again, with 1 client a GPU")
        assert 1.0 in {r.summary["config"]["runtime"]["gpus_per_client"] for r in outcome.results}


def played(monkeypatch, tmp_path, fewer, needs):
    """Play a sweep of three trials, the second of which needs a share; return statuses and the shares it ran with."""
    state = SweepState(Store(str(tmp_path)), "n")
    trials = make_trials(TINY, [{"warmup.lr": lr} for lr in (0.1, 0.2, 0.3)], (0,))
    queue = TrialQueue(FixedTrials(trials), state, SweepView(3, progress=False))
    ran: list[tuple[str, float]] = []

    def play(queue, context, resources, *rest):
        share = resources.host["GPU"]
        with contextlib.suppress(StopIteration):
            while trial := queue.next():
                ran.append((trial.name, share))
                queue.start(trial.name)
                status = "starved" if trial.point == 1 and share < needs else "done"
                state.record(trial, status="done" if status == "done" else "failed", error="no GPU memory")
                queue.report(trial.name, {"status": status})
                queue.finish(trial.name)

    monkeypatch.setattr(tuning, "_run_within", play)
    assert queue.has_unfinished()
    context = tuning.TrialContext(TINY, str(tmp_path), "n", None, ())
    tuning.run_trials(queue, context, {}, SimpleNamespace(host={"GPU": 0.25}, trial={}), [], None, fewer)
    assert not queue.starved
    return {name: result.summary["status"] for name, result in queue.results.items()}, ran


def test_only_the_trials_that_ran_out_run_again_and_the_rest_once(monkeypatch, tmp_path):
    def fewer(resources):
        share = halved(resources.host["GPU"])
        return (STATION, SimpleNamespace(host={"GPU": share}, trial={})) if share > resources.host["GPU"] else None

    statuses, ran = played(monkeypatch, tmp_path, fewer, needs=1.0)
    assert statuses == {"p000s0": "done", "p001s0": "done", "p002s0": "done"}
    assert ran == [("p000s0", 0.25), ("p001s0", 0.25), ("p001s0", 0.5), ("p001s0", 1.0), ("p002s0", 1.0)]


def test_where_a_gpu_cannot_be_shared_by_fewer_the_trial_fails_and_the_rest_go_on(monkeypatch, tmp_path):
    statuses, ran = played(monkeypatch, tmp_path, lambda resources: None, needs=1.0)
    assert statuses == {"p000s0": "done", "p001s0": "failed", "p002s0": "done"}
    assert [name for name, _ in ran] == ["p000s0", "p001s0", "p002s0"]


# --- a real GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_real_gpu_tells_what_a_client_takes():
    small, large = (gpu_memory.measure_here([work(model__width=width)]) for width in (4, 256))
    assert small is not None and large is not None and not (small.reason or large.reason)
    assert 0 < small.peak < large.peak < large.usable
    assert large.usable <= torch.cuda.get_device_properties(0).total_memory
    assert estimated_bytes(work(model__width=256)) > large.peak / 8


@pytest.mark.gpu
def test_a_real_cap_holds():
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        assert take_device(0.125) == "cuda"
        torch.empty(total // 16, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.OutOfMemoryError) as caught:
            torch.empty(total // 6, dtype=torch.uint8, device="cuda")
        assert is_out_of_memory(caught.value)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
