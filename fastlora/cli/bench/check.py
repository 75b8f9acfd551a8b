"""The gate: a provider's result and gradients are checked before they are timed."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from ...layer import Layer
from ...reference import dropout_mask, plain
from ...tolerance import exceeds
from ..options import torch_dtype
from .case import SCALING, Case
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
    keep, exact_keep = (
        _keep(provider, case, p, setup, exact) if p else None for exact in (False, True)
    )
    adapter = () if name is None else setup.adapter(name)
    rows = _rows(case.M)
    base = _sequence(setup, case, rows, adapter, keep)
    exact = _sequence(setup, case, rows, adapter, exact_keep, exact=True)
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


def _keep(provider: Provider, case: Case, p: float, setup: Setup, exact: bool) -> Tensor:
    """What dropout multiplies x by, as the provider draws it from `_SEED`."""
    name = provider.adapter_dtype(setup.layer)
    assert name is not None
    shape, dtype = (case.M, setup.layer.K), torch_dtype(name)
    if provider.dropout == "torch":
        torch.manual_seed(_SEED)
        return dropout(torch.ones(shape, dtype=dtype, device=setup.device), p)
    mask = _fastlora_mask(*shape, p, setup.device)
    return plain.dropout_factors(mask, p, torch.float64 if exact else dtype)


@lru_cache(maxsize=1)
def _fastlora_mask(M: int, K: int, p: float, device: str) -> Tensor:
    torch.manual_seed(_SEED)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return dropout_mask(M, K, p, seed, device)


def _sequence(
    setup: Setup,
    case: Case,
    rows: Tensor,
    adapter: tuple[Tensor, ...],
    keep: Tensor | None,
    exact: bool = False,
) -> dict[str, Tensor]:
    """PEFT's sequence of torch calls, in the working dtypes or in float64; autograd's gradients."""
    x, dy = setup.tokens(case.M)
    dense = setup.exact_weight if exact else setup.dense[0]
    if exact:
        x, dy = x.double(), dy.double()
        adapter = tuple(t.detach().double().requires_grad_() for t in adapter)
    leaf = x[rows].requires_grad_()
    if not adapter:
        y = linear(leaf, dense)
        return {"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dy[rows])[0]}
    (weight, state), (A, B) = setup.weights[0], adapter
    layer = Layer(weight, A, B, SCALING, quant_state=state)
    kept = None if keep is None else keep[rows]
    y = plain.lora_linear(leaf, layer, factors=kept, weight=dense)
    results = {"y": y.detach(), "dx": torch.autograd.grad(y, leaf, dy[rows])[0]}
    if case.mode != "inference":
        term = plain.lora_term(x, layer, keep)
        grads = torch.autograd.grad(term, adapter, dy.to(term.dtype))
        results |= dict(zip(("dA", "dB"), grads, strict=True))
    return results
