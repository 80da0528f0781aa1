"""Read a cluster's file: the machines that `ray up` or KubeRay would start. No machine is contacted."""

from __future__ import annotations

import contextlib
import copy
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import RequestError, neighbours
from ..execution.ray_internals import known_providers, validate_cluster
from ..execution.ray_session import MEMORY_A_CPU
from ..execution.resource_plan import Node
from .doctor import Check

KUBERAY = ("RayJob", "RayCluster")

#: The most machines that a plan considers; KubeRay's default limit is 2**31 - 1.
MOST_MACHINES = 512

_QUANTITY = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_QUANTITY |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@dataclass(frozen=True)
class Document:
    """The file as it stands. ``kind``: the provider of a `ray up` file, or kuberay."""

    kind: str
    content: dict[str, Any]


@dataclass(frozen=True)
class NodeType:
    """A kind of machine. ``cpus``: None if the file does not contain it; ``memory``: bytes that actors may request."""

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
        """Return whether the provider may take it away."""
        market = (self.content.get("InstanceMarketOptions") or {}).get("MarketType")
        schedules = self.content.get("scheduling") or []
        schedules = [schedules] if isinstance(schedules, Mapping) else schedules
        return market == "spot" or any(s.get("provisioningModel") == "SPOT" or s.get("preemptible") for s in schedules)


@dataclass(frozen=True)
class Cluster:
    """The machines of a file: a head, and up to ``most`` workers of these types."""

    document: Document
    content: Mapping[str, Any]  # with Ray's defaults filled in
    head: NodeType
    workers: tuple[NodeType, ...]
    most: int

    @property
    def types(self) -> tuple[NodeType, ...]:
        return (self.head, *self.workers)

    def nodes(self, gpus: bool) -> list[Node]:
        """Return all machines that there may be at once, the head first; a machine of unknown CPUs counts none.

        If ``most`` cuts the list, types with GPUs come first if ``gpus``, else last.
        """
        found = [Node(self.head.name, self.head.cpus or 0.0, self.head.gpus, self.head.memory)]
        for kind in sorted(self.workers, key=lambda kind: bool(kind.gpus) != gpus):
            count = min(kind.most, self.most + 1 - len(found), MOST_MACHINES - len(found))
            found += [
                Node(f"{kind.name} {number + 1}", kind.cpus or 0.0, kind.gpus, kind.memory, to_come=True)
                for number in range(count)
            ]
        return found


def load(path: str) -> Document:
    """Read the file at ``path``; ``RequestError`` if neither `ray up` nor KubeRay could take it."""
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
            return Document("kuberay", part)
    first = parts[0] if parts and isinstance(parts[0], dict) else {}
    provider = first.get("provider")
    if not isinstance(provider, dict) or not isinstance(provider.get("type"), str):
        raise RequestError(
            f"--cluster {path}: it is neither a file for `ray up` (no provider.type) nor a KubeRay manifest "
            f"(kind {' or '.join(KUBERAY)})"
        )
    return Document(provider["type"], first)


def understand(document: Document) -> Cluster | Check:
    """Return the cluster that the file describes, or the problem for which Ray or KubeRay would refuse it."""
    if document.kind == "kuberay":
        try:
            return _of_kuberay(document)
        except ValueError as error:
            return Check("schema", "problem", str(error))
    providers = known_providers()
    if document.kind not in providers:
        found = f"provider.type: Ray knows no {document.kind}"
        return Check("schema", "problem", found, neighbours(document.kind, providers))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            content = validate_cluster(copy.deepcopy(document.content))
    except RequestError:
        raise
    except Exception as error:  # of Ray or of jsonschema; its text names the problem
        where, schema = ".".join(map(str, getattr(error, "absolute_path", ()))), getattr(error, "schema", {})
        if getattr(error, "validator", None) == "additionalProperties":
            known = schema["properties"]
            key = min(set(error.instance) - set(known), key=str)  # type: ignore[attr-defined]
            name = f"{where}.{key}" if where else key
            return Check("schema", "problem", f"{name}: Ray knows no such key", neighbours(str(key), known))
        text = " ".join((printed.getvalue().strip() or str(getattr(error, "message", error))).split())
        return Check("schema", "problem", f"{where}: {text}" if where else text)
    return _of_ray_up(document, content)


def gpus_declared(path: str) -> bool:
    """Return whether machines of the file at ``path`` have GPUs; false where the file describes no cluster."""
    cluster = understand(load(path))
    return isinstance(cluster, Cluster) and sum(node.gpus for node in cluster.nodes(gpus=True)) >= 1


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
    top, workers = types[head], tuple(kind for name, kind in types.items() if name != head)
    if document.kind == "local":  # the head and the workers are of one type there
        starts = tuple(content["worker_start_ray_commands"])
        workers = tuple(replace(kind, name="worker", starts=starts) for kind in types.values())
        top = replace(top, name="head")
    return Cluster(document, content, top, workers, content["max_workers"])


def mapping(value: Any) -> Mapping[str, Any]:
    """Return ``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def cluster_spec(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a manifest's spec of the Ray cluster."""
    spec = mapping(content.get("spec"))
    return spec if content["kind"] == "RayCluster" else mapping(spec.get("rayClusterSpec"))


def _of_kuberay(document: Document) -> Cluster:
    """Read the machines of a manifest; ``ValueError`` if a part that describes them is missing.

    KubeRay's own definition checks everything else (``cluster_lint._fields``).
    """
    spec = cluster_spec(document.content)
    if not spec:
        raise ValueError("spec.rayClusterSpec: missing" if document.content["kind"] == "RayJob" else "spec: missing")
    scales = bool(spec.get("enableInTreeAutoscaling"))
    head = _machine("headGroupSpec", spec.get("headGroupSpec"), False)
    groups = enumerate(spec.get("workerGroupSpecs") or [])
    workers = tuple(_machine(f"workerGroupSpecs.{number}", group, scales) for number, group in groups)
    return Cluster(document, document.content, replace(head, name="head"), workers, sum(kind.most for kind in workers))


def _machine(where: str, group: Any, scales: bool) -> NodeType:
    """Read a group's pods; their first container runs Ray. ``scales``: whether their number follows demand."""
    pod = mapping(mapping(mapping(group).get("template")).get("spec"))
    containers = pod.get("containers")
    container = containers[0] if isinstance(containers, list) and containers else None
    if not isinstance(container, Mapping):
        raise ValueError(f"{where}.template.spec.containers: missing")
    asks = mapping(container.get("resources"))
    has = dict(asks.get("requests") or {}) | dict(asks.get("limits") or {})
    params = mapping(group.get("rayStartParams"))
    cpus = params.get("num-cpus", has.get("cpu"))
    if scales:
        least, most = group.get("minReplicas") or 0, group.get("maxReplicas", 2**31 - 1)
    else:
        least = most = group.get("replicas", group.get("minReplicas", 0)) or 0
    each = group.get("numOfHosts", 1)
    try:
        return NodeType(
            name=str(group.get("groupName") or where),
            cpus=None if cpus is None else quantity(cpus),
            gpus=sum(quantity(amount) for resource, amount in has.items() if resource.endswith("/gpu")),
            memory=quantity(has["memory"]) if "memory" in has else quantity(cpus or 0) * MEMORY_A_CPU,
            least=least * each,
            most=most * each,
            image=str(container.get("image") or ""),
            starts=(),
            content=pod,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def quantity(word: Any) -> float:
    """Parse an amount as Kubernetes writes it: 500m, 8, 28Gi."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|k|[KMGT]i|[MGT]|)", str(word))
    if not match:
        raise ValueError(f"{word} is no amount; it takes such as 4, 500m or 16Gi")
    return float(match[1]) * _QUANTITY[match[2]]
