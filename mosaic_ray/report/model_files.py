"""Write a run's model as a file or a folder for others (`mosaic export`); every one is read back and compared first."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from ..core.errors import RequestError, RunError, neighbours
from ..core.seeding import stream
from ..core.text import visible
from ..distillation.meta_model import MetaModel
from ..models.state_dict import to_weights
from ..storage.filesystem import write_whole
from .load import RunReport
from .model_card import card
from .models import (
    CONFIG,
    WEIGHTS,
    ImageClassifier,
    Module,
    SampleClassifier,
    SampleGenerator,
    chosen,
    load_model,
    model_of,
)

#: The end of a file's name by format.
FORMATS = {"pt": ".pt", "onnx": ".onnx", "torchscript": ".torchscript.pt", "hub": "-hub"}

#: The packages of ``--to onnx``; the last one runs its files.
ONNX = ("onnx", "onnxscript", "onnxruntime")

#: The inputs and outputs of files beside modalities, and the mask of these.
NAMES, MASK = ("z", "labels", "logits"), "present"

#: Samples that a file is checked with. ONNX Runtime adds in another order than torch: logits may differ by this share
#: of the largest one.
NUM_CHECKED, TOLERANCE = 7, 1e-5


def export(
    run: RunReport, to: str = "pt", role: str = "final", output: str | Path | None = None, force: bool = False
) -> Path:
    """Write a model of ``run`` and return the file's path, or the folder's.

    Args:
        to: ``pt``, ``onnx``, ``torchscript`` or ``hub``.
        role: a role, ``client:NUMBER`` or ``generator:NUMBER``.
        output: where; by default below ``models`` in the run's folder.
        force: replace what is there.

    Raises:
        RequestError: for a role that the run lacks, a package that is not installed, a place that is taken.
        RunError: where the file answers otherwise than the model.
    """
    if to not in FORMATS:
        raise RequestError(f"--to {visible(to, '')}: {neighbours(to, FORMATS)}")
    kind, number = chosen(role)
    name = f"{kind}-{number}" if number >= 0 else kind
    place = run.folder / "models" / f"{name}{FORMATS[to]}" if output is None else Path(output).expanduser().absolute()
    _check_place(place, to, force)
    packages = [needed(name, "onnx", "--to onnx") for name in (ONNX if to == "onnx" else ())]
    module = model_of(run, role)
    if to in ("pt", "hub") and not module.config.get("network", module.config.get("generator")):
        raise RequestError(f"--to {to}: a teacher is many networks; take onnx or torchscript")
    taken = {*NAMES, MASK}.intersection(part["name"] for part in module.config["data"].get("modalities", ()))
    if taken and to == "onnx":
        raise RequestError(f"--to onnx: a modality is called {min(taken)}, as another input is; take torchscript")
    for part in module.modules():
        if isinstance(part, MetaModel):
            part.max_rows = 2**31  # one batch: a file would keep the number of parts of the batch that it was made with
    try:
        if to == "hub":
            _write_folder(place, {**_folder(module), "README.md": card(run, module.config).encode()}, module)
        else:
            makers: dict[str, Callable[[Module], bytes]] = {
                "pt": _pt, "torchscript": _torchscript, "onnx": partial(_onnx, packages),
            }  # fmt: skip
            write_whole(place, makers[to](module))
    except OSError as error:
        raise RequestError(f"--output {place}: {error.strerror or error}") from None
    except (RequestError, RunError):
        raise
    except Exception as error:  # of an exporter, at an operation that its format lacks
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise RunError(f"--to {to}: this network cannot be written so: {visible(what)[:300]}") from error
    return place


def needed(package: str, extra: str, what: str) -> Any:
    """Import a package of an extra; ``RequestError`` in the name of ``what`` where it is not installed."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(package)
    except ImportError:
        install = f'pip install "mosaic-ray[{extra}]"'
        raise RequestError(f"{what}: it needs {package}, which is not installed: {install}") from None


def _check_place(place: Path, to: str, force: bool) -> None:
    if not place.exists():
        return
    if place.is_dir() != (to == "hub"):
        raise RequestError(f"--output {place}: it is a {'file' if to == 'hub' else 'folder'}; name another place")
    if not force:
        raise RequestError(f"--output {place}: it is there already; --force replaces it")
    if to == "hub" and not {CONFIG, WEIGHTS} <= {path.name for path in place.iterdir()}:
        raise RequestError(f"--output {place}: no exported model lies there, so it stays; name another folder")


def inputs_of(module: Module, count: int = NUM_CHECKED) -> dict[str, Tensor]:
    """Return inputs to try a module with, by the names that they have in files."""
    data, draws = module.config["data"], stream(0, "export")
    if isinstance(module, SampleClassifier):
        return _samples(module, count, draws)
    if isinstance(module, ImageClassifier):
        shape = count, data["channels"], data["image_size"], data["image_size"]
        return {"images": torch.randint(0, 256, shape, generator=draws, dtype=torch.uint8)}
    found = {"z": torch.randn(count, module.network.latent_dim, generator=draws)}
    if module.network.num_classes:
        found["labels"] = torch.randint(0, data["num_classes"], (count,), generator=draws)
    return found


def _samples(module: SampleClassifier, count: int, draws: torch.Generator) -> dict[str, Tensor]:
    found = {}
    for modality in module.facts.modalities:
        shape = count, *modality.shape
        if modality.kind == "image":
            found[modality.name] = torch.randint(0, 256, shape, generator=draws, dtype=torch.uint8)
        elif modality.kind == "vector":
            found[modality.name] = module.vectors.restored(modality.name, torch.randn(shape, generator=draws))
        else:
            found[modality.name] = torch.randint(0, modality.vocabulary, shape, generator=draws)
    places = torch.arange(len(found))
    sets = 1 + torch.arange(count) % (2 ** len(found) - 1)  # each sample has one modality or more
    return found | {MASK: (sets[:, None] >> places) % 2 > 0}


def arguments(module: Module, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the arguments by which a module takes ``inputs``, which have the names of ``inputs_of``."""
    if not isinstance(module, SampleClassifier):
        return tuple(inputs.values())
    return {name: value for name, value in inputs.items() if name != MASK}, inputs[MASK]


def outputs_of(found: Any) -> list[np.ndarray]:
    """Return as arrays what a module or a file answers: one of them, or one for each modality."""
    parts = [*found.values()] if isinstance(found, dict) else found if isinstance(found, list) else [found]
    return [np.asarray(part) for part in parts]


def output_names(module: Module) -> list[str]:
    """Return the names of what a module answers: logits, images, or the modalities of a generator."""
    if isinstance(module, SampleGenerator):
        return [*module.held]
    return ["logits" if isinstance(module, ImageClassifier | SampleClassifier) else "images"]


def _compare(what: str, module: Module, answer: Callable[[dict[str, Tensor]], Any]) -> None:
    """Raise ``RunError`` unless ``answer`` gives what ``module`` does.

    Images may differ by a level, logits and vectors by ``TOLERANCE``, tokens at one place of a hundred.
    """
    inputs = inputs_of(module)
    with torch.no_grad():
        pairs = zip(outputs_of(module(*arguments(module, inputs))), outputs_of(answer(inputs)), strict=True)
        far = [_apart(found, wanted) for wanted, found in pairs]
    if not max(far) <= 1:
        raise RunError(f"--to {what}: the file answers otherwise than the model; nothing was written")


def _apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return how far an answer is from a module's, in units of what is allowed."""
    if found.shape != wanted.shape:
        return np.inf
    if wanted.dtype == np.int64:
        return float(np.mean(found != wanted)) / 0.01
    far = float(np.abs(found.astype(np.float64) - wanted).max())
    return far if wanted.dtype == np.uint8 else far / (TOLERANCE * max(1.0, float(np.abs(wanted).max())))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Show none of the exporters' own warnings, logs and prints."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            yield
    finally:
        logging.disable(before)


def _pt(module: Module) -> bytes:
    data = io.BytesIO()
    torch.save({"config": module.config, "state_dict": module.network.state_dict()}, data)
    return data.getvalue()


def _torchscript(module: Module) -> bytes:
    data = io.BytesIO()
    with _quiet():
        given = arguments(module, inputs_of(module, 3))
        traced = torch.jit.trace(module, given, check_trace=False, strict=not isinstance(module, SampleGenerator))
        torch.jit.save(traced, data, _extra_files={CONFIG: json.dumps(module.config)})
        again = torch.jit.load(io.BytesIO(data.getvalue()))
        _compare("torchscript", module, lambda tried: again(*arguments(module, tried)))
    return data.getvalue()


def _onnx(packages: Sequence[Any], module: Module) -> bytes:
    inputs, runtime = inputs_of(module, 3), packages[-1]
    with _quiet():
        batch = torch.export.Dim("batch", min=1)
        made = torch.onnx.export(
            module, arguments(module, inputs), dynamo=True, verbose=False, input_names=list(inputs),
            output_names=output_names(module),
            dynamic_shapes=arguments(module, {name: {0: batch} for name in inputs}),
        )  # fmt: skip
        assert made is not None
        made.model.metadata_props["mosaic_ray"] = json.dumps(module.config)
        data: bytes = made.model_proto.SerializeToString()
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])

        def answer(tried: dict[str, Tensor]) -> Any:
            return session.run(None, {name: value.numpy() for name, value in tried.items()})

        _compare("onnx", module, answer)
    return data


def _folder(module: Module) -> dict[str, bytes]:
    weights = safetensors.numpy.save(to_weights(module.network), metadata={"format": "pt"})
    return {CONFIG: (json.dumps(module.config, indent=1) + "\n").encode(), WEIGHTS: weights}


def _write_folder(place: Path, files: dict[str, bytes], module: Module) -> None:
    """Write a folder beside its place, read the model back, and rename it there."""
    new = place.with_name(f"{place.name}.{uuid.uuid4().hex[:8]}.tmp")
    old = new.with_suffix(".old")
    try:
        for name, data in files.items():
            write_whole(new / name, data)
        again = load_model(new, own_code=True)
        with torch.no_grad():
            _compare("hub", module, lambda tried: again(*arguments(module, tried)))
        if place.exists():
            place.rename(old)
        new.rename(place)
    except BaseException:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def push(folder: Path, name: str) -> str:
    """Upload an exported folder to the Hugging Face Hub as ``OWNER/NAME``, private where it is new; return its address.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    api = needed("huggingface_hub", "hf", f"--push {name}").HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Add a model of mosaic_ray")
    except Exception as error:  # of the network, of the token, of the hub
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise RunError(f"--push {name}: {why}; the folder is {folder}") from None
    return f"https://huggingface.co/{name}"


def check_name(name: str) -> None:
    """Raise ``RequestError`` unless ``name`` is OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", name, re.ASCII):
        raise RequestError(f"--push {visible(name, '')}: it takes OWNER/NAME")
