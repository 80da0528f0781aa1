"""The communication of a run: bytes measured by its stages, and bytes predicted from the configuration.

The control is a comparison that a deployment would not send, and is left out of both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..config.client_layout import any_partial_width
from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.types import DataFacts
from ..distillation.rehearsal import generator_size
from ..federated.client_models import Federation
from ..federated.communication import Tally, num_parameters, size_of_entries
from ..methods.mosaic.client_uploads import exchanged
from ..models.multimodal import modality_of
from ..pipeline.context import RunContext
from ..pipeline.graph import load_function
from .plan import graph_of

T = TypeVar("T")

#: Stages that a deployment would not run.
COMPARISONS = ("control", "control_warmup")

#: Images of a class that surely fill its k prototypes.
MANY = 10**9

#: FedRolex's own widths (Alam et al. 2022), assigned to clients in turn, where no client of a run is narrow.
FEDROLEX_WIDTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def measured(ctx: RunContext) -> Tally:
    """Return the bytes sent by client, as the finished stages stored them."""
    clients = ctx.config.partition.num_clients
    results = (result for name, result in ctx.results.items() if name not in COMPARISONS)
    found = [Tally(1, clients, r.load("communication")) for r in results if "communication" in r.parts]
    return Tally.of([*found, exchanged(ctx)], clients)


def predicted(config: ExperimentConfig, facts: DataFacts, counts: np.ndarray | None = None) -> Tally:
    """Return the bytes that each client will send, from the configuration alone: nothing is trained or loaded.

    Cohorts and drop-outs are drawn as they will be; clients that fail are not foreseen. The number of prototypes
    depends on the label counts [K, C]: without ``counts`` every client counts as one with many images of every class.
    """
    clients = config.partition.num_clients
    federation, tally = Federation(config, facts), Tally(1, clients)
    counts = np.full((clients, facts.num_classes), MANY) if counts is None else counts
    for stage in graph_of(config):
        if stage.messages:
            load_function(stage.messages)(federation, counts, tally)
    return tally


@dataclass(frozen=True)
class _OneModality(Federation):
    """A federation whose messages are counted for the weights of one modality alone; "": those of none."""

    modality: str = ""

    def trained_entries(self, client_id: int, entries: Mapping[str, T], whole: bool = False) -> dict[str, T]:
        sent = super().trained_entries(client_id, entries, whole)
        return {entry: what for entry, what in sent.items() if modality_of(entry) == self.modality}


def by_modality(config: ExperimentConfig, facts: DataFacts) -> list[dict[str, Any]]:
    """Return the bytes of weights that rounds send of each modality's encoder, and of what all share ("").

    A row has the ``modality``, how many ``clients`` hold it, and the bytes in both directions, from the configuration
    alone.
    """
    rows, clients = [], config.partition.num_clients
    config = override(config, {"prototypes.rounds": "last"})  # prototypes are no weights
    held = Federation(config, facts).modalities
    for modality in (*(part.name for part in facts.modalities), ""):
        federation, tally = _OneModality(config, facts, modality), Tally(1, clients)
        for stage in graph_of(config):
            if stage.messages and stage.kind in ("warmup", "rounds"):
                load_function(stage.messages)(federation, np.zeros((clients, facts.num_classes), np.int64), tally)
        owners = sum(modality in own for own in held) if modality else clients
        totals = tally.totals()
        rows.append(
            {"modality": modality, "clients": owners} | {way: kinds.get("weights", 0) for way, kinds in totals.items()}
        )
    return rows


def baselines(config: ExperimentConfig, facts: DataFacts) -> dict[str, Tally]:
    """Return what FedAvg (whole models) and FedRolex (the run's widths, or its authors') send in the same rounds.

    Without FedRolex where a network of the user's cannot be cut.
    """
    plain = {"method": "fedavg", "prototypes.rounds": "last", "federation.strategy": "fedavg"}
    found = {"fedavg": predicted(override(config, plain | {"federation.widths": (1.0,)}), facts)}
    widths = config.federation.widths if any_partial_width(config) else FEDROLEX_WIDTHS
    with contextlib.suppress(RequestError):
        found["fedrolex"] = predicted(override(config, plain | {"federation.widths": widths}), facts)
    return found


def communication(ctx: RunContext, counts: np.ndarray) -> dict[str, Any]:
    """summary.json's ``communication``: by client and by width, predicted, and against FedAvg and FedRolex."""
    config, facts = ctx.config, ctx.dataset.facts
    federation, sent, expected = Federation(config, facts), measured(ctx), predicted(config, facts, counts)
    ways = {way: (sent.by_client(way), expected.by_client(way)) for way in ("uplink", "downlink")}
    clients = [
        {"client": k, "classifier": name, "width": width}
        | {way: int(of[k]) for way, (of, _) in ways.items()}
        | {f"predicted_{way}": int(of[k]) for way, (_, of) in ways.items()}
        for k, (name, width) in enumerate(zip(federation.classifiers, federation.widths, strict=True))
    ]
    widths = []
    for name, width in dict.fromkeys(zip(federation.classifiers, federation.widths, strict=True)):
        entries = federation.entries(name, width)
        rows = [row for row in clients if (row["classifier"], row["width"]) == (name, width)]
        widths.append(
            {"classifier": name, "width": width, "clients": len(rows), "parameters": num_parameters(entries)}
            | {"model_bytes": size_of_entries(entries).payload}
            | {way: round(float(np.mean([row[way] for row in rows]))) for way in ways}
        )
    return {
        "total": sent.total,
        "predicted": expected.totals(),
        "measured_over_predicted": sent.total / expected.total,
        "baselines": {name: tally.totals() for name, tally in baselines(config, facts).items()},
        "generator_bytes": generator_size(config, facts).payload if "generators" in ctx.log else None,
        "widths": widths,
        "clients": clients,
        **({"modalities": by_modality(config, facts)} if facts.modalities else {}),
    }
