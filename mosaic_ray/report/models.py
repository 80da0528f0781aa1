"""Models of a run as modules: samples as the data set has them in, logits out (``Run.model``).

Preprocessing is inside, so what a module answers is what the run measured. Samples are images, or have several
modalities by name.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
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
from ..data.modality_sources import VOCABULARY, tokens
from ..distillation.generator_training import draw, generator_for, pixels_of
from ..distillation.teacher import build_teacher
from ..federated.client import ClientContext
from ..methods.fens import GATE, read_gate
from ..methods.mosaic.graph import TEACHER
from ..methods.mosaic.server import read_teacher
from ..methods.server_side import uploaded_models
from ..models.classifiers import build_classifier
from ..models.generator import Generator
from ..models.multimodal import Encoded
from ..models.multimodal_generator import MultimodalGenerator
from ..models.state_dict import load_weights
from ..models.submodel import fit, scale_activations
from ..pipeline.graph import Graph, Stage
from ..pipeline.rounds import Warmup, load_models
from ..pipeline.stored import check_entries
from ..runs.plan import graph_of
from ..storage.hashing import plain
from .load import NotAvailable, RunReport, Standardisation, check_standardisation

#: The two tasks, in the words of the Hugging Face Hub.
CLASSIFIES, GENERATES = "image-classification", "unconditional-image-generation"

#: The task of models of several modalities, of which the hub has no name.
OTHER = "other"

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
            z, *drawn = draw(self.network, z, torch.default_generator, next(iter(self.state_dict().values())).device)
            labels = drawn[0] if drawn and labels is None else labels
        if (labels is not None) != bool(self.network.num_classes):
            raise ValueError(f"this generator takes {'z and labels' if labels is None else 'z alone'}")
        return pixels_of(self.network(z, labels).float(), self.gan_range, self.facts)


class SampleClassifier(nn.Module):
    """Maps samples of several modalities to logits float32 [N, classes].

    ``config`` describes the model, as that of an ``ImageClassifier``. Vectors are standardised here.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, facts: DataFacts, config: Mapping[str, Any], scale: float = 1.0) -> None:
        super().__init__()
        self.network, self.config, self.facts, self.scale = network, dict(config), facts, scale
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(facts, name))[:, None, None], persistent=False)
        self.vectors = Standards(check_standardisation(config.get("standardisation"), facts))
        for part in network.modules():
            if isinstance(part, Encoded):
                part.masked = True
        self.eval()

    def forward(self, samples: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Map samples to logits.

        Args:
            samples: by modality, images [N, C, H, W] as uint8 or floats in [0, 1], vectors [N, d] as the data set has
                them, texts as tokens int64 [N, L] (``tokens``). A modality that is not named is absent.
            present: bool [N, M], which modalities each sample has, in the order of the data set's; all that are
                named by default. Values of others are not read.
        """
        with scale_activations(self.network, self.scale, always=True):
            logits: Tensor = self.network(self.rows(samples, present))
        return logits.float()

    def rows(self, samples: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """Return samples as the network takes them, float32 [N, D + M]."""
        modalities = self.facts.modalities
        known = [modality.name for modality in modalities]
        if not samples or not set(samples) <= set(known):
            raise ValueError(f"samples: it takes one or more of {', '.join(known)} by name, not {[*samples]}")
        first = next(iter(samples.values()))
        if present is None:
            present = first.new_ones(len(first), len(known), dtype=torch.float32)
        there, parts, masks = present.float(), [], []
        for number, modality in enumerate(modalities):
            mask = there[:, number : number + 1]
            if modality.name not in samples:
                parts.append(there.new_zeros(len(first), modality.size))
                masks.append(torch.zeros_like(mask))
                continue
            values = samples[modality.name]
            if modality.kind == "image":
                values = (in_unit_range(values) - self.mean) / self.std
            elif modality.kind == "vector":
                values = self.vectors.standardised(modality.name, values)
            parts.append(torch.where(mask > 0, values.float().flatten(1), 0.0))
            masks.append(mask)
        return torch.cat([*parts, *masks], 1)

    def tokens(self, texts: Sequence[str], modality: str = "") -> Tensor:
        """Return texts as tokens int64 [N, L]: each byte of its UTF-8 plus 1, cut or filled with 0 at L.

        ``modality``: whose length it takes; the first text's by default.
        """
        found = [part for part in self.facts.modalities if part.kind == "text" and modality in ("", part.name)]
        if not found or found[0].vocabulary != VOCABULARY:
            raise ValueError(f"tokens: {modality or 'the data set'} has no text of bytes")
        return torch.tensor(np.stack([tokens(text, found[0].size) for text in texts]), dtype=torch.int64)


class SampleGenerator(nn.Module):
    """Maps latents z [N, latent_dim] and labels int64 [N] to the modalities that its client holds, by name.

    Images are uint8 [N, C, H, W], vectors float32 [N, d] as the data set has them, texts tokens int64 [N, L]. Without
    labels, and with a number in place of z, it draws as an ``ImageGenerator`` does.
    """

    def __init__(self, network: MultimodalGenerator, facts: DataFacts, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.network, self.config, self.facts = network, dict(config), facts
        self.vectors = Standards(check_standardisation(config.get("standardisation"), facts))
        held = network.held.tolist()
        self.held = tuple(m.name for m, there in zip(facts.modalities, held, strict=True) if there)
        self.eval()

    def forward(self, z: Tensor | int, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Map latents and labels to samples."""
        if isinstance(z, int):
            z, drawn = draw(self.network, z, torch.default_generator, next(self.parameters()).device)
            labels = drawn if labels is None else labels
        if labels is None:
            raise ValueError("this generator takes z and labels")
        parts, found = self.network.parts(z, labels), {}
        for modality in self.facts.modalities:
            if modality.name not in self.held:
                continue
            values = parts[modality.name].float()
            if modality.kind == "image":
                values = (((values + 1) / 2).clamp(0, 1) * 255).round().to(torch.uint8)
            elif modality.kind == "vector":
                values = self.vectors.restored(modality.name, values)
            else:
                values = values.argmax(1)
            found[modality.name] = values
        return found


class Standards(nn.Module):
    """The means and standard deviations of vectors, float64 [d] each, as buffers that no file of weights holds."""

    def __init__(self, given: Standardisation) -> None:
        super().__init__()
        self.places = {name: str(number) for number, name in enumerate(given)}
        for name, place in self.places.items():
            for kind in ("mean", "scale"):
                value = torch.tensor(given[name][kind], dtype=torch.float64)
                self.register_buffer(kind + place, value, persistent=False)

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Return mean and scale of a modality; scale 0 stands for a value that never varies."""
        return self.get_buffer("mean" + self.places[name]), self.get_buffer("scale" + self.places[name])

    def standardised(self, name: str, values: Tensor) -> Tensor:
        """Return vectors [N, d] with mean 0 and variance 1 (``data.records.standardise``)."""
        mean, scale = self.of(name)
        return ((values.double() - mean) / torch.where(scale > 0, scale, torch.inf)).float()

    def restored(self, name: str, values: Tensor) -> Tensor:
        """Return standardised vectors [N, d] in the data set's units."""
        mean, scale = self.of(name)
        return (values.double() * scale + mean).float()


#: What ``Run.model`` returns.
Module = ImageClassifier | ImageGenerator | SampleClassifier | SampleGenerator


def classifier_of(network: nn.Module, facts: DataFacts, config: Mapping[str, Any], scale: float = 1.0) -> Module:
    """Return a network with the preprocessing of its data set."""
    kind = SampleClassifier if facts.modalities else ImageClassifier
    return kind(network, facts, config, scale)


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
) -> Module:
    """Return a model of ``run``; ``RequestError`` names those that it has where it lacks this one."""
    kind, number = chosen(role, client, generator)
    named = f"{kind}:{number}" if number >= 0 else kind
    config = override(ExperimentConfig(), run.config)
    facts = run.facts or known_facts(config.data) or load_dataset(config.data).facts
    there = Roles(run, ClientContext(config, facts, torch.device("cpu")))
    if named not in there.names:
        raise RequestError(f"role {visible(named, '')}: this run has {there.listed() or 'no finished model'}")
    if any(part.kind == "vector" for part in facts.modalities) and not run.standardisation:
        raise RequestError(
            f"role {visible(named, '')}: this run is of an earlier version and kept no means of its vectors beside its "
            "store; the same command writes them"
        )
    about = there.about(named)
    try:
        with seeded(0, "model"):
            if kind == "generator":
                return build(about | {"generator": as_dict(config)["generator"]}, there.generator(number))
            if kind == "teacher":
                return classifier_of(there.teacher(), facts, about | {"network": None})
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
            "pipeline_tag": self._tag(role),
            "data": facts.to_json(), "class_names": list(run.class_names), "method": self.context.config.method,
            "seed": self.context.config.seed, "accuracy": run.summary.accuracy or {},
        }  # fmt: skip
        if facts.modalities:
            found["standardisation"] = run.standardisation
        return parse_json(json.dumps(found))

    def _tag(self, role: str) -> str:
        if self.context.facts.modalities:  # the hub has no name for them
            return OTHER
        return GENERATES if role.startswith("generator:") else CLASSIFIES

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
        model = self.context.config.model
        found = {"network": name, "width": model.width, "narrow": False, "scale": 1.0}
        return found | ({"fusion": model.fusion} if self.context.facts.modalities else {})

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


def build(config: Mapping[str, Any], arrays: Weights) -> Module:
    """Build a module from its description and weights; ``ValueError`` where these contradict each other."""
    facts = DataFacts.from_json(config["data"])
    shape = facts.channels, facts.image_size
    if config["pipeline_tag"] == GENERATES or (facts.modalities and "generator" in config):
        knobs = {f"generator.{name}": value for name, value in config["generator"].items()}
        section = override(ExperimentConfig(), knobs).generator
        made = load_weights(generator_for(section, facts), arrays)
        if facts.modalities:
            return SampleGenerator(made, facts, config)
        return ImageGenerator(made, facts, config, section.gan_range)
    knobs = {"model.classifier": config["network"], "model.width": config["width"]}
    knobs |= {"model.fusion": config["fusion"]} if facts.modalities else {}
    model = override(ExperimentConfig(), knobs).model
    network = build_classifier(model, facts.num_classes, *shape, modalities=facts.modalities)
    network = fit(network, arrays) if config["narrow"] else load_weights(network, arrays)
    return classifier_of(network, facts, config, float(config["scale"]))


def load_model(path: str | Path, own_code: bool = False) -> Module:
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
