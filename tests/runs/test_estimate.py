"""Estimated hours: the formula by hand on a made storage, what makes a time comparable, what runs record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import ask, refusal
from helpers import TINY

from mosaic_ray.config.resolve import as_dict, override, to_toml
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.runs.calibrate import calibrated
from mosaic_ray.runs.dry_run import dry_run
from mosaic_ray.runs.earlier import read_earlier
from mosaic_ray.runs.estimate import SOURCES, Hours, rates, turns

pytestmark = pytest.mark.usefixtures("two_cpus")

#: 3 clients, 3 rounds of 3 steps; the data are digits, whose shape is known without them.
PLAIN = override(
    TINY, {"method": "fedavg", "runtime.device": "cpu", "runtime.precision": "fp32", "runtime.host": "ray"}
)
#: 27 local steps that took clients 54 seconds and the server 6.
STAGES = {
    "partition": {"seconds": 0.0, "client_seconds": 0.0, "cached": False, "key": "partition-p"},
    "warmup": {"seconds": 70.0, "waited_seconds": 10.0, "client_seconds": 54.0, "cached": False, "key": "warmup-w"},
    "finetune": {"seconds": 9e9, "client_seconds": 9e9, "cached": True, "key": "rounds-f"},
    "control": {"seconds": 9e9, "cached": False, "key": "rounds-c"},  # resumed, or of an earlier version
    "own_models": {"seconds": 0.0, "client_seconds": 0.0, "cached": False, "key": "own_models-o"},
    "evaluate": {"seconds": 8.0, "client_seconds": 0.0, "cached": False, "key": "evaluate-e"},
}


def made(config=PLAIN, stages=STAGES, name="a") -> None:
    """Write the summary of an earlier run."""
    place = Path("mosaic_runs/runs") / name
    place.mkdir(parents=True)
    content = {"status": "done", "method": config.method, "config": as_dict(config), "stages": stages}
    (place / "summary.json").write_text(json.dumps(content))


def planned(**knobs):
    config = override(PLAIN, {name.replace("__", "."): value for name, value in knobs.items()})
    return dry_run(config, "mosaic_runs", None, "local")


def test_the_formula_by_hand():
    made()
    found = planned(warmup__num_rounds=10, finetune__num_rounds=5, finetune__local_steps=2)
    steps = 3 * 10 * 3 + 3 * 5 * 2  # the control shares the result of the closing rounds
    models = next(row.work["models"] for row in found.work if row.stage == "evaluate")
    hours = found.hours
    assert hours.client_hours == pytest.approx(steps * 2 / 3600)
    assert hours.server_hours == pytest.approx((steps * 6 / 27 + models * 8 / 3) / 3600)
    # 3 clients on 2 actors take 2 turns
    assert hours.hours == pytest.approx(hours.client_hours / 1.5 + hours.server_hours)
    assert (hours.missing, hours.gpu_hours, hours.source) == ((), 0.0, "stage times of earlier runs here")


def test_a_result_counts_once_and_times_are_pooled():
    made()
    made(name="b")
    more = {"warmup": {"seconds": 27.0, "client_seconds": 27.0, "cached": False, "key": "warmup-other"}}
    made(stages=more, name="c")
    found = rates(read_earlier("mosaic_runs").runs)
    [rounds] = [rate for like, rate in found.items() if like[0] == "rounds"]
    assert (rounds.clients, rounds.server) == pytest.approx((81 / 54, 6 / 54))


@pytest.mark.parametrize(
    "knobs, missing",
    [
        ({"warmup.lr": 0.5, "finetune.lr": 0.5, "partition.omega": 9.0}, ()),
        ({"model.width": 8}, ("warmup", "finetune", "own_models", "evaluate")),
        ({"warmup.batch_size": 8}, ("warmup", "finetune")),
        ({"data.image_size": 16}, ("partition", "warmup", "finetune", "own_models", "evaluate")),
        ({"partition.num_clients": 4}, ("partition", "own_models", "evaluate")),
        ({"method": "prototype_head"}, ("prototypes", "distill")),
    ],
)
def test_times_serve_the_same_networks_and_images(knobs, missing):
    made()
    found = dry_run(override(PLAIN, knobs), "mosaic_runs", None, "local").hours
    assert set(found.missing) == set(missing)
    assert (found.client_hours > 0) == ("warmup" not in missing)
    assert all(stage in found.line() for stage in missing if found.source)


def test_without_times_the_line_says_how_to_get_them():
    line = planned().hours.line()
    assert "no estimate yet" in line and "--calibrate" in line
    assert planned().as_dict()["estimate"] is None


def test_gpu_hours(monkeypatch):
    from mosaic_ray.execution import devices, ray_session

    gpus = ray_session.Resources(8, 2, 64 * 2**30, bf16=False)
    monkeypatch.setattr(ray_session, "local_resources", lambda: gpus)
    monkeypatch.setattr(devices, "local_resources", lambda: gpus)
    cuda = {"runtime.device": "cuda", "runtime.gpus_per_client": 0.5}
    made(override(PLAIN, cuda))
    found = dry_run(override(PLAIN, cuda), "mosaic_runs", None, "local").hours
    assert found.gpu_hours == pytest.approx(2 * found.hours) and found.hours > 0
    assert "GPU hours" in found.line()


def test_a_sweep_divides_by_its_hosts_and_trials():
    made(override(PLAIN, {"partition.validation_fraction": 0.1}))
    words = ["--method", "fedavg", "--set", "warmup.local_steps=3", "--set", "runtime.precision=fp32"]
    Path("base.toml").write_text(_toml())
    Path("mine.py").write_text(
        "from mosaic_ray.sweeps.space import Choice, SweepPlan\n\n"
        "def plan():\n    return SweepPlan('mine', {'warmup.num_rounds': Choice((2, 4))})\n"
    )
    result = ask("sweep", "--space", "mine.py", "--config", "base.toml", "--dry-run", "--json", *words)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    hours, rows = found["estimate"], {row["stage"]: row["work"] for row in found["work"]}
    steps = rows["warmup"]["local steps"] + rows["finetune"]["local steps"]
    assert hours["client_hours"] == pytest.approx(2 * steps / 3600)
    assert (hours["actors"], hours["trials"]) == (2, 2)
    assert hours["hours"] == pytest.approx(hours["client_hours"] / 2 + hours["server_hours"] / 2)


def test_distinct_sets_of_generators_of_a_grid_over_lambda_i(tiny_in_storage, tmp_path):
    """TINY's clients are larger and smaller than generator.tau; its storage knows their sizes, the other does not."""
    config = override(ExperimentConfig(), tiny_in_storage["config"])
    sizes = [sum(row) for row in tiny_in_storage["label_counts"]]
    Path("tiny.toml").write_text(to_toml(config))

    def line(storage: Path, *grid: str) -> str:
        words = ["--config", "tiny.toml", "--storage", str(storage), "--dry-run"]
        words += ["--set", "partition.validation_fraction=0"]
        result = ask("sweep", *words, *(word for knob in grid for word in ("--grid", knob)))
        assert result.exit_code == 0, result.stderr
        return next((text for text in result.stdout.splitlines() if "distinct sets" in text), "")

    grid = "generator.lambda_i=0,1,2"
    assert "at most 3 for 3 trials" in line(tmp_path / "other", grid)
    assert not line(tmp_path, "generator.lambda_e=1,2")
    large = f"generator.tau={min(sizes)}"
    assert "distinct sets of generators: 1 for 3 trials" in line(tmp_path, grid, large)
    assert "distinct sets of generators: 3 for 3 trials" in line(tmp_path, grid, f"generator.tau={max(sizes) + 1}")


def _toml() -> str:
    return to_toml(override(PLAIN, {"partition.validation_fraction": 0.1}))


def test_calibration_of_a_tiny_run():
    """Every kind of steps gets a time, none is negative, and all that is printed says where it comes from."""
    small = {"method": "mosaic", "model.width": 2, "generator.ngf": 2, "generator.ndf": 2, "runtime.host": "serial"}
    asked = override(PLAIN, small)
    found = calibrated(asked)
    assert {like[:2] for like in found} == {
        ("rounds", "local steps"), ("generator", "steps"), ("teacher", "updates"), ("distill", "steps"),
    }  # fmt: skip
    assert all(rate.clients >= 0 and rate.server >= 0 for rate in found.values())
    assert all(rate.clients + rate.server > 0 for rate in found.values())
    hours = dry_run(asked, "mosaic_runs", None, "local", calibrate=True).hours
    assert hours.source == "a calibration on this machine" and hours.hours > 0
    assert set(hours.missing) == {"partition", "prototypes", "own_models", "evaluate"}
    assert not list(Path().iterdir())


def test_stored_times_come_before_a_calibration(monkeypatch):
    made()
    monkeypatch.setattr("mosaic_ray.runs.calibrate.calibrated", lambda config: pytest.fail("it was not needed"))
    assert dry_run(PLAIN, "mosaic_runs", None, "local", calibrate=True).hours.source == SOURCES[0]


@pytest.mark.parametrize(
    "words, parts",
    [
        ("run --calibrate", ["--calibrate:", "--dry-run"]),
        ("sweep --calibrate --space smoke", ["--calibrate:", "--dry-run"]),
        ("run --dry-run --calibrate", ["--calibrate: out of order"]),
        ("sweep --space smoke --dry-run --calibrate", ["--calibrate: out of order"]),
        ("run --dry-run --calibrate --dataset folder:nowhere", ["folder:nowhere", "no folder nowhere"]),
    ],
)
def test_a_calibration_that_fails_is_one_line(words, parts, monkeypatch):
    def broken(*_args, **_more):
        raise OSError("out of order\nand more")

    made(name="before")
    monkeypatch.setattr("mosaic_ray.runs.calibrate.execute", broken)
    files = sorted(Path().rglob("*"))
    line = refusal(ask(*words.split()))
    assert all(part in line for part in parts), line
    assert sorted(Path().rglob("*")) == files


def test_clients_at_work_at_once():
    assert [turns(clients, actors) for clients, actors in [(5, 2), (6, 2), (1, 1), (3, 8)]] == [5 / 3, 2, 1, 3]


def test_a_run_records_the_seconds_of_its_clients(undisturbed_tiny):
    stages = undisturbed_tiny["stages"]
    for name in ("warmup", "generators", "prototypes", "finetune"):
        assert 0 < stages[name]["client_seconds"] <= stages[name]["seconds"] + 0.01, name
    for name in ("partition", "teacher", "distill", "evaluate"):
        assert stages[name]["client_seconds"] == 0, name


@pytest.mark.parametrize(
    "hours, words",
    [(2.25e-5, "hours: under 0.01 (under 0.01 of"), (0.02, "hours: about 0.02 ("), (123.4, "hours: about 123 (")],
)
def test_moments_have_no_figure_with_an_exponent(hours, words):
    line = Hours(hours, hours, 0.0, 0.0, 1, 1, SOURCES[0], ()).line()
    assert line.startswith(words) and "e-" not in line and "0 on the server" in line
