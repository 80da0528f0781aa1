"""Results that were damaged or moved: what the store logs and returns."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from storing import FACTS, KEY, arrays, payload, same

from mosaic_ray.storage.store import CorruptResult, Store


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: os.truncate(p, p.stat().st_size // 2), "bytes instead of"),
    "lengthened": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes instead of"),
    "flipped": (flip, "its SHA-256 differs"),
    "deleted": (os.unlink, "it is missing"),
    "a folder": (become_folder, ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["objects", "checkpoints"])
def test_a_damaged_payload_is_logged_and_is_absent(store: Store, logged: list[str], damage: str, kind: str) -> None:
    put: Any = {"objects": store.put, "checkpoints": store.save_checkpoint}[kind]
    get = {"objects": store.get, "checkpoints": store.load_checkpoint}[kind]
    put(KEY, FACTS, {"p": arrays()})
    do, why = DAMAGES[damage]
    path = payload(store, kind)
    do(path)
    assert get(KEY) is None
    (line,) = logged
    assert KEY in line and "damaged" in line and path.name in line and why in line and "\n" not in line
    assert get(KEY) is None and len(logged) == 1, "it is removed, so it is logged once"
    if path.is_dir():
        path.rmdir()
    put(KEY, FACTS, {"p": arrays()})
    again = get(KEY)
    assert again is not None and same(again.load("p"), arrays()) and len(logged) == 1


def reseal(path: Path, **changes: object) -> None:
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(os.urandom(100)),
        lambda p: p.write_text("[]"),
        lambda p: p.write_text("{}"),
        lambda p: p.write_text("null"),
        lambda p: p.write_text("[" * 100_000),
        lambda p: os.truncate(p, p.stat().st_size - 1),
        lambda p: reseal(p, facts={"accuracy": 1.0}),
        lambda p: reseal(p, files={}),
        lambda p: reseal(p, version=2),
        lambda p: reseal(p, facts={"a": float("nan")}),
    ],
)
def test_a_damaged_manifest_is_logged_and_is_absent(
    store: Store, logged: list[str], spoil: Callable[[Path], object]
) -> None:
    store.put(KEY, FACTS, {"p": arrays()})
    spoil(Path(store.local_root or "") / "objects" / KEY / "manifest.json")
    assert store.get(KEY) is None
    assert len(logged) == 1 and f"stage result {KEY} is damaged (manifest.json: " in logged[0]
    store.put(KEY, FACTS, {"p": arrays()})
    assert store.get(KEY) is not None


def test_a_result_moved_to_another_key_is_not_taken_for_it(store: Store, logged: list[str]) -> None:
    store.put(KEY, FACTS)
    shutil.copytree(Path(store.local_root or "") / "objects" / KEY, Path(store.local_root or "") / "objects" / "b-1")
    assert store.get("b-1") is None and "it is for" in logged[0]


def test_a_payload_lost_after_get_is_a_corrupt_result(store: Store) -> None:
    result = store.put(KEY, FACTS, {"p": arrays(), "q": arrays(2.0)})
    for path in Path(store.local_root or "").glob(f"objects/{KEY}/part-*"):
        path.unlink() if path.name == result._entries["p"]["name"] else flip(path)
    for part, why in (("p", "No such file"), ("q", "SHA-256")):
        with pytest.raises(CorruptResult, match=why) as caught:
            result.load(part)
        located = caught.value.at("teacher")
        assert (located.key, located.part, located.stage) == (KEY, part, "teacher")
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert store.get(KEY) is None
