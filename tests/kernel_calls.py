"""Calls of the CPU kernels as bytes for `tests/csrc/kernel_runner.cpp`, and what must come back.

The reference says what is right and `fastlora.tolerance` how far off a result may be; the program
only runs kernels. So it needs no torch, and can be compiled for a processor that has none.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlora import reference
from fastlora.quant import QuantState, from_mxfp4, quantize_bounds
from tests import embedding_cases, grouped_cases
from tests.cases import (
    BASES,
    CASES,
    DTYPES,
    FOUR_BIT,
    Base,
    Case,
    Inputs,
    exact_results,
    is_refused,
    make_inputs,
    plain_results,
)
from tests.tolerance import assert_close_to_exact

ROOT = Path(__file__).resolve().parents[1]
# Positions in the runner's list of kernels, and of dtypes in csrc/common/params.h.
KERNELS = re.findall(r"^  KERNEL\((\w+)", (ROOT / "csrc/common/params.h").read_text(), re.MULTILINE)
KERNELS += ["grouped_lora_linear_fwd", "grouped_lora_linear_bwd"]  # in linear/experts.h
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Record:
    """The bytes of one call, in the order in which the runner reads them."""

    data: bytearray = field(default_factory=bytearray)

    def integers(self, *values: int) -> None:
        self.data += struct.pack(f"={len(values)}q", *values)

    def real(self, value: float) -> None:
        self.data += struct.pack("=d", value)

    def array(self, tensor: Tensor | None) -> None:
        """A flat tensor, or null."""
        flat = b""
        if tensor is not None:
            flat = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        self.integers(len(flat))
        self.data += flat

    def rows(self, matrix: Tensor) -> None:
        """A matrix whose rows may lie apart, from its first element to its last, and its stride."""
        M, K = matrix.shape
        stride = matrix.stride(0) if M > 1 else K
        self.array(matrix.as_strided(((M - 1) * stride + K if M else 0,), (1,)))
        self.integers(stride)

    def quant(self, packed: Tensor | None, state: QuantState | None) -> None:
        self.array(packed)
        self.array(None if state is None else state.code)
        self.integers(64 if state is None else state.blocksize)
        inner = None if state is None else state.state2
        self.array(None if state is None or inner is not None else state.absmax)
        self.array(None if state is None or inner is None else state.absmax)
        self.array(None if inner is None else inner.code)
        self.array(None if inner is None else inner.absmax)
        self.array(None if state is None else state.offset)

    def weight(
        self, N: int, K: int, weight: Tensor, state: QuantState | None, compute: torch.dtype
    ) -> None:
        self.integers(N, K)
        dense = weight if state is None else None
        transposed = dense is not None and not dense.is_contiguous()
        self.array(dense.T if dense is not None and transposed else dense)
        self.integers(transposed)
        self.quant(None if state is None else weight, state)
        self.integers(FLOATS.index(compute))

    def layer(self, case: Case, inputs: Inputs) -> None:
        """The weight of a layer with the dtypes of x and of the adapter."""
        compute = inputs.compute_dtype or inputs.x.dtype
        self.weight(case.N, case.K, inputs.weight, inputs.quant_state, compute)
        self.integers(FLOATS.index(inputs.x.dtype), FLOATS.index(inputs.lora_A.dtype))

    def dropout(self, p: float, seed: Tensor) -> None:
        threshold, scale = reference.dropout_threshold(p)
        self.integers(threshold)
        self.real(scale)
        self.array(seed)


@dataclass
class Call:
    """One call; `check` raises AssertionError for results that are not right."""

    name: str
    record: Record
    outputs: tuple[torch.dtype, ...]
    check: Callable[[list[Tensor]], None]


def forward(case: Case, inputs: Inputs) -> Record:
    record = Record()
    record.integers(KERNELS.index("lora_linear_fwd"), case.M, inputs.lora_A.shape[0])
    record.layer(case, inputs)
    record.rows(inputs.x)
    for tensor in (inputs.bias, inputs.lora_A, inputs.lora_B):
        record.array(tensor)
    record.real(inputs.scaling)
    record.dropout(case.dropout_p, inputs.seed)
    record.integers(1, 1)
    return record


def backward(case: Case, inputs: Inputs, S: Tensor, needs: tuple[bool, bool, bool, bool]) -> Record:
    record = Record()
    record.integers(KERNELS.index("lora_linear_bwd"), case.M, inputs.lora_A.shape[0])
    record.layer(case, inputs)
    record.rows(inputs.dy)
    record.rows(inputs.x)
    for tensor in (inputs.lora_A, inputs.lora_B, S):
        record.array(tensor)
    record.real(inputs.scaling)
    record.dropout(case.dropout_p, inputs.seed)
    record.integers(*needs)
    return record


def layer_calls(case: Case, base: Base, dtypes: str) -> Iterator[Call]:
    """Forward and backward of a layer, held to the error policy."""
    torch.manual_seed(0)  # each has the values that it has alone
    case = base.fit(case)
    inputs = make_inputs(case, base, DTYPES[dtypes])
    exact, plain = exact_results(case, inputs), plain_results(case, inputs)
    x_dtype, adapter_dtype = inputs.x.dtype, inputs.lora_A.dtype
    # The kernels keep S in fp32, so it is held to plain torch in fp32.
    in_fp32 = inputs.layer._replace(lora_A=inputs.lora_A.float())
    S = reference.plain.shrink(inputs.x.double(), reference.plain.widened(inputs.layer))
    plain_S = reference.plain.shrink(inputs.x.float(), in_fp32)

    def check_forward(outputs: list[Tensor]) -> None:
        y, got_S = outputs
        assert_close_to_exact(y.view_as(exact.y), exact.y, plain.y, what="y")
        if S.numel() >= 16:
            assert_close_to_exact(got_S.view_as(S), S, plain_S, what="S")
        else:  # too few sums for a sample of errors
            torch.testing.assert_close(got_S.view_as(S).double(), S, rtol=1e-5, atol=1e-6)

    def check_backward(outputs: list[Tensor]) -> None:
        for name, out in zip(("dx", "dA", "dB", "dbias"), outputs, strict=True):
            want, base_result = getattr(exact, name), getattr(plain, name)
            out = out.view(want.shape).to(adapter_dtype if name in ("dA", "dB") else out.dtype)
            if base_result is None:
                base_result = want.to(out.dtype)
            assert_close_to_exact(out, want, base_result, what=name)

    name = f"{case}, {base}, {dtypes}"
    f32 = torch.float32
    yield Call(f"forward: {name}", forward(case, inputs), (x_dtype, f32), check_forward)
    record = backward(case, inputs, S.float(), (True, True, True, True))
    yield Call(f"backward: {name}", record, (x_dtype, f32, f32, f32), check_backward)


def grouped_calls(case: grouped_cases.Case, base: Base, dtypes: str) -> Iterator[Call]:
    """Forward and backward of a stack of experts, held to the error policy."""
    torch.manual_seed(0)
    inputs = grouped_cases.make_inputs(case, base, DTYPES[dtypes])
    exact, plain = (grouped_cases.segment_results(inputs, exactly) for exactly in (True, False))
    x, A, B, E = inputs.x, inputs.lora_A, inputs.lora_B, len(case.ends)
    kept = reference.dropout_mask(case.M, case.K, case.dropout_p, inputs.seed)
    kept = x.float() * kept * reference.dropout_threshold(case.dropout_p)[1]
    S = torch.zeros(case.M, case.R)
    for begin, end, a in zip((0, *case.ends), case.ends, A.float(), strict=False):
        S[begin:end] = kept[begin:end] @ a.T

    def record(op: str) -> Record:
        start = Record()
        start.integers(KERNELS.index(op), E)
        start.array(inputs.offsets.long())
        start.integers(case.M, case.R)
        start.weight(case.N, case.K, inputs.weight, inputs.state, inputs.compute or x.dtype)
        start.integers(FLOATS.index(x.dtype), FLOATS.index(A.dtype))
        return start

    def check_forward(outputs: list[Tensor]) -> None:
        y, got_S = outputs
        assert_close_to_exact(y.view_as(exact["y"]), exact["y"], plain["y"], what="y")
        torch.testing.assert_close(got_S.view_as(S), S, rtol=1e-4, atol=1e-4)

    def check_backward(outputs: list[Tensor]) -> None:
        for name, out in zip(("dx", "dA", "dB"), outputs[:3], strict=True):
            got = out.view(exact[name].shape).to(plain[name].dtype)
            assert_close_to_exact(got, exact[name], plain[name], what=name)

    forward, backward = record("grouped_lora_linear_fwd"), record("grouped_lora_linear_bwd")
    forward.rows(x)
    forward.array(None)  # no bias
    backward.rows(inputs.dy)
    backward.rows(x)
    for tensor in (A, B):
        forward.array(tensor)
        backward.array(tensor)
    backward.array(S)
    for each in (forward, backward):
        each.real(inputs.scaling)
        each.dropout(case.dropout_p, inputs.seed)
    forward.integers(1, 1)
    backward.integers(1, 1, 1, 0)
    name, f32 = f"{case}, {base}, {dtypes}", torch.float32
    yield Call(f"grouped forward: {name}", forward, (x.dtype, f32), check_forward)
    yield Call(f"grouped backward: {name}", backward, (x.dtype, f32, f32, f32), check_backward)


def embedding_calls(case: embedding_cases.Case, dtypes: str) -> Iterator[Call]:
    """Forward and backward of LoRA on an embedding, held to the error policy."""
    torch.manual_seed(0)
    inputs = embedding_cases.make_inputs(case, *embedding_cases.DTYPES[dtypes])
    exact = embedding_cases.peft_results(case, inputs, torch.float64)
    plain = embedding_cases.peft_results(case, inputs)

    def record(op: str) -> Record:
        start = Record()
        start.integers(KERNELS.index(op), case.M, case.N, case.R, case.V)
        start.integers(FLOATS.index(inputs.weight.dtype), FLOATS.index(inputs.lora_A.dtype))
        return start

    def check(*names: str) -> Callable[[list[Tensor]], None]:
        def compare(outputs: list[Tensor]) -> None:
            for name, out in zip(names, outputs, strict=True):
                got = out.view(exact[name].shape).to(plain[name].dtype)
                assert_close_to_exact(got, exact[name], plain[name], what=name)

        return compare

    forward, backward = record("lora_embedding_fwd"), record("lora_embedding_bwd")
    for tensor in (inputs.ids, inputs.weight, inputs.lora_A, inputs.lora_B):
        forward.array(tensor)
    forward.real(case.weight_scale)
    forward.real(case.scaling)
    forward.integers(1)
    backward.rows(inputs.dy)
    for tensor in (inputs.ids, inputs.lora_A, inputs.lora_B):
        backward.array(tensor)
    backward.real(case.scaling)
    backward.integers(-1 if case.padding_idx is None else case.padding_idx, 1, 1)
    name, f32 = f"{case}, {dtypes}", torch.float32
    yield Call(f"embedding forward: {name}", forward, (inputs.weight.dtype,), check("y"))
    yield Call(f"embedding backward: {name}", backward, (f32, f32), check("dA", "dB"))


def mask_call(M: int, p: float) -> Call:
    """With A = B = identity and W = 0, y is drop(x): its zeros are the mask's, bit by bit."""
    K = 300
    eye, seed = torch.eye(K), torch.tensor([-12345])
    inputs = Inputs(torch.ones(M, K), torch.zeros(K, K), None, None, eye, eye, eye, seed, 1.0, None)
    mask = reference.dropout_mask(M, K, p, seed)

    def check(outputs: list[Tensor]) -> None:
        assert torch.equal(outputs[0].view(M, K) != 0, mask)

    case = Case("", M, K, K, K, dropout_p=p)
    return Call(f"mask: {M} rows, p = {p}", forward(case, inputs), (torch.float32,) * 2, check)


def quant_calls(
    shape: tuple[int, ...], base: Base, dtype: torch.dtype, out_dtype: torch.dtype
) -> Iterator[Call]:
    """Quantise and dequantise, bit by bit."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    weight.view(-1)[:: max(1, weight.numel() // 5)] *= 1e-30  # some tiny, some denormal
    assert base.quant_type is not None
    packed, state = reference.quantize_4bit(weight, base.blocksize, base.quant_type, base.nested)
    plain_packed, plain_state = reference.quantize_4bit(weight, base.blocksize, base.quant_type)
    name = f"{shape}, {base}, {dtype} to {out_dtype}"

    def check_quantize(outputs: list[Tensor]) -> None:
        assert torch.equal(outputs[0], plain_packed.view(-1))
        assert torch.equal(outputs[1], plain_state.absmax)

    record = Record()
    record.integers(KERNELS.index("quantize_4bit"))
    record.integers(weight.numel(), base.blocksize, FLOATS.index(dtype))
    record.array(weight)
    bounds, order = quantize_bounds(state.code)
    record.array(bounds)
    record.array(order.to(torch.uint8))
    record.integers(1, 1)
    yield Call(f"quantize: {name}", record, (torch.uint8, torch.float32), check_quantize)
    yield dequantize_call(name, packed, state, out_dtype)


def dequantize_call(name: str, packed: Tensor, state: QuantState, out_dtype: torch.dtype) -> Call:
    """Dequantise, bit by bit, except that any NaN will do."""
    decoded = reference.dequantize_4bit(packed, state, out_dtype)

    def check(outputs: list[Tensor]) -> None:
        torch.testing.assert_close(outputs[0], decoded.view(-1), rtol=0, atol=0, equal_nan=True)

    record = Record()
    record.integers(KERNELS.index("dequantize_4bit"), state.shape.numel())
    record.quant(packed, state)
    record.integers(FLOATS.index(out_dtype), 1)
    return Call(f"dequantize: {name}", record, (out_dtype,), check)


def scale_calls() -> Iterator[Call]:
    """Every scale and every code of MXFP4, in each dtype."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16)
    packed, state = from_mxfp4(codes, scales)
    for dtype in FLOATS:
        yield dequantize_call(f"every scale of mxfp4 to {dtype}", packed, state, dtype)


def norm_call(case: Case, base: Base, dtypes: str) -> Call:
    """DoRA's norms, held to the error policy."""
    torch.manual_seed(0)
    case = base.fit(case)
    inputs = make_inputs(case, base, DTYPES[dtypes])
    W, state, A, B = inputs.weight, inputs.quant_state, inputs.lora_A, inputs.lora_B
    if state is not None:
        W = reference.dequantize_4bit(W, state, inputs.compute_dtype or inputs.x.dtype)
    exact, plain = (
        reference.plain.dora_norm(W.to(t), A.to(t), B.to(t), inputs.scaling)
        for t in (torch.float64, torch.float32)
    )
    record = Record()
    record.integers(KERNELS.index("dora_norm"), A.shape[0])
    record.weight(case.N, case.K, inputs.weight, state, inputs.compute_dtype or inputs.x.dtype)
    record.integers(FLOATS.index(A.dtype))
    record.array(A)
    record.array(B)
    record.real(inputs.scaling)
    record.integers(1)

    def check(outputs: list[Tensor]) -> None:
        assert_close_to_exact(outputs[0], exact, plain, what="norms")

    return Call(f"DoRA's norms: {case}, {base}, {dtypes}", record, (torch.float32,), check)


def dora_calls(M: int, N: int, dtype: torch.dtype, rest_rows: int) -> Iterator[Call]:
    """DoRA's magnitude and dropout: `rest_rows` is 0 (none), 1 (a bias) or M."""
    torch.manual_seed(0)
    z, rest, dy = (torch.randn(M, N).to(dtype) for _ in range(3))
    factor, p, seed = torch.rand(N) + 0.5, 0.3, torch.tensor([-12345])
    rest = rest[:rest_rows]
    name, number = f"{M} x {N}, {dtype}, {rest_rows} rows", FLOATS.index(dtype)

    def call(op: str, outputs: tuple[torch.dtype, ...], *wanted: tuple[Tensor, Tensor]) -> Call:
        def check(got: list[Tensor]) -> None:
            for out, (exact, plain) in zip(got, wanted, strict=True):
                assert_close_to_exact(out.view(exact.shape), exact, plain, what=op)

        return Call(f"{op}: {name}", records[op], outputs, check)

    def pair(formula: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return formula(*(t.double() for t in tensors)), formula(*tensors)

    records = {op: Record() for op in KERNELS if op.startswith("dora_m") or "dropout" in op}
    for op, record in records.items():
        record.integers(KERNELS.index(op), M, N, number)
    forward, backward = records["dora_magnitude_fwd"], records["dora_magnitude_bwd"]
    forward.integers(number)
    forward.rows(z)
    forward.array(factor)
    forward.array(rest)
    forward.integers(N if rest_rows > 1 else 0, 1)
    added = rest if rest_rows else z.new_zeros(1, N)
    y = pair(reference.plain.dora_magnitude, z, factor, added)
    yield call("dora_magnitude_fwd", (dtype,), y)
    backward.rows(dy)
    backward.rows(z)
    backward.array(factor)
    backward.integers(1, 1, 1)
    yield call(
        "dora_magnitude_bwd",
        (dtype, torch.float32, torch.float32),
        pair(reference.plain.dora_magnitude, dy, factor),
        pair(lambda dy, z: (dy * z).sum(0), dy, z),
        pair(lambda dy: dy.sum(0), dy),
    )
    records["dora_dropout_fwd"].rows(z)
    records["dora_dropout_fwd"].dropout(p, seed)
    records["dora_dropout_fwd"].integers(1, 1)
    exact, plain = (reference.plain.dora_dropout(x, p, seed) for x in (z.double(), z))
    yield call("dora_dropout_fwd", (dtype,) * 2, *zip(exact, plain, strict=True))
    records["dora_dropout_bwd"].rows(z)
    records["dora_dropout_bwd"].rows(dy)
    records["dora_dropout_bwd"].dropout(p, seed)
    records["dora_dropout_bwd"].integers(1)

    def dx(dkept: Tensor, drest: Tensor) -> Tensor:
        x = torch.zeros_like(dkept).requires_grad_()
        both = reference.plain.dora_dropout(x, p, seed)
        return torch.autograd.grad(both, x, (dkept, drest))[0]

    yield call("dora_dropout_bwd", (dtype,), pair(dx, z, dy))


def make_calls() -> list[Call]:
    """Every case with every base, and every dtype with every base at least twice."""
    calls: list[Call] = []
    names = list(DTYPES)
    for i, case in enumerate(CASES):
        for j, base in enumerate(BASES):
            dtypes = names[(i + j) % len(names)]
            if is_refused(base, dtypes):
                dtypes = names[i % 5]
            calls += layer_calls(case, base, dtypes)
    nested = grouped_cases.Case("whole nested blocks", (2, 2, 41, 44), 46, 128, 256, 6, 0.2)
    for i, stack in enumerate((*grouped_cases.CASES, nested)):
        for j, base in enumerate(
            (Base(), Base("nf4", 64, nested=stack is nested), Base("fp4", 256))
        ):
            if stack.N * stack.K % base.blocksize == 0:
                calls += grouped_calls(stack, base, names[(i + j) % 5])
    for i, embedding in enumerate(embedding_cases.CASES):
        kinds = list(embedding_cases.DTYPES)
        for dtypes in (kinds[i % len(kinds)], kinds[(i + 2) % len(kinds)]):
            calls += embedding_calls(embedding, dtypes)
    for i, case in enumerate(CASES):
        base, kinds = BASES[i % len(BASES)], list(DTYPES)[:5]
        calls.append(norm_call(case, base, kinds[i % len(kinds)]))
    for i, (M, N) in enumerate(((1, 1), (7, 33), (17, 129), (33, 1027), (129, 300))):
        for dtype in FLOATS:
            calls += dora_calls(M, N, dtype, (0, 1, M)[i % 3])
    calls += [mask_call(M, p) for M, p in ((5, 0.05), (37, 0.5), (37, 0.999))]
    shapes = ((7, 33), (64, 128), (1, 1), (130, 577), (3, 1, 5))
    for i, shape in enumerate(shapes):
        for j, base in enumerate(base for base in FOUR_BIT if base.quant_type != "mxfp4"):
            calls += quant_calls(shape, base, FLOATS[(i + j) % 3], FLOATS[j % 3])
            calls += quant_calls(shape, base, FLOATS[i % 3], FLOATS[(i + j) % 3])
    calls += scale_calls()
    return calls


def read_results(path: Path, calls: list[Call]) -> Iterator[tuple[Call, list[Tensor]]]:
    """Each call with the arrays that the runner has written for it."""
    data = np.fromfile(path, dtype=np.uint8)
    position = 0
    for call in calls:
        outputs = []
        for dtype in call.outputs:
            (size,) = struct.unpack_from("=q", data, position)
            position += 8
            part = data[position : position + size].copy()
            outputs.append(
                torch.from_numpy(part).view(dtype) if size else torch.empty(0, dtype=dtype)
            )
            position += size
        yield call, outputs
    assert position == len(data), "the runner has written more than was asked for"
