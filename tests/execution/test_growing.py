"""Machines that a cluster may still start, and actor pools that grow with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mosaic_ray.execution import actor_pool
from mosaic_ray.execution.actor_pool import ActorPool
from mosaic_ray.execution.ray_session import MEMORY_A_CPU, Resources, in_all, machines_to_come
from mosaic_ray.execution.resource_plan import Node

GIB = 2**30
CLUSTER = f"""
max_workers: 5
head_node_type: head
available_node_types:
  head: {{resources: {{CPU: 4}}, max_workers: 0}}
  gpu: {{resources: {{CPU: 8, GPU: 1, memory: {20 * GIB}}}, max_workers: 3}}
  cpu: {{resources: {{CPU: 16}}, max_workers: 4}}
"""


@pytest.fixture
def come(tmp_path, monkeypatch):
    """``come(text, machine, ...)``: the machines to come beside the (CPUs, GPUs) that are up."""

    def found(text: str | None, *up: tuple[float, float]) -> list[Node]:
        path = tmp_path / "bootstrap.yaml"
        if text is not None:
            path.write_text(text)
        nodes = [{"Alive": True, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}} for cpus, gpus in up]
        monkeypatch.setattr("ray.nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 1.0}}])
        return machines_to_come(str(path))

    return found


def kinds(nodes: list[Node]) -> list[tuple[float, float]]:
    return [(node.cpus, node.gpus) for node in nodes]


HEAD, GPU, CPU = (4.0, 0.0), (8.0, 1.0), (16.0, 0.0)


@pytest.mark.parametrize(
    "up, expected",
    [
        ([HEAD], [GPU, GPU, GPU, CPU, CPU]),  # five workers at most, of each type as many as it may have
        ([HEAD, GPU], [GPU, GPU, CPU, CPU]),
        ([HEAD, GPU, GPU, GPU], [CPU, CPU]),
        ([HEAD, GPU, GPU, GPU, CPU, CPU], []),
        ([HEAD, CPU, CPU, CPU, CPU], [GPU]),
        ([HEAD, GPU, GPU, GPU, CPU, CPU, CPU], []),  # more than may be: none is missing
    ],
)
def test_machines_to_come_are_the_files_less_the_running_ones(come, up, expected):
    found = come(CLUSTER, *up)
    assert kinds(found) == expected
    assert all(node.to_come for node in found) and len({node.name for node in found}) == len(found)


def test_memory_is_the_types_own_or_a_share_a_cpu(come):
    by_kind = {(node.cpus, node.gpus): node.memory for node in come(CLUSTER, HEAD)}
    assert by_kind == {GPU: 20 * GIB, CPU: 16 * MEMORY_A_CPU}


@pytest.mark.parametrize("text", [None, "", "[", "max_workers: 3", "available_node_types: 3\nhead_node_type: a"])
def test_without_a_file_that_says_so_nothing_is_expected(come, text):
    assert come(text, HEAD) == []


def test_resources_add_up():
    total = in_all(Resources(4, 0, 8.0), [Node("a", 8, 1, 20.0), Node("b", 16, 0, 1.0)])
    assert total == Resources(28, 1, 29.0)


# --- crews -----------------------------------------------------------------------------------------------------------


class Actor:
    """Stands for an actor's handle."""


def test_a_pool_looks_for_more_actors_and_adds_them(monkeypatch):
    monkeypatch.setattr(actor_pool, "LOOK_SECONDS", 0.0)
    asked, new, logged = [], [Actor(), Actor()], []

    def more(have: int) -> list[Actor]:
        asked.append(have)
        return new if have == 1 else []

    first = Actor()
    pool = ActorPool([first], more=more, say=logged.append)
    assert pool.poll_scale_up() == new and pool.actors == [first, *new]
    assert pool.poll_scale_up() == [] and asked == [1, 3]
    assert logged == ["the cluster has grown: 2 more client actors"]
    assert not pool.any_up


def test_a_pool_does_not_look_all_the_time():
    pool = ActorPool([Actor()], more=lambda have: [Actor()])
    assert pool.poll_scale_up() == []


def test_a_pool_that_ran_out_of_memory_does_not_grow(monkeypatch):
    monkeypatch.setattr(actor_pool, "LOOK_SECONDS", 0.0)
    pool = ActorPool([Actor(), Actor()], shared=True, more=lambda have: [Actor()])
    assert pool.remove(pool.actors[0]) and pool.poll_scale_up() == []


def test_actors_are_up_after_they_answer():
    first, second = Actor(), Actor()
    pool = ActorPool([first, second])
    assert not pool.is_up(first) and not pool.any_up
    pool.mark_up(first, "c0ffee")
    assert pool.is_up(first) and not pool.is_up(second) and pool.any_up
    assert pool.mark_down(first) == "c0ffee" and not pool.any_up
    assert pool.mark_down(first) == ""


def test_the_bootstrap_file_is_where_ray_up_leaves_it():
    from ray.autoscaler._private import commands

    assert "~/ray_bootstrap_config.yaml" in Path(commands.__file__).read_text()
