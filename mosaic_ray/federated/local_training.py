"""Local training of one client in one round."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config.schema import ExperimentConfig
from ..core.seeding import derive, stream
from ..core.types import DataFacts, Weights
from ..data.transforms import augment, drop_modalities, to_input
from ..models.classifiers import Classifier
from ..models.optimizers import SGD
from ..models.state_dict import use_precision
from .recorded_steps import RecordedStep, Recorder, own_stream


def no_progress(done: int, total: int) -> None:
    """Ignore that ``done`` of ``total`` steps are done."""


@dataclass(frozen=True)
class Shard:
    """A client's data on its device: images uint8 [n, C, H, W], or records, and labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class LocalTrainingConfig:
    """Local SGD: ``steps`` mini-batches with a fresh optimiser (McMahan et al. 2017)."""

    steps: int
    batch_size: int
    lr: float
    weight_decay: float = 0.0
    momentum: float = 0.0
    shuffle: bool = True
    freeze_head: bool = False
    freeze_bn: bool = False
    loss: str = "ce"
    modality_dropout: float = 0.0


@dataclass(frozen=True)
class LocalStart:
    """The input of one client's local training in one round.

    ``model`` is the network as the client received it, on the client's device; ``labels`` int64 [n] its training
    labels. ``server`` and ``state`` are the strategy's arrays: the server's, and the client's own.
    """

    config: ExperimentConfig
    facts: DataFacts
    client_id: int
    round_num: int
    plan: LocalTrainingConfig
    model: Classifier
    labels: Tensor
    server: Weights
    state: Weights


@dataclass(frozen=True)
class Rehearsed:
    """Synthetic images beside a client's own: ``per_step`` of them a step, their mean loss counting ``weight``."""

    shard: Shard
    per_step: int
    weight: float


#: A change of the logits float32 [B, C] that a client's loss sees.
LogitAdjustment = Callable[[Tensor], Tensor]


class Objective:
    """The local objective of one client in one round: cross-entropy. Strategies override its methods."""

    def forward(self, model: Classifier, images: Tensor) -> Tensor:
        """Return the logits [B', C] of a mini-batch; override it to keep ``images`` or features for ``loss``.

        ``images`` [B', channels, H, W] are normalised, B' - B synthetic ones last (rehearsal).
        """
        logits: Tensor = model(images)
        return logits

    def loss(self, model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a mini-batch; ``logits`` [B, C] float32, ``labels`` int64 [B]."""
        return nn.functional.cross_entropy(logits, labels)

    def correct_gradients(self, model: nn.Module) -> None:
        """Change the gradients in place between the backward pass and the optimizer's step."""

    def after_step(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Do the strategy's own work after a step on ``images`` [B, channels, H, W], normalised, and ``labels`` [B]."""

    def finish(self, model: nn.Module, num_steps: int) -> tuple[Weights, Weights]:
        """Return (arrays that are sent to the server, the client's new state) after ``num_steps`` steps were taken."""
        return {}, {}


def log_shares(labels: Tensor, num_classes: int) -> Tensor:
    """Return log pi float32 [C] of the shares pi of each class in ``labels`` [n]; -inf for a class without labels."""
    counts = torch.bincount(labels, minlength=num_classes)
    return (counts.double() / len(labels)).log().float()


def batches(
    num_samples: int, batch_size: int, steps: int, *, offset: int = 0, generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """Yield ``steps`` index batches that cycle through the samples; a batch never straddles two passes.

    With ``generator`` every pass is a new permutation; without, the order is fixed and the first batch is number
    ``offset`` of the endless cycle (so a loader that lives across rounds is a function of the round alone).
    """
    batch_size = min(batch_size, num_samples)
    per_pass = -(-num_samples // batch_size)
    order = torch.arange(num_samples)
    for step in range(steps):
        place = (step if generator is not None else step + offset) % per_pass
        if place == 0 and generator is not None:
            order = torch.randperm(num_samples, generator=generator)
        yield order[place * batch_size : (place + 1) * batch_size]


@dataclass(frozen=True)
class RowsOfStep:
    """The rows of a mini-batch, int64 [B] of the client's own samples and [S] of synthetic ones (None: without)."""

    own: Tensor
    synthetic: Tensor | None

    @property
    def sizes(self) -> tuple[int, int]:
        """Return the numbers of own and of synthetic samples."""
        return len(self.own), 0 if self.synthetic is None else len(self.synthetic)


def rows_of_steps(
    num_samples: int, plan: LocalTrainingConfig, address: tuple[int, str, int, int], rehearsed: Rehearsed | None
) -> Iterator[RowsOfStep]:
    """Yield the rows of each mini-batch of a client's local training, on the CPU, from its own random streams.

    ``address`` is (seed, phase, round, client). A last mini-batch of one sample is skipped, since batch norm may see a
    single value per channel; this happens only if the number of samples leaves a remainder of one.
    """
    seed, phase, round_num, client_id = address
    order = stream(seed, phase, round_num, client_id) if plan.shuffle else None
    turns = None
    if rehearsed is not None:
        mixed = stream(seed, phase + "/rehearsal", round_num, client_id)
        turns = batches(len(rehearsed.shard), rehearsed.per_step, plan.steps, generator=mixed)
    for rows in batches(num_samples, plan.batch_size, plan.steps, offset=round_num * plan.steps, generator=order):
        if len(rows) > 1 or num_samples == 1:
            yield RowsOfStep(rows, None if turns is None else next(turns))


def prepare(model: Classifier, plan: LocalTrainingConfig) -> torch.optim.SGD:
    """Set what ``plan`` trains of ``model``, and its modes; return a fresh optimizer of these parameters."""
    model.train()
    if plan.freeze_bn:  # statistics stay as they came; the affine parameters still learn
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    model.requires_grad_(True)
    if plan.freeze_head:
        model.head.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return SGD(trained, lr=plan.lr, momentum=plan.momentum, weight_decay=plan.weight_decay)


def train_locally(
    model: Classifier,
    shard: Shard,
    plan: LocalTrainingConfig,
    facts: DataFacts,
    address: tuple[int, str, int, int],
    precision: str,
    *,
    masked: bool = False,
    objective: Objective | None = None,
    adjust: LogitAdjustment | None = None,
    rehearsed: Rehearsed | None = None,
    record: Recorder | None = None,
    progress: Callable[[int, int], None] = no_progress,
) -> dict[str, float]:
    """Train ``model`` in place on ``shard``; ``address`` is (seed, phase, round, client).

    Returns the mean loss and accuracy over the images seen, and the number of steps taken.

    ``rehearsed``: synthetic images, which share each forward pass with the real ones and count in no figure.

    ``adjust``: the strategy's change of the logits in the loss; those of synthetic images stay as they are.

    ``masked``: logits of classes that the shard lacks are zero in the loss (HeteroFL's masked cross-entropy).
    With ``plan.loss`` = adjusted the loss sees the logits plus the log of the class shares of the shard (Menon et al.
    2021): a class that it lacks is left out of the softmax, masked or not. Synthetic images' logits stay as they are.
    ``progress(done, total)`` is called after each step.

    ``record``: how steps are recorded and replayed (``RecordedStep``); for plain training of networks without dropout.

    A last mini-batch of one image is skipped (``rows_of_steps``).
    """
    seed, phase, round_num, client_id = address
    device = shard.images.device
    draws = stream(seed, phase + "/augment", round_num, client_id)
    optimiser = prepare(model, plan)
    objective = objective or Objective()
    missing = torch.bincount(shard.labels, minlength=facts.num_classes) == 0 if masked else None
    shift = log_shares(shard.labels, facts.num_classes) if plan.loss == "adjusted" else None
    # dropout, where a network has it, draws from the global stream
    devices = [device] if device.type == "cuda" else []
    total_loss, total_right, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    steps = 0
    drops = bool(facts.modalities) and plan.modality_dropout > 0
    dropped = stream(seed, phase + "/modalities", round_num, client_id) if drops else None

    def seen_as(stored: Tensor) -> Tensor:
        """Return the network's input of stored samples: augmented, and without the modalities that are left out."""
        changed = augment(stored, facts.augmentations, draws)
        if dropped is not None:
            changed = drop_modalities(changed, len(facts.modalities), plan.modality_dropout, dropped)
        return to_input(changed, facts)

    def step(images: Tensor, labels: Tensor, *others: Tensor) -> None:
        """Take a step on normalised images, synthetic ones last; ``others`` are those ones' labels."""
        with use_precision(precision, device):
            outputs = objective.forward(model, images)
        logits = outputs[: len(labels)]
        if missing is not None:
            logits = logits.masked_fill(missing, 0.0)
        adjusted = logits.float() if adjust is None else adjust(logits.float())
        adjusted = adjusted if shift is None else adjusted + shift
        loss = objective.loss(model, adjusted, labels)
        if rehearsed is not None:
            extra = nn.functional.cross_entropy(outputs[len(labels) :].float(), others[0])
            loss = loss + rehearsed.weight * extra
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        objective.correct_gradients(model)
        optimiser.step()
        total_loss.add_(loss.detach() * len(labels))
        total_right.add_((logits.detach().argmax(1) == labels).sum())

    take_step = step if record is None else RecordedStep(step, record)
    with contextlib.ExitStack() as block:
        block.enter_context(torch.random.fork_rng(devices=devices))
        torch.manual_seed(derive(seed, phase + "/dropout", round_num, client_id))
        if record is not None and device.type == "cuda":
            block.enter_context(own_stream(device))
        for drawn in rows_of_steps(len(shard), plan, address, rehearsed):
            rows, others = drawn.own.to(device), []
            labels = shard.labels[rows]
            images = seen_as(shard.images[rows])
            if rehearsed is not None and drawn.synthetic is not None:
                synthetic = drawn.synthetic.to(device)
                images = torch.cat([images, seen_as(rehearsed.shard.images[synthetic])])
                others = [rehearsed.shard.labels[synthetic]]
            take_step(images, labels, *others)
            objective.after_step(model, images[: len(rows)], labels)
            seen += len(rows)
            steps += 1
            progress(steps, plan.steps)
    model.eval()
    return {"loss": float(total_loss) / max(seen, 1), "accuracy": float(total_right) / max(seen, 1), "steps": steps}
