"""Local training of several clients' networks at once: their weights stacked, one forward and backward pass for all.

A small network leaves most of a GPU idle, since each of its layers is less work than starting it. ``torch.vmap`` over
the stacked weights makes one larger layer of several clients' layers. Each client's numbers are those of
``train_locally`` up to rounding: sums have another order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ..core.seeding import stream
from ..core.types import DataFacts
from ..data.transforms import augment, to_input
from ..models.classifiers import Classifier
from ..models.state_dict import use_precision
from .local_training import (
    LocalTrainingConfig,
    Rehearsed,
    RowsOfStep,
    Shard,
    log_shares,
    no_progress,
    prepare,
    rows_of_steps,
)

#: Drawn for a step of one client: the client's place among all, its rows and those of synthetic images.
_Drawn = tuple[int, RowsOfStep]


def train_together(
    models: Sequence[Classifier],
    shards: Sequence[Shard],
    plan: LocalTrainingConfig,
    facts: DataFacts,
    addresses: Sequence[tuple[int, str, int, int]],
    precision: str,
    *,
    masked: bool = False,
    rehearsed: Sequence[Rehearsed | None] = (),
    progress: Callable[[int, int], None] = no_progress,
) -> list[dict[str, float]]:
    """Train ``models`` of one architecture in place, each on its own shard; returns what ``train_locally`` does.

    In each step the clients whose mini-batches are equally large are computed together, so that batch norm sees what
    it sees one by one: nothing is padded.

    Args:
        models: K networks with equally large weights, without dropout; a user's network may not be what ``vmap`` takes.
        shards: images of one modality.
        addresses: (seed, phase, round, client) of each client.
        plan: the same for all clients, as ``facts``, ``precision`` and ``masked``; see ``train_locally``.
        rehearsed: synthetic images of each client, or None; empty: none.
    """
    together = _Together(models, shards, plan, facts, addresses, precision, masked, rehearsed or [None] * len(models))
    for step, drawn in enumerate(zip_longest(*together.rows), 1):
        alike: dict[tuple[int, int], list[_Drawn]] = defaultdict(list)
        for place, rows in enumerate(drawn):
            if rows is not None:  # else it has taken all of its steps
                alike[rows.sizes].append((place, rows))
        for clients in alike.values():
            together.step(clients)
        progress(step, plan.steps)
    return together.finish()


class _Together:
    """The stacked networks of one call of ``train_together``, and their optimizer: SGD with momentum."""

    def __init__(
        self,
        models: Sequence[Classifier],
        shards: Sequence[Shard],
        plan: LocalTrainingConfig,
        facts: DataFacts,
        addresses: Sequence[tuple[int, str, int, int]],
        precision: str,
        masked: bool,
        rehearsed: Sequence[Rehearsed | None],
    ) -> None:
        self._models, self._plan, self._facts, self._precision = models, plan, facts, precision
        self._network = models[0]
        prepare(self._network, plan)
        trained = [name for name, value in self._network.named_parameters() if value.requires_grad]
        states = [model.state_dict() for model in models]
        self._state = {name: torch.stack([state[name].contiguous() for state in states]) for name in states[0]}
        self._momentum = {name: torch.zeros_like(self._state[name]) for name in trained}
        self._own = _Pool(shards)
        self._synthetic = _Pool([other.shard if other else _nothing(shards[0]) for other in rehearsed])
        self._weights = [other.weight if other else 0.0 for other in rehearsed]
        classes, labels = facts.num_classes, [shard.labels for shard in shards]
        self._missing = torch.stack([torch.bincount(own, minlength=classes) == 0 for own in labels]) if masked else None
        adjusted = plan.loss == "adjusted"
        self._shift = torch.stack([log_shares(own, classes) for own in labels]) if adjusted else None
        self._draws = [stream(seed, phase + "/augment", number, client) for seed, phase, number, client in addresses]
        #: For each client the rows of its mini-batches.
        self.rows = [
            rows_of_steps(len(shard), plan, address, other)
            for shard, address, other in zip(shards, addresses, rehearsed, strict=True)
        ]
        self._loss, self._right = (torch.zeros(len(models), device=shards[0].images.device) for _ in range(2))
        self._seen, self._steps = [0] * len(models), [0] * len(models)

    def step(self, clients: Sequence[_Drawn]) -> None:
        """Take one step of each of ``clients``, whose mini-batches are equally large."""
        places, rows = [place for place, _ in clients], [drawn for _, drawn in clients]
        (size, others), device, everyone = rows[0].sizes, self._loss.device, len(places) == len(self._models)
        which = torch.tensor(places, device=device)
        state = self._state if everyone else {name: value[which] for name, value in self._state.items()}
        labels = self._own.labels(places, [drawn.own for drawn in rows])
        images = self._images(self._own, places, [drawn.own for drawn in rows])
        if others:
            synthetic = [drawn.synthetic for drawn in rows if drawn.synthetic is not None]
            drawn_labels = self._synthetic.labels(places, synthetic)
            images = torch.cat([images, self._images(self._synthetic, places, synthetic)], 1)
        trained = [state[name].requires_grad_() for name in self._momentum]
        with use_precision(self._precision, device):
            outputs = torch.vmap(self._logits)(state, images)
        logits = outputs[:, :size]
        if self._missing is not None:
            logits = logits.masked_fill(self._missing[which, None], 0.0)
        adjusted = logits.float() if self._shift is None else logits.float() + self._shift[which, None]
        loss = _mean_cross_entropy(adjusted, labels)
        if others:
            weights = torch.tensor([self._weights[place] for place in places], device=device)
            loss = loss + weights * _mean_cross_entropy(outputs[:, size:].float(), drawn_labels)
        gradients = torch.autograd.grad(loss.sum(), trained)
        with torch.no_grad():
            for name, gradient in zip(self._momentum, gradients, strict=True):
                self._descend(name, state[name].detach_(), gradient, None if everyone else which)
            if not everyone:
                for name, value in self._state.items():
                    value[which] = state[name]
            self._loss[which] += loss.detach() * size
            self._right[which] += (logits.argmax(2) == labels).sum(1)
        for place in places:
            self._seen[place] += size
            self._steps[place] += 1

    def finish(self) -> list[dict[str, float]]:
        """Copy the weights back to the models, in eval mode; return each client's loss, accuracy and steps."""
        for number, model in enumerate(self._models):
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    value.copy_(self._state[name][number])
            model.eval()
        found = zip(self._loss.tolist(), self._right.tolist(), self._seen, self._steps, strict=True)
        return [
            {"loss": loss / max(seen, 1), "accuracy": right / max(seen, 1), "steps": steps}
            for loss, right, seen, steps in found
        ]

    def _logits(self, state: dict[str, Tensor], images: Tensor) -> Tensor:
        """Return the logits [B, C] of one client; ``vmap`` makes them those of all."""
        logits: Tensor = functional_call(self._network, state, (images,))
        return logits

    def _images(self, pool: _Pool, places: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        """Return the input [clients, B, channels, H, W] of ``rows`` of each of ``places``, augmented."""
        draws = [(self._draws[place], len(own)) for place, own in zip(places, rows, strict=True)]
        changed = augment(pool.images(places, rows), self._facts.augmentations, draws)
        images: Tensor = to_input(changed, self._facts).unflatten(0, (len(places), -1))
        return images

    def _descend(self, name: str, value: Tensor, gradient: Tensor, which: Tensor | None) -> None:
        """Do what ``torch.optim.SGD`` does with the parameters ``value`` of the clients ``which`` (None: all)."""
        plan = self._plan
        if plan.weight_decay:
            gradient = gradient.add(value, alpha=plan.weight_decay)
        if plan.momentum:
            kept = self._momentum[name] if which is None else self._momentum[name][which]
            gradient = kept.mul_(plan.momentum).add_(gradient)
            if which is not None:
                self._momentum[name][which] = kept
        value.add_(gradient, alpha=-plan.lr)


class _Pool:
    """The samples of several shards side by side, so that one read takes rows of all."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._images, self._labels = (
            torch.cat([getattr(shard, name) for shard in shards]) for name in ("images", "labels")
        )
        self._first = [0]
        for shard in shards:
            self._first.append(self._first[-1] + len(shard))

    def images(self, places: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        """Return the images uint8 [clients * B, C, H, W] of equally many rows of each of the shards ``places``."""
        return self._images[self._at(places, rows).flatten()]

    def labels(self, places: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        """Return their labels int64 [clients, B]."""
        return self._labels[self._at(places, rows)]

    def _at(self, places: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        shifted = [own + self._first[place] for place, own in zip(places, rows, strict=True)]
        return torch.stack(shifted).to(self._labels.device)


def _nothing(like: Shard) -> Shard:
    return Shard(like.images[:0], like.labels[:0])


def _mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy [clients] of logits [clients, B, C] and labels [clients, B]."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels).mean(1)
