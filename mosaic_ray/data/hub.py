"""Data sets of the Hugging Face Hub: the parquet files of one revision, kept below the data root.

Only parquet files are downloaded, under names of our own, and nothing of a repository runs. A data set that is there is
not asked for again, so the same command reads the same images until ``mosaic data fetch`` renews it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from ..config.schema import DataConfig
from ..core.errors import RequestError, neighbours
from ..core.untrusted import parse_json, read_regular
from .formats import brief
from .modality_sources import parquet_files
from .paths import data_root, lock_folder
from .progress import warn
from .specs import ImageFiles, Samples

#: The folder below the data root, and the file in each data set that records where it came from.
HUB, RECORD = "hub", "source.json"
#: The branch with the parquet files that the Hub itself makes of a repository that has none.
CONVERTED = "refs/convert/parquet"
_WORD = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
_NAME = re.compile(rf"hf:({_WORD}/{_WORD})(?:/({_WORD}(?:/{_WORD})*))?(?:@({_WORD}(?:/{_WORD})*))?")
_FILE = re.compile(r"(?!\.)[\w.=+-]+(?:/(?!\.)[\w.=+-]+)*\.parquet", re.ASCII)
#: What stands in for a split "test", in this order.
_TESTS = ("test", "validation", "valid", "val", "dev")


class Name(NamedTuple):
    """The parts of ``hf:OWNER/NAME[/CONFIG][@REVISION]``; "" for those left out."""

    repository: str
    config: str
    revision: str

    @property
    def folder(self) -> str:
        """The folder's name below ``hub``; no two data sets share one."""
        words = "--".join(filter(None, [*self.repository.split("/"), quote(self.config, safe="")]))
        return words + (f"@{quote(self.revision, safe='')}" if self.revision else "")


def parse(name: str) -> Name:
    """Return the parts of a data set's name; ``RequestError`` where it has another form."""
    found = _NAME.fullmatch(name)
    if not found or ".." in name or "--" in (found[1] or ""):
        raise RequestError(f"data.name = {name}: it takes hf:OWNER/NAME, hf:OWNER/NAME/CONFIG, and perhaps @REVISION")
    return Name(*(part or "" for part in found.groups()))


def hub(config: DataConfig) -> ImageFiles | Samples:
    """List ``hf:OWNER/NAME[/CONFIG][@REVISION]``, downloaded first where it is not below the data root."""
    fetch(config.name, data_root(config))
    return parquet_files(config, (data_root(config) / HUB / parse(config.name).folder).resolve())


def fetch(name: str, root: Path, renew: bool = False) -> bool:
    """Download the data set ``name`` if it is not below ``root``; return whether files came.

    ``renew``: also if the Hub has another revision by now; files that were put there by hand stay. ``RequestError``
    where that fails: it says which files to put where.
    """
    folder = root / HUB / parse(name).folder
    if folder.is_dir() and (not renew or not (folder / RECORD).exists()):
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock_folder(folder.parent):
            if folder.is_dir() and not renew:
                return False  # another process has brought it meanwhile
            return _download(name, folder)
    except OSError as error:
        raise RequestError(f"data.name = {name}: {error.filename or folder}: {error.strerror or error}") from error


def _download(name: str, folder: Path) -> bool:
    """Put the newest files of ``name`` into ``folder``, all at once; return False if they are there."""
    repository, config, revision = parse(name)
    what = f"data.name = {name}"
    client = _client(what)
    by_hand = (
        f"to go without the Hub, put its train*.parquet and test*.parquet ({client.constants.ENDPOINT}/datasets/"
        f"{repository}) in {folder}"
    )
    try:
        info = _listed(client, repository, revision)
        found = _splits(info.siblings, config, name)
        if not found and not revision:
            info = _listed(client, repository, CONVERTED)
            found = _splits(info.siblings, config, name)
            warn(f"{name}: main has no parquet files of train and test; the Hub's conversion of it is taken")
    except RequestError:
        raise
    except Exception as error:  # the client raises errors of several libraries
        raise RequestError(f"{what}: {_reason(client, error)}; {by_hand}") from error
    if not found:
        raise RequestError(f"{what}: it has no parquet files of train and of test or validation; {by_hand}")
    record = {"repository": repository, "revision": info.sha, "files": found}
    if _record(folder) == record:
        return False
    work = folder.with_name(f".part-{folder.name}-{info.sha}")  # a later call goes on where it broke off
    done = work / "done"
    done.mkdir(parents=True, exist_ok=True)
    for part, paths in zip(("train", "test"), found.values(), strict=True):
        for number, path in enumerate(paths):
            target = done / f"{part}-{number:05}-of-{len(paths):05}.parquet"
            if target.exists():
                continue
            try:
                place = client.hf_hub_download(
                    repository, path, repo_type="dataset", revision=info.sha, local_dir=work / "files"
                )
            except Exception as error:
                raise RequestError(f"{what}: {path}: {_reason(client, error)}; ask again, or {by_hand}") from error
            Path(place).replace(target)
    (done / RECORD).write_text(json.dumps(record))
    if folder.exists():
        folder.rename(work / "before")
    done.rename(folder)
    shutil.rmtree(work, ignore_errors=True)
    if "test" not in found:
        warn(f"{name} has no split test; the test images are those of {[*found][1]}")
    return True


def _client(what: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise RequestError(f"{what}: it needs huggingface_hub; pip install 'mosaic-ray[hf]'") from None
    return huggingface_hub


def _listed(client: Any, repository: str, revision: str) -> Any:
    """Return the files of a revision (``siblings``) and its commit (``sha``), which names a folder here."""
    info = client.HfApi().dataset_info(repository, revision=revision or None, timeout=30)
    if not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
        raise ValueError(f"its revision is {str(info.sha)[:60]!r}")
    return info


def _reason(client: Any, error: Exception) -> str:
    errors = client.errors
    if isinstance(error, errors.GatedRepoError):
        return "its owner grants access on request; log in by `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the Hub has no such data set, or it is private and asks for HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the Hub has no such revision"
    if client.constants.HF_HUB_OFFLINE:
        return "it is not here, and HF_HUB_OFFLINE is set"
    return brief(error)


def _splits(siblings: Iterable[Any], config: str, name: str) -> dict[str, list[str]]:
    """Return the paths of the splits train and test of a repository, or of what stands in for test; empty without both.

    Paths are ``[FOLDER/]SPLIT[-...].parquet`` or ``[FOLDER/]SPLIT/*.parquet``, where FOLDER is the configuration.
    """
    what = f"data.name = {name}"
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(str(sibling.rfilename) for sibling in siblings or ()):
        if not path.endswith(".parquet"):
            continue
        if not _FILE.fullmatch(path):
            raise RequestError(f"{what}: it has a file {path[:100]!r}, which is no plain path")
        *folders, leaf = path.split("/")
        split = re.split("[-.]", leaf)[0]
        if split not in ("train", *_TESTS) and folders:
            split = folders.pop()
        folder = "/".join(folders[folders[:1] == ["data"] :])
        found.setdefault(folder, {}).setdefault(split, []).append(path)
    whole = {folder: by for folder, by in found.items() if "train" in by and not by.keys().isdisjoint(_TESTS)}
    usual: list[str] = [folder for folder in ("", "default") if folder in whole] or [*whole]
    if not whole:
        return {}
    if config and config not in whole:
        raise RequestError(f"{what}: it has no configuration {config}; {neighbours(config, whole)}")
    if not config and "" not in whole and "default" not in whole and len(whole) > 1:
        raise RequestError(f"{what}: it has several configurations, {', '.join(whole)}; add one, as {name}/{usual[0]}")
    by = whole[config or usual[0]]
    return {split: by[split] for split in ("train", next(split for split in _TESTS if split in by))}


def _record(folder: Path) -> Any:
    try:
        return parse_json(read_regular(folder / RECORD))
    except (OSError, ValueError):
        return None
