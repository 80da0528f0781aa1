"""Decide which devices a run uses: every ``auto`` of its configuration becomes a value before anything computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from ..config.client_layout import client_classifiers
from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from ..core.units import size
from .gpu_memory import ClientWork, estimated_bytes, largest, least_bytes, measure
from .precision import has_native_bf16
from .ray_session import Resources, connect, gpu_kinds, in_all, local_resources, machines_to_come, num_hosts
from .resource_plan import UNITS, Node

#: The most clients that share a GPU: more of them only wait for one another.
MOST_ON_A_GPU = 16

#: Clients that ``runtime.clients_per_batch = auto`` trains together on a GPU, and networks that leave it idle alone.
BATCH_ON_A_GPU, SMALL_NETWORKS = 8, ("cnn", "mobilenet")

#: The share of a client if its memory is unknown, and the bytes of a GPU if they are unknown.
USUAL_SHARE, USUAL_GPU_BYTES = 0.25, 16 * 2**30

#: Ray's names, in small letters, of GPUs that do not compute in bf16 natively.
WITHOUT_BF16 = ("k80", "p4", "p100", "t4", "v100")

#: Share of a GPU's memory that clients fill: allocators leave gaps.
MARGIN = 0.95


def settle(config: ExperimentConfig, there: Resources) -> ExperimentConfig:
    """Return ``config`` with a value for every ``auto`` of its devices: a pure function of its arguments.

    Device: CUDA if ``there`` are GPUs, unless the share is given (0: CPU). Share of a GPU: ``there.share``, but no more
    clients a GPU than CPUs and clients suffice for. Precision: bf16 where the device has it natively, else fp32. The
    share changes no number and no key. Ray Train: one worker where clients train on GPUs of Ray, else none; more would
    change the last bits, so they are for the user to set. ``RequestError`` where a GPU is asked for and none is there.
    """
    knobs = config.runtime
    device, share = knobs.device, knobs.gpus_per_client
    if device == "auto":
        device = "cuda" if (there.gpus >= 1 if share == "auto" else share) else "cpu"
    if device == "cuda" and there.gpus < 1:
        if share == "auto":
            raise RequestError("runtime.device = cuda: there are 0 GPUs that torch can use (cpu trains on CPUs)")
        raise RequestError(f"runtime.gpus_per_client = {share:g}: there are 0 GPUs (0 runs clients on CPUs)")
    if isinstance(share, str):
        share = 0.0 if device == "cpu" else share_for(_clients_a_gpu(config, there))
    if 0 < share < there.least_share:
        share = there.least_share
    values = {"runtime.device": device, "runtime.gpus_per_client": share}
    if knobs.precision == "auto":
        native = there.bf16 if device == "cuda" and there.bf16 is not None else has_native_bf16(device == "cuda")
        values["runtime.precision"] = "bf16" if native else "fp32"
    if knobs.clients_per_batch == "auto":
        small = {config.model.classifier, *client_classifiers(config)} <= set(SMALL_NETWORKS)
        values["runtime.clients_per_batch"] = BATCH_ON_A_GPU if device == "cuda" and small else 1
    if config.distill.workers == "auto":
        values["distill.workers"] = int(device == "cuda" and knobs.host == "ray")
    return override(config, values)


def _clients_a_gpu(config: ExperimentConfig, there: Resources) -> int:
    if config.runtime.host == "serial":
        return 1
    gpus = int(there.gpus)
    bounds = [
        _slots(there.share or USUAL_SHARE),
        math.ceil((config.partition.num_clients + 1) * max(1, there.runs) / gpus),  # clients and server
        int(there.cpus / gpus / config.runtime.cpus_per_client + 1e-9),
        MOST_ON_A_GPU,
    ]
    # a sweep's clients and its server's work are held at once
    return max(2 if there.runs and gpus == 1 else 1, min(bounds))


def halved(share: float) -> float:
    """Return the share with half as many clients a GPU; the same where it holds one client already."""
    return share_for(_slots(share) // 2) if share < 1 else share


def share_for(clients: int) -> float:
    """Return the share of a GPU that so many clients hold, at least one, in Ray's units: a GPU holds six of 0.1666."""
    return UNITS // max(1, clients) / UNITS


def _slots(share: float) -> int:
    return int(1 / share + 1e-9)


def describe(config: ExperimentConfig, there: Resources) -> str:
    """Return the line about the devices of a settled ``config``; empty where there is no GPU."""
    gpus = f"{there.gpus:g} GPU{'s' * (there.gpus != 1)}"
    if there.gpus < 1:
        return ""
    if config.runtime.device == "cpu":
        return f"{gpus}: not used, clients train on CPUs; --set runtime.device=cuda trains on GPUs"
    share = config.runtime.gpu_share
    each = "" if config.runtime.host == "serial" else f", {on_a_gpu(share)}" if share <= 1 else f", {share:g} each"
    return f"{gpus}: clients train on them{each}; --set runtime.device=cpu keeps them on CPUs"


def on_a_gpu(share: float) -> str:
    """Format the number of clients that share a GPU: ``8 clients a GPU``."""
    return f"{_slots(share)} client{'s' * (_slots(share) != 1)} a GPU"


def resources_for(config: ExperimentConfig, address: str) -> Resources:
    """Return what clients of ``config`` may use: this machine, or the cluster at ``address`` with nodes to come.

    ``RequestError`` if no client fits: for lack of a GPU on this machine, before Ray starts, or on the cluster.
    """
    if config.runtime.host == "ray" and address != "local":
        there = in_all(connect(address), machines_to_come())
        num_hosts(settle(config, there), there)
        return there
    there = of_nodes([local_resources()], "local")
    settled = settle(config, there)
    if settled.runtime.device == "cuda":
        num_hosts(settled, there)
    return there


def of_nodes(nodes: Sequence[Node | Resources], address: str) -> Resources:
    """Return the sum of ``nodes``, which are this machine where ``address`` is ``local``."""
    import torch

    there = in_all(Resources(0, 0, 0), nodes)
    if address != "local" or not torch.cuda.is_available():
        return there
    sizes = [torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count())]
    return replace(there, gpu_bytes=float(min(sizes)))


def with_estimate(there: Resources, works: Sequence[ClientWork]) -> Resources:
    """Return ``there`` with the share of a GPU that the largest of ``works`` is estimated to take."""
    try:
        peak = max(map(estimated_bytes, largest(works)), default=0)
    except Exception:  # a network of the user's own that has no shapes without memory
        peak = 0
    return replace(there, share=_share(peak, there.gpu_bytes or USUAL_GPU_BYTES) if peak else USUAL_SHARE)


def with_measurement(
    there: Resources, works: Sequence[ClientWork], address: str, say: Callable[[str], None]
) -> Resources:
    """Return ``there`` with what a GPU of the cluster at ``address`` tells: a client's share, whether bf16 is native.

    Joins Ray and runs the largest of ``works`` for a few steps, if a share or a precision is ``auto``. If that fails,
    ``say`` says why, and the share is estimated. ``RequestError`` for a share that cannot hold one client.
    """
    import torch

    works = [w for w in works if w.config.runtime.host == "ray" and settle(w.config, there).runtime.device == "cuda"]
    for work in works:
        _check_share(work, there)
    autos = [work for work in works if work.config.runtime.gpus_per_client == "auto"]
    elsewhere = not torch.cuda.is_available() and any(work.config.runtime.precision == "auto" for work in works)
    if not autos and not elsewhere:
        return there
    connect(address)
    kinds, up = gpu_kinds()
    if not up:
        say("waiting for a machine with a GPU, to measure on it how much of its memory a client takes")
    answers = measure(largest(autos), kinds, wait_for_machines=not up)
    found = [answer for answer in answers if answer is not None]
    if answers and not found:
        say(f"{there.gpus:g} GPUs: torch cannot use them on their machines")
        return replace(there, gpus=0.0)
    known = [facts for facts in found if facts.usable]
    if elsewhere:
        old = any(kind.partition(":")[2].lower() in WITHOUT_BF16 for kind in kinds)
        native = all(facts.bf16 for facts in known) if known else None
        there = replace(there, bf16=False if old else native)
    if known:
        there = replace(there, gpu_bytes=float(min(facts.usable for facts in known)))
    peaks = [_share(facts.peak, facts.usable) for facts in found if facts.peak]
    if peaks and len(peaks) == len(found):
        return replace(there, share=max(peaks))
    if autos:
        reason = next((facts.reason for facts in found if not facts.peak), "no GPU was free in time")
        say(f"the memory of a client on a GPU could not be measured ({reason}); it is estimated from shapes")
        there = with_estimate(there, autos)
    return there


def _share(peak: int, usable: float) -> float:
    return share_for(min(MOST_ON_A_GPU, int(usable * MARGIN // peak)))


def _check_share(work: ClientWork, there: Resources) -> None:
    """Raise ``RequestError`` if the share that ``work`` asks for cannot hold one client."""
    share = work.config.runtime.gpus_per_client
    if isinstance(share, str) or not 0 < share < 1 or not there.gpu_bytes:
        return
    try:
        least = least_bytes(work)
    except Exception:  # see ``with_estimate``
        return
    if share * there.gpu_bytes < least:
        raise RequestError(
            f"runtime.gpus_per_client = {share:g}: that is {size(share * there.gpu_bytes, 'GiB')} of a GPU, and one "
            f"client takes {size(least, 'GiB')} at least; give more, or auto"
        )
