"""Choose torch's kernels on GPUs: those that give the same bits in every run, or the fastest ones."""

from __future__ import annotations

import os

from ..config.schema import ExperimentConfig

#: Of cuBLAS, which promises equal bits only with a workspace of fixed size; read when a process first uses it.
WORKSPACE = ":4096:8"


def choose_kernels(config: ExperimentConfig) -> None:
    """Follow ``runtime.deterministic`` in this process if ``config`` computes on CUDA here; else do nothing.

    Call it in every process that computes, before its first kernel, and again for another configuration. Operations
    without a deterministic kernel (a plug-in's, perhaps) warn and go on. Attention is then computed by matrix
    products: its fused kernels may sum in any order.
    """
    import torch

    if config.runtime.device != "cuda" or not torch.cuda.is_available():
        return
    wanted = config.runtime.deterministic
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # nothing reads such memory, and filling it takes time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = wanted
    torch.backends.cudnn.benchmark = not wanted  # it times kernels, and the fastest one can be another each time
    for enable in (
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_cudnn_sdp,
    ):
        enable(not wanted)
