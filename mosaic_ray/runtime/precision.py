"""bf16 where the processor has it natively and a small measurement says that it is faster."""

from __future__ import annotations

import statistics
import time


def has_native_bf16(cuda: bool) -> bool:
    """AVX512-BF16 or AMX on a CPU, compute capability 8 or more on a GPU; emulated bf16 does not count."""
    import torch

    if cuda and torch.cuda.is_available():
        return torch.cuda.get_device_capability()[0] >= 8
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def probe(cuda: bool = False, repeats: int = 5) -> str:
    """``bf16`` or ``fp32``: the faster of the two on a convolution forward and backward (medians, taken in turn)."""
    import torch

    if not has_native_bf16(cuda):
        return "fp32"
    device = torch.device("cuda" if cuda and torch.cuda.is_available() else "cpu")
    layer = torch.nn.Conv2d(64, 64, 3, padding=1).to(device)
    images = torch.ones(32, 64, 16, 16, device=device)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for attempt in range(repeats + 1):
        for half in (False, True):
            began = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = layer(images).float().square().mean()
            loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if attempt:  # the first pays for set-up
                seconds[half].append(time.perf_counter() - began)
    return "bf16" if statistics.median(seconds[True]) < 0.9 * statistics.median(seconds[False]) else "fp32"
