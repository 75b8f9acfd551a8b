"""MXFP4 against its specification, written here from the bit fields, on every backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import (
    QLoraLinear,
    dequantize_4bit,
    from_mxfp4,
    grouped_lora_linear,
    lora_linear,
    quantize_4bit,
    reference,
    to_mxfp4,
)
from tests import emulated
from tests.cases import DTYPES
from tests.conftest import poisoned_memory
from tests.tolerance import assert_close_to_exact

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALING = 1.5


# ---- the specification -------------------------------------------------------------------------


def e2m1(code: int) -> float:
    """OCP MX 1.0, 5.3.3: one sign bit, two exponent bits with a bias of 1, one mantissa bit."""
    sign, exponent, mantissa = code >> 3 & 1, code >> 1 & 3, code & 1
    halves = mantissa if exponent == 0 else 2 + mantissa  # exponent 0: no implicit one
    return math.copysign(math.ldexp(halves, max(exponent, 1) - 2), -1.0 if sign else 1.0)


def element(scale: int, code: int) -> float:
    """OCP MX 1.0, 5.1 and 5.4.1: an element times 2^(scale - 127); scale 255 is NaN."""
    if scale == 255:
        return math.nan
    value = e2m1(code)
    return math.copysign(math.ldexp(abs(value), scale - 127), value)


def decoded(blocks: Tensor, scales: Tensor) -> Tensor:
    """`[..., G, 16]` and `[..., G]` of a checkpoint -> fp64 `[..., 32 G]`, low nibble first."""
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    table = torch.tensor(
        [[element(s, c) for c in range(16)] for s in range(256)], dtype=torch.float64
    )
    return table[scales.long()[..., None], pairs.long()].flatten(-2)


def quantised(block: list[float]) -> tuple[int, list[int]]:
    """OCP MX 1.0, 6.3: scale and codes of 32 numbers, by a search in exact arithmetic."""
    largest = max(map(abs, block))
    if largest == 0.0:
        return 0, [8 if math.copysign(1.0, v) < 0 else 0 for v in block]
    exponent = math.frexp(largest)[1] - 1 - 2  # floor(log2) less the largest exponent of E2M1
    exponent = min(max(exponent, -127), 127)
    codes = []
    for value in block:
        exact = abs(Fraction(value)) / Fraction(2) ** exponent
        distance = [abs(exact - Fraction(e2m1(code))) for code in range(8)]
        nearest = [code for code in range(8) if distance[code] == min(distance)]
        even = [code for code in nearest if code % 2 == 0]
        code = nearest[0] if len(nearest) == 1 else even[0]
        codes.append(code + (8 if math.copysign(1.0, value) < 0 else 0))
    return exponent + 127, codes


def test_the_table_of_elements() -> None:
    values = [e2m1(code) for code in range(16)]
    assert values == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert math.copysign(1.0, values[8]) == -1.0


# ---- decoding ----------------------------------------------------------------------------------


@pytest.fixture(params=["reference", "native", emulated.NAME, "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == emulated.NAME:
        emulated.load()
        with emulated.as_backend() as name:
            yield name
        return
    skip_unless_it_runs(request.param)
    yield request.param


def skip_unless_it_runs(backend: str) -> None:
    try:
        dequantize_4bit(*reference.quantize_4bit(torch.ones(64)), backend=backend)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_scale_and_code(dtype: torch.dtype, backend: str) -> None:
    """All 256 scales, each with every pair of codes: bit for bit, minus zero included."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(256, 1, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    packed, state = from_mxfp4(blocks, scales)
    with poisoned_memory():
        out = dequantize_4bit(packed, state, dtype, backend=backend)
    want = decoded(blocks, scales).float().to(dtype)
    assert want[255].isnan().all() and want[254].isinf().any()
    same = bits(out) == bits(want)
    if backend == "triton" and dtype == torch.bfloat16:
        # Triton's interpreter drops bits of fp32 numbers that are subnormal in bf16.
        same |= want.abs() < torch.finfo(torch.bfloat16).tiny
    assert torch.equal(out.isnan(), want.isnan())
    assert (same | want.isnan()).all()


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


def test_nothing_flushes_the_smallest() -> None:
    blocks, scales = torch.full((1, 1, 16), 0x11, dtype=torch.uint8), torch.zeros(1, 1).byte()
    out = dequantize_4bit(*from_mxfp4(blocks, scales), torch.float32)
    assert out.unique().tolist() == [2.0**-128]  # 0.5 * 2^-127, subnormal twice over


@pytest.mark.parametrize("stack", [(), (3,)], ids=["layer", "experts"])
def test_checkpoints_go_both_ways(stack: tuple[int, ...]) -> None:
    blocks, scales = checkpoint(*stack, 6, 96)
    packed, state = from_mxfp4(blocks, scales, torch.float16)
    assert packed.shape == (blocks.numel(), 1) and packed.dtype == torch.uint8
    assert state.shape == (*stack, 6, 96) and state.dtype == torch.float16
    assert (state.quant_type, state.blocksize, state.nested) == ("mxfp4", 32, False)
    assert state.absmax.data_ptr() == scales.data_ptr()
    out = dequantize_4bit(packed, state, torch.float32)
    assert torch.equal(out.double(), decoded(blocks, scales))
    for got, want in zip(to_mxfp4(packed, state), (blocks, scales), strict=True):
        assert torch.equal(got, want)
    turned = blocks.mT.contiguous().mT  # not contiguous
    assert torch.equal(from_mxfp4(turned, scales)[0], packed)


def test_gpt_oss_decodes_them_alike() -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4", exc_type=ImportError)
    blocks, scales = checkpoint(2, 6, 96)
    want = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    out = dequantize_4bit(*from_mxfp4(blocks, scales))
    assert torch.equal(out, want.mT)  # gpt-oss computes x W with W [E, K, N]


def test_what_a_checkpoint_may_not_be() -> None:
    blocks, scales = checkpoint(6, 96)
    with pytest.raises(TypeError, match=r"scales must be uint8, got torch\.int32"):
        from_mxfp4(blocks, scales.int())
    with pytest.raises(ValueError, match=r"blocks must be \[\.\.\., N, K / 32, 16\], got \(6, 3\)"):
        from_mxfp4(scales, scales)
    with pytest.raises(ValueError, match=r"scales must be \(6, 3\) to match blocks, got \(3, 6\)"):
        from_mxfp4(blocks, scales.T)
    with pytest.raises(ValueError, match="quant_state must be of mxfp4, got 'nf4'"):
        to_mxfp4(*quantize_4bit(torch.randn(2, 64)))
    with pytest.raises(ValueError, match="a format of bitsandbytes, which has no 'mxfp4'"):
        from_mxfp4(blocks, scales)[1].as_dict()


def test_helpers_are_small() -> None:
    """Beside the checkpoint's own bytes: 4 for each 256 scales, and two tables."""
    blocks, scales = checkpoint(64, 4096)
    packed, state = from_mxfp4(blocks, scales)
    held = sum(t.numel() * t.element_size() for t in (packed, *state.tensors()) if t is not None)
    own = blocks.numel() + scales.numel()
    assert held - own == 4 * scales.numel() // 256 + 4 * (16 + 256 + 1)


# ---- quantising --------------------------------------------------------------------------------


def blocks_of(dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of 32: random magnitudes, midpoints and their neighbours, and the ends of the range."""
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    for exponent in range(-150, 128, 3):
        yield torch.randn(32).double() * 2.0**exponent
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0]).double()
    for exponent in (-130, -127, -20, 0, 3, 100):
        row = torch.cat([midpoints, -midpoints, midpoints * (1 + 2**-7), midpoints * (1 - 2**-7)])
        yield row * 2.0**exponent
        yield torch.cat([row[:-1] / 2, row.new_tensor([4.0])]) * 2.0**exponent
    yield torch.full((32,), largest).double()
    yield torch.full((32,), tiny).double()
    yield torch.full((32,), tiny / 8).double()
    yield torch.tensor([largest, tiny, -tiny, 0.0, -0.0, 1.0, -1.0, 6.0] * 4).double()
    yield torch.tensor([0.0, -0.0] * 16).double()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_quantises_as_an_exact_search_does(dtype: torch.dtype, backend: str) -> None:
    weight = torch.stack(list(blocks_of(dtype)))
    weight = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    skip_unless_it_runs(backend)
    packed, state = quantize_4bit(weight, quant_type="mxfp4", backend=backend)
    assert state.dtype == dtype and state.shape == weight.shape
    blocks, scales = to_mxfp4(packed, state)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).view(-1, 32)
    for row, scale, got in zip(weight.tolist(), scales.view(-1).tolist(), codes, strict=True):
        assert (scale, got.tolist()) == quantised(row), row


def test_what_mxfp4_holds_is_kept() -> None:
    blocks, scales = checkpoint(40, 128)
    # A block whose largest element is less than 4 would get a smaller scale.
    blocks[..., 0] = 0x6F
    again = quantize_4bit(decoded(blocks, scales).float(), quant_type="mxfp4")
    for got, want in zip(to_mxfp4(*again), (blocks, scales), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_is_nan(odd: float) -> None:
    weight = torch.randn(3, 64)
    weight[1, 40] = odd
    packed, state = quantize_4bit(weight, quant_type="mxfp4")
    assert state.absmax.tolist().count(255) == 1
    out = dequantize_4bit(packed, state)
    bad = torch.zeros(3, 64, dtype=torch.bool)
    bad[1, 32:] = True
    assert torch.equal(out.isnan(), bad) and out[~bad].isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (0, 64), (5, 0)])
def test_empty_weight(shape: tuple[int, ...]) -> None:
    packed, state = quantize_4bit(torch.empty(shape), quant_type="mxfp4")
    assert packed.shape == (0, 1) and dequantize_4bit(packed, state).shape == shape


def test_what_mxfp4_does_not_have() -> None:
    weight = torch.randn(4, 64)
    assert quantize_4bit(weight, 32, "mxfp4")[1].blocksize == 32
    with pytest.raises(ValueError, match="blocksize must be 32 for mxfp4, got 64"):
        quantize_4bit(weight, 64, "mxfp4")
    with pytest.raises(ValueError, match="compress_statistics must be False for mxfp4"):
        quantize_4bit(weight, quant_type="mxfp4", compress_statistics=True)
    with pytest.raises(ValueError, match=r"last dimension .* multiple of 32 .* got \(2, 48\)"):
        quantize_4bit(torch.randn(2, 48), quant_type="mxfp4")
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        quantize_4bit(weight.double(), quant_type="mxfp4")
    with pytest.raises(ValueError, match="multiple of 32 for mxfp4"):
        QLoraLinear(72, 8, quant_type="mxfp4")
    with pytest.raises(ValueError, match="blocksize must be 32"):
        QLoraLinear(64, 8, quant_type="mxfp4", blocksize=128)


# ---- layers and experts --------------------------------------------------------------------------


def checkpoint(*shape: int) -> tuple[Tensor, Tensor]:
    """Random blocks and scales of a weight `[..., N, K]`, of a trained layer's magnitudes."""
    *outer, K = shape
    blocks = torch.randint(0, 256, (*outer, K // 32, 16), dtype=torch.uint8)
    scales = torch.randint(120, 126, (*outer, K // 32), dtype=torch.uint8)
    return blocks, scales


def compare(
    results: dict[str, dict[str, Tensor]], names: tuple[str, ...] = ("y", "dx", "dA", "dB")
) -> None:
    for name in names:
        fast, exact, plain = (results[way][name] for way in ("fast", "exact", "plain"))
        assert_close_to_exact(fast, exact, plain, what=name)


def gradients(y: Tensor, dy: Tensor, **leaves: Tensor) -> dict[str, Tensor]:
    y.backward(dy.to(y.dtype))
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), **grads}


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K", "R", "p"),
    [(1, 40, 96, 16, 0.0), (7, 65, 320, 8, 0.2), (71, 35, 160, 5, 0.1), (129, 96, 64, 16, 0.0)],
)
def test_layer(M: int, N: int, K: int, R: int, p: float, dtypes: str, backend: str) -> None:
    """Forward and all gradients of a layer on a checkpoint's bytes, by the error policy."""
    x_dtype, adapter_dtype, compute_dtype = DTYPES[dtypes]
    blocks, scales = checkpoint(N, K)
    W, seed = decoded(blocks, scales), torch.tensor([0x1234_5678_9ABC])
    given = {
        "x": torch.randn(M, K).to(x_dtype),
        "A": (torch.randn(R, K) * K**-0.5).to(adapter_dtype),
        "B": (torch.randn(N, R) * R**-0.5).to(adapter_dtype),
        "bias": torch.randn(N).to(x_dtype),
    }
    dy, keep = torch.randn(M, N).to(x_dtype), torch.ones(M, K)
    if p:
        keep = reference.dropout_mask(M, K, p, seed) * reference.dropout_threshold(p)[1]

    def by_torch(x: Tensor, A: Tensor, B: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        base = nn.functional.linear(x.to(dtype), W.float().to(dtype), bias.to(dtype)).to(x.dtype)
        return (base + (x.to(A.dtype) * keep.to(A.dtype)) @ A.T @ B.T * SCALING).to(x.dtype)

    results: dict[str, dict[str, Tensor]] = {}
    for way in ("fast", "exact", "plain"):
        wide = torch.float64 if way == "exact" else None
        leaves: dict[str, Any] = {
            k: t.to(wide or t.dtype, copy=True).requires_grad_() for k, t in given.items()
        }
        if way == "fast":
            with poisoned_memory():
                packed, state = from_mxfp4(blocks, scales)
                y = lora_linear(
                    leaves["x"], packed, leaves["bias"], leaves["A"], leaves["B"], SCALING,
                    quant_state=state, compute_dtype=compute_dtype, dropout_p=p, seed=seed,
                    backend=backend,
                )  # fmt: skip
                results[way] = gradients(y, dy, **leaves)
        else:
            y = by_torch(**leaves, dtype=wide or compute_dtype or x_dtype)
            results[way] = gradients(y, dy, **leaves)
    compare(results, ("y", "dx", "dA", "dB", "dbias"))


# Experts of 256 scales each, and of a number that is no multiple of it: their scales are decoded
# for the call, since 256 of them may belong to two experts.
@pytest.mark.parametrize(("N", "K"), [(64, 128), (33, 96)], ids=["256 scales", "99 scales"])
@pytest.mark.parametrize("dtypes", ["fp32", "bf16, fp32 adapter", "fp16", "bf16"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_experts(N: int, K: int, dtypes: str, p: float, backend: str) -> None:
    """Forward and all gradients of a stack of experts, one of them without tokens."""
    if backend in (emulated.NAME, "triton") and p:
        pytest.skip("no GPU kernel whose dropout counts rows from the first of all experts")
    x_dtype, adapter_dtype, _ = DTYPES[dtypes]
    M, E, R, ends = 43, 4, 4, (9, 9, 40, 41)
    blocks, scales = checkpoint(E, N, K)
    W, offsets, seed = decoded(blocks, scales), torch.tensor(ends), torch.tensor([77])
    given = {
        "x": torch.randn(M, K).to(x_dtype),
        "A": (torch.randn(E, R, K) * K**-0.5).to(adapter_dtype),
        "B": (torch.randn(E, N, R) * R**-0.5).to(adapter_dtype),
    }
    dy, keep = torch.randn(M, N).to(x_dtype), torch.ones(M, K)
    if p:
        keep = reference.dropout_mask(M, K, p, seed) * reference.dropout_threshold(p)[1]

    def by_torch(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        kept, parts = x.to(A.dtype) * keep.to(A.dtype), []
        for e, (begin, end) in enumerate(itertools.pairwise((0, *ends))):
            base = x[begin:end] @ W[e].to(x.dtype).T
            parts.append((base + kept[begin:end] @ A[e].T @ B[e].T * SCALING).to(x.dtype))
        return torch.cat([*parts, x.new_zeros(M - ends[-1], N)])

    results: dict[str, dict[str, Tensor]] = {}
    for way in ("fast", "exact", "plain"):
        wide = torch.float64 if way == "exact" else None
        leaves: dict[str, Any] = {
            k: t.to(wide or t.dtype, copy=True).requires_grad_() for k, t in given.items()
        }
        if way == "fast":
            packed, state = from_mxfp4(blocks, scales)
            y = grouped_lora_linear(
                leaves["x"], packed, offsets, leaves["A"], leaves["B"], SCALING,
                quant_state=state, dropout_p=p, seed=seed, backend=backend,
            )  # fmt: skip
        else:
            y = by_torch(**leaves)
        results[way] = gradients(y, dy, **leaves)
    compare(results)


# ---- the module --------------------------------------------------------------------------------


def make_layer(**options: Any) -> QLoraLinear:
    layer = QLoraLinear(96, 40, r=4, quant_type="mxfp4", dtype=torch.bfloat16, **options)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(std=0.1)
    return layer


def test_module_quantises_its_linear() -> None:
    linear = nn.Linear(96, 40, dtype=torch.bfloat16)
    layer = QLoraLinear.from_linear(linear, r=4, quant_type="mxfp4")
    packed, state = quantize_4bit(linear.weight, quant_type="mxfp4")
    assert torch.equal(layer.weight, packed)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    dense = dequantize_4bit(packed, state)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense, linear.bias))
    assert "quant_type=mxfp4, blocksize=32, nested=False" in repr(layer)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("before", ["mxfp4", "nf4"])
def test_state_dict_has_the_keys_of_gpt_oss(before: str, assign: bool) -> None:
    layer = make_layer()
    saved = layer.state_dict()
    assert saved.keys() == {
        "base_layer.weight_blocks",
        "base_layer.weight_scales",
        "base_layer.bias",
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    blocks, scales = saved["base_layer.weight_blocks"], saved["base_layer.weight_scales"]
    assert blocks.shape == (40, 3, 16) and scales.shape == (40, 3)
    dense = dequantize_4bit(layer.weight, layer.base_layer.quant_state, torch.float32)
    assert torch.equal(decoded(blocks, scales).float(), dense)
    other = QLoraLinear(96, 40, r=4, quant_type=before, dtype=torch.bfloat16)
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(saved, assign=assign)
    assert torch.equal(other(x), layer(x))
    assert other.base_layer.quant_state.dtype == torch.bfloat16
    # And back: a layer takes whichever format the state dict has.
    four = QLoraLinear(96, 40, r=4, dtype=torch.bfloat16)
    other.load_state_dict(four.state_dict())
    assert other.base_layer.quant_state.quant_type == "nf4"
    with torch.device("meta"):
        empty = QLoraLinear(96, 40, r=4, quant_type="mxfp4", dtype=torch.bfloat16)
    empty.load_state_dict(saved, assign=True)
    assert torch.equal(empty(x), layer(x))


def test_state_dict_errors() -> None:
    layer = make_layer()
    saved = layer.state_dict()
    with pytest.raises(RuntimeError, match=r"weight: entries .* missing \['_scales'\]"):
        layer.load_state_dict({k: v for k, v in saved.items() if not k.endswith("_scales")})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_blocks.*weight_scales"):
        layer.load_state_dict({k: v for k, v in saved.items() if "base_layer.weight" not in k})
    with pytest.raises(RuntimeError, match=r"weight: shape must be \(40, 96\), got \(40, 64\)"):
        layer.load_state_dict(
            {k: v[:, :2] if "weight_" in k else v for k, v in saved.items()}, strict=False
        )


def test_merge_and_unmerge() -> None:
    layer = make_layer()
    packed, state = layer.weight.detach().clone(), layer.base_layer.quant_state
    dense = dequantize_4bit(packed, state, torch.float32)
    A, B = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    exact = dense + layer.scaling * B @ A
    error = layer.merge()
    merged = layer.base_layer.quant_state
    assert (merged.quant_type, merged.dtype) == ("mxfp4", torch.bfloat16)
    want, want_state = quantize_4bit(exact, quant_type="mxfp4")
    assert torch.equal(layer.weight, want) and torch.equal(merged.absmax, want_state.absmax)
    assert 0.01 < error.relative < 0.2
    layer.unmerge()
    assert torch.equal(layer.weight, packed) and layer.base_layer.quant_state is state


def test_moves_casts_and_copies_keep_the_scales() -> None:
    layer = make_layer()
    x = torch.randn(5, 96)
    before = [t.clone() for t in layer.base_layer.quant_state.tensors() if t is not None]
    layer.half().float()
    after = [t for t in layer.base_layer.quant_state.tensors() if t is not None]
    assert len(before) == len(after) == 5
    for old, new in zip(before, after, strict=True):
        assert old.dtype == new.dtype and torch.equal(old.nan_to_num(7), new.nan_to_num(7))
    assert layer.base_layer.quant_state.state2.quant_type == "e8m0"
    assert layer(x).isfinite().all()
    assert all(t is None or t.is_meta for t in layer.to("meta").base_layer.quant_state.tensors())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "mxfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_leak_in(quant_type: str, dtype: torch.dtype) -> None:
    """Transformers sets one while it builds a model."""
    weight = torch.randn(8, 64)
    options = {"quant_type": quant_type, "compress_statistics": quant_type != "mxfp4"}
    want = dequantize_4bit(*quantize_4bit(weight, **options))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        data, state = quantize_4bit(weight, **options)
        assert torch.equal(dequantize_4bit(data, state), want)
    finally:
        torch.set_default_dtype(before)
