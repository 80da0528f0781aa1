"""``runtime.deterministic``: which kernels torch may use, in every process that computes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from helpers import FACTS, TINY, shard_of, stripes

from mosaic_ray.config.resolve import override
from mosaic_ray.core.types import ImageSet
from mosaic_ray.execution import backend, determinism, ray_train
from mosaic_ray.execution.determinism import WORKSPACE, choose_kernels
from mosaic_ray.federated.client import Task
from mosaic_ray.runs import runner

GPU = override(TINY, {"runtime.device": "cuda"})
SDP = ("flash_sdp", "mem_efficient_sdp", "cudnn_sdp")


def switches() -> dict[str, object]:
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    return {
        "algorithms": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": (cudnn.deterministic, cudnn.benchmark),
        "attention": [getattr(cuda, f"{name}_enabled")() for name in SDP],
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every switch is put back."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    old = switches()
    yield
    torch.use_deterministic_algorithms(bool(old["algorithms"]), warn_only=bool(old["warn_only"]))
    torch.utils.deterministic.fill_uninitialized_memory = old["fill"]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = old["cudnn"]
    for name, enabled in zip(SDP, old["attention"], strict=True):
        getattr(torch.backends.cuda, f"enable_{name}")(enabled)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch claims to have a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.parametrize("deterministic", [True, False])
def test_on_a_cpu_nothing_is_switched(deterministic):
    before = switches()
    for config in (TINY, GPU):  # a GPU is asked for, but this process has none
        choose_kernels(override(config, {"runtime.deterministic": deterministic}))
    assert switches() == before


@pytest.mark.usefixtures("a_gpu")
def test_on_a_gpu_the_knob_chooses_the_kernels_each_time():
    choose_kernels(GPU)
    same_bits = {
        "algorithms": True, "warn_only": True, "fill": False, "cudnn": (True, False), "attention": [False] * 3,
        "cublas": WORKSPACE,
    }  # fmt: skip
    assert switches() == same_bits
    choose_kernels(override(GPU, {"runtime.deterministic": False}))
    assert switches() == same_bits | {"algorithms": False, "cudnn": (False, True), "attention": [True] * 3}
    choose_kernels(TINY)  # a run on the CPU beside it
    assert switches()["cudnn"] == (False, True)


@pytest.mark.usefixtures("a_gpu")
def test_a_workspace_of_the_users_own_is_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    choose_kernels(GPU)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


class Nothing(Task):
    """Work that only notes that it began."""

    def __init__(self, order: list[str]) -> None:
        self.order = order

    def run(self, context, shard, client_id, broadcast, own):
        self.order.append("work")


def test_every_process_chooses_before_it_computes(monkeypatch, tmp_path):
    """The driver, a client (in this process or an actor's), and the distillation (in process or a Train worker's)."""
    order: list[str] = []
    for module in (backend, ray_train, determinism):
        monkeypatch.setattr(module, "choose_kernels", lambda config: order.append("chosen"))
    shard = shard_of(stripes(6))
    backend.run_task(TINY, FACTS, "cpu", Nothing(order), 0, [shard.images.numpy(), shard.labels.numpy()], None, None)
    monkeypatch.setattr(ray_train, "distil", lambda task, *rest: (order.append("work"), {}))
    monkeypatch.setattr(ray_train, "inspect_student", lambda *rest: ({}, None))
    task = type("Task", (), {"config": TINY})()
    ray_train._loop(task, torch.device("cpu"), ray_train.DistContext(), lambda step, metrics: None)

    class Hosts:
        def backend(self, *inputs):
            order.append("work")
            return backend.SerialBackend(TINY, FACTS, lambda k: ImageSet(shard.images.numpy(), shard.labels.numpy()))

        def server(self, config):
            return None

    dataset = type("Data", (), {"facts": FACTS})()
    with runner.open_run(TINY, dataset, None, type("T", (), {"say": print})(), Hosts()):
        pass
    assert order == ["chosen", "work"] * 3
