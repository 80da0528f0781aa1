"""The state of a sweep on disk: names of trials, its plan, finished trials, and files moved aside."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs

from mosaic_ray.config.resolve import as_dict, override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.core.errors import RequestError
from mosaic_ray.storage import store as store_module
from mosaic_ray.storage.store import Store
from mosaic_ray.sweeps import state as module
from mosaic_ray.sweeps.state import SweepState, Trial, make_trials, plan_name

BASE = ExperimentConfig()
KNOBS = {"generator.lambda_d": 2.0}
TRIAL = make_trials(BASE, [KNOBS], [0])[0]
PLAN = {
    "space": "mine",
    "search": "grid",
    "samples": None,
    "seeds": [0, 1],
    "scheduler": "fifo",
    "knobs": {"generator.lambda_d": "2, 5"},
    "points": [{"generator.lambda_d": 2.0}, {"generator.lambda_d": 5.0}],
    "base": as_dict(BASE),
}


@pytest.fixture(params=["local", "other"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A local store, and one with a file system that is not known to be local (as s3:// and gs:// are)."""
    if request.param == "other":
        os.makedirs(tmp_path / "bucket")
        remote = fs.SubTreeFileSystem(str(tmp_path / "bucket"), fs.LocalFileSystem())
        monkeypatch.setattr(store_module, "open_uri", lambda uri: (remote, "prefix"))
    return Store(str(tmp_path / "s"))


def begun(store: Store, *, fresh: bool = False, name: str = "n", **changed: object) -> SweepState:
    """Begin a sweep with the plan ``PLAN``, with some entries ``changed``."""
    state = SweepState(store, name)
    state.begin(PLAN | changed, fresh, {"precision": "fp32", "device": "cpu"})
    return state


def refusal(call, *args, **options) -> str:
    """Return the one-line error of ``call``."""
    with pytest.raises(RequestError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(store: Store) -> dict[str, bytes]:
    """Return all files in the store."""
    folder = store.local_root or Path(store.uri).parent / "bucket"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- trials ----------------------------------------------------------------------------------------------------------


def test_every_point_with_every_seed_in_order():
    points = [{"generator.lambda_d": 2.0, "partition.omega": 1}, {}]
    trials = make_trials(BASE, points, (7, 0))
    assert [(t.name, t.point, t.seed) for t in trials] == [
        ("p000s7", 0, 7), ("p000s0", 0, 0), ("p001s7", 1, 7), ("p001s0", 1, 0),
    ]  # fmt: skip
    assert [t.knobs for t in trials] == [points[0], points[0], {}, {}]
    assert trials[0].config == override(BASE, {"generator.lambda_d": 2.0, "partition.omega": 1.0, "seed": 7})
    assert trials[3].config == BASE


def test_points_are_counted_from_where_the_caller_is():
    assert [t.name for t in make_trials(BASE, [{}, {}], [3], 998)] == ["p998s3", "p999s3"]
    assert make_trials(BASE, [{}], [3], 1000)[0].name == "p1000s3"


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 2**31 - 6001)), min_size=2, max_size=2, unique=True))
def test_no_two_trials_share_a_name(two):
    (one, other) = (make_trials(BASE, [{}], [seed], point)[0].name for point, seed in two)
    assert one != other


@pytest.mark.parametrize(
    "knobs, label",
    [
        ({}, "base seed=3"),
        ({"generator.lambda_e": 0.5}, "lambda_e=0.5 seed=3"),
        ({"partition.omega": 0.123456789, "partition.num_clients": 20}, "omega=0.1235 num_clients=20 seed=3"),
        (
            {"warmup.lr": 0.1, "meta.pool": "sum", "finetune.lr": 1e-4},
            "warmup.lr=0.1 pool=sum finetune.lr=0.0001 seed=3",
        ),
        ({"warmup.shuffle": False, "method": "dense"}, "shuffle=false method=dense seed=3"),
    ],
)
def test_a_label_says_the_point_in_a_few_words(knobs, label):
    assert Trial("p000s3", 0, 3, knobs, BASE).label == label


def test_an_impossible_point_is_named():
    points = [{}, {"federation.cohort_size": 50, "partition.omega": 1.0}]
    line = refusal(make_trials, BASE, points, [0])
    assert line.startswith("point 1 of the sweep (federation.cohort_size=50, partition.omega=1.0): ")
    assert "there are 10 clients" in line
    impossible = replace(BASE, federation=replace(BASE.federation, cohort_size=50))
    assert refusal(make_trials, impossible, [{}], [0]).startswith("point 0 of the sweep (the base): ")


@pytest.mark.parametrize("knobs, part", [({"meta.poll": "sum"}, '"meta.pool"'), ({"partition.omega": 0}, "above 0")])
def test_a_point_with_an_invalid_knob_is_named(knobs, part):
    line = refusal(make_trials, BASE, [{}, {}, knobs], [0])
    assert line.startswith("point 2 of the sweep (") and part in line


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_same_request_has_the_same_name():
    name = plan_name(PLAN)
    assert name == plan_name(json.loads(json.dumps(PLAN)))
    assert name.startswith("mine-digits-")
    for changed in ({"seeds": [0]}, {"samples": 3}, {"base": as_dict(override(BASE, {"warmup.lr": 0.2}))}):
        assert plan_name(PLAN | changed) != name


def test_a_name_is_one_folder():
    data = as_dict(override(BASE, {"data.name": "parquet:/a/b/my set.v2"}))
    assert plan_name(PLAN | {"space": "../x y.py", "base": data}).startswith("x_y-my_set_v2-")


# --- plans -----------------------------------------------------------------------------------------------------------


def test_the_same_plan_is_found_again(store):
    begun(store)
    before = files(store)
    assert json.loads(before[next(iter(before))]) == PLAN | {"session": None, "precision": "fp32", "device": "cpu"}
    assert begun(store).session is None
    assert begun(store, points=tuple(PLAN["points"]), seeds=(0, 1)).session is None
    assert files(store) == before


@pytest.mark.parametrize(
    "changed, part",
    [
        ({"space": "yours"}, "(space mine there, yours here)"),
        ({"samples": 8}, "(samples none there, 8 here)"),
        ({"seeds": [0]}, "(seeds [0, 1] there, [0] here)"),
        ({"scheduler": "asha"}, "(scheduler fifo there, asha here)"),
        ({"base": as_dict(override(BASE, {"warmup.lr": 0.5}))}, "(warmup.lr 0.01 there, 0.5 here)"),
        ({"base": as_dict(override(BASE, {"seed": 4}))}, "(seed 0 there, 4 here)"),
        (
            {"base": as_dict(override(BASE, {"federation.widths": (1.0, 0.5)}))},
            "(federation.widths [1.0] there, [1.0, 0.5] here)",
        ),
        ({"knobs": {"generator.lambda_d": "2, 9"}}, "(space's knobs.generator.lambda_d 2, 5 there, 2, 9 here)"),
        (
            {"points": [*PLAN["points"][:1], {"generator.lambda_d": 9.0}]},
            "(point 1.generator.lambda_d 5.0 there, 9.0 here)",
        ),
        ({"search": "optuna", "points": None}, "search grid there, optuna here; number of points 2 there, none here"),
    ],
)  # fmt: skip
def test_another_plan_is_refused_and_says_what_differs(store, changed, part):
    begun(store)
    before = files(store)
    line = refusal(begun, store, **changed)
    assert line.startswith("--name n: that sweep has another plan (")
    assert part in line
    assert "another --name" in line and "--fresh" in line
    assert files(store) == before


def test_another_optuna_is_another_plan_under_the_same_name(store):
    search = {"search": "optuna", "points": None}
    assert plan_name(PLAN | search | {"optuna": "5.0.0"}) == plan_name(PLAN | search)
    begun(store, **search)  # by a version that did not write it
    begun(store, **search, optuna="5.0.0")
    begun(store, name="m", **search, optuna="5.0.0")
    begun(store, name="m", **search, optuna="5.0.0")
    assert "(optuna 5.0.0 there, 5.1.0 here)" in refusal(begun, store, name="m", **search, optuna="5.1.0")


def test_only_the_first_differences_are_named(store):
    begun(store)
    points = [{"generator.lambda_d": float(value)} for value in range(30)]
    base = as_dict(override(BASE, {"warmup.lr": 0.5, "data.root": "/" + "far/" * 50}))
    line = refusal(begun, store, seeds=[5], base=base, points=points)
    assert "(seeds [0, 1] there, [5] here; data.root  there, /far/" in line
    assert line.count(" there, ") == module.MOST_DIFFERENCES
    assert "number of points 2 there, 30 here and 30 more)" in line
    assert len(line) < 500


def test_a_difference_late_in_a_point_is_named(store):
    long = {f"generator.lambda_{letter}": 1.0 for letter in "edi"}
    begun(store, points=[long])
    assert "(point 0.generator.lambda_i 1.0 there, 2.0 here)" in refusal(
        begun, store, points=[long | {"generator.lambda_i": 2.0}]
    )


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000],
    ids=["empty", "half", "no text", "list", "null", "deep"],
)
@pytest.mark.parametrize("name", ["plan.json", "trials/p000s0/summary.json"])
def test_a_damaged_file_is_refused_and_kept(store, name, damage):
    begun(store).record(TRIAL, status="done")
    store.write(f"sweeps/n/{name}", damage)
    before = files(store)
    line = refusal(begun, store)
    assert line.startswith("--name n: ") and f"sweeps/n/{name} is not whole" in line
    assert "--fresh" in line and "another --name" in line
    assert files(store) == before


def test_a_plan_of_odd_shape_is_another_plan(store):
    store.write("sweeps/n/plan.json", json.dumps({"base": 3, "knobs": 4, "points": [5], "space": [6]}).encode())
    assert "another plan (space [6] there, mine here" in refusal(begun, store)


def test_stray_files_are_not_read(store):
    begun(store)
    for stray in ("trials/.DS_Store", "trials/p000s0.1/summary.json", "trials/notes.txt"):
        store.write(f"sweeps/n/{stray}", b"{")
    begun(store)


def test_a_removed_plan_is_written_again(store):
    state = begun(store)
    state.record(TRIAL, status="done")
    store.files.delete("sweeps/n/plan.json")
    assert begun(store).finished(TRIAL)["status"] == "done"
    assert "sweeps/n/plan.json" in " ".join(files(store))


@pytest.mark.parametrize(
    "way, fresh",
    [("sweeps", False), ("sweeps", True), ("sweeps/n", False), ("sweeps/n", True), ("sweeps/n/trials", False)],
)
def test_a_file_in_the_way_is_named_and_kept(store, way, fresh):
    if way == "sweeps/n/trials":
        begun(store)
    store.write(way, b"mine")
    before = files(store)
    line = refusal(begun, store, fresh=fresh)
    assert way in line and "irectory" in line
    assert files(store) == before


# --- fresh -----------------------------------------------------------------------------------------------------------


def test_fresh_moves_aside_and_loses_nothing(store):
    sessions = [begun(store, scheduler="asha").session]
    kept = files(store)
    for number in (1, 2, 3):
        state = begun(store, fresh=True)
        sessions.append(state.session)
        state.record(TRIAL, status="done", turn=number)
        now = files(store)
        moved = {name.replace("sweeps/n/", f"sweeps/n.{number}/"): data for name, data in kept.items()}
        assert moved.items() <= now.items()
        kept = now
    assert len(set(sessions)) == 4
    summaries = (store.files.read(f"sweeps/{name}/trials/p000s0/summary.json") for name in ("n.2", "n.3", "n"))
    turns = [json.loads(summary)["turn"] for summary in summaries]
    assert turns == [1, 2, 3]


def test_a_fresh_session_lasts_until_the_next_fresh_one(store):
    assert begun(store, fresh=True).session
    first = begun(store).session
    assert first == begun(store).session is not None
    second = begun(store, fresh=True).session
    assert second not in (None, first)
    assert begun(store).session == second


def test_a_resumed_sweep_keeps_its_precision_and_its_device(store):
    one, other = {"precision": "bf16", "device": "cpu"}, {"precision": "fp32", "device": "cuda"}
    for fresh, settled, counts in ((False, one, one), (False, other, one), (True, other, other)):
        state = SweepState(store, "n")
        state.begin(PLAN, fresh, settled)
        assert state.settled == counts


def test_a_share_of_a_gpu_makes_no_finished_trial_run_again(store):
    state, config = begun(store), override(BASE, {"runtime.device": "cuda", "runtime.gpus_per_client": 0.25})
    state.record(replace(TRIAL, config=config), status="done")
    assert state.finished(replace(TRIAL, config=override(config, {"runtime.gpus_per_client": 0.5})))
    on_cpus = override(config, {"runtime.device": "cpu", "runtime.gpus_per_client": 0.0})
    assert state.finished(replace(TRIAL, config=on_cpus)) is None


def test_a_trial_of_a_version_without_devices_is_found_by_its_share(store):
    state = begun(store)
    for share, device in ((0.0, "cpu"), (0.1, "cuda")):
        settled = override(BASE, {"runtime.device": device, "runtime.gpus_per_client": share})
        written = as_dict(settled)
        del written["runtime"]["device"]
        content = json.dumps({"status": "done", "config": written}).encode()
        store.write("sweeps/n/trials/p000s0/summary.json", content)
        assert state.finished(replace(TRIAL, config=settled))
        other = {"cpu": ("cuda", 0.1), "cuda": ("cpu", 0.0)}[device]
        values = dict(zip(("runtime.device", "runtime.gpus_per_client"), other, strict=True))
        assert state.finished(replace(TRIAL, config=override(settled, values))) is None


@pytest.mark.parametrize("name", ["plan.json", "trials/p000s0/summary.json"])
def test_fresh_replaces_damaged_files(store, name):
    begun(store)
    store.write(f"sweeps/n/{name}", b"{")
    state = begun(store, fresh=True, seeds=[3])
    assert state.session and state.summary("p000s0") is None
    assert store.files.read(f"sweeps/n.1/{name}") == b"{"


def test_fresh_leaves_neighbours_alone(store):
    begun(store, name="n2")
    begun(store, name="n", fresh=True)
    begun(store, name="n", fresh=True)
    assert begun(store, name="n2").session is None
    assert sorted(store.files.names("sweeps")) == ["n", "n.1", "n2"]


def test_a_storage_that_cannot_move_folders_says_so(store, monkeypatch):
    begun(store)
    before = files(store)

    def move(folder: str, to: str) -> None:
        raise NotImplementedError("no renaming here")

    monkeypatch.setattr(store.files, "move", move)
    line = refusal(begun, store, fresh=True)
    assert line.startswith("--fresh: ") and "no renaming here" in line and "another --name" in line
    assert files(store) == before


# --- trials that have ended ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status, ended", [("done", True), ("stopped", True), ("failed", False), (None, False)])
def test_which_trials_count_as_finished(store, status, ended):
    state = begun(store)
    assert state.summary("p000s0") is state.finished(TRIAL) is None
    wrote = state.record(TRIAL, status=status)
    again = begun(store)
    assert again.summary("p000s0") == json.loads(json.dumps(wrote))
    assert again.finished(TRIAL) == (again.summary("p000s0") if ended else None)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"warmup.lr": 0.010000000000000002}, {"generator.lambda_d": 5.0}])
def test_a_summary_of_another_config_does_not_count(store, changed):
    state = begun(store)
    state.record(TRIAL, status="done")
    assert state.finished(replace(TRIAL, config=override(TRIAL.config, changed))) is None
    assert state.finished(TRIAL)


@pytest.mark.parametrize("config", [None, 3, {"warmup": 3}, {"no": {"such": 1}}, {"warmup": {"lr": "fast"}}, "absent"])
def test_a_summary_of_another_version_does_not_count(store, config):
    state = begun(store)
    summary = {"status": "done"} | ({} if config == "absent" else {"config": config})
    store.write("sweeps/n/trials/p000s0/summary.json", json.dumps(summary).encode())
    assert state.finished(TRIAL) is None


def test_record_keeps_the_trials_own_entries(store):
    state = begun(store)
    wrote = state.record(TRIAL, status="failed", stage="warmup", error="first")
    assert wrote == {
        "method": "mosaic", "seed": 0, "config": as_dict(TRIAL.config), "status": "failed", "stage": "warmup",
        "error": "first",
    }  # fmt: skip
    own = wrote | {"versions": {"ray": "1"}}
    store.write("sweeps/n/trials/p000s0/summary.json", json.dumps(own).encode())
    assert state.record(TRIAL, status="failed", error="second")["versions"] == {"ray": "1"}
    assert state.summary("p000s0")["error"] == "second"
    assert "versions" not in state.record(TRIAL, status="stopped")


def test_the_folder_of_a_trial(store):
    assert SweepState(store, "n").folder("p001s2") == "sweeps/n/trials/p001s2"
