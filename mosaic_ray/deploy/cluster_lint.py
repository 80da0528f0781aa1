"""Find problems of a cluster file before anything is started or paid."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from .capacity import ClusterRequest, machines, named_storage, plan_checks, storage_checks
from .cluster_spec import Cluster, cluster_spec, load, mapping, understand
from .doctor import Check

#: The mark in a shipped file for a value that its user must fill in.
FILL_IN = "FILL_IN"

TOKEN = "~/.ray/auth_token"  # where Ray looks for it
LOOPBACK = ("127.0.0.1", "localhost", "::1")

_SECRET_NAME = re.compile(r"(secret|password|passwd|access_?key|auth_?token|api_?key)$", re.IGNORECASE)
_SECRETS = (
    ("an AWS access key", re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY")),
    ("an access token", re.compile(r"\b(gh[pousr]|github_pat|hf|glpat)[_-][A-Za-z0-9_]{20,}")),
    ("a secret", re.compile(rf"{_SECRET_NAME.pattern[:-1]}=['\"]?[^\s'\"$~/][^\s'\"]{{7,}}", re.IGNORECASE)),
)


def examine_cluster(path: str, asked: ClusterRequest, storage: str | None = None) -> Iterator[Check]:
    """Yield every check of the file at ``path``; ``RequestError`` if it describes no cluster.

    ``storage``: the --storage option, or None. Local files are looked up from the working directory, as
    `ray up` does.
    """
    document = load(path)
    cluster = understand(document)
    if isinstance(cluster, Check):
        yield cluster
        yield Check("cluster", "problem", f"{path} cannot be understood further", "fix its schema first")
        return
    if document.kind == "kuberay":
        yield from _fields(path)
    else:
        yield Check("schema", "ok", f"{path} is as Ray {importlib.metadata.version('ray')} takes it")
    for where, text in _scalars(document.content):
        for word in re.findall(rf"\S*{FILL_IN}\S*", text):
            yield Check("fill in", "problem", f"{where} has {word}", f"put your own in place of {FILL_IN}")
    yield from _versions(cluster)
    yield from _files(cluster)
    yield from _token(cluster)
    yield from _ports(cluster)
    yield from _secrets(cluster)
    yield from machines(cluster)
    commands = _commands(cluster)
    yield from storage_checks(cluster, commands, storage)
    yield from plan_checks(cluster, asked, storage or named_storage(commands) or "./mosaic_runs")


def _fields(path: str) -> Iterator[Check]:
    """Let the KubeRay that kubectl reaches check every field of a manifest; nothing is made there (a dry run).

    An unknown field is a warning, since KubeRay ignores it.
    """
    command = ["kubectl", "apply", "--dry-run=server", "--request-timeout=10s", "-f", path]
    try:
        asked = subprocess.run(
            [*command, "--validate=warn"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30
        )
        lines = asked.stderr.strip().splitlines()
        failed = lines[-1] if asked.returncode and lines else ""
    except FileNotFoundError:
        lines, failed = [], "kubectl is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        lines, failed = [], f"kubectl gave no answer ({type(error).__name__})"
    unknown = dict.fromkeys(name for line in lines for name in re.findall(r'unknown field "([^"]+)"', line))
    for name in unknown:
        fix = "look for a misspelling, or install the KubeRay release that has it"
        yield Check("schema", "warning", f"{name}: KubeRay knows no such field and ignores it", fix)
    if failed.startswith("Error from server") or " is invalid:" in failed:
        yield Check("schema", "problem", failed, "change the field that it names")
    elif failed:
        found = f"{path} describes its machines; its fields were not checked: {failed}"
        by_hand = f"`{shlex.join([*command[:3], '-f', str(path)])}` checks them on a cluster with KubeRay"
        yield Check("schema", "ok", f"{found}; {by_hand}")
    elif not unknown:
        yield Check("schema", "ok", f"{path} is as the cluster's KubeRay takes it")


def _scalars(content: Any, where: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield from _scalars(value, f"{where}.{key}" if where else str(key))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield from _scalars(value, f"{where}.{number}")
    elif isinstance(content, str):
        yield where, content


def _commands(cluster: Cluster) -> list[str]:
    names = ("initialization_commands", "head_setup_commands", "worker_setup_commands")
    listed = [cluster.content.get(name) or [] for name in names]
    types = mapping(cluster.content.get("available_node_types")).values()
    listed += [kind.get("worker_setup_commands") or [] for kind in types]
    listed += [kind.starts for kind in cluster.types]
    job = mapping(cluster.content.get("spec")).get("entrypoint")
    return [*(command for commands in listed for command in commands), *([job] if job else [])]


def _versions(cluster: Cluster) -> Iterator[Check]:
    ray, python = importlib.metadata.version("ray"), sys.version_info[:2]
    here = f"Ray {ray} and Python {python[0]}.{python[1]} are here"
    declared: list[tuple[str, str]] = []  # where, Ray's version
    for image in dict.fromkeys(kind.image for kind in cluster.types if kind.image):
        name, _, tag = image.rpartition(":")
        version, minor = re.search(r"(\d+\.\d+\.\d+)", tag if name else ""), re.search(r"py3(\d+)", tag)
        if version:
            declared.append((f"image {image}", version[1]))
        else:
            severity = "problem" if "rayproject/ray" in image else "warning"
            fix = f"name one, such as rayproject/ray:{ray}-py3{python[1]}"
            yield Check("versions", severity, f"image {image} does not say which Ray it has", fix)
        if minor and int(minor[1]) < 11:
            fix = "mosaic-ray needs 3.11 or newer"
            yield Check("versions", "problem", f"image {image} has Python 3.{minor[1]}", fix)
        elif minor and int(minor[1]) != python[1]:
            fix = "submit by `ray job submit` or `ray exec`: a driver here cannot talk to it"
            yield Check("versions", "warning", f"image {image} has Python 3.{minor[1]}; {here}", fix)
    commands = " ".join(_commands(cluster))
    declared += [("a setup command", pin) for pin in re.findall(r"\bray(?:\[[^\]]*\])?==([0-9][0-9.]*)", commands)]
    if cluster.document.kind == "kuberay":
        ray_version = cluster_spec(cluster.content).get("rayVersion")
        if ray_version is None:
            yield Check("versions", "problem", "rayVersion is missing", f'rayVersion: "{ray}"')
        else:
            declared.append(("rayVersion", str(ray_version)))
    for file in re.findall(r"-c\s+(\S+)", commands):
        local = _local(cluster, file)
        text = local.read_text(encoding="utf-8") if local and local.is_file() else ""
        pinned = re.search(r"^ray==(\S+)", text, re.MULTILINE)
        declared += [(f"{local}", pinned[1])] if pinned else []
    wrong = dict.fromkeys((where, version) for where, version in declared if version != ray)
    for where, other in wrong:
        yield Check("versions", "problem", f"{where}: Ray {other}; {here}", f"let both be {ray}")
    if not declared and not any(kind.image for kind in cluster.types) and "-c " not in commands:
        yield Check("versions", "problem", "nothing says which Ray is installed", f"pip install 'ray[default]=={ray}'")
    if declared and not wrong:
        yield Check("versions", "ok", f"Ray {ray} on every node, as here")


def _local(cluster: Cluster, remote: str) -> Path | None:
    """Return the local file that is mounted as ``remote``; None without such a mount."""
    for there, here in mapping(cluster.content.get("file_mounts")).items():
        if remote == there or remote.startswith(there.rstrip("/") + "/"):
            return Path(here).expanduser() / remote[len(there) :].lstrip("/")
    return None


def _files(cluster: Cluster) -> Iterator[Check]:
    if cluster.document.kind == "kuberay":
        pip = "pip" in str(mapping(cluster.content.get("spec")).get("runtimeEnvYAML", ""))
        for kind in cluster.types:
            if kind.image.startswith("rayproject/") and not pip:
                fix = "build an image with the wheel; see docs/CLUSTER.md"
                yield Check("project", "problem", f"{kind.name}: image {kind.image} has no mosaic-ray", fix)
        return
    for there, here in mapping(cluster.content.get("file_mounts")).items():
        if not Path(here).expanduser().exists():
            fixes = {TOKEN: "ray get-auth-token --generate", "~/mosaic": "make wheel"}
            fix = fixes.get(there, "make it, or leave it out")
            yield Check("files", "problem", f"{here}, which becomes {there}, is not here", fix)
    commands = " ".join(_commands(cluster))
    wheels = re.findall(r"\S+\.whl\b", commands)
    if not wheels and not re.search(r"\bmosaic[-_]ray\b", commands):
        fix = "pip install ~/mosaic/mosaic_ray-*.whl"
        yield Check("project", "problem", "no setup command installs mosaic-ray", fix)
    for word in dict.fromkeys(wheels):
        pattern = _local(cluster, word)
        if pattern is None or not pattern.parent.is_dir():
            continue
        found = sorted(path.name for path in pattern.parent.glob(pattern.name))
        if len(found) != 1:
            yield Check("project", "problem", f"{pattern}: there are {len(found)} such files, not one", "make wheel")
        elif f"-{__version__}-" not in found[0]:
            yield Check("project", "problem", f"{found[0]} is another version; {__version__} is here", "make wheel")
        else:
            yield Check("project", "ok", f"{found[0]} is installed on every node")


def _token(cluster: Cluster) -> Iterator[Check]:
    if cluster.document.kind == "kuberay":
        mode = mapping(cluster_spec(cluster.content).get("authOptions")).get("mode")
        if mode != "token":
            yield Check("token", "problem", "the cluster asks nobody for a token", "authOptions: {mode: token}")
        else:
            yield Check("token", "ok", "KubeRay makes one, and every container asks for it")
        return
    starts = [(kind.name, *command.partition("ray start")) for kind in cluster.types for command in kind.starts]
    bare = [name for name, before, start, _ in starts if start and "RAY_AUTH_MODE=token" not in before]
    for name in dict.fromkeys(bare):
        fix = "RAY_AUTH_MODE=token ray start ..."
        yield Check("token", "problem", f"{name}: `ray start` is not in token mode, so anybody may run code there", fix)
    mounts = mapping(cluster.content.get("file_mounts"))
    paths = re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", " ".join(_commands(cluster)))
    token = next((Path(here).expanduser() for there, here in mounts.items() if there in (TOKEN, *paths)), None)
    if token is None:
        fix = f'file_mounts: {{"{TOKEN}": {TOKEN}}}'
        yield Check("token", "problem", "no file mount brings the token to the nodes", fix)
    elif token.is_file() and token.stat().st_mode & 0o077:
        fix = shlex.join(["chmod", "600", str(token)])
        yield Check("token", "warning", f"{token} may be read by others on this machine", fix)
    elif token.is_file() and not bare:
        yield Check("token", "ok", "brought to every node, and asked of everyone")


def _ports(cluster: Cluster) -> Iterator[Check]:
    found = []
    tunnel = "--dashboard-host=127.0.0.1, and `ray attach -p 8265`"
    for command in _commands(cluster):
        hosts = re.findall(r"--dashboard-host[= ](\S+)", command)
        found += [(f"the dashboard listens on {host}", tunnel) for host in hosts if host not in LOOPBACK]
        if re.search(r"\btensorboard\s+--", command):
            host = re.search(r"--host[= ](\S+)", command)
            if "--bind_all" in command or (host and host[1] not in LOOPBACK):
                found.append(("TensorBoard listens on every interface", "--host 127.0.0.1, and `ray attach -p 6006`"))
    group = mapping(mapping(cluster.content.get("provider")).get("security_group"))
    for rule in group.get("IpPermissions") or []:
        ranges = [*(rule.get("IpRanges") or []), *(rule.get("Ipv6Ranges") or [])]
        open_to = {r.get("CidrIp") or r.get("CidrIpv6") for r in ranges} & {"0.0.0.0/0", "::/0"}
        first, last = rule.get("FromPort"), rule.get("ToPort")
        if open_to and (first, last) != (22, 22):
            what = f"the security group opens ports {first} to {last} to the world"
            found.append((what, "name your own addresses"))
    if cluster.document.kind == "kuberay":
        head = mapping(cluster_spec(cluster.content).get("headGroupSpec"))
        service = mapping(mapping(head.get("headService")).get("spec")).get("type") or head.get("serviceType")
        if service in ("LoadBalancer", "NodePort"):
            found.append((f"the head's service is a {service}", "leave it a ClusterIP, and `kubectl port-forward`"))
        if head.get("enableIngress"):
            found.append(("enableIngress opens the dashboard", "leave it out, and `kubectl port-forward`"))
    for what, fix in found:
        yield Check("access", "problem", what, fix)
    if not found:
        yield Check("access", "ok", "dashboard and TensorBoard are reached through a tunnel alone")


def _secrets(cluster: Cluster) -> Iterator[Check]:
    """Check that the file holds no secrets; a finding contains the place, not the secret."""
    found = []
    for where, text in _scalars(cluster.document.content):
        name = where.rpartition(".")[2]
        what = next((what for what, pattern in _SECRETS if pattern.search(text)), None)
        if what is None and len(text) >= 8 and _SECRET_NAME.search(name) and text[0] not in "$~/":
            what = "a secret"
        if what:
            found.append((where, what))
    for kind in cluster.types:
        entries = [entry for pod in kind.content.get("containers") or [] for entry in pod.get("env") or []]
        names = [entry["name"] for entry in entries if entry.get("value")]
        found += [(f"{kind.name}: env {name}", "a secret") for name in names if _SECRET_NAME.search(name)]
    for where, what in dict.fromkeys(found):
        fix = "take it out: by file_mounts, a role of the machine or a Kubernetes secret it stays out of the file"
        yield Check("secrets", "problem", f"{where} holds {what}", fix)
    if not found:
        yield Check("secrets", "ok", "none stands in the file")
