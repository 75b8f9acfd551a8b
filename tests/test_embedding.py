"""LoRA on an embedding against its definition, and the layer under torch's autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastlora import lora_embedding, ops, reference
from fastlora.backends import BACKENDS
from fastlora.backends.contract import Request
from fastlora.layer import Layer, Needs
from tests.conftest import poisoned_memory
from tests.embedding_cases import CASES, DTYPES, Case, Inputs, make_inputs, peft_results
from tests.second_order import second_order
from tests.tolerance import assert_close_to_exact

SOME = Case("", M=200, N=150, V=60, R=12, padding_idx=3)
NOTHING = Layer(torch.zeros(9, 5), torch.zeros(2, 9), torch.zeros(5, 2), 1.0)


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if reason := BACKENDS[request.param].unsupported(Request("lora_embedding_fwd", "cpu")):
        pytest.skip(reason)
    return request.param


def run(
    case: Case, inputs: Inputs, backend: str, needs: tuple[bool, bool] = (True, True)
) -> dict[str, Tensor | None]:
    layer = Layer(inputs.weight, inputs.lora_A, inputs.lora_B, case.scaling)
    y = ops.lora_embedding_fwd(inputs.ids, layer, case.weight_scale, backend=backend)
    args = (inputs.dy, inputs.ids, layer, case.padding_idx, Needs(False, *needs))
    dx, dA, dB, dbias = ops.lora_embedding_bwd(*args, backend=backend)
    assert dx is None and dbias is None
    return {"y": y, "dA": dA, "dB": dB}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_definition(case: Case, dtypes: str, backend: str) -> None:
    inputs = make_inputs(case, *DTYPES[dtypes])
    exact, plain = peft_results(case, inputs, torch.float64), peft_results(case, inputs)
    with poisoned_memory():
        got = run(case, inputs, backend)
    for name, out in got.items():
        assert out is not None and out.dtype == plain[name].dtype, name
        assert_close_to_exact(out, exact[name], plain[name], what=name)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_computes_only_what_is_needed(needs: tuple[bool, bool], backend: str) -> None:
    inputs = make_inputs(SOME, *DTYPES["bf16, fp32 adapter"])
    everything, some = run(SOME, inputs, backend), run(SOME, inputs, backend, needs)
    for name, need in zip(("dA", "dB"), needs, strict=True):
        if need:
            assert torch.equal(some[name], everything[name]), name
        else:
            assert some[name] is None, name


def test_same_bits_on_any_number_of_threads() -> None:
    inputs = make_inputs(SOME, *DTYPES["bf16, fp32 adapter"])
    first, threads = run(SOME, inputs, "native"), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for name, tensor in run(SOME, inputs, "native").items():
                assert torch.equal(tensor, first[name]), (name, count)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("sizes", [(0, 5, 7), (3, 0, 7), (0, 5, 0)])
def test_nothing_to_compute(sizes: tuple[int, int, int], backend: str) -> None:
    M, N, V = sizes
    ids, weight = torch.zeros(M, dtype=torch.int64), torch.randn(V, N)
    layer = Layer(weight, torch.randn(2, V), torch.randn(N, 2), 1.5)
    assert ops.lora_embedding_fwd(ids, layer, backend=backend).shape == (M, N)
    _, dA, dB, _ = ops.lora_embedding_bwd(torch.randn(M, N), ids, layer, backend=backend)
    assert dA is not None and dB is not None
    assert torch.equal(dA, torch.zeros(2, V)) and torch.equal(dB, torch.zeros(N, 2))


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_gradcheck_of_the_reference(padding_idx: int | None) -> None:
    ids = torch.tensor([1, 3, 3, 0, 1, 4])
    W, A, B = (torch.randn(*shape, dtype=torch.float64) for shape in ((5, 4), (2, 5), (4, 2)))
    kept = torch.ones(5).bool() if padding_idx is None else torch.arange(5) != padding_idx

    def layer(columns: Tensor, B: Tensor) -> Tensor:
        A_all = torch.where(kept, columns, A)  # finite differences of the other columns alone
        return lora_embedding(
            ids, W, A_all, B, 1.5, weight_scale=0.7, padding_idx=padding_idx, backend="reference"
        )

    leaves = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert torch.autograd.gradcheck(layer, leaves)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradients_of_gradients(padding_idx: int | None) -> None:
    ids, W = torch.tensor([1, 2, 2, 0, 1]), torch.randn(6, 8)
    A, B = torch.randn(3, 6), torch.randn(8, 3)
    got = second_order(
        lambda A, B: lora_embedding(ids, W, A, B, 1.5, padding_idx=padding_idx), [A, B]
    )
    want = second_order(
        lambda A, B: reference.plain.lora_embedding(ids, W, A, B, 1.5, padding_idx=padding_idx),
        [A, B],
    )
    for mine, theirs in zip(got, want, strict=True):
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (0, 3)])
def test_any_shape_of_ids(shape: tuple[int, ...], ids_dtype: torch.dtype, backend: str) -> None:
    ids = torch.randint(0, 9, shape, dtype=ids_dtype)
    W, A, B = torch.randn(9, 5), torch.randn(2, 9), torch.randn(5, 2)
    y = lora_embedding(ids, W, A, B, 1.5, padding_idx=-1, backend=backend)
    torch.testing.assert_close(y, W[ids.long()] + 1.5 * A.T[ids.long()] @ B.T)


def test_layouts() -> None:
    """Strided adapters, a table and a dy whose rows lie apart."""
    inputs = make_inputs(SOME, torch.float32, torch.float32)
    want = run(SOME, inputs, "native")
    for name in ("weight", "lora_A", "lora_B", "dy"):
        dense = getattr(inputs, name)
        setattr(inputs, name, torch.cat([dense, dense], dim=1)[:, : dense.shape[1]])
        assert not getattr(inputs, name).is_contiguous()
    for name, tensor in run(SOME, inputs, "native").items():
        assert torch.equal(tensor, want[name]), name


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_that_lie_apart(dtype: torch.dtype, backend: str) -> None:
    """The last column of a batch, as a decode step takes it, every second id, one id for all."""
    W, A, B = torch.randn(9, 5), torch.randn(2, 9).requires_grad_(), torch.randn(5, 2)
    batch = torch.randint(0, 9, (3, 4), dtype=dtype)
    for ids in (batch[:, -1:], batch[:, 0], batch.view(-1)[::2], batch[:1, :1].expand(2, 3)):
        y = lora_embedding(ids, W, A, B, 1.5, backend=backend)
        want = W[ids.long()] + 1.5 * A.T[ids.long()] @ B.T
        torch.testing.assert_close(y, want)
        grads = [torch.autograd.grad(out.square().sum(), A)[0] for out in (y, want)]
        torch.testing.assert_close(*grads)


def test_padding_idx_outside_of_the_table() -> None:
    tensors = (torch.randn(9, 5), torch.randn(2, 9), torch.randn(5, 2))
    with pytest.raises(ValueError, match="padding_idx must be from -9 to 8, got -10"):
        lora_embedding(torch.tensor([0]), *tensors, 1.0, padding_idx=-10)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_ids_outside_of_the_table(wrong: int) -> None:
    ids = torch.tensor([0, wrong])
    with pytest.raises(IndexError, match="ids must be from 0 to 8"):
        lora_embedding(ids, torch.randn(9, 5), torch.randn(2, 9), torch.randn(5, 2), 1.0)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"ids": torch.zeros(2, 2).long()}, ValueError, r"ids must be \[M\], got \(2, 2\)"),
        ({"ids": torch.zeros(2)}, TypeError, "ids must be int64, got torch.float32"),
        ({"weight": torch.zeros(9)}, ValueError, r"weight must be \[V, N\], got \(9,\)"),
        ({"lora_A": torch.zeros(2, 8)}, ValueError, r"lora_A must be \[R, 9\].*\(2, 8\)"),
        ({"lora_A": torch.zeros(0, 9)}, ValueError, r"R >= 1, got \(0, 9\)"),
        ({"lora_A": torch.zeros(2, 9).half()}, TypeError, "lora_A must be fp32 or the table's"),
        ({"lora_B": torch.zeros(5, 3)}, ValueError, r"lora_B must be \[5, 2\].*\(5, 3\)"),
        ({"lora_B": torch.zeros(5, 2).half()}, TypeError, "lora_B must have lora_A's dtype"),
        ({"lora_B": torch.zeros(5, 2, device="meta")}, ValueError, "lora_B must be on ids' device"),
    ],
)
def test_forward_arguments(changed: dict[str, Any], error: Any, message: str) -> None:
    given = {"ids": torch.zeros(4, dtype=torch.int64)} | changed
    ids = given.pop("ids")
    with pytest.raises(error, match=message):
        ops.lora_embedding_fwd(ids, NOTHING._replace(**given))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"dy": torch.zeros(4, 4)}, ValueError, r"dy must be \[4, 5\], got \(4, 4\)"),
        ({"padding_idx": 9}, ValueError, "padding_idx must be None or from 0 to 8, got 9"),
        ({"lora_B": torch.zeros(5)}, ValueError, r"lora_B \[N, R\], got .*\(5,\)"),
    ],
)
def test_backward_arguments(changed: dict[str, Any], error: Any, message: str) -> None:
    given = {"dy": torch.zeros(4, 5), "padding_idx": None} | changed
    layer = NOTHING._replace(lora_B=given.pop("lora_B", NOTHING.lora_B))
    with pytest.raises(error, match=message):
        ops.lora_embedding_bwd(ids=torch.zeros(4, dtype=torch.int64), layer=layer, **given)


def test_the_layers_own_arguments() -> None:
    W, A, B = torch.randn(9, 5), torch.randn(2, 9), torch.randn(5, 2)
    with pytest.raises(ValueError, match="weight must be frozen"):
        lora_embedding(torch.tensor([1]), W.requires_grad_(), A, B, 1.0)
    with pytest.raises(TypeError, match=r"ids must be int64 or int32, got torch\.float32"):
        lora_embedding(torch.tensor([1.0]), W.detach(), A, B, 1.0)


def test_autocast_changes_nothing(backend: str) -> None:
    """Neither around the forward nor around the backward."""
    inputs = make_inputs(SOME, torch.float32, torch.float32)
    A, B = inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()

    def step(enabled: bool) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = lora_embedding(inputs.ids, inputs.weight, A, B, SOME.scaling, backend=backend)
            return [y.detach(), *torch.autograd.grad(y, (A, B), inputs.dy)]

    for under, outside in zip(step(True), step(False), strict=True):
        assert torch.equal(under, outside)


@pytest.mark.parametrize("op", ["lora_embedding_fwd", "lora_embedding_bwd"])
def test_opcheck(op: str) -> None:
    if reason := BACKENDS["native"].unsupported(Request(op, "cpu")):
        pytest.skip(reason)
    inputs = make_inputs(SOME, *DTYPES["bf16, fp32 adapter"])
    adapter = (inputs.lora_A, inputs.lora_B, SOME.scaling)
    args: tuple[Any, ...] = (inputs.ids, inputs.weight, *adapter, 1.0)
    if op.endswith("bwd"):
        args = (inputs.dy, inputs.ids, *adapter, -1, True, False)
    result = torch.library.opcheck(getattr(torch.ops.fastlora, op).default, args)
    assert set(result.values()) == {"SUCCESS"}, result


def test_compiled() -> None:
    inputs = make_inputs(SOME, *DTYPES["bf16, fp32 adapter"])
    A, B = inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()

    def step(function: Any) -> list[Tensor]:
        y = function(inputs.ids, inputs.weight, A, B, SOME.scaling, padding_idx=3)
        return [y.detach(), *torch.autograd.grad(y, (A, B), inputs.dy)]

    compiled = torch.compile(lora_embedding, backend="aot_eager", fullgraph=True)
    for got, want in zip(step(compiled), step(lora_embedding), strict=True):
        assert torch.equal(got, want)


def test_the_reference_sums_the_ids_gradients() -> None:
    """By hand: two tokens of one id, and one of padding."""
    ids, dy = torch.tensor([1, 1, 2]), torch.tensor([[1.0], [10.0], [100.0]])
    A, B = torch.tensor([[3.0, 5.0, 7.0]]), torch.tensor([[2.0]])
    layer = Layer(torch.zeros(3, 1), A, B, 0.5)
    _, dA, dB, _ = reference.lora_embedding_bwd(dy, ids, layer, padding_idx=2)
    assert dA is not None and dB is not None
    assert dA.tolist() == [[0.0, 11.0, 0.0]] and dB.tolist() == [[0.5 * (55.0 + 700.0)]]


def test_ids_are_kept_once() -> None:
    """And the table not at all."""
    kept: list[Tensor] = []
    A, B = torch.randn(3, 9, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lora_embedding(torch.tensor([1, 4, 4]), torch.randn(9, 6), A, B, 1.0).sum().backward()
    assert [tuple(t.shape) for t in kept] == [(3,), (3, 9), (6, 3)]
