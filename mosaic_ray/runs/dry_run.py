"""What a run would do: its devices, its actors and its work, without data and without Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..config.schema import ExperimentConfig
from ..data.load import known_facts
from ..execution.devices import describe, resources_for, settle
from ..execution.ray_session import hosts_beside_server
from .calibrate import estimate_for
from .checks import check_models
from .earlier import read_earlier
from .estimate import Hours, clients_at_once, gpus_held
from .plan import StageWork, unique_work
from .runner import check_name, default_name, estimate_devices


@dataclass(frozen=True)
class DryRun:
    """The plan of a run. ``config`` is settled, ``actors`` is 0 where clients run in the run's own process."""

    name: str
    config: ExperimentConfig
    actors: int
    devices: str
    work: list[StageWork]
    hours: Hours

    def lines(self) -> list[str]:
        """Return the plan as lines of text, but for the work."""
        config, clients = self.config, self.config.partition.num_clients
        what = f"method {config.method}, algorithm {config.algorithm}, data {config.data.name}, {clients} clients"
        places = "GPUs" if config.runtime.device == "cuda" else "CPUs"
        devices = self.devices or f"clients train on {places} in {config.runtime.precision}"
        each = f"up to {math.ceil(clients / max(1, self.actors))} of the run's {clients} clients on each, in turn"
        actors = f"client actors: {self.actors}, {each}"
        if not self.actors:
            actors = "client actors: none, clients run inside the run's own process (runtime.host = serial)"
        return [f"run {self.name}: {what}, seed {config.seed}", devices, actors]

    def as_dict(self) -> dict[str, Any]:
        """Return the output of ``--json``."""
        runtime = self.config.runtime
        return {
            "name": self.name, "method": self.config.method, "data": self.config.data.name, "seed": self.config.seed,
            "clients": self.config.partition.num_clients, "actors": self.actors, "device": runtime.device,
            "precision": runtime.precision, "gpus_per_client": runtime.gpu_share,
            "work": [vars(row) for row in self.work], "estimate": self.hours.as_dict(),
        }  # fmt: skip


def dry_run(
    config: ExperimentConfig, storage: str, name: str | None, address: str, fresh: bool = False, calibrate: bool = False
) -> DryRun:
    """Return the plan of a run; ``RequestError`` if it would be refused before its data are read."""
    check_name(name, "runs")
    there = estimate_devices([config], resources_for(config, address))
    config = settle(config, there)
    if (facts := known_facts(config.data)) is not None:
        check_models(config, facts)
    earlier = read_earlier(storage, fresh)
    actors = 0 if config.runtime.host == "serial" else hosts_beside_server(config, [there])
    estimate = estimate_for([config], earlier.runs, calibrate)
    work = unique_work([earlier.chain(config)], [config], earlier, estimate.add)
    hours = estimate.on(clients_at_once(config, actors), gpus=gpus_held(config, there.gpus, actors, 1))
    return DryRun(name or default_name(config), config, actors, describe(config, there), work, hours)
