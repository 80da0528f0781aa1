"""The plan of client hosts: a pure function of the machines and the request."""

from __future__ import annotations

import pytest
from helpers import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from mosaic_ray.config.resolve import override
from mosaic_ray.core.errors import RequestError
from mosaic_ray.execution.ray_session import Resources, connect, num_hosts
from mosaic_ray.execution.resource_plan import HOST_BYTES

PLENTY = 2**40


def hosts(clients: int, cpus: float, gpus: float = 0, memory: float = PLENTY, **knobs) -> int:
    config = override(TINY, {"partition.num_clients": clients} | {f"runtime.{k}": v for k, v in knobs.items()})
    return num_hosts(config, Resources(cpus, gpus, memory))


@pytest.mark.parametrize(
    "expected, request_",
    [
        (5, {"clients": 5, "cpus": 8}),
        (2, {"clients": 100, "cpus": 2}),
        (8, {"clients": 100, "cpus": 2, "cpus_per_client": 0.25}),
        (3, {"clients": 100, "cpus": 7, "cpus_per_client": 2.0}),
        (4, {"clients": 100, "cpus": 64, "max_hosts": 4}),
        (10, {"clients": 100, "cpus": 64, "gpus": 1, "gpus_per_client": 0.1}),
        (6, {"clients": 100, "cpus": 64, "gpus": 2, "gpus_per_client": 0.3}),
        (2, {"clients": 100, "cpus": 64, "gpus": 4, "gpus_per_client": 2.0}),
        (1, {"clients": 100, "cpus": 64, "memory": HOST_BYTES}),
        (7, {"clients": 100, "cpus": 64, "memory": 10 * HOST_BYTES}),
    ],
)
def test_as_many_hosts_as_cpus_gpus_memory_and_clients_allow(expected, request_):
    assert hosts(**request_) == expected


@settings(max_examples=100)
@given(st.integers(1, 200), st.integers(1, 64), st.floats(0.05, 1.0), st.integers(0, 8), st.floats(0.05, 1.0))
def test_a_plan_always_fits(clients, cpus, share, gpus, gpu_share):
    gpu_share = gpu_share if gpus else 0.0
    count = hosts(clients, cpus, gpus, cpus_per_client=share, gpus_per_client=gpu_share)
    assert 1 <= count <= clients
    assert count * share <= cpus + 1e-6
    if gpus:  # a share never straddles two GPUs
        assert count <= gpus * int(1 / gpu_share + 1e-9)


@pytest.mark.parametrize(
    "knobs, says",
    [
        ({"cpus": 2, "cpus_per_client": 4.0}, r"runtime\.cpus_per_client = 4: there are 2 CPUs"),
        ({"cpus": 2, "gpus_per_client": 0.5}, r"runtime\.gpus_per_client = 0\.5: there are 0 GPUs"),
        ({"cpus": 2, "gpus": 1, "gpus_per_client": 2.0}, r"there are 1 GPUs"),
    ],
)
def test_requests_that_can_never_fit_are_refused(knobs, says):
    with pytest.raises(RequestError, match=says):
        hosts(3, **knobs)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_an_address_where_no_cluster_answers_is_refused_in_one_line(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RequestError, match=r"--address 127\.0\.0\.1:1: no Ray cluster answers") as caught:
        connect("127.0.0.1:1")
    assert "\n" not in str(caught.value)
