"""Decide which devices a run uses: every ``auto`` of its configuration becomes a value before anything computes."""

from __future__ import annotations

import math

from ..config.resolve import override
from ..config.schema import ExperimentConfig
from ..core.errors import RequestError
from .precision import has_native_bf16
from .ray_session import Resources, connect, in_all, local_resources, machines_to_come, num_hosts

#: The most clients that share a GPU: more of them only wait for one another.
MOST_ON_A_GPU = 16

#: The share of a client if its memory is unknown.
USUAL_SHARE = 0.25


def settle(config: ExperimentConfig, there: Resources) -> ExperimentConfig:
    """Return ``config`` with a value for every ``auto`` of its devices: a pure function of its arguments.

    Device: CUDA if ``there`` are GPUs, unless the share is given (0: CPU). Share of a GPU: ``there.share``, but no more
    clients a GPU than CPUs and clients suffice for. Precision: bf16 where the device has it natively, else fp32. The
    share changes no number and no key. ``RequestError`` where a GPU is asked for and none is there.
    """
    knobs = config.runtime
    device, share = knobs.device, knobs.gpus_per_client
    if device == "auto":
        device = "cuda" if (there.gpus >= 1 if share == "auto" else share) else "cpu"
    if device == "cuda" and there.gpus < 1:
        asked = "device = cuda" if share == "auto" else f"gpus_per_client = {share:g}"
        hint = "GPUs that torch can use (runtime.device = cpu trains on CPUs)"
        raise RequestError(f"runtime.{asked}: there are {there.gpus:g} {hint if share == 'auto' else CPU_HINT}")
    if share == "auto":
        share = 0.0 if device == "cpu" else 1 / _clients_a_gpu(config, there)
    values = {"runtime.device": device, "runtime.gpus_per_client": share}
    if knobs.precision == "auto":
        native = there.bf16 if device == "cuda" and there.bf16 is not None else has_native_bf16(device == "cuda")
        values["runtime.precision"] = "bf16" if native else "fp32"
    return override(config, values)


CPU_HINT = "GPUs (0 runs clients on CPUs)"


def _clients_a_gpu(config: ExperimentConfig, there: Resources) -> int:
    if config.runtime.host == "serial":
        return 1
    gpus = int(there.gpus)
    bounds = [
        int(1 / (there.share or USUAL_SHARE) + 1e-9),
        math.ceil(config.partition.num_clients / gpus),
        int(there.cpus / gpus / config.runtime.cpus_per_client + 1e-9),
        MOST_ON_A_GPU,
    ]
    return max(1, min(bounds))


def describe(config: ExperimentConfig, there: Resources) -> str:
    """Return the line about the devices of a settled ``config``; empty where there is no GPU."""
    gpus = f"{there.gpus:g} GPU{'s' * (there.gpus != 1)}"
    if there.gpus < 1:
        return ""
    if config.runtime.device == "cpu":
        return f"{gpus}: not used, clients train on CPUs; --set runtime.device=cuda trains on GPUs"
    share = config.runtime.gpu_share
    each = "" if config.runtime.host == "serial" else f", {_number(share)} a GPU" if share <= 1 else f", {share:g} each"
    return f"{gpus}: clients train on them{each}; --set runtime.device=cpu keeps them on CPUs"


def _number(share: float) -> str:
    count = int(1 / share + 1e-9)
    return f"{count} client{'s' * (count != 1)}"


def resources_for(config: ExperimentConfig, address: str) -> Resources:
    """Return what clients of ``config`` may use: this machine, or the cluster at ``address`` with nodes to come.

    ``RequestError`` if no client fits: for lack of a GPU on this machine, before Ray starts, or on the cluster.
    """
    if config.runtime.host == "ray" and address != "local":
        there = in_all(connect(address), machines_to_come())
        num_hosts(settle(config, there), there)
        return there
    there = local_resources()
    settled = settle(config, there)
    if settled.runtime.device == "cuda":
        num_hosts(settled, there)
    return there
