"""Peak memory: what the GPU allocated, or what this process held."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> None:
    """Gives free memory back and resets the peak, so that loading the model doesn't count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    if sys.platform == "linux":
        # glibc keeps freed memory; musl and preloaded allocators have no malloc_trim.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            # A locked-down container: the peak then includes loading, as ru_maxrss would.
            return


def peak_memory(device: torch.device) -> int:
    """Peak bytes since `reset_peak_memory`: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
