"""Who is measured: PEFT, bitsandbytes and plain torch as they come, and fastlora."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from ... import ops
from ...autograd.linear import lora_linear
from ...backends import BACKENDS
from ...backends.contract import Request
from ...quant import QuantState
from ..options import torch_dtype
from . import baselines
from .case import SCALING, Case, Layer
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
        backend: of fastlora; it must be able to run the case.
        four_bit: only a 4-bit weight makes it another provider.
        casts: only an x that is not fp32 makes it another provider.
        repacks: bitsandbytes must be able to rewrite the weight.
    """

    name: str
    label: str
    build: Callable[[Setup, int], Built]
    adapter: str | None = "given"
    dropout: str = "fastlora"
    needs: tuple[str, ...] = ()
    once: bool = False
    modes: tuple[str, ...] = LINEAR_MODES
    backend: str | None = None
    four_bit: bool = False
    casts: bool = False
    repacks: bool = False

    def adapter_dtype(self, layer: Layer) -> str | None:
        """Dtype of A and B as a name in DTYPES; None without an adapter."""
        names = {"given": layer.adapter_dtype, "fp32": "fp32", "x": layer.dtype, None: None}
        return names[self.adapter]

    def why_not(self, case: Case, device: str) -> str | None:
        """One sentence that says why it can't run `case` on "cpu" or "cuda", or None."""
        layer, dense = case.layer, case.layer.quant == "none"
        needs = [name for name in self.needs if not (dense and name == "bitsandbytes")]
        if missing := [name for name in needs if find_spec(name) is None]:
            return f"{' and '.join(missing)} not installed."
        if self.four_bit and dense:
            return "the weight is dense."
        if self.casts and layer.dtype == "fp32":
            return "adapters are fp32 already."
        if self.repacks:
            return _why_not_repacked(layer, device)
        if self.backend is None:
            return None
        request = Request(
            "lora_linear_fwd",
            device,
            dtype=torch_dtype(layer.dtype),
            adapter_dtype=torch_dtype(layer.adapter_dtype),
            four_bit=not dense,
        )
        return BACKENDS[self.backend].unsupported(request)


def _why_not_repacked(layer: Layer, device: str) -> str | None:
    if layer.dtype != "bf16" or layer.N % 32:
        return "bitsandbytes repacks for bf16 and out_features divisible by 32."
    if device != "cpu":
        return "bitsandbytes repacks on CPUs alone."
    from bitsandbytes.functional import has_avx512bf16

    return None if has_avx512bf16() else "bitsandbytes repacks on CPUs with AVX512-BF16 alone."


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


def _fastlora(backend: str, cast: bool = False) -> Callable[[Setup, int], Built]:
    def build(setup: Setup, index: int) -> Built:
        adapter = setup.adapter(setup.layer.dtype if cast else setup.layer.adapter_dtype)
        return _fastlora_call(setup, *setup.weights[index], adapter, backend)

    return build


def _fastlora_peft(setup: Setup, index: int) -> Built:
    from ...integrations.peft import accelerate

    layer = baselines.peft_layer(setup, index, torch_dtype(setup.layer.adapter_dtype))
    return baselines.built(accelerate(layer, verbose=False))


def _fastlora_frozen(setup: Setup, index: int) -> Built:
    layer = setup.layer
    new = {"dtype": torch_dtype(layer.adapter_dtype), "device": setup.device}
    empty = torch.empty(0, layer.K, **new), torch.empty(layer.N, 0, **new)
    return _fastlora_call(setup, *setup.weights[index], empty)


def _fastlora_dense(setup: Setup, index: int) -> Built:
    adapter = setup.adapter(setup.layer.adapter_dtype)
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


# ---- all of them -----------------------------------------------------------------------------


_BNB, _PEERS = ("bitsandbytes",), ("peft", "bitsandbytes")
_peft = partial(Provider, adapter="fp32", dropout="torch", needs=_PEERS)
_ours = partial(Provider, backend="native")
_dequantizer = partial(Provider, adapter=None, modes=("dequantize",))
_ALL = (
    Provider("frozen", "frozen layer alone", baselines.frozen, adapter=None, needs=_BNB),
    Provider(
        "frozen-dense",
        "frozen layer, not quantised",
        baselines.frozen_dense,
        adapter=None,
        four_bit=True,
    ),
    _peft("peft", "PEFT", baselines.peft()),
    _peft(
        "peft-cast",
        "PEFT, adapter in x's dtype",
        baselines.peft(cast=True),
        adapter="x",
        casts=True,
    ),
    Provider("addmm", "torch addmm", baselines.addmm, adapter="x", dropout="torch", needs=_BNB),
    _peft("compile", "PEFT, compiled", baselines.compile, dropout="own", once=True),
    _peft(
        "bnb-packed",
        "PEFT, weights repacked",
        baselines.peft(repack=True),
        modes=("inference",),
        four_bit=True,
        repacks=True,
    ),
    _ours("fastlora", "fastlora", _fastlora("native")),
    _ours(
        "fastlora-cast",
        "fastlora, adapter in x's dtype",
        _fastlora("native", cast=True),
        adapter="x",
        casts=True,
    ),
    _ours("fastlora-peft", "PEFT model, accelerated", _fastlora_peft, needs=_PEERS),
    _ours("fastlora-frozen", "fastlora, frozen layer alone", _fastlora_frozen, adapter=None),
    _ours("fastlora-dense", "fastlora, not quantised", _fastlora_dense, four_bit=True),
    Provider("fastlora-triton", "fastlora, Triton", _fastlora("triton"), backend="triton"),
    Provider("reference", "fastlora's reference", _fastlora("reference")),
    Provider("read", "reading the weight", baselines.read, adapter=None, modes=("inference",)),
    _dequantizer("bitsandbytes", "bitsandbytes", baselines.bitsandbytes_dequantize, needs=_BNB),
    _dequantizer("fastlora-fresh", "fastlora", _fastlora_dequantize, backend="native"),
    _dequantizer("fastlora-out", "fastlora, out=", _fastlora_dequantize_out, backend="native"),
    _dequantizer("write", "writing the result", baselines.write),
)
PROVIDERS = {provider.name: provider for provider in _ALL}
