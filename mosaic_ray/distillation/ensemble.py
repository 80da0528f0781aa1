"""The server's work of methods that teach a student by the clients' models: their ensemble, and generators beside it.

``teach_from_pool`` (DENSE, Co-Boosting) makes a batch of images an epoch and keeps them all; ``take_turns`` (FedFTG,
DFRD) goes on training one generator with labels over all rounds. The losses stand in the files of the methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import RunError
from ..core.seeding import Address, numpy_stream, seeded, stream
from ..core.types import DataFacts, Weights
from ..data.transforms import augment, pm1_to_normalised, to_input, to_pm1
from ..federated.client import ClientContext, Task, initial_weights
from ..federated.local_training import Shard, batches
from ..models.classifiers import Classifier
from ..models.generator import STAGES, Generator, check_image_size
from ..models.optimizers import SGD, Adam
from ..models.state_dict import bn_statistics, freeze, load_weights, to_weights, use_precision
from .generator_training import to_pixels
from .losses import inversion_probe, kl

#: What the server's work carries from one part of a stage to the next: named groups of arrays.
State = dict[str, Weights]
Report = Callable[[int, Mapping[str, float]], None]


class Ensemble(nn.Module):
    """The frozen models of ``clients`` (client -> weights): images [B, channels, H, W] to their logits [K, B, C].

    Networks and widths may differ. A narrow client's activations are divided by its width, as when it trained.
    """

    def __init__(self, context: ClientContext, clients: Mapping[int, Weights]) -> None:
        super().__init__()
        self.precision = context.config.runtime.precision
        self.models = nn.ModuleList()
        for client_id, weights in clients.items():
            model = freeze(context.client_classifier(client_id, weights))
            width = context.scale(client_id)
            for layer in (part for part in model.modules() if isinstance(part, nn.Conv2d) and width != 1):
                layer.register_forward_hook(partial(_divide, width))
            self.models.append(model)

    def of(self, place: int, images: Tensor) -> Tensor:
        """Return the logits float32 [B, C] of the model at ``place``."""
        with use_precision(self.precision, images.device):
            logits: Tensor = self.models[place](images)
        return logits.float()

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([self.of(place, images) for place in range(len(self.models))])

    def probed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, and the inversion loss averaged over the models that have batch norm."""
        with ExitStack() as block:
            found = [block.enter_context(inversion_probe(model)) for model in self.models if bn_statistics(model)]
            logits = self(images)
            return logits, torch.stack([loss() for loss in found]).mean() if found else logits.new_zeros(())


def _divide(width: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output / width


def mixed(logits: Tensor, weights: Tensor) -> Tensor:
    """Return sum_k w_k logits_k [B, C] of logits [K, B, C] and weights [K], or [K, B] with one column a sample."""
    return (logits * weights.reshape(len(weights), -1, 1)).sum(0)


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Return w_ky = n_ky / sum_k n_ky, float32 [K, C]: columns of sum 1, or of zeros where no client has the class."""
    totals = counts.sum(0)
    return np.asarray(counts / np.maximum(totals, 1), np.float32)


def spread_loss(latents: Tensor, images: Tensor, absolute: bool = False) -> Tensor:
    """Return exp(-mean_ij dist(h_i, h_j) dist(x_i, x_j)), in (0, 1]: small where different latents give other images.

    ``latents`` [B, d], ``images`` [B, ...]. Distances are mean squares over the entries; with ``absolute`` those of
    images are mean absolute values.
    """
    x = images.flatten(1)
    apart = torch.cdist(x, x, p=1) / x.shape[1] if absolute else _squares(x)
    return torch.exp(-(_squares(latents) * apart).mean())


def _squares(x: Tensor) -> Tensor:
    return (x[:, None] - x[None]).square().mean(2)


def as_inputs(images: Tensor, facts: DataFacts) -> Tensor:
    """Convert images in [-1, 1] to classifier inputs."""
    return pm1_to_normalised(images, facts.mean, facts.std)


def make_generator(context: ClientContext, latent_dim: int, channels: int) -> Generator:
    """Build a generator for the data's images on this device; call it inside ``seeded``."""
    facts = context.facts
    check_image_size(facts.image_size)
    return Generator(latent_dim, channels, facts.channels, STAGES[facts.image_size]).to(context.device)


class LabelledGenerator(nn.Module):
    """Maps latents z [B, d] and labels y [B] to images in [-1, 1] and to h [B, d], what the network is given.

    ``product``: h = z * e_y (DFRD), else z + e_y; e are embeddings that begin as N(0, 1).
    """

    def __init__(self, network: Generator, num_classes: int, product: bool) -> None:
        super().__init__()
        self.network, self.product = network, product
        self.embedding = nn.Embedding(num_classes, network.latent_dim)

    def forward(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        e = self.embedding(labels)
        h = z * e if self.product else z + e
        return self.network(h).float(), h


def open_student(context: ClientContext, weights: Weights, bn: str, network: str = "") -> Classifier:
    """Build the student in the mode for training; ``bn`` = frozen keeps its batch-norm statistics.

    ``network``: its architecture, where that is not ``model.classifier``.
    """
    student = context.classifier(weights, network or context.config.model.classifier)
    return student.train(bn == "running").requires_grad_(True)


def first_student(context: ClientContext, weights: Weights, start: str) -> Weights:
    """Return the student's first weights: ``weights``, or with ``start`` = random the network as it was drawn."""
    return weights if start == "global" else initial_weights(context)


def slots(optimizer: torch.optim.Optimizer, model: nn.Module) -> Weights:
    """Return the optimizer's arrays (momentum, moments) as ``slot:parameter``."""
    return {
        f"{slot}:{name}": value.detach().cpu().numpy().copy()
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_slots(optimizer: torch.optim.Optimizer, model: nn.Module, arrays: Weights) -> None:
    """Put the arrays of ``slots`` back."""
    parameters = dict(model.named_parameters())
    for key, value in arrays.items():
        slot, _, name = key.partition(":")
        place = "cpu" if slot == "step" else parameters[name].device
        optimizer.state[parameters[name]][slot] = torch.tensor(value, device=place)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, clip: float = 0.0) -> float:
    """Take one step on ``loss``, with gradients of a norm of at most ``clip`` if that is not 0; returns its value."""
    value = float(loss.detach())
    if not np.isfinite(value):
        raise RunError(f"training on the server diverged (a loss of {value})")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    return value


# --- a pool of images ------------------------------------------------------------------------------------------------

#: (student's logits, ensemble's logits, labels) -> the loss of a batch of images.
ImageLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class PoolRule:
    """How ``teach_from_pool`` works; ``knobs`` are the method's own (``methods.server_side.PoolKnobs``).

    ``perturb(mixture, images, draws)`` changes the images of a student's step, and ``reweigh(logits, labels, weights,
    epoch)`` the ensemble's weights [K] >= 0 on a batch of the pool; logits are mixed with weights / their sum.
    ``clip``: largest norm of gradients. ``cosine``: the student's learning rate falls to zero over the epochs.
    """

    name: str
    knobs: Any
    image_loss: ImageLoss
    perturb: Callable[[Callable[[Tensor], Tensor], Tensor, torch.Generator], Tensor] | None = None
    reweigh: Callable[[Tensor, Tensor, Tensor, int], Tensor] | None = None
    clip: float = 0.0
    cosine: bool = False


def teach_from_pool(
    context: ClientContext, state: State, begin: int, end: int, clients: Mapping[int, Weights], rule: PoolRule,
    network: str = "", *, report: Report,
) -> State:  # fmt: skip
    """Do the epochs ``begin`` to ``end``: each makes a batch of images, and the student learns from all so far.

    ``state``: ``global`` (the student), ``optimizer``, ``ensemble`` (weights [K], equal at first), ``pool`` (uint8
    images and labels). ``network``: the student's architecture, as in ``open_student``.
    """
    own, facts, seed = rule.knobs, context.facts, context.config.seed
    ensemble, student = Ensemble(context, clients), open_student(context, state["global"], own.bn, network)
    optimizer = SGD(student.parameters(), lr=own.lr, momentum=own.momentum, weight_decay=own.weight_decay)
    load_slots(optimizer, student, state.get("optimizer", {}))
    count = len(ensemble.models)
    weights = torch.full((count,), 1 / count, device=context.device)
    if "ensemble" in state:
        weights = torch.tensor(state["ensemble"]["weights"], device=context.device)
    stored = state.get("pool", {})
    pool = [torch.tensor(stored["images"])] if stored else []
    named = [torch.tensor(stored["labels"])] if stored else []

    def answers(images: Tensor) -> Tensor:
        return mixed(ensemble(images), weights / weights.sum())

    def batches_of(count: int, what: str, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        images, labels = torch.cat(pool), torch.cat(named)
        draws = stream(seed, rule.name, what, epoch)
        for rows in batches(len(images), own.batch_size, count, generator=draws):
            drawn = augment(images[rows], facts.augmentations, draws)
            yield to_pm1(drawn.to(context.device)), labels[rows].to(context.device)

    for epoch in range(begin, end):
        if rule.cosine:
            optimizer.param_groups[0]["lr"] = own.lr * (1 + np.cos(np.pi * epoch / own.epochs)) / 2
        student.eval().requires_grad_(False)
        images, labels, image_loss = _invert(context, rule, ensemble, student, weights, epoch)
        if rule.reweigh and epoch:
            passes = -(-sum(map(len, named)) // own.batch_size)
            for shown, asked in batches_of(min(passes, own.student_steps), "reweigh", epoch):
                with torch.no_grad():
                    logits = ensemble(as_inputs(shown, facts))
                weights = rule.reweigh(logits, asked, weights, epoch)
        pool.append(images)
        named.append(labels)
        student.train(own.bn == "running").requires_grad_(True)
        draws, losses, agreed = stream(seed, rule.name, "perturb", epoch), [], []
        for shown, _ in batches_of(own.student_steps, "student", epoch):
            if rule.perturb:
                shown = rule.perturb(lambda x: answers(as_inputs(x, facts)), shown, draws)
            inputs = as_inputs(shown, facts)
            with torch.no_grad():
                target = answers(inputs)
            with use_precision(context.config.runtime.precision, context.device):
                logits = student(inputs).float()
            losses.append(descend(optimizer, kl(target, logits, own.temperature).mean(), rule.clip))
            agreed.append(float((logits.argmax(1) == target.argmax(1)).float().mean()))
            context.progress(len(losses), own.student_steps)
        report(epoch + 1, {
            "image_loss": image_loss, "loss": float(np.mean(losses or [0])), "agreement": float(np.mean(agreed or [0])),
        })  # fmt: skip
    return {
        "global": to_weights(student), "optimizer": slots(optimizer, student),
        "ensemble": {"weights": weights.cpu().numpy()},
        "pool": {"images": torch.cat(pool).numpy(), "labels": torch.cat(named).numpy()},
    }  # fmt: skip


def _invert(
    context: ClientContext, rule: PoolRule, ensemble: Ensemble, student: Classifier, weights: Tensor, epoch: int
) -> tuple[Tensor, Tensor, float]:
    """Train a new generator and its latents on one batch; return the images of the lowest loss (uint8), their labels.

    The loss is the rule's, plus the inversion loss of the clients' batch norms times ``bn_weight``.
    """
    own, facts, seed = rule.knobs, context.facts, context.config.seed
    address: tuple[Address, ...] = (rule.name, "generator", epoch)
    with seeded(seed, *address):
        generator = make_generator(context, own.latent_dim, own.channels)
    draws = stream(seed, rule.name, "z", epoch)
    z = torch.randn(own.batch_size, own.latent_dim, generator=draws).to(context.device).requires_grad_()
    labels = torch.randint(facts.num_classes, (own.batch_size,), generator=draws)
    asked = labels.to(context.device)
    groups: list[dict[str, Any]] = [{"params": list(generator.parameters())}, {"params": [z]}]
    adam = Adam(groups, lr=own.generator_lr, betas=(0.5, 0.999))
    best, kept = np.inf, None
    for step in range(own.generator_steps):
        with use_precision(context.config.runtime.precision, context.device):
            fake = generator(z)
        inputs = as_inputs(fake, facts)
        logits, inversion = ensemble.probed(inputs) if own.bn_weight else (ensemble(inputs), None)
        with use_precision(context.config.runtime.precision, context.device):
            answer = student(inputs).float()
        loss = rule.image_loss(answer, mixed(logits, weights / weights.sum()), asked)
        loss = loss if inversion is None else loss + own.bn_weight * inversion
        found = descend(adam, loss, rule.clip)
        if kept is None or found < best:
            best, kept = found, fake.detach().float()
        context.progress(step + 1, own.generator_steps)
    if kept is None:
        kept = generator(z).detach().float()
    return torch.from_numpy(to_pixels(kept, "pm1_then_renorm", facts)), labels, float(best)


# --- a generator that goes on over rounds ----------------------------------------------------------------------------


class Game(Protocol):
    """The two players of ``take_turns``; ``knobs`` are the method's own (``methods.server_side.RoundKnobs``)."""

    name: str
    product: bool  # of the labelled generator
    fresh: bool  # new optimizers in every turn, else in every round

    @property
    def ema(self) -> float:
        """Decay of the generator's average over rounds; 0: none."""

    def generator_steps(self, knobs: Any, clients: int) -> int: ...
    def optimizer(self, knobs: Any, parameters: Any, round_num: int) -> torch.optim.Optimizer: ...
    def adam(self, knobs: Any, parameters: Any, round_num: int) -> torch.optim.Optimizer: ...
    def generator_loss(self, knobs: Any, step: int, batch: Batch) -> Tensor: ...
    def student_loss(self, knobs: Any, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Batch:
    """Synthetic images of one step: in [-1, 1], as classifier inputs, what the generator's network was given.

    ``weights`` [K, B]: w_ky of each sample's asked label. ``ensemble`` and ``student`` map inputs to logits.
    """

    images: Tensor
    inputs: Tensor
    latents: Tensor
    labels: Tensor
    weights: Tensor
    ensemble: Ensemble
    student: Callable[[Tensor], Tensor]

    @cached_property
    def logits(self) -> Tensor:
        """The ensemble's logits [K, B, C], without gradients."""
        with torch.no_grad():
            found: Tensor = self.ensemble(self.inputs)
        return found


def take_turns(
    context: ClientContext, game: Game, knobs: Any, student_weights: Weights, state: Weights,
    clients: Mapping[int, Weights], counts: np.ndarray, round_num: int,
) -> tuple[Weights, Weights, dict[str, float]]:  # fmt: skip
    """Fine-tune the global model after a round; return it, the generator's arrays, and mean losses.

    ``counts`` int64 [K, C]: label counts of ``clients``, those of the round. Labels are asked with shares sum_k n_ky.
    z and y stay the same within a turn.
    """
    facts, seed, device = context.facts, context.config.seed, context.device
    with seeded(seed, game.name, "generator"):
        made = [LabelledGenerator(make_generator(context, knobs.latent_dim, knobs.channels), facts.num_classes,
                                  game.product).to(device) for _ in range(2)]  # fmt: skip
    generator, average = made
    parts = [{n.partition("/")[2]: v for n, v in state.items() if n.startswith(p)} for p in ("now/", "average/")]
    for network, arrays in zip(made, parts, strict=True):
        if arrays:
            load_weights(network, arrays)
    freeze(average)
    ensemble, student = Ensemble(context, clients), open_student(context, student_weights, knobs.bn)
    of_label = torch.tensor(class_weights(counts), device=device)
    shares = counts.sum(0) / counts.sum()
    noise, draws = stream(seed, game.name, "z", round_num), numpy_stream(seed, game.name, "labels", round_num)

    def answer(inputs: Tensor) -> Tensor:
        with use_precision(context.config.runtime.precision, device):
            logits: Tensor = student(inputs)
        return logits.float()

    def batch(source: LabelledGenerator, z: Tensor, labels: Tensor) -> Batch:
        with use_precision(context.config.runtime.precision, device):
            images, h = source(z, labels)
        return Batch(images, as_inputs(images, facts), h, labels, of_label[:, labels], ensemble, answer)

    losses: dict[str, list[float]] = {"generator": [], "student": []}
    adam, optimizer = None, None
    for turn in range(knobs.turns):
        z = torch.randn(knobs.batch_size, knobs.latent_dim, generator=noise).to(device)
        labels = torch.as_tensor(draws.choice(facts.num_classes, knobs.batch_size, p=shares), device=device)
        if adam is None or optimizer is None or game.fresh:
            adam = game.adam(knobs, generator.parameters(), round_num)
            optimizer = game.optimizer(knobs, student.parameters(), round_num)
        generator.train()
        student.eval().requires_grad_(False)
        for step in range(game.generator_steps(knobs, len(ensemble.models))):
            loss = game.generator_loss(knobs, step, batch(generator, z, labels))
            losses["generator"].append(descend(adam, loss))
        generator.eval()
        student.train(knobs.bn == "running").requires_grad_(True)
        with torch.no_grad():
            sources = [generator, average] if game.ema and parts[1] else [generator]
            shown = [batch(source, z, labels) for source in sources]
        for _ in range(knobs.student_steps):
            terms = [game.student_loss(knobs, one) for one in shown]
            loss = terms[0] + sum(knobs.average_weight * term for term in terms[1:])
            losses["student"].append(descend(optimizer, loss))
        context.progress(turn + 1, knobs.turns)
    now = to_weights(generator)
    found = {f"now/{name}": value for name, value in now.items()}
    if game.ema:
        before = parts[1] or now
        found |= {
            f"average/{name}": np.asarray(game.ema * before[name] + (1 - game.ema) * value, value.dtype)
            for name, value in now.items()
        }
    return to_weights(student.eval()), found, {name: float(np.mean(found or [0])) for name, found in losses.items()}


# --- labelled images -------------------------------------------------------------------------------------------------


def learn_labels(
    context: ClientContext, state: State, begin: int, end: int, knobs: Any, name: str, report: Report
) -> State:
    """Do the passes ``begin`` to ``end`` of Adam on cross-entropy over the state's ``images`` (uint8, and labels)."""
    facts, seed = context.facts, context.config.seed
    student = open_student(context, state["global"], knobs.bn)
    optimizer = Adam(student.parameters(), lr=knobs.lr)
    load_slots(optimizer, student, state.get("optimizer", {}))
    shard = context.shard(**state["images"])
    steps = -(-len(shard) // knobs.batch_size)
    for number in range(begin, end):
        draws, losses = stream(seed, name, "batches", number), []
        for rows in batches(len(shard), knobs.batch_size, steps, generator=draws):
            if len(rows) == 1 and knobs.bn == "running":  # batch norm needs two images
                continue
            drawn = augment(shard.images[rows], facts.augmentations, draws)
            with use_precision(context.config.runtime.precision, context.device):
                logits = student(to_input(drawn, facts)).float()
            loss = F.cross_entropy(logits, shard.labels[rows.to(context.device)])
            losses.append(descend(optimizer, loss))
            context.progress(len(losses), steps)
        report(number + 1, {"loss": float(np.mean(losses or [0]))})
    return {
        "global": to_weights(student.eval()), "optimizer": slots(optimizer, student), "images": state["images"],
    }  # fmt: skip


# --- a gate trained by the clients -----------------------------------------------------------------------------------


def gate_network(experts: int, num_classes: int, hidden: int) -> nn.Sequential:
    """Build FENS's aggregator: all experts' logits [B, K C] to logits [B, C]; call it inside ``seeded``."""
    width = experts * hidden
    return nn.Sequential(nn.Linear(experts * num_classes, width), nn.ReLU(), nn.Linear(width, num_classes))


class GatedEnsemble(nn.Module):
    """Experts and the gate above them, as one network from images to logits [B, C]."""

    def __init__(self, ensemble: Ensemble, gate: nn.Module) -> None:
        super().__init__()
        self.ensemble, self.gate = ensemble, gate

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.gate(self.ensemble(images).transpose(0, 1).flatten(1))
        return logits


@dataclass(frozen=True)
class ExpertLogitsTask(Task[Mapping[int, Weights], None, Weights]):
    """Compute all experts' logits [n, K C] on up to ``images`` (0: all) of the client's own images; with the labels."""

    images: int
    unit: ClassVar[str] = "batch"

    @torch.no_grad()
    def run(
        self, context: ClientContext, shard: Shard, client_id: int, broadcast: Mapping[int, Weights], own: None
    ) -> Weights:
        ensemble, facts = Ensemble(context, broadcast), context.facts
        rows = numpy_stream(context.config.seed, "fens", "images", client_id).permutation(len(shard))
        parts = torch.from_numpy(np.sort(rows[: self.images or None])).split(256)
        found = []
        for number, part in enumerate(parts, 1):
            images = to_input(shard.images[part.to(context.device)], facts)
            found.append(ensemble(images).transpose(0, 1).flatten(1).cpu().numpy())
            context.progress(number, len(parts))
        return {"logits": np.concatenate(found), "labels": shard.labels.cpu().numpy()[torch.cat(parts).numpy()]}


@dataclass(frozen=True)
class GateTask(Task[Weights, Weights, tuple[Weights, float]]):
    """Train the gate by local SGD on the logits that the client keeps (``own``); return the change and the loss."""

    round_num: int
    knobs: Any
    experts: int
    unit: ClassVar[str] = "step"

    def run(
        self, context: ClientContext, shard: Shard, client_id: int, broadcast: Weights, own: Weights
    ) -> tuple[Weights, float]:
        knobs, classes = self.knobs, context.facts.num_classes
        with seeded(0, "fens"):  # the weights are replaced, and the global stream stays as it was
            gate = load_weights(gate_network(self.experts, classes, knobs.hidden), broadcast).to(context.device)
        optimizer = SGD(gate.parameters(), lr=knobs.local_lr)
        inputs = torch.tensor(own["logits"], device=context.device)
        labels = torch.tensor(own["labels"], device=context.device)
        draws, losses = stream(context.config.seed, "fens", "batches", self.round_num, client_id), []
        for rows in batches(len(labels), knobs.batch_size, knobs.local_steps, generator=draws):
            rows = rows.to(context.device)
            losses.append(descend(optimizer, F.cross_entropy(gate(inputs[rows]), labels[rows])))
            context.progress(len(losses), knobs.local_steps)
        return {name: value - broadcast[name] for name, value in to_weights(gate).items()}, float(np.mean(losses))


def adam_on_server(
    gate: Weights, first: Weights, second: Weights, changes: Sequence[tuple[Weights, int]], lr: float
) -> tuple[Weights, Weights, Weights]:
    """Return weights and both moments after a round of FedAdam (Reddi et al., "Adaptive Federated Optimization", 2021).

    ``changes``: (change, number of samples) of each client. Betas 0.9 and 0.99, tau 1e-3, no bias correction.
    """
    total = sum(count for _, count in changes)
    delta = {name: sum(count / total * change[name] for change, count in changes) for name in gate}
    first = {name: np.float32(0.9) * first[name] + np.float32(0.1) * delta[name] for name in gate}
    second = {name: np.float32(0.99) * second[name] + np.float32(0.01) * delta[name] ** 2 for name in gate}
    moved = {name: gate[name] + lr * first[name] / (np.sqrt(second[name]) + 1e-3) for name in gate}
    return tuple({n: np.asarray(v, np.float32) for n, v in part.items()} for part in (moved, first, second))  # type: ignore[return-value]
