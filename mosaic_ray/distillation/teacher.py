"""The mixture-of-experts teacher: class experts and the meta model, as one network from images to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ..config.schema import ExperimentConfig
from ..core.types import DataFacts, Weights
from ..models.classifiers import Classifier, build_classifier
from ..models.state_dict import freeze, head_of, load_weights
from .meta_model import Teacher, by_modality, modality_tokens, teacher_logits


@dataclass(frozen=True)
class TeacherState:
    """A teacher as arrays. ``experts`` are the distinct ones: full models for ``meta.input = full``, else heads.

    ``index`` int64 [C] maps each class to its expert. The heads read the features of ``backbone``, of
    architecture ``classifier`` (empty: the student's). ``meta`` is the state dict of ``Teacher``; ``head`` the
    re-fitted head that it starts at, empty where it starts at random. Both were trained on all prototypes.
    ``trial_meta`` and ``trial_head`` are the same without the held-out ones, where these were added afterwards.
    """

    backbone: Weights
    experts: tuple[Weights, ...]
    index: np.ndarray
    meta: Weights
    classifier: str = ""
    head: Weights = field(default_factory=dict)
    trial_meta: Weights = field(default_factory=dict)
    trial_head: Weights = field(default_factory=dict)

    @property
    def trial(self) -> TeacherState:
        """Return the teacher that has not seen held-out prototypes."""
        return replace(self, meta=self.trial_meta, head=self.trial_head) if self.trial_meta else self


@dataclass(frozen=True)
class MixedTeacher:
    """One teacher per architecture of the clients, combined.

    A meta model reads features of one network, so each architecture has its own, trained on the prototypes of its
    clients. Their logits are combined as t_c = sum_g s_{g,c} log softmax(t_g)_c with ``shares`` [G, C], the share of
    class c's samples that clients of architecture g hold. An architecture without samples of a class has no influence
    on it. Of an image that was drawn for the class y, all outputs of g have the weight s_{g,y}, as FedFTG and DFRD
    weigh clients (docs/algorithm.md 1.7, 3.9, 3.10).
    ``student``: index of the student's architecture in ``groups``.
    """

    groups: tuple[TeacherState, ...]
    shares: np.ndarray
    student: int

    @property
    def trial(self) -> MixedTeacher:
        """Return the teacher that has not seen held-out prototypes."""
        return replace(self, groups=tuple(group.trial for group in self.groups))


def group_shares(counts: np.ndarray, groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Return float64 [G, C] with columns of sum 1: n_{g,c} / n_c, or n_g / n for a class that no client holds."""
    held = np.stack([counts[list(clients)].sum(0) for clients in groups]).astype(np.float64)
    held[:, held.sum(0) == 0] = held.sum(1, keepdims=True)
    return np.asarray(held / held.sum(0))


def heads_only(weights: Weights) -> Weights:
    """Return only the entries of the head."""
    return {name: value for name, value in weights.items() if name.startswith("head.")}


def head_logits(experts: tuple[Weights, ...], index: np.ndarray, modalities: int = 0) -> Callable[[Tensor], Tensor]:
    """Return a function: features phi [B, d] -> logits V_e phi + b_e of the class experts, [B, C experts, C].

    With ``modalities`` M > 0 features are those of ``model.fusion = late``, and the logits are those of each modality
    alone, [B, M C, C], modality by modality, zeros where it is absent. Their mean over what is there is V_e phi + b_e.
    """
    heads = [head_of(e) for e in experts]
    matrices = torch.tensor(np.stack([v for v, _ in heads]))
    biases = torch.tensor(np.stack([b for _, b in heads]))
    order = torch.tensor(index)

    def logits(features: Tensor) -> Tensor:
        nonlocal matrices, biases, order
        if matrices.device != features.device:
            matrices, biases, order = (part.to(features.device) for part in (matrices, biases, order))
        if modalities:
            blocks, there = by_modality(features, modalities)
            each = torch.einsum("bmd,ecmd->bmec", blocks, matrices.unflatten(2, (modalities, -1))) + biases
            return (each * there[:, :, None, None])[:, :, order].flatten(1, 2)
        return (torch.einsum("bd,ecd->bec", features, matrices) + biases)[:, order]

    return logits


class TeacherNet(nn.Module):
    """The frozen teacher network: maps classifier inputs [B, channels, H, W] to logits [B, C]."""

    index: Tensor

    def __init__(self, config: ExperimentConfig, facts: DataFacts, state: TeacherState) -> None:
        super().__init__()

        def network(weights: Weights) -> Classifier:
            name = state.classifier or None
            shape = facts.num_classes, facts.channels, facts.image_size
            model = build_classifier(config.model, *shape, name, facts.modalities)
            return load_weights(model, weights)

        self.backbone = network(state.backbone)
        self.full = config.meta.input == "full"
        self.experts = nn.ModuleList([network(e) for e in state.experts] if self.full else [])
        modalities = modality_tokens(config.meta, facts)
        self.head_logits = head_logits(state.experts, state.index, modalities)
        self.register_buffer("index", torch.tensor(state.index))
        self.meta = load_weights(
            Teacher(len(state.index), facts.num_classes, config.meta, self.backbone.feature_dim, modalities), state.meta
        )
        self._backbone = state.backbone
        freeze(self)

    def reads_student_features(self, student: Weights) -> bool:
        """Check whether the teacher reads features that the backbone of ``student`` computes equally."""
        return not self.full and all(
            np.array_equal(student[name], value)
            for name, value in self._backbone.items()
            if not name.startswith("head.")
        )

    def forward(self, images: Tensor, features: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """Map images to logits [B, C]; pass ``features`` [B, d] of the backbone if they are known.

        ``asked`` is for ``MixedTeacherNet``; one teacher alone answers without it.
        """
        if not self.full:
            return self.by_heads(images, features)
        rows = torch.stack([expert(images) for expert in self.experts], 1)[:, self.index]
        logits: Tensor = self.meta(rows.float())
        return logits

    def by_heads(self, images: Tensor, features: Tensor | None = None) -> Tensor:
        """Compute logits [B, C] with the experts' heads on the backbone's features, the input used in training."""
        features = self.backbone.features(images) if features is None else features
        return teacher_logits(self.meta, self.head_logits, features.float())


class MixedTeacherNet(nn.Module):
    """The frozen network of a ``MixedTeacher``: maps images to combined logits [B, C]."""

    shares: Tensor

    def __init__(self, config: ExperimentConfig, facts: DataFacts, state: MixedTeacher) -> None:
        super().__init__()
        self.groups = nn.ModuleList(TeacherNet(config, facts, group) for group in state.groups)
        self.student = state.student
        self.register_buffer("shares", torch.tensor(state.shares, dtype=torch.float32))

    @property
    def teachers(self) -> list[TeacherNet]:
        """The teachers of all architectures."""
        return cast(list[TeacherNet], list(self.groups))

    def reads_student_features(self, student: Weights) -> bool:
        """Check whether the teacher of the student's architecture reads the student's features."""
        return self.teachers[self.student].reads_student_features(student)

    def forward(self, images: Tensor, features: Tensor | None = None, asked: Tensor | None = None) -> Tensor:
        """Map images to logits [B, C]; pass ``features`` [B, d] of the student's backbone if they are known.

        ``asked`` int64 [B]: the classes that the images were drawn for, where generators take labels.
        """
        logits = images.new_zeros(len(images), self.shares.shape[1], dtype=torch.float32)
        for number, (teacher, shares) in enumerate(zip(self.teachers, self.shares, strict=True)):
            own = teacher(images, features if number == self.student else None)
            weight = shares if asked is None else shares[asked, None]
            logits = logits + weight * own.float().log_softmax(1)
        return logits


@torch.no_grad()
def shift(teacher: TeacherNet | MixedTeacherNet, images: Tensor) -> float:
    """Return the share of ``images`` on which the teacher's class differs from that on the input used in training.

    A meta model is trained on the experts' heads applied to features (prototypes). With ``meta.input = full`` it is
    then applied to full experts (M6). Needs no labels. With several architectures the largest share is returned.
    """
    parts = teacher.teachers if isinstance(teacher, MixedTeacherNet) else [teacher]
    if not any(part.full for part in parts):
        return 0.0
    return max(float((part(images).argmax(1) != part.by_heads(images).argmax(1)).float().mean()) for part in parts)


def build_teacher(
    config: ExperimentConfig, facts: DataFacts, state: TeacherState | MixedTeacher
) -> TeacherNet | MixedTeacherNet:
    """Build the frozen teacher network of ``state``."""
    if isinstance(state, MixedTeacher):
        return MixedTeacherNet(config, facts, state)
    return TeacherNet(config, facts, state)
