"""The CUDA side's bindings, and which of its kernels a call takes, on the emulation."""

from __future__ import annotations

import pytest
import torch

from fastlora import lora_linear, reference
from fastlora.backends import native, schemas, triton
from fastlora.backends.contract import Request
from fastlora.backends.machine import tuned
from fastlora.layer import Layer, Needs
from fastlora.quant import dynamic_code
from tests import cuda_checks, emulated
from tests.cases import DTYPES, Base, Case, exact_results, make_inputs, plain_results
from tests.conftest import poisoned_memory
from tests.cuda_checks import NESTED
from tests.tolerance import assert_close_to_exact

backend = cuda_checks.backend


# ---- bindings ----------------------------------------------------------------------------------


def _op_arguments() -> dict[str, tuple]:
    case = Case("", M=5, N=12, K=64, R=2, dropout_p=0.1)
    inputs = make_inputs(case, NESTED, DTYPES["bf16, fp32 adapter"])
    quant = schemas.packed(inputs.weight.view(-1), inputs.quant_state)
    A, B, S, dtype = inputs.lora_A, inputs.lora_B, torch.randn(5, 2), torch.bfloat16
    layer, absmax = inputs.layer._replace(weight=quant.data, scaling=1.0), torch.rand(300)
    return {
        "quantize_absmax": (absmax, absmax.mean(), dynamic_code()),
        "qlora_gemm_fwd": (inputs.x, *quant, inputs.bias, S, B, 1.0, dtype),
        "qlora_gemm_dx": (inputs.dy, *quant, S, A, 0.1, inputs.seed, dtype),
        "qlora_decode": (inputs.x, *schemas.flatten(layer)),
    }


@pytest.mark.parametrize("op", _op_arguments())
def test_opcheck(op: str) -> None:
    result = torch.library.opcheck(
        getattr(torch.ops.fastlora_emulated, op).default,
        _op_arguments()[op],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("op", "place", "wrong", "message"),
    [
        ("quantize_absmax", 0, torch.rand(8).double(), "absmax must be Float, got Double"),
        ("quantize_absmax", 1, torch.rand(2), "offset must have 1 elements, got 2"),
        ("quantize_absmax", 2, torch.rand(16), "code must have 256 elements, got 16"),
        ("qlora_gemm_fwd", 0, torch.randn(5, 64), "x must be bf16 or fp16"),
        ("qlora_gemm_fwd", 1, torch.zeros(3, dtype=torch.uint8), "weight must have"),
        ("qlora_gemm_fwd", 9, torch.randn(4, 2), "S must be .5, 2."),
        ("qlora_gemm_dx", 11, None, "seed must be an int64 tensor"),
        ("qlora_decode", 7, 32, "K and blocksize must be multiples of 64"),
        ("qlora_decode", 10, torch.randn(3, 64), "lora_B must be .12, 3."),
        ("qlora_decode", 11, torch.empty(2**31, 0), "weight must have fewer than 2.38 elements"),
    ],
)
def test_bindings_refuse(op: str, place: int, wrong: object, message: str) -> None:
    arguments = list(_op_arguments()[op])
    arguments[place] = wrong
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fastlora_emulated, op)(*arguments)


def test_decode_tokens_is_the_kernels() -> None:
    arguments = list(_op_arguments()["qlora_decode"])
    most = native.cuda.DECODE_TOKENS
    arguments[0] = torch.randn(most, 64).bfloat16()
    assert torch.ops.fastlora_emulated.qlora_decode(*arguments)[0].shape == (most, 12)
    arguments[0] = torch.randn(most + 1, 64).bfloat16()
    with pytest.raises(RuntimeError, match=f"x must have at most {most} rows"):
        torch.ops.fastlora_emulated.qlora_decode(*arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
def test_the_decode_op_takes_a_whole_layer(
    compute_dtype: torch.dtype | None, nested: bool, bias: bool, backend: str
) -> None:
    case = Case("", M=9, N=33, K=192, R=5, dropout_p=0.1, bias=bias)
    dtypes = (torch.bfloat16, torch.float32, compute_dtype)
    inputs = make_inputs(case, Base("nf4", 64, nested), dtypes)
    with poisoned_memory():
        y, S = native.cuda.ops.qlora_decode(inputs.x, *schemas.flatten(inputs.layer))
    assert y.dtype == torch.bfloat16 and S.dtype == torch.float32
    assert_close_to_exact(y, exact_results(case, inputs).y, plain_results(case, inputs).y, what="y")
    plain = reference.plain.shrink(inputs.x, inputs.layer)
    wide = reference.plain.widened(inputs.layer)
    assert_close_to_exact(S, reference.plain.shrink(inputs.x.double(), wide), plain, what="S")


# ---- which kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("M", "K", "blocksize", "dtype", "kernel"),
    [
        (1, 4096, 64, torch.bfloat16, "decode"),
        (64, 4096, 64, torch.float16, "decode"),
        (65, 4096, 64, torch.bfloat16, "gemm"),
        (1, 4096, 32, torch.bfloat16, "gemm"),
        (1, 4128, 64, torch.bfloat16, "gemm"),
        (512, 4096, 64, torch.bfloat16, "gemm"),
        (513, 4096, 64, torch.bfloat16, "dequantize"),
        (1, 4100, 64, torch.bfloat16, "gemm"),
        (513, 4100, 64, torch.bfloat16, "dequantize"),
        (1, 4096, 64, torch.float32, "dequantize"),
    ],
)
def test_plan(M: int, K: int, blocksize: int, dtype: torch.dtype, kernel: str) -> None:
    assert native.cuda.plan("lora_linear_fwd", M, K, blocksize, dtype, 512) == kernel
    backward = "gemm" if kernel == "decode" else kernel
    assert native.cuda.plan("lora_linear_bwd", M, K, blocksize, dtype, 512) == backward


@pytest.mark.parametrize("kept", ["gemm", "decode", None])
def test_what_was_tuned_goes_before_the_plan(
    kept: str | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def find(op: str, x: torch.Tensor, layer: Layer) -> tuned.Kept | None:
        asked.append((op, x.dtype, *layer.lora_B.shape))
        return None if kept is None else tuned.Kept(native.NAME, kept)

    monkeypatch.setattr(tuned, "kept", find)
    inputs = make_inputs(Case("", 9, 40, 64, 3), NESTED, DTYPES["bf16"])
    for blocksize, forward in ((64, kept or "decode"), (32, "gemm")):
        weight, state = reference.quantize_4bit(torch.randn(40, 64), blocksize)
        layer = Layer(weight, inputs.lora_A, inputs.lora_B, 1.0, quant_state=state)
        emulated.called.clear()
        _, S = native.cuda.Cuda().lora_linear_fwd(inputs.x, layer)
        native.cuda.Cuda().lora_linear_bwd(inputs.dy, inputs.x, layer, S, Needs())
        assert emulated.called == [
            "qlora_decode" if forward == "decode" else "qlora_gemm_fwd",
            "qlora_gemm_dx",
        ]
    assert [what[0] for what in asked] == ["lora_linear_fwd", "lora_linear_bwd"] * 2
    assert all(what[1:] == (torch.bfloat16, 40, 3) for what in asked)


def test_a_named_kernel_runs(backend: str) -> None:
    """As `fastlora tune` calls each of them, above the limit of tokens, too."""
    for M, kernel, op in (
        (5, "gemm", "gemm_fwd"),
        (5, "decode", "decode"),
        (600, "gemm", "gemm_fwd"),
    ):
        case = Case("", M, 40, 64, 3)
        inputs = make_inputs(case, NESTED, DTYPES["bf16"])
        emulated.called.clear()
        y, _ = native.cuda.Cuda().lora_linear_fwd(inputs.x, inputs.layer, kernel=kernel)
        assert emulated.called == [f"qlora_{op}"]
        plain = plain_results(case, inputs).y
        assert_close_to_exact(y, exact_results(case, inputs).y, plain, what="y")


def test_fused_tokens_of_unlisted_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    find = _fused_tokens
    for capability, want in (((8, 0), 512), ((8, 7), 1024), ((12, 1), 1024), ((7, 5), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert find(torch.device("cuda")) == want


def test_the_choice_of_a_kernel_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def scaled(x: torch.Tensor) -> torch.Tensor:
        most = _fused_tokens(x.device)
        kernel = native.cuda.plan("lora_linear_fwd", *x.shape, 64, torch.bfloat16, most)
        return x * len(kernel)

    compiled = torch.compile(scaled, fullgraph=True, dynamic=True, backend="eager")
    for M in (8, 300, 900):
        x = torch.ones(M, 64)
        assert torch.equal(compiled(x), scaled(x))


@pytest.mark.parametrize("skinny", [(), ("triton",)], ids=str)
@pytest.mark.parametrize("M", [9, 70, 600])
def test_a_compiled_layer_gives_the_same_bits(
    M: int, skinny: tuple[str, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each of the kernels, with the products without W by the reference or by Triton."""
    if skinny and (reason := triton.unsupported(Request("lora_linear_fwd", "cpu"))):
        pytest.skip(reason)
    monkeypatch.setattr(native.cuda, "ops", torch.ops.fastlora_emulated)  # notes no calls
    if skinny:
        monkeypatch.setattr(native.cuda, "skinny", lambda device: triton.TRITON)
    inputs = make_inputs(Case("", M, 40, 64, 3, dropout_p=0.1), NESTED, DTYPES["bf16"])
    x, A, B = (t.requires_grad_() for t in (inputs.x, inputs.lora_A, inputs.lora_B))

    def layer(x: torch.Tensor) -> torch.Tensor:
        return lora_linear(
            x, inputs.weight, inputs.bias, A, B, 1.5, quant_state=inputs.quant_state,
            dropout_p=0.1, seed=inputs.seed, backend=backend,
        )  # fmt: skip

    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append((y, *torch.autograd.grad(y, (x, A, B), inputs.dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


_fused_tokens = native.cuda.fused_tokens


def test_what_is_not_supported() -> None:
    four_bit = Request("lora_linear_fwd", "cuda", None, torch.bfloat16, four_bit=True)
    assert native.unsupported(four_bit) is None
    dense = native.unsupported(four_bit._replace(four_bit=False))
    assert dense == "lora_linear_fwd has no CUDA kernel in the native backend for dense weights."
    other = native.unsupported(four_bit._replace(op="dora_magnitude_fwd"))
    assert other == "dora_magnitude_fwd has no CUDA kernel in the native backend."
    wide = native.unsupported(four_bit._replace(dtype=torch.float64))
    assert wide == "lora_linear_fwd takes fp32, bf16 and fp16, got x in torch.float64."
