"""Progress inside a unit: steps of clients under way, images of an evaluation, and the time that is left."""

from __future__ import annotations

import pytest
from helpers import TINY, stripes_dataset
from terminals import Clock, Terminal

from mosaic_ray.config.resolve import override
from mosaic_ray.runs import runner
from mosaic_ray.tracking import progress
from mosaic_ray.tracking.progress import Quiet, StageProgress
from mosaic_ray.tracking.tracker import Tracker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "_now", clock)
    return clock


def shown(stage: StageProgress) -> str:
    return ", ".join([f"{stage.count} {stage.detail}".strip(), *stage.pace])


def test_steps_of_all_clients_are_counted_before_the_first_is_done(clock: Clock) -> None:
    with Tracker(None, progress=False) as tracker, tracker.stage("generators", 4, "client") as stage:
        inside = tracker.inside("step", 4, 4)
        inside(0, 0, 100)
        clock.now += 10.0
        inside(0, 50, 100)
        inside(1, 30, 100)  # two more have not begun: they count as many steps as these
        assert shown(stage) == "client 0/4 step 80/400, 12.5 s/client, 0:40 left"
        inside.finish(0)
        stage.advance()
        assert shown(stage) == "client 1/4 step 130/400, 7.69 s/client, 0:21 left"
        for client in (1, 2, 3):
            inside.finish(client)
            stage.advance()
        assert stage.detail == "step 400/400" and stage.position == 4
        inside.close()
        assert shown(stage) == "client 4/4, 2.5 s/client, 0:00 left"


def test_a_round_goes_on_where_its_clients_are(clock: Clock) -> None:
    with Tracker(None, progress=False) as tracker, tracker.stage("warmup", 10) as stage:
        for _ in range(2):
            inside = tracker.inside("step", 2, 1)
            clock.now += 3.0
            inside(0, 5, 10)
            assert shown(stage).startswith(f"round {stage.done}/10 step 5/20")
            clock.now += 3.0
            inside.close()
            stage.advance()
        assert shown(stage) == "round 2/10, 4.5 s/round, 0:36 left"  # timed from the first step on
        look = tracker.inside("image")  # of no unit
        look(0, 500, 2000)
        assert shown(stage) == "round 2/10 image 500/2000, 4.5 s/round, 0:36 left"


def test_the_first_estimate_begins_with_the_first_sign_of_work(clock: Clock) -> None:
    with Tracker(None, progress=False) as tracker, tracker.stage("warmup", 10) as stage:
        stage.resume([], 4)
        inside = tracker.inside("step", 1, 1)
        clock.now += 60.0  # Ray starts
        inside(0, 0, 0)
        assert stage.pace == [] and stage.detail == ""
        clock.now += 5.0
        inside(0, 10, 20)
        assert stage.pace == ["10 s/round", "0:55 left"]
        stage.advance()
        inside(0, 0, 0)  # work began once
        clock.now += 5.0
        assert stage.pace == ["10 s/round", "0:50 left"] and stage.seconds == 70.0


def test_clients_whose_steps_are_unknown_show_none(clock: Clock) -> None:
    with Tracker(None, progress=False) as tracker, tracker.stage("prototypes", 2, "client") as stage:
        inside = tracker.inside("", 2, 2)
        for client in range(2):
            inside(client, 7, 0)
            inside.finish(client)
        assert stage.detail == "" and stage.position == 0


def test_plain_lines_are_as_few_as_without(clock: Clock) -> None:
    stream = Terminal(tty=False)
    with Tracker(None, stream=stream) as tracker, tracker.stage("generators", 1, "client"):
        inside = tracker.inside("step", 1, 1)
        for step in range(100):
            clock.now += 1.0
            inside(0, step, 100)
    assert stream.getvalue().splitlines() == ["generators: begins, client 0/1", "generators: done after 100.0 s"]


def test_the_live_view_looks_a_few_times_a_second(clock: Clock, tty: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with Tracker(None, stream=tty) as tracker, tracker.stage("generators", 2, "client"):
        tracker.display.progress.stop()
        monkeypatch.setattr(tracker.display, "inside", lambda stage: looks.append(stage.position))
        inside, looks = tracker.inside("step", 2, 2), []
        for step in range(1000):
            clock.now += 0.001
            inside(0, step, 1000)
        assert 3 <= len(looks) <= 6 and looks == sorted(looks)


def test_between_stages_nothing_is_counted() -> None:
    with Tracker(None, progress=False) as tracker:
        with tracker.stage("warmup", 1) as stage:
            pass
        tracker.inside("image", units=1)(0, 5, 10)
        assert stage.position == 0


def test_a_run_counts_inside_each_of_its_stages(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {}
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    monkeypatch.setattr(progress, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(Quiet, "inside", lambda self, stage: seen.setdefault(stage.name, set()).add(stage.detail))
    knobs = {"federation.strategy": "heterofl", "federation.widths": (1.0, 0.5)}
    runner.run(override(TINY, knobs), storage=str(tmp_path), progress=False)
    clients, steps, local = 3, TINY.generator.steps, TINY.warmup.local_steps
    # each client's generator is measured on one batch of images after its steps
    assert {f"step {done}/{clients * (steps + 1)}" for done in (steps + 1, clients * (steps + 1))} <= seen["generators"]
    assert f"step 1/{clients * local}" in seen["warmup"]
    assert any(detail.startswith("batch norm 1/") for detail in seen["warmup"])
    assert "image 60/60" in seen["evaluate"]
    assert {detail.partition(" ")[0] for detail in seen["prototypes"]} == {"batch"}
