"""Every backend's ops against the definition, for every case, base and dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastlora import backends, ops, reference
from fastlora.backends import native
from fastlora.backends.composed import Composed
from fastlora.backends.contract import Request
from fastlora.backends.schemas import flatten, flatten_all, packed
from fastlora.layer import Layer

# Run here with this module's `backend`.
from tests.backend_checks import (  # noqa: F401
    check_against_definition,
    test_a_weight_without_elements,
    test_code_table_comes_from_the_state,
    test_computes_only_what_is_needed,
    test_dequantize_writes_into_out,
    test_dropout_mask_is_the_references,
    test_no_adapter_is_the_frozen_layer,
)
from tests.cases import BASES, CASES, DTYPES, Base, Case, is_refused, make_inputs, run
from tests.conftest import poisoned_memory

DENSE, NF4 = Base(), Base("nf4", 64, nested=True)
CALL = Request("lora_linear_fwd", "cpu")


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := backends.BACKENDS[request.param].unsupported(CALL):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_definition(case: Case, base: Base, dtypes: str, backend: str) -> None:
    if is_refused(base, dtypes):
        pytest.skip("a dense weight is in x's dtype, or beside an fp32 x")
    check_against_definition(case, base, dtypes, backend)


def test_same_call_same_bits(backend: str) -> None:
    """Threads take tiles in any order; the result must not depend on it."""
    case = Case("", M=200, N=300, K=700, R=16, dropout_p=0.1)
    inputs = make_inputs(case, Base("nf4", 64, nested=True), DTYPES["bf16, fp32 adapter"])
    first = run(case, inputs, backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = run(case, inputs, backend)
            for name, tensor in first.items():
                # The reference sums as torch does, which depends on the number of threads.
                if backend != "reference" or count == threads:
                    assert torch.equal(tensor, getattr(again, name)), (name, count)
    finally:
        torch.set_num_threads(threads)


def test_default_device_does_not_leak_in(backend: str) -> None:
    weight = torch.randn(8, 64)
    want, state = reference.quantize_4bit(weight, compress_statistics=True)
    decoded = reference.dequantize_4bit(want, state)
    with torch.device("meta"):
        packed, got = ops.quantize_4bit(weight, compress_statistics=True, backend=backend)
        assert torch.equal(ops.dequantize_4bit(packed, got, backend=backend), decoded)
    assert torch.equal(packed, want)
    assert all(torch.equal(a, b) for a, b in zip(got.tensors(), state.tensors(), strict=True))


@pytest.mark.parametrize("blocksize", [32, 64, 512, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quantize_and_dequantize_are_bit_exact(
    blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype, backend: str
) -> None:
    for shape in ((7, 33), (64, 128), (1, 1), (130, 577), (3, 1, 5)):
        weight = torch.randn(shape).to(dtype)
        weight.view(-1)[:: max(1, weight.numel() // 5)] *= 1e-30  # some tiny, some denormal
        packed, state = ops.quantize_4bit(weight, blocksize, quant_type, nested, backend=backend)
        want, want_state = reference.quantize_4bit(weight, blocksize, quant_type, nested)
        assert torch.equal(packed, want)
        for ours, theirs in zip(state.tensors(), want_state.tensors(), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
            with poisoned_memory():
                out = ops.dequantize_4bit(packed, state, out_dtype, backend=backend)
            assert out.shape == shape
            assert torch.equal(out, reference.dequantize_4bit(want, want_state, out_dtype))


def _op_arguments(base: Base = DENSE) -> dict[str, tuple]:
    case = Case("", M=5, N=12, K=64, R=2, dropout_p=0.1)
    inputs = make_inputs(case, base, DTYPES["fp32"])
    x, dy, S, needs = inputs.x, inputs.dy, torch.randn(5, 2), (True, True, False, True)
    layer = inputs.layer
    if base.quant_type is not None:
        layer = layer._replace(weight=layer.weight.view(-1), compute_dtype=torch.float32)
    two = flatten_all([layer, layer._replace(scaling=2.0, dropout_p=0.0)])
    weight = torch.randn(12, 64)
    bounds, order = torch.linspace(-0.9, 0.9, 15), torch.arange(16, dtype=torch.uint8)
    stored, state = reference.quantize_4bit(weight, compress_statistics=True)
    return {
        "lora_linear_fwd": (x, *flatten(layer)),
        "lora_linear_bwd": (dy, x, *flatten(layer), S, *needs),
        "shared_linear_fwd": (x, *two),
        "shared_linear_bwd": ([dy, dy], x, *two, [S, S], True, [1, 1, 0, 1, 0, 1]),
        "quantize_4bit": (weight, bounds, order, 64),
        "dequantize_4bit_out": (*packed(stored.view(-1), state), torch.empty(12, 64)),
    }


def test_decoding_compiles(backend: str) -> None:
    packed, state = reference.quantize_4bit(torch.randn(12, 64), 64, "nf4", True)

    def decoded(packed: torch.Tensor) -> torch.Tensor:
        return ops.dequantize_4bit(packed, state, torch.bfloat16, backend=backend) * 2

    compiled = torch.compile(decoded, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(packed), decoded(packed))


@pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason()))
@pytest.mark.parametrize("base", [DENSE, NF4], ids=str)
@pytest.mark.parametrize("op", _op_arguments())
def test_opcheck(op: str, base: Base) -> None:
    result = torch.library.opcheck(
        getattr(torch.ops.fastlora, op).default,
        _op_arguments(base)[op],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(result.values()) == {"SUCCESS"}


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    default = backends.choose(CALL._replace(dtype=torch.float32))
    assert default.name == ("reference" if native.unavailable_reason() else "native")
    with backends.use_backend("reference"):
        assert backends.choose(CALL).name == "reference"
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    assert backends.choose(CALL).name == "reference"
    monkeypatch.setenv("FASTLORA_BACKEND", "vulkan")
    with pytest.raises(ValueError, match=r"FASTLORA_BACKEND must be one of .*, got 'vulkan'"):
        backends.choose(CALL)
    monkeypatch.delenv("FASTLORA_BACKEND")
    with pytest.raises(ValueError, match="backend must be one of"):
        backends.choose(CALL, "vulkan")
    # fp64 is the reference's alone: the automatic choice moves on, a forced one says why it can't.
    wide = CALL._replace(dtype=torch.float64)
    assert backends.choose(wide).name == "reference"
    with pytest.raises(RuntimeError, match="native: "):
        backends.choose(wide, "native")


def test_a_block_ends_its_own_choice_alone() -> None:
    """Blocks of two threads, or of two generators, may end in any order."""
    outer, inner = backends.use_backend("reference"), backends.use_backend("native")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert backends.forced_backend() == "native"
    inner.__exit__(None, None, None)
    assert backends.forced_backend() is None


@pytest.mark.parametrize("bad", [-1, 9])
def test_ids_outside_of_the_table(bad: int, backend: str) -> None:
    """Also below 0, where indexing would begin at the end."""
    layer = Layer(torch.zeros(9, 4), torch.zeros(2, 9), torch.zeros(4, 2), 1.0)
    with pytest.raises(IndexError):
        ops.lora_embedding_fwd(torch.tensor([0, bad]), layer, backend=backend)


@pytest.mark.parametrize("nested", [False, True])
def test_a_stack_without_experts(nested: bool, backend: str) -> None:
    """Composed of calls of one expert: of none."""
    weight, state = reference.quantize_4bit(torch.randn(1, 8, 64), compress_statistics=nested)
    state = replace(state, shape=torch.Size((0, 8, 64)), absmax=state.absmax[:0])
    if state.state2 is not None:
        state = replace(state, state2=replace(state.state2, absmax=state.state2.absmax[:0]))
    adapters = torch.zeros(0, 4, 64), torch.zeros(0, 8, 4)
    stack = Layer(
        weight[:0], *adapters, 1.0, quant_state=state, offsets=torch.tensor([], dtype=torch.long)
    )
    x = torch.randn(3, 64)
    for y, S in (
        ops.grouped_lora_linear_fwd(x, stack, backend=backend),
        Composed().grouped_lora_linear_fwd(x, stack),
    ):
        assert y.shape == (3, 8) and S.shape == (3, 4) and not y.any()
