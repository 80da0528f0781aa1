"""`mosaic store ls | gc | verify`: their output, and the results that gc removes and keeps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runner import ask, refusal
from click.testing import Result
from helpers import FACTS, TINY, stripes_dataset
from hypothesis import given
from hypothesis import strategies as st
from storing import KEY, OTHER_KEY, arrays, held

import mosaic_ray.storage.locks as leases_module
from mosaic_ray.config.resolve import as_dict, override
from mosaic_ray.config.schema import ExperimentConfig
from mosaic_ray.methods.mosaic.graph import GENERATORS
from mosaic_ray.pipeline.stages import evaluated_key
from mosaic_ray.runs import runner
from mosaic_ray.runs.plan import stage_keys
from mosaic_ray.storage import gc as keeping
from mosaic_ray.storage.filesystem import Stored
from mosaic_ray.storage.gc import Entry, Inventory, Owner, plan
from mosaic_ray.storage.store import Store

DAY = 86400.0
COUNTS = np.array([[3, 2, 0], [200, 0, 1], [4, 4, 4]], np.int64)


@pytest.fixture
def root(storage: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A storage folder on a local disk; owners of leases soon count as dead."""
    monkeypatch.setattr(leases_module, "TTL_SECONDS", 0.3)
    return storage if storage.name == "local" else storage / "prefix"


def store_keys(config: ExperimentConfig) -> dict[str, tuple[str, ...]]:
    return stage_keys(config, "stripes", FACTS, [int(size) for size in COUNTS.sum(1)])


def make_run(store: Store, place: str, config: ExperimentConfig = TINY, **fields: Any) -> set[str]:
    """Write a finished run's results and summary; return the keys behind it."""
    found = store_keys(config)
    stages = {name: {"key": keys[0]} for name, keys in found.items()}
    if "generators" in found:
        stages["generators"] = {"key": GENERATORS.joint_key(found["generators"])}
    models = [stages[name]["key"] for name in ("warmup", "teacher", "distill", "finetune", "control") if name in stages]
    evaluated = [evaluated_key(config, found["partition"][0], key, "test") for key in models]
    made = {key for keys in found.values() for key in keys} | set(evaluated)
    for key in made:
        counts = {"counts": COUNTS}
        store.put(key, {}, {"shards": counts} if key in found["partition"] else {"p": arrays()})
    summary = {"status": "done", "stages": stages, "config": as_dict(config)} | fields
    store.write(f"{place}/summary.json", json.dumps(summary).encode())
    return made


def age(root: Path, seconds: float = 2 * DAY) -> None:
    """Set the times of all files to that age."""
    for path in root.rglob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def json_of(result: Result, status: int = 0) -> dict[str, Any]:
    assert result.exit_code == status, (result.output, result.exception)
    return json.loads(result.stdout)


def gc(storage: Path, *words: str) -> dict[str, Any]:
    return json_of(ask("store", "gc", "--storage", str(storage), "--json", *words))


def names(freed: Mapping[str, Any]) -> set[str]:
    return {item["name"] for item in freed["freed"]}


def whys(freed: Mapping[str, Any]) -> dict[str, str]:
    return {name: item["why"] for item in freed["stays"] for name in item["names"]}


# ---------------------------------------------------------------- ls


def test_ls_lists_keys_sizes_and_users(storage: Path, root: Path) -> None:
    store = Store(storage)
    mine = make_run(store, "runs/one")
    other = override(TINY, {"distill.lr": 0.5})
    theirs = make_run(store, "sweeps/s/trials/p000s0", other)
    store.put(KEY, {}, {"p": arrays()})
    store.writer(OTHER_KEY).add("p", arrays())
    store.save_checkpoint(KEY, {}, {})
    listed = json_of(ask("store", "ls", "--storage", str(storage), "--json"))
    users = {row["key"]: row["used_by"] for row in listed["results"]}
    one, trial = "run one", "sweep s, trial p000s0"
    assert users == {key: [one] * (key in mine) + [trial] * (key in theirs) for key in mine | theirs} | {
        KEY: [], OTHER_KEY: []
    }  # fmt: skip
    assert sum(one in found for found in users.values()) == len(mine) > len(mine & theirs) > 5
    row = next(row for row in listed["results"] if row["key"] == KEY)
    assert (row["stage"], row["whole"]) == ("warmup", True)
    assert row["bytes"] == sum(len(data) for name, data in files(root).items() if name.startswith(f"objects/{KEY}/"))
    assert [row["whole"] for row in listed["results"] if row["key"] == OTHER_KEY] == [False]
    assert [row["key"] for row in listed["checkpoints"]] == [KEY]
    assert listed["bytes"] == sum(len(d) for n, d in files(root).items() if n.startswith(("objects", "checkpoints")))
    assert {user["name"]: user["traced"] for user in listed["users"]} == {one: True, trial: True}
    table = ask("store", "ls", "--storage", str(storage)).stdout
    assert "generator-... (3 of them)" in table and "unfinished" in table and "checkpoint" in table
    assert f"{len(users)} results" in table and "1 run and 1 trial" in table and "2 results, " in table
    assert "used by nobody (`mosaic store gc`" in table


def test_ls_of_an_empty_storage(storage: Path, root: Path) -> None:
    root.mkdir(parents=True)
    assert ask("store", "ls", "--storage", str(storage)).stdout == "no results\n"


def test_every_key_of_a_run_is_traced_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mosaic_ray.data.load.load_dataset", lambda config: stripes_dataset())
    runner.run(override(TINY, {"partition.validation_fraction": 0.1}), storage=str(tmp_path), name="a", progress=False)
    rows = json_of(ask("store", "ls", "--storage", str(tmp_path), "--json"))["results"]
    assert len(rows) > 15 and all(row["used_by"] == ["run a"] for row in rows)
    assert gc(tmp_path, "--older-than", "0s")["freed"] == []
    (tmp_path / "runs/a/summary.json").unlink()
    assert len(gc(tmp_path, "--older-than", "0s")["freed"]) == len(rows)
    assert not any((tmp_path / "objects").iterdir())


# ---------------------------------------------------------------- gc


@pytest.fixture
def full(storage: Path, root: Path) -> set[str]:
    """Make a storage two days old: a run's results, unused results and checkpoints; return what gc may remove."""
    store = Store(storage)
    make_run(store, "runs/one")
    store.put(KEY, {}, {"p": arrays()})
    store.writer(OTHER_KEY).add("p", arrays())
    done = store_keys(TINY)["warmup"][0]
    for key in (done, OTHER_KEY):
        store.save_checkpoint(key, {}, {"p": arrays()})
    age(root)
    return {f"objects/{KEY}", f"objects/{OTHER_KEY}", f"checkpoints/{done}", f"checkpoints/{OTHER_KEY}"}


def test_gc_removes_what_its_dry_run_lists(storage: Path, root: Path, full: set[str]) -> None:
    before = files(root)
    tried = gc(storage, "--dry-run")
    assert files(root) == before and tried["dry_run"] and names(tried) == full
    table = ask("store", "gc", "--storage", str(storage), "--dry-run").stdout
    assert "would free" in table and "in 4 places" in table and files(root) == before
    freed = gc(storage)
    after = files(root)
    assert freed["freed"] == tried["freed"] and not freed["dry_run"]
    assert after == {name: data for name, data in before.items() if "/".join(name.split("/")[:2]) not in full}
    assert freed["bytes"] == sum(map(len, before.values())) - sum(map(len, after.values())) > 0
    assert gc(storage)["freed"] == [] and json_of(ask("store", "verify", "--storage", str(storage), "--json"))


def test_young_results_stay_but_not_checkpoints_of_finished_stages(storage: Path, root: Path, full: set[str]) -> None:
    age(root, 3600)
    freed = gc(storage)
    assert names(freed) == {name for name in full if KEY not in name and OTHER_KEY not in name}
    assert set(whys(freed)) == full - names(freed) and all("younger" in why for why in whys(freed).values())
    assert names(gc(storage, "--older-than", "30m")) == full - names(freed)


def test_leased_results_and_unnamed_ones_stay_while_runs_are_active(storage: Path, root: Path, full: set[str]) -> None:
    """A run that goes on for days has stored results that no summary.json names."""
    holder, done = Store(storage), store_keys(TINY)["warmup"][0]
    with held(holder.try_lease(done)):
        freed = gc(storage)
        assert freed["freed"] == [] and "right now" in whys(freed)[f"checkpoints/{done}"]
        assert "at work" in whys(freed)[f"objects/{KEY}"]
    with held(holder.try_lease(OTHER_KEY)):
        freed = gc(storage)
        assert names(freed) == {f"checkpoints/{done}"} and "right now" in whys(freed)[f"objects/{OTHER_KEY}"]
    assert names(gc(storage)) == full - names(freed)


def test_a_result_leased_during_gc_stays(
    storage: Path, root: Path, full: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, writer = keeping._make_plan, Store(storage)

    def planned(*words: Any) -> keeping.Plan:
        made = real(*words)
        writer.put(KEY, {"n": 2}, {"p": arrays()})
        monkeypatch.setattr(keeping, "_make_plan", real)
        return made

    monkeypatch.setattr(keeping, "_make_plan", planned)
    lease = held(writer.try_lease("elsewhere-1"))
    lease.release()
    freed = gc(storage)
    assert names(freed) == full - {f"objects/{KEY}"}
    found = writer.get(KEY)
    assert found is not None and found.facts == {"n": 2}


def test_one_gc_at_a_time(storage: Path, full: set[str]) -> None:
    with held(Store(storage).try_lease("gc")):
        assert "another `mosaic store gc` is at work" in refusal(ask("store", "gc", "--storage", str(storage)))
        assert names(gc(storage, "--dry-run")) == full


def test_old_files_of_killed_writers_go(storage: Path, root: Path, full: set[str]) -> None:
    gone = {"objects/.probe-0123", f"objects/{store_keys(TINY)['warmup'][0]}/manifest.json.77-0123abcd.tmp"}
    mine = {"notes.77-0123abcd.tmp", "objects/mine.tmp"}
    if storage.name == "local":
        gone |= {"runs/one/config.toml.77-0123abcd.tmp"}
    for name in gone | mine:
        (root / name).write_text("x")
    assert not names(gc(storage, "--dry-run")) & gone, "their writers may live"
    age(root)
    assert names(gc(storage)) == full | gone
    assert all((root / name).exists() for name in mine), "nobody's but our own"


def test_old_payloads_without_a_manifest_go(storage: Path, root: Path, full: set[str]) -> None:
    key = store_keys(TINY)["teacher"][0]
    old, young = (root / "objects" / key / f"part-{name}.safetensors" for name in ("a" * 12, "b" * 12))
    old.write_text("x" * 7)
    age(root)
    young.write_text("x")
    freed = gc(storage)
    assert names(freed) == full | {f"objects/{key}"}
    assert [item["bytes"] for item in freed["freed"] if item["what"] == "files"] == [7]
    assert not old.exists() and young.exists() and Store(storage).get(key) is not None


def test_files_of_dead_leases_go_and_living_ones_stay(storage: Path, root: Path, full: set[str]) -> None:
    owner = "0" * 32
    dead = {"leases/sweep-mine"} if storage.name == "local" else {f"leases/{KEY}~{owner}", f"leases/~{owner}"}
    (root / "leases").mkdir(exist_ok=True)
    for name in dead:
        (root / name).write_text("3")
    with held(Store(storage).try_lease("sweep-it~s")):
        before = {path for path in (root / "leases").iterdir() if str(path.relative_to(root)) not in dead}
        assert names(gc(storage, "--dry-run")) >= dead
        assert names(gc(storage)) >= dead
        assert set((root / "leases").iterdir()) == before and before


@pytest.mark.parametrize("why", ["another version", "a user's network"])
def test_generators_that_cannot_be_traced_stay(storage: Path, root: Path, full: set[str], why: str) -> None:
    store = Store(storage)
    mine = make_run(store, "runs/two", override(TINY, {"seed": 7}))
    summary = json.loads(store.files.read("runs/two/summary.json"))
    if why == "another version":
        summary["config"]["generator"]["a_knob_of_old"] = 1
    else:
        summary["config"]["model"]["classifier"] = "my_lab.nets:build"
    store.write("runs/two/summary.json", json.dumps(summary).encode())
    age(root)
    freed = gc(storage)
    assert names(freed) == full and {"run two"} == {why.split(" may")[0] for why in whys(freed).values()}
    assert {name.partition("/")[2].partition("-")[0] for name in whys(freed)} >= {"generator"}
    assert all(store.get(key) is not None for key in mine)
    rows = json_of(ask("store", "ls", "--storage", str(storage), "--json"))["users"]
    assert {row["name"]: row["traced"] for row in rows} == {"run one": True, "run two": False}


def test_a_failed_runs_results_stay(storage: Path, root: Path, full: set[str]) -> None:
    mine = make_run(Store(storage), "runs/two", override(TINY, {"seed": 7}), status="failed")
    age(root)
    assert names(gc(storage)) == full and all(Store(storage).get(key) is not None for key in mine)


def test_an_experiments_results_stay(storage: Path, root: Path, full: set[str]) -> None:
    store = Store(str(storage))
    for key in ("warmup-e1", "moe_weights-e2", "warmup-e3"):
        store.put(key, {}, {"p": arrays()})
    store.write("experiments/x/results.json", json.dumps({"keys": ["warmup-e1", "moe_weights-e2"]}).encode())
    age(root)
    gc(storage)
    assert store.get("warmup-e1") and store.get("moe_weights-e2") and not store.get("warmup-e3")
    store.write("experiments/x/results.json", b"{")
    assert "experiments/x/results.json is not whole" in refusal(ask("store", "gc", "--storage", str(storage)))


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": {"warmup": 3}}', '{"stages": 7}', ""])
def test_a_summary_that_is_not_whole_is_refused(storage: Path, root: Path, full: set[str], text: str) -> None:
    (root / "runs/one/summary.json").write_text(text)
    for command in ("ls", "gc"):
        line = refusal(ask("store", command, "--storage", str(storage)))
        assert "runs/one/summary.json is not whole" in line and "remove its folder" in line
    assert Store(storage).get(KEY) is not None


@pytest.mark.parametrize("word", ["", "1", "d", "-1d", "1w", "1.5h", "nan"])
def test_an_age_is_a_number_and_a_unit(tmp_path: Path, word: str) -> None:
    assert "such as 12h or 7d" in refusal(ask("store", "gc", "--storage", str(tmp_path), "--older-than", word))


STAGES = ["warmup", "generator", "judged", "teacher"]
some_keys = st.builds("{}-{}".format, st.sampled_from(STAGES), st.integers(0, 3))


@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["objects", "checkpoints"]), some_keys), st.tuples(st.booleans(), st.floats(0, 9))
    ),
    st.lists(st.tuples(st.frozensets(some_keys), st.booleans()), max_size=3),
    st.dictionaries(some_keys, st.booleans(), max_size=3),
    st.floats(0, 9),
)  # fmt: skip
def test_gc_never_plans_used_leased_or_young_results(
    lie: dict[tuple[str, str], tuple[bool, float]],
    uses: list[tuple[frozenset[str], bool]],
    leases: dict[str, bool],
    older_than: float,
) -> None:
    entries = [
        Entry(kind, key, {f"{kind}/{key}/{'manifest.json' if whole else 'part-0'}": Stored(1, 10 - old)})
        for (kind, key), (whole, old) in lie.items()
    ]
    users = [Owner(str(n), "done", keys, sure) for n, (keys, sure) in enumerate(uses)]
    made = plan(Inventory(entries, users, {}), leases, {}, older_than, 10)
    used, held_now = {key for keys, _ in uses for key in keys}, {key for key, lives in leases.items() if lives}
    free = {leftover.entry.folder for leftover in made.free if leftover.entry}
    stay = {entry.folder for kept in made.kept.values() for entry in kept}
    finished = {entry.key for entry in entries if entry.kind == "objects" and entry.finished}
    for entry in entries:
        safe = entry.kind == "objects" and entry.finished and entry.key in used
        assert (entry.folder in free) + (entry.folder in stay) + (safe and entry.key not in held_now) == 1
        if entry.folder in free:
            assert not safe and entry.key not in held_now
            if entry.kind == "objects" or entry.key not in finished:
                assert 10 - entry.modified >= older_than and not held_now
                assert all(sure for _, sure in uses) or entry.stage not in ("generator", "judged")
    dead = {f"leases/{key}" for key, lives in leases.items() if not lives}
    assert {leftover.name for leftover in made.free if leftover.what == "lease"} == dead


# ---------------------------------------------------------------- verify


def test_verify_hashes_every_byte(storage: Path, root: Path, full: set[str]) -> None:
    words = ["store", "verify", "--storage", str(storage)]
    sound = json_of(ask(*words, "--json"))
    assert sound["damaged"] == {} and "all sound" in ask(*words).stdout
    whole = [path.parent for path in root.rglob("manifest.json")]
    assert sound["results"] == len(whole)
    assert sound["bytes"] == sum(path.stat().st_size for folder in whole for path in folder.iterdir())
    (flipped,) = (root / "objects" / KEY).glob("part-*")
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    (lost,) = (root / "checkpoints" / OTHER_KEY).glob("part-*")
    lost.unlink()
    (root / "objects" / store_keys(TINY)["teacher"][0] / "manifest.json").write_text("{}")
    before = files(root)
    damaged = json_of(ask(*words, "--json"), 1)["damaged"]
    assert {name.partition("-")[0] for name in damaged} == {"objects/warmup", "checkpoints/warmup", "objects/teacher"}
    assert "SHA-256" in damaged[f"objects/{KEY}"] and "missing" in damaged[f"checkpoints/{OTHER_KEY}"]
    table = ask(*words)
    assert table.exit_code == 1 and "3 damaged" in table.stdout and KEY in table.stdout and table.stderr == ""
    assert files(root) == before, "verify removes nothing"


def test_a_checkpoint_that_is_replaced_meanwhile_is_not_damaged(
    storage: Path, full: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, real, rounds = Store(storage), Store.manifest, []

    def manifest(self: Store, kind: str, key: str) -> Any:
        found = real(self, kind, key)
        if kind == "checkpoints" and key == OTHER_KEY and len(rounds) < 2:
            rounds.append(1)
            writer.save_checkpoint(key, {"round": len(rounds)}, {"p": arrays(len(rounds) + 5.0)})
        return found

    monkeypatch.setattr(Store, "manifest", manifest)
    assert json_of(ask("store", "verify", "--storage", str(storage), "--json"))["damaged"] == {} and len(rounds) == 2


# ---------------------------------------------------------------- files of somebody else


def test_verify_lists_what_no_store_writes(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for key in (KEY, OTHER_KEY):
        store.put(key, {}, {"p": arrays()})
    (tmp_path / "leases" / "mine").mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    os.mkfifo(tmp_path / "runs" / "pipe")
    (tmp_path / "objects" / "link").symlink_to(KEY)
    manifest = tmp_path / "objects" / OTHER_KEY / "manifest.json"
    manifest.unlink()
    manifest.mkdir()
    found = json_of(ask("store", "verify", "--storage", str(tmp_path), "--json"), 1)
    assert found["damaged"] == {
        "leases/mine": "it is a folder", "runs/pipe": "it is a pipe", "objects/link": "it is a symbolic link",
        f"objects/{OTHER_KEY}/manifest.json": "it is a folder",
    }  # fmt: skip
    assert found["results"] == 1
    freed = gc(tmp_path, "--older-than", "0s")
    assert names(freed) == {f"objects/{KEY}", f"objects/{OTHER_KEY}"} and (tmp_path / "leases" / "mine").is_dir()
    assert ask("store", "ls", "--storage", str(tmp_path)).exit_code == 0


def test_verify_lists_a_summary_that_is_not_whole(tmp_path: Path) -> None:
    make_run(Store(tmp_path), "runs/one")
    summary = tmp_path / "runs" / "one" / "summary.json"
    for text in ("[" * 5000, '{"status": ' + "1" * 4001 + "}", "[]"):
        summary.write_text(text)
        assert list(json_of(ask("store", "verify", "--storage", str(tmp_path), "--json"), 1)["damaged"]) == [
            "runs/one/summary.json"
        ]
        assert "summary.json is not whole" in refusal(ask("store", "gc", "--storage", str(tmp_path)))


@pytest.mark.parametrize("clients", [10**6, 2, "x"])
def test_a_summary_of_other_clients_leaves_generators_alone(tmp_path: Path, clients: int) -> None:
    store = Store(tmp_path)
    made = make_run(store, "runs/one")
    summary = json.loads(store.files.read("runs/one/summary.json"))
    summary["config"]["partition"]["num_clients"] = clients
    store.write("runs/one/summary.json", json.dumps(summary).encode())
    age(tmp_path)
    freed = gc(tmp_path)
    assert all(store.get(key) is not None for key in made if key.startswith("generator"))
    assert {"run one"} == {why.split(" may")[0] for why in whys(freed).values()}


def test_a_time_that_no_date_can_hold_is_listed(tmp_path: Path) -> None:
    Store(tmp_path).put(KEY, {}, {"p": arrays()})
    for path in (tmp_path / "objects" / KEY).iterdir():
        try:
            os.utime(path, (1e12, 1e12))
        except OSError:
            pytest.skip("this file system has no such times")
    assert ask("store", "ls", "--storage", str(tmp_path)).exit_code == 0
