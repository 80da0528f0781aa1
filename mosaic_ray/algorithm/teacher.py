"""The mixture-of-experts teacher: class experts and the meta model, as one network from images to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ExperimentConfig
from ..models.classifiers import build_classifier
from ..models.tensors import freeze, head_of, load_weights
from ..records import DataFacts, Weights
from .meta_training import Teacher, answers


@dataclass(frozen=True)
class TeacherState:
    """A teacher as arrays. ``experts`` are the distinct ones: whole models for ``meta.input = full``, else heads.

    ``index`` int64 [C] maps each class to its expert; ``backbone`` is the model whose features the heads read.
    """

    backbone: Weights
    experts: tuple[Weights, ...]
    index: np.ndarray
    meta: Weights


def heads_only(weights: Weights) -> Weights:
    """The head's entries alone."""
    return {name: value for name, value in weights.items() if name.startswith("head.")}


def head_logits(experts: tuple[Weights, ...], index: np.ndarray) -> Callable[[Tensor], Tensor]:
    """features [B, d] -> the class experts' logits V_c phi + b_c, [B, C experts, C classes]."""
    heads = [head_of(e) for e in experts]
    matrices = torch.tensor(np.stack([v for v, _ in heads]))
    biases = torch.tensor(np.stack([b for _, b in heads]))
    order = torch.tensor(index)

    def logits(features: Tensor) -> Tensor:
        rows = torch.einsum("bd,ecd->bec", features, matrices.to(features.device)) + biases.to(features.device)
        return rows[:, order.to(features.device)]

    return logits


class TeacherNet(nn.Module):
    """Images (classifier inputs) to the teacher's logits; frozen."""

    def __init__(self, config: ExperimentConfig, facts: DataFacts, state: TeacherState) -> None:
        super().__init__()

        def network(weights: Weights) -> nn.Module:
            model = build_classifier(config.model, facts.num_classes, facts.channels, facts.image_size)
            return load_weights(model, weights)

        self.backbone = network(state.backbone)
        self.full = config.meta.input == "full"
        self.experts = nn.ModuleList([network(e) for e in state.experts] if self.full else [])
        self.head_logits = None if self.full else head_logits(state.experts, state.index)
        self.register_buffer("index", torch.tensor(state.index))
        self.meta = load_weights(
            Teacher(len(state.index), facts.num_classes, config.meta, self.backbone.feature_dim), state.meta
        )
        self._backbone = state.backbone
        freeze(self)

    def reads_student_features(self, student: Weights) -> bool:
        """Whether the student's features are the very input that this teacher reads."""
        return not self.full and all(
            np.array_equal(student[name], value)
            for name, value in self._backbone.items()
            if not name.startswith("head.")
        )

    def forward(self, images: Tensor, features: Tensor | None = None) -> Tensor:
        """[B, C]; ``features`` of the backbone may be handed in where they are known."""
        if self.full:
            rows = torch.stack([expert(images) for expert in self.experts], 1)[:, self.index]
            return self.meta(rows.float())
        features = self.backbone.features(images) if features is None else features
        features = features.float()
        return answers(self.meta, self.head_logits, features)


def build_teacher(config: ExperimentConfig, facts: DataFacts, state: TeacherState) -> TeacherNet:
    """The frozen teacher network of ``state``."""
    return TeacherNet(config, facts, state)
