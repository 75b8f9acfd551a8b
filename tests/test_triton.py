"""The Triton kernels in Triton's interpreter, against the definition.

`tests/conftest.py` switches the interpreter on where there is no GPU. What it can't check: layouts,
races, bounds, and what the compiler makes of a kernel; `tests/test_triton_compiled.py` compiles.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import pytest
import torch

from fastlora import backends, lora_linear, ops, reference
from fastlora.backends import native, schemas, triton
from fastlora.backends.contract import Request
from fastlora.backends.machine import gpu
from fastlora.layer import Layer, Needs
from tests import every_op

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
from tests.cases import (
    BASES,
    CASES,
    DTYPES,
    Base,
    Case,
    exact_results,
    is_refused,
    make_inputs,
    plain_results,
    run,
)
from tests.conftest import poisoned_memory
from tests.tolerance import assert_close_to_exact

ON_CPU = Request("lora_linear_fwd", "cpu")

pytestmark = pytest.mark.skipif(
    triton.unsupported(ON_CPU) is not None,
    reason=str(triton.unsupported(ON_CPU)),
)

COMBINATIONS = [
    (base, dtypes) for base in BASES for dtypes in DTYPES if not is_refused(base, dtypes)
]


def chosen(index: int, count: int = 4) -> list[tuple[Base, str]]:
    """Some combinations of base and dtypes for a case; the cases together take each of them."""
    return [
        COMBINATIONS[(index * count + j) * 7 % len(COMBINATIONS)] for j in range(count)
    ]  # 7 has no factor in common with their number


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.mark.parametrize(
    ("case", "base", "dtypes"),
    [(case, *pair) for index, case in enumerate(CASES) for pair in chosen(index)],
    ids=str,
)
def test_against_definition(case: Case, base: Base, dtypes: str, backend: str) -> None:
    check_against_definition(case, base, dtypes, backend)


def test_every_combination_is_chosen() -> None:
    taken = {pair for index in range(len(CASES)) for pair in chosen(index)}
    assert taken == set(COMBINATIONS)


@pytest.mark.parametrize("dtypes", every_op.DTYPES, ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_through_the_layer(dtypes: tuple, quantized: bool, backend: str) -> None:
    every_op.check_layer(every_op.SIZES[1], dtypes, quantized, backend)


def test_masks_are_the_native_ones(backend: str) -> None:
    """S of an identity is drop(x): equal to the C++ kernels' in every bit."""
    if reason := native.unavailable_reason():
        pytest.skip(reason)
    x, eye, seed = torch.randn(19, 300), torch.eye(300), torch.tensor([2**62 + 5])
    weight, B = torch.zeros(4, 300), torch.ones(4, 300)
    layer = Layer(weight, eye, B, 1.0, dropout_p=0.25, seed=seed)
    _, ours = ops.lora_linear_fwd(x, layer, backend=backend)
    _, theirs = ops.lora_linear_fwd(x, layer, backend="native")
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", [c for c in CASES if c.M > 64], ids=str)
def test_tokens_in_slabs(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums of dB that would need too much memory at once."""
    from fastlora.backends.triton.kernels import grad_b

    monkeypatch.setattr(grad_b, "_MOST_PARTS", 4 * case.N * case.R)
    inputs = make_inputs(case, Base(), DTYPES["bf16, fp32 adapter"])
    layer, S = inputs.layer, torch.randn(case.M, case.R)
    needs = Needs(False, True, True, True)
    slabs: list[int] = []
    one = grad_b._slab
    monkeypatch.setattr(grad_b, "_slab", lambda *a: slabs.append(len(a[2])) or one(*a))
    _, *got = ops.lora_linear_bwd(inputs.dy, inputs.x, layer, S, needs, backend=backend)
    assert len(slabs) == -(-case.M // 64) and sum(slabs) == case.M
    wide = (inputs.dy.double(), inputs.x.double(), reference.plain.widened(layer), S.double())
    _, *exact = reference.lora_linear_bwd(*wide, needs)
    _, *plain = reference.lora_linear_bwd(inputs.dy, inputs.x, layer, S, needs)
    for name, *three in zip(("dA", "dB", "dbias"), got, exact, plain, strict=True):
        assert_close_to_exact(*three, what=name)


def test_same_call_same_bits(backend: str) -> None:
    case = Case("", M=70, N=80, K=300, R=16, dropout_p=0.1)
    inputs = make_inputs(case, Base("nf4", 32, nested=True), DTYPES["bf16, fp32 adapter"])
    first = run(case, inputs, backend)
    for name, tensor in run(case, inputs, backend).items():
        assert torch.equal(tensor, getattr(first, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("blocksize", "quant_type", "nested"),
    [(64, "nf4", True), (32, "fp4", False), (256, "nf4", False), (4096, "fp4", True)],
)
def test_dequantize_is_bit_exact(
    blocksize: int, quant_type: str, nested: bool, dtype: torch.dtype, backend: str
) -> None:
    for shape in ((7, 33), (64, 128), (1, 1), (9, 577), (3, 1, 5)):
        weight = torch.randn(shape)
        weight.view(-1)[:: max(1, weight.numel() // 5)] *= 1e-30
        packed, state = reference.quantize_4bit(weight, blocksize, quant_type, nested)
        with poisoned_memory():
            out = ops.dequantize_4bit(packed, state, dtype, backend=backend)
        assert torch.equal(out, reference.dequantize_4bit(packed, state, dtype))


def test_default_device_does_not_leak_in(backend: str) -> None:
    packed, state = reference.quantize_4bit(torch.randn(8, 64), compress_statistics=True)
    want = reference.dequantize_4bit(packed, state)
    with torch.device("meta"):
        assert torch.equal(ops.dequantize_4bit(packed, state, backend=backend), want)


@pytest.mark.parametrize("name", ["decoded first", "in panels", "by the vendor", "fused"])
def test_every_way_through_a_4bit_base(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layer by each path; panels are the whole weight's columns with its dropout mask."""
    from fastlora.backends.triton import launch, products, tiles

    case = Case("", M=35, N=40, K=2176, R=8, dropout_p=0.2)
    inputs = make_inputs(case, Base("nf4", 64, nested=True), DTYPES["bf16, fp32 adapter"])
    limits = tiles.ARCHS["interpreter"]
    vendor = name in ("by the vendor", "in panels")
    fused = 2**30 if name == "fused" else 0
    changed = tiles.Arch(limits.shared, limits.mma, fused, vendor=vendor)
    monkeypatch.setitem(tiles.ARCHS, "interpreter", changed)
    if name == "in panels":
        monkeypatch.setattr(products, "WORKSPACE_BYTES", 2048 * 40 * 2)
        shape, packed = (40, 2176), schemas.packed(inputs.weight.view(-1), inputs.quant_state)
        for is_forward in (True, False):
            cut = products.panels(packed, shape, is_forward, torch.bfloat16, 2048 * 40 * 2)
            assert len(cut) > 1
    assert launch.launcher(inputs.x).limits == changed
    got = run(case, inputs, "triton")
    exact = exact_results(case, inputs)
    plain = plain_results(case, inputs)
    for result, out in got.items():
        assert_close_to_exact(out, getattr(exact, result), getattr(plain, result), what=result)


@pytest.mark.parametrize("K", [35, 64])
def test_panels_of_rows_that_are_no_whole_blocks(K: int) -> None:
    """Each panel of the forward begins where a word and a block begin, whatever K is."""
    from fastlora.backends.triton.launch import launcher
    from fastlora.backends.triton.products import decoded_panel, panels

    N = 151
    data, state = reference.quantize_4bit(torch.randn(N, K), 64, "nf4", True)
    want = reference.dequantize_4bit(data, state, torch.float16)
    packed = schemas.packed(data.view(-1), state)
    cut = panels(packed, (N, K), True, torch.float16, 70 * K * 2)
    assert len(cut) > 1 and cut[0][0] == 0 and cut[-1][1] == N
    for begin, end in cut:
        with poisoned_memory():
            got = decoded_panel(launcher(want), packed, (N, K), True, (begin, end), torch.float16)
        assert torch.equal(got, want[begin:end].t())


def test_weight_as_left_operand(monkeypatch: pytest.MonkeyPatch) -> None:
    """sm_90 and sm_100 compute the transposed product; the interpreter can do it as well."""
    from fastlora.backends.triton import tiles

    case = Case("", M=35, N=70, K=192, R=8, dropout_p=0.2)
    inputs = make_inputs(case, Base("nf4", 64), DTYPES["bf16"])
    straight = run(case, inputs, "triton")
    limits = tiles.ARCHS["interpreter"]
    swapped = tiles.Arch(limits.shared, "", limits.fused_4bit, weight_left=True, vendor=False)
    monkeypatch.setitem(tiles.ARCHS, "interpreter", swapped)
    assert torch.equal(run(case, inputs, "triton").y, straight.y)


def test_offsets_past_two_to_the_31(backend: str) -> None:
    """Rows 2^30 elements apart: the third begins past 2^31. Few pages of them are ever touched."""
    M, N, K, R = 3, 20, 64, 2
    apart = 2**30
    x = torch.empty(2 * apart + K, dtype=torch.float16).as_strided((M, K), (apart, 1))
    x.copy_(torch.randn(M, K))
    W, dy = torch.randn(N, K).half(), torch.randn(M, N).half()
    A, B, seed = torch.randn(R, K), torch.randn(N, R), torch.tensor([3])
    layer = Layer(W, A, B, 1.0, dropout_p=0.1, seed=seed)
    y, S = ops.lora_linear_fwd(x, layer, backend=backend)
    near = x.contiguous()
    same_y, same_S = ops.lora_linear_fwd(near, layer, backend=backend)
    assert torch.equal(y, same_y) and torch.equal(S, same_S)
    grads = ops.lora_linear_bwd(dy, x, layer, S, backend=backend)
    same = ops.lora_linear_bwd(dy, near, layer, S, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(grads[:3], same[:3], strict=True))


def test_no_op_reads_a_tensor_on_the_host() -> None:
    """On device "meta" every read of a value raises: nothing waits for the GPU, and no launch
    depends on data, so a CUDA graph captures all of it. Memory comes from torch's allocator."""
    from fastlora.backends.triton.aot import Recorder, op_calls

    for arch in ("sm_80", "gfx942"):
        gpu = Recorder(arch, 108)
        for _, call in op_calls(64, 16, torch.bfloat16, torch.float32):
            before = len(gpu.launches)
            call(gpu)
            assert len(gpu.launches) > before


def test_torch_compile_traces_the_layer(backend: str) -> None:
    x = torch.randn(9, 64, requires_grad=True)
    W = torch.randn(20, 64)
    packed, state = reference.quantize_4bit(W)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(20, 4, requires_grad=True)
    seed = torch.tensor([5])

    def layer(x, weight, state):  # type: ignore[no-untyped-def]
        return lora_linear(
            x, weight, None, A, B, 1.5, quant_state=state, dropout_p=0.2, seed=seed, backend=backend
        )

    for weight, quant_state in ((W, None), (packed, state)):
        results = []
        for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            y = call(x, weight, quant_state)
            grads = torch.autograd.grad(y.square().sum(), (x, A, B))
            results.append((y, *grads))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("M", "R"), [(7, 3), (0, 3), (7, 0)])
def test_opcheck_of_the_skinny_products(M: int, R: int) -> None:
    x, dy = torch.randn(M, 40), torch.randn(M, 24)
    A, B, S, seed = torch.randn(R, 40), torch.randn(24, R), torch.randn(M, R), torch.tensor([3])
    layer = Layer(torch.randn(24, 40), A, B, 2.0, dropout_p=0.2, seed=seed)
    calls = {"shrink": (x, A, 0.2, seed), "skinny_bwd": (dy, x, *schemas.flatten(layer), S)}
    for op, arguments in calls.items():
        # dx is none of these products': its place among the needs is left alone.
        asked_for = itertools.product((False,), *[(True, False)] * 3)
        needs = [()] if op == "shrink" else asked_for
        for asked in needs:
            result = torch.library.opcheck(
                getattr(torch.ops.fastlora_triton, op).default,
                (*arguments, *asked),
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
            )
            assert set(result.values()) == {"SUCCESS"}


def _op_arguments() -> dict[str, tuple]:
    """By op, for a 4-bit base with "4-bit" behind its name."""
    case, calls = Case("", M=5, N=12, K=64, R=2, dropout_p=0.1), {}
    needs, S = (True, True, False, True), torch.randn(5, 2)
    for kind, base in (("", Base()), (", 4-bit", Base("nf4", 64, nested=True))):
        inputs = make_inputs(case, base, DTYPES["fp32"])
        if base.quant_type is not None:
            inputs.weight = inputs.weight.view(-1)
        layer = schemas.flatten(inputs.layer._replace(compute_dtype=torch.float32))
        calls[f"lora_linear_fwd{kind}"] = (inputs.x, *layer)
        calls[f"lora_linear_bwd{kind}"] = (inputs.dy, inputs.x, *layer, S, *needs)
    packed = schemas.packed(inputs.weight, inputs.quant_state)
    return calls | {"dequantize_4bit_out": (*packed, torch.empty(12, 64))}


@pytest.mark.parametrize("call", _op_arguments())
def test_opcheck(call: str) -> None:
    result = torch.library.opcheck(
        getattr(torch.ops.fastlora_triton, call.split(",")[0]).default,
        _op_arguments()[call],
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
    assert set(result.values()) == {"SUCCESS"}


def test_every_op_has_a_kernel() -> None:
    """For each of the keys, and is checked above."""
    skinny = {"shrink", "skinny_bwd"}
    assert {call.split(",")[0] for call in _op_arguments()} | skinny == set(schemas.TRITON_OPS)
    for op in schemas.TRITON_OPS:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastlora_triton::{op}", key)


@pytest.mark.parametrize(
    "op", ["quantize_4bit", "dora_norm", "dora_magnitude_fwd", "lora_embedding_bwd"]
)
def test_what_has_no_kernel(op: str) -> None:
    assert backends.BACKENDS["triton"].unsupported(Request(op, "cuda")) == (
        f"{op} has no Triton kernel."
    )
    assert not hasattr(torch.ops.fastlora_triton, op)


@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_bwd", "dequantize_4bit_out"])
def test_schemas_are_the_native_ones(op: str) -> None:
    ours = str(getattr(torch.ops.fastlora_triton, op).default._schema)
    theirs = str(getattr(torch.ops.fastlora, op).default._schema)
    assert ours.replace("fastlora_triton::", "fastlora::") == theirs


def test_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        backends.choose(ON_CPU._replace(dtype=torch.float32), "triton")
    assert "device 'mps'" in str(triton.unsupported(ON_CPU._replace(device="mps")))
    if not torch.cuda.is_available():
        assert "no CUDA device" in str(triton.unsupported(ON_CPU._replace(device="cuda")))
    assert backends.DEVICE_ORDER["cuda"] == ("native", "triton", "reference")


def test_the_version_is_tritons_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of tuned choices names it. It is found whatever the distribution is called: builds
    for AMD come as pytorch-triton-rocm."""
    import triton as package

    find = gpu._read_triton_version.__wrapped__
    assert find() == gpu.triton_version() == package.__version__
    elsewhere = tmp_path / "triton" / "__init__.py"
    elsewhere.parent.mkdir()
    elsewhere.write_text('"""Another."""\n\n__version__ = "3.5.1"\n')
    monkeypatch.delitem(sys.modules, "triton")
    monkeypatch.syspath_prepend(tmp_path)
    assert find() == "3.5.1" and "triton" not in sys.modules
    monkeypatch.setattr(sys, "path", [])
    assert find() is None


# ---- the byte-permute decoder, which the interpreter can't run ---------------------------------


def run_ptx(text: str, values: dict[str, int]) -> dict[str, int]:
    """Executes the few instructions of `decode4` on 32-bit registers; returns the outputs."""
    registers = dict(values)

    def read(name: str) -> int:
        return int(name, 16) if name.startswith("0x") else int(registers.get(name, name))

    def prmt(a: int, b: int, selector: int) -> int:
        pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        picked = bytes(pool[selector >> 4 * i & 7] for i in range(4))
        assert not selector & 0x8888, "bit 3 would replicate a sign"
        return int.from_bytes(picked, "little")

    for line in text.replace("{\n", "").splitlines():
        line = line.strip().rstrip(";")
        if not line or line.startswith(".reg") or line == "}":
            continue
        op, operands = line.split(" ", 1)
        names = re.findall(r"[$\w]+", operands)
        if op == "mov.b32":
            value = read(names[2])
            registers[names[0]], registers[names[1]] = value & 0xFFFF, value >> 16
            continue
        target, *sources = names
        given = [read(name) for name in sources]
        if op == "prmt.b32":
            value = prmt(given[0], given[1], given[2] & 0xFFFF)
        elif op == "and.b32":
            value = given[0] & given[1]
        elif op == "shr.b32":
            value = given[0] >> given[1]
        elif op == "lop3.b32":
            assert given[3] == 0xEA  # (a & b) | c
            value = given[0] & given[1] | given[2]
        else:
            raise AssertionError(f"no meaning for {op}")
        registers[target] = value & 0xFFFFFFFF
    return registers


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_byte_permutes_decode_bit_exactly(quant_type: str, dtype: torch.dtype) -> None:
    from fastlora.backends.triton.kernels.decode4 import DECODE_PTX, HIGH_BYTES_PTX, LOW_BYTES_PTX

    weight = torch.randn(64, 64)
    packed, state = reference.quantize_4bit(weight, 64, quant_type)
    want = reference.dequantize_4bit(packed, state, dtype).view(torch.int16).int() & 0xFFFF
    words = packed.view(-1).view(torch.int32).view(64, 8)
    for row in range(64):
        # What `_pair` computes: two products a register, the first in the low half.
        products = (state.code * state.absmax[row]).to(dtype).view(torch.int16).int() & 0xFFFF
        pairs = [int(a) | int(b) << 16 for a, b in products.view(8, 2)]
        planes = [
            run_ptx(text, {"$1": pairs[2 * i], "$2": pairs[2 * i + 1]})["$0"]
            for text in (LOW_BYTES_PTX, HIGH_BYTES_PTX)
            for i in range(4)
        ]
        for index, word in enumerate(words[row].tolist()):
            given = {f"${9 + i}": plane for i, plane in enumerate(planes)}
            out = run_ptx(DECODE_PTX, given | {"$8": word & 0xFFFFFFFF})
            got = [out[f"${i}"] for i in range(8)]
            assert got == want[row, index * 8 : index * 8 + 8].tolist()
