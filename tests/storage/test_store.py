"""The store: round trips of results; keys, sessions, checkpoints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from storing import FACTS, KEY, arrays, same

from mosaic_ray.storage.store import Store, stage_key

knobs = st.dictionaries(
    st.text(max_size=8),
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
    ),
    max_size=5,
)


@given(knobs, st.integers(0, 9), st.lists(st.text(max_size=5), max_size=3))
def test_stage_key_does_not_depend_on_the_order_or_kind_of_containers(
    values: dict[str, object], version: int, upstream: list[str]
) -> None:
    key = stage_key("warmup", version, values | {"widths": (1.0, 0.5)}, upstream)
    turned = dict(reversed((values | {"widths": [np.float64(1.0), 0.5]}).items()))
    assert key == stage_key("warmup", version, turned, tuple(upstream))
    assert key.startswith("warmup-") and len(key) == len("warmup-") + 20


def test_stage_key_changes_with_every_argument() -> None:
    lr = 0.1
    keys = {
        stage_key("a", 1, {"lr": lr}, ["x", "y"]),
        stage_key("b", 1, {"lr": lr}, ["x", "y"]),
        stage_key("a", 2, {"lr": lr}, ["x", "y"]),
        stage_key("a", 1, {"lr": float(np.nextafter(lr, 1))}, ["x", "y"]),
        stage_key("a", 1, {"lr": np.float32(lr)}, ["x", "y"]),  # is another number
        stage_key("a", 1, {"lr": lr, "k": None}, ["x", "y"]),
        stage_key("a", 1, {"lr": lr}, ["y", "x"]),
        stage_key("a", 1, {"lr": lr}, ["x"]),
    }
    assert len(keys) == 8


def test_stage_key_is_the_same_in_every_version() -> None:
    """Golden: a change here throws away every result that users have stored."""
    text = b'{"knobs":{"lr":0.05,"widths":[1.0]},"stage":"warmup","upstream":["partition-0"],"version":1}'
    key = stage_key("warmup", 1, {"widths": (1.0,), "lr": 0.05}, ["partition-0"])
    assert key == "warmup-" + hashlib.sha256(text).hexdigest()[:20] == "warmup-63b5cdfe09b337827659"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), np.zeros(2), {1: 2}, object(), b"x"])
def test_what_json_would_bend_is_refused_by_its_place(store: Store, bad: object) -> None:
    with pytest.raises(ValueError, match=r"knobs\.a\[1\]"):
        stage_key("s", 1, {"a": [0, bad]}, [])
    with pytest.raises(ValueError, match=r"facts\.a\.b"):
        store.put(KEY, {"a": {"b": bad}})
    assert store.get(KEY) is None


@pytest.mark.parametrize("bad", ["", "../up", "a/b", ".hidden"])
def test_a_key_is_a_plain_name(store: Store, bad: str) -> None:
    with pytest.raises(ValueError, match="cannot name"):
        store.put(bad, {})


# ---------------------------------------------------------------- round trips


def test_put_then_get(any_store: Store, logged: list[str]) -> None:
    assert any_store.get(KEY) is None
    made = any_store.put(KEY, FACTS, {"global": arrays(), "client 1": arrays(2.0)})
    got = any_store.get(KEY)
    assert got is not None and not logged
    for result in (made, got):
        assert result.key == KEY and result.facts == FACTS and result.parts == ("global", "client 1")
        assert same(result.load("global"), arrays()) and same(result.load("client 1"), arrays(2.0))


def test_facts_of_a_fresh_and_of_a_cached_result_are_alike(store: Store) -> None:
    made = store.put(KEY, {"widths": (1.0, np.float32(0.1)), "n": np.int64(3), "no": np.bool_(False)})
    assert made.facts == {"widths": [1.0, float(np.float32(0.1))], "n": 3, "no": False}
    assert made.facts["no"] is False and type(made.facts["n"]) is int
    cached = store.get(KEY)
    assert cached is not None and cached.facts == made.facts


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(), st.integers())
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_facts_come_back_exactly(store: Store, number: float, word: str, whole: int) -> None:
    store.put(KEY, {"v": [number, word, whole]})
    got = store.get(KEY)
    assert got is not None and repr(got.facts["v"]) == repr([number, word, whole])


ANY_ARRAY = hnp.arrays(
    st.sampled_from([np.int64, np.int32, np.float32, np.float64, np.float16, np.uint8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)


@given(st.dictionaries(st.text(min_size=1, max_size=6), ANY_ARRAY, max_size=4), st.sampled_from("CTRS"))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_come_back_exactly(store: Store, plain: dict[str, np.ndarray], view: str) -> None:
    """0-d, empty, transposed, reversed and strided ones, NaN bits included, in the order given."""
    bend: Any = {
        "C": lambda a: a,
        "T": lambda a: a.T,
        "R": np.flip,
        "S": lambda a: a[::2] if a.ndim else a,
    }[view]
    wanted = {name: bend(a) for name, a in plain.items()}
    store.put(KEY, {}, {"p": wanted})
    got = store.get(KEY)
    assert got is not None and same(got.load("p"), wanted)


def test_loaded_arrays_are_writable_and_private(store: Store) -> None:
    result = store.put(KEY, {}, {"p": arrays()})
    first = result.load("p")
    first["w"][:] = -1
    first["num_batches_tracked"][...] = 0
    assert same(result.load("p"), arrays())


def test_arrays_of_objects_are_refused_by_name(store: Store) -> None:
    with pytest.raises(ValueError, match=r'part "p" \(names object\)'):
        store.put(KEY, {}, {"p": {"names": np.array(["a", None]), "fine": np.zeros(2)}})


def test_a_second_commit_replaces_the_first_and_spares_its_readers(store: Store) -> None:
    old = store.put(KEY, {"n": 1}, {"p": arrays(1.0)})
    store.put(KEY, {"n": 2}, {"p": arrays(2.0)})
    got = store.get(KEY)
    assert got is not None and got.facts == {"n": 2} and same(got.load("p"), arrays(2.0))
    assert same(old.load("p"), arrays(1.0))


def test_nothing_is_seen_before_commit(store: Store) -> None:
    writer = store.writer(KEY)
    writer.add("p", arrays())
    assert store.get(KEY) is None
    writer.commit({})
    assert store.get(KEY) is not None


def test_fresh_hides_what_was_there_and_shows_what_it_wrote(store: Store) -> None:
    store.put(KEY, {"n": 1})
    store.put("other-1", {})
    store.save_checkpoint(KEY, {"n": 1}, {})
    fresh = Store(store.uri, fresh=True)
    assert fresh.get(KEY) is None and fresh.load_checkpoint(KEY) is None
    fresh.save_checkpoint(KEY, {"n": 2}, {})
    assert fresh.get(KEY) is None, "a checkpoint of that name is not a result"
    fresh.put(KEY, {"n": 2})
    got, checkpoint = fresh.get(KEY), fresh.load_checkpoint(KEY)
    assert got is not None and got.facts == {"n": 2} and checkpoint is not None and checkpoint.facts == {"n": 2}
    assert fresh.get("other-1") is None
    later = Store(store.uri).get(KEY)
    assert later is not None and later.facts == {"n": 2}


def test_stores_of_one_session_share_what_they_wrote_and_no_other_session_does(tmp_path: Path) -> None:
    plain = Store(tmp_path)
    plain.put(KEY, {"n": 0})
    one, two, other = (Store(tmp_path, fresh=True, session=name) for name in ("a", "a", "b"))
    one.put(KEY, {"n": 1})
    one.save_checkpoint(KEY, {"n": 2}, {})
    for store, seen in ((one, True), (two, True), (plain, True), (other, False)):
        found, checkpoint = store.get(KEY), store.load_checkpoint(KEY)
        assert (found is not None, checkpoint is not None) == (seen, seen)
        assert not seen or (found and checkpoint and (found.facts, checkpoint.facts) == ({"n": 1}, {"n": 2}))
    other.put(KEY, {"n": 3})
    assert two.get(KEY) is None, "it was replaced"
    two.drop_checkpoint(KEY)
    assert one.load_checkpoint(KEY) is None
    assert len({plain.session, Store(tmp_path).session, Store(tmp_path).session}) == 3


def test_a_result_from_before_sessions_can_be_read(store: Store, logged: list[str]) -> None:
    store.put(KEY, FACTS, {"p": arrays()})
    path = Path(store.local_root or "") / "objects" / KEY / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["session"], manifest["sha256"]
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"sha256": seal}))
    got = store.get(KEY)
    assert got is not None and got.facts == FACTS and same(got.load("p"), arrays())
    assert Store(store.uri, fresh=True).get(KEY) is None and not logged


def test_relative_paths_and_file_uris_mean_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = Store("a b")
    here.put(KEY, {"n": 1})
    monkeypatch.chdir("/")
    assert here.get(KEY) is not None, "the folder must not move with the process"
    assert Store((tmp_path / "a b").as_uri()).get(KEY) is not None
    assert here.local_root == tmp_path / "a b"


def test_a_discarded_result_is_absent_and_its_neighbours_stay(any_store: Store, logged: list[str]) -> None:
    held = any_store.put(KEY, FACTS, {"p": arrays()})
    any_store.put("other-1", FACTS)
    any_store.discard(KEY)
    any_store.discard(KEY)
    assert any_store.get(KEY) is None and any_store.get("other-1") is not None and not logged
    assert same(held.load("p"), arrays()), "a concurrent reader is not affected"


def test_an_uploaded_folder_keeps_its_files_and_their_places(any_store: Store, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "tensorboard").mkdir(parents=True)
    (run / "summary.json").write_bytes(b"{}")
    (run / "tensorboard" / "events").write_bytes(bytes(range(256)))
    any_store.upload(run, "runs/mine")
    assert any_store.files.read("runs/mine/summary.json") == b"{}"
    assert any_store.files.read("runs/mine/tensorboard/events") == bytes(range(256))


# ---------------------------------------------------------------- checkpoints


def test_checkpoints_replace_each_other_and_tidy_up(any_store: Store, logged: list[str]) -> None:
    assert any_store.load_checkpoint(KEY) is None
    for number in range(3):
        any_store.save_checkpoint(KEY, {"round": number}, {"w": arrays(number), "kept": arrays(-1.0)})
        got = any_store.load_checkpoint(KEY)
        assert got is not None and got.facts == {"round": number} and same(got.load("w"), arrays(number))
    assert sum(name.startswith("part-") for name in any_store.files.names(f"checkpoints/{KEY}")) == 2
    assert any_store.get(KEY) is None
    any_store.drop_checkpoint(KEY)
    any_store.drop_checkpoint(KEY)
    assert any_store.load_checkpoint(KEY) is None and not any_store.files.names(f"checkpoints/{KEY}") and not logged
