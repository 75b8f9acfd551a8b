"""Runs the integration tests on the compiled backend where there is one, else on the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastlora
from fastlora.backends import native

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
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend of the test: forced, so that no test passes by falling back to PEFT's code.

    `@pytest.mark.parametrize("backend", BACKENDS, indirect=True)` runs a test on each.
    """
    best = "native" if native.unavailable_reason() is None else "reference"
    name: str = getattr(request, "param", best)
    with fastlora.use_backend(name):
        yield name
