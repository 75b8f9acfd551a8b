"""The gate: a provider's result and gradients are checked before they are timed."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from ...reference import dropout_mask, dropout_threshold
from ...tolerance import exceeds
from .case import DTYPES, SCALING, Case
from .inputs import Built, Setup
from .providers import Provider

# y and dx are compared on so many tokens: in float64 the whole of them would take longer than all
# the timing. dA and dB, which every token enters, are compared in full.
_ROWS = 48
_SEED = 20


def fault(provider: Provider, built: Built, setup: Setup, case: Case) -> str | None:
    """What is wrong with the provider's results, or None: the error policy of `tolerance`.

    Args:
        provider, built: who is checked, and one copy of its layer.
        setup, case: the inputs.
    """
    if provider.name in ("read", "write"):
        return None
    if case.mode == "dequantize":
        same = torch.equal(built.call(setup.tokens(0)[0]), setup.dense[0])
        return None if same else "the weight is wrong: some bits differ."
    training = case.mode != "inference"
    dropping = training and provider.dropout != "own"
    outs = _results(built, setup, case, dropping)
    name = provider.adapter_dtype(setup.layer)
    p = setup.layer.dropout if dropping and name is not None else 0.0
    keep = _keep(provider, case, p, setup) if p else None
    adapter = () if name is None else setup.adapter(getattr(torch, DTYPES[name]))
    rows = _rows(case.M)
    base = _sequence(setup, case, rows, adapter, keep)
    exact = _sequence(setup, case, rows, adapter, keep, exact=True)
    for what, out in outs.items():
        if what in ("y", "dx"):
            out = out[rows]
        report = exceeds(out, exact[what], base[what])
        if not report.ok:
            return f"{what} is wrong: {report}"
    return None


def _rows(M: int) -> Tensor:
    return torch.linspace(0, M - 1, min(M, _ROWS)).round().long()


def _results(built: Built, setup: Setup, case: Case, dropping: bool) -> dict[str, Tensor]:
    """y and, in training, dx, dA and dB of what will be timed."""
    x, dy = setup.tokens(case.M)
    built.train(dropping)
    torch.manual_seed(_SEED)
    if case.mode == "inference":
        with torch.no_grad():
            return {"y": built.call(x)}
    x = x.detach().requires_grad_()
    y = built.call(x)
    grads = torch.autograd.grad(y, (x, *built.adapter), dy)
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), grads, strict=False))}


def _keep(provider: Provider, case: Case, p: float, setup: Setup) -> Tensor:
    """The dropout mask times its scale, as the provider draws it from `_SEED`."""
    name = provider.adapter_dtype(setup.layer)
    assert name is not None
    shape = (case.M, setup.layer.K)
    if provider.dropout == "torch":
        torch.manual_seed(_SEED)
        ones = torch.ones(shape, dtype=getattr(torch, DTYPES[name]), device=setup.device)
        return dropout(ones, p)
    return _fastlora_keep(*shape, p, setup.device)


@lru_cache(maxsize=1)
def _fastlora_keep(M: int, K: int, p: float, device: str) -> Tensor:
    torch.manual_seed(_SEED)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return dropout_mask(M, K, p, seed, device) * dropout_threshold(p)[1]


def _sequence(
    setup: Setup,
    case: Case,
    rows: Tensor,
    adapter: tuple[Tensor, ...],
    keep: Tensor | None,
    exact: bool = False,
) -> dict[str, Tensor]:
    """PEFT's sequence of torch calls, in the working dtypes or in float64; autograd's gradients.

    y = x W^T + scaling * B A (keep * x)
    """
    x, dy = setup.tokens(case.M)
    weight = setup.exact_weight if exact else setup.dense[0]
    if exact:
        x, dy = x.double(), dy.double()
        adapter = tuple(t.detach().double().requires_grad_() for t in adapter)

    def lora(x: Tensor, keep: Tensor | None) -> Tensor:
        A, B = adapter
        dropped = x.to(A.dtype)
        if keep is not None:
            dropped = dropped * keep.to(A.dtype)
        return linear(linear(dropped, A), B) * SCALING

    leaf = x[rows].requires_grad_()
    y = linear(leaf, weight)
    if adapter:
        y = y + lora(leaf, None if keep is None else keep[rows]).to(y.dtype)
    results = {"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dy[rows])[0]}
    if adapter and case.mode != "inference":
        term = lora(x, keep)
        grads = torch.autograd.grad(term, adapter, dy.to(term.dtype))
        results |= dict(zip(("dA", "dB"), grads, strict=True))
    return results
