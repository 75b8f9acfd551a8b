"""lora_linear on shapes, strides, dtypes and flags that nobody thought of.

Two properties. On small integers every product and sum is exact, whatever the order and whatever
the dtype of an intermediate, so every result must equal the float64 reference rounded once: bit by
bit, for sizes down to zero. On normal random numbers the error policy must hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tolerance import assert_close_to_exact
from torch import Tensor

from fastlora import dequantize_4bit, lora_linear, quantize_4bit, reference
from fastlora.layer import Layer, Needs
from fastlora.quant import BLOCKSIZES, QuantState, dynamic_code, find_format

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# The same examples on every run, unless another profile is asked for with --hypothesis-profile.
settings.register_profile(
    "fastlora",
    derandomize=True,
    deadline=None,
    # Each example needs the poisoned memory, none needs a fresh one.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
if settings.get_current_profile_name() == "default":
    settings.load_profile("fastlora")
pytestmark = pytest.mark.usefixtures("poison")

QUANT_TYPES = ("nf4", "fp4")  # those with a kernel that quantises
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]
LAYOUTS = ["contiguous", "transposed", "strided", "offset", "expanded"]


@dataclass(frozen=True)
class Quant:
    quant_type: str
    blocksize: int
    nested: bool
    compute_dtype: torch.dtype | None


@dataclass(frozen=True)
class Case:
    lead: tuple[int, ...]
    N: int
    K: int
    R: int
    dtype: torch.dtype
    adapter_dtype: torch.dtype
    x_layout: str
    dy_layout: str
    bias: bool
    needs: tuple[bool, bool, bool, bool]
    scaling: float
    p: float
    training: bool
    quant: Quant | None
    seed: int


def cases(smallest: int, lead: st.SearchStrategy[tuple[int, ...]]) -> st.SearchStrategy[Case]:
    """Cases with N, K and R from `smallest` up.

    N and K stay below 128: a sum of so many halves has no more than the 8 significant bits of bf16.
    """
    quant = st.builds(
        Quant,
        quant_type=st.sampled_from(QUANT_TYPES),
        blocksize=st.sampled_from(BLOCKSIZES[:4]),
        nested=st.booleans(),
        compute_dtype=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    )

    def build(dtypes: tuple[torch.dtype, torch.dtype], **fields: object) -> Case:
        return Case(dtype=dtypes[0], adapter_dtype=dtypes[1], **fields)  # type: ignore[arg-type]

    return st.builds(
        build,
        dtypes=st.sampled_from(DTYPES),
        lead=lead,
        N=st.integers(smallest, 127),
        K=st.integers(smallest, 127),
        R=st.integers(min(smallest, 4), 24),
        x_layout=st.sampled_from(LAYOUTS),
        dy_layout=st.sampled_from(LAYOUTS),
        bias=st.booleans(),
        needs=st.tuples(*[st.booleans()] * 4),
        scaling=st.sampled_from([0.5, 1.0, 2.0, -0.25]),
        p=st.sampled_from([0.0, 0.5, 0.75]),  # their scales, 2 and 4, are exact
        training=st.booleans(),
        quant=st.none() | quant,
        seed=st.integers(0, 2**31),
    )


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values (for "expanded": the first row everywhere) at other strides."""
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        return torch.repeat_interleave(t, 2, dim=-1)[..., ::2]
    if layout == "offset":
        return torch.cat([t.new_full((3,), 7), t.reshape(-1)])[3:].view(t.shape)
    if layout == "expanded" and t.dim() > 1 and t.shape[0] > 0:
        return t[:1].expand(t.shape)
    return t


@dataclass
class Inputs:
    x: Tensor
    dy: Tensor
    weight: Tensor  # what lora_linear takes
    dense: Tensor  # the same, decoded
    state: QuantState | None
    bias: Tensor | None
    A: Tensor
    B: Tensor


def exact_4bit(case: Case) -> tuple[Tensor, QuantState]:
    """A 4-bit weight of the values 0, 1/2 and 1 of either sign."""
    q = case.quant
    assert q is not None
    n = case.N * case.K
    # NF4 holds -1, 0 and 1. FP4 holds 0 and 1/6 of either sign: six times absmax.
    nibbles = torch.tensor([0, 7, 15] if q.quant_type == "nf4" else [0, 6, 14], dtype=torch.uint8)
    unit = 1.0 if q.quant_type == "nf4" else 6.0
    chosen = nibbles[torch.randint(3, (n + n % 2,))]
    packed = (chosen[::2] << 4 | chosen[1::2])[:, None]
    whole = torch.randint(2, (-(-n // q.blocksize),)).bool()
    absmax, offset, state2 = torch.where(whole, unit, unit / 2), None, None
    if q.nested:
        code = dynamic_code()
        one, zero = code.argmax(), (code == 0).nonzero()[0, 0]
        offset = torch.tensor(unit / 2)
        inner = torch.full((-(-whole.numel() // 256),), unit / 2)
        absmax = torch.where(whole, one, zero).to(torch.uint8)
        state2 = QuantState(inner, absmax.shape, code, torch.float32, 256, "dynamic")
    shape = torch.Size((case.N, case.K))
    code = find_format(q.quant_type).table()
    return packed, QuantState(
        absmax, shape, code, case.dtype, q.blocksize, q.quant_type, offset, state2
    )


def make_inputs(case: Case, integers: bool) -> Inputs:
    torch.manual_seed(case.seed)

    def values(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape).float() if integers else torch.randn(shape)

    state = None
    if case.quant is None:
        weight = dense = values(case.N, case.K).to(case.dtype)
    else:
        if integers:
            weight, state = exact_4bit(case)
        else:
            weight, state = reference.quantize_4bit(
                values(case.N, case.K),
                case.quant.blocksize,
                case.quant.quant_type,
                case.quant.nested,
            )
        dense = reference.dequantize_4bit(weight, state, case.quant.compute_dtype or case.dtype)
    need_bias = case.needs[3]
    bias = values(case.N).to(case.dtype).requires_grad_(need_bias) if case.bias else None
    return Inputs(
        x=lay_out(values(*case.lead, case.K).to(case.dtype), case.x_layout),
        dy=lay_out(values(*case.lead, case.N).to(case.dtype), case.dy_layout),
        weight=weight,
        dense=dense,
        state=state,
        bias=bias,
        A=values(case.R, case.K).to(case.adapter_dtype).requires_grad_(case.needs[1]),
        B=values(case.N, case.R).to(case.adapter_dtype).requires_grad_(case.needs[2]),
    )


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view(torch.uint8)


def gradients(y: Tensor, x: Tensor, dy: Tensor, inputs: Inputs) -> dict[str, Tensor | None]:
    leaves = {"dx": x, "dA": inputs.A, "dB": inputs.B, "dbias": inputs.bias}
    wanted = {name: t for name, t in leaves.items() if t is not None and t.requires_grad}
    assert y.requires_grad == bool(wanted)
    grads = torch.autograd.grad(y, list(wanted.values()), dy) if wanted else ()
    found = dict(zip(wanted, grads, strict=True))
    return {"y": y.detach()} | {name: found.get(name) for name in leaves}


def run_ours(case: Case, inputs: Inputs, seed: Tensor) -> dict[str, Tensor | None]:
    # A detached view keeps the strides and is a leaf.
    x = inputs.x.detach().requires_grad_(case.needs[0])
    before = [t.detach().clone() for t in (inputs.x, inputs.dy, inputs.A, inputs.B, inputs.weight)]
    y = lora_linear(
        x,
        inputs.weight,
        inputs.bias,
        inputs.A,
        inputs.B,
        case.scaling,
        quant_state=inputs.state,
        compute_dtype=None if case.quant is None else case.quant.compute_dtype,
        dropout_p=case.p,
        training=case.training,
        seed=seed,
    )
    assert y.shape == (*case.lead, case.N) and y.dtype == case.dtype
    result = gradients(y, x, inputs.dy, inputs)
    after = (inputs.x, inputs.dy, inputs.A, inputs.B, inputs.weight)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new), "an input was written to"
    return result


def run_exact(case: Case, inputs: Inputs, seed: Tensor) -> dict[str, Tensor | None]:
    p = case.p if case.training else 0.0
    x = inputs.x.double().reshape(-1, case.K)
    dy = inputs.dy.double().reshape(-1, case.N)
    A, B = inputs.A.detach().double(), inputs.B.detach().double()
    bias = None if inputs.bias is None else inputs.bias.detach().double()
    layer = Layer(inputs.dense.double(), A, B, case.scaling, bias, dropout_p=p, seed=seed)
    y, S = reference.lora_linear_fwd(x, layer)
    dx, dA, dB, dbias = reference.lora_linear_bwd(dy, x, layer, S, Needs(bias=True))
    assert dx is not None
    dx = dx.view(inputs.x.shape)
    return {"y": y.view(*case.lead, case.N), "dx": dx, "dA": dA, "dB": dB, "dbias": dbias}


def run_plain(case: Case, inputs: Inputs, seed: Tensor) -> dict[str, Tensor | None]:
    """PEFT's sequence in the working dtypes."""
    x = inputs.x.detach().requires_grad_(case.needs[0])
    layer = Layer(
        inputs.weight,
        inputs.A,
        inputs.B,
        case.scaling,
        inputs.bias,
        inputs.state,
        None if case.quant is None else case.quant.compute_dtype,
        case.p if case.training else 0.0,
        seed,
    )
    return gradients(reference.plain.lora_linear(x, layer), x, inputs.dy, inputs)


@settings(max_examples=150)
@given(case=cases(1, st.lists(st.integers(0, 5), max_size=3).map(tuple)))
def test_small_integers_are_exact(case: Case) -> None:
    inputs = make_inputs(case, integers=True)
    seed = torch.tensor([case.seed])
    ours, exact = run_ours(case, inputs, seed), run_exact(case, inputs, seed)
    for name, value in ours.items():
        if value is not None:
            true = exact[name]
            assert true is not None and value.shape == true.shape, name
            assert torch.equal(value, true.to(value.dtype)), name


@settings(max_examples=50)
@given(case=cases(17, st.sampled_from([(17,), (33,), (64,), (5, 7), (2, 3, 11)])))
def test_normal_numbers_keep_the_error_policy(case: Case) -> None:
    inputs = make_inputs(case, integers=False)
    seed = torch.tensor([case.seed])
    ours, exact = run_ours(case, inputs, seed), run_exact(case, inputs, seed)
    plain = run_plain(case, inputs, seed)
    for name, value in ours.items():
        true, base = exact[name], plain[name]
        assert (value is None) == (base is None), name
        if value is not None and base is not None and true is not None:
            assert_close_to_exact(value, true, base, what=name)


@settings(max_examples=80)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
    blocksize=st.sampled_from(BLOCKSIZES),
    quant_type=st.sampled_from(QUANT_TYPES),
    nested=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exponent=st.integers(-45, 4),
    seed=st.integers(0, 2**31),
)
def test_ops_quantise_as_the_reference(
    shape: tuple[int, ...],
    blocksize: int,
    quant_type: str,
    nested: bool,
    dtype: torch.dtype,
    exponent: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = (torch.randn(shape) * 10.0**exponent).to(dtype)
    packed, state = quantize_4bit(weight, blocksize, quant_type, nested)
    expected, expected_state = reference.quantize_4bit(weight, blocksize, quant_type, nested)
    assert torch.equal(packed, expected)
    for ours, theirs in zip(state.tensors(), expected_state.tensors(), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert torch.equal(bits(ours), bits(theirs))
    for out_dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = dequantize_4bit(packed, state, out_dtype)
        theirs = reference.dequantize_4bit(expected, expected_state, out_dtype)
        assert torch.equal(bits(ours), bits(theirs))
