"""The compiled backend: C++ kernels on CPUs, CUDA C++ kernels for 4-bit layers on GPUs."""

from __future__ import annotations

from ..contract import Backend, Request
from . import cpu, cuda
from .library import build_info, unavailable_reason

NAME = "native"
_CPU, _CUDA = cpu.Cpu(), cuda.Cuda()


def on(device: str) -> Backend:
    """The kernels for a torch device type."""
    return _CUDA if device == "cuda" else _CPU


def unsupported(request: Request) -> str | None:
    """One sentence that says why a request can't run here, or None."""
    return on(request.device).unsupported(request)
