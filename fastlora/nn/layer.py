"""The base of the LoRA layers: the adapter, and merging it into the base layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from .. import reference
from ..autograd.linear import lora_linear
from .linear4bit import Linear4bit
from .merge import MergeError
from .options import TRAIN_BIAS, LoraOptions

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class LoraModule(nn.Module):
    """Base of LoraLinear and QLoraLinear: the adapter, and merging it into `base_layer`."""

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
        # Drawn on the CPU in PEFT's order, so that a seed gives the same weights as in PEFT.
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
        """Draws new A and B; see `LoraOptions`. False leaves them as they are, as in PEFT."""
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
        """Further arguments of `lora_linear` for the base."""
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
        """True while the adapter is merged into the base layer's weight."""
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

        A merged layer stays as it is, and a weight to which nothing is added (B = 0) is not rounded
        anew. While merged, the state dict holds the merged weight.

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
        if not exact.to(dense.dtype).isfinite().all():
            raise ValueError("lora_A, lora_B: expected a finite merged weight, got inf or NaN")
        original = self._stored()
        # Without an update the stored weight is exact; a second rounding to 4 bits would change it.
        if not torch.equal(exact, dense.to(exact.dtype)):
            self._store(exact)
        self.merge_error = MergeError.of(dense, exact, self._dense_weight())
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

    def _stored(self) -> Any:
        """The base's weight as it is stored, for `_restore`."""
        raise NotImplementedError

    def _store(self, exact: Tensor) -> None:
        """Stores `exact` as the base's weight, without a change to what `_stored` returned."""
        raise NotImplementedError

    def _restore(self, original: Any) -> None:
        raise NotImplementedError


def check_linear(linear: nn.Module) -> None:
    """Refuses a module that computes something other than nn.Linear."""
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        hint = "; use QLoraLinear.from_linear4bit" if hasattr(linear, "quant_state") else ""
        raise TypeError(f"linear must be an nn.Linear, got {type(linear).__name__}{hint}")
