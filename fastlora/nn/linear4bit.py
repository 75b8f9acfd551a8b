"""A frozen linear layer in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from ..autograd.linear import lora_linear
from ..quant import FORMATS, as_quant_state, find_format, packed_bytes

if TYPE_CHECKING:
    from typing_extensions import Self


class Linear4bit(nn.Module):
    """`y = x W^T + bias`, W stored in 4 bits and frozen.

    The packed bytes are the uint8 parameter `weight`, `[(N K + 1) // 2, 1]`; `quant_state` holds
    the rest. No cast of the module reaches either of them; moves between devices do.

    A state dict has the keys of the format: bitsandbytes' for NF4 and FP4 (`weight`,
    `weight.absmax`, ...), those of gpt-oss checkpoints for MXFP4 (`weight_blocks`,
    `weight_scales`). A layer loads any of them, whatever its format was before.

    Args:
        packed: bytes of the packed weight, in any storage dtype; shared, not copied.
        quant_state: fastlora's or bitsandbytes'; its shape is (N, K).
        bias: [N] or None.
        compute_dtype: dtype of the base product; x's when None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        packed: Tensor,
        quant_state: Any,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.quant_state = as_quant_state(quant_state)
        if len(self.quant_state.shape) != 2:
            raise ValueError(
                f"quant_state.shape must be (N, K), got {tuple(self.quant_state.shape)}"
            )
        self.out_features, self.in_features = self.quant_state.shape
        self.weight = nn.Parameter(packed_bytes(packed)[:, None], requires_grad=False)
        self.register_parameter("bias", bias)
        self.compute_dtype = compute_dtype

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "nf4",
        blocksize: int | None = None,
        compress_statistics: bool | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """Quantises the weight of `linear`; the bias is shared with it. See `QuantOptions`."""
        if compress_statistics is None:
            compress_statistics = find_format(quant_type).nests
        packed, state = ops.quantize_4bit(
            linear.weight.detach(), blocksize, quant_type, compress_statistics
        )
        return cls(packed, state, linear.bias, compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to y [..., N], in x's dtype."""
        # A rank-1 adapter of zeros: only the base product, by the kernel of QLoraLinear.
        return lora_linear(
            x,
            self.weight,
            self.bias,
            torch.zeros(1, self.in_features, dtype=x.dtype, device=x.device),
            torch.zeros(self.out_features, 1, dtype=x.dtype, device=x.device),
            0.0,
            quant_state=self.quant_state,
            compute_dtype=self.compute_dtype,
        )

    def extra_repr(self) -> str:
        state = self.quant_state
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quant_type={state.quant_type}, "
            f"blocksize={state.blocksize}, nested={state.nested}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(lambda t: move(t) if t.dtype == torch.uint8 else fn(t), recurse)
        self.quant_state = self.quant_state.mapped(move)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key, state = f"{prefix}weight", self.quant_state
        entries = find_format(state.quant_type).to_entries(destination[key], state)
        if "" not in entries:
            del destination[key]
        for name, value in entries.items():
            destination[key + name] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, own_state = f"{prefix}weight", self.quant_state
        named = {k.removeprefix(key): v for k, v in state_dict.items() if k.startswith(key)}
        entries = {name: v for name, v in named.items() if _is_stored(name, v)}
        own = {k: v for k, v in state_dict.items() if k.removeprefix(key) not in entries}
        if "" in entries:
            own[key] = packed_bytes(entries[""])[:, None]
        state, found = None, next((fmt for fmt in FORMATS.values() if fmt.owns(entries)), None)
        if found is not None:
            try:
                packed, state = found.from_entries(entries, own_state)
            except ValueError as error:
                error_msgs.append(f"{key}: {error}")
            else:
                own[key] = packed_bytes(packed)[:, None]
        if state is not None and state.shape != own_state.shape:
            error_msgs.append(
                f"{key}: shape must be {tuple(own_state.shape)}, got {tuple(state.shape)}"
            )
            return
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if state is not None:
            if not local_metadata.get("assign_to_params_buffers", False):
                device = self.weight.device
                state = state.mapped(lambda t: t.to(device, copy=True))
            self.quant_state = state
            return
        missing_keys[:] = [k for k in missing_keys if k != key]
        if found is None:
            wanted = find_format(own_state.quant_type).to_entries(self.weight, own_state)
            missing_keys += [key + name for name in wanted if name not in entries]


def _is_stored(name: str, tensor: Tensor) -> bool:
    """Whether a state-dict entry is a part of a weight, by what follows the weight's name."""
    if name == "" or name.startswith("."):
        return True
    return any(fmt.owns({name: tensor}) for fmt in FORMATS.values())
