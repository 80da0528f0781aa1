"""Check whether a request fits the cluster that a file describes: its machines, its storage, its plan."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.units import size
from ..execution.ray_session import Resources, hosts_beside_server, in_all, places
from ..execution.resource_plan import Node, ResourcePlan, on_ray_gpus, plan, server_needs
from ..runs.calibrate import estimate_for
from ..runs.earlier import read_earlier
from ..runs.estimate import clients_at_once, gpus_held
from ..runs.plan import unique_work
from .cluster_spec import Cluster, NodeType, mapping
from .doctor import Check
from .prices import cost_of


@dataclass(frozen=True)
class Fit:
    """A request on a cluster's machines: lines about concurrent runs, and the machines used of each type.

    ``hosts``: clients at once (0: none on Ray), ``trials``: trials at once.
    """

    lines: tuple[str, ...]
    used: Mapping[str, int]
    hosts: int = 0
    trials: int = 1


@dataclass(frozen=True)
class ClusterRequest:
    """A request: its configs on a cluster's resources, and its fit to nodes (the head first), a storage, resources.

    ``work_known``: whether the configs are all that will run.
    """

    configs_on: Callable[[Resources], Sequence[ExperimentConfig]]
    fit_on: Callable[[Sequence[Node], str, Resources], Fit]
    work_known: bool = True


def fit_of_sweep(made: ResourcePlan) -> Fit:
    """Return the ``Fit`` of a sweep's resource plan."""
    counts = [sum(held) for held in zip(made.hosts, made.trials, made.kept, strict=True)]
    return Fit(tuple(made.lines()), _used(made.nodes, counts), sum(made.hosts), made.concurrent)


def fit_of_run(config: ExperimentConfig, nodes: Sequence[Node]) -> Fit:
    """Fit a single run, which releases its client hosts before Ray Train starts; ``RequestError`` if none fits.

    On GPUs one host's place is the server worker's.
    """
    if config.runtime.host == "serial":
        return Fit(("clients run inside the run's own process, on the head (runtime.host = serial)",), {})
    clients, workers = config.partition.num_clients, config.distill.train_workers
    capacity = [places(config, node) for node in nodes]
    if not any(capacity):
        plan(nodes, [config], num_trials=1)  # raises, with advice
    hosts, gpus, needs = hosts_beside_server(config, nodes), on_ray_gpus(config), server_needs(config, workers)
    room = [int(node.cpus / needs["CPU"] + 1e-9) for node in nodes]
    if workers == 1 and gpus:
        room = capacity
    elif gpus:
        room = [min(pair) for pair in zip(room, (int(node.gpus) for node in nodes), strict=True)]
    if workers > sum(room):
        kind = "GPUs" if gpus else "CPUs"
        raise RequestError(f"distill.workers = {workers}: all machines together have {sum(room)} {kind} for them")
    at_once = min(hosts + gpus, sum(capacity))
    held = [max(pair) for pair in zip(_dealt(at_once, capacity), _dealt(workers, room), strict=True)]
    each = math.ceil(clients / hosts)
    lines = [f"client hosts: {hosts}, up to {each} of the run's {clients} clients on each, in turn"]
    if gpus:
        turns = " beside them" if at_once > hosts else ", in turn with the client host"
        lines.append(f"the server's work: one worker with {server_needs(config)['GPU']:g} GPU{turns}")
    if workers:
        lines.append(f"Train workers: {workers}, when the client hosts have gone")
    return Fit(tuple(lines), _used(nodes, held), hosts)


def _dealt(count: int, capacity: Sequence[int]) -> list[int]:
    """Fill machines in their order, each to its capacity, with ``count`` things."""
    taken = [min(count, total) for total in accumulate(capacity)]
    return [after - before for before, after in pairwise([0, *taken])]


def _used(nodes: Sequence[Node], counts: Sequence[int]) -> Mapping[str, int]:
    """Count each type's machines that hold something, among those to come."""
    used = (node for node, count in zip(nodes, counts, strict=True) if node.to_come and count)
    return Counter(node.name.rpartition(" ")[0] for node in used)


def machines(cluster: Cluster) -> Iterator[Check]:
    """Check the machines that the provider would start."""
    if cluster.head.spot:
        fix = "let it be on demand: it is the cheap one"
        yield Check("machines", "warning", "the head may be taken away, and the cluster ends with it", fix)
    for kind in cluster.workers:
        if kind.least and cluster.document.kind != "local":
            found = f"{kind.least} of {kind.name} run, and cost, whether there is work or not"
            yield Check("machines", "warning", found, "set the least to 0: the autoscaler starts machines on demand")
        if not kind.gpus:
            continue
        if cluster.document.kind == "aws" and not kind.content.get("ImageId"):
            found = f"{kind.name}: no ImageId, and Ray's default has an NVIDIA driver from before torch's"
            yield Check("machines", "problem", found, "an image with driver 580 or newer; see cluster.yaml")
        if kind.image.startswith("rayproject/ray:") and "-gpu" not in kind.image and not _hands_gpus_on(cluster, kind):
            found = f"{kind.name}: its container is not given the GPUs"
            yield Check("machines", "problem", found, 'docker: {worker_run_options: ["--gpus all"]}')


def _hands_gpus_on(cluster: Cluster, kind: NodeType) -> bool:
    if cluster.document.kind == "kuberay":
        return True
    own = mapping(mapping(cluster.content["available_node_types"][kind.name]).get("docker"))
    common = mapping(cluster.content.get("docker"))
    options = (common.get("run_options"), common.get("worker_run_options"), own.get("worker_run_options"))
    return any("--gpus" in " ".join(words or []) for words in options)


def named_storage(commands: Sequence[str]) -> str | None:
    """Return the storage that a command of the file names."""
    text = " ".join(commands)
    match = re.search(r"--storage[= ]([^\s'\"$]+)", text) or re.search(r"MOSAIC_STORAGE=([^\s'\"]+)", text)
    return match[1] if match else None


def storage_checks(cluster: Cluster, commands: Sequence[str], storage: str | None) -> Iterator[Check]:
    """Check that every machine can reach the storage. ``storage``: the --storage option, or None."""
    named = named_storage(commands)
    place = storage or named
    if place is None:
        yield Check("storage", "ok", "none is named; `--storage URI` says where results go")
        return
    if storage and named and storage.rstrip("/") != named.rstrip("/"):
        found = f"results go to {storage}, while the file names {named}"
        yield Check("storage", "warning", found, "let both be one: TensorBoard there reads what the file names")
    scheme, _, rest = place.rpartition("://")
    if scheme in ("", "file"):
        mounts = _shared_mounts(cluster, " ".join(commands)) if cluster.most else []
        mount = next((m for m in mounts if rest == m or rest.startswith(f"{m.rstrip('/')}/")), None)
        if not cluster.most:
            yield Check("storage", "ok", f"{rest}, on the one machine")
        elif mount:
            yield Check("storage", "ok", f"{rest} lies on {mount}, which all machines mount")
        else:
            fix = "name s3://... or gs://..., or mount a shared folder there and name its path"
            yield Check("storage", "problem", f"{rest} is a folder of one machine, and goes with it", fix)
        return
    asks = {("s3", "aws"): "IamInstanceProfile", ("gs", "gcp"): "serviceAccounts"}.get((scheme, cluster.document.kind))
    severity, kinds = "problem", cluster.workers  # Ray gives the head an account of its own where it has none
    if cluster.document.kind == "kuberay":
        asks, severity, kinds = "serviceAccountName", "warning", cluster.types
    without = [kind.name for kind in kinds if asks and not kind.content.get(asks)]
    for name in without:
        yield Check("storage", severity, f"{name}: no {asks}, so nothing there may use {place}", f"name one by {asks}")
    if not without:
        yield Check("storage", "ok", f"{place}; rights on it are not tried from here")


def _shared_mounts(cluster: Cluster, text: str) -> list[str]:
    """Return folders that a command mounts from the network, or that every pod mounts from a claim or from NFS."""
    if cluster.document.kind != "kuberay":
        return re.findall(r"\bmount\s+(?:-\S+\s+\S+\s+)*\S+:\S*\s+(/[^\s;&]+)", text)
    places = []
    for kind in cluster.types:
        volumes = kind.content.get("volumes") or []
        shared = {volume["name"] for volume in volumes if "persistentVolumeClaim" in volume or "nfs" in volume}
        mounts = kind.content["containers"][0].get("volumeMounts") or []
        places.append({mount["mountPath"] for mount in mounts if mount["name"] in shared})
    return sorted(set.intersection(*places))


def plan_checks(cluster: Cluster, asked: ClusterRequest, storage: str) -> Iterator[Check]:
    """Report each machine type's capacity, the runs that fit at once, and the number of machines for them."""
    unknown = sorted({kind.name for kind in cluster.types if kind.cpus is None})
    if unknown:
        found = f"the file does not give the resources of {', '.join(unknown)}, so nothing is compared"
        fix = "declare its resources, or ask on the head: mosaic sweep --dry-run --address auto"
        yield Check("plan", "warning" if cluster.document.kind != "local" else "ok", found, fix)
        return
    largest = in_all(Resources(0, 0, 0), cluster.nodes(gpus=True))
    try:
        configs = asked.configs_on(largest)
        gpus_used = any(config.runtime.device == "cuda" for config in configs)
        nodes = cluster.nodes(gpus=gpus_used)
        there = in_all(Resources(0, 0, 0), nodes)
        configs = asked.configs_on(there)
    except RequestError as error:
        yield Check("plan", "problem", str(error), "change the request, or the file's machines")
        return
    for reason in dict.fromkeys(config.reason for config in configs if config.reason):
        yield Check("schedule", "ok", reason.removeprefix("schedule "))
    for kind in cluster.types:
        gpus = f"{kind.gpus:g} GPU{'s' * (kind.gpus != 1)}, " if kind.gpus else ""
        has = f"{kind.cpus:g} CPUs, {gpus}{size(kind.memory, 'GiB')}"
        yield Check(f"node {kind.name}", "ok", f"{has}: {_describe_capacity(kind, configs)}")
    try:
        fit = asked.fit_on(nodes, storage, there)
    except RequestError as error:
        yield Check("plan", "problem", str(error), "change the request, or the file's machines")
        return
    for line in fit.lines:
        yield Check("plan", "ok", line)
    wanted = ", ".join(f"{fit.used.get(kind.name, 0)} of {kind.name} (at most {kind.most})" for kind in cluster.workers)
    yield Check("workers", "ok", f"the autoscaler will be asked for {wanted or 'none: the file has none'}")
    if asked.work_known:
        yield from _cost_checks(cluster, configs, fit, storage, there)


def _cost_checks(
    cluster: Cluster, configs: Sequence[ExperimentConfig], fit: Fit, storage: str, there: Resources
) -> Iterator[Check]:
    """Report the hours by stage times of earlier runs on this disk, and their price; nothing is contacted."""
    earlier = read_earlier("./mosaic_runs" if "://" in storage else storage)
    estimate = estimate_for(configs, earlier.runs, calibrate=False)
    unique_work([earlier.chain(c) for c in configs], configs, () if "://" in storage else earlier, estimate.add)
    at_once = fit.hosts or fit.trials if len(configs) > 1 else clients_at_once(configs[0], fit.hosts)
    gpus = max(gpus_held(config, there.gpus, fit.hosts, fit.trials) for config in configs)
    hours = estimate.on(at_once, fit.trials, gpus)
    yield Check("hours", "ok", hours.line("run it once on such machines").removeprefix("hours: "))
    if hours.source:
        yield Check("dollars", "ok", cost_of(cluster, fit.used, hours).line)


def _describe_capacity(kind: NodeType, configs: Sequence[ExperimentConfig]) -> str:
    on_ray = [config for config in configs if config.runtime.host == "ray"]
    if not on_ray:
        return "clients run inside the run's own process"
    machine = Node(kind.name, kind.cpus or 0.0, kind.gpus, kind.memory)
    fewest = min(min(places(config, machine), config.partition.num_clients) for config in on_ray)
    return f"{fewest} client host{'s fit' if fewest > 1 else ' fits'}" if fewest else "no client host fits"
