"""Models of a run as modules: images as the data set has them in, logits out (``Run.model``).

Preprocessing is inside, so what a module answers is what the run measured.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor, nn

from .. import __version__
from ..config.plugins import strategy_named
from ..config.resolve import as_dict, override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.seeding import seeded
from ..core.text import visible
from ..core.types import DataFacts, Weights
from ..core.untrusted import parse_json, read_regular
from ..data.load import known_facts, load_dataset
from ..distillation.generator_training import draw, pixels_of
from ..distillation.teacher import build_teacher
from ..federated.client import ClientContext
from ..methods.fens import GATE, read_gate
from ..methods.mosaic.graph import TEACHER
from ..methods.mosaic.server import read_teacher
from ..methods.server_side import uploaded_models
from ..models.classifiers import build_classifier
from ..models.generator import Generator, build_generator
from ..models.state_dict import load_weights
from ..models.submodel import fit, scale_activations
from ..pipeline.graph import Graph, Stage
from ..pipeline.rounds import Warmup, load_models
from ..pipeline.stored import check_entries
from ..runs.plan import graph_of
from ..storage.hashing import plain
from .load import NotAvailable, RunReport

#: The two tasks, in the words of the Hugging Face Hub.
CLASSIFIES, GENERATES = "image-classification", "unconditional-image-generation"

#: The files of a model's folder.
CONFIG, WEIGHTS = "config.json", "model.safetensors"

#: Bytes of the largest file of weights that is read.
MOST_BYTES = 16 << 30


@torch.jit.script_if_tracing  # type: ignore[untyped-decorator]
def in_unit_range(images: Tensor) -> Tensor:
    """Return ``images`` as float32 in [0, 1]: uint8 ones are divided by 255, others are taken as they are."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float()


class ImageClassifier(nn.Module):
    """Maps images [N, C, H, W], uint8 or floats in [0, 1], to logits float32 [N, classes].

    ``network`` takes normalised images. ``config`` describes the model: role, classes, image size, accuracies.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, facts: DataFacts, config: Mapping[str, Any], scale: float = 1.0) -> None:
        super().__init__()
        self.network, self.config, self.scale = network, dict(config), scale
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(facts, name))[:, None, None], persistent=False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        with scale_activations(self.network, self.scale, always=True):
            logits: Tensor = self.network((in_unit_range(images) - self.mean) / self.std)
        return logits.float()


class ImageGenerator(nn.Module):
    """Maps latents z [N, latent_dim], drawn from N(0, I), to images uint8 [N, C, H, W].

    A conditional one takes labels int64 [N], too. In place of z it takes N: z is then drawn from torch's global
    generator, and so are labels that are not given, in the shares of the client's classes.
    """

    def __init__(self, network: Generator, facts: DataFacts, config: Mapping[str, Any], gan_range: str) -> None:
        super().__init__()
        self.network, self.config, self.facts, self.gan_range = network, dict(config), facts, gan_range
        self.eval()

    def forward(self, z: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Map latents, and labels where it is conditional, to images."""
        if isinstance(z, int):
            z, *drawn = draw(self.network, z, torch.default_generator, next(self.parameters()).device)
            labels = drawn[0] if drawn and labels is None else labels
        if (labels is not None) != bool(self.network.num_classes):
            raise ValueError(f"this generator takes {'z and labels' if labels is None else 'z alone'}")
        return pixels_of(self.network(z, labels).float(), self.gan_range, self.facts)


def chosen(role: str, client: int | None = None, generator: int | None = None) -> tuple[str, int]:
    """Return the kind and the number of a model: ``final`` and -1, ``client`` and 3 for ``client:3`` or client=3."""
    numbers = {"client": client, "generator": generator}
    words = [f"{kind}:{number}" for kind, number in numbers.items() if number is not None]
    if len(words) > 1 or (words and role != "final"):
        raise RequestError(f"role {role}: it names a model beside {' and '.join(words)}; name one")
    kind, colon, number = (words or [role])[0].partition(":")
    if colon and (kind not in ("client", "generator") or not number.isdecimal()):
        raise RequestError(f"role {visible(role, '')}: it is a role, client:NUMBER or generator:NUMBER")
    return kind, int(number) if colon else -1


def model_of(
    run: RunReport, role: str = "final", client: int | None = None, generator: int | None = None
) -> ImageClassifier | ImageGenerator:
    """Return a model of ``run``; ``RequestError`` names those that it has where it lacks this one."""
    kind, number = chosen(role, client, generator)
    named = f"{kind}:{number}" if number >= 0 else kind
    config = override(ExperimentConfig(), run.config)
    facts = run.facts or known_facts(config.data) or load_dataset(config.data).facts
    there = Roles(run, ClientContext(config, facts, torch.device("cpu")))
    if named not in there.names:
        raise RequestError(f"role {visible(named, '')}: this run has {there.listed() or 'no finished model'}")
    about = there.about(named)
    try:
        with seeded(0, "model"):
            if kind == "generator":
                return build(about | {"generator": as_dict(config)["generator"]}, there.generator(number))
            if kind == "teacher":
                return ImageClassifier(there.teacher(), facts, about | {"network": None})
            more, weights = there.client(number) if kind == "client" else there.classifier(kind)
            return build(about | more, weights)
    except NotAvailable as absent:
        raise RequestError(f"role {named}: {absent}") from None


class Roles:
    """The models of a run, as its store has them."""

    def __init__(self, run: RunReport, context: ClientContext) -> None:
        self.run, self.context = run, context
        graph: Graph = graph_of(context.config)
        finished = run.summary.stages or {}
        self.stages = {stage.role: stage for stage in graph if stage.role and stage.name in finished}
        self.names = list(self.stages)
        if "warmup" in finished:
            self.names += [f"client:{k}" for k in range(context.config.partition.num_clients)]
        if "generators" in finished:
            self.names += [f"generator:{k}" for k in self._generators()]

    def _generators(self) -> list[int]:
        try:
            return list(self.run.generators)
        except NotAvailable:
            return []

    def listed(self) -> str:
        """Return the names in words: many numbers as a range."""
        words = list(self.stages)
        for kind in ("client", "generator"):
            numbers = [name for name in self.names if name.startswith(f"{kind}:")]
            words += numbers if len(numbers) < 3 else [f"{numbers[0]} to {numbers[-1].partition(':')[2]}"]
        return ", ".join(words)

    def about(self, role: str) -> dict[str, Any]:
        """Return what describes a model beside its network."""
        run, facts = self.run, replace(self.context.facts, name=plain(self.context.facts.name))
        found = {
            "library_name": "mosaic_ray", "mosaic_ray_version": __version__, "role": role, "run": visible(run.name, ""),
            "pipeline_tag": GENERATES if role.startswith("generator:") else CLASSIFIES,
            "data": facts.to_json(), "class_names": list(run.class_names), "method": self.context.config.method,
            "seed": self.context.config.seed, "accuracy": run.summary.accuracy or {},
        }  # fmt: skip
        return parse_json(json.dumps(found))

    def warmup(self) -> Warmup:
        """Return the global models and the clients' own after the warm-up."""
        result = self.run.result("warmup")
        with result.read_as("global"):
            models = load_models(self.context.federation, result)
            for name, weights in models.items():
                check_entries(weights, self.context.federation.entries(name), finite=False)
        return Warmup(result, self.context.federation, models)

    def classifier(self, role: str) -> tuple[dict[str, Any], Weights]:
        """Return the description and the weights of a role's network."""
        part, name = "global", self.context.federation.student
        if role == "server_student":
            part, name = "student", self.context.config.model.student
        try:
            result = self.run.result(self.stages[role].name)
            if part not in result.parts:
                raise NotAvailable(f"its stage kept no {part}; a plug-in or another version made it")
            with result.read_as(part):
                weights = result.load(part)
                check_entries(weights, self.context.federation.entries(name), finite=False)
        except NotAvailable:
            file = self.run.folder / "student.safetensors"
            if role != "final" or not file.is_file():
                raise
            weights = _arrays(file)
        return self._network(name), weights

    def client(self, number: int) -> tuple[dict[str, Any], Weights]:
        """Return the description and the weights of a client's own model after the warm-up."""
        config, federation, warmup = self.context.config, self.context.federation, self.warmup()
        name = federation.classifiers[number]
        if strategy_named(config.federation.strategy).personal_models:
            return self._network(name), warmup.personal(number)
        narrow = federation.widths[number] < 1
        with warmup.result.read_as(f"client {number}"):
            weights = warmup.client(number)
            check_entries(weights, federation.entries(name), finite=False, shapes=not narrow)
        return self._network(name) | {"narrow": narrow, "scale": self.context.scale(number)}, weights

    def _network(self, name: str) -> dict[str, Any]:
        return {"network": name, "width": self.context.config.model.width, "narrow": False, "scale": 1.0}

    def generator(self, number: int) -> Weights:
        """Return the weights of a client's generator."""
        found = self.run.generators[number]
        if "generator" not in found.parts:
            raise NotAvailable("its stage kept no generator; another version made it")
        return found.load("generator")

    def teacher(self) -> nn.Module:
        """Return the teacher as one network from normalised images to logits."""
        stage: Stage = self.stages["teacher"]
        result, context = self.run.result(stage.name), self.context
        if stage.compute == GATE.compute:
            return read_gate(context, result, uploaded_models(self.warmup()))
        if stage.compute != TEACHER.compute or self.run.label_counts is None:
            raise NotAvailable(f"no network can be built of what {visible(context.config.method, '')} stored of it")
        state = read_teacher(context, result, self.warmup().models, self.run.label_counts)
        return build_teacher(context.config, context.facts, state)


def build(config: Mapping[str, Any], arrays: Weights) -> ImageClassifier | ImageGenerator:
    """Build a module from its description and weights; ``ValueError`` where these contradict each other."""
    facts = DataFacts.from_json(config["data"])
    shape = facts.channels, facts.image_size
    if config["pipeline_tag"] == GENERATES:
        knobs = {f"generator.{name}": value for name, value in config["generator"].items()}
        section = override(ExperimentConfig(), knobs).generator
        made = load_weights(build_generator(section, *shape, facts.num_classes), arrays)
        return ImageGenerator(made, facts, config, section.gan_range)
    knobs = {"model.classifier": config["network"], "model.width": config["width"]}
    network = build_classifier(override(ExperimentConfig(), knobs).model, facts.num_classes, *shape)
    network = fit(network, arrays) if config["narrow"] else load_weights(network, arrays)
    return ImageClassifier(network, facts, config, float(config["scale"]))


def load_model(path: str | Path, own_code: bool = False) -> ImageClassifier | ImageGenerator:
    """Load a model that `mosaic export --to hub` or `--to pt` wrote: its folder, or its file.

    ``own_code``: import the function that the file names where its network is a user's own, and call it. Nothing
    else that is read can run code. ``RequestError`` where the files are no model.
    """
    place, shown = Path(path).expanduser(), visible(str(path), "")
    try:
        if place.is_dir():
            config, arrays = parse_json(read_regular(place / CONFIG)), _arrays(place / WEIGHTS)
        else:
            kept = torch.load(io.BytesIO(read_regular(place, MOST_BYTES)), weights_only=True)
            config, arrays = kept["config"], {n: value.numpy() for n, value in kept["state_dict"].items()}
        if ":" in str(config.get("network", "")) and not own_code:
            network = visible(str(config["network"]), "")
            raise RequestError(f"its network is {network}, code that would run here; own_code=True imports it")
        with seeded(0, "model"):
            return build(config, arrays)
    except RequestError as error:
        raise RequestError(f"{shown}: {error}") from None
    except OSError as error:
        raise RequestError(f"{shown}: {error.strerror or error}") from None
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
        raise RequestError(f"{shown}: no model that mosaic export wrote ({visible(what)})") from None


def _arrays(file: Path) -> Weights:
    """Return the arrays of a safetensors file; ``RequestError`` where it is none."""
    try:
        found: dict[str, np.ndarray] = safetensors.numpy.load(read_regular(file, MOST_BYTES))
    except (OSError, safetensors.SafetensorError) as error:
        raise RequestError(f"{visible(str(file), '')}: it cannot be read: {error}") from None
    return found
