"""The communication of a run: what its stages have measured, and what arithmetic on the configuration predicts.

The control is a comparison, nothing that a deployment would send, and is left out of both.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from ..config.client_layout import any_partial_width
from ..config.registry import METHODS
from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.types import DataFacts
from ..federated.client_models import Federation
from ..federated.communication import (
    Size,
    Tally,
    entries_of,
    num_parameters,
    num_prototypes,
    prototype_entries,
    size_of_entries,
    statistics_entries,
)
from ..methods.mosaic.client_uploads import uploaded
from ..models.generator import build_generator
from ..pipeline.context import Run
from ..pipeline.rounds import ADDRESS, CLOSING, PROTOTYPE_HISTORY, answering, cohort_of

#: FedRolex's own widths (Alam et al. 2022), dealt in turn: what it is set at where no client of a run is narrow.
FEDROLEX_WIDTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def measured(run: Run) -> Tally:
    """What was sent, by client, as the finished stages stored it."""
    clients = run.config.partition.num_clients
    stages = (run.results[name] for name in ("warmup", "prototypes", "finetune") if name in run.results)
    found = [Tally(1, clients, result.load("communication")) for result in stages]
    return Tally.of([*found, uploaded(run.generators, clients)], clients)


def predicted(config: ExperimentConfig, facts: DataFacts, counts: np.ndarray | None = None) -> Tally:
    """What will be sent, by client, from the configuration alone: nothing is trained, no data are needed.

    Cohorts and drop-outs are drawn as they will be; clients that fail are not foreseen. How many prototypes there are
    depends on the label counts [K, C]: without ``counts`` every client counts as one that fills every class's k.
    """
    federation, clients = Federation(config, facts), config.partition.num_clients
    partial_width, tally = federation.partial_width, Tally(1, clients)
    makers = list(zip(federation.classifiers, federation.widths, strict=True))
    shares = {maker: size_of_entries(federation.entries(*maker)) for maker in set(makers)}
    wholes = {name: federation.entries(name) for name in federation.groups}
    shares |= {(name, 1.0): size_of_entries(whole) for name, whole in wholes.items()}
    messages = {
        name: [size_of_entries(statistics_entries(whole, layers)) for layers in federation.statistics_passes(name)]
        for name, whole in wholes.items()
        if partial_width
    }
    counts = np.full((clients, facts.num_classes), config.prototypes.k) if counts is None else counts

    for address, num_rounds in ((ADDRESS, config.warmup.num_rounds), (CLOSING, config.finetune.num_rounds)):
        asked, answered, collected = np.zeros((3, clients), np.int64)
        for round_num in range(num_rounds):
            cohort = cohort_of(config, address, round_num)
            there = answering(config, address, round_num, cohort)
            asked[cohort] += 1
            answered[there] += 1
            if config.prototypes.rounds == "all" and address == ADDRESS and round_num >= num_rounds - PROTOTYPE_HISTORY:
                collected[there] += 1
        for k, maker in enumerate(makers):
            whole = wholes[maker[0]]
            tally.add("downlink", "weights", k, shares[maker], times=int(asked[k]))
            tally.add("uplink", "weights", k, shares[maker], times=int(answered[k]))
            for message in messages.get(maker[0], ()) if num_rounds else ():
                tally.add("downlink", "weights", k, shares[maker[0], 1.0])
                tally.add("uplink", "statistics", k, message)
            _add_prototypes(tally, config, k, whole, counts[k], times=int(collected[k]))
    for k in range(clients):
        tally.add("uplink", "counts", k, size_of_entries({"counts": ((facts.num_classes,), np.int64)}))

    distiller = METHODS[config.method][0]
    if distiller == "mosaic":
        generator = _generator_size(config, facts)
        for k in range(clients):
            tally.add("uplink", "generators", k, generator)
    if distiller in ("mosaic", "prototype_head") and config.prototypes.rounds == "last":
        for k, (name, _) in enumerate(makers):
            if config.prototypes.model == "global":
                tally.add("downlink", "weights", k, size_of_entries(wholes[name]))
            _add_prototypes(tally, config, k, wholes[name], counts[k])
    return tally


def _add_prototypes(
    tally: Tally, config: ExperimentConfig, client_id: int, network: Any, counts: np.ndarray, times: int = 1
) -> None:
    section = config.prototypes
    count = int(num_prototypes(counts, section.k, section.cap, sampled=bool(section.samples)).sum())
    message = size_of_entries(prototype_entries(count, network["head.weight"][0][1]))
    tally.add("uplink", "prototypes", client_id, message, times=times)


def _generator_size(config: ExperimentConfig, facts: DataFacts) -> Size:
    with torch.device("meta"):
        made = build_generator(config.generator, facts.channels, facts.image_size, facts.num_classes)
    return size_of_entries(entries_of(made.state_dict()))


def baselines(config: ExperimentConfig, facts: DataFacts) -> dict[str, Tally]:
    """What FedAvg (whole models) and FedRolex (the run's widths, or its authors') send in the same rounds.

    Without FedRolex where a network of the user's cannot be cut.
    """
    plain = {"method": "fedavg", "prototypes.rounds": "last", "federation.optimiser": "fedavg"}
    found = {"fedavg": predicted(override(config, plain | {"federation.widths": (1.0,)}), facts)}
    widths = config.federation.widths if any_partial_width(config) else FEDROLEX_WIDTHS
    with contextlib.suppress(RequestError):
        found["fedrolex"] = predicted(override(config, plain | {"federation.widths": widths}), facts)
    return found


def communication(run: Run, counts: np.ndarray) -> dict[str, Any]:
    """summary.json's ``communication``: by client and by width, predicted, and against FedAvg and FedRolex."""
    config, facts = run.config, run.dataset.facts
    federation, sent, expected = Federation(config, facts), measured(run), predicted(config, facts, counts)
    ways = {way: (sent.by_client(way), expected.by_client(way)) for way in ("uplink", "downlink")}
    clients = [
        {"client": k, "classifier": name, "width": width}
        | {way: int(of[k]) for way, (of, _) in ways.items()}
        | {f"predicted_{way}": int(of[k]) for way, (_, of) in ways.items()}
        for k, (name, width) in enumerate(zip(federation.classifiers, federation.widths, strict=True))
    ]
    widths = []
    for name, width in dict.fromkeys((row["classifier"], row["width"]) for row in clients):
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
        "generator_bytes": _generator_size(config, facts).payload if "generators" in run.log else None,
        "widths": widths,
        "clients": clients,
    }
