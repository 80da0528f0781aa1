"""Choose the torch device of a process, and find out whether a processor computes in bf16 natively."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..config.schema import ExperimentConfig

if TYPE_CHECKING:
    import torch


#: Where Linux lists the CPU's features.
CPUINFO = Path("/proc/cpuinfo")


def device_of(config: ExperimentConfig) -> torch.device:
    """Return the driver's device: CUDA where clients train in its process and torch finds it, else the CPU.

    Where clients train on GPUs of Ray's workers, the server's work runs there too (``server.Server``).
    """
    import torch

    inside = config.runtime.device == "cuda" and config.runtime.host == "serial"
    return torch.device("cuda" if inside and torch.cuda.is_available() else "cpu")


def has_native_bf16(cuda: bool) -> bool:
    """Return whether the processor declares native bf16; nothing is timed, so every start gives the same answer.

    ``cuda``: ask the GPUs, which all need compute capability 8.0 or more; without a usable GPU the CPU is asked, which
    needs AVX512-BF16, AMX-BF16 or Arm's BF16. Emulated bf16 does not count.
    """
    import torch

    if cuda and torch.cuda.is_available():
        return all(torch.cuda.get_device_capability(gpu) >= (8, 0) for gpu in range(torch.cuda.device_count()))
    return not _cpu_flags().isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def _cpu_flags() -> set[str]:
    """Return the names of the CPU's features; before torch 2.11 only on Linux, which has the same names."""
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, has in torch.cpu.get_capabilities().items() if has}
    return set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
