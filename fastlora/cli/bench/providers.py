"""Who is measured: PEFT, bitsandbytes and plain torch as they come, and fastlora.

Every provider is built from the same `Setup`. The baselines are PEFT's and bitsandbytes' own
modules, never a copy of their code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ... import ops
from ...autograd import lora_linear
from ...backends import BACKENDS
from ...quant import QuantState
from .case import DTYPES, SCALING, Case, Layer

BASELINE = "peft"
# All copies of a weight together are larger than any last-level cache in use, so that weights come
# from memory as they do in a model.
_COLD_BYTES = 96 * 2**20
_MOST_COPIES = 16
# Above this many tokens the weight's way from memory no longer shows.
ROTATE_UP_TO = 256


@dataclass
class Built:
    """One copy of a layer, ready to be called.

    Args:
        call: x [M, K] -> y [M, N].
        adapter: (A, B), which get gradients; empty for a frozen layer.
        train: switches dropout on or off.
    """

    call: Callable[[Tensor], Tensor]
    adapter: tuple[Tensor, ...]
    train: Callable[[bool], Any]


@dataclass
class Setup:
    """The inputs of every provider: the same values, drawn once.

    `weights` holds copies of one weight, dense or packed, in memory of their own.
    """

    layer: Layer
    weights: list[tuple[Tensor, QuantState | None]] = field(init=False)
    lora_A: Tensor = field(init=False)
    lora_B: Tensor = field(init=False)

    def __post_init__(self) -> None:
        layer = self.layer
        self.dtype: torch.dtype = getattr(torch, DTYPES[layer.dtype])
        self._generator = torch.Generator().manual_seed(0)
        weight = self._normal(layer.N, layer.K).mul_(layer.K**-0.5).to(self.dtype)
        state = None
        if layer.quant != "none":
            weight, state = ops.quantize_4bit(weight, 64, layer.quant, layer.nested)
        copies = min(_MOST_COPIES, -(-_COLD_BYTES // layer.weight_bytes))
        self.weights = [(weight, state)]
        self.weights += [(weight.clone(), copy.deepcopy(state)) for _ in range(copies - 1)]
        # Rounded to x's dtype, so that fp32 adapters and cast ones have the same values.
        self.lora_A = self._normal(layer.R, layer.K).mul_(layer.K**-0.5).to(self.dtype).float()
        self.lora_B = self._normal(layer.N, layer.R).mul_(layer.R**-0.5).to(self.dtype).float()
        self._tokens: dict[int, tuple[Tensor, Tensor]] = {}

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def tokens(self, M: int) -> tuple[Tensor, Tensor]:
        """x [M, K] and dy [M, N]."""
        if M not in self._tokens:
            layer = self.layer
            self._tokens[M] = (
                self._normal(M, layer.K).to(self.dtype),
                self._normal(M, layer.N).to(self.dtype),
            )
        return self._tokens[M]

    @cached_property
    def dense(self) -> list[Tensor]:
        """Copies of the weight as a dense matrix, a 4-bit one decoded."""
        weight, state = self.weights[0]
        if state is None:
            return [weight for weight, _ in self.weights]
        decoded = ops.dequantize_4bit(weight, state, self.dtype)
        size = decoded.numel() * decoded.element_size()
        copies = min(len(self.weights), -(-_COLD_BYTES // size))
        return [decoded, *(decoded.clone() for _ in range(copies - 1))]

    @cached_property
    def exact_weight(self) -> Tensor:
        """The weight in float64, as it is after rounding to x's dtype."""
        return self.dense[0].double()

    def adapter(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B as leaves of their own."""
        A, B = (t.to(dtype, copy=True).requires_grad_() for t in (self.lora_A, self.lora_B))
        return A, B


@dataclass(frozen=True)
class Provider:
    """A way to compute the layer.

    Args:
        name: on the command line and in the CSV.
        label: in tables and plots.
        build: makes copy number i from a Setup.
        adapter: "given" (the case's adapter dtype), "fp32", "x" (x's dtype) or None (no adapter).
        dropout: whose random numbers make the mask: "torch", "fastlora", "own" (can't be
            replayed) or None.
        needs: packages that it imports.
        copies: how many of the Setup's copies it takes; 0 for all.
        unsupported: one sentence that says why it can't run a case, or None.
    """

    name: str
    label: str
    build: Callable[[Setup, int], Built]
    adapter: str | None = "given"
    dropout: str | None = "torch"
    needs: tuple[str, ...] = ()
    copies: int = 0
    unsupported: Callable[[Case], str | None] = lambda case: None

    def adapter_dtype(self, layer: Layer) -> str | None:
        """Dtype of A and B as a name in DTYPES; None without an adapter."""
        return {"given": layer.adapter_dtype, "fp32": "fp32", "x": layer.dtype, None: None}[
            self.adapter
        ]

    def why_not(self, case: Case) -> str | None:
        """One sentence that says why it can't run `case`, or None."""
        needs = (*self.needs, "bitsandbytes") if self._needs_bitsandbytes(case) else self.needs
        missing = [name for name in needs if find_spec(name) is None]
        if missing:
            return f"{self.name} needs {' and '.join(missing)}, not installed."
        return self.unsupported(case)

    def _needs_bitsandbytes(self, case: Case) -> bool:
        return "peft" in self.needs and case.layer.quant != "none"


# ---- baselines -------------------------------------------------------------------------------


def _base_module(setup: Setup, index: int, repack: bool = False) -> nn.Module:
    """The frozen layer: nn.Linear, or bitsandbytes' Linear4bit on the same bytes.

    Args:
        repack: lets bitsandbytes rewrite the weight in eval mode, as it does by default. It then
            gets bytes of its own. In training this drops gradients, so it is off elsewhere.
    """
    layer = setup.layer
    weight, state = setup.weights[index]
    if state is None:
        module = nn.Linear(layer.K, layer.N, bias=False, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
        return module
    from bitsandbytes.functional import QuantState as TheirState
    from bitsandbytes.nn import Linear4bit, Params4bit

    def theirs(state: QuantState) -> Any:
        inner = state.state2
        return TheirState(
            absmax=state.absmax,
            shape=torch.Size(state.shape),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=state.dtype,
            offset=state.offset,
            state2=None
            if inner is None
            else TheirState(
                absmax=inner.absmax,
                code=inner.code,
                blocksize=inner.blocksize,
                dtype=inner.dtype,
            ),
        )

    if repack:
        weight, state = weight.clone(), copy.deepcopy(state)
    module = Linear4bit(
        layer.K,
        layer.N,
        bias=False,
        compute_dtype=setup.dtype,
        compress_statistics=layer.nested,
        quant_type=layer.quant,
        device="meta",
    )
    module.weight = Params4bit(
        weight,
        requires_grad=False,
        quant_state=theirs(state),
        blocksize=state.blocksize,
        compress_statistics=layer.nested,
        quant_type=layer.quant,
        bnb_quantized=True,
        module=module,
    )
    module.quant_state = module.weight.quant_state
    if not repack:
        module.support_avx512bf16_for_cpu = False
    return module


class _OneLayer(nn.Module):
    """What PEFT puts its adapter into."""

    def __init__(self, linear: nn.Module, quantized: bool) -> None:
        super().__init__()
        self.linear = linear
        self.is_loaded_in_4bit = quantized


def _peft_model(setup: Setup, index: int, dtype: torch.dtype, repack: bool = False) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    layer = setup.layer
    model = _OneLayer(_base_module(setup, index, repack), layer.quant != "none")
    config = LoraConfig(
        r=layer.R,
        lora_alpha=SCALING * layer.R,
        lora_dropout=layer.dropout,
        target_modules=["linear"],
    )
    get_peft_model(model, config)
    tuned = model.linear
    for own, given in ((tuned.lora_A, setup.lora_A), (tuned.lora_B, setup.lora_B)):
        own["default"].weight.data = given.to(dtype, copy=True)
    return model


def _module(module: nn.Module) -> Built:
    adapter = tuple(p for p in module.parameters() if p.requires_grad)
    return Built(module, adapter, module.train)


def _frozen(setup: Setup, index: int) -> Built:
    return _module(_base_module(setup, index))


def _frozen_dense(setup: Setup, index: int) -> Built:
    weight = setup.dense[index % len(setup.dense)]
    return Built(lambda x: linear(x, weight), (), lambda training: None)


def _peft(setup: Setup, index: int) -> Built:
    return _module(_peft_model(setup, index, torch.float32).linear)


def _peft_cast(setup: Setup, index: int) -> Built:
    return _module(_peft_model(setup, index, setup.dtype).linear)


def _bnb_packed(setup: Setup, index: int) -> Built:
    return _module(_peft_model(setup, index, torch.float32, repack=True).linear)


def _compile(setup: Setup, index: int) -> Built:
    # Timing the backward alone runs it more than once on the same graph.
    torch._functorch.config.donated_buffer = False
    module = _peft_model(setup, index, torch.float32).linear
    compiled = torch.compile(module)
    return Built(compiled, tuple(p for p in module.parameters() if p.requires_grad), module.train)


def _addmm(setup: Setup, index: int) -> Built:
    base = _base_module(setup, index)
    A, B = setup.adapter(setup.dtype)
    dropout = nn.Dropout(setup.layer.dropout)

    def call(x: Tensor) -> Tensor:
        return torch.addmm(base(x), dropout(x) @ A.T, B.T, alpha=SCALING)

    def train(training: bool) -> None:
        base.train(training)
        dropout.train(training)

    return Built(call, (A, B), train)


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
    model = accelerate(_peft_model(setup, index, dtype), verbose=False)
    return _module(model.linear)


def _fastlora_frozen(setup: Setup, index: int) -> Built:
    layer = setup.layer
    dtype = getattr(torch, DTYPES[layer.adapter_dtype])
    empty = (torch.empty(0, layer.K, dtype=dtype), torch.empty(layer.N, 0, dtype=dtype))
    return _fastlora_call(setup, *setup.weights[index], empty)


def _fastlora_dense(setup: Setup, index: int) -> Built:
    adapter = setup.adapter(getattr(torch, DTYPES[setup.layer.adapter_dtype]))
    return _fastlora_call(setup, setup.dense[index % len(setup.dense)], None, adapter)


# ---- limits ----------------------------------------------------------------------------------


def _read(setup: Setup, index: int) -> Built:
    """Reads as many bytes as the weight has, and nothing else: the memory's limit."""
    buffer = torch.ones(setup.layer.weight_bytes // 4)
    return Built(lambda x: buffer.sum(), (), lambda training: None)


def _only_4bit(case: Case) -> str | None:
    return "the weight is dense." if case.layer.quant == "none" else None


def _only_inference(case: Case) -> str | None:
    return None if case.mode == "inference" else "it is measured in inference mode alone."


def _packed_for_cpu(case: Case) -> str | None:
    if reason := _only_4bit(case) or _only_inference(case):
        return reason
    if case.layer.dtype != "bf16" or case.layer.N % 32:
        return "bitsandbytes repacks for bf16 and out_features divisible by 32."
    from bitsandbytes.functional import has_avx512bf16

    return None if has_avx512bf16() else "bitsandbytes repacks on CPUs with AVX512-BF16 alone."


def _native(case: Case) -> str | None:
    layer = case.layer
    return BACKENDS["native"].unsupported(
        "lora_linear_fwd",
        "cpu",
        dtype=getattr(torch, DTYPES[layer.dtype]),
        adapter_dtype=getattr(torch, DTYPES[layer.adapter_dtype]),
    )


def _native_4bit(case: Case) -> str | None:
    return _only_4bit(case) or _native(case)


def _bf16_or_fp16(case: Case) -> str | None:
    return "adapters are fp32 already." if case.layer.dtype == "fp32" else None


def _native_cast(case: Case) -> str | None:
    return _bf16_or_fp16(case) or _native(case)


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("frozen", "frozen layer alone", _frozen, None, None, ("peft",)),
        Provider(
            "frozen-dense",
            "frozen layer, not quantised",
            _frozen_dense,
            None,
            None,
            unsupported=_only_4bit,
        ),
        Provider("peft", "PEFT", _peft, "fp32", needs=("peft",)),
        Provider(
            "peft-cast",
            "PEFT, adapter in x's dtype",
            _peft_cast,
            "x",
            needs=("peft",),
            unsupported=_bf16_or_fp16,
        ),
        Provider("addmm", "torch addmm", _addmm, "x", needs=("peft",)),
        Provider("compile", "PEFT, compiled", _compile, "fp32", "own", ("peft",), copies=1),
        Provider(
            "bnb-packed",
            "PEFT, weights repacked",
            _bnb_packed,
            "fp32",
            needs=("peft",),
            unsupported=_packed_for_cpu,
        ),
        Provider(
            "fastlora",
            "fastlora",
            _fastlora("native"),
            "given",
            "fastlora",
            (),
            unsupported=_native,
        ),
        Provider(
            "fastlora-cast",
            "fastlora, adapter in x's dtype",
            _fastlora("native", cast=True),
            "x",
            "fastlora",
            unsupported=_native_cast,
        ),
        Provider(
            "fastlora-peft",
            "PEFT, accelerated",
            _fastlora_peft,
            "given",
            "fastlora",
            ("peft",),
            unsupported=_native,
        ),
        Provider(
            "fastlora-frozen",
            "fastlora, frozen layer alone",
            _fastlora_frozen,
            None,
            None,
            unsupported=_native,
        ),
        Provider(
            "fastlora-dense",
            "fastlora, not quantised",
            _fastlora_dense,
            "given",
            "fastlora",
            unsupported=_native_4bit,
        ),
        Provider("reference", "fastlora's reference", _fastlora("reference"), "given", "fastlora"),
        Provider("read", "reading the weight", _read, None, None, unsupported=_only_inference),
    )
}
