"""Where a run's clients and its distillation go: this process, Ray actors of its own, or a sweep's shared pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..algorithm.distillation import DistillTask
from ..config import ExperimentConfig
from ..records import DataFacts, ImageSet
from .cluster import connect, num_hosts
from .cohort import Cohort, RayCohort, SerialCohort, start_hosts
from .distiller import Outcome, distil_on_ray, distil_serial


@dataclass(frozen=True)
class Hosts:
    """Nothing starts before it is asked for.

    ``address``: the Ray cluster of a run on its own. ``pool``: client actors that a sweep's trials share; Ray is
    joined already, and distillation without Train workers happens in this process, since Ray Train's in-process mode
    cannot start inside a Tune trial (the loop is the same one, bit for bit).
    """

    address: str = "local"
    pool: tuple[Any, ...] = ()
    in_trial: bool = False

    def cohort(
        self,
        config: ExperimentConfig,
        facts: DataFacts,
        shards: Callable[[int], ImageSet],
        say: Callable[[str], None],
    ) -> Cohort:
        """The clients of ``config``; ``shards`` answers a client's training images."""
        if config.runtime.host == "serial":
            return SerialCohort(config, facts, shards)
        if self.pool:
            return RayCohort(config, facts, shards, lambda: list(self.pool), shared=True)

        def own() -> list[Any]:
            count = num_hosts(config, connect(self.address))
            say(f"Ray is up: {config.partition.num_clients} clients on {count} actors")
            needs = {"CPU": config.runtime.cpus_per_client, "GPU": config.runtime.gpus_per_client}
            return start_hosts(needs, {"": count})

        return RayCohort(config, facts, shards, own)

    def distil(self, task: DistillTask, report: Callable[[int, Mapping[str, float]], None], storage: str) -> Outcome:
        """The distilled student; ``storage`` is Ray Train's own folder."""
        knobs = task.config
        if knobs.runtime.host == "serial" or (self.in_trial and not knobs.distill.workers):
            return distil_serial(task, report)
        if not self.in_trial:
            connect(self.address)
        return distil_on_ray(task, report, storage, here=self.in_trial)
