"""LoRA and QLoRA linear layers for models of one's own. Parameters are named as PEFT names them.

State-dict keys are `base_layer.weight`, `base_layer.bias`, `lora_A.<adapter_name>.weight` and
`lora_B.<adapter_name>.weight`; a 4-bit base adds bitsandbytes' keys (`base_layer.weight.absmax`,
...). So checkpoints go to and from PEFT's own layers unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast

import torch
from torch import Tensor, nn

from . import ops, reference
from .autograd import lora_linear
from .quant import QuantState, as_quant_state, packed_bytes

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

TRAIN_BIAS = ("none", "lora_only", "all")


class LoraOptions(TypedDict, total=False):
    """Keywords that every constructor of `LoraLinear` and `QLoraLinear` takes; PEFT's defaults.

    r: rank, 8.
    lora_alpha: the LoRA term is scaled by `lora_alpha / r`, 8.
    use_rslora: scale by `lora_alpha / sqrt(r)` instead, False.
    lora_dropout: probability of dropping an element of x on the LoRA path, 0.
    train_bias: PEFT's `bias`: "none" freezes the base layer's bias; "lora_only" and "all", which
        are the same for a single layer, train it. "none".
    init_lora_weights: True: A kaiming-uniform (a = sqrt(5)), B zero; "gaussian": A normal with
        std 1 / r, B zero; False: A and B both kaiming-uniform, for tests. True.
    adapter_dtype: dtype of A and B, fp32 as PEFT's, also over a bf16 base. fp32.
    adapter_name: the name in the state-dict keys, "default".
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    lora_dropout: float
    train_bias: Literal["none", "lora_only", "all"]
    init_lora_weights: bool | Literal["gaussian"]
    adapter_dtype: torch.dtype
    adapter_name: str


class QuantOptions(TypedDict, total=False):
    """Keywords of the constructors that quantise.

    quant_type: "nf4" or "fp4", "nf4".
    blocksize: elements per absmax, 64.
    compress_statistics: absmax in 8 bits, True as in bitsandbytes' Linear4bit.
    compute_dtype: dtype of the base product; x's when None. None.
    """

    quant_type: str
    blocksize: int
    compress_statistics: bool
    compute_dtype: torch.dtype | None


class QLoraOptions(LoraOptions, QuantOptions, total=False):
    """`LoraOptions` and `QuantOptions`."""


@dataclass(frozen=True)
class MergeError:
    """By how much a merged weight W', as it is stored, misses `E = W + scaling * B A`.

    max_abs: `max|W' - E|`.
    relative: `||W' - E|| / ||E||` (Frobenius).
    relative_to_update: `||W' - E|| / ||E - W||`; near or above 1, rounding drowns the adapter.
    """

    max_abs: float
    relative: float
    relative_to_update: float


class Linear4bit(nn.Module):
    """`y = x W^T + bias`, W stored in 4 bits and frozen.

    The packed bytes are the uint8 parameter `weight`, `[(N K + 1) // 2, 1]`; `quant_state` holds
    the rest. No cast of the module reaches either of them; moves between devices do.

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
        blocksize: int = 64,
        compress_statistics: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """Quantises the weight of `linear`; the bias is shared with it."""
        packed, state = ops.quantize_4bit(
            linear.weight.detach(), blocksize, quant_type, compress_statistics
        )
        return cls(packed, state, linear.bias, compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to y [..., N], in x's dtype."""
        # A rank-1 adapter of zeros: the base product alone, by the kernel that serves QLoraLinear.
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
        self.quant_state = _map_state(move, self.quant_state)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self.quant_state.as_dict().items():
            destination[f"{prefix}weight.{key}"] = value

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
        weight_key = f"{prefix}weight"
        entries = {
            key.removeprefix(f"{weight_key}."): value
            for key, value in state_dict.items()
            if key.startswith(f"{weight_key}.")
        }
        own = {k: v for k, v in state_dict.items() if not k.startswith(f"{weight_key}.")}
        if weight_key in own:
            own[weight_key] = packed_bytes(own[weight_key])[:, None]
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if not entries:
            missing_keys += [f"{weight_key}.{key}" for key in self.quant_state.as_dict()]
            return
        try:
            state = QuantState.from_dict(entries)
        except ValueError as error:
            error_msgs.append(f"{weight_key}: {error}")
            return
        if state.shape != self.quant_state.shape:
            error_msgs.append(
                f"{weight_key}: shape must be {tuple(self.quant_state.shape)}, "
                f"got {tuple(state.shape)}"
            )
            return
        if not local_metadata.get("assign_to_params_buffers", False):
            device = self.weight.device
            state = _map_state(lambda t: t.to(device, copy=True), state)
        self.quant_state = state


class _LoraModule(nn.Module):
    """What LoraLinear and QLoraLinear share: the adapter, and merging it into `base_layer`."""

    base_layer: nn.Linear | Linear4bit

    def _attach(
        self,
        base_layer: nn.Linear | Linear4bit,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
        train_bias: Literal["none", "lora_only", "all"] = "none",
        init_lora_weights: bool | Literal["gaussian"] = True,
        adapter_dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:
        if r < 1:
            raise ValueError(f"r must be 1 or more, got {r}")
        if not 0.0 <= lora_dropout <= 1.0:
            raise ValueError(f"lora_dropout must be between 0 and 1, got {lora_dropout}")
        if train_bias not in TRAIN_BIAS:
            raise ValueError(f"train_bias must be one of {TRAIN_BIAS}, got {train_bias!r}")
        if train_bias != "none" and base_layer.bias is None:
            raise ValueError(f"train_bias must be 'none' without a bias, got {train_bias!r}")
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.lora_dropout = lora_dropout
        self.adapter_name = adapter_name
        self.merge_error: MergeError | None = None
        self._original: Any = None

        base_layer.weight.requires_grad_(False)
        if base_layer.bias is not None:
            base_layer.bias.requires_grad_(train_bias != "none")
        # Made on the CPU in PEFT's order, so that a seed gives the weights that PEFT would draw.
        lora_A = nn.Linear(self.in_features, r, bias=False)
        lora_B = nn.Linear(r, self.out_features, bias=False)
        self.lora_A = nn.ModuleDict({adapter_name: lora_A})
        self.lora_B = nn.ModuleDict({adapter_name: lora_B})
        self.reset_lora_parameters(init_lora_weights)
        for adapter in (lora_A, lora_B):
            if base_layer.weight.is_floating_point():
                # PEFT's adapters pass through the base's dtype before they are widened.
                adapter.to(base_layer.weight.dtype)
            adapter.to(base_layer.weight.device, adapter_dtype)

    def reset_lora_parameters(self, init_lora_weights: bool | Literal["gaussian"] = True) -> None:
        """Draws A and B anew; see `LoraOptions`. False leaves them as they are, as PEFT's does."""
        if init_lora_weights is False:
            return
        if init_lora_weights is True:
            nn.init.kaiming_uniform_(self._A, a=math.sqrt(5))
        elif init_lora_weights == "gaussian":
            nn.init.normal_(self._A, std=1 / self.r)
        else:
            raise ValueError(
                f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}"
            )
        nn.init.zeros_(self._B)

    @classmethod
    def _around(cls, base_layer: nn.Linear | Linear4bit, **lora: Unpack[LoraOptions]) -> Self:
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._attach(base_layer, **lora)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to y [..., N], in x's dtype."""
        if self.merged:
            return cast(Tensor, self.base_layer(x))
        return lora_linear(
            x,
            self.weight,
            self.bias,
            self._A,
            self._B,
            self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
            **self._base_options(),
        )

    def _base_options(self) -> dict[str, Any]:
        """What `lora_linear` must know of the base, beside weight and bias."""
        return {}

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: dense, or packed bytes."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return cast("Tensor | None", self.base_layer.bias)

    @property
    def merged(self) -> bool:
        """True while the adapter stands inside the base layer's weight."""
        return self.merge_error is not None

    @property
    def _A(self) -> Tensor:
        return self.lora_A[self.adapter_name].weight  # type: ignore[return-value]

    @property
    def _B(self) -> Tensor:
        return self.lora_B[self.adapter_name].weight  # type: ignore[return-value]

    @torch.no_grad()
    def merge(self, *, keep_original: bool = True) -> MergeError:
        """`W <- W + scaling * B A`, in the base's own storage; forward then skips the adapter.

        A merged layer stays as it is. While merged, the state dict holds the merged weight.

        Args:
            keep_original: keep the old weight beside the new one, so that `unmerge` restores it bit
                for bit. False frees it; the merge is then final.

        Returns:
            The rounding error of the merged weight, also kept as `merge_error`.

        Raises:
            ValueError: the merged weight is not finite; nothing has changed.
        """
        if self.merge_error is not None:
            return self.merge_error
        dense = self._dense_weight()
        exact = reference.merge_weight(dense, self._A, self._B, self.scaling)
        if not exact.isfinite().all():
            raise ValueError("lora_A, lora_B: expected a finite merged weight, got inf or NaN")
        original = self._store(exact)
        off = self._dense_weight().to(exact.dtype) - exact
        size = torch.linalg.vector_norm(off)
        self.merge_error = MergeError(
            max_abs=float(off.abs().amax()) if off.numel() else 0.0,
            relative=_ratio(size, torch.linalg.vector_norm(exact)),
            relative_to_update=_ratio(size, torch.linalg.vector_norm(exact - dense)),
        )
        self._original = original if keep_original else None
        return self.merge_error

    def unmerge(self) -> None:
        """Puts back the weight from before `merge`, bit for bit. A layer not merged stays as it is.

        Raises:
            RuntimeError: the layer was merged with `keep_original=False`.
        """
        if self.merge_error is None:
            return
        if self._original is None:
            raise RuntimeError("merge(keep_original=False) is final: the old weight was not kept")
        self._restore(self._original)
        self._original = self.merge_error = None

    def extra_repr(self) -> str:
        text = f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:.4g}"
        if self.lora_dropout > 0.0:
            text += f", lora_dropout={self.lora_dropout}"
        if self.bias is not None and self.bias.requires_grad:
            text += ", train_bias=True"
        return text + (", merged=True" if self.merged else "")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A weight loaded under a merged adapter would be undone by the next unmerge.
        if self.merged:
            raise RuntimeError("unmerge() the layer before loading a state dict into it")
        super()._load_from_state_dict(*args, **kwargs)

    def _dense_weight(self) -> Tensor:
        raise NotImplementedError

    def _store(self, exact: Tensor) -> Any:
        """Stores `exact` as the base's weight; returns what `_restore` needs to undo that."""
        raise NotImplementedError

    def _restore(self, original: Any) -> None:
        raise NotImplementedError


class LoraLinear(_LoraModule):
    """`y = x W^T + bias + scaling * drop(x) A^T B^T`, W frozen.

    Args:
        in_features, out_features, bias, device, dtype: of the base layer, as nn.Linear's.
        lora: see `LoraOptions`.

    Raises:
        ValueError: an option is out of range.
    """

    base_layer: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **lora: Unpack[LoraOptions],
    ) -> None:
        super().__init__()
        self._attach(nn.Linear(in_features, out_features, bias, device, dtype), **lora)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **lora: Unpack[LoraOptions]) -> Self:
        """A LoRA layer around `linear`, which becomes its `base_layer` and is frozen.

        Raises:
            TypeError: `linear` computes something other than nn.Linear.
            ValueError: an option is out of range.
        """
        _check_linear(linear)
        return cls._around(linear, **lora)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._original is not None:
            self._original = fn(self._original)
        return self

    def _dense_weight(self) -> Tensor:
        return self.base_layer.weight.detach()

    def _store(self, exact: Tensor) -> Tensor:
        original = self.base_layer.weight.data
        self.base_layer.weight.data = exact.to(original.dtype)
        return original

    def _restore(self, original: Tensor) -> None:
        self.base_layer.weight.data = original


class QLoraLinear(_LoraModule):
    """`y = x W^T + bias + scaling * drop(x) A^T B^T`, W frozen in 4 bits.

    Args:
        in_features, out_features, bias, device: of the base layer, as nn.Linear's. Its weight is
            drawn as nn.Linear's and quantised, to be replaced by a state dict.
        dtype: of the weight before it is quantised, and of the bias.
        options: see `LoraOptions` and `QuantOptions`.

    Raises:
        ValueError: an option is out of range.
    """

    base_layer: Linear4bit

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[QLoraOptions],
    ) -> None:
        super().__init__()
        quant, lora = _split(options)
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._attach(Linear4bit.from_linear(linear, **quant), **lora)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Unpack[QLoraOptions]) -> Self:
        """A QLoRA layer with the quantised weight of `linear`, whose bias it shares.

        Args:
            linear: fp32, bf16 or fp16.
            options: see `LoraOptions` and `QuantOptions`.

        Raises:
            TypeError: `linear` computes something other than nn.Linear.
            ValueError: an option is out of range.
        """
        _check_linear(linear)
        quant, lora = _split(options)
        return cls._around(Linear4bit.from_linear(linear, **quant), **lora)

    @classmethod
    def from_linear4bit(cls, linear: nn.Module, **lora: Unpack[LoraOptions]) -> Self:
        """A QLoRA layer around the weight of a bitsandbytes Linear4bit, whose memory it shares.

        Raises:
            ValueError: the weight is not quantised yet, or was repacked in place by bitsandbytes;
                or an option is out of range.
        """
        weight, bias = linear.weight, linear.bias
        # Under FSDP the weight is a plain parameter, and only the module holds the state.
        state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
        if state is None:
            raise ValueError(
                "linear must hold a quantised weight, got one without quant_state; bitsandbytes "
                "quantises on `.to(device)`"
            )
        compute_dtype = getattr(linear, "compute_dtype", None)
        return cls._around(Linear4bit(weight, state, bias, compute_dtype), **lora)  # type: ignore[arg-type]

    def _base_options(self) -> dict[str, Any]:
        return {
            "quant_state": self.base_layer.quant_state,
            "compute_dtype": self.base_layer.compute_dtype,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._original is not None:
            device = self.base_layer.weight.device
            packed, state = self._original
            self._original = packed.to(device), state.to(device)
        return self

    def _dense_weight(self) -> Tensor:
        return ops.dequantize_4bit(
            self.base_layer.weight, self.base_layer.quant_state, torch.float32
        )

    def _store(self, exact: Tensor) -> tuple[Tensor, QuantState]:
        original = self.base_layer.weight.data, self.base_layer.quant_state
        old = original[1]
        packed, state = ops.quantize_4bit(exact, old.blocksize, old.quant_type, old.nested)
        state.dtype = old.dtype
        self._restore((packed, state))
        return original

    def _restore(self, original: tuple[Tensor, QuantState]) -> None:
        self.base_layer.weight.data, self.base_layer.quant_state = original


def _check_linear(linear: nn.Module) -> None:
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        hint = "; use QLoraLinear.from_linear4bit" if hasattr(linear, "quant_state") else ""
        raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}{hint}")


def _split(options: QLoraOptions) -> tuple[QuantOptions, LoraOptions]:
    names = QuantOptions.__annotations__
    quant = {key: value for key, value in options.items() if key in names}
    lora = {key: value for key, value in options.items() if key not in names}
    return cast("QuantOptions", quant), cast("LoraOptions", lora)


def _map_state(fn: Callable[[Tensor], Tensor], state: QuantState) -> QuantState:
    tensors = [None if t is None else fn(t) for t in state.tensors()]
    return state.with_tensors(*tensors)  # type: ignore[arg-type]


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if part else 0.0
