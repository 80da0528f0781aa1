"""A cluster's file, read: what `ray up` or KubeRay would start, as machines. Nothing is contacted."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import RequestError, neighbours
from ..execution.ray_internals import known_providers, validate_cluster
from ..execution.ray_session import MEMORY_A_CPU
from ..execution.resource_plan import Node

KUBERAY = ("RayJob", "RayCluster")

#: Machines that a plan looks at, at most: larger limits are no machines that anybody counts on.
MOST_MACHINES = 512

#: KubeRay's fields by level: its types RayJobSpec, RayClusterSpec, HeadGroupSpec and WorkerGroupSpec (1.6).
_JOB = (
    "activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint",
    "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata",
    "preRunningDeadlineSeconds", "rayClusterSpec", "runtimeEnvYAML", "schedule", "shutdownAfterJobFinishes",
    "submissionMode", "submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished",
)  # fmt: skip
_CLUSTER = (
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "networkPolicy", "rayVersion", "suspend", "upgradeStrategy",
    "workerGroupSpecs",
)  # fmt: skip
_HEAD = ("enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template")
_WORKERS = (
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams",
    "replicas", "resources", "scaleStrategy", "suspend", "template",
)  # fmt: skip

_QUANTITY = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_QUANTITY |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True)
class Document:
    """The file as it stands. ``kind``: the provider of a `ray up` file, or kuberay."""

    path: str
    kind: str
    content: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Something that Ray or KubeRay would not take; ``fix`` says what it may be."""

    found: str
    fix: str = ""


@dataclass(frozen=True)
class NodeType:
    """A kind of machine. ``cpus`` is None where the file does not say; ``memory``: bytes that actors may ask for."""

    name: str
    cpus: float | None
    gpus: float
    memory: float
    least: int
    most: int
    image: str  # of its container; empty where Ray runs on the machine itself
    starts: tuple[str, ...]  # the shell commands that start Ray
    content: Mapping[str, Any]  # the provider's own part: node_config, or the pod's spec

    @property
    def spot(self) -> bool:
        """Whether the provider may take it away."""
        market = (self.content.get("InstanceMarketOptions") or {}).get("MarketType")
        schedules = self.content.get("scheduling") or []
        for schedule in [schedules] if isinstance(schedules, Mapping) else schedules:
            if schedule.get("provisioningModel") == "SPOT" or schedule.get("preemptible"):
                return True
        return market == "spot"


@dataclass(frozen=True)
class Cluster:
    """What would be started: a head, and up to ``most`` workers of these types."""

    document: Document
    content: Mapping[str, Any]  # with Ray's defaults filled in
    head: NodeType
    workers: tuple[NodeType, ...]
    most: int

    @property
    def types(self) -> tuple[NodeType, ...]:
        return (self.head, *self.workers)

    def nodes(self, gpus: bool) -> list[Node] | None:
        """All machines that there may be at once, the head first; None where the file does not say what they have.

        Where not every type may come in full, those with GPUs come first if ``gpus``, else last.
        """
        if any(kind.cpus is None for kind in self.types):
            return None
        found = [Node(self.head.name, self.head.cpus or 0.0, self.head.gpus, self.head.memory)]
        for kind in sorted(self.workers, key=lambda kind: bool(kind.gpus) != gpus):
            room = min(kind.most, self.most + 1 - len(found), MOST_MACHINES - len(found))
            found += [
                Node(f"{kind.name} {number + 1}", kind.cpus or 0.0, kind.gpus, kind.memory, to_come=True)
                for number in range(room)
            ]
        return found


def load(path: str) -> Document:
    """The file at ``path``; ``RequestError`` where it is none that `ray up` or KubeRay could take."""
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise RequestError(f"--cluster {path}: it cannot be read ({reason})") from None
    try:
        parts = [part for part in yaml.safe_load_all(text) if part is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise RequestError(f"--cluster {path}: it is not YAML ({where}{getattr(error, 'problem', error)})") from None
    for part in parts:
        if isinstance(part, dict) and part.get("kind") in KUBERAY:
            return Document(path, "kuberay", part)
    first = parts[0] if parts else None
    provider = first.get("provider") if isinstance(first, dict) else None
    if not isinstance(provider, dict) or not isinstance(provider.get("type"), str):
        raise RequestError(
            f"--cluster {path}: it is neither a file for `ray up` (no provider.type) nor a KubeRay manifest "
            f"(kind {' or '.join(KUBERAY)})"
        )
    return Document(path, provider["type"], first)


def understand(document: Document) -> tuple[Cluster | None, list[Problem]]:
    """The cluster that the file asks for, and what is wrong with it; no cluster where that hides what is meant."""
    if document.kind == "kuberay":
        faults = list(_kuberay_faults(document.content))
        return (None, faults) if any(not fault.fix for fault in faults) else (_of_kuberay(document), faults)
    prepared, faults = _prepared(document)
    return (None if prepared is None else _of_ray_up(document, prepared)), faults


# --- files for `ray up` ----------------------------------------------------------------------------------------------


def _prepared(document: Document) -> tuple[dict[str, Any] | None, list[Problem]]:
    """The content with Ray's defaults, as Ray's own validation takes it; unknown keys are told, and left out."""
    import click

    providers = known_providers()
    if document.kind not in providers:
        return None, [Problem(f"provider.type: Ray knows no {document.kind}", neighbours(document.kind, providers))]
    content, faults = copy.deepcopy(document.content), []
    while True:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                return validate_cluster(copy.deepcopy(content)), faults
        except Exception as error:  # whatever Ray raises says what is wrong
            way = list(getattr(error, "absolute_path", ()))
            unknown = []
            if getattr(error, "validator", None) == "additionalProperties":
                place = _reach(content, way)
                unknown = sorted(set(place) - set(error.schema["properties"]), key=str)
            for key in unknown:
                name = ".".join(map(str, [*way, key]))
                faults.append(
                    Problem(f"{name}: Ray knows no such key", neighbours(str(key), error.schema["properties"]))
                )
                del place[key]
            if unknown:
                continue
            if isinstance(error, click.ClickException):
                message = said.getvalue().strip() or error.message
            else:
                message = str(getattr(error, "message", error))
            where = f"{'.'.join(map(str, way))}: " if way else ""
            return None, [*faults, Problem(where + " ".join(message.split()))]


def _reach(content: Any, way: list[Any]) -> dict[str, Any]:
    for step in way:
        content = content[step]
    return content


def _of_ray_up(document: Document, content: dict[str, Any]) -> Cluster:
    head, docker = content["head_node_type"], content.get("docker") or {}
    types = {}
    for name, kind in content["available_node_types"].items():
        role, has = ("head" if name == head else "worker"), kind.get("resources") or {}
        own = (kind.get("docker") or {}).get("worker_image") if role == "worker" else None
        cpus = has.get("CPU")
        types[name] = NodeType(
            name=name,
            cpus=cpus,
            gpus=float(has.get("GPU", 0)),
            memory=float(has.get("memory") or (cpus or 0) * MEMORY_A_CPU),
            least=kind.get("min_workers", 0),
            most=kind.get("max_workers", 0),
            image=own or docker.get(f"{role}_image") or docker.get("image") or "",
            starts=tuple(content[f"{role}_start_ray_commands"]),
            content=kind.get("node_config") or {},
        )
    local = document.kind == "local"  # the head and the workers are of one type there
    workers = tuple(kind for name, kind in types.items() if name != head or local)
    if local:
        starts = tuple(content["worker_start_ray_commands"])
        workers = tuple(replace(kind, name="worker", starts=starts) for kind in workers)
    return Cluster(
        document, content, replace(types[head], name="head" if local else head), workers, content["max_workers"]
    )


# --- KubeRay ---------------------------------------------------------------------------------------------------------


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def cluster_spec(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A manifest's spec of the Ray cluster."""
    spec = mapping(content.get("spec"))
    return spec if content["kind"] == "RayCluster" else mapping(spec.get("rayClusterSpec"))


def _groups(spec: Mapping[str, Any]) -> list[tuple[str, Any, tuple[str, ...]]]:
    """The head's group and the workers': where, what, the fields that there are."""
    workers = spec.get("workerGroupSpecs") or []
    return [
        ("headGroupSpec", spec.get("headGroupSpec"), _HEAD),
        *((f"workerGroupSpecs.{number}", group, _WORKERS) for number, group in enumerate(workers)),
    ]


def _kuberay_faults(content: Mapping[str, Any]) -> Iterator[Problem]:
    """A fault without a mend hides what is meant."""
    if content.get("apiVersion") != "ray.io/v1":
        yield Problem(f"apiVersion = {content.get('apiVersion')}: KubeRay's is another", "apiVersion: ray.io/v1")
    if not mapping(content.get("metadata")).get("name"):
        yield Problem("metadata.name: missing", "name it")
    above, spec = "spec", cluster_spec(content)
    if content["kind"] == "RayJob":
        above, job = "spec.rayClusterSpec", mapping(content.get("spec"))
        yield from _unknown(job, _JOB, "spec")
        if not job.get("entrypoint"):
            yield Problem("spec.entrypoint: missing", "entrypoint: mosaic sweep ...")
    if not spec:
        yield Problem(f"{above}: missing, so there is no cluster to look at")
        return
    yield from _unknown(spec, _CLUSTER, above)
    for name, group, known in _groups(spec):
        where = f"{above}.{name}"
        if not mapping(_container(mapping(group))):
            yield Problem(f"{where}.template.spec.containers: missing, so there is no machine to look at")
            continue
        yield from _unknown(group, known, where)
        if known is _WORKERS and not group.get("groupName"):
            yield Problem(f"{where}.groupName: missing, and required")
        if "rayStartParams" not in group:
            yield Problem(f"{where}.rayStartParams: missing, and required", "rayStartParams: {}")
        try:
            _machine(name, group, None)
        except ValueError as error:
            yield Problem(f"{where}: {error}")


def _unknown(content: Mapping[str, Any], known: tuple[str, ...], where: str) -> Iterator[Problem]:
    for key in content:
        if key not in known:
            yield Problem(f"{where}.{key}: KubeRay knows no such field", neighbours(str(key), known))


def _pod(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(group.get("template")).get("spec"))


def _container(group: Mapping[str, Any]) -> Any:
    """The one that runs Ray: the first."""
    containers = _pod(group).get("containers")
    return containers[0] if isinstance(containers, list) and containers else None


def _of_kuberay(document: Document) -> Cluster:
    spec = cluster_spec(document.content)
    scales = bool(spec.get("enableInTreeAutoscaling"))
    head = _machine("head", spec["headGroupSpec"], None)
    workers = tuple(_machine(group["groupName"], group, scales) for group in spec.get("workerGroupSpecs") or [])
    return Cluster(document, document.content, head, workers, sum(kind.most for kind in workers))


def _machine(name: str, group: Mapping[str, Any], scales: bool | None) -> NodeType:
    """A group's pods; ``scales``: whether their number follows demand (None: there is one)."""
    container = _container(group)
    asks = mapping(container.get("resources"))
    has = dict(asks.get("requests") or {}) | dict(asks.get("limits") or {})
    params = mapping(group.get("rayStartParams"))
    cpus = params.get("num-cpus", has.get("cpu"))
    replicas = group.get("replicas", group.get("minReplicas", 0)) or 0
    least, most = (0, 0) if scales is None else (replicas, replicas)
    if scales:
        least, most = group.get("minReplicas") or 0, group.get("maxReplicas", 2**31 - 1)
    each = group.get("numOfHosts", 1)
    return NodeType(
        name=name,
        cpus=None if cpus is None else quantity(cpus),
        gpus=sum(quantity(amount) for resource, amount in has.items() if resource.endswith("/gpu")),
        memory=quantity(has["memory"]) if "memory" in has else quantity(cpus or 0) * MEMORY_A_CPU,
        least=least * each,
        most=most * each,
        image=str(container.get("image") or ""),
        starts=(),
        content=_pod(group),
    )


def quantity(word: Any) -> float:
    """Kubernetes' way of writing an amount: 500m, 8, 28Gi."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|[KMGT]i|[MGT]|)", str(word))
    if not match:
        raise ValueError(f"{word} is no amount; it takes such as 4, 500m or 16Gi")
    return float(match[1]) * _QUANTITY[match[2]]
