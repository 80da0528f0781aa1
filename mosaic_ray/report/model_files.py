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
from collections.abc import Callable, Iterator, Sequence
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
from .models import CONFIG, WEIGHTS, ImageClassifier, ImageGenerator, chosen, load_model, model_of

Module = ImageClassifier | ImageGenerator

#: The end of a file's name by format.
FORMATS = {"pt": ".pt", "onnx": ".onnx", "torchscript": ".torchscript.pt", "hub": "-hub"}

#: The packages of ``--to onnx``; the last one runs its files.
ONNX = ("onnx", "onnxscript", "onnxruntime")

#: Images that a file is checked with. ONNX Runtime adds in another order than torch: logits may differ by this share
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
    if isinstance(module, ImageClassifier):
        shape = count, data["channels"], data["image_size"], data["image_size"]
        return {"images": torch.randint(0, 256, shape, generator=draws, dtype=torch.uint8)}
    found = {"z": torch.randn(count, module.network.latent_dim, generator=draws)}
    if module.network.num_classes:
        found["labels"] = torch.randint(0, data["num_classes"], (count,), generator=draws)
    return found


def _compare(what: str, module: Module, answer: Callable[..., Any]) -> None:
    """Raise ``RunError`` unless ``answer`` gives the logits of ``module``, or images that differ by a level at most."""
    inputs = inputs_of(module)
    with torch.no_grad():
        wanted = module(*inputs.values()).numpy()
    found = np.asarray(answer(*inputs.values()))
    close = 1 if isinstance(module, ImageGenerator) else TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    apart = np.abs(found.astype(np.float64) - wanted).max() if found.shape == wanted.shape else np.inf
    if not apart <= close:
        raise RunError(f"--to {what}: the file answers otherwise than the model (by {apart:.3g}); nothing was written")


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
        traced = torch.jit.trace(module, tuple(inputs_of(module, 3).values()), check_trace=False)
        torch.jit.save(traced, data, _extra_files={CONFIG: json.dumps(module.config)})
        again = torch.jit.load(io.BytesIO(data.getvalue()))
        _compare("torchscript", module, again)
    return data.getvalue()


def _onnx(packages: Sequence[Any], module: Module) -> bytes:
    inputs, runtime = inputs_of(module, 3), packages[-1]
    with _quiet():
        batch = torch.export.Dim("batch", min=1)
        made = torch.onnx.export(
            module, tuple(inputs.values()), dynamo=True, verbose=False, input_names=list(inputs),
            output_names=["logits" if isinstance(module, ImageClassifier) else "images"],
            dynamic_shapes=tuple({0: batch} for _ in inputs),
        )  # fmt: skip
        assert made is not None
        made.model.metadata_props["mosaic_ray"] = json.dumps(module.config)
        data: bytes = made.model_proto.SerializeToString()
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])

        def answer(*tried: Tensor) -> Any:
            [found] = session.run(None, {name: x.numpy() for name, x in zip(inputs, tried, strict=True)})
            return found

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
            _compare("hub", module, again)
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
