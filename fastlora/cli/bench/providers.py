"""Who is measured: PEFT, bitsandbytes and plain torch as they come, and fastlora."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from ... import ops
from ...autograd.linear import lora_linear
from ...backends import BACKENDS
from ...backends.contract import Request
from ...quant import QuantState
from . import baselines
from .case import DTYPES, SCALING, Case, Layer
from .inputs import Built, Setup, no_modes

LINEAR_MODES = ("forward", "backward", "step", "inference")


@dataclass(frozen=True)
class Provider:
    """A way to compute the layer.

    Args:
        name: on the command line and in the CSV.
        label: in tables and plots.
        build: makes copy number i from a Setup.
        adapter: "given" (the case's adapter dtype), "fp32", "x" (x's dtype) or None (no adapter).
        dropout: whose random numbers make the mask: "torch", "fastlora" or "own", which can't be
            replayed; then the result is checked without dropout.
        needs: packages that it imports, bitsandbytes for a 4-bit weight alone.
        once: it is built for every case anew, and takes one copy of the weight.
        modes: what it is measured in.
        unsupported: one sentence that says why it can't run a case on a device, or None.
    """

    name: str
    label: str
    build: Callable[[Setup, int], Built]
    adapter: str | None = "given"
    dropout: str = "fastlora"
    needs: tuple[str, ...] = ()
    once: bool = False
    modes: tuple[str, ...] = LINEAR_MODES
    unsupported: Callable[[Case, str], str | None] = lambda case, device: None

    def adapter_dtype(self, layer: Layer) -> str | None:
        """Dtype of A and B as a name in DTYPES; None without an adapter."""
        return {"given": layer.adapter_dtype, "fp32": "fp32", "x": layer.dtype, None: None}[
            self.adapter
        ]

    def why_not(self, case: Case, device: str) -> str | None:
        """One sentence that says why it can't run `case` on "cpu" or "cuda", or None."""
        missing = [
            name
            for name in self.needs
            if find_spec(name) is None
            and not (name == "bitsandbytes" and case.layer.quant == "none")
        ]
        if missing:
            return f"{' and '.join(missing)} not installed."
        return self.unsupported(case, device)


# ---- fastlora --------------------------------------------------------------------------------


def _fastlora_call(
    setup: Setup,
    weight: Tensor,
    state: QuantState | None,
    adapter: tuple[Tensor, Tensor],
    backend: str | None = None,
) -> Built:
    A, B = adapter
    dropout = setup.layer.dropout if A.shape[0] else 0.0
    training = True

    def call(x: Tensor) -> Tensor:
        return lora_linear(
            x,
            weight,
            None,
            A,
            B,
            SCALING,
            quant_state=state,
            dropout_p=dropout,
            training=training,
            backend=backend,
        )

    def train(on: bool) -> None:
        nonlocal training
        training = on

    return Built(call, tuple(t for t in adapter if t.requires_grad), train)


def _fastlora(backend: str | None = None, cast: bool = False) -> Callable[[Setup, int], Built]:
    def build(setup: Setup, index: int) -> Built:
        name = setup.layer.dtype if cast else setup.layer.adapter_dtype
        adapter = setup.adapter(getattr(torch, DTYPES[name]))
        return _fastlora_call(setup, *setup.weights[index], adapter, backend)

    return build


def _fastlora_peft(setup: Setup, index: int) -> Built:
    from ...integrations.peft import accelerate

    dtype = getattr(torch, DTYPES[setup.layer.adapter_dtype])
    return baselines.built(accelerate(baselines.peft_layer(setup, index, dtype), verbose=False))


def _fastlora_frozen(setup: Setup, index: int) -> Built:
    layer = setup.layer
    dtype = getattr(torch, DTYPES[layer.adapter_dtype])
    empty = (
        torch.empty(0, layer.K, dtype=dtype, device=setup.device),
        torch.empty(layer.N, 0, dtype=dtype, device=setup.device),
    )
    return _fastlora_call(setup, *setup.weights[index], empty)


def _fastlora_dense(setup: Setup, index: int) -> Built:
    adapter = setup.adapter(getattr(torch, DTYPES[setup.layer.adapter_dtype]))
    return _fastlora_call(setup, setup.dense[index % len(setup.dense)], None, adapter)


def _fastlora_dequantize(setup: Setup, index: int) -> Built:
    weight, state = _packed(setup, index)
    return Built(lambda x: ops.dequantize_4bit(weight, state, setup.dtype), (), no_modes)


def _fastlora_dequantize_out(setup: Setup, index: int) -> Built:
    weight, state = _packed(setup, index)
    out = setup.output
    return Built(lambda x: ops.dequantize_4bit(weight, state, out=out), (), no_modes)


def _packed(setup: Setup, index: int) -> tuple[Tensor, QuantState]:
    weight, state = setup.weights[index]
    assert state is not None
    return weight, state


# ---- who can run what ------------------------------------------------------------------------


def _only_4bit(case: Case, device: str) -> str | None:
    return "the weight is dense." if case.layer.quant == "none" else None


def _packed_for_cpu(case: Case, device: str) -> str | None:
    if reason := _only_4bit(case, device):
        return reason
    if case.layer.dtype != "bf16" or case.layer.N % 32:
        return "bitsandbytes repacks for bf16 and out_features divisible by 32."
    if device != "cpu":
        return "bitsandbytes repacks on CPUs alone."
    from bitsandbytes.functional import has_avx512bf16

    return None if has_avx512bf16() else "bitsandbytes repacks on CPUs with AVX512-BF16 alone."


def _native(case: Case, device: str) -> str | None:
    return BACKENDS["native"].unsupported(_request(case, device))


def _triton(case: Case, device: str) -> str | None:
    return BACKENDS["triton"].unsupported(_request(case, device))


def _request(case: Case, device: str) -> Request:
    layer = case.layer
    return Request(
        "lora_linear_fwd",
        device,
        dtype=getattr(torch, DTYPES[layer.dtype]),
        adapter_dtype=getattr(torch, DTYPES[layer.adapter_dtype]),
        four_bit=layer.quant != "none",
    )


def _native_4bit(case: Case, device: str) -> str | None:
    return _only_4bit(case, device) or _native(case, device)


def _not_fp32(case: Case, device: str) -> str | None:
    return "adapters are fp32 already." if case.layer.dtype == "fp32" else None


def _native_cast(case: Case, device: str) -> str | None:
    return _not_fp32(case, device) or _native(case, device)


_PEERS = ("peft", "bitsandbytes")
_ALL = (
    Provider(
        "frozen",
        "frozen layer alone",
        baselines.frozen,
        adapter=None,
        needs=("bitsandbytes",),
    ),
    Provider(
        "frozen-dense",
        "frozen layer, not quantised",
        baselines.frozen_dense,
        adapter=None,
        unsupported=_only_4bit,
    ),
    Provider("peft", "PEFT", baselines.peft, adapter="fp32", dropout="torch", needs=_PEERS),
    Provider(
        "peft-cast",
        "PEFT, adapter in x's dtype",
        baselines.peft_cast,
        adapter="x",
        dropout="torch",
        needs=_PEERS,
        unsupported=_not_fp32,
    ),
    Provider(
        "addmm",
        "torch addmm",
        baselines.addmm,
        adapter="x",
        dropout="torch",
        needs=("bitsandbytes",),
    ),
    Provider(
        "compile",
        "PEFT, compiled",
        baselines.compile,
        adapter="fp32",
        dropout="own",
        needs=_PEERS,
        once=True,
    ),
    Provider(
        "bnb-packed",
        "PEFT, weights repacked",
        baselines.bnb_packed,
        adapter="fp32",
        dropout="torch",
        needs=_PEERS,
        modes=("inference",),
        unsupported=_packed_for_cpu,
    ),
    Provider("fastlora", "fastlora", _fastlora("native"), unsupported=_native),
    Provider(
        "fastlora-cast",
        "fastlora, adapter in x's dtype",
        _fastlora("native", cast=True),
        adapter="x",
        unsupported=_native_cast,
    ),
    Provider(
        "fastlora-peft",
        "PEFT model, accelerated",
        _fastlora_peft,
        needs=_PEERS,
        unsupported=_native,
    ),
    Provider(
        "fastlora-frozen",
        "fastlora, frozen layer alone",
        _fastlora_frozen,
        adapter=None,
        unsupported=_native,
    ),
    Provider(
        "fastlora-dense",
        "fastlora, not quantised",
        _fastlora_dense,
        unsupported=_native_4bit,
    ),
    Provider("fastlora-triton", "fastlora, Triton", _fastlora("triton"), unsupported=_triton),
    Provider("reference", "fastlora's reference", _fastlora("reference")),
    Provider("read", "reading the weight", baselines.read, adapter=None, modes=("inference",)),
    Provider(
        "bitsandbytes",
        "bitsandbytes",
        baselines.bitsandbytes_dequantize,
        adapter=None,
        needs=("bitsandbytes",),
        modes=("dequantize",),
    ),
    Provider(
        "fastlora-fresh",
        "fastlora",
        _fastlora_dequantize,
        adapter=None,
        modes=("dequantize",),
        unsupported=_native,
    ),
    Provider(
        "fastlora-out",
        "fastlora, out=",
        _fastlora_dequantize_out,
        adapter=None,
        modes=("dequantize",),
        unsupported=_native,
    ),
    Provider("write", "writing the result", baselines.write, adapter=None, modes=("dequantize",)),
)
PROVIDERS = {provider.name: provider for provider in _ALL}
