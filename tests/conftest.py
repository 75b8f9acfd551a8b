"""Fixtures for every test: a fixed seed, poisoned memory, and the GPU marker's skip."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# Libgomp reads it when torch loads it. Threads that spin while they wait take the cores from the
# other test processes, and results don't depend on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Checks that several modules run: their asserts say as much as those of a test module.
pytest.register_assert_rewrite("tests.backend_checks", "tests.cuda_checks", "tests.peft_layers")
# What the user tuned is none of the tests' business; the library reads it when it loads.
os.environ["FASTLORA_CACHE"] = tempfile.mkdtemp(prefix="fastlora-cache-")
# Triton reads it when it is first imported, by whichever test comes first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (integers: their largest value) until something writes to them.

    The fill happens inside `aten::empty` and its kin, so it reaches tensors that C++ allocates.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@pytest.fixture
def poison() -> Iterator[None]:
    """The test runs in `poisoned_memory`: a kernel that leaves an element unwritten returns NaN."""
    with poisoned_memory():
        assert torch.empty(1).isnan().all()
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="this torch sees no CUDA device"))
