"""The backend of the integration tests, the compiled one where there is one; shared models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fastlora
from fastlora.backends import native
from tests.integrations.fusing import Nodes
from tests.integrations.models import MLP, llama, peft_model
from tests.integrations.trios import WAYS

BACKENDS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            native.unavailable_reason() is not None, reason=str(native.unavailable_reason())
        ),
    ),
    "reference",
]


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend of the test: forced, so that no test passes by falling back to PEFT's code.

    `@pytest.mark.parametrize("backend", BACKENDS, indirect=True)` runs a test on each, and "auto"
    leaves the choice to fastlora.
    """
    best = "native" if native.unavailable_reason() is None else "reference"
    name: str = getattr(request, "param", best)
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    if name == "auto":
        yield name
        return
    with fastlora.use_backend(name):
        yield name


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small, a second thread only waits: it makes the tests ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stock() -> nn.Module:
    """PEFT's own model."""
    return peft_model(MLP(), lora_dropout=0.1)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """A Llama without adapters."""
    torch.manual_seed(0)
    return llama()


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """How its layers become fast; see `trios.plug`."""
    return str(request.param)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Nodes:
    """Counts the joined nodes of the test."""
    return Nodes(monkeypatch)
