"""Download the files of public data sets, check and unpack them.

A transfer that breaks off resumes where it stopped, in the same call or in a later one. The records hold torchvision's
addresses and checksums; Tiny-ImageNet, which torchvision lacks, has its authors' address.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import itertools
import os
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from ..config.schema import DataConfig
from ..core.errors import RequestError
from .formats import brief
from .paths import data_root, lock_folder
from .progress import bar
from .specs import Resource, spec_of

_PIECE = 1 << 20
_TIMEOUT_SECONDS = 30


class _Unreachable(Exception):
    """No address returned the file; the message holds a reason for each."""


def needed(config: DataConfig) -> list[Path]:
    """Return the paths of the files of ``config.name``, downloaded first if ``data.download`` is set.

    Raises ``RequestError`` if one is missing.
    """
    name, root = config.name, data_root(config)
    if config.download:
        download(name, root)
    paths = [root / given for resource in spec_of(name).resources for given in resource.gives]
    for path in paths:
        if not path.exists():
            by_hand = next((r.by_hand for r in spec_of(name).resources if r.by_hand), "")
            if by_hand:
                raise RequestError(
                    f"data.name = {name}: no {path}; put {by_hand} there, or say where the data lie by --set "
                    "data.root=FOLDER or MOSAIC_DATA"
                )
            raise RequestError(
                f"data.name = {name}: no {path}; fetch it by `mosaic data fetch {name}` or --set data.download=true, "
                "or say where the data lie by --set data.root=FOLDER or MOSAIC_DATA"
            )
    return paths


def download(name: str, root: Path) -> list[str]:
    """Download the missing files of the data set ``name`` to ``root``; return their paths below it.

    If that fails, ``RequestError`` names the files to download by hand, and where to put them.
    """

    def missing() -> list[Resource]:
        return [r for r in spec_of(name).resources if not all((root / given).exists() for given in r.gives)]

    if not missing():
        return []
    for given in missing():
        if given.by_hand:
            raise RequestError(f"data set {name}: no address offers it; put {given.by_hand} in {root / given.path}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock_folder(root):
            wanted = missing()
            for number, resource in enumerate(wanted):
                try:
                    _download_resource(resource, root)
                except _Unreachable as error:
                    by_hand = (f"{r.urls[0]} (MD5 {r.md5}) at {root / r.path}" for r in wanted[number:])
                    advice = f"to bring it here by hand, put {', and '.join(by_hand)}; then ask again"
                    raise RequestError(f"data set {name}: {error}; {advice}") from error
    except OSError as error:
        raise RequestError(f"data set {name}: {error.filename or root}: {error.strerror or error}") from error
    return [given for resource in wanted for given in resource.gives]


def _download_resource(resource: Resource, root: Path) -> None:
    target = root / resource.path
    put_by_hand = target.exists()
    if not put_by_hand:
        target.parent.mkdir(parents=True, exist_ok=True)
        _download(resource, target)
    elif (found := _md5(target)) != resource.md5:
        raise RequestError(f"{target} has the MD5 {found}, where {resource.md5} is meant; remove it and ask again")
    if resource.gives != (resource.path,):
        try:
            _unpack(target, root / resource.gives[0], root)
        except (tarfile.TarError, zipfile.BadZipFile, shutil.ReadError, EOFError) as error:
            raise RequestError(f"{target} cannot be unpacked ({brief(error)})") from error
        if not put_by_hand:
            target.unlink()


def _download(resource: Resource, target: Path) -> None:
    part = target.with_name(f"{target.name}.part")
    reasons = []
    for url in resource.urls:
        for resumed in dict.fromkeys([part.exists(), False]):  # a resumed file with a wrong sum is downloaded anew
            try:
                _transfer(url, part)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(getattr(error, "reason", None), "strerror", None)  # URLError wraps the network's error
                reasons.append(f"{url}: {reason or brief(error)}")
                break
            if (found := _md5(part)) == resource.md5:
                os.replace(part, target)
                return
            part.unlink()
            if not resumed:
                reasons.append(f"{url} gives a file of the MD5 {found}")
    raise _Unreachable("; ".join(reasons))


def _transfer(url: str, part: Path) -> None:
    """Download ``url`` to ``part`` from the end of ``part`` on; retry as long as bytes arrive."""
    while True:
        have = part.stat().st_size if part.exists() else 0
        try:
            return _request(url, part, have)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                return None  # complete, or too long: the checksum decides
            raise
        except (OSError, http.client.HTTPException):
            if not part.exists() or part.stat().st_size <= have:
                raise


def _request(url: str, part: Path, have: int) -> None:
    headers = {"User-Agent": "mosaic-ray"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS) as answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # a server without ranges sends the whole file
        total = have + int(answer.headers.get("Content-Length") or 0)
        with open(part, "ab" if have else "wb") as sink, bar(part.stem, total, done=have, size=True) as advance:
            while piece := answer.read(_PIECE):
                sink.write(piece)
                advance(len(piece))
                have += len(piece)
    if have < total:
        raise ConnectionError(f"it broke off after {have} of {total} bytes")


def _md5(path: Path) -> str:
    with open(path, "rb") as file, bar(f"checking {path.stem}", 0):
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _untar(archive: Path, folder: Path) -> None:
    """Unpack a tar file into ``folder``; ``TarError`` where a member would be written elsewhere."""
    with tarfile.open(archive) as opened:
        if hasattr(tarfile, "data_filter"):
            opened.extractall(folder, filter="data")
            return
        for member in opened:  # Python 3.11 before 3.11.4 has no filters
            inside = (folder / member.name).resolve().is_relative_to(folder.resolve())
            if not inside or not (member.isreg() or member.isdir()):
                raise tarfile.TarError(f"{member.name}: neither a file nor a folder below the archive's own")
            opened.extract(member, folder)


def _unpack(archive: Path, first: Path, root: Path) -> None:
    """Unpack ``archive`` below ``root``: a .gz holds the file ``first``, other archives the folder of ``first``."""
    with bar(f"unpacking {archive.name}", 0), contextlib.ExitStack() as stack:
        if archive.name == f"{first.name}.gz":
            beside = first.with_name(f"{first.name}.part")
            with gzip.open(archive) as source, open(beside, "wb") as sink:
                shutil.copyfileobj(source, sink)
            os.replace(beside, first)
            return
        beside = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root)))
        if archive.suffix == ".zip":
            shutil.unpack_archive(archive, beside)
        else:
            _untar(archive, beside)
        folder = root / first.relative_to(root).parts[0]
        if folder.exists():  # it lacks files, and may hold the user's own
            asides = (folder.with_name(f"{folder.name}.incomplete-{number}") for number in itertools.count(1))
            folder.rename(next(aside for aside in asides if not aside.exists()))
        (beside / folder.name).rename(folder)
