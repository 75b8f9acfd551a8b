"""One op on every kind of processor: the CPU's kernels, emulated CUDA, Triton interpreted.

The same inputs, the one error policy, and the same dropout mask. A backend joins with its name.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastlora import backends, ops, reference
from fastlora.backends.contract import Request
from fastlora.layer import Layer
from tests import emulated
from tests.backend_checks import check_against_definition
from tests.cases import Base, Case

RUNNERS = ("native", emulated.NAME, "triton")

CASES = (
    Case("decoding", 9, 24, 128, 4, dropout_p=0.2),
    Case("a tile and a bit", 70, 72, 160, 5, dropout_p=0.1, strided=True),
    Case("no multiple of a tile", 33, 35, 96, 3, dropout_p=0.3, bias=False),
)
BASES = (Base("nf4", 64, nested=True), Base("fp4", 128), Base("mxfp4", 32))
DTYPES = ("bf16, fp32 adapter", "fp16", "fp32 computed in bf16")
CALL = Request("lora_linear_fwd", "cpu", four_bit=True)


@pytest.fixture(params=RUNNERS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == emulated.NAME:
        emulated.load()
        with emulated.as_backend() as name:
            yield name
        return
    if reason := backends.BACKENDS[request.param].unsupported(CALL):
        pytest.skip(reason)
    yield request.param


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_error_policy(case: Case, base: Base, dtypes: str, backend: str) -> None:
    emulated.called.clear()
    check_against_definition(case, base, dtypes, backend)
    if backend == emulated.NAME:
        # qlora_decode takes blocks of 64 codes.
        decodes = case.name == "decoding" and "computed" not in dtypes and base.blocksize >= 64
        forward = "qlora_decode" if decodes else "qlora_gemm_fwd"
        assert emulated.called == [forward, "qlora_gemm_dx"]


# The CUDA side makes the forward's mask itself for at most 64 tokens; above, S has another maker.
@pytest.mark.parametrize("M", [5, 64])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_one_dropout_mask(M: int, p: float, backend: str) -> None:
    """With A = B = identity and W = 0, y is drop(x) and dx is drop'(dy): zeros are the mask's."""
    K, seed = 192, torch.tensor([-12345])
    emulated.called.clear()
    x, eye = torch.ones(M, K, dtype=torch.bfloat16), torch.eye(K)
    weight, state = reference.quantize_4bit(torch.zeros(K, K))
    mask = reference.dropout_mask(M, K, p, seed)
    layer = Layer(weight, eye, eye, 1.0, quant_state=state, dropout_p=p, seed=seed)
    y, S = ops.lora_linear_fwd(x, layer, backend=backend)
    assert torch.equal(y != 0, mask)
    dx, *_ = ops.lora_linear_bwd(x, x, layer, S, backend=backend)
    assert torch.equal(dx != 0, mask)
    if backend == emulated.NAME:
        assert emulated.called == ["qlora_decode", "qlora_gemm_dx"]
