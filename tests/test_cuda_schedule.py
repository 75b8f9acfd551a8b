"""Emulated CUDA kernels: the order of blocks and warps, how sums are cut, and banks that meet."""

from __future__ import annotations

import re

import pytest
import torch

from fastlora import reference
from fastlora.backends import native, schemas
from tests import cuda_checks, emulated
from tests.cases import DTYPES, Case, exact_results, make_inputs, plain_results, run
from tests.csrc import cuda_gates
from tests.cuda_checks import NESTED, PLAIN_CONFLICTS, plain_conflicts
from tests.tolerance import assert_close_to_exact

backend = cuda_checks.backend


def test_any_schedule_gives_the_same_bits(backend: str) -> None:
    """Blocks and warps take their turns in another order each time."""
    library = emulated.load()
    for M, K in ((20, 1024), (130, 1056), (70, 1059)):
        case = Case("", M, N=200, K=K, R=20, dropout_p=0.1)
        inputs = make_inputs(case, NESTED, DTYPES["bf16, fp32 adapter"])
        first = run(case, inputs, backend)
        for seed in range(3):
            library.simt_seed(seed)
            again = run(case, inputs, backend)
            for name, tensor in first.items():
                assert torch.equal(tensor, getattr(again, name)), name


@pytest.mark.parametrize(
    ("sm", "blocks_at_once"), [(80, 2), (86, 1), (89, 1), (90, 2), (100, 2), (120, 1)]
)
@pytest.mark.parametrize(
    ("M", "K", "kernels"),
    [
        (70, 2112, "qlora_gemm_(fwd|dx)_.*"),
        (70, 2113, "qlora_gemm_ragged_.*_128_.*"),
        (60, 2113, "qlora_gemm_ragged_.*_64_.*"),
    ],
)
def test_sums_are_cut_for_every_place_of_a_gpu(
    sm: int, blocks_at_once: int, M: int, K: int, kernels: str, backend: str
) -> None:
    """Six multiprocessors, each with memory and registers for one block or for two; three tiles."""
    if "128" in kernels:
        blocks_at_once = 1
    library, parts = emulated.load(), 2 * blocks_at_once
    case = Case("", M, N=384, K=K, R=4)
    inputs = make_inputs(case, NESTED, DTYPES["bf16"])
    quant = schemas.packed(inputs.weight, inputs.quant_state)
    S = reference.shrink(inputs.x, inputs.layer)
    options = (inputs.bias, S, inputs.lora_B, inputs.scaling, torch.bfloat16)
    library.simt_set_architecture(sm)
    before = library.simt_counters().blocks
    y = native.cuda.ops.qlora_gemm_fwd(inputs.x, *quant, *options)
    blocks = library.simt_counters().blocks - before
    library.simt_set_architecture(80)
    adding = -(-M // 8) * 2  # blocks of 8 tokens and 256 outputs add the parts
    assert blocks == 3 * parts + adding
    # As many have registers there: 65536 of a multiprocessor, for blocks of 256 threads.
    _, gates = cuda_gates.read_gates()
    compiled = [row for row in gates if re.fullmatch(f"sm_{sm}a?", row["arch"])]
    registers = [int(row["registers"]) for row in compiled if re.fullmatch(kernels, row["kernel"])]
    assert registers and max(registers) * 256 * blocks_at_once <= 65536
    plain = plain_results(case, inputs).y
    assert_close_to_exact(y, exact_results(case, inputs).y, plain, what="y")


@pytest.mark.parametrize("K", [160, 161])
def test_matrix_loads_meet_no_bank_twice(K: int, backend: str) -> None:
    case = Case("", M=130, N=136, K=K, R=20, dropout_p=0.1)
    inputs = make_inputs(case, NESTED, DTYPES["bf16"])
    before = emulated.load().simt_counters()
    run(case, inputs, backend)
    after = emulated.load().simt_counters()
    assert after.matrix_loads > before.matrix_loads
    assert after.bank_conflicts == before.bank_conflicts


@pytest.mark.parametrize("K", [512, 499])
@pytest.mark.parametrize("M", [1, 9, 17, 40, 130])
def test_plain_accesses_seldom_meet_in_a_bank(M: int, K: int, backend: str) -> None:
    counted = plain_conflicts(emulated.load(), M, K)
    assert PLAIN_CONFLICTS.keys() - counted.keys() == ({"qlora_decode"} if K % 64 else set())
    for kernel, (conflicts, turns) in counted.items():
        assert turns > 0 and conflicts <= PLAIN_CONFLICTS[kernel] * turns, kernel


def test_main_loops_meet_in_banks_for_packed_codes_alone(backend: str) -> None:
    """A step of qlora_gemm reads the packed codes in eight turns a warp instead of four; the loop
    of qlora_decode never waits."""
    library = emulated.load()
    short, long = (plain_conflicts(library, 70, K, nested=False) for K in (512, 1024))
    more = {kernel: long[kernel][0] - short[kernel][0] for kernel in short}
    # The longer sum is cut into two parts: one block more decodes a first step before its loop.
    steps, warps = 512 // 64 + 1, 8
    assert more["qlora_gemm_fwd"] == steps * warps * 4
    assert more["qlora_decode"] == 0
