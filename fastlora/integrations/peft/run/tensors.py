"""Tensors in another dtype or place."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`; the tensor itself where it is."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on `device`; from pinned memory, so that no GPU is waited for."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
