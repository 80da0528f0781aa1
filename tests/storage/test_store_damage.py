"""Results that were damaged or moved: what the store logs and returns."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import refused_by
from hostile import seal
from storing import FACTS, KEY, OTHER_KEY, arrays, payload, same

from mosaic_ray.storage.store import CorruptResult, Store


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "mine.txt").write_text("mine")


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_link(path: Path) -> None:
    os.rename(path, path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: os.truncate(p, p.stat().st_size // 2), "bytes instead of"),
    "lengthened": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes instead of"),
    "flipped": (flip, "its SHA-256 differs"),
    "deleted": (os.unlink, "it is missing"),
    "a folder": (become_folder, "it is a folder"),
    "a pipe": (become_pipe, "it is a pipe"),
    "a link": (become_link, "it is a symbolic link"),
    "huge": (lambda p: os.truncate(p, 1 << 40), "bytes are too many"),
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


DIGEST = "0" * 64
ENTRY = {"name": f"part-{DIGEST[:12]}.safetensors", "size": 1, "sha256": DIGEST, "arrays": ["w"]}


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": None}, {"facts": []}, {"files": []}, {"files": {"p": 3}}, {"files": {"p": ENTRY | {"arrays": [1]}}},
        {"files": {"p": ENTRY | {"name": "../../x"}}}, {"files": {"p": ENTRY | {"name": f"../{ENTRY['name']}"}}},
        {"files": {"p": ENTRY | {"size": -1}}}, {"files": {"p": ENTRY | {"size": "1"}}}, {"version": None},
        {"files": {"p": ENTRY | {"sha256": "x"}}}, {"key": "..\n"}, {"key": None}, {"facts": {"n": 10**4000}},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_manifest_with_a_right_checksum_is_damaged(
    store: Store, logged: list[str], changes: dict[str, Any]
) -> None:
    store.put(KEY, FACTS, {"p": arrays()})
    path = Path(store.local_root or "") / "objects" / KEY / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    seal(path, manifest)
    assert store.get(KEY) is None
    (line,) = logged
    assert KEY in line and "is damaged (manifest.json: " in line and "\n" not in line


def test_a_part_that_is_no_safetensors_file_is_damaged(store: Store, logged: list[str]) -> None:
    store.put(KEY, FACTS, {"p": arrays()})
    path = Path(store.local_root or "") / "objects" / KEY / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["files"]["p"]
    for data, names in ((b"no arrays", ["w"]), ((path.parent / entry["name"]).read_bytes(), ["w"])):
        digest = hashlib.sha256(data).hexdigest()
        entry |= {"name": f"part-{digest[:12]}.safetensors", "size": len(data), "sha256": digest, "arrays": names}
        (path.parent / entry["name"]).write_bytes(data)
        seal(path, manifest)
        assert store.get(KEY) is None
        assert "does not hold the arrays that the manifest names" in logged[-1]


def test_no_link_is_read_written_or_deleted_through(store: Store, logged: list[str], tmp_path: Path) -> None:
    root, outside = Path(store.local_root or ""), tmp_path / "outside"
    store.put(OTHER_KEY, FACTS, {"p": arrays()})
    shutil.copytree(root / "objects" / OTHER_KEY, outside)
    before = {path: path.read_bytes() for path in outside.iterdir()}
    os.symlink(outside, root / "objects" / KEY)
    assert store.get(KEY) is None and "is a symbolic link" in logged[-1]
    store.put(KEY, FACTS, {"p": arrays(2.0)})
    assert store.get(KEY) is not None and not (root / "objects" / KEY).is_symlink()
    (root / "checkpoints").mkdir()
    os.symlink(outside, root / "checkpoints" / KEY)
    store.drop_checkpoint(KEY)
    assert not (root / "checkpoints" / KEY).is_symlink()
    assert {path: path.read_bytes() for path in outside.iterdir()} == before


def test_a_folder_of_the_storage_that_is_a_link_is_refused(store: Store, tmp_path: Path) -> None:
    root = Path(store.local_root or "")
    (tmp_path / "elsewhere").mkdir()
    for name in ("objects", "runs", "leases"):
        os.symlink(tmp_path / "elsewhere", root / name)
        assert f"{name} is a symbolic link, not a folder" in refused_by(Store, str(root))
        (root / name).unlink()
    Store(str(root))


def test_what_stands_in_the_place_of_a_lease_is_set_aside(store: Store) -> None:
    leases = Path(store.local_root or "") / "leases"
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/nowhere"), lambda path: path.symlink_to(".")):
        leases.mkdir(exist_ok=True)
        make(leases / KEY)
        assert store.leases.scan() == {}
        lease = store.try_lease(KEY)
        assert lease is not None and store.try_lease(KEY) is None
        lease.release()
    assert sum("damaged-" in name for name in os.listdir(leases)) == 1, "a folder is kept"


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
