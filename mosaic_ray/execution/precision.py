"""Whether the processor computes in bf16 natively."""

from __future__ import annotations


def has_native_bf16(cuda: bool) -> bool:
    """Read it from what the processor declares; nothing is timed, so every start on a machine gives the same answer.

    ``cuda``: ask the GPUs, which all need compute capability 8.0 or more; without a usable GPU the CPU is asked, which
    needs AVX512-BF16, AMX-BF16 or Arm's BF16. Emulated bf16 does not count.
    """
    import torch

    if cuda and torch.cuda.is_available():
        return all(torch.cuda.get_device_capability(gpu) >= (8, 0) for gpu in range(torch.cuda.device_count()))
    flags = torch.cpu.get_capabilities()
    return any(flags.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))
