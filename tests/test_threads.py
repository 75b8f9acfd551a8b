"""Threads: how many there are, that results don't depend on it, forks, and the memory they keep."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fastlora.backends import native
from tests.cases import DTYPES, Base, Case, Inputs, Results, make_inputs, run

pytestmark = [
    pytest.mark.skipif(native.build_info() is None, reason=str(native.unavailable_reason())),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
# csrc/cpu/runtime/scratch.cpp: what a block may have to be kept. A caller has one, and so has each
# thread that works for it.
KEPT = 32 * MIB

# A decoding call, one panel of tokens, several; all bases' ways to read the weight.
LAYERS = [
    (Case("decoding", 5, 133, 576, 16, dropout_p=0.1), Base("nf4", 64, nested=True), "bf16"),
    (Case("one panel", 40, 150, 320, 8, dropout_p=0.1), Base(), "bf16, fp32 adapter"),
    (Case("panels", 300, 150, 1088, 16, dropout_p=0.1), Base("nf4", 64), "bf16, fp32 adapter"),
    (Case("fp16", 150, 101, 131, 3, dropout_p=0.1), Base("fp4", 128, nested=True), "fp16"),
    (Case("fp32", 130, 300, 700, 4), Base("nf4", 64, nested=True), "fp32"),
]


def layers() -> list[Callable[[], Results]]:
    """Calls, forward and backward, whose inputs are made beforehand."""

    def call(case: Case, inputs: Inputs) -> Callable[[], Results]:
        return lambda: run(case, inputs, "native")

    return [call(case, make_inputs(case, base, DTYPES[name])) for case, base, name in LAYERS]


def same(a: Results, b: Results) -> bool:
    return all(
        torch.equal(tensor, getattr(b, name)) for name, tensor in a.items() if tensor is not None
    )


def resident() -> int:
    """Bytes of this process in memory, once the allocator has given back what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def running_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def in_a_new_process(function: str, threads: int) -> None:
    """Runs a function of this module where nothing has started threads."""
    code = f"from tests import test_threads; test_threads.{function}({threads})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- how many ----------------------------------------------------------------------------------


def count_threads(threads: int) -> None:
    calls = layers()
    torch.set_num_threads(threads)
    before = running_threads()
    for call in calls:
        call()
    started = running_threads() - before
    # The caller works as well; torch's own pool is used, and no other.
    assert started == threads - 1, f"{started} threads were started"


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_set_num_threads_is_honoured(threads: int) -> None:
    in_a_new_process("count_threads", threads)


def test_results_are_the_same_on_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    calls = layers()
    try:
        torch.set_num_threads(1)
        expected = [call() for call in calls]
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for call, want, (case, *_) in zip(calls, expected, LAYERS, strict=True):
                assert same(call(), want), f"{case}, {threads} threads"
    finally:
        torch.set_num_threads(before)


# ---- several callers at once -------------------------------------------------------------------


def test_several_python_threads_at_once() -> None:
    """Each caller has scratch memory of its own: results are those of one call after the other."""
    calls = layers()
    expected = [call() for call in calls]
    rounds = 6
    start = threading.Barrier(3)

    def work(first: int) -> list[str]:
        start.wait(timeout=60)
        wrong = []
        for i in range(rounds * len(calls)):
            j = (first + i) % len(calls)
            if not same(calls[j](), expected[j]):
                wrong.append(str(LAYERS[j][0]))
        return wrong

    with ThreadPoolExecutor(3) as pool:
        assert [future.result() for future in [pool.submit(work, i) for i in range(3)]] == [[]] * 3


class LoraDataset(Dataset):
    """Items that a worker makes with the kernels: a result, and how many threads that started."""

    def __init__(self) -> None:
        self.calls = layers()

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        before = running_threads()
        y = self.calls[index]().y
        started = running_threads() - before
        return y.double().numpy(), started  # for a tensor, torch would start a thread of its own


def load_with_forked_workers(threads: int) -> None:
    torch.set_num_threads(threads)
    dataset = LoraDataset()
    expected = [call().y for call in dataset.calls]  # the pool runs before the fork
    # A deadlock ends by the timeout.
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=2,
        collate_fn=lambda item: item,
        multiprocessing_context="fork",
        timeout=60,
    )
    for epoch in range(2):
        for (y, started), want in zip(loader, expected, strict=True):
            assert np.array_equal(y, want.double().numpy()), epoch
            # Torch tells its workers to use one thread each, and the kernels obey.
            assert started == 0, f"{started} threads were started in a worker"
    assert all(
        torch.equal(call().y, want) for call, want in zip(dataset.calls, expected, strict=True)
    )


@pytest.mark.slow
def test_in_forked_data_loader_workers() -> None:
    in_a_new_process("load_with_forked_workers", 2)


# ---- scratch memory ----------------------------------------------------------------------------


def large_call() -> Callable[[], Results]:
    """fp16 is widened before it is multiplied: dy as fp32 alone takes 128 MiB of scratch memory."""
    case = Case("", M=8192, N=4096, K=8, R=1, dropout_p=0.1, bias=False)
    inputs = make_inputs(case, Base(), DTYPES["fp16"])
    return lambda: run(case, inputs, "native")


def keep_little(threads: int) -> None:
    torch.set_num_threads(threads)
    for call in [*layers(), *layers()]:
        call()
    call = large_call()
    before = resident()
    for _ in range(3):
        call()
        kept = resident() - before
        assert kept <= (1 + threads) * KEPT, f"{kept / MIB:.0f} MiB are kept"


@pytest.mark.slow
def test_scratch_memory_is_bounded_after_a_large_call() -> None:
    in_a_new_process("keep_little", 2)


def free_with_the_thread(threads: int) -> None:
    torch.set_num_threads(threads)
    # About 16 MiB of scratch memory: little enough to be kept as long as the thread lives.
    case = Case("", M=1024, N=1024, K=64, R=1)
    inputs = make_inputs(case, Base(), DTYPES["fp32"])
    sizes = []
    for _ in range(16):
        caller = threading.Thread(target=lambda: run(case, inputs, "native"))
        caller.start()
        caller.join()
        sizes.append(resident())
    # Kept memory would be 14 times 16 MiB.
    grown = sizes[-1] - sizes[1]
    assert grown <= 64 * MIB, [f"{size / MIB:.0f} MiB" for size in sizes]


@pytest.mark.slow
def test_scratch_memory_is_freed_with_its_thread() -> None:
    in_a_new_process("free_with_the_thread", 2)
